"""The policy by itself, and on a simulated clock with recorded costs of steps, next to other policies."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from impasto.serving.engine.costs import StepCosts
from impasto.serving.engine.policy import OVERTAKEN, PATIENCE, Candidate, admit, charge, choose
from impasto.serving.engine.simulation import (
    SCENES_AVX2,
    Policy,
    Request,
    first_in_first_out,
    percentile,
    same_size,
    simulate,
    slowdowns,
)

COST = SCENES_AVX2.seconds
ALL = 1 << 16


def candidates(*tokens: int, **fields: object) -> list[Candidate]:
    return [Candidate(str(i), None, (n, n), **fields) for i, n in enumerate(tokens)]  # type: ignore[arg-type]


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Five sizes of 64 to 256 tokens, 10, 20 or 30 steps, all guided."""
    rng = random.Random(seed)
    return [Request((rng.choice((64, 96, 128, 192, 256)),) * 2, rng.choice((10, 20, 30))) for _ in range(count)]


def test_images_of_all_sizes_share_a_step_where_that_pays() -> None:
    assert {each.id for each in choose(candidates(64, 96, 128, 256), COST, ALL)} == {"0", "1", "2", "3"}


def test_nothing_is_packed_where_a_step_costs_the_same_per_token() -> None:
    linear = StepCosts(((1, 0.001), (100_000, 100.0)), ((1, 0.001), (100_000, 100.0)))
    assert len(choose(candidates(64, 96, 128), linear.seconds, ALL)) == 1


def test_only_images_of_one_size_share_a_step_where_packing_costs_more() -> None:
    curves = StepCosts(((128, 0.06), (8192, 2.2)), ((128, 0.12), (8192, 4.0)))
    assert [each.id for each in choose(candidates(64, 96, 64, 96), curves.seconds, ALL)] == ["0", "2"]


def test_images_of_one_size_are_not_packed_with_another_first_where_a_step_of_them_alone_costs_less() -> None:
    curves = StepCosts(((128, 0.06), (8192, 2.2)), ((128, 0.06), (8192, 3.0)))
    assert {each.id for each in choose(candidates(64, 96, 64, 64, 64), curves.seconds, ALL)} == {"0", "2", "3", "4"}


def test_as_many_share_a_step_as_gain_most() -> None:
    """A machine whose caches hold 500 tokens: beyond them a token costs more."""
    curve = ((64, 0.01), (500, 0.014), (1000, 0.04), (4000, 0.3))
    costs = StepCosts(curve, curve)
    assert len(choose(candidates(*[60] * 16), costs.seconds, ALL)) == 4


def test_groups_and_images_that_cannot_share_take_turns() -> None:
    some = candidates(64, 64, 64)
    some[1].group, some[2].shares = "adapter", False
    turns = []
    for _ in range(3):
        chosen = choose(some, COST, ALL)
        charge(chosen, COST(chosen[0].tokens))
        turns += [each.id for each in chosen]
    assert sorted(turns) == ["0", "1", "2"]


def test_a_group_stays_while_the_next_one_costs_a_switch() -> None:
    some = candidates(64, 64)
    some[1].group, some[0].served = "adapter", 0.9
    assert [each.id for each in choose(some, COST, ALL, None, 0.1)] == ["0"]
    some[0].served = 1.1  # ten switches ahead
    assert [each.id for each in choose(some, COST, ALL, None, 0.1)] == ["1"]


def test_a_step_holds_no_more_tokens_than_fit() -> None:
    assert [each.id for each in choose(candidates(64, 256, 96), COST, 400)] == ["0", "2"]
    assert [each.id for each in choose(candidates(512), COST, 400)] == ["0"]  # alone it does not share


def test_nobody_waits_for_a_much_larger_image() -> None:
    small, large = candidates(64, 65_536)
    assert choose([small, large], COST, 1 << 20) == [small]
    charge([small], 1.0)
    assert choose([small, large], COST, 1 << 20) == [large]


def test_a_step_is_charged_by_tokens() -> None:
    some = candidates(64, 192)
    charge(some, 4.0)
    assert [each.served for each in some] == [1.0, 3.0]


def test_waiting_images_begin_in_order_and_are_not_overtaken_for_ever() -> None:
    assert admit([1, 1, 1], 0, 2) == [0, 1]
    assert admit([9, 1, 1], 0, 2) == [1, 2]
    assert admit([9, 1, 1], OVERTAKEN, 2) == []
    assert admit([9, 1, 1], OVERTAKEN, 10) == [0, 1]


@pytest.mark.parametrize(("concurrency", "over_fifo", "over_same_size"), [(8, 1.2, 1.05), (32, 1.2, 1.0)])
def test_more_images_in_less_time_than_other_policies(
    concurrency: int, over_fifo: float, over_same_size: float
) -> None:
    """With recorded costs of the bundled model's first edition on AVX2; latencies of the smallest images fall, too."""
    found: dict[str, tuple[float, float]] = {}
    policies: dict[str, Policy] = {"fair": choose, "fifo": first_in_first_out, "same": same_size}
    for name, policy in policies.items():
        requests = mixed(200)
        seconds = simulate(requests, SCENES_AVX2, policy, concurrency=concurrency)
        small = [request for request in requests if request.tokens[0] == 64]
        found[name] = seconds, percentile(slowdowns(small, SCENES_AVX2), 95)
    assert found["fifo"][0] / found["fair"][0] >= over_fifo
    assert found["same"][0] / found["fair"][0] >= over_same_size
    assert found["fair"][1] < found["fifo"][1]


def test_ten_thousand_requests_all_end_and_none_starves() -> None:
    rng, requests, now = random.Random(1), mixed(10_000, seed=1), 0.0
    for request in requests:
        request.steps = request.left = rng.choice((2, 4, 8))
        now += rng.expovariate(1 / 0.55)  # a load of about 90 %
        request.arrives = now
    simulate(requests, SCENES_AVX2, choose, most_running=24)
    assert all(request.left == 0 for request in requests)
    most = slowdowns(requests, SCENES_AVX2)
    assert percentile(most, 50) < 8
    assert most[-1] < 60


def test_a_4k_image_and_thumbnails_do_not_starve_each_other() -> None:
    """Eight clients ask for thumbnails without pause, and one for an image whose steps take 400 times as long."""
    thumbnails = [Request((64, 64), 20) for _ in range(3000)]
    costs = replace(SCENES_AVX2, uniform=((128, 0.06), (8192, 2.28), (131_072, 24.0)))
    step, alone = costs.seconds((65_536, 65_536)), costs.seconds((64, 64))
    large = Request((65_536, 65_536), 4)
    simulate([*thumbnails[:8], large, *thumbnails[8:]], costs, choose, concurrency=9, most_tokens=1 << 20)
    # Fair: a ninth of the time, so nine times as long as by itself, or less as thumbnails share steps.
    assert large.latency <= 9 * large.alone(costs)
    slowest = max(request.latency for request in thumbnails)
    assert slowest <= 2 * step + PATIENCE * 9 * 20 * alone
    typical = percentile(sorted(request.latency for request in thumbnails), 90)
    assert typical < step  # most of them do not notice it


def test_images_of_one_step_do_not_starve_a_large_one() -> None:
    """Each of them leaves before it is served again, and the next one joins: at no less than all have been served."""
    small = [Request((64, 64), 1) for _ in range(16_000)]
    costs = replace(SCENES_AVX2, uniform=((128, 0.06), (8192, 2.28), (131_072, 6.0)))
    large = Request((65_536, 65_536), 20)
    simulate([*small[:4], large, *small[4:]], costs, choose, concurrency=5, most_tokens=1 << 20)
    assert large.latency <= 5 * large.alone(costs)
    assert large.ended < small[-1].ended
