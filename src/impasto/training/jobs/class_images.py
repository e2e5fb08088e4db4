"""Images of a class, for DreamBooth's prior preservation (Ruiz et al. 2022, 2208.12242, section 3.3).

A model that learns one dog from a few images should not forget what other dogs look like. So it also trains on images
of the class that it has generated itself, before.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checks import finite, whole_number
from ...errors import InputError
from ...files import make_folder
from ...pipelines.image_files import GenerationSettings, save_image
from ..data.listing import EXTENSIONS
from ..data.sample import Sample

logger = logging.getLogger("impasto")


def generate_class_images(
    pipe: Any,
    prompt: str,
    folder: str | os.PathLike[str],
    count: int,
    *,
    size: tuple[int, int],
    steps: int = 20,
    guidance_scale: float = 4.5,
    batch_size: int = 4,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Generate the images that a folder lacks, as ``class_00000.png`` and so on.

    Each image has its own seed, and each file is written completely or not at all, so that a job that was stopped goes
    on where it was. Other images in the folder count too.

    Args:
        pipe: a pipeline; the model before training.
        count: of images that the folder is to have.
        size: height and width in pixels.
        rank, world: of several processes, each generates its share.

    Returns:
        how many images this process has generated

    Raises:
        InputError: an empty prompt, or a number out of range.
        OutputError: a file cannot be written.
    """
    count, batch_size = whole_number("count", count), whole_number("batch_size", batch_size)
    guidance_scale = finite("guidance_scale", guidance_scale, least=0)
    if not prompt.strip():
        raise InputError("images of a class need a prompt, such as 'a photo of a dog'; set the caption of the source")
    from ...pipelines.glm_image import GlmImagePipeline

    exact = {} if isinstance(pipe, GlmImagePipeline) else {"use_resolution_binning": False}
    path = Path(folder)
    make_folder(path)
    missing = [number for number in missing_images(path, count) if number % world == rank]
    if missing:
        logger.info("generating %d images of %r in %s", len(missing), prompt, path)
    for start in range(0, len(missing), batch_size):
        numbers = missing[start : start + batch_size]
        images = pipe(
            prompt,
            num_images_per_prompt=len(numbers),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size[0],
            width=size[1],
            **exact,
            generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
        ).images
        for number, image in zip(numbers, images, strict=True):
            settings = GenerationSettings(prompt, steps, guidance_scale=guidance_scale, seed=seed + number)
            save_image(image, path / f"class_{number:05d}.png", settings)
    return len(missing)


class PlannedImages:
    """A source as large as the folder will be, of grey images: a run can be measured before they are generated."""

    def __init__(self, caption: str, count: int, size: tuple[int, int]):
        self.caption, self.count, self._size = caption, count, size

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        return self._size

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        return Sample(image=torch.zeros(3, *target), caption=self.caption, size=self._size)


def missing_images(folder: Path, count: int) -> Sequence[int]:
    """The numbers of the images that have to be generated, so that a folder has ``count`` images."""
    generated, others = set(), 0
    for path in folder.iterdir() if folder.is_dir() else ():
        found = re.fullmatch(r"class_(\d{5,})\.png", path.name)
        if found:
            generated.add(int(found[1]))
        elif path.suffix.lower() in EXTENSIONS:
            others += 1
    return [number for number in range(count - others) if number not in generated]
