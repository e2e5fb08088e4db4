"""The best checkpoint of a run: it is kept, and may be the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impasto.errors import InputError
from impasto.training.running import checkpoints
from impasto.training.running.loop import train
from impasto.training.settings.config import Settings

from .runs import Of, settings, steps_alone


def plain(steps: int, **options: Any) -> Settings:
    constant = {"kind": "constant"}
    return settings(steps, **{"log_every": 1, "precision": "float32", "schedule": constant, **options})


def linear() -> tuple[nn.Linear, Of]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, Of(model, lambda step, random: (model(random.normal([8, 3])) - 1).square().mean(1))


@pytest.mark.parametrize(("which", "best"), [("lowest", 6), ("highest", 4)])
def test_the_best_checkpoint_is_kept(which: str, best: int, tmp_path: Path) -> None:
    measured = {4: 5.0, 6: 1.0, 8: 3.0, 10: 2.0, 12: 4.0}  # the first is not a number

    def start(steps: int) -> None:
        plan = plain(steps, checkpoints={"every": 2, "keep": 1, "best": "error", "best_is": which})
        train(linear()[1], steps_alone(8), plan, tmp_path, lambda step: {"error": measured.get(step, math.nan)})

    start(8)
    start(12)
    assert list(checkpoints.found(tmp_path)) == [best, 12]
    with pytest.raises(InputError, match=r"checkpoints\.best: there is no value 'psnr'; there are .*loss"):
        train(linear()[1], steps_alone(8), plain(2, checkpoints={"best": "psnr"}), tmp_path / "other")
    assert list(checkpoints.found(tmp_path / "other")) == [2]  # nothing is lost


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_checkpoint_is_the_result_if_asked_for(ema: float, tmp_path: Path) -> None:
    def trained(folder: str, steps: int, **given: str) -> torch.Tensor:
        model, objective = linear()
        plan = plain(steps, ema=ema, checkpoints={"every": 2, "keep": 1, "best": "error", **given})
        train(objective, steps_alone(8), plan, tmp_path / folder, lambda step: {"error": abs(step - 4.0)})
        return model.weight.detach().clone()

    last = trained("last", 8)
    expected = trained("four", 4)
    assert not torch.equal(last, expected)
    assert torch.equal(trained("best", 8, result="best"), expected)
    assert torch.equal(trained("last", 8, result="best"), expected)  # also afterwards
    assert torch.equal(trained("last", 8), last)


def test_another_best_value_is_not_compared_with_the_one_before(tmp_path: Path) -> None:
    def start(steps: int, **given: str) -> None:
        plan = plain(steps, checkpoints={"every": 2, "keep": 1, **given})
        train(linear()[1], steps_alone(8), plan, tmp_path, lambda step: {"error": step, "right": step})

    start(4, best="error")
    assert list(checkpoints.found(tmp_path)) == [2, 4]
    start(6, best="error", best_is="highest")
    assert list(checkpoints.found(tmp_path)) == [6]
    start(10, best="right")
    assert list(checkpoints.found(tmp_path)) == [8, 10]


@pytest.mark.parametrize("changed", ["validation", "checks"])
def test_the_best_value_of_another_measure_is_not_compared(
    changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Measured(Settings):
        validation: Mapping[str, int] = {"count": 4}
        checks: Mapping[str, int] = {"count": 4}

    def start(steps: int, scale: float, **given: Any) -> None:
        plan = plain(steps, checkpoints={"every": 2, "keep": 1, "best": "error"}).model_dump()
        train(linear()[1], steps_alone(8), Measured(**plan, **given), tmp_path, lambda step: {"error": scale * step})

    start(4, 1.0)
    assert list(checkpoints.found(tmp_path)) == [2, 4]
    start(8, 10.0, **{changed: {"count": 4}})  # measured as before
    assert list(checkpoints.found(tmp_path)) == [2, 8]
    if changed == "validation":
        start(10, 10.0, validation={"count": 4, "batch_size": 2})  # the same but for rounding
        assert list(checkpoints.found(tmp_path)) == [2, 10]
        assert not caplog.records
    start(14, 10.0, **{changed: {"count": 8}})
    assert list(checkpoints.found(tmp_path))[-1] == 14
    assert 2 not in checkpoints.found(tmp_path)
    assert "its best checkpoint does not count" in caplog.text
