"""Which samples form the global batch of a step: a pure function of (seed, step).

A source is an endless stream: one permutation of its samples after another, each from (seed, source, number of the
permutation). An epoch takes ``repeats`` times its size from it: with 1 each sample exactly once, with 2 twice, with 0.5
half of them, and the other half in the next epoch.

The samples of an epoch are shuffled together and divided by bucket, or packed. Then the global batches are cut, and
only then the slices of the ranks. So each sample has its turn on any number of ranks, and a checkpoint needs only the
step.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ...checks import finite, whole_number
from ...errors import ConfigurationError, InputError
from .buckets import REASONS, Buckets
from .sample import Source, cuts, name_of

_KEPT_EPOCHS = 2
_STREAM, _EPOCH = 3, 4  # what Philox's numbers are for; randomness.py has the others


@dataclass(frozen=True, slots=True)
class Place:
    """A sample's place in a global batch."""

    source: int
    index: int  # in the source
    target: tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of a step, over all ranks."""

    step: int
    places: tuple[Place, ...]

    def slice(self, rank: int, world: int) -> tuple[int, int]:
        """Start and end of a rank's contiguous slice; of nearly equal areas, as packed batches have several sizes."""
        found = self._cuts(world)
        return found[rank], found[rank + 1]

    def largest(self, world: int) -> int:
        """The most samples that a rank has."""
        return max(end - start for start, end in itertools.pairwise(self._cuts(world)))

    def _cuts(self, world: int) -> list[int]:
        return cuts([place.target[0] * place.target[1] for place in self.places], world)


class Order:
    """The global batches of a run.

    Args:
        sources: all that is trained on.
        buckets: the sizes to train at.
        batch_size: of a global batch. The last batch of a bucket in an epoch may be smaller.
        seed: at least 0.
        repeats: how often an epoch has each source's samples, by source; 1 if not given. Fractions are allowed.
        shares: the shares of the sources in an epoch instead, in any unit. The epoch is the shortest that has each
            sample at least once.
        pack_pixels: form batches of mixed sizes, up to this many pixels, instead of batches of one bucket.

    Attributes:
        dropped: how many samples were dropped, by reason, over all sources.
        in_buckets: how many samples each bucket has, over all sources, before repeats.
        fingerprint: a hash of all that the batches depend on: settings, and the samples' names and buckets.

    Raises:
        InputError: nothing is left to train on.
        ConfigurationError: numbers out of range, or both ``repeats`` and ``shares``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        buckets: Buckets,
        batch_size: int,
        seed: int = 0,
        repeats: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        pack_pixels: int | None = None,
    ):
        self.buckets, self.seed = buckets, whole_number("seed", seed, 0, error=ConfigurationError)
        self.batch_size = whole_number("the global batch size", batch_size, error=ConfigurationError)
        if pack_pixels is not None:
            whole_number("pack_pixels", pack_pixels, error=ConfigurationError)
        self.pack_pixels = pack_pixels
        self.dropped: Counter[str] = Counter()
        self.in_buckets: Counter[tuple[int, int]] = Counter()
        self._bins: list[np.ndarray] = []  # of each source's samples
        self._kept: list[np.ndarray] = []  # the indices of those that have a bucket
        for number, source in enumerate(sources):
            sizes = np.array([source.size(i) for i in range(len(source))], np.int64).reshape(-1, 2)
            bins, reasons = buckets.assign(sizes)
            self.dropped.update({REASONS[r]: int((reasons == r).sum()) for r in (1, 2) if (reasons == r).any()})
            self.in_buckets.update({size: int((bins == i).sum()) for i, size in enumerate(buckets.sizes)})
            self._bins.append(bins)
            self._kept.append(np.flatnonzero(bins >= 0))
            if not len(self._kept[-1]):
                why = "; ".join(f"{count} dropped: {reason}" for reason, count in self.dropped.items())
                raise InputError(
                    f"source {number + 1} of {len(sources)} has no sample to train on ({why or 'it is empty'})"
                )
        self.in_buckets = +self.in_buckets
        if not sources:
            raise InputError("there is nothing to train on; name at least one source")
        self._repeats = _repeats([len(kept) for kept in self._kept], repeats, shares)
        self.fingerprint = self._fingerprint(sources)
        self._plans: dict[int, _Plan] = {}
        #: The first step of each epoch, as far as known.
        self._starts = [0]

    def _fingerprint(self, sources: Sequence[Source]) -> str:
        found = hashlib.sha256()
        given = (self.seed, self.batch_size, self.pack_pixels, self.buckets.sizes, list(map(str, self._repeats)))
        found.update(repr(given).encode())
        for source, bins in zip(sources, self._bins):
            found.update(repr([len(bins), [name_of(source, i) for i in range(len(bins))]]).encode())
            found.update(bins.astype("<i8").tobytes())
        return found.hexdigest()

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, from 0 on."""
        epoch = self.epoch(step)
        plan = self._plan(epoch)
        members = plan.batch(step - self._start(epoch))
        sizes = self.buckets.sizes
        return GlobalBatch(
            step,
            tuple(
                Place(source, index, sizes[bucket])
                for source, index, bucket in zip(
                    plan.source[members].tolist(), plan.index[members].tolist(), plan.bucket[members].tolist()
                )
            ),
        )

    def epoch(self, step: int) -> int:
        """The epoch of a step, both from 0 on."""
        step = whole_number("step", step, 0)
        if self._is_regular:
            return step // self.steps_in(0)
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps_in(len(self._starts) - 1))
        return bisect.bisect_right(self._starts, step) - 1

    def steps_in(self, epoch: int) -> int:
        """The number of batches of an epoch."""
        return len(self._plan(0 if self._is_regular else epoch).batches)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that the first epoch has."""
        return len(self._plan(0).index)

    @property
    def _is_regular(self) -> bool:
        """Whether all epochs have equally many batches."""
        return self.pack_pixels is None and all(r.denominator == 1 for r in self._repeats)

    def _start(self, epoch: int) -> int:
        return epoch * self.steps_in(0) if self._is_regular else self._starts[epoch]

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            while len(self._plans) >= _KEPT_EPOCHS:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        taken = [self._take(number, epoch) for number in range(len(self._kept))]
        source = np.concatenate([np.full(len(part), number) for number, part in enumerate(taken)])
        index = np.concatenate(taken)
        bucket = np.concatenate([self._bins[number][part] for number, part in enumerate(taken)])
        bits = _bits(self.seed, _EPOCH, 0, epoch)
        shuffled = _permutation(bits, len(index))
        source, index, bucket = source[shuffled], index[shuffled], bucket[shuffled]
        if self.pack_pixels is not None:
            areas = np.array([height * width for height, width in self.buckets.sizes])[bucket]
            packed = _packed(areas, self.pack_pixels)
            numbers = np.repeat(np.arange(len(packed)), packed[:, 1] - packed[:, 0])  # of the batch of each sample
            by_size = np.lexsort((bucket, numbers))  # within a batch: the transformer works on one size together
            return _Plan(source[by_size], index[by_size], bucket[by_size], packed)
        by_bucket = np.argsort(bucket, kind="stable")
        source, index, bucket = source[by_bucket], index[by_bucket], bucket[by_bucket]
        counts = np.bincount(bucket)
        batches = [
            (start, min(start + self.batch_size, end))
            for end, count in zip(np.cumsum(counts).tolist(), counts.tolist())
            for start in range(end - count, end, self.batch_size)
        ]
        return _Plan(source, index, bucket, np.array(batches)[_permutation(bits, len(batches))])

    def _take(self, number: int, epoch: int) -> np.ndarray:
        """The indices of a source's samples in an epoch: the next of its endless stream."""
        kept, repeats = self._kept[number], self._repeats[number]
        start, end = (math.floor(e * repeats * len(kept)) for e in (epoch, epoch + 1))
        parts = [kept[:0]]
        while start < end:
            cycle, first = divmod(start, len(kept))
            last = min(len(kept), first + end - start)
            bits = _bits(self.seed, _STREAM, number, cycle)
            parts.append(kept[_permutation(bits, len(kept))[first:last]])
            start += last - first
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Plan:
    """An epoch: its samples, and its batches as ranges of them."""

    source: np.ndarray  # [N]
    index: np.ndarray  # [N]
    bucket: np.ndarray  # [N]
    batches: np.ndarray  # [steps, 2]

    def batch(self, number: int) -> slice:
        start, end = self.batches[number].tolist()
        return slice(start, end)


def _repeats(counts: Sequence[int], repeats: Sequence[float] | None, shares: Sequence[float] | None) -> list[Fraction]:
    """How often an epoch has each source's samples."""
    if repeats is not None and shares is not None:
        raise ConfigurationError("repeats and shares contradict each other; give one of them")
    name, given = ("repeats", repeats) if shares is None else ("shares", shares)
    if given is None:
        return [Fraction(1)] * len(counts)
    if len(given) != len(counts):
        raise ConfigurationError(f"{name} has {len(given)} entries for {len(counts)} sources")
    exact = [Fraction(str(finite(name, each, above=0, error=ConfigurationError))) for each in given]
    if shares is None:
        return exact
    per_sample = [share / count for share, count in zip(exact, counts)]
    return [each / min(per_sample) for each in per_sample]


def _packed(costs: np.ndarray, budget: int) -> np.ndarray:
    """Ranges of consecutive samples whose costs add up to at most ``budget``, or of one that alone exceeds it."""
    ends = np.cumsum(costs)
    batches = []
    start = 0
    while start < len(costs):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        batches.append((start, end))
        start = end
    return np.array(batches).reshape(-1, 2)


def _bits(seed: int, purpose: int, source: int, number: int) -> np.random.Philox:
    return np.random.Philox(key=seed, counter=[0, source, number, purpose])


def _permutation(bits: np.random.Philox, count: int) -> np.ndarray:
    """A permutation from raw bits, which unlike NumPy's own do not change between its versions."""
    return np.argsort(bits.random_raw(count), kind="stable")
