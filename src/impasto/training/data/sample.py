"""Samples, the sources they are read from, and the batches they form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .captions import Captions


@dataclass
class Sample:
    """One sample. A source leaves what it does not have as None."""

    image: Tensor | None = None  # [3, H, W] float32 in [-1, 1]
    posterior: tuple[Tensor, Tensor] | None = None  # mean and deviation [C, h, w], unscaled: not the image
    caption: str | None = None
    text: Tensor | None = None  # [M, D] features of the caption's real tokens: instead of running the text encoder
    size: tuple[int, int] | None = None  # original height and width in pixels, before resizing (micro-conditions)
    crop: tuple[int, int] = (0, 0)  # top and left of the crop, in pixels of the resized image
    loss_mask: Tensor | None = None  # [1, H, W] in [0, 1]
    weight: float = 1.0  # of its loss (prior preservation, mixtures); 0 for a sample that could not be read
    labels: Tensor | None = None  # [questions, h, w] per latent pixel
    extra: dict[str, Tensor] = field(default_factory=dict)  # prior_token_ids, reference, ... by name


class Source(Protocol):
    """A finite, ordered collection of samples."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """The stored height and width in pixels, upright, without decoding."""
        ...

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        """A sample, resized and cropped to ``target`` (height, width). Every random choice comes from ``rng``.

        Raises:
            InputError: this sample cannot be used; the message names it. It is counted and left out.
        """
        ...


def name_of(source: Source, index: int) -> str | None:
    """The name of a sample, if its source has a method ``name``; for messages."""
    name = getattr(source, "name", None)
    return str(name(index)) if callable(name) else None


def captions_of_sample(source: Source, index: int) -> Captions | None:
    """All captions of a sample, if its source has a method ``captions``, or ``wordings`` for short ones alone."""
    if callable(captions := getattr(source, "captions", None)):
        found: Captions = captions(index)
        return found
    wordings = getattr(source, "wordings", None)
    return Captions(tuple(wordings(index))) if callable(wordings) else None


@dataclass
class Batch:
    """What one rank computes of the global batch of a step.

    A sample that could not be read is replaced by another one with a weight of 0, so that places do not shift.
    """

    samples: Sequence[Sample]
    first: int  # the place of the first sample in the global batch
    count: int  # the size of the global batch
    step: int
    largest: int = 0  # the size of the largest slice of any rank

    def __len__(self) -> int:
        return len(self.samples)

    def on(self, device: torch.device) -> Batch:
        """The same with posteriors and labels on a device, where those of one size are next to each other."""
        if device.type == "cpu" or any(sample.posterior is None for sample in self.samples):
            return self
        means, deviations = (_moved([*tensors], device) for tensors in zip(*(s.posterior for s in self.samples)))
        labels = [sample.labels for sample in self.samples]
        there = [each for each in labels if each is not None]
        moved = _moved(there, device) if len(there) == len(labels) else labels
        rows = zip(self.samples, means, deviations, moved)
        samples = [replace(s, posterior=(mean, std), labels=of_each) for s, mean, std, of_each in rows]
        return replace(self, samples=samples)

    def split(self, size: int | None = None) -> list[Batch]:
        """Micro-batches of at most ``size`` samples, equally many on all ranks, because they work together in each.

        One that would be empty has the first sample with a weight of 0.
        """
        longest = max(self.largest, len(self.samples), 1)
        spare = [replace(self.samples[0], weight=0.0)] if self.samples else []
        starts = range(0, longest, size or longest)
        parts = [self.samples[i : i + (size or longest)] or spare for i in starts]
        return [replace(self, samples=part, first=self.first + i) for i, part in zip(starts, parts, strict=True)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one [B, ...]; not copied if they are next to each other, as a reader packs them."""
    first = tensors[0]
    memory, size = first.untyped_storage().data_ptr(), first.numel()
    if all(
        t.shape == first.shape
        and t.dtype == first.dtype
        and t.is_contiguous()
        and t.untyped_storage().data_ptr() == memory
        and t.storage_offset() == first.storage_offset() + i * size
        for i, t in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack([*tensors])


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """On a device, by one copy of those of each shape that follow each other."""
    groups = (stacked([*some]) for _, some in itertools.groupby(tensors, key=lambda t: t.shape))
    return [each for group in groups for each in group.to(device)]


def cuts(costs: Sequence[int], world: int) -> list[int]:
    """Where a global batch whose samples have these costs is cut into slices of nearly equal cost: [world + 1].

    A sample belongs to the rank in whose share of the total cost its middle lies.
    """
    ranks = np.arange(world + 1)
    if len(set(costs)) <= 1:
        return (len(costs) * ranks // world).tolist()
    ends = np.cumsum(costs)
    middles = 2 * ends - np.asarray(costs)
    found: list[int] = np.searchsorted(middles * world, 2 * ends[-1] * ranks).tolist()
    return found
