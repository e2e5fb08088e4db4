"""What steps cost: curves that are measured with a clock, and computed beyond what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from impasto import PixArtSigmaPipeline
from impasto.serving.engine.costs import StepCosts, ascending, interpolated, measure
from impasto.serving.engine.loading import measure_costs

from ...tiny import tiny_pipeline
from ...tiny_glm import pipelines

SMALL, USUAL, OTHERS = (4, 4), (8, 8), ((4, 8), (12, 8))


class Machine:
    """A clock, and steps that take as long as they say."""

    def __init__(self, packing: float = 1.0):
        self.now, self.packing, self.largest = 0.0, packing, 0

    def clock(self) -> float:
        return self.now

    def step(self, batch: Sequence[tuple[int, int]]) -> None:
        tokens = sum(h * w for h, w in batch)
        self.largest = max(self.largest, tokens)
        self.now += (0.01 + 0.0001 * tokens) * (self.packing if len({*batch}) > 1 else 1.0)


def test_both_curves_are_measured() -> None:
    machine = Machine(packing=1.5)
    costs = measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=10.0, most_tokens=1024, clock=machine.clock)
    assert [tokens for tokens, _ in costs.uniform] == [16, 64, 128, 256, 512, 1024]
    for images in (1, 2, 16):
        assert costs.seconds((64,) * images) == pytest.approx(0.01 + 0.0001 * 64 * images)
    assert costs.seconds((16,)) == pytest.approx(0.01 + 0.0001 * 16)
    assert costs.seconds((32, 96) * 8) == pytest.approx(1.5 * (0.01 + 0.0001 * 1024))
    # Attention of N tokens is 4 N² D of 24 N D² + 4 N² D multiplications: N / (6 D + N) of what a token costs.
    assert costs.quadratic == pytest.approx(0.0001 / (600 + 64))
    assert costs.seconds((16,) * 64) == pytest.approx(
        0.01 + 0.0001 * 1024 - costs.quadratic * (16 * 64**2 - 64 * 16**2)
    )


def test_measuring_is_bounded() -> None:
    machine = Machine()
    measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=0.3, clock=machine.clock)
    assert machine.now <= 0.4
    slow = Machine()
    costs = measure(slow.step, SMALL, USUAL, OTHERS, 100, seconds=0.0, clock=slow.clock)
    assert slow.largest == 64  # one image is always measured
    assert costs.seconds((128,)) > costs.seconds((64,))


def test_costs_between_and_beyond_what_was_measured() -> None:
    points = ((100, 1.0), (200, 1.5), (400, 4.0))
    assert [interpolated(points, n) for n in (50, 100, 150, 300, 700)] == pytest.approx([1.0, 1.0, 1.25, 2.75, 7.75])
    costs = StepCosts(points, points, quadratic=1e-4)
    assert costs.seconds(()) == 0.0
    assert costs.seconds((100, 100)) == pytest.approx(1.5 + 1e-4 * 2 * 100**2)
    assert costs.seconds((200,)) == pytest.approx(1.5 + 1e-4 * 200**2)
    assert costs.job_seconds(100, 2, 10) == pytest.approx(10 * costs.seconds((100, 100)))


def test_a_larger_batch_never_costs_less() -> None:
    assert ascending([(200, 1.0), (100, 1.5), (400, 2.0)]) == ((100, 1.5), (200, 1.5), (400, 2.0))


@pytest.mark.parametrize("family", ["PixArt", "GLM-Image"])
def test_steps_of_a_model_are_measured(family: str) -> None:
    pipe: Any = tiny_pipeline(PixArtSigmaPipeline) if family == "PixArt" else pipelines()[0]
    costs = measure_costs(pipe, 0.0)
    assert 16 in [tokens for tokens, _ in costs.uniform]
    assert costs.seconds((16, 16)) > 0
