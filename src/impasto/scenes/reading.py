"""What an image shows, in a canonical form, and how it compares with the requested scene.

Captions can describe the same image in several ways: "a to the right of b" is "b to the left of a". So scenes and
readings are compared in a canonical form that depends only on what is visible:

- Two solids: `to the right of` and `behind` are reversed, so that the first solid is the upper, left or front one.
- Three solids with a stack of two: the stack from the top down, then the solid next to it. The second relation is kept,
  as all four sides look different: the stack is to the left of, to the right of, in front of or behind the solid.
- A tower of three: from the top down. A row of three: from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from ..errors import InputError
from .world import BEHIND, FRONT, LEFT, ON_TOP, RIGHT, Scene, Solid

MIRRORED = {LEFT: RIGHT, RIGHT: LEFT, FRONT: BEHIND, BEHIND: FRONT}
# Every canonical sequence of relations. The judge predicts its index, which implies the number of solids.
ARRANGEMENTS: tuple[tuple[str, ...], ...] = (
    (),
    (ON_TOP,),
    (LEFT,),
    (FRONT,),
    (ON_TOP, LEFT),
    (ON_TOP, RIGHT),
    (ON_TOP, FRONT),
    (ON_TOP, BEHIND),
    (ON_TOP, ON_TOP),
    (LEFT, LEFT),
)


@dataclass(frozen=True)
class Reading:
    """What an image shows, in canonical order; `relations[i]` says where solid i is relative to solid i + 1."""

    solids: tuple[Solid, ...]
    relations: tuple[str, ...]
    background: str

    def __post_init__(self) -> None:
        if self.relations not in ARRANGEMENTS or len(self.solids) != len(self.relations) + 1:
            raise InputError(
                f"{len(self.solids)} solids with the relations {self.relations} are not in canonical form; "
                "use canonical() to make readings of scenes."
            )


def canonical_order(relations: Sequence[str]) -> list[int]:
    """The indices of a scene's solids in canonical order."""
    order = list(range(len(relations) + 1))
    # A pair or a row (RELATION_PAIRS) is reversed as a whole.
    return order[::-1] if relations and relations[0] in (RIGHT, BEHIND) else order


def canonical(scene: Scene | Reading) -> Reading:
    """The canonical reading of a scene (see above); readings are returned unchanged."""
    relations = tuple(scene.relations)
    order = canonical_order(relations)
    if order[0] != 0:
        relations = tuple(MIRRORED[relation] for relation in reversed(relations))
    return Reading(tuple(scene.solids[i] for i in order), relations, scene.background)


@dataclass(frozen=True)
class Score:
    """What an image shows right: one flag for each requested thing, in the order of the scene.

    `sizes` and `background` are empty if they do not count. `whole`: the number of solids and everything that counts
    are right.
    """

    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    sizes: tuple[bool, ...]
    relations: tuple[bool, ...]
    background: tuple[bool, ...]
    count: bool

    @property
    def whole(self) -> bool:
        flags = self.colours + self.shapes + self.sizes + self.relations + self.background
        return self.count and all(flags)


def compare(reading: Reading, scene: Scene | Reading, *, with_size: bool = True, with_background: bool = True) -> Score:
    """Compare an image's reading with the requested scene.

    Solids are matched so that most colours and shapes agree, then most relations: if two solids are swapped, only the
    relation is wrong. An unmatched solid is wrong in every attribute. A relation is right if the reading states it
    between the matched solids, in either wording.

    Args:
        with_size, with_background: whether they count, that is, whether the caption gives them.
    """
    stated = set[tuple[int, str, int]]()
    for i, relation in enumerate(reading.relations):
        stated.add((i, relation, i + 1))
        if relation in MIRRORED:
            stated.add((i + 1, MIRRORED[relation], i))

    def score(partners: Sequence[int | None]) -> Score:
        pairs = [(asked, None if j is None else reading.solids[j]) for asked, j in zip(scene.solids, partners)]
        return Score(
            colours=tuple(seen is not None and seen.color == asked.color for asked, seen in pairs),
            shapes=tuple(seen is not None and seen.shape == asked.shape for asked, seen in pairs),
            sizes=tuple(seen is not None and seen.size == asked.size for asked, seen in pairs if with_size),
            relations=tuple(
                (first, relation, second) in stated
                for first, relation, second in zip(partners, scene.relations, partners[1:])
            ),
            background=(reading.background == scene.background,) if with_background else (),
            count=len(reading.solids) == len(scene.solids),
        )

    def agreement(score: Score) -> tuple[int, int, int]:
        return sum(score.colours) + sum(score.shapes), sum(score.relations), sum(score.sizes)

    seen = [*range(len(reading.solids)), *[None] * len(scene.solids)]
    pairings = dict.fromkeys(permutations(seen, len(scene.solids)))
    return max((score(partners) for partners in pairings), key=agreement)
