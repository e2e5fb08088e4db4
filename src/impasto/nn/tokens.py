"""Tokens of images of several sizes in one sequence, and masks of text tokens.

A batch of images of one size is a tensor [B, N, D]. A mixed batch is a sequence [T, D]: the images' tokens, one image
after the other, with a ``Layout``. Linear layers work on all of its tokens at once; modulation and attention work on
views of it, one for each run of neighbouring images with as many tokens. Inside a compiled graph, which is to serve
every layout, they use the layout's tensors instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: In a sequence of so few tokens, those of all images may be compared.
_FEW_TOKENS = 128


class Layout(NamedTuple):
    """Where the images of a mixed batch lie in its sequence of T tokens."""

    lengths: tuple[int, ...]  # tokens of each image, B numbers; not read inside a compiled graph
    longest: int
    rows: Tensor  # [T], the image of each token, 0 to B - 1
    offsets: Tensor  # [B + 1] in int32, where each image begins, and T

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Layout:
        return _layout(tuple(lengths), device) if is_tracing() else _kept_layout(tuple(lengths), device)

    def as_tensors(self) -> Layout:
        """The same without the numbers, each of which a compiled graph would be specialized for."""
        return self._replace(lengths=())

    @property
    def compares(self) -> bool:
        """Whether attention uses a bias of all tokens: in compiled blocks, and on a GPU for few of them."""
        few = self.rows.device.type != "cpu" and self.rows.shape[0] <= _FEW_TOKENS
        return not self.lengths or torch.compiler.is_compiling() or few

    @property
    def copies(self) -> bool:
        """Whether a modulation is copied for each token: in compiled blocks, and where that costs less than calls."""
        return self.compares or self.rows.device.type != "cpu"

    def grouped(self, x: Tensor) -> list[Tensor]:
        """A view [b, N, ...] of the tokens of each run of b neighbouring images with N tokens each.

        Args:
            x: [T, ...].
        """
        runs = _runs(self.lengths)
        parts = x.split([count * length for count, length in runs])
        return [part.view(count, length, *part.shape[1:]) for part, (count, length) in zip(parts, runs, strict=True)]

    def of_groups(self, x: Tensor) -> Sequence[Tensor]:
        """The images of each of these runs: [B, ...], or [1, ...] for all of them -> [b, ...] or [1, ...] each."""
        runs = _runs(self.lengths)
        parts: tuple[Tensor, ...] = x.split([count for count, _ in runs]) if x.shape[0] > 1 else (x,) * len(runs)
        return parts

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """A view of each image's tokens."""
        parts: tuple[Tensor, ...] = x.split(self.lengths)
        return parts

    def own_bias(self, dtype: torch.dtype) -> Tensor:
        """The bias [1, 1, T, T] with which each token sees those of its own image."""
        if not self.lengths or is_tracing():
            return self.bias(self.rows, dtype)
        return _kept_bias(self.lengths, self.rows.device, dtype)

    def bias(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias [1, 1, T, S] with which each token sees the keys of its own image.

        Args:
            keys: [S], the image of each key.
        """
        own = self.rows[:, None] == keys  # [T, S]
        return torch.zeros(own.shape, dtype=dtype, device=own.device).masked_fill(~own, -torch.inf)[None, None]


def _layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    rows = torch.cat([torch.full((length,), i, device="cpu") for i, length in enumerate(lengths)])
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return Layout(lengths, max(lengths), rows.to(device), ends.to(device))


@lru_cache(maxsize=64)
def _runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of neighbouring images with as many tokens: how many images, and the tokens of each."""
    return tuple((len([*images]), length) for length, images in groupby(lengths))


# The same layout comes at every step and in every layer: its tensors are made once, and also serve training.


@lru_cache(maxsize=64)
def _kept_layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    with torch.inference_mode(False):
        return _layout(lengths, device)


@lru_cache(maxsize=64)
def _kept_bias(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    layout = _kept_layout(lengths, device)
    with torch.inference_mode(False):
        return layout.bias(layout.rows, dtype)


def addcmul_by_image(layout: Layout, *factors: Tensor) -> Tensor:
    """a + b · c, where some of the three are of the tokens, [T, D], and the others of the images, [B or 1, 1, D].

    Returns:
        [T, D]
    """
    if layout.copies:  # compiled, it becomes one kernel, in which nothing is copied
        rows = layout.rows
        own = [x if x.ndim == 2 else x[0] if x.shape[0] == 1 else x[:, 0].index_select(0, rows) for x in factors]
        return torch.addcmul(*own)
    groups = [*zip(*(layout.grouped(x) if x.ndim == 2 else layout.of_groups(x) for x in factors), strict=True)]
    if torch.is_grad_enabled():
        return torch.cat([torch.addcmul(*group).flatten(0, 1) for group in groups])
    like = next(x for x in factors if x.ndim == 2)
    out = torch.empty_like(like, dtype=reduce(torch.promote_types, (x.dtype for x in factors)))
    for group, place in zip(groups, layout.grouped(out), strict=True):
        torch.addcmul(*group, out=place)
    return out


def indices(rows: slice | Tensor | list[int], count: int) -> list[int]:
    """The numbers of the chosen ones of ``count`` rows."""
    if isinstance(rows, slice):
        return [*range(count)][rows]
    if not isinstance(rows, Tensor):
        return [range(count)[row] for row in rows]
    chosen: list[int] = torch.arange(count)[rows.cpu()].tolist()
    return chosen


def is_tracing() -> bool:
    """Whether shapes may not depend on values: in what is compiled, exported, traced or transformed, as by ``vmap``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:  # tensors without values
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# --- masks ---

#: A bias at or below this discards a key; the documented value is -10000, which bfloat16 rounds to -9984.
DISCARD = -9000.0


def text_bias(mask: Tensor) -> Tensor:
    """A text mask in either format, [B, M] or [B, 1, M] -> a bias [B, 1, 1, M] in which -inf discards."""
    if mask.ndim == 2:
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_fill(~mask.bool(), -torch.inf)[:, None, None]
    bias = mask.float()
    return bias.masked_fill(bias <= DISCARD, -torch.inf)[:, None]
