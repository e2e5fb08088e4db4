"""Scenes as a collection of training samples, rendered when they are read, without held-out combinations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..errors import InputError
from .captions import caption
from .labels import label_caption, label_cells
from .layout import arrange
from .renderer import SUPERSAMPLING, GeometryBuffer, shade, trace, trace_layout
from .world import (
    FRAMES,
    Scene,
    is_held_out,
    recolour,
    sample_arrangement,
    sample_stack,
    with_adapter_words,
    with_one_colour,
)

SAMPLE_STREAM = 40_509  # first word of the random seeds; others are in evaluate.py and editing.py
WORDING_STREAM = 40_510
WORDINGS = 8  # of a caption in a cache
KINDS = ("ordinary", "adapter")


@dataclass
class SceneSample:
    """What `ScenesSource.read` returns: the fields of the trainer's samples, by the same names."""

    image: Tensor | None = None  # [3, H, W] float32 in [-1, 1]
    posterior: tuple[Tensor, Tensor] | None = None
    caption: str | None = None
    text: Tensor | None = None
    size: tuple[int, int] | None = None  # of the frame, in pixels
    crop: tuple[int, int] = (0, 0)  # top, left in the frame
    loss_mask: Tensor | None = None
    weight: float = 1.0
    labels: Tensor | None = None  # [4, H / 8, W / 8] uint8: see labels.py
    extra: dict[str, Tensor] = field(default_factory=dict)


class ScenesSource:
    """A finite collection of rendered scenes with captions; sample i depends on `seed`, `kind`, `frames` and i alone.

    Args:
        count: the number of samples.
        seed: another one gives other scenes.
        frames: heights and widths in pixels, multiples of 8, which the arrangements take in turn.
        crop: the height and width of a part of the frame, which shows part of a solid; None: whole frames.
        sized: the share of captions that give sizes, 0 to 1.
        stacks: the share of arrangements that have a solid on another in any case, 0 to 1. One in three of their
            colourings is of a single colour, where shapes allow it.
        images: False for captions alone, with what they say in ``extra["answers"]`` (`label_caption`).
        kind: "ordinary" scenes, or those of an "adapter", each with the shape or the colour that no other scene has.
        colourings: of each arrangement; adjacent samples share it, which makes reading them in order cheaper.

    Raises:
        InputError: values other than these.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        frames: Sequence[Sequence[int]] = FRAMES,
        crop: Sequence[int] | None = None,
        kind: str = "ordinary",
        colourings: int = 1,
        sized: float = 0.4,
        stacks: float = 0.0,
        images: bool = True,
    ):
        self.frames = [_size("frames", frame) for frame in frames]
        self.crop = None if crop is None else _size("crop", crop)
        if count < 1 or colourings < 1 or seed < 0 or not self.frames:
            raise InputError("'count' and 'colourings' are at least 1, 'seed' at least 0, and 'frames' not empty.")
        for name, share in (("sized", sized), ("stacks", stacks)):
            if not 0 <= share <= 1:
                raise InputError(f"{name!r} is a share, 0 to 1, not {share!r}.")
        if kind not in KINDS:
            raise InputError(f"Unknown kind of scenes {kind!r}; use one of {', '.join(KINDS)}.")
        if self.crop and any(self.crop[side] > frame[side] for frame in self.frames for side in (0, 1)):
            raise InputError(f"A crop of {self.crop} does not fit into every frame of {self.frames}.")
        if kind != "ordinary" and not images:
            raise InputError("Captions alone are those of ordinary scenes; leave 'kind' out.")
        self.count, self.seed, self.kind, self.colourings = count, seed, kind, colourings
        self.sized, self.stacks, self.images = sized, stacks, images

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of a sample, without rendering it."""
        return self.crop or self._frame(index)

    def scene(self, index: int) -> Scene:
        """The scene of a sample."""
        number, colouring = divmod(index, self.colourings)
        rng = np.random.default_rng([SAMPLE_STREAM, self.seed, number])
        stacked = bool(self.stacks) and rng.random() < self.stacks  # otherwise nothing is drawn
        arrangement = (sample_stack if stacked else sample_arrangement)(rng, *self._frame(index))
        # numpy pads these words with zeros: a colouring 0 would have the arrangement's own random numbers.
        attempts = np.random.default_rng([SAMPLE_STREAM, self.seed, number, 1 + colouring])
        while True:
            scene = recolour(arrangement, attempts)
            if stacked and not attempts.integers(3):
                scene = with_one_colour(scene)
            if self.kind == "adapter":
                scene = with_adapter_words(scene, attempts)
            if not is_held_out(scene):
                return scene

    def wordings(self, index: int) -> tuple[str, ...]:
        """Some captions of a sample, for a cache; ``read`` words one with its own random numbers."""
        scene, rng = self.scene(index), np.random.default_rng([WORDING_STREAM, self.seed, index])
        return tuple(dict.fromkeys(caption(scene, rng, self.sized) for _ in range(WORDINGS)))

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> SceneSample:
        """Render a sample.

        Args:
            index: from 0 to the number of samples, exclusive.
            target: height and width in pixels of the image: of the crop, or of the whole scene at any scale.
            rng: for the position of the crop and the wording of the caption.
        """
        if not 0 <= index < self.count:
            raise InputError(f"There is no sample {index}; there are {self.count}, from 0.")
        scene = self.scene(index)
        if not self.images:
            text = caption(scene, rng, self.sized)
            return SceneSample(caption=text, extra={"answers": label_caption(scene, text)})
        if self.crop is None:
            size, place = target, (0, 0)
            buffer = _traced(_plain(scene), *target)
        else:
            size = scene.height, scene.width
            place, buffer = _cropped(scene, target, rng)
        image = shade(buffer, [solid.color for solid in scene.solids], scene.background)
        labels = None
        if self.kind == "ordinary":
            labels = label_cells(buffer.ids[None, ::SUPERSAMPLING, ::SUPERSAMPLING], [scene])[0]
        text = caption(scene, rng, self.sized)
        return SceneSample(image.mul_(2).sub_(1), caption=text, size=size, crop=place, labels=labels)

    def _frame(self, index: int) -> tuple[int, int]:
        return self.frames[index // self.colourings % len(self.frames)]


def _size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(not isinstance(side, int) or side < 8 or side % 8 for side in size):
        raise InputError(f"'{name}' takes heights and widths in pixels, multiples of 8, not {size!r}.")
    return size[0], size[1]


def _plain(scene: Scene) -> Scene:
    """The scene in a single colouring, as its geometry is the same in all."""
    return recolour(scene, np.random.default_rng(0))


@functools.lru_cache(maxsize=1)
def _traced(scene: Scene, height: int, width: int) -> GeometryBuffer:
    return trace(scene, height, width, scene.seed)


def _cropped(scene: Scene, target: tuple[int, int], rng: np.random.Generator) -> tuple[tuple[int, int], GeometryBuffer]:
    """A crop whose centre is in the box of one of the solids if the frame's borders allow it; its top and left."""
    height, width = scene.height, scene.width
    layout = arrange(scene, height, width, scene.seed)
    box = layout.camera.window(layout.bodies[rng.integers(len(layout.bodies))], height, width)
    place = []
    for side, span, full in zip(target, box, (height, width), strict=True):
        middle = int(rng.integers(span.start, max(span.stop, span.start + 1)))
        place.append(min(max(0, middle - side // 2), full - side))
    top, left = place
    rows, columns = slice(top, top + target[0]), slice(left, left + target[1])
    return (top, left), trace_layout(layout, height, width, crop=(rows, columns))
