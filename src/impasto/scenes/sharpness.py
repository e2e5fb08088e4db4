"""How sharp images of scenes are, compared with renders of the same scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from .renderer import render
from .world import Scene


def top_octave(image: Tensor) -> float:
    """The mean power of a quarter to half a cycle per pixel in the brightness of an image [3, H, W]."""
    power = torch.fft.fft2(image.mean(0), norm="ortho").abs().square()  # [H, W]
    rows, columns = (torch.fft.fftfreq(side) for side in power.shape)
    radius = (rows[:, None] ** 2 + columns[None] ** 2).sqrt()
    return float(power[(radius >= 0.25) & (radius < 0.5)].mean())


def relative_sharpness(scenes: Iterable[Scene], images: Iterable[Tensor]) -> float:
    """`top_octave` of images, averaged, as a multiple of that of renders of the same scenes in the same sizes.

    Args:
        images: one per scene, [3, H, W] in [0, 1].
    """
    shown = rendered = 0.0
    for scene, image in zip(scenes, images, strict=True):
        shown += top_octave(image)
        height, width = image.shape[1:]
        rendered += top_octave(render(dataclasses.replace(scene, height=height, width=width)))
    return shown / rendered
