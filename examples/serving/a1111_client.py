"""Generate, edit and inpaint through `impasto serve` with a client of the A1111 interface.

pip install webuiapi
impasto serve
python examples/serving/a1111_client.py "a red cube on top of a blue sphere"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import urlsplit

import webuiapi
from PIL import Image


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red cube on top of a blue sphere")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="one of the server's keys, if it has any")
    parser.add_argument("--output", type=Path, default=Path("out"), help="a folder")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)

    address = urlsplit(given.url)
    # A key is the password; the user name may be any.
    user = {"username": "me", "password": given.key} if given.key else {}
    client = webuiapi.WebUIApi(host=address.hostname, port=address.port or 80, **user)
    size = {"width": 256, "height": 256}

    found = client.txt2img(prompt=given.prompt, seed=7, cfg_scale=4.5, sampler_name="DPM++ 2M", **size)
    found.image.save(given.output / "generated.png")
    print(found.info["infotexts"][0])

    changed = client.img2img([found.image], prompt="a green cone", denoising_strength=0.6, seed=7, **size)
    changed.image.save(given.output / "changed.png")

    mask = Image.new("L", found.image.size)
    mask.paste(255, (128, 0, 256, 256))  # white is repainted
    repainted = client.img2img([found.image], mask_image=mask, prompt="a green cone", inpaint_full_res=False, **size)
    repainted.image.save(given.output / "repainted.png")


if __name__ == "__main__":
    main()
