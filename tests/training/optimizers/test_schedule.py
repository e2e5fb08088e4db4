"""The learning rate over the steps."""

from __future__ import annotations

import pytest

from impasto.training.settings.config import Settings


def plan(steps: int, kind: str, warmup: int, **more: float) -> Settings:
    return Settings(steps=steps, schedule={"kind": kind, "warmup": warmup, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.01), (49, 0.5), (99, 1.0), (699, 1.0), (850, 0.5), (999, 0.02), (5000, 0.02)]
)
def test_a_trapezoid_rises_stays_and_falls(step: int, share: float) -> None:
    assert plan(1000, "trapezoid", 100, decay_share=0.3, floor=0.02).share(step) == pytest.approx(share)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.51), (110, 0.02), (500, 0.02)])
def test_a_cosine_rises_and_falls(step: int, share: float) -> None:
    assert plan(110, "cosine", 10, floor=0.02).share(step) == pytest.approx(share)


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (3, 1.0), (4, 1.0), (54, 0.5), (104, 0.0)])
def test_a_line_falls_to_the_end(step: int, share: float) -> None:
    assert plan(104, "linear", 4).share(step) == pytest.approx(share)


def test_a_constant_rate_has_a_warm_up_or_none() -> None:
    assert [plan(9, "constant", 2).share(step) for step in range(4)] == [0.5, 1, 1, 1]
    assert plan(9, "constant", 0).share(0) == 1
