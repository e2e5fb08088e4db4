"""Random numbers that depend on the seed, the step and the place in the batch alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from impasto.training.running.randomness import Randomness, seed_torch

DRAWS: dict[str, Callable[[Randomness, int], Tensor]] = {
    "normal": lambda random, count: random.normal([count, 3, 4]),
    "uniform": lambda random, count: random.uniform([count]),
    "integers": lambda random, count: random.integers(1000, [count, 5]),
    "stratified": lambda random, count: random.stratified(count),
    "shuffled": lambda random, count: random.stratified(count, shuffled=True),
}


@pytest.mark.parametrize("name", list(DRAWS))
def test_a_batch_gets_the_same_numbers_whole_or_in_shares(name: str) -> None:
    draw = DRAWS[name]
    whole = Randomness(1, 7)
    shares = [Randomness(1, 7, first=first, batch=8) for first in (0, 4, 6)]
    for _ in range(2):  # numbers that follow others are the same, too
        parts = [draw(share, count) for share, count in zip(shares, (4, 2, 2), strict=True)]
        assert torch.equal(torch.cat(parts), draw(whole, 8))


@pytest.mark.parametrize("name", list(DRAWS))
def test_seed_step_and_place_each_change_the_numbers(name: str) -> None:
    draw = DRAWS[name]
    found = [draw(Randomness(*given), 4) for given in ((1, 7), (1, 7), (2, 7), (1, 8), (1, 7, 4))]
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        assert not torch.equal(other, found[0])
    assert len({tuple(row.flatten().tolist()) for row in found[0]}) == 4


def test_large_batches_get_the_same_numbers_from_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            random = Randomness(1, 7, first=2)
            found.append([random.normal([3, 250_000]), random.normal([3, 250_000])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0][:1], Randomness(1, 7, first=2).normal([1, 250_000]))
    assert Randomness(1, 7).normal([2, 0, 3]).shape == (2, 0, 3)


def test_the_distributions() -> None:
    random = Randomness(0, 0)
    normal, uniform, integers = random.normal([50, 2000]), random.uniform([50, 2000]), random.integers(5, [50, 2000])
    assert (normal.dtype, uniform.dtype, integers.dtype) == (torch.float32, torch.float32, torch.int64)
    assert float(normal.mean()) == pytest.approx(0, abs=0.02)
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    assert float(torch.corrcoef(normal).fill_diagonal_(0).abs().max()) < 0.12  # samples are independent
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert integers.flatten().bincount().tolist() == pytest.approx([20_000] * 5, rel=0.05)


def test_stratified_numbers_fill_every_interval() -> None:
    for step in range(20):
        numbers = Randomness(3, step).stratified(16)
        assert (numbers * 16).floor().tolist() == list(range(16))


def test_which_sample_has_which_interval_is_drawn_for_packed_batches() -> None:
    """There, samples of one size are next to each other."""
    numbers = torch.stack([Randomness(3, step).stratified(16, shuffled=True) for step in range(100)])
    assert (numbers.sort(dim=1).values * 16).floor().tolist() == [list(range(16))] * 100
    assert float(numbers[:, :8].mean()) == pytest.approx(0.5, abs=0.03)


def test_what_samples_share_is_the_same_in_each_share_and_of_no_sample() -> None:
    first, second = Randomness(1, 7, first=0, batch=8), Randomness(1, 7, first=4, batch=8)
    numbers = first.shared.random(4).tolist()
    assert numbers == second.shared.random(4).tolist()
    assert numbers[0] not in Randomness(1, 7).uniform([8]).tolist()


def test_torch_is_seeded_by_seed_and_step() -> None:
    def number(seed: int, step: int) -> float:
        seed_torch(seed, step, torch.device("cpu"))
        return float(torch.rand(()))

    with torch.random.fork_rng([]):
        assert number(0, 1) == number(0, 1)
        assert len({number(0, 1), number(0, 2), number(1, 1)}) == 3
