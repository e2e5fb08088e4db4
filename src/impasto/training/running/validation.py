"""Losses on a fixed set of (image, noise, timestep)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...errors import InputError
from ..data.buckets import Buckets
from ..data.faults import Faults
from ..data.sample import Batch, Sample, Source, name_of
from ..data.views import to_signed
from ..objectives.base import Objective
from .randomness import Randomness

#: No step of training has this number, nor this seed its random numbers.
STEP, SEED = 2**62, 7102


@dataclass(frozen=True)
class Validation:
    """Batches of held-out samples, each of one size. Images are stored as bytes where that loses nothing."""

    batches: Sequence[Batch]

    @classmethod
    def read(cls, source: Source, buckets: Buckets, count: int, batch_size: int, faults: Faults) -> Validation:
        """The first ``count`` samples of a source that have a bucket and can be read.

        Raises:
            InputError: there is none, or too many cannot be read.
        """
        bins, _ = buckets.assign(np.array([source.size(i) for i in range(len(source))], np.int64).reshape(-1, 2))
        by_bucket: dict[int, list[Sample]] = defaultdict(list)
        found = 0
        for index in np.flatnonzero(bins >= 0).tolist():
            bucket, rng = int(bins[index]), np.random.default_rng([SEED, index])
            try:
                sample = source.read(index, buckets.sizes[bucket], rng)
            except InputError as error:
                faults.add(name_of(source, index) or f"sample {index} of validation", str(error))
                continue
            by_bucket[bucket].append(_compact(sample))
            found += 1
            if found == count:
                break
        if not found:
            raise InputError("validation: no image of its source can be used; check its sizes, or give another source")
        batches: list[Batch] = []
        for _, samples in sorted(by_bucket.items()):
            for start in range(0, len(samples), batch_size):
                first = sum(len(batch) for batch in batches)
                batches.append(Batch(samples[start : start + batch_size], first, found, STEP))
        return cls(batches)


def _compact(sample: Sample) -> Sample:
    """The sample with an image of bytes, if that loses nothing: a quarter of the memory."""
    if sample.image is None:
        return sample
    levels = ((sample.image + 1) * 127.5).round().clamp(0, 255).byte()
    return replace(sample, image=levels) if torch.equal(to_signed(levels), sample.image) else sample


def _expanded(sample: Sample) -> Sample:
    """The sample as it was before ``_compact``."""
    packed = sample.image is not None and sample.image.dtype == torch.uint8
    return replace(sample, image=to_signed(sample.image)) if packed and sample.image is not None else sample


@torch.no_grad()
def measure(objective: Objective, validation: Validation) -> dict[str, float]:
    """The objective's measures, averaged over the samples."""
    sums: dict[str, float] = defaultdict(float)
    total = sum(len(batch) for batch in validation.batches)
    for batch in validation.batches:
        random = Randomness(SEED, STEP, batch.first, batch.count)
        batch = replace(batch, samples=[_expanded(sample) for sample in batch.samples])
        for name, value in objective.validation(batch, random).items():
            sums[name] += float(value) * len(batch) / total
    return dict(sums)
