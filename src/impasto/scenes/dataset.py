"""Training samples of the small world: pictures with captions, without the held-out combinations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .captions import caption
from .renderer import shade, trace
from .world import Scene, is_held_out, recolour, sample_arrangement


def scene_batch(
    seed: int, geometries: int, colourings: int, height: int = 128, width: int = 128
) -> tuple[Tensor, list[Scene], list[str]]:
    """Draw `geometries` arrangements in `colourings` colourings each: N = geometries * colourings samples.

    Returns uint8 pictures [N, 3, height, width], their scenes and their captions, the colourings of one arrangement
    next to each other. The same arguments give the same batch. Arrangements are traced once each, which is what costs.
    """
    rng = np.random.default_rng(seed)
    pictures = torch.empty(geometries * colourings, 3, height, width, dtype=torch.uint8)
    scenes: list[Scene] = []
    captions: list[str] = []
    for _ in range(geometries):
        arrangement = sample_arrangement(rng, height, width)
        buffer = trace(arrangement, height, width, arrangement.seed)
        for _ in range(colourings):
            scene = recolour(arrangement, rng)
            while is_held_out(scene):
                scene = recolour(arrangement, rng)
            picture = shade(buffer, [solid.color for solid in scene.solids], scene.background)
            pictures[len(scenes)] = picture.mul_(255).round_().to(torch.uint8)
            scenes.append(scene)
            captions.append(caption(scene, rng))
    return pictures, scenes, captions
