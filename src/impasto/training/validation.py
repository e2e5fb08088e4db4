"""Losses on a fixed set of (image, noise, timestep)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError
from .data.buckets import Buckets
from .data.sample import Batch, Source
from .objectives.base import Objective
from .randomness import Randomness

#: No step of training has this number, nor this seed its random numbers.
STEP, SEED = 2**62, 7102


@dataclass(frozen=True)
class Validation:
    """Batches of held-out samples, each of one size."""

    batches: Sequence[Batch]

    @classmethod
    def read(cls, source: Source, buckets: Buckets, count: int, batch_size: int) -> Validation:
        """The first ``count`` samples of a source that have a bucket."""
        bins, _ = buckets.assign(np.array([source.size(i) for i in range(len(source))], np.int64).reshape(-1, 2))
        chosen = np.flatnonzero(bins >= 0)[:count]
        if not len(chosen):
            raise InputError("validation: no image of its source has a bucket; check its sizes, or give another source")
        by_bucket: dict[int, list[int]] = defaultdict(list)
        for index in chosen.tolist():
            by_bucket[int(bins[index])].append(index)
        batches: list[Batch] = []
        for bucket, indices in sorted(by_bucket.items()):
            for start in range(0, len(indices), batch_size):
                several = indices[start : start + batch_size]
                rng = [np.random.default_rng([SEED, index]) for index in several]
                target = buckets.sizes[bucket]
                samples = [source.read(index, target, own) for index, own in zip(several, rng)]
                batches.append(Batch(samples, sum(len(batch) for batch in batches), len(chosen), STEP))
        return cls(batches)


@torch.no_grad()
def measure(objective: Objective, validation: Validation) -> dict[str, float]:
    """The objective's measures, averaged over the samples."""
    sums: dict[str, float] = defaultdict(float)
    total = sum(len(batch) for batch in validation.batches)
    for batch in validation.batches:
        random = Randomness(SEED, STEP, batch.first, batch.count)
        for name, value in objective.validation(batch, random).items():
            sums[name] += float(value) * len(batch) / total
    return dict(sums)
