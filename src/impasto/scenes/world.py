"""The vocabulary of the small world, and scenes in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from ..errors import InputError

SHAPES = ("sphere", "cube", "cylinder", "cone")
# A shape and a colour that the generator never sees: the judge knows them, and an adapter learns them.
ADAPTER_SHAPE, ADAPTER_COLOUR = "dome", "cyan"
ALL_SHAPES = (*SHAPES, ADAPTER_SHAPE)
SIZES = ("small", "large")
ON_TOP, LEFT, RIGHT, FRONT, BEHIND = RELATIONS = (
    "on top of",
    "to the left of",
    "to the right of",
    "in front of",
    "behind",
)
# Pairs of relations that are possible and recognizable: towers, rows, and a stack next to a solid.
RELATION_PAIRS = (
    (ON_TOP, LEFT),
    (ON_TOP, RIGHT),
    (ON_TOP, FRONT),
    (ON_TOP, BEHIND),
    (ON_TOP, ON_TOP),
    (LEFT, LEFT),
    (RIGHT, RIGHT),
)
# Display-referred (sRGB) colours. HSV saturation of the six chromatic ones is above 0.8.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.10, 0.10),
    "green": (0.11, 0.72, 0.11),
    "blue": (0.10, 0.24, 0.94),
    "yellow": (1.00, 0.92, 0.07),
    "purple": (0.61, 0.11, 0.78),
    "orange": (1.00, 0.50, 0.05),
    "white": (0.99, 0.99, 0.99),
    "black": (0.14, 0.14, 0.145),
}
ALL_COLOURS = {**COLOURS, ADAPTER_COLOUR: (0.06, 0.82, 0.84)}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "gray": (0.71, 0.71, 0.72),
    "beige": (0.88, 0.80, 0.67),
    "light blue": (0.66, 0.79, 0.91),
    "pale green": (0.70, 0.84, 0.68),
    "pink": (0.91, 0.71, 0.75),
    "lavender": (0.77, 0.69, 0.90),
}
FRAMES = ((128, 128), (96, 160), (160, 96), (112, 144), (144, 112))  # height, width in pixels
OBJECT_COUNTS = {1: 0.25, 2: 0.60, 3: 0.15}  # the distribution of the number of solids
HELD_OUT_PART = 10  # one combination in ten is never trained


@dataclass(frozen=True)
class Solid:
    shape: str
    color: str
    size: str

    def __post_init__(self) -> None:
        for word, known in ((self.shape, ALL_SHAPES), (self.color, tuple(ALL_COLOURS)), (self.size, SIZES)):
            if word not in known:
                raise InputError(f"The small world does not know {word!r}; use one of {', '.join(known)}.")


@dataclass(frozen=True)
class Scene:
    """One to three solids; `relations[i]` says where solid i is relative to solid i + 1.

    `height` and `width` are in pixels. `seed` determines what captions do not say: exact positions, rotations, camera,
        light.
    """

    solids: tuple[Solid, ...]
    relations: tuple[str, ...]
    background: str
    height: int = 128
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.solids) <= 3:
            raise InputError(f"A scene has one to three solids, not {len(self.solids)}.")
        if len(self.relations) != len(self.solids) - 1:
            raise InputError(
                f"{len(self.solids)} solids need {len(self.solids) - 1} relations, got {len(self.relations)}."
            )
        for relation in self.relations:
            if relation not in RELATIONS:
                raise InputError(f"Unknown relation {relation!r}; use one of {', '.join(RELATIONS)}.")
        if len(self.relations) == 2 and self.relations not in RELATION_PAIRS:
            raise InputError(f"{self.relations} cannot be combined; use one of {RELATION_PAIRS}.")
        if self.background not in BACKGROUNDS:
            raise InputError(f"Unknown background {self.background!r}; use one of {', '.join(BACKGROUNDS)}.")


def combinations(scene: Scene) -> Iterator[str]:
    """The (colour, shape, relation, colour, shape) combinations of the scene, in canonical order."""
    for first, relation, second in zip(scene.solids, scene.relations, scene.solids[1:], strict=False):
        # "a to the right of b" is the same image as "b to the left of a", so both are held out together.
        if relation in (RIGHT, BEHIND):
            first, second = second, first
            relation = LEFT if relation == RIGHT else FRONT
        yield f"{first.color} {first.shape} {relation} {second.color} {second.shape}"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination that training never sees.

    This is one in `HELD_OUT_PART` ordered combinations, chosen by a hash that is the same on every machine. Sizes,
    backgrounds and positions have no effect. A single solid is never held out.
    """
    return any(crc32(text.encode()) % HELD_OUT_PART == 0 for text in combinations(scene))


def sample_arrangement(rng: np.random.Generator, height: int, width: int, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """Shapes, sizes, relations and a seed, with placeholder colours for `recolour` to replace."""
    count = int(rng.choice(list(OBJECT_COUNTS), p=list(OBJECT_COUNTS.values())))
    if count == 1:
        relations: tuple[str, ...] = ()
    elif count == 2:
        relations = (RELATIONS[rng.integers(len(RELATIONS))],)
    else:
        relations = RELATION_PAIRS[rng.integers(len(RELATION_PAIRS))]
    solids = tuple(
        Solid(shapes[rng.integers(len(shapes))], "white", SIZES[rng.integers(len(SIZES))]) for _ in range(count)
    )
    return Scene(solids, relations, "gray", height, width, int(rng.integers(2**31)))


def sample_stack(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Like `sample_arrangement`, with a solid on top of another; one in four has a third solid."""
    pairs = [pair for pair in RELATION_PAIRS if ON_TOP in pair]
    relations: tuple[str, ...] = (ON_TOP,) if rng.integers(4) else pairs[rng.integers(len(pairs))]
    solids = tuple(
        Solid(SHAPES[rng.integers(len(SHAPES))], "white", SIZES[rng.integers(len(SIZES))])
        for _ in range(len(relations) + 1)
    )
    return Scene(solids, relations, "gray", height, width, int(rng.integers(2**31)))


def recolour(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same arrangement with new colours and background; no two solids share both colour and shape."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    while True:
        solids = tuple(Solid(s.shape, colours[rng.integers(len(colours))], s.size) for s in scene.solids)
        if len({(s.shape, s.color) for s in solids}) == len(solids):
            break
    background = backgrounds[rng.integers(len(backgrounds))]
    return Scene(solids, scene.relations, background, scene.height, scene.width, scene.seed)


def with_one_colour(scene: Scene) -> Scene:
    """The scene with all solids in the colour of the first, if their shapes differ."""
    if len({solid.shape for solid in scene.solids}) < len(scene.solids):
        return scene
    return replace(scene, solids=tuple(replace(solid, color=scene.solids[0].color) for solid in scene.solids))


def sample_scene(rng: np.random.Generator, height: int | None = None, width: int | None = None) -> Scene:
    """A random scene, held out or not; its size is one of `FRAMES` unless given."""
    if height is None or width is None:
        height, width = FRAMES[rng.integers(len(FRAMES))]
    return recolour(sample_arrangement(rng, height, width), rng)


def with_adapter_words(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with `ADAPTER_SHAPE`, `ADAPTER_COLOUR` or both (a third of the time each) for one of its solids."""
    index, kind = int(rng.integers(len(scene.solids))), int(rng.integers(3))
    solids = list(scene.solids)
    if kind != 0:
        solids[index] = replace(solids[index], color=ADAPTER_COLOUR)
    if kind != 1:
        solids[index] = replace(solids[index], shape=ADAPTER_SHAPE)
    return replace(scene, solids=tuple(solids))
