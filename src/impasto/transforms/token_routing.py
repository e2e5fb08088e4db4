"""Token routing in training (TREAD, Krause et al. 2025, 2501.04765): random tokens skip a range of blocks.

Before the first block of the route a random subset of the image tokens is set aside, and after the last block it is put
back in its places. The blocks in between cost less, and every token keeps its loss. In evaluation nothing is set aside.

Shapes: B images, N image tokens, K tokens kept, T tokens of a mixed batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..checks import finite, shown, whole_number
from ..errors import ConfigurationError, InputError
from ..nn.changes import Change, Handle, refuse_conflicts
from ..nn.tokens import Layout


def route_tokens(transformer: nn.Module, start: int, end: int, rate: float) -> TokenRouting:
    """Let a share of the image tokens skip the blocks ``start`` to ``end - 1`` of a PixArt transformer in training.

    Call ``choose`` on the handle before each forward pass; a pass in evaluation mode, or without a choice, is plain.

    Args:
        start, end: blocks, 0 <= start < end <= their number. The paper routes from the third block to the fourth from
            the end.
        rate: the share of tokens that skip, in [0, 1). The paper uses 0.5.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: a value out of range, or a model without transformer blocks.
        ConfigurationError: tokens are routed already, or the blocks compress keys and values on the token grid.
    """
    blocks = getattr(transformer, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(blocks[0], "scale_shift_table"):
        raise InputError(f"route_tokens takes a PixArt transformer, not {type(transformer).__name__}")
    start = whole_number("start", start, least=0, most=len(blocks) - 1)
    end = whole_number("end", end, least=start + 1, most=len(blocks))
    rate = finite("rate", rate, least=0.0)
    if rate >= 1.0:
        raise InputError(f"rate must be below 1, not {shown(rate)}: some tokens have to pass the blocks")
    refuse_conflicts(transformer, TokenRouting)
    return TokenRouting(transformer, [*blocks][start:end], rate)


class _Choice:
    """The tokens of one batch that pass the routed blocks."""

    def __init__(self, scores: Tensor | Sequence[Tensor], rate: float):
        rows = [*scores]
        counts = [len(row) for row in rows]
        kept = [max(1, round(count * (1 - rate))) for count in counts]
        # In ascending order, so that what is kept stays in the order of the image.
        self.each = [row.argsort()[:k].sort().values for row, k in zip(rows, kept, strict=True)]  # B of [K]
        self.kept, self.counts = kept, counts
        self.full: Tensor | None = None

    def pick(self, x: Tensor, layout: Layout | None) -> Tensor:
        """Tokens [B, N, ...] or [T, ...] -> the kept ones."""
        if layout is None:
            return x.gather(1, self._places(x))  # [B, K, D]
        return x.index_select(0, self.sequence(x.device))

    def put_back(self, x: Tensor, layout: Layout | None) -> Tensor:
        """The kept tokens, in the places of the tokens that the first routed block was given."""
        assert self.full is not None
        full = self.full.to(x.dtype)
        if layout is None:
            return full.scatter(1, self._places(x), x)
        return full.index_copy(0, self.sequence(x.device), x)

    def _places(self, x: Tensor) -> Tensor:
        return torch.stack(self.each).to(x.device)[..., None].expand(-1, -1, x.shape[-1])  # [B, K, D]

    def sequence(self, device: torch.device) -> Tensor:
        """The kept tokens' places in the sequence of a mixed batch."""
        starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        return torch.cat([first + row for first, row in zip(starts, self.each, strict=True)]).to(device)


class TokenRouting(Change, Handle):
    """The handle of ``route_tokens``."""

    change: ClassVar[str] = "routing tokens"
    undo: ClassVar[str] = "remove() its handle"
    conflicts: ClassVar[tuple[str, ...]] = ("routing tokens",)

    def __init__(self, transformer: nn.Module, blocks: Sequence[nn.Module], rate: float):
        for block in blocks:
            if getattr(getattr(block, "attn1", None), "kv_compression", None) is not None:
                raise ConfigurationError(
                    "a routed block compresses keys and values on the token grid, which a subset of tokens does not "
                    "have; route tokens past other blocks"
                )
        self.rate = rate
        self._transformer, self._choice = transformer, cast(_Choice | None, None)
        self._hooks = [block.register_forward_pre_hook(partial(self._enter, i == 0)) for i, block in enumerate(blocks)]
        self._hooks.append(blocks[-1].register_forward_hook(self._leave))
        self.put(transformer, "token_routing")

    def choose(self, scores: Tensor | Sequence[Tensor]) -> None:
        """Choose for the next forward passes in training mode: of each image the tokens with the lowest scores pass.

        Args:
            scores: random numbers [B, N], or B of [N] for images of several sizes.
        """
        # Kept until the next choice, since gradient checkpointing calls the blocks again in the backward pass.
        self._choice = _Choice(scores, self.rate) if self.rate > 0 else None

    def remove(self) -> None:
        """Undo it: all tokens pass all blocks."""
        for hook in self._hooks:
            hook.remove()
        self._choice = None
        self.take(self._transformer, "token_routing")

    def _enter(self, first: bool, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._choice is None or not block.training:
            return None
        missing: list[Any] = [None] * (5 - len(arguments))
        x, shared, text, bias, layout, *rest = [*arguments, *missing]
        choice = self._choice
        if first:
            self._check(x, layout)
            choice.full, x = x, choice.pick(x, layout)
        if layout is None:
            bias = bias if bias is None else choice.pick(bias.transpose(1, 2), None).transpose(1, 2)  # [B, 1, K]
        else:
            if not isinstance(text, list) and text.bias is not None:  # [1, T, B * M]: which token sees which text
                text = text._replace(bias=text.bias.index_select(1, choice.sequence(x.device)))
            kept = Layout.of(choice.kept, x.device)
            layout = kept if layout.lengths else kept.as_tensors()
        return x, shared, text, bias, layout, *rest

    def _leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._choice is None or not block.training:
            return None
        return self._choice.put_back(output, None if output.ndim == 3 else arguments[4])

    def _check(self, x: Tensor, layout: Layout | None) -> None:
        assert self._choice is not None
        counts = self._choice.counts
        fits = x.shape[:2] == (len(counts), counts[0]) if layout is None else x.shape[0] == sum(counts)
        if not fits:
            raise InputError(
                f"token routing has scores of {len(counts)} images with {counts[:4]} tokens, and the tokens have shape "
                f"{list(x.shape)}; call choose() with scores of this batch"
            )
