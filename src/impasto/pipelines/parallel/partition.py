"""The tokens of a batch, divided among processes, and what these exchange.

Shapes: P processes, T tokens of the whole batch, t of this process, H heads, d channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class Group:
    """Some of the processes."""

    group: Any  # of torch.distributed
    rank: int  # of this process in it
    count: int  # P

    def gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors [size, ...] of all processes, in the order of their ranks."""
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        return [one[:size] for one, size in zip(found, sizes, strict=True)]

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows of x to each process, as many as ``sent`` says, and return the rows that come from each."""
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=self.group)
        return out


def check_lengths(lengths: Sequence[int], count: int) -> None:
    """Raise InputError for an image that has fewer tokens than there are processes."""
    if min(lengths) < count:
        raise InputError(f"an image of {min(lengths)} tokens cannot be divided among {count} processes")


class Partition:
    """The tokens of each image in P neighbouring pieces, one for each process.

    Attention needs all tokens of an image, but treats heads separately: before it, each process gives the heads of the
    others and gets all tokens of its own; after it, the reverse (DeepSpeed-Ulysses, 2309.14509).

    Args:
        lengths: tokens of each image.

    Raises:
        InputError: an image has fewer tokens than there are processes.
    """

    def __init__(self, lengths: Sequence[int], group: Group, device: torch.device):
        self.group, self.lengths = group, tuple(lengths)
        ranks, count = range(group.count), group.count
        check_lengths(self.lengths, count)
        starts = [0, *accumulate(self.lengths)]
        #: Which tokens of an image process r has: bounds[image][r] to bounds[image][r + 1].
        self.bounds = [[length * rank // count for rank in range(count + 1)] for length in self.lengths]
        pieces = [
            [torch.arange(start + bound[r], start + bound[r + 1]) for start, bound in zip(starts, self.bounds)]
            for r in ranks
        ]
        by_rank = [torch.cat(piece) for piece in pieces]
        self.counts = [len(each) for each in by_rank]
        self._by_rank = torch.cat(by_rank).to(device)  # [T], the tokens of one process after those of another
        self._in_order = self._by_rank.argsort()
        self.own = by_rank[group.rank].to(device)  # [t]

    @property
    def own_lengths(self) -> list[int]:
        """How many tokens of each image are this process's."""
        rank = self.group.rank
        return [bound[rank + 1] - bound[rank] for bound in self.bounds]

    def part(self, x: Tensor) -> Tensor:
        """This process's tokens: [T, D] -> [t, D]; or of images of one size, [B, N, D] -> [B, n, D]."""
        own = x.flatten(0, -2).index_select(0, self.own)
        return own if x.ndim == 2 else own.unflatten(0, (len(x), -1))

    def whole(self, x: Tensor) -> Tensor:
        """The inverse of ``part``."""
        gathered = torch.cat(self.group.gather(x.flatten(0, -2), self.counts))[self._in_order]
        return gathered if x.ndim == 2 else gathered.unflatten(0, (len(x), -1))

    def to_heads(self, x: Tensor) -> Tensor:
        """Tokens of this process with all heads, [t, k, H, d], -> all tokens with its heads, [T, k, H / P, d]."""
        count = self.group.count
        by_heads = x.unflatten(2, (count, -1)).movedim(2, 0)  # [P, t, k, H / P, d]
        received = self.group.exchange(by_heads.flatten(0, 1), [len(x)] * count, self.counts)
        ordered: Tensor = received.index_select(0, self._in_order)
        return ordered

    def to_tokens(self, x: Tensor) -> Tensor:
        """The reverse: [T, H / P, d] -> [t, H, d]."""
        count, own = self.group.count, len(self.own)
        received = self.group.exchange(x.index_select(0, self._by_rank), self.counts, [own] * count)
        by_rank: Tensor = received.unflatten(0, (count, own))  # [P, t, H / P, d]
        return by_rank.movedim(0, 1).flatten(1, 2)
