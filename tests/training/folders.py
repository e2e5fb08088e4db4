"""A folder of small images with captions that say what they show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (230, 220, 30)}


def write_images(folder: Path, count: int = 32, size: int = 16) -> Path:
    """Images of one color each, with a white square, and captions such as "a red cube"."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        name = list(COLOURS)[i % len(COLOURS)]
        pixels = np.empty((size, size, 3), dtype=np.uint8)
        pixels[:] = COLOURS[name]
        row, column = divmod(i // len(COLOURS) % 4, 2)
        half = size // 2
        pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] = 255
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {name} cube"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
