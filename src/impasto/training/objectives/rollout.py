"""Inputs as a sampler makes them, for training: its own errors are in them, which noised data do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.sample import Sample
from ..running.randomness import Randomness


class Rollout(NamedTuple):
    """Some inputs begin as noised data at a higher timestep, from which the model takes steps that refine.

    A denoiser that only ever sees noised data takes its own errors for data when it samples (exposure bias,
    2301.11706). The target remains the data: what such an input should become is known, as long as it began with so
    little noise that the noise does not hide it.

    Attributes:
        share: of the samples whose timestep is in the range.
        low, high: the range, from the first to below the second.
        steps: how many are taken, at most; as many for all samples of a batch.
        gap: timesteps between them.
        span: over how many their predictions are averaged; ``refine_span`` of the scheduler.
    """

    share: float
    low: int
    high: int
    steps: int = 3
    gap: int = 50
    span: float = 175.0

    @property
    def share_of_last(self) -> float:
        """Of the last prediction in the average."""
        return -math.expm1(-self.gap / self.span)

    def chosen(self, times: Tensor, random: Randomness) -> Tensor:
        """Which samples, [B] bool, of timesteps [B] on the host."""
        return (random.uniform(times.shape) < self.share) & (times >= self.low) & (times < self.high)

    def steps_above(self, random: Randomness) -> range:
        """How far above its own timestep each step of a sample is."""
        count = 1 + int(random.shared.integers(self.steps))
        return range(count * self.gap, 0, -self.gap)


class Selection:
    """Some of the samples of a batch, or the first if there are none: all ranks run the model equally often.

    Args:
        tensors: of the samples of each size, which are next to each other, [b, ...].
        chosen: [B] bool, on the host.

    Attributes:
        places: of those samples in the batch.
    """

    def __init__(self, samples: Sequence[Sample], tensors: Sequence[Tensor], chosen: Tensor):
        self.places: list[int] = chosen.nonzero()[:, 0].tolist() or [0]
        self.samples = [samples[place] for place in self.places]
        self._of_size: list[tuple[int, list[int]]] = []  # number of the size, places among its samples
        start = 0
        for number, tensor in enumerate(tensors):
            inside = [place - start for place in self.places if start <= place < start + len(tensor)]
            if inside:
                self._of_size.append((number, inside))
            start += len(tensor)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those rows of the tensors of each size, without sizes that have none."""
        return [tensors[number][inside] for number, inside in self._of_size]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of these samples alone, by size."""
        parts: tuple[Tensor, ...] = rows.split([len(inside) for _, inside in self._of_size])
        return parts

    def replaced(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of each size with these rows instead of theirs."""
        found = list(tensors)
        for (number, inside), new in zip(self._of_size, rows):
            index = torch.tensor(inside, device=new.device)
            found[number] = tensors[number].index_put((index,), new)
        return found
