"""What a step costs: seconds of a forward pass as a function of the tokens in it, measured or recorded."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

#: Height and width in tokens of each image of a step.
Batch = tuple[tuple[int, int], ...]
#: How often each batch is measured, at least.
ROUNDS = 3
#: Tokens and seconds of a forward pass, by ascending tokens.
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step of a model on a machine.

    Attributes:
        uniform: of batches of images of one size, without attention.
        packed: of batches of several sizes, without attention.
        quadratic: seconds of attention for each pair of tokens of an image.
    """

    uniform: Points
    packed: Points
    quadratic: float = 0.0

    def seconds(self, tokens: Sequence[int]) -> float:
        """Of one forward pass.

        Args:
            tokens: of each image in it; both halves of guidance count.
        """
        if not tokens:
            return 0.0
        points = self.uniform if min(tokens) == max(tokens) else self.packed
        return interpolated(points, sum(tokens)) + self.quadratic * _pairs(tokens)

    def job_seconds(self, tokens: int, halves: int, steps: int) -> float:
        """Of all steps of an image by itself."""
        return steps * self.seconds((tokens,) * halves)


def interpolated(points: Points, tokens: int) -> float:
    """Seconds of so many tokens: linear between the points, and before the first one as there. Beyond the last one with
    the slope of the end or of the whole, whichever is steeper: what was not measured is not expected to be cheap."""
    if len(points) == 1:
        return points[0][1] * max(1.0, tokens / points[0][0])
    right = bisect_left(points, (tokens, 0.0))
    if right == 0:
        return points[0][1]
    if right < len(points):
        (t0, s0), (t1, s1) = points[right - 1 : right + 1]
        return s1 + (s1 - s0) * (tokens - t1) / (t1 - t0)
    last, seconds = points[-1]
    slope = max((seconds - s) / (last - t) for t, s in (points[0], points[-2]))
    return seconds + slope * (tokens - last)


def ascending(points: Sequence[tuple[int, float]]) -> Points:
    """The points by ascending tokens, without those that took less time than a smaller batch: noise of measuring."""
    kept: list[tuple[int, float]] = []
    for tokens, seconds in sorted(points):
        seconds = max(seconds, kept[-1][1] if kept else 0.0)
        if kept and kept[-1][0] == tokens:
            continue
        kept.append((tokens, seconds))
    return tuple(kept)


def measure(
    step: Callable[[Sequence[tuple[int, int]]], Callable[[], None]],
    small: tuple[int, int],
    usual: tuple[int, int],
    others: Sequence[tuple[int, int]],
    width: int,
    *,
    seconds: float = 4.0,
    most_tokens: int = 4096,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Measure the steps of a model: of a small image, and batches of 1, 2, 4, ... images, uniform and packed.

    Each round takes all of them in turns, and its times are relative to their sum: a machine that is slower for a while
    has other sums. Of each batch the median of the rounds counts.

    Args:
        step: prepares a step of images of such sizes, and returns what takes it; only that is measured.
        small, usual: height and width in tokens of the small image, and of the images of uniform batches.
        others: of the images of packed ones, in turn; of each two, one is as much larger as the other is smaller.
        width: channels of the model: how much of a step is attention is computed from it.
        seconds: of all rounds, three or more unless a step takes too long; the first one warms up.
        most_tokens: of a batch, but for a single image.
    """
    step((usual,))()  # warms up
    start = clock()
    uniform: list[Batch] = [(small,), (usual,)]
    packed: list[Batch] = []
    times: dict[Batch, list[float]] = {}  # in each round

    def take(batch: Batch) -> None:
        ready, before = step(batch), clock()
        ready()
        times.setdefault(batch, []).append(clock() - before)

    for batch in dict.fromkeys(uniform):
        take(batch)
    images, begun = 2, start
    while images * usual[0] * usual[1] <= most_tokens:  # the first round finds how many images may be measured
        now = clock()
        expected = max(2.5 * (now - begun), 2 * images * times[usual,][0])
        if ROUNDS * (now - start + expected) > seconds:
            break
        begun = now
        uniform.append((usual,) * images)
        packed.append((*sorted(others[i % len(others)] for i in range(images)),))
        for batch in dict.fromkeys((uniform[-1], packed[-1])):  # one, if the model is so small that all sizes are one
            take(batch)
        images *= 2
    round_ = clock() - start + times[usual,][0]
    while clock() - start + round_ <= seconds:
        step((usual,))()  # warms up: the largest batch leaves no weights in the caches
        for batch in [*times]:
            take(batch)
    sums = [sum(each) for each in zip(*times.values(), strict=True)]  # of each round
    found = {
        batch: median(sums) * median(one / whole for one, whole in zip(each, sums, strict=True))
        for batch, each in times.items()
    }

    # A layer takes 24 N D² multiplications in its linear parts and 4 N² D in attention: N tokens, D channels.
    least, most = ([h * w for h, w in batch] for batch in ((small,), uniform[-1]))
    linear, pairs = sum(most) - sum(least), _pairs(most) - _pairs(least)
    rise = found[uniform[-1]] - found[small,]
    quadratic = max(0.0, rise) / max(1, 6 * width * linear + pairs)

    def points(batches: list[Batch]) -> Points:
        lengths = [[h * w for h, w in batch] for batch in batches]
        return ascending(
            [(sum(n), found[batch] - quadratic * _pairs(n)) for n, batch in zip(lengths, batches, strict=True)]
        )

    return StepCosts(points(uniform), points([*uniform[:2], *packed]), quadratic)


def _pairs(tokens: Sequence[int]) -> int:
    return sum(each * each for each in tokens)
