"""What PixArt's denoiser reads in addition to latents: the text, made once a prompt, and the modulation, once a step.

Shapes: B images, N image tokens, M text tokens, T tokens of a mixed batch, D width, d channels of a head, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import InputError
from ...nn.backends.absorbed import AbsorbedText, absorb, can_absorb
from ...nn.backends.onednn import linear
from ...nn.tokens import Layout, indices


class ProjectedText(NamedTuple):
    """The text as it enters the blocks, each of which makes its own keys and values by calling ``attn2`` as a module.

    So it is where gradients flow, in a graph of the whole model, and where someone watches ``attn2``.
    """

    text: Tensor | None  # [B, M, D]; None: the image tokens attend to themselves
    bias: Tensor | None  # [B, 1, M], added to the scores; -inf discards

    def attend(self, attn2: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        batched = x if x.ndim == 3 else x[None]
        attended: Tensor = attn2(batched, self.text, self.bias)
        return torch.add(x, attended.view_as(x), out=out)

    def select(self, rows: slice | Tensor | list[int]) -> ProjectedText:
        return ProjectedText(*(None if x is None else x[rows] for x in self))

    def padded(self, length: int) -> ProjectedText:
        """The same with discarded tokens up to a length."""
        assert self.text is not None
        more = length - self.text.shape[1]
        bias = self.text.new_zeros(len(self.text), 1, self.text.shape[1]) if self.bias is None else self.bias
        return ProjectedText(F.pad(self.text, (0, 0, 0, more)), F.pad(bias, (0, more), value=-torch.inf))


class TextKeys(NamedTuple):
    """A layer's keys and values of the text, padded to one length."""

    key: Tensor  # [B, heads, M, d]
    value: Tensor  # [B, heads, M, d]
    bias: Tensor | None  # [B, 1, 1, M]

    def attend(self, attn2: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        batched = x if x.ndim == 3 else x[None]
        attended: Tensor = attn2.attend(linear(attn2.to_q, batched), self.key, self.value, self.bias)
        return torch.add(x, attended.view_as(x), out=out)

    def select(self, rows: slice | Tensor | list[int]) -> TextKeys:
        return TextKeys(self.key[rows], self.value[rows], None if self.bias is None else self.bias[rows])

    def separate(self, lengths: Sequence[int]) -> list[ProjectedText | TextKeys | AbsorbedText]:
        """Each image's, cut to its length."""
        rows = [self.select(slice(i, i + 1)) for i in range(len(self.key))]
        return [
            TextKeys(row.key[:, :, :m], row.value[:, :, :m], None if row.bias is None else row.bias[..., :m])
            for row, m in zip(rows, lengths, strict=True)
        ]

    def in_one_row(self, own: Tensor) -> TextKeys:
        """The texts one after the other, for the tokens of a mixed batch.

        Args:
            own: a bias [1, 1, T, B * M] with which each token sees the text of its image.
        """
        key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (self.key, self.value))  # [1, heads, B * M, d]
        return TextKeys(key, value, own)

    def padded(self, length: int) -> TextKeys:
        """The same with discarded tokens up to a length."""
        more = length - self.key.shape[2]
        bias = self.key.new_zeros(len(self.key), 1, 1, self.key.shape[2]) if self.bias is None else self.bias
        key, value = (F.pad(x, (0, 0, 0, more)) for x in (self.key, self.value))
        return TextKeys(key, value, F.pad(bias, (0, more), value=-torch.inf).to(key.dtype))


#: The text in one layer, of a batch or of each image by itself.
LayerText: TypeAlias = ProjectedText | TextKeys | list[ProjectedText | TextKeys | AbsorbedText]


def attend_text(attn2: Any, x: Tensor, text: LayerText, layout: Layout | None = None) -> Tensor:
    """x [B, N, D], or [T, D] with a layout, plus its cross-attention to the text.

    Without gradients, x itself is changed if each image has its own text.
    """
    if attn2 is None:
        return x
    if not isinstance(text, list):
        return text.attend(attn2, x)
    rows = x if layout is None else layout.split(x)  # B of [N, D]
    if torch.is_grad_enabled():
        changed = [one.attend(attn2, row) for one, row in zip(text, rows, strict=True)]
        return torch.stack(changed) if layout is None else torch.cat(changed)
    for one, row in zip(text, rows, strict=True):
        one.attend(attn2, row, out=row)
    return x


def encode_layer(attn2: Any, rows: Sequence[Tensor], biases: Sequence[Tensor | None], separate: bool) -> LayerText:
    """The text of B images in a layer.

    Args:
        rows: the projected text of each, [M, D].
        biases: of each, [M].
        separate: each image's by itself, and absorbed if that is less work; otherwise padded to one length.
    """
    if separate:
        pairs = zip(rows, biases, strict=True)
        return [
            absorb(attn2, text, bias) if can_absorb(attn2, len(text)) else _keys_of(attn2, text, bias)
            for text, bias in pairs
        ]
    keys_values = attn2.keys_values(torch.cat([*rows])[None])  # two of [1, heads, sum of M, d]
    lengths = [len(row) for row in rows]
    # pad_sequence takes [M, heads, d] each
    key, value = (pad(x[0].transpose(0, 1).split(lengths)).transpose(1, 2) for x in keys_values)
    bias = bias_of(lengths, biases, key)
    return TextKeys(key, value, None if bias is None else bias[:, None])


def _keys_of(attn2: Any, text: Tensor, bias: Tensor | None) -> TextKeys:
    key, value = attn2.keys_values(text[None])
    return TextKeys(key, value, None if bias is None else bias[None, None, None])


def pad(rows: Sequence[Tensor]) -> Tensor:
    """B of [M, ...] -> [B, longest M but at least 1, ...]; what is not there is 0."""
    padded = pad_sequence([*rows], batch_first=True)
    return padded if padded.shape[1] else padded.new_zeros(len(rows), 1, *padded.shape[2:])


def bias_of(lengths: Sequence[int], biases: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """The bias [B, 1, M] of rows [M] padded to the longest; None if it adds nothing."""
    longest = max(1, *lengths)
    if min(lengths) == longest and all(bias is None for bias in biases):
        return None
    bias = torch.full((len(lengths), 1, longest), -torch.inf, dtype=torch.float32, device=like.device)
    for i, (length, row) in enumerate(zip(lengths, biases, strict=True)):
        bias[i, 0, :length] = 0.0 if row is None else row
    return bias


def kept_rows(text: Tensor, bias: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
    """The tokens of text [B, M, C] that a bias [B, 1, M] keeps, B of [M, C], and their biases; None if all are 0."""
    if bias is None:
        return [*text], [None] * len(text)
    keep = bias[:, 0] > -torch.inf  # [B, M]
    soft = (bias[:, 0].masked_fill(~keep, 0.0) != 0.0).any(dim=1)  # [B]
    lengths, soft_ones = torch.stack([keep.sum(dim=1), soft.long()]).tolist()
    kept = bias[:, 0][keep].split(lengths)
    return [*text[keep].split(lengths)], [row if is_soft else None for row, is_soft in zip(kept, soft_ones)]


class PixArtContext(NamedTuple):
    """What the denoiser needs of the text, made once a prompt.

    In inference it also holds what every layer makes of it: on the CPU of each image by itself, short texts absorbed;
    on accelerators, which want one shape, padded.
    """

    projected: ProjectedText
    layers: tuple[LayerText, ...] | None = None  # L
    projects: bool = False  # the text is projected by ``denoise``, since someone watches the projection

    def made(self, projection: Any) -> PixArtContext:
        """The same with its text projected."""
        return PixArtContext(self.projected._replace(text=projection(self.projected.text))) if self.projects else self

    @property
    def rows(self) -> int | None:
        """How many texts there are, B; None without text."""
        return None if self.projected.text is None else self.projected.text.shape[0]

    def of_layers(self, count: int, layout: Layout | None, dynamic: bool) -> Sequence[LayerText]:
        """The text in each of ``count`` layers.

        Args:
            layout: of a mixed batch.
            dynamic: the blocks are compiled, so that tensors say which text an image token sees, and not numbers.
        """
        if layout is None:
            return self.layers or [self.projected] * count
        keys = [layer for layer in self.layers or () if isinstance(layer, TextKeys)]
        if keys and not dynamic:
            own = self._own_bias(layout, keys[0].key.shape[2], keys[0].bias, keys[0].key.dtype)[None]
            return [layer.in_one_row(own) for layer in keys]
        if dynamic or (self.layers is None and layout.rows.device.type != "cpu"):
            return self._in_one_row(count, layout)
        if self.layers is not None:
            return self.layers
        batch = len(layout.lengths)
        if self.projected.text is None:
            return [[ProjectedText(None, None)] * batch] * count
        return [[self.projected.select(slice(i, i + 1)) for i in range(batch)]] * count

    def _in_one_row(self, count: int, layout: Layout) -> Sequence[LayerText]:
        text, bias = self.projected
        if text is None:
            return [ProjectedText(None, layout.bias(layout.rows, torch.float32)[:, 0])] * count
        own = self._own_bias(layout, text.shape[1], bias, torch.float32)
        return [ProjectedText(text.flatten(0, 1)[None], own)] * count

    def _own_bias(self, layout: Layout, length: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias [1, T, B * M] with which each image token sees the text of its image, of ``length`` tokens."""
        count = (self.rows or 0) * length
        owners = torch.arange(self.rows or 0, device=layout.rows.device).repeat_interleave(length)  # [B * M]
        own = layout.bias(owners, dtype)[:, 0]
        own = own if bias is None else own + bias.to(dtype).reshape(1, 1, -1)
        return F.pad(own, (0, -count % 8))[..., :count]  # rows that start where GPU kernels can read them

    def separate(self) -> PixArtContext:
        """The same with the text of each image by itself in every layer."""
        text, bias = self.projected
        if self.layers is None or text is None or not any(isinstance(layer, TextKeys) for layer in self.layers):
            return self
        lengths = [text.shape[1]] * len(text) if bias is None else (bias[:, 0] > -torch.inf).sum(dim=1).tolist()
        each = (layer.separate(lengths) if isinstance(layer, TextKeys) else layer for layer in self.layers)
        return PixArtContext(self.projected, tuple(each))

    def select(self, rows: slice | Tensor | list[int]) -> PixArtContext:
        """The contexts of some images of the batch."""
        if self.layers is None:
            return PixArtContext(self.projected.select(rows), projects=self.projects)
        chosen = indices(rows, self.rows or 0)
        return PixArtContext(
            self.projected.select(rows),
            tuple([text[i] for i in chosen] if isinstance(text, list) else text.select(rows) for text in self.layers),
        )

    @staticmethod
    def concat(contexts: Sequence[PixArtContext]) -> PixArtContext:
        """One batch of several; shorter texts are padded with discarded tokens where they are not kept separately."""
        kinds = {context._kind for context in contexts}
        if kinds == {"inference", "training"} and not torch.is_grad_enabled():  # someone has begun to watch ``attn2``
            contexts = [PixArtContext(context.projected) for context in contexts]
        elif len(kinds) > 1:
            raise InputError("contexts of inference and of training, or with and without text, cannot be joined")
        projected = _joined([context.projected for context in contexts])
        if contexts[0].projects:
            return PixArtContext(projected, projects=True)
        if any(isinstance(text, list) for context in contexts for text in context.layers or ()):
            contexts = [context.separate() for context in contexts]
        layers = [context.layers for context in contexts if context.layers is not None]
        return PixArtContext(projected, tuple(map(_join_layer, zip(*layers, strict=True))) if layers else None)

    def padded(self, multiple: int) -> PixArtContext:
        """The keys and values padded to a multiple of tokens, always with a bias, which discards the padding.

        So texts of many lengths are contexts of one shape. Other contexts stay as they are.
        """
        if self.layers is None or not all(isinstance(text, TextKeys) for text in self.layers):
            return self
        keys = [text for text in self.layers if isinstance(text, TextKeys)]
        length = -(-keys[0].key.shape[2] // multiple) * multiple
        return PixArtContext(self.projected.padded(length), tuple(text.padded(length) for text in keys))

    @property
    def _kind(self) -> str:
        if self.layers is not None:
            return "inference"
        if self.projects:
            return "projected later"
        return "no text" if self.projected.text is None else "training"


def _joined(parts: Sequence[ProjectedText]) -> ProjectedText:
    biases = [part.bias for part in parts if part.bias is not None]
    texts = [part.text for part in parts if part.text is not None]
    if not texts:
        if biases and len(biases) < len(parts):
            raise InputError("contexts without text can only be joined if all of them have a mask, or none")
        return ProjectedText(None, torch.cat(biases) if biases else None)
    longest = max(text.shape[1] for text in texts)
    if biases or len({text.shape[1] for text in texts}) > 1:
        padded = [part.padded(longest) for part in parts]
        texts = [part.text for part in padded if part.text is not None]
        biases = [part.bias for part in padded if part.bias is not None]
    return ProjectedText(torch.cat(texts), torch.cat(biases) if biases else None)


def _join_layer(texts: Sequence[LayerText]) -> LayerText:
    if isinstance(texts[0], list):
        return [one for text in texts if isinstance(text, list) for one in text]
    keys = [text for text in texts if isinstance(text, TextKeys)]
    lengths = {text.key.shape[2] for text in keys}
    if len(lengths) > 1 or any(text.bias is not None for text in keys):
        keys = [text.padded(max(lengths)) for text in keys]
    biases = [text.bias for text in keys if text.bias is not None]
    key, value = torch.cat([text.key for text in keys]), torch.cat([text.value for text in keys])
    return TextKeys(key, value, torch.cat(biases) if biases else None)


class Modulation(NamedTuple):
    """What the denoiser needs of the timestep (and of the micro-conditions): adaLN-single of PixArt-α, 2.3."""

    shared: Tensor  # [B, 6, D]: shift, scale, gate of attention; shift, scale, gate of the feed-forward
    timestep: Tensor  # [B, 1, D]: for the last layer
    conditions: Mapping[str, Tensor] | None = None  # of one that ``denoise`` makes; the others are then timesteps [B]

    @staticmethod
    def later(timestep: Tensor, conditions: Mapping[str, Tensor | None]) -> Modulation:
        """One that ``denoise`` makes, since someone watches what makes it."""
        rows = len(timestep)
        given = {name: x.expand(rows, -1) if len(x) == 1 else x for name, x in conditions.items() if x is not None}
        return Modulation(timestep, timestep, given)

    def made(self, embed: Any) -> Modulation:
        """The same, made. A hook may have returned a plain tuple of the first two."""
        return self if self.conditions is None else Modulation(*embed(self.timestep, self.conditions))

    def select(self, rows: slice | Tensor | list[int]) -> Modulation:
        """The modulation of some rows: of one step, where it was made for all of them."""
        conditions = None if self.conditions is None else {name: x[rows] for name, x in self.conditions.items()}
        return Modulation(self.shared[rows], self.timestep[rows], conditions)

    @staticmethod
    def concat(modulations: Sequence[Modulation]) -> Modulation:
        """One batch of several."""
        given = [m.conditions for m in modulations if m.conditions is not None]
        if given and len(given) < len(modulations):
            raise InputError("modulations from before and after a hook on what makes them cannot be joined")
        conditions = {name: torch.cat([one[name] for one in given]) for name in given[0]} if given else None
        return Modulation(
            torch.cat([m.shared for m in modulations]), torch.cat([m.timestep for m in modulations]), conditions
        )


def image_bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias [B, 1, N] of self-attention of x [B, N, D]. A row that discards every token keeps them all."""
    if mask is None:
        return None
    if mask.shape != x.shape[:2] and mask.shape != (x.shape[0], 1, x.shape[1]):
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}; it masks image tokens: expected {list(x.shape[:2])} "
            f"(1 keeps) or {[x.shape[0], 1, x.shape[1]]} (a bias)"
        )
    if mask.ndim == 2:
        return ((~mask.bool()).to(x.dtype) * -10_000.0)[:, None]
    return mask.to(x.dtype)
