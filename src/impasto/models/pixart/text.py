"""What PixArt's denoiser reads beside latents: the text, made once a prompt, and the modulation, once a step.

Shapes: B pictures, N image tokens, M text tokens, C channels, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError


class AbsorbedText(NamedTuple):
    """One row's text of M tokens, absorbed into a layer's query and output projections.

    The scores x W_q kᵀ are x (W_q kᵀ), and p v W_o is p (v W_o): with fewer tokens than a head has channels, that
    is less to multiply. A single token has weight 1 in every head: its cross-attention is a constant.
    """

    scores: Tensor | None  # [D, M * heads], scaled; None for the constant
    offsets: Tensor | None  # [M * heads]: what the query's bias and the text's bias add to the scores
    values: Tensor  # [M * heads, D], the output's bias among them; [1, D] for the constant


class TextKeys(NamedTuple):
    """One row's text of M tokens as a layer's keys and values."""

    key: Tensor  # [heads, M, head_dim]
    value: Tensor  # [heads, M, head_dim]
    bias: Tensor | None  # [M], added to the scores


class PixArtContext(NamedTuple):
    """What the denoiser needs of the text, made once a prompt.

    Where gradients flow it holds the projected text, and each block makes its own keys and values, inside its
    forward. In inference it holds every layer's: padded to one length on accelerators, which want one shape, and row
    by row on the CPU, short ones absorbed. Without any text, blocks attend to their own image tokens.
    """

    text: Tensor | None  # [B, M, D]
    keys: tuple[Tensor, ...] | None  # L of [B, heads, M, head_dim]
    values: tuple[Tensor, ...] | None  # L of [B, heads, M, head_dim]
    bias: Tensor | None  # [B, 1, 1, M], added to the scores; -inf discards
    by_row: tuple[tuple[AbsorbedText | TextKeys, ...], ...] | None = None  # B of L

    def select(self, rows: slice | Tensor | list[int]) -> PixArtContext:
        """The contexts of some rows of the batch."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return PixArtContext(
            text=take(self.text),
            keys=None if self.keys is None else tuple(key[rows] for key in self.keys),
            values=None if self.values is None else tuple(value[rows] for value in self.values),
            bias=take(self.bias),
            by_row=None if self.by_row is None else _chosen(self.by_row, rows),
        )

    @staticmethod
    def concat(contexts: Sequence[PixArtContext]) -> PixArtContext:
        """One batch of several; shorter texts are padded with discarded tokens."""
        first = contexts[0]
        if len({context._kind for context in contexts}) > 1:
            raise InputError("contexts of inference and of training, or with and without text, cannot be joined")
        if any(context.by_row is not None for context in contexts):
            return PixArtContext(None, None, None, None, tuple(row for c in contexts for row in c._unpadded()))
        if first.some is None:
            return _concat_without_text(contexts)
        lengths = [context.length for context in contexts]
        longest = max(lengths)

        def padded(x: Tensor, dim: int) -> Tensor:
            return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, longest - x.shape[dim]))

        def layers(name: str) -> tuple[Tensor, ...] | None:
            columns = [getattr(context, name) for context in contexts]
            if columns[0] is None:
                return None
            return tuple(torch.cat([padded(x, 2) for x in layer]) for layer in zip(*columns, strict=True))

        text = None if first.text is None else torch.cat([padded(c.text, 1) for c in contexts if c.text is not None])
        bias: Tensor | None = None
        if any(c.bias is not None for c in contexts) or len(set(lengths)) > 1:
            bias = torch.cat([F.pad(c._bias_or_zeros(), (0, longest - c.length), value=-torch.inf) for c in contexts])
        return PixArtContext(text, layers("keys"), layers("values"), bias)

    def padded(self, multiple: int) -> PixArtContext:
        """The keys and values padded to a multiple of tokens, always with a bias, which discards the padding.

        So texts of many lengths are contexts of one shape. Elsewhere than in inference on accelerators, nothing
        changes.
        """
        if self.keys is None or self.values is None:
            return self
        more = -self.length % multiple
        return self._replace(
            keys=tuple(F.pad(key, (0, 0, 0, more)) for key in self.keys),
            values=tuple(F.pad(value, (0, 0, 0, more)) for value in self.values),
            bias=F.pad(self._bias_or_zeros(), (0, more), value=-torch.inf).to(self.keys[0].dtype),
        )

    @property
    def rows(self) -> int | None:
        """How many texts there are, B; None without text."""
        if self.by_row is not None:
            return len(self.by_row)
        return None if self.some is None else self.some.shape[0]

    @property
    def some(self) -> Tensor | None:
        """Any tensor of the text, [B, ..., M, channels]; None without text."""
        return self.text if self.keys is None else self.keys[0]

    @property
    def length(self) -> int:
        """Number of text tokens, M."""
        some = self.some
        assert some is not None
        return some.shape[-2]

    @property
    def _kind(self) -> str:
        if self.by_row is not None or self.keys is not None:
            return "inference"
        return "no text" if self.text is None else "training"

    def _unpadded(self) -> tuple[tuple[AbsorbedText | TextKeys, ...], ...]:
        if self.by_row is not None:
            return self.by_row
        assert self.keys is not None
        assert self.values is not None
        keep = self._bias_or_zeros()[:, 0, 0] > -torch.inf  # [B, M]
        return tuple(
            tuple(
                TextKeys(
                    key[row][:, kept], value[row][:, kept], None if self.bias is None else self.bias[row, 0, 0, kept]
                )
                for key, value in zip(self.keys, self.values, strict=True)
            )
            for row, kept in enumerate(keep)
        )

    def _bias_or_zeros(self) -> Tensor:
        some = self.some
        assert some is not None
        return some.new_zeros(some.shape[0], 1, 1, self.length) if self.bias is None else self.bias


def _chosen(
    by_row: tuple[tuple[AbsorbedText | TextKeys, ...], ...], rows: slice | Tensor | list[int]
) -> tuple[tuple[AbsorbedText | TextKeys, ...], ...]:
    chosen = torch.arange(len(by_row))[rows if isinstance(rows, slice) else torch.as_tensor(rows).cpu()]
    return tuple(by_row[i] for i in chosen.tolist())


def _concat_without_text(contexts: Sequence[PixArtContext]) -> PixArtContext:
    biases = [context.bias for context in contexts if context.bias is not None]
    if biases and len(biases) < len(contexts):
        raise InputError("contexts without text can only be joined if all of them have a mask, or none")
    return contexts[0]._replace(bias=torch.cat(biases) if biases else None)


class Modulation(NamedTuple):
    """What the denoiser needs of the timestep (and of the micro-conditions): adaLN-single of PixArt-α, 2.3."""

    shared: Tensor  # [B, 6, D]: shift, scale, gate of attention; shift, scale, gate of the feed-forward
    timestep: Tensor  # [B, 1, D]: for the last layer

    def select(self, rows: slice | Tensor | list[int]) -> Modulation:
        """The modulation of some rows: of one step, where it was made for all of them."""
        return Modulation(self.shared[rows], self.timestep[rows])

    @staticmethod
    def concat(modulations: Sequence[Modulation]) -> Modulation:
        """One batch of several."""
        return Modulation(torch.cat([m.shared for m in modulations]), torch.cat([m.timestep for m in modulations]))


class TextLayout(NamedTuple):
    """Where the kept text tokens of a batch lie: row by row in one packed sequence, or at the left of each row."""

    keep: Tensor  # [B, M], true for the tokens that count
    row: Tensor  # [T]
    column: Tensor  # [T], counted among the kept ones
    longest: int

    @classmethod
    def of(cls, bias: Tensor) -> TextLayout:
        """The layout of a bias [B, 1, 1, M]."""
        keep = bias[:, 0, 0] > -torch.inf  # [B, M]
        row = keep.nonzero()[:, 0]
        column = (keep.cumsum(dim=1) - 1)[keep]
        return cls(keep, row, column, max(1, int(keep.sum(dim=1).max())))

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row keeps."""
        counts: list[int] = self.keep.sum(dim=1).tolist()
        return counts

    def pack(self, text: Tensor) -> Tensor:
        """[B, M, C] -> [1, T, C]."""
        return text[self.keep][None]

    def pack_bias(self, bias: Tensor) -> Tensor | None:
        """[B, 1, 1, M] -> [B, 1, 1, longest]; None where nothing is left to add."""
        packed = bias.new_full((bias.shape[0], self.longest), -torch.inf)
        packed[self.row, self.column] = bias[:, 0, 0][self.keep]
        return packed[:, None, None] if bool((packed != 0).any()) else None

    def unpack(self, x: Tensor) -> Tensor:
        """[1, heads, T, C] -> [B, heads, longest, C]; what is not there is 0."""
        padded = x.new_zeros(self.keep.shape[0], self.longest, x.shape[1], x.shape[3])
        padded[self.row, self.column] = x[0].transpose(0, 1)
        return padded.transpose(1, 2)


def image_bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias [B, 1, 1, N] of self-attention of x [B, N, D]. A row that discards every token keeps them all."""
    if mask is None:
        return None
    if tuple(mask.shape) not in {(x.shape[0], x.shape[1]), (x.shape[0], 1, x.shape[1])}:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}; it masks image tokens: expected {list(x.shape[:2])} "
            f"(1 keeps) or {[x.shape[0], 1, x.shape[1]]} (a bias)"
        )
    if mask.ndim == 2:
        return ((~mask.bool()).to(x.dtype) * -10_000.0)[:, None, None]
    return mask.to(x.dtype)[:, None]
