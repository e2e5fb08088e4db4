#!/usr/bin/env bash
# Generate and edit through `impasto serve` with curl, base64 and Python's json.
#
#     impasto serve
#     bash examples/serving/curl.sh "a red cube on top of a blue sphere" out
set -euo pipefail

url=${IMPASTO_URL:-http://127.0.0.1:8000}
key=${IMPASTO_KEY:-none}
prompt=${1:-a red cube on top of a blue sphere}
folder=${2:-out}
mkdir -p "$folder"

image() { python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["b64_json"])' | base64 --decode; }

body=$(python3 -c 'import json, sys; print(json.dumps({"prompt": sys.argv[1], "size": "256x256", "seed": 7}))' "$prompt")
curl --silent --show-error --fail-with-body "$url/v1/images/generations" \
  --header "Authorization: Bearer $key" --header "Content-Type: application/json" --data "$body" |
  image >"$folder/image.png"
echo image.png

# An edit of the whole image; with `--form mask=@mask.png`, of what is transparent in the mask.
curl --silent --show-error --fail-with-body "$url/v1/images/edits" \
  --header "Authorization: Bearer $key" \
  --form "image=@$folder/image.png;type=image/png" --form "prompt=a green cone" --form strength=0.6 |
  image >"$folder/edited.png"
echo edited.png
