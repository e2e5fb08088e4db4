"""Captions of scenes: small, regular, lower-case English."""

from __future__ import annotations

import numpy as np

from .world import Scene, Solid


def describe(solid: Solid, with_size: bool = False) -> str:
    """`a red cube`, `an orange cone`, `a small red cube`."""
    words = f"{solid.size} {solid.color} {solid.shape}" if with_size else f"{solid.color} {solid.shape}"
    return ("an " if words[0] in "aeiou" else "a ") + words


def statement(scene: Scene, with_size: bool = False) -> str:
    """The canonical caption: `a red cube on top of a blue sphere, to the left of a green cone`."""
    text = describe(scene.solids[0], with_size)
    for number, (relation, solid) in enumerate(zip(scene.relations, scene.solids[1:], strict=True)):
        text += f"{', ' if number else ' '}{relation} {describe(solid, with_size)}"
    return text


def caption(scene: Scene, rng: np.random.Generator, sized: float = 0.4) -> str:
    """A caption in varied wording. Half have an opening, two in five give the background, and a share `sized` sizes."""
    with_size, with_background = rng.random(2) < (sized, 0.4)
    opening = rng.choice(["", "", "", "a picture of ", "an image of ", "there is "])
    text = f"{opening}{statement(scene, bool(with_size))}"
    if not with_background:
        return text
    ground = f"on a {scene.background} background"
    if rng.random() < 0.25:
        return f"{ground}, {text}"
    return f"{text}, {ground}"
