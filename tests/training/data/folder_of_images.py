"""Small folders of images for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def smooth_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(folder: Path, sizes: list[tuple[int, int]], captions: bool = True) -> Path:
    """Images 0.png, 1.png, ... of these heights and widths, with ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (height, width) in enumerate(sizes):
        smooth_image(height, width, number).save(folder / f"{number}.png")
        records.append(
            {"file_name": f"{number}.png", "text": f"a red cube {number}", "dense": f"a large red cube {number}"}
        )
    if captions:
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder
