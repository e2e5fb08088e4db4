"""What a step costs: seconds of a forward pass as a function of the tokens in it, measured or recorded."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Tokens and seconds of a forward pass, by ascending tokens.
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step of a model on a machine.

    Attributes:
        uniform: of batches of images of one size.
        packed: of batches of several sizes.
        quadratic: seconds for each pair of tokens of an image in addition: attention beyond what was measured.
        measured: tokens of the largest image that was measured; the points include the attention of such images.
    """

    uniform: Points
    packed: Points
    quadratic: float = 0.0
    measured: int = 0

    def seconds(self, tokens: Sequence[int]) -> float:
        """Of one forward pass.

        Args:
            tokens: of each image in it; both halves of guidance count.
        """
        if not tokens:
            return 0.0
        most, attention = max(tokens), 0
        if most > self.measured:
            attention = sum(each * each - self.measured * self.measured for each in tokens if each > self.measured)
        points = self.uniform if min(tokens) == most else self.packed
        return interpolated(points, sum(tokens)) + self.quadratic * attention

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
    step: Callable[[Sequence[tuple[int, int]]], None],
    small: tuple[int, int],
    usual: tuple[int, int],
    others: Sequence[tuple[int, int]],
    width: int,
    *,
    seconds: float = 4.0,
    rounds: int = 2,
    most_tokens: int = 4096,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Measure the steps of a model: of a small image, and batches of 1, 2, 4, ... images, uniform and packed in turns.

    Args:
        step: takes one step of images of such sizes.
        small, usual: height and width in tokens of the small image, and of the images of uniform batches.
        others: of the images of packed ones, in turn; of each two, one is as much larger as the other is smaller.
        width: channels of the model: how attention grows beyond what is measured is computed from it.
        seconds: no batch is begun that would take longer in all.
        rounds: of each batch; the fastest one counts.
        most_tokens: of a batch, but for a single image.
    """
    start, uniform, packed, images = clock(), list[tuple[int, float]](), list[tuple[int, float]](), 1
    step([usual])  # warms up
    for _ in range(rounds):
        before = clock()
        step([small])
        uniform.append((small[0] * small[1], clock() - before))
    uniform = [min(uniform)]
    while True:
        begun = clock()
        mixed = sorted(others[i % len(others)] for i in range(images)) if images > 1 else []
        batches = {"uniform": [usual] * images, **({"packed": mixed} if mixed else {})}
        found = dict.fromkeys(batches, float("inf"))
        for _ in range(rounds):
            for name, batch in batches.items():
                before = clock()
                step(batch)
                found[name] = min(clock() - before, found[name])
        uniform.append((images * usual[0] * usual[1], found["uniform"]))
        if mixed:
            packed.append((sum(h * w for h, w in mixed), found["packed"]))
        images *= 2
        now = clock()
        if images * usual[0] * usual[1] > most_tokens or now - start + 2.5 * (now - begun) > seconds:
            break
    largest = usual[0] * usual[1]
    # A layer takes 24 N D² multiplications in its linear parts and 4 N² D in attention: N tokens, D channels.
    curve = ascending(uniform)
    (first, fixed), (last, most) = curve[0], curve[-1]
    per_token = (most - fixed) / (last - first) if last > first else fixed / first
    return StepCosts(curve, ascending([*uniform[:2], *packed]), per_token / (6 * width), largest)
