"""Edits of scenes: one solid gets another colour, and all else stays."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .world import COLOURS, Scene, Solid

WORDINGS = ("make the {old} {new}", "turn the {old} {new}", "change the {old} to {new}", "paint the {old} {new}")


class Edit(NamedTuple):
    """What is asked for, of which scene, and what it becomes."""

    source: Scene
    target: Scene
    text: str
    solid: int  # the number of the one that changes


def sample_edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """Another colour for one of the scene's solids, which its shape and colour name: no two solids share both."""
    number = int(rng.integers(len(scene.solids)))
    solid = scene.solids[number]
    taken = {(other.shape, other.color) for other in scene.solids}
    colours = [colour for colour in COLOURS if (solid.shape, colour) not in taken]
    colour = colours[rng.integers(len(colours))]
    solids = list(scene.solids)
    solids[number] = Solid(solid.shape, colour, solid.size)
    wording = WORDINGS[rng.integers(len(WORDINGS))]
    text = wording.format(old=f"{solid.color} {solid.shape}", new=colour)
    return Edit(scene, replace(scene, solids=tuple(solids)), text, number)
