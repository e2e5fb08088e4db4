"""How well image to image and inpainting work on scenes: what to edit, and what the judge reads afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import statement
from .evaluate import Prompt, held_out_prompts
from .judge import ImageLike, Judge, bundled_judge
from .reading import Score, compare
from .renderer import render, trace
from .world import COLOURS, SHAPES, Scene, Solid, sample_scene

SOURCE_STREAM = 40_512  # first word of the random seeds: sources are independent of prompts
#: What a mask covers around a solid, as fractions of its size: above, below, to the left, to the right (its shadow).
MARGINS = (0.2, 0.2, 0.25, 0.6)


class Case(NamedTuple):
    """An edit: an image, a prompt, and what the result should show."""

    source: Scene
    target: Prompt  # its scene is what should be seen
    mask: Tensor | None = None  # [H, W]: 1 is repainted

    def image(self, side: int) -> Tensor:
        """The image to edit [3, side, side], float32 in [0, 1]."""
        return render(replace(self.source, height=side, width=side))


def kept(n: int, seed: int = 0) -> list[Case]:
    """Images with their own prompts: little should change."""
    scenes = [replace(prompt.scene, height=128, width=128) for prompt in held_out_prompts(n, seed)]
    return [Case(scene, Prompt(scene, full_prompt(scene), "kept")) for scene in scenes]


def changed(n: int, seed: int = 0) -> list[Case]:
    """Images with prompts of other scenes."""
    rng = np.random.default_rng([SOURCE_STREAM, seed])
    return [Case(sample_scene(rng, 128, 128), prompt) for prompt in held_out_prompts(n, seed)]


def repainted(n: int, side: int, seed: int = 0) -> list[Case]:
    """Images one of whose solids is masked; the prompt describes another one in its place.

    Args:
        side: of the masks, in pixels.
    """
    rng = np.random.default_rng([SOURCE_STREAM, seed])
    cases = []
    for _ in range(n):
        source = sample_scene(rng, 128, 128)
        index = int(rng.integers(len(source.solids)))
        target = replace_solid(source, index, rng)
        prompt = Prompt(target, full_prompt(target), "repainted")
        cases.append(Case(source, prompt, mask_of(source, index, side)))
    return cases


def full_prompt(scene: Scene) -> str:
    """A prompt that states everything that the judge reads."""
    return f"{statement(scene, with_size=True)}, on a {scene.background} background"


def replace_solid(scene: Scene, index: int, rng: np.random.Generator) -> Scene:
    """The scene with another solid in place of one: another shape and colour, the same size."""
    old = scene.solids[index]
    others = {(solid.shape, solid.color) for solid in scene.solids}
    shapes, colours = ([x for x in known if x not in (old.shape, old.color)] for known in (SHAPES, COLOURS))
    choices = [(shape, color) for shape in shapes for color in colours if (shape, color) not in others]
    shape, color = choices[rng.integers(len(choices))]
    solids = [*scene.solids]
    solids[index] = Solid(shape, color, old.size)
    return replace(scene, solids=tuple(solids))


def mask_of(scene: Scene, index: int, side: int) -> Tensor:
    """A mask [side, side]: 1 in a box around a solid and most of its shadow, but not on other solids."""
    ids = trace(scene, scene.height, scene.width, scene.seed).ids
    own = ids == index + 1
    box = torch.zeros(side, side)
    spans = []
    for lines, before, after in ((own.any(1), *MARGINS[:2]), (own.any(0), *MARGINS[2:])):
        places = lines.nonzero().flatten() * (side / len(lines))
        first, last = float(places[0]), float(places[-1]) + 1
        low, high = first - before * (last - first), last + after * (last - first)
        spans.append(slice(max(0, round(low)), min(side, round(high))))
    box[spans[0], spans[1]] = 1.0
    others = F.adaptive_avg_pool2d(((ids > 0) & ~own).float()[None], side)[0]
    return box * (others < 1)  # what a solid covers in part is the edge of the one that goes


def judge_cases(cases: Sequence[Case], images: Sequence[ImageLike], judge: Judge | None = None) -> list[Score]:
    """What of each case's target its image shows right. Sizes and backgrounds count if the prompt states them."""
    readings = (judge or bundled_judge()).read(images)
    return [
        compare(reading, target.scene, with_size=target.with_size, with_background=target.with_background)
        for (_, target, _), reading in zip(cases, readings, strict=True)
    ]


def shows_solids(scores: Sequence[Score]) -> list[bool]:
    """Whether each image shows the right solids, by colour, shape and number, in the right arrangement."""
    return [score.count and all(score.colours + score.shapes + score.relations) for score in scores]


def same_geometry(
    before: Sequence[ImageLike], after: Sequence[ImageLike], judge: Judge | None = None
) -> dict[str, list[bool]]:
    """Whether the judge reads the same in images before and after an edit.

    Returns:
        for each image, the arrangement (the number of its solids and their relations); for each solid, its shape and
        its size; and for each image, all of these.
    """
    judge = judge or bundled_judge()
    scores = [compare(new, old, with_background=False) for new, old in zip(judge.read(after), judge.read(before))]
    arrangements = [score.count and all(score.relations) for score in scores]
    return {
        "arrangements": arrangements,
        "shapes": [same for score in scores for same in score.shapes],
        "sizes": [same for score in scores for same in score.sizes],
        "images": [kept and all(score.shapes + score.sizes) for kept, score in zip(arrangements, scores)],
    }
