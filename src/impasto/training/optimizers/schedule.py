"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["constant", "linear", "cosine", "trapezoid"]


def share(step: int, steps: int, kind: Kind, warmup: int, decay_share: float, floor: float) -> float:
    """The learning rate of a step, as a share of the highest, after a linear warm-up.

    Args:
        kind: ``constant``; ``linear``; ``cosine``, half a cosine; ``trapezoid``, a plateau and a linear decay over the
            last ``decay_share`` of the steps.
        warmup: steps.
        floor: the least share after the warm-up.
    """
    rise = (step + 1) / warmup if warmup else 1.0
    progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    fall = {
        "constant": 1.0,
        "linear": floor + (1 - floor) * (1 - progress),
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
        "trapezoid": max(floor, (steps - step) / (decay_share * steps)) if decay_share else 1.0,
    }[kind]
    return min(1.0, rise, fall)
