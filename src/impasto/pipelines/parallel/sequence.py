"""Sequence-parallel: between the first and the last block each process has some tokens of every image.

What a block does to single tokens needs no change. Self-attention exchanges tokens for heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...models.glm_image.places import Places
from ...models.pixart.text import LayerText, ProjectedText, TextKeys
from ...nn.changes import CALL, Change
from ...nn.tokens import Layout
from .partition import Group, Partition

CHANGE = "parallel"
UNDO = "remove() the handle of parallelize()"


class Pass(NamedTuple):
    """What is the same for all blocks of one call of the model."""

    partition: Partition
    where: Any  # which tokens see each other, of the whole batch: a layout, a bias, places, or None


class SequenceParallel:
    """The change of a model's blocks, and the call in progress."""

    def __init__(self, blocks: Sequence[nn.Module], group: Group):
        self.group = group
        self.current: Pass | None = None
        #: Of the last attention: keys and values [B, H / P, S, d] of all tokens, for those that refer to them.
        self.keys_values: tuple[Tensor, ...] = ()
        self._partition: Partition | None = None
        self._own_biases: dict[int, tuple[Tensor, Tensor]] = {}
        self._own_places: tuple[Places, Places] | None = None
        last = len(blocks) - 1
        self._blocks = [PartOfTokens(self, block, i == 0, i == last) for i, block in enumerate(blocks)]
        self._attentions = [AmongAllTokens(self, block.attn1) for block in blocks]
        for call in self._blocks:
            call.put(call.block, CALL)
        for change in self._attentions:
            change.put(change.attention, "among")

    def remove(self) -> None:
        for call in self._blocks:
            call.take(call.block, CALL)
        for change in self._attentions:
            change.take(change.attention, "among")

    def begin(self, x: Tensor, lengths: Sequence[int], where: Any) -> Tensor:
        """Begin a call with tokens x of the whole batch, and return those of this process."""
        last = self._partition
        if last is None or last.lengths != tuple(lengths) or last.own.device != x.device:
            self._partition = last = Partition(lengths, self.group, x.device)
        self._own_biases, self._own_places = {}, None
        self.current = Pass(last, where)
        return last.part(x)

    def own(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block's arguments after x, for the tokens of this process."""
        assert self.current is not None
        if isinstance(args[1], Places):
            embedded, places, *past = args
            return (embedded, self._places(places), *past)
        shared, text, bias, layout, *more = args
        if layout is None:
            return (shared, text, bias, layout, *more)
        own = Layout.of(self.current.partition.own_lengths, layout.rows.device)
        return (shared, self._text(text), bias, own, *more)

    def _text(self, text: LayerText) -> LayerText:
        """The text of a mixed batch; where all texts are in one row, a bias says which tokens see which."""
        if not isinstance(text, TextKeys | ProjectedText) or text.bias is None:
            return text
        assert self.current is not None
        if id(text.bias) not in self._own_biases:
            own = text.bias.index_select(-2, self.current.partition.own)
            self._own_biases[id(text.bias)] = (text.bias, own)  # which is kept, so that its id stays its own
        return text._replace(bias=self._own_biases[id(text.bias)][1])

    def _places(self, places: Places) -> Places:
        assert self.current is not None
        if self._own_places is None or self._own_places[0] is not places:
            self._own_places = (places, _part_of(places, self.current.partition))
        return self._own_places[1]


def lengths_of(x: Tensor, args: tuple[Any, ...]) -> tuple[Sequence[int], Any]:
    """How many tokens each image of a block's arguments has, and which tokens see each other."""
    if isinstance(args[1], Places):
        places = args[1]
        return ([x.shape[1]] * len(x) if places.images is None else places.images.lengths), places
    text, bias, layout = args[1:4]
    if isinstance(text, ProjectedText) and text.text is None:
        raise ConfigurationError("a model without text, whose cross-attention reads image tokens, cannot be parallel")
    return ([x.shape[1]] * len(x) if layout is None else layout.lengths), bias if layout is None else layout


def _part_of(places: Places, partition: Partition) -> Places:
    """The places of some tokens. Which tokens they see is left out: attention is among all of them."""
    rank = partition.group.rank
    if places.segments is None:
        first, last = partition.bounds[0][rank : rank + 2]
        text = min(max(places.text - first, 0), last - first)
        return Places(text, places.cos[:, first:last], places.sin[:, first:last], None)
    segments = []
    for bound, text in zip(partition.bounds, places.segments.lengths[::2], strict=True):
        first, last = bound[rank : rank + 2]
        own = min(max(text - first, 0), last - first)
        segments += [own, last - first - own]
    own_segments = Layout.of(segments, places.cos.device)
    cos, sin = (x.index_select(0, partition.own) for x in (places.cos, places.sin))
    return Places(0, cos, sin, None, own_segments)


class PartOfTokens(Change):
    """What is called in place of a block: the block, on the tokens of this process."""

    change = CHANGE
    undo = UNDO

    def __init__(self, sequence: SequenceParallel, block: nn.Module, first: bool, last: bool):
        self.sequence, self.block, self.first, self.last = sequence, block, first, last

    def __call__(self, x: Tensor, *args: Any) -> Any:
        sequence = self.sequence
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.block.parameters()):
            raise ConfigurationError(f"a parallel model only generates: call it under torch.no_grad(), or {UNDO}")
        if self.block.attn1.is_processed:  # type: ignore[union-attr]
            raise ConfigurationError(f"attention processors see all tokens of an image: {UNDO} before setting one")
        if self.first:
            lengths, where = lengths_of(x, args)
            x = sequence.begin(x, lengths, where)
        assert sequence.current is not None
        out = (self.before or self.block._call_impl)(x, *sequence.own(args))
        tokens = out if isinstance(out, Tensor) else out[0]
        if self.last:
            tokens = sequence.current.partition.whole(tokens)
            sequence.current = None
        return tokens if isinstance(out, Tensor) else (tokens, *sequence.keys_values)


class AmongAllTokens(Change):
    """Self-attention of this process's heads, among all tokens."""

    change = CHANGE
    undo = UNDO

    def __init__(self, sequence: SequenceParallel, attention: Any):
        self.sequence, self.attention = sequence, attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, where: Any, *past: Any) -> Tensor:
        among = type(self.attention).among
        if self.sequence.current is None:  # someone calls the attention by itself
            whole: Tensor = among(self.attention, query, key, value, where, *past)
            return whole
        partition, where = self.sequence.current
        shape = query.shape  # [B, n, H, d] or [t, H, d]
        joined = torch.stack([query, key, value], dim=-3).flatten(0, -4)  # [t, 3, H, d]
        parts = partition.to_heads(joined).unbind(1)  # [T, H / P, d] each
        if len(shape) == 4:
            parts = tuple(x.unflatten(0, (shape[0], -1)) for x in parts)
        if past:  # GLM-Image: other images may refer to this one
            self.sequence.keys_values = tuple(x.transpose(-3, -2) for x in parts[1:])
        out = among(self.attention, *parts, where, *(self._own_heads(each) for each in past))
        return partition.to_tokens(out.flatten(0, -3)).view(shape)

    def _own_heads(self, past: Any) -> Any:
        """This process's heads of keys and values [B, H, R, d]; those that parallel calls wrote are these already."""
        if past is None or isinstance(past, list):
            return past if past is None else [self._own_heads(each) for each in past]
        group, heads = self.sequence.group, self.attention.heads
        count = heads // group.count
        own = slice(group.rank * count, (group.rank + 1) * count)
        return tuple(x if x.shape[1] == count < heads else x[:, own] for x in past)
