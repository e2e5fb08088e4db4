"""Normal numbers that are drawn on a GPU, where those of the host would be waited for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64, of which 32 bits are used


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), elementwise: four words of 32
    random bits for each counter of four words.
    """
    a, b, c, d = counter
    for step in range(_ROUNDS):
        first, second = (k + step * weyl & _WORD for k, weyl in zip(key, _WEYL))
        # Products of 64 bits, whose sign bit counts as the others do.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> 32 & _WORD) ^ b ^ first, right & _WORD, (left >> 32 & _WORD) ^ d ^ second, left & _WORD
    return a, b, c, d


def normal_rows(seed: int, step: int, places: Tensor, draws: Tensor, length: int) -> Tensor:
    """Standard normal numbers [B, length], float32: row i is a function of seed, step, places[i] and draws[i].

    Args:
        places, draws: [B], int64, on the device that computes.
    """
    quarter = torch.arange(-(-length // 4), device=places.device)
    numbers, rows = torch.broadcast_tensors(quarter, places[:, None])
    counter = numbers, draws[:, None].expand_as(rows), rows, torch.full_like(rows, step)
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    uniform = [(word.float() + 0.5) * 2.0**-32 for word in words]
    # Box and Muller's transform of two pairs.
    parts = []
    for size, turn in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * size.log()).sqrt(), 2 * math.pi * turn
        parts += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(parts, -1).flatten(1)[:, :length]
