"""Training samples of the small world: images with captions, without held-out combinations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .captions import caption
from .renderer import SUPERSAMPLING, shade, trace
from .world import Scene, is_held_out, recolour, sample_arrangement


class SceneBatch(NamedTuple):
    images: Tensor  # [N, 3, H, W] uint8
    scenes: list[Scene]
    captions: list[str]
    ids: Tensor  # [N, H, W] uint8, per pixel: 0 the background, i the i-th solid of its scene


def scene_batch(seed: int, geometries: int, colourings: int, height: int = 128, width: int = 128) -> SceneBatch:
    """Sample `geometries` arrangements in `colourings` colourings each: N = geometries * colourings samples.

    The colourings of an arrangement are adjacent. The same arguments give the same batch. Each arrangement is traced
    only once, as that is the expensive step.
    """
    rng = np.random.default_rng(seed)
    images = torch.empty(geometries * colourings, 3, height, width, dtype=torch.uint8)
    ids = torch.empty(geometries * colourings, height, width, dtype=torch.uint8)
    scenes: list[Scene] = []
    captions: list[str] = []
    for _ in range(geometries):
        arrangement = sample_arrangement(rng, height, width)
        buffer = trace(arrangement, height, width, arrangement.seed)
        for _ in range(colourings):
            scene = recolour(arrangement, rng)
            while is_held_out(scene):
                scene = recolour(arrangement, rng)
            image = shade(buffer, [solid.color for solid in scene.solids], scene.background)
            images[len(scenes)] = image.mul_(255).round_().to(torch.uint8)
            ids[len(scenes)] = buffer.ids[::SUPERSAMPLING, ::SUPERSAMPLING]
            scenes.append(scene)
            captions.append(caption(scene, rng))
    return SceneBatch(images, scenes, captions, ids)
