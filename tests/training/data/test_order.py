"""The order of samples: each exactly once per epoch, however many ranks there are, as a function of (seed, step)."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from impasto.errors import ConfigurationError, InputError
from impasto.training.data.buckets import Buckets
from impasto.training.data.order import Order
from impasto.training.data.sample import Batch, Sample

SQUARE, WIDE, TALL = (64, 64), (32, 128), (128, 32)
BUCKETS = Buckets((SQUARE, WIDE, TALL))


class Sizes:
    """A source of which only the sizes matter."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        raise AssertionError("the order reads nothing")


def source(count: int, seed: int = 0) -> Sizes:
    rng = np.random.default_rng(seed)
    return Sizes([[(70, 70), (40, 160), (160, 40)][i] for i in rng.integers(3, size=count)])


def seen(order: Order, epoch: int, world: int = 1) -> Counter[tuple[int, int]]:
    """How often each (source, index) occurs in an epoch, over all ranks."""
    first = next(step for step in range(10_000) if order.epoch(step) == epoch)
    counted: Counter[tuple[int, int]] = Counter()
    for step in range(first, first + order.steps_in(epoch)):
        batch = order.batch(step)
        for rank in range(world):
            start, end = batch.slice(rank, world)
            counted.update((place.source, place.index) for place in batch.places[start:end])
    assert order.epoch(first + order.steps_in(epoch)) == epoch + 1
    return counted


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pack_pixels", [None, 5 * 64 * 64])
def test_each_sample_once_per_epoch_on_any_number_of_ranks(world: int, pack_pixels: int | None) -> None:
    order = Order([source(101), source(13, 1)], BUCKETS, 8, seed=3, pack_pixels=pack_pixels)
    for epoch in (0, 1, 2):
        assert seen(order, epoch, world) == Counter({(0, i): 1 for i in range(101)} | {(1, i): 1 for i in range(13)})


def test_a_batch_has_one_bucket_and_only_the_last_of_a_bucket_is_smaller() -> None:
    order = Order([source(200)], BUCKETS, 8)
    sizes: dict[tuple[int, int], list[int]] = {}
    for step in range(order.steps_in(0)):
        (target,) = {place.target for place in order.batch(step).places}
        sizes.setdefault(target, []).append(len(order.batch(step).places))
    assert set(sizes) == {SQUARE, WIDE, TALL}
    for each in sizes.values():
        assert sorted(each)[1:] == [8] * (len(each) - 1)
    assert {size: sum(each) for size, each in sizes.items()} == dict(order.in_buckets)


def test_the_batch_of_a_step_depends_on_seed_and_step_alone() -> None:
    sources = [source(60), source(30, 1)]
    walked = Order(sources, BUCKETS, 7, seed=5, repeats=[1, 0.7])
    batches = [walked.batch(step) for step in range(60)]
    fresh = Order(sources, BUCKETS, 7, seed=5, repeats=[1, 0.7])
    assert [fresh.batch(step) for step in reversed(range(60))] == batches[::-1]
    assert Order(sources, BUCKETS, 7, seed=6, repeats=[1, 0.7]).batch(0) != batches[0]


def test_epochs_and_buckets_are_shuffled() -> None:
    order = Order([source(90)], BUCKETS, 6)
    steps = order.steps_in(0)
    epochs = [[order.batch(e * steps + k) for k in range(steps)] for e in (0, 1)]
    assert [batch.places for batch in epochs[0]] != [batch.places for batch in epochs[1]]
    targets = [batch.places[0].target for batch in epochs[0]]
    assert sum(a != b for a, b in itertools.pairwise(targets)) > 2  # not one bucket after the other


def test_fractional_repeats_take_turns() -> None:
    order = Order([source(50), source(21, 1)], BUCKETS, 4, repeats=[2, 0.5])
    total: Counter[tuple[int, int]] = Counter()
    for epoch in range(2):
        counted = seen(order, epoch)
        assert all(counted[0, i] == 2 for i in range(50))
        assert sum(count for (which, _), count in counted.items() if which == 1) in (10, 11)
        total += counted
    assert all(total[1, i] == 1 for i in range(21))


def test_shares_give_the_shortest_epoch_that_has_every_sample() -> None:
    order = Order([source(100), source(10, 1)], BUCKETS, 4, shares=[1, 1])
    counted = seen(order, 0)
    assert all(counted[0, i] == 1 for i in range(100))
    assert all(counted[1, i] == 10 for i in range(10))
    order = Order([source(10), source(10, 1)], BUCKETS, 4, shares=[0.75, 0.25])
    assert [sum(n for (which, _), n in seen(order, 0).items() if which == k) for k in (0, 1)] == [30, 10]


def test_packed_batches_keep_to_the_budget_and_ranks_share_the_work() -> None:
    budget = 6 * 64 * 64
    sizes = [(64, 64), (128, 128)] * 40
    buckets = Buckets(((64, 64), (128, 128)))
    order = Order([Sizes(sizes)], buckets, 1, pack_pixels=budget)
    mixed = 0
    for step in range(order.steps_in(0)):
        batch = order.batch(step)
        areas = [place.target[0] * place.target[1] for place in batch.places]
        assert sum(areas) <= budget
        mixed += len(set(areas)) > 1
        parts = [sum(areas[slice(*batch.slice(rank, 2))]) for rank in (0, 1)]
        assert abs(parts[0] - parts[1]) <= max(areas)
    assert mixed > 10
    single = Order([Sizes(sizes)], buckets, 1, pack_pixels=100)  # each alone exceeds it
    assert {len(single.batch(step).places) for step in range(80)} == {1}


def test_dropped_images_are_counted_and_never_used() -> None:
    sizes = [(64, 64), (10, 10), (64, 64), (64, 2000)]
    order = Order([Sizes(sizes)], Buckets((SQUARE,)), 2)
    assert sum(order.dropped.values()) == 2
    assert len(order.dropped) == 2
    assert seen(order, 0) == Counter({(0, 0): 1, (0, 2): 1})


def test_micro_batches_are_equally_many_on_all_ranks() -> None:
    order = Order([Sizes([(64, 64)] * 5)], Buckets((SQUARE,)), 5)
    batch = order.batch(0)
    numbers = []
    for rank in range(3):
        start, end = batch.slice(rank, 3)
        samples = [Sample(caption=str(place.index)) for place in batch.places[start:end]]
        parts = Batch(samples, start, 5, 0, batch.largest(3)).split(1)
        assert [part.samples[0].caption for part in parts if part.samples[0].weight] == [s.caption for s in samples]
        assert [part.first for part in parts] == list(range(start, start + len(parts)))
        numbers.append(len(parts))
    assert numbers == [2, 2, 2]
    assert len(Batch([], 0, 1, 0, 0).split(4)) == 1  # a rank without samples takes part all the same


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="at least one source"):
        Order([], BUCKETS, 1)
    with pytest.raises(InputError, match="source 2 of 2 has no sample to train on"):
        Order([source(3), Sizes([])], BUCKETS, 1)
    with pytest.raises(InputError, match="2 dropped: smaller than"):
        Order([Sizes([(8, 8), (9, 9)])], BUCKETS, 1)
    with pytest.raises(ConfigurationError, match="contradict"):
        Order([source(3)], BUCKETS, 1, repeats=[1], shares=[1])
    with pytest.raises(ConfigurationError, match="2 entries for 1 sources"):
        Order([source(3)], BUCKETS, 1, repeats=[1, 2])
    with pytest.raises(ConfigurationError, match="above 0"):
        Order([source(3)], BUCKETS, 1, repeats=[0])
    with pytest.raises(ConfigurationError, match="batch size"):
        Order([source(3)], BUCKETS, 0)


def test_the_fingerprint_is_of_all_that_the_batches_depend_on() -> None:
    class Named(Sizes):
        names = "ab"

        def name(self, index: int) -> str:
            return self.names[index]

    sizes = [(70, 70), (40, 160)]
    original = Order([Named(sizes)], BUCKETS, 8).fingerprint
    assert Order([Named(sizes)], BUCKETS, 8).fingerprint == original
    renamed = Named(sizes)
    renamed.names = "ac"
    others = [
        Order([renamed], BUCKETS, 8),
        Order([Named([(70, 70), (160, 40)])], BUCKETS, 8),
        Order([Named(sizes[:1])], BUCKETS, 8),
        Order([Named(sizes), Named(sizes)], BUCKETS, 8),
        Order([Named(sizes)], BUCKETS, 4),
        Order([Named(sizes)], BUCKETS, 8, seed=1),
        Order([Named(sizes)], BUCKETS, 8, repeats=[2]),
    ]
    assert len({original, *(order.fingerprint for order in others)}) == 8
