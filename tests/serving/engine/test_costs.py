"""What steps cost: curves that are measured with a clock, and computed beyond what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from impasto import PixArtSigmaPipeline
from impasto.serving.engine.costs import StepCosts, ascending, interpolated, measure
from impasto.serving.engine.loading import measure_costs

from ...tiny import tiny_pipeline
from ...tiny_glm import pipelines

SMALL, USUAL, OTHERS = (4, 4), (8, 8), ((4, 8), (12, 8))


class Machine:
    """A clock, and steps that take as long as they say: those of a model of 100 channels, with its attention.

    Args:
        packing: how many times as long a step of several sizes takes.
        slow: seconds between which everything takes three times as long.
    """

    def __init__(self, packing: float = 1.0, slow: tuple[float, float] = (0.0, 0.0)):
        self.now, self.packing, self.slow, self.largest = 0.0, packing, slow, 0

    def clock(self) -> float:
        return self.now

    def cost(self, tokens: Sequence[int]) -> float:
        linear, pairs = 6 * 100 * sum(tokens), sum(each * each for each in tokens)
        return (0.01 + 1e-7 * (linear + pairs)) * (self.packing if len({*tokens}) > 1 else 1.0)

    def step(self, batch: Sequence[tuple[int, int]]) -> Callable[[], None]:
        self.now += 0.02  # preparing is not measured
        return lambda: self.take([h * w for h, w in batch])

    def take(self, tokens: Sequence[int]) -> None:
        self.largest = max(self.largest, sum(tokens))
        self.now += self.cost(tokens) * (3.0 if self.slow[0] <= self.now < self.slow[1] else 1.0)


def test_both_curves_are_measured() -> None:
    machine = Machine(packing=1.5)
    costs = measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=1000.0, most_tokens=1024, clock=machine.clock)
    assert [tokens for tokens, _ in costs.uniform] == [16, 64, 128, 256, 512, 1024]
    assert costs.quadratic == pytest.approx(1e-7)
    measured = [(16,), (64,), (64,) * 2, (64,) * 16, (32, 96) * 8]
    sizes = [(16,) * 64, (256,) * 4, (1024,)]  # uniform, and not measured
    for tokens in measured + sizes:
        assert costs.seconds(tokens) == pytest.approx(machine.cost(tokens))
    for tokens in (
        (32, 64, 96) * 5,
        (16, 240) * 4,
    ):  # the attention of a packed batch is known for the sizes of the measured one
        assert costs.seconds(tokens) == pytest.approx(machine.cost(tokens), rel=0.1)


def test_a_slow_moment_does_not_distort_one_of_them() -> None:
    for slow in ((0.1, 0.2), (0.5, 0.6)):  # of the first round, and of the second
        machine = Machine(slow=slow)
        costs = measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=10.0, most_tokens=512, clock=machine.clock)
        assert machine.now > slow[1]
        for tokens in ((16,), (64,), (64,) * 2, (64,) * 4, (64,) * 8, (32, 96) * 2):
            assert costs.seconds(tokens) == pytest.approx(machine.cost(tokens))


def test_a_machine_that_becomes_slower_does_not_distort_them() -> None:
    """Every step from the second round on takes three times as long, so all of the curve is as much higher."""
    machine = Machine(slow=(0.4, 1000.0))
    costs = measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=10.0, most_tokens=512, clock=machine.clock)
    for tokens in ((16,), (64,), (64,) * 2, (64,) * 4, (64,) * 8, (32, 96) * 2):
        assert costs.seconds(tokens) == pytest.approx(3.0 * machine.cost(tokens))


def test_a_model_of_one_size_is_measured() -> None:
    machine = Machine()
    costs = measure(machine.step, SMALL, SMALL, [SMALL], 100, seconds=10.0, most_tokens=64, clock=machine.clock)
    assert [tokens for tokens, _ in costs.uniform] == [16, 32, 64]
    assert costs.seconds((16,) * 4) == pytest.approx(machine.cost((16,) * 4))


def test_measuring_is_bounded() -> None:
    machine = Machine()
    measure(machine.step, SMALL, USUAL, OTHERS, 100, seconds=0.6, clock=machine.clock)
    assert 0.3 < machine.now <= 0.6 + 0.04  # with the step that warms up
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
    assert costs.uniform[-1][0] == 16  # one of the model's own size
    assert costs.seconds((16, 16)) > 0
