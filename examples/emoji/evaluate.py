"""Measure how well a model has learned the emoji: is the image of a caption nearest to its own training image?

    python examples/emoji/evaluate.py runs/emoji/transformer/result runs/emoji/data --output emoji.png
    python examples/emoji/evaluate.py runs/emoji/transformer/result runs/emoji/data --output blue.png \\
        --lora runs/emoji/lora/result --background "#4080e0" --without animals-nature

Images are generated for the labels of training images, spread evenly over the data set. Each is compared with all
training images, in pixels at 32 px. It counts as right if the nearest is the same emoji, in any skin tone. With
--background, it is also counted how many images have this color along their borders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from impasto import PixArtSigmaPipeline
from impasto.errors import ImpastoError, InputError
from impasto.pipelines.image_files import open_image
from impasto.training.data.listing import read_records

SIDE = 32  # px, of what is compared
CLOSE = 48  # levels, the most that a border may differ from the background in any channel


def pixels(image: Image.Image) -> np.ndarray:
    """An image [SIDE * SIDE * 3] at the size of the comparison."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).reshape(-1)


def chosen(records: list[dict[str, Any]], count: int, without: str | None) -> list[dict[str, Any]]:
    """Records spread evenly over a data set, except those of one group."""
    left = [record for record in records if record["group"] != without]
    if len(left) < count:
        raise InputError(f"there are {len(left)} images to choose from, fewer than {count}; lower --count")
    return [left[len(left) * i // count] for i in range(count)]


def generate(
    pipe: PixArtSigmaPipeline, prompts: list[str], side: int, steps: int, guidance: float
) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        batch = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images += pipe(
            batch, height=side, width=side, num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return images


def border(image: Image.Image) -> np.ndarray:
    """The median color [3] of the outermost pixels."""
    levels = np.asarray(image.convert("RGB"))
    edges = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    return np.median(edges.astype(np.float32), axis=0)


def sheet(rows: list[tuple[Image.Image, Image.Image]], columns: int = 8) -> Image.Image:
    """Pairs of a generated image and the training image of its caption, side by side."""
    side = rows[0][0].width
    drawn = Image.new("RGB", (columns * 2 * side, -(-len(rows) // columns) * side), "white")
    for i, pair in enumerate(rows):
        for j, image in enumerate(pair):
            drawn.paste(image.resize((side, side)), ((i % columns * 2 + j) * side, i // columns * side))
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a pipeline")
    parser.add_argument("data", type=Path, help="the folder that prepare.py made")
    parser.add_argument("--count", type=int, default=64, help="of captions")
    parser.add_argument("--side", type=int, default=64, help="of the generated images, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--lora", type=Path, help="an adapter to use")
    parser.add_argument("--background", default="white", help="what the training images are composited on")
    parser.add_argument("--without", metavar="GROUP", help="choose no captions of this group")
    parser.add_argument("--output", type=Path, help="an image file: each generated image next to the training image")
    options = parser.parse_args(argv)

    records = read_records(options.data / "metadata.jsonl")
    known = [open_image(options.data / record["file_name"], options.background) for record in records]
    table = np.stack([pixels(image) for image in known])  # [N, SIDE * SIDE * 3]
    wanted = chosen(records, options.count, options.without)
    pipe = PixArtSigmaPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.lora is not None:
        pipe.load_lora_weights(str(options.lora))
    prompts = [record["text"] for record in wanted]
    images = generate(pipe, prompts, options.side, options.steps, options.guidance_scale)

    nearest = [records[int(np.square(table - pixels(image)).sum(1).argmin())] for image in images]
    right = sum(found["emoji"] == record["emoji"] for found, record in zip(nearest, wanted))
    for found, record in zip(nearest, wanted):
        if found["emoji"] != record["emoji"]:
            print(f"  {record['text']}: nearest to {found['text']}")
    print(f"right: {right} of {len(wanted)} ({100 * right / len(wanted):.0f} %)")
    color = np.array(ImageColor.getrgb(options.background)[:3], dtype=np.float32)
    colored = sum(bool(np.abs(border(image) - color).max() <= CLOSE) for image in images)
    print(f"with a border of the color {options.background}: {colored} ({100 * colored / len(wanted):.0f} %)")
    if options.output is not None:
        places = {record["file_name"]: i for i, record in enumerate(records)}
        sheet([(image, known[places[record["file_name"]]]) for image, record in zip(images, wanted)]).save(
            options.output
        )


if __name__ == "__main__":
    try:
        main()
    except ImpastoError as error:
        sys.exit(f"error: {error}")
