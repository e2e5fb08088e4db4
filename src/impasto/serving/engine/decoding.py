"""Latents that wait for the autoencoder. It works on one batch at a time, between steps, and a layer at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..job import RawImage
from .entries import Entry
from .stages import Stages

#: Images of one size that are decoded in one batch, and pixels of their latents, but for a single image.
AT_ONCE = 4
MOST_LATENT_PIXELS = 1 << 14


@dataclass(eq=False)
class Decoding:
    """Latents to be decoded."""

    entry: Entry
    latents: Tensor  # [1, C, h, w], fewer than the image's for a preview of a large one
    number: int | None  # of the preview; None: the image itself


class Decoder:
    """Decodes latents in the order in which they come, those of one size together.

    Args:
        decoded: is called with what was decoded, and its pixels or what stood in the way.
    """

    def __init__(self, stages: Stages, decoded: Callable[[Decoding, RawImage | Exception], None]):
        self.stages, self.decoded = stages, decoded
        self.waiting: deque[Decoding] = deque()
        self.batch: list[Decoding] = []  # the one that was begun
        self.work: Generator[None, None, None] | None = None  # on it

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.batch)

    @property
    def need(self) -> int:
        """Bytes for the images whose steps are done."""
        return sum(each.entry.need for each in (*self.batch, *self.waiting) if each.number is None)

    def forget(self, entry: Entry) -> None:
        """Do not decode what is of this image."""
        self.waiting = deque(each for each in self.waiting if each.entry is not entry)
        self.batch = [each for each in self.batch if each.entry is not entry]
        if not self.batch:
            self.work = None

    def go_on(self) -> None:
        """Compute one layer."""
        if self.work is None:
            self.batch = self._next_batch()
            self.work = self._decode(self.batch)
        work = self.work
        try:
            next(work)
        except StopIteration:
            if self.work is work:  # nobody has forgotten it meanwhile
                self.work, self.batch = None, []

    def _next_batch(self) -> list[Decoding]:
        first = self.waiting[0]
        most = max(1, min(AT_ONCE, MOST_LATENT_PIXELS // first.latents.shape[-2:].numel()))
        alike = [each for each in self.waiting if _alike(each, first)][:most]
        for each in alike:
            self.waiting.remove(each)
        return alike

    def _decode(self, batch: Sequence[Decoding]) -> Generator[None, None, None]:
        try:
            begun, latents = [each.entry.begun_now for each in batch], [each.latents for each in batch]
            images = yield from self.stages.decode(begun, latents)
        except Exception as error:
            if len(batch) == 1:
                self.decoded(batch[0], error)
            else:  # find the one
                for each in batch:
                    yield from self._decode([each])
            return
        for each, image in zip(batch, images, strict=True):
            self.decoded(each, image)


def _alike(one: Decoding, other: Decoding) -> bool:
    same_size = one.latents.shape == other.latents.shape
    return same_size and one.latents.dtype == other.latents.dtype
