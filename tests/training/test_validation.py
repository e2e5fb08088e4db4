"""Held-out samples: broken ones are counted and replaced, and images take a quarter of their memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impasto.errors import InputError
from impasto.training.assembly.assemble import hold_out
from impasto.training.data.buckets import Buckets
from impasto.training.data.faults import Faults
from impasto.training.data.sample import Batch, Sample
from impasto.training.data.views import to_signed
from impasto.training.objectives.base import Loss, Objective
from impasto.training.running.randomness import Randomness
from impasto.training.running.validation import Validation, measure

BUCKETS = Buckets(((16, 16),))


class Numbered:
    """Images of random levels, of which some are broken; odd ones are not made of bytes."""

    def __init__(self, count: int, broken: set[int]):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        return 16, 16

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        if index in self.broken:
            raise InputError(f"image {index} is broken")
        levels = torch.randint(256, (3, *target), generator=torch.Generator().manual_seed(index))
        return Sample(image=to_signed(levels) if index % 2 == 0 else levels / 300)


class Seen(Objective):
    """Keeps the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor | None] = []

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        self.images += [sample.image for sample in batch.samples]
        return Loss(torch.ones(len(batch)))


def test_a_broken_sample_is_counted_and_the_next_one_takes_its_place() -> None:
    faults = Faults("the data", 2, 9)
    source = Numbered(9, {1, 4})
    validation = Validation.read(source, BUCKETS, 5, 2, faults)
    objective = Seen()
    assert measure(objective, validation) == {"validation": 1.0}
    for image, index in zip(objective.images, (0, 2, 3, 5, 6), strict=True):
        assert torch.equal(image, source.read(index, (16, 16), np.random.default_rng()).image)  # type: ignore[arg-type]
    assert list(faults.reasons.values()) == ["image 1 is broken", "image 4 is broken"]
    assert [len(batch) for batch in validation.batches] == [2, 2, 1]
    with pytest.raises(InputError, match="2 of 9 samples of the data cannot be used"):
        Validation.read(source, BUCKETS, 5, 2, Faults("the data", 1, 9))
    with pytest.raises(InputError, match="no image of its source can be used"):
        Validation.read(Numbered(2, {0, 1}), BUCKETS, 5, 2, faults=Faults("the data", 2, 2))


class Sized(Numbered):
    """Images of which every other one is too small for the bucket."""

    def size(self, index: int) -> tuple[int, int]:
        return (4, 4) if index % 2 == 0 else (16, 16)


def test_images_without_a_bucket_are_not_held_out() -> None:
    (kept,), held = hold_out([Sized(16, set())], 4, BUCKETS)
    assert [held.name(i) for i in range(len(held))] == [f"sample {i}" for i in (1, 5, 9, 13)]  # type: ignore[attr-defined]
    assert len(kept) == 12
    assert Validation.read(held, BUCKETS, 4, 4, Faults("the data", 0, 4)).batches[0].count == 4
    with pytest.raises(InputError, match="5 of 8 samples would be held out"):
        hold_out([Sized(16, set())], 5, BUCKETS)


def test_images_of_bytes_are_kept_as_bytes() -> None:
    validation = Validation.read(Numbered(4, set()), BUCKETS, 4, 4, Faults("the data", 0, 4))
    kept = [sample.image.dtype for sample in validation.batches[0].samples if sample.image is not None]
    assert kept == [torch.uint8, torch.float32, torch.uint8, torch.float32]
