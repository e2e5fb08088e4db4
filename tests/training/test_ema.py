"""The moving average: its decay and its start."""

from __future__ import annotations

import pytest
import torch

from impasto.training.running.ema import EMA


def test_follows_the_recurrence_with_a_decay_that_rises_to_its_limit() -> None:
    live = {"weight": torch.tensor([1.0, -2.0])}
    ema = EMA(live, decay=0.5)
    expected = live["weight"].clone().double()
    for n in range(1, 30):
        live["weight"].copy_(torch.tensor([float(n), n * 0.5]))
        ema.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * live["weight"].double()
        torch.testing.assert_close(ema.shadow["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_starts_at_the_parameters_and_does_not_share_their_memory() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    ema = EMA({"p": parameter}, decay=0.9)
    with torch.no_grad():
        parameter.fill_(5.0)
    assert torch.equal(ema.shadow["p"], torch.ones(3))
    assert not ema.shadow["p"].requires_grad


def test_does_not_change_the_parameters() -> None:
    parameter = torch.nn.Parameter(torch.full((2,), 3.0))
    ema = EMA({"p": parameter}, decay=0.9)
    ema.shadow["p"].zero_()
    ema.update(1)
    assert torch.equal(parameter.detach(), torch.full((2,), 3.0))
    assert float(ema.shadow["p"][0]) == pytest.approx(3.0 * (1 - 2 / 11))


def test_constant_parameters_stay_as_they_are() -> None:
    ema = EMA({"p": torch.tensor([0.3, -7.0])}, decay=0.99)
    for n in range(1, 21):
        ema.update(n)
    torch.testing.assert_close(ema.shadow["p"], torch.tensor([0.3, -7.0]))


def test_without_a_decay_the_parameters_are_their_own_averages() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    ema = EMA({"p": parameter}, decay=0.0)
    with torch.no_grad():
        parameter.fill_(5.0)
    ema.update(1)
    assert ema.shadow["p"].data_ptr() == parameter.data_ptr()
    assert torch.equal(ema.shadow["p"], torch.full((3,), 5.0))
