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
    the slope of the whole curve, as that of its end is uncertain."""
    if len(points) == 1:
        return points[0][1] * max(1.0, tokens / points[0][0])
    right = bisect_left(points, (tokens, 0.0))
    if right == 0:
        return points[0][1]
    (t0, s0), (t1, s1) = (points[0], points[-1]) if right == len(points) else points[right - 1 : right + 1]
    return s1 + (s1 - s0) * (tokens - t1) / (t1 - t0)


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
    sizes: Sequence[tuple[int, int]],
    width: int,
    *,
    seconds: float = 3.0,
    rounds: int = 3,
    most_tokens: int = 4096,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Measure the steps of a model: batches of growing numbers of images, uniform and packed in turns.

    Args:
        step: takes one step of images of such sizes.
        sizes: height and width in tokens of a usual image, then of others to pack it with.
        width: channels of the model: how attention grows beyond what is measured is computed from it.
        seconds: after so many, no larger batch is begun.
        rounds: of each batch; the fastest one counts.
        most_tokens: of a batch, but for a single image.
    """
    usual, others = sizes[0], sizes[1:] or sizes
    start, uniform, packed = clock(), [], []
    images = 1
    while True:
        mixed = [usual, *(others[i % len(others)] for i in range(images - 1))] if images > 1 else []
        batches = {"uniform": [usual] * images, **({"packed": mixed} if mixed else {})}
        found = dict.fromkeys(batches, float("inf"))
        for turn in range(rounds + 1):  # the first one warms up
            for name, batch in batches.items():
                begun = clock()
                step(batch)
                found[name] = min(clock() - begun, found[name]) if turn else found[name]
        uniform.append((images * usual[0] * usual[1], found["uniform"]))
        if mixed:
            packed.append((sum(h * w for h, w in mixed), found["packed"]))
        spent, images = clock() - start, images * 2
        if images * usual[0] * usual[1] > most_tokens or spent * 2.5 > seconds:
            break
    largest = usual[0] * usual[1]
    # A layer takes 24 N D² multiplications in its linear parts and 4 N² D in attention: N tokens, D channels.
    quadratic = uniform[0][1] / largest / (6 * width)
    first = uniform[0]
    return StepCosts(ascending(uniform), ascending([first, *packed]), quadratic, largest)
