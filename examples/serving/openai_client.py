"""Generate, watch and edit an image through `impasto serve` with OpenAI's own client.

pip install openai
impasto serve --alias dall-e-3=scenes
python examples/serving/openai_client.py "a red cube on top of a blue sphere"
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

import openai
from PIL import Image


def generate(client: openai.OpenAI, prompt: str, folder: Path) -> Path:
    """Two images of one prompt; the second has the seed that follows the first one's."""
    answer = client.images.generate(model="dall-e-3", prompt=prompt, n=2, size="256x256", extra_body={"seed": 7})
    for number, item in enumerate(answer.data or []):
        (folder / f"image-{number}.png").write_bytes(base64.b64decode(item.b64_json or ""))
    return folder / "image-0.png"


def watch(client: openai.OpenAI, prompt: str, folder: Path) -> None:
    """Previews of the denoising, as they come."""
    stream = client.images.generate(model="dall-e-3", prompt=prompt, size="256x256", stream=True, partial_images=3)
    for event in stream:
        if event.type == "image_generation.partial_image":
            name = f"preview-{event.partial_image_index}.png"
        elif event.type == "image_generation.completed":
            name = "watched.png"
        else:
            continue
        (folder / name).write_bytes(base64.b64decode(event.b64_json))
        print(name)


def edit(client: openai.OpenAI, image: Path, prompt: str, folder: Path) -> None:
    """Repaint the right half: transparent pixels of a mask are repainted."""
    with Image.open(image) as opened:
        mask = Image.new("RGBA", opened.size, "black")
    mask.paste((0, 0, 0, 0), (mask.width // 2, 0, mask.width, mask.height))
    file = io.BytesIO()
    mask.save(file, "PNG")
    answer = client.images.edit(model="dall-e-3", image=image, mask=("mask.png", file.getvalue()), prompt=prompt)
    (folder / "edited.png").write_bytes(base64.b64decode((answer.data or [])[0].b64_json or ""))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red cube on top of a blue sphere")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none", help="one of the server's keys, if it has any")
    parser.add_argument("--output", type=Path, default=Path("out"), help="a folder")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key=given.key)
    first = generate(client, given.prompt, given.output)
    watch(client, given.prompt, given.output)
    edit(client, first, "a green cone", given.output)


if __name__ == "__main__":
    main()
