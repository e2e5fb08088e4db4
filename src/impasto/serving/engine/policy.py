"""Which images take the next step together: pure functions of what is known of them.

Time is shared fairly, as between processes on one core: each image has been served for some seconds, and the one that
has been served least leads the next step. Others of its group join it while that pays and nobody waits for too long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

#: Separate steps must cost at least this much more than a joint one, relative to it.
GAIN = 0.01
#: With n images a step may take so many times n times as long as that of any image in it by itself.
PATIENCE = 2.0
#: How often others may be begun before the one that has waited longest.
OVERTAKEN = 32

#: Seconds of a forward pass over images of so many tokens each.
Cost = Callable[[Sequence[int]], float]


@dataclass
class Candidate:
    """An image that has steps left.

    Attributes:
        group: images of one group may share a forward pass: the same model and adapters.
        tokens: of each image of its next forward pass: two if it is guided.
        served: seconds that it has been served for, from the level at which it joined.
    """

    id: str
    group: Hashable
    tokens: tuple[int, ...]
    served: float = 0.0
    shares: bool = True  # whether it may share a forward pass


def choose(
    candidates: Sequence[Candidate], cost: Cost, most_tokens: int, group: Hashable = None, switching: float = 0.0
) -> list[Candidate]:
    """The images that take the next step, the one that leads it first.

    Args:
        cost: measured seconds of a forward pass.
        most_tokens: of a forward pass that is shared.
        group: the one that is in force.
        switching: seconds that it takes to bring another one in force; it then stays for about ten times as long.
    """
    if not candidates:
        return []
    order = sorted(candidates, key=lambda each: each.served + (0.0 if each.group == group else 10 * switching))
    lead = order[0]
    others = [each for each in order[1:] if lead.shares and each.shares and each.group == lead.group]
    alike = [each for each in others if each.tokens == lead.tokens]
    steps = (_join(lead, some, cost, most_tokens, PATIENCE * len(candidates)) for some in (others, alike))
    return min(steps, key=lambda step: step[1])[0]  # a batch of one size may cost less than a packed one


def _join(
    lead: Candidate, others: Sequence[Candidate], cost: Cost, most_tokens: int, patience: float
) -> tuple[list[Candidate], float]:
    """The images that join a step while that pays, and its seconds per token.

    Args:
        patience: how many times as long as that of any image by itself the step may take.
    """
    chosen, tokens, total = [lead], list(lead.tokens), sum(lead.tokens)
    now = least = apart = cost(tokens)
    of_one = {lead.tokens: now}
    best, per_token = 1, now / total
    for other in others:
        if total + sum(other.tokens) > most_tokens:
            continue
        if other.tokens not in of_one:
            of_one[other.tokens] = cost(other.tokens)
        alone, joint = of_one[other.tokens], cost([*tokens, *other.tokens])
        if now + alone < joint or joint > patience * min(least, alone):
            continue
        chosen.append(other)
        tokens += other.tokens
        total += sum(other.tokens)
        now, least, apart = joint, min(least, alone), apart + alone
        if joint / total < per_token and apart >= (1 + GAIN) * joint:
            best, per_token = len(chosen), joint / total
    return chosen[:best], per_token


def charge(chosen: Sequence[Candidate], seconds: float) -> None:
    """Divide the seconds of a step among the images that took it, by their tokens."""
    total = sum(sum(each.tokens) for each in chosen)
    for each in chosen:
        each.served += seconds * sum(each.tokens) / total


def admit(needs: Sequence[int], overtaken: int, room: int) -> list[int]:
    """Which of the waiting images begin: in their order, as far as they fit.

    Smaller ones may pass one that does not fit, until it has been overtaken often enough; then the others wait for it.

    Args:
        needs: bytes of each, in the order of arrival.
        overtaken: how often the first one has been overtaken.
        room: bytes that are free.

    Returns:
        their indices.
    """
    begin = []
    for i, need in enumerate(needs):
        if need <= room:
            begin.append(i)
            room -= need
        elif overtaken + len(begin) >= OVERTAKEN:
            break
    return begin
