"""Random numbers that depend on the seed, the step and the place in the batch alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from impasto.training.running.philox import normal_rows, philox
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


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_fills_a_micro_batch_up_has_a_number_too(shuffled: bool) -> None:
    """Its place may be after the last one of the global batch."""
    whole = Randomness(3, 5, batch=8).stratified(8, shuffled)
    assert Randomness(3, 5, first=8, batch=8).stratified(1, shuffled).shape == (1,)
    numbers = Randomness(3, 5, first=6, batch=8).stratified(4, shuffled)
    assert torch.equal(numbers[:2], whole[6:])
    assert 0 <= float(numbers.min()) <= float(numbers.max()) <= 1


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


def test_a_gpu_draws_known_bits_for_known_counters() -> None:
    """The answers that Random123 publishes for Philox4x32-10."""
    for word, key, expected in (
        (0, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        one = torch.tensor([word])
        assert tuple(int(found) for found in philox((one, one, one, one), key)) == expected


def test_what_a_gpu_draws_is_normal_and_depends_on_seed_step_place_and_draw() -> None:
    def rows(seed: int = 3, step: int = 5, place: int = 0, draw: int = 0) -> Tensor:
        places = torch.arange(place, place + 100)
        return normal_rows(seed, step, places, torch.full_like(places, draw), 1002)

    x = rows().double()
    assert x.shape == (100, 1002)
    assert float(x.mean()) == pytest.approx(0, abs=0.012)
    assert float(x.std()) == pytest.approx(1, abs=0.01)
    assert float((x < -1).double().mean()) == pytest.approx(0.1587, abs=0.005)
    assert float((x.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.0006)
    for one, other in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, 2:], x[:, :-2])):
        assert float((one * other).mean()) == pytest.approx(0, abs=0.012)
    for other in (rows(seed=4), rows(seed=3 + 2**32), rows(step=6), rows(place=100), rows(draw=1)):
        assert abs(float((x * other).mean())) < 0.012
    assert torch.equal(rows(place=40)[:60], rows()[40:])


def test_draws_on_a_gpu_follow_each_other_in_parts_of_a_batch_as_in_the_whole() -> None:
    def drawn(random: Randomness, count: int) -> Tensor:
        return random._on_device([count, 2, 3], torch.device("cpu"))

    whole, share = Randomness(1, 7), Randomness(1, 7, first=2)
    first, second = drawn(whole, 6), drawn(whole, 6)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(share[0:2], 2), first[2:4])  # parts take turns, as images of several sizes do
    assert torch.equal(drawn(share[2:4], 2), first[4:])
    assert torch.equal(drawn(share, 4), second[2:])


@pytest.mark.gpu
def test_a_gpu_draws_what_its_formula_says() -> None:
    found = Randomness(3, 5, first=2).normal([4, 10, 100], torch.device("cuda"))
    places = torch.arange(2, 6)
    expected = normal_rows(3, 5, places, torch.zeros_like(places), 1000)
    assert torch.allclose(found.cpu().flatten(1), expected, atol=1e-5)
