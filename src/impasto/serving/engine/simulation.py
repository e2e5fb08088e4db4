"""Policies on a simulated clock: what they would do with recorded costs of steps, without a model.

Other policies to compare with are here too: one image at a time, and batches of one size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from .costs import StepCosts
from .policy import Candidate, Cost, charge

Policy = Callable[[Sequence[Candidate], Cost, int, Hashable, float], list[Candidate]]

#: A guided step of the bundled model's first edition on one AVX2 core: about 26 ms, and 0.275 ms for each token of
#: either half, with attention.
SCENES_AVX2 = StepCosts(((128, 0.0612), (8192, 2.2788)), ((128, 0.0612), (8192, 2.2788)))


def first_in_first_out(
    candidates: Sequence[Candidate], cost: Cost, most_tokens: int, group: Hashable = None, switching: float = 0.0
) -> list[Candidate]:
    """One image at a time, in the order of arrival."""
    return [*candidates[:1]]


def same_size(
    candidates: Sequence[Candidate], cost: Cost, most_tokens: int, group: Hashable = None, switching: float = 0.0
) -> list[Candidate]:
    """The oldest image, and all others of its size: they share steps from any step on."""
    first = candidates[:1]
    chosen = [each for each in candidates for one in first if (each.tokens, each.group) == (one.tokens, one.group)]
    return chosen[: max(1, most_tokens // sum(chosen[0].tokens))] if chosen else []


@dataclass
class Request:
    """An image of a simulation.

    Attributes:
        arrives: seconds; in a closed loop, when a place is free.
        began, ended: what came of it.
    """

    tokens: tuple[int, ...]
    steps: int
    arrives: float = 0.0
    group: Hashable = None
    left: int = field(init=False)
    ended: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.left = self.steps

    @property
    def latency(self) -> float:
        return self.ended - self.arrives

    def alone(self, costs: StepCosts) -> float:
        """Seconds that it takes by itself."""
        return self.steps * costs.seconds(self.tokens)


def simulate(
    requests: Sequence[Request],
    costs: StepCosts,
    choose: Policy,
    *,
    concurrency: int | None = None,
    most_running: int = 64,
    most_tokens: int = 1 << 16,
    switching: float = 0.0,
) -> float:
    """Serve all requests.

    Args:
        concurrency: a closed loop: so many clients, each of which asks for the next image when it has one; None: images
            arrive when they say.

    Returns:
        seconds until the last one was done; the requests say when each was.
    """
    coming, running, now, level = deque(requests), dict[str, tuple[Candidate, Request]](), 0.0, 0.0
    waiting: deque[Request] = deque()
    group: Hashable = None
    number = 0
    while coming or waiting or running:
        while coming and (
            coming[0].arrives <= now if concurrency is None else len(running) + len(waiting) < concurrency
        ):
            request = coming.popleft()
            request.arrives = request.arrives if concurrency is None else now
            waiting.append(request)
        while waiting and len(running) < most_running:
            request = waiting.popleft()
            running[str(number)] = (Candidate(str(number), request.group, request.tokens, level), request)
            number += 1
        if not running:
            now = coming[0].arrives
            continue
        chosen = choose([each for each, _ in running.values()], costs.seconds, most_tokens, group, switching)
        level = max(level, chosen[0].served)
        now += switching if chosen[0].group != group else 0.0
        group = chosen[0].group
        spent = costs.seconds([tokens for each in chosen for tokens in each.tokens])
        now += spent
        charge(chosen, spent)
        level += spent / len(running)
        for each in chosen:
            _, request = running[each.id]
            request.left -= 1
            if request.left == 0:
                request.ended = now
                del running[each.id]
    return now


def slowdowns(requests: Sequence[Request], costs: StepCosts) -> list[float]:
    """The latency of each request, relative to the time it takes by itself, in ascending order."""
    return sorted(request.latency / request.alone(costs) for request in requests)


def percentile(values: Sequence[float], percent: float) -> float:
    """Of values in ascending order: the smallest that is no less than so many percent of them."""
    return values[min(len(values) - 1, int(len(values) * percent / 100))]
