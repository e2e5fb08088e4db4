"""What GLM-Image's denoiser reads in addition to latents: text, prior and positions, made once; time and size, once a
step; and the keys and values of reference images.

Shapes: B images, N image tokens, M text tokens, R reference tokens, d channels of a head, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigurationError, InputError
from ...nn.embeddings import rotary_2d
from ...nn.tokens import indices
from ..inputs import check_batch

Mode = Literal["write", "read", "skip"]

#: A layer's keys and values [B, heads, R, d] of the references; of a mixed batch, those that each image sees.
Past: TypeAlias = tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor] | None] | None


#: One pair of cosines and sines [N, d] for all images, or a pair for each.
Rotary = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]


def rotary_tables(
    given: Rotary | None, grid: tuple[int, int], head_dim: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1 or B, 1, N, d]: those given, or of a grid's rows and columns.

    Raises:
        InputError: given ones of another shape.
    """
    if given is None:
        cos, sin = rotary_2d(*grid, head_dim, device)  # [N, d] each
        return cos[None, None], sin[None, None]
    shape = (grid[0] * grid[1], head_dim)
    pairs = cast(list[tuple[Tensor, Tensor]], [given] if isinstance(given[0], Tensor) else list(given))
    if len(pairs) not in (1, batch) or any(tuple(x.shape) != shape for pair in pairs for x in pair):
        found = [[list(x.shape) for x in pair] for pair in pairs]
        raise InputError(
            f"image_rotary_emb has shapes {found}; expected cosines and sines of {list(shape)}, as one pair, or "
            f"one for each of {batch} images"
        )
    cos, sin = (torch.stack(list(part))[:, None].to(device) for part in zip(*pairs, strict=True))
    return cos, sin


class GlmImageContext(NamedTuple):
    """The glyphs and the prior's tokens, projected, and where the image tokens lie."""

    text: Tensor  # [B, M, D]
    bias: Tensor | None  # [B, 1, 1, M], added to the scores of text; -inf discards
    prior: Tensor  # [B, N, D], added to the image tokens
    cos: Tensor  # [B or 1, 1, N, d]
    sin: Tensor  # [B or 1, 1, N, d]
    others: tuple[GlmImageContext, ...] = ()  # those of a mixed batch that follow, of images of other sizes
    projects: bool = False  # made by ``denoise``, since someone watches what makes it; then the prior is [B, N, 2]:
    # the numbers of its tokens, and whether they are dropped

    def made(self, project: Callable[[GlmImageContext], GlmImageContext]) -> GlmImageContext:
        """The same with text and prior projected."""
        if not self.projects:
            return self
        first, *others = (project(batch) for batch in self.batches)
        return first._replace(others=tuple(others), projects=False)

    @property
    def rows(self) -> int:
        """How many images it is of, B."""
        return sum(batch.text.shape[0] for batch in self.batches)

    @property
    def batches(self) -> tuple[GlmImageContext, ...]:
        """Those of images of one size."""
        return (self._replace(others=()), *self.others)

    def each(self, drops: bool = False) -> list[GlmImageContext]:
        """One for each image; ``drops``: without its discarded tokens."""
        rows = [batch.select(slice(i, i + 1)) for batch in self.batches for i in range(batch.text.shape[0])]
        return [row._without_discarded() for row in rows] if drops else rows

    def _without_discarded(self) -> GlmImageContext:
        if self.bias is None:
            return self
        keep = self.bias[0, 0, 0] > -torch.inf
        bias = self.bias[..., keep]
        return self._replace(text=self.text[:, keep], bias=bias if bool(bias.any()) else None)

    def select(self, rows: slice | Tensor | list[int]) -> GlmImageContext:
        """The contexts of some images of the batch."""
        if self.others:
            each = self.each()
            return self.concat([each[i] for i in indices(rows, len(each))])
        places = slice(None) if self.cos.shape[0] == 1 else rows
        return self._replace(
            text=self.text[rows],
            bias=None if self.bias is None else self.bias[rows],
            prior=self.prior[rows],
            cos=self.cos[places],
            sin=self.sin[places],
        )

    @staticmethod
    def concat(contexts: Sequence[GlmImageContext]) -> GlmImageContext:
        """One batch of several. In a batch of one size, shorter texts are padded with discarded tokens."""
        contexts = [batch for context in contexts for batch in context.batches]
        if len({context.projects for context in contexts}) > 1:
            raise InputError("contexts from before and after a hook on what makes them cannot be joined")
        if len({context.prior.shape[1] for context in contexts}) > 1:
            return contexts[0]._replace(others=tuple(contexts[1:]))
        lengths = [context.text.shape[1] for context in contexts]
        longest = max(lengths)
        bias: Tensor | None = None
        if len(set(lengths)) > 1 or any(context.bias is not None for context in contexts):
            bias = torch.cat(
                [F.pad(c.bias_or_zeros(), (0, longest - m), value=-torch.inf) for c, m in zip(contexts, lengths)]
            )
        first = contexts[0]
        cos, sin = first.cos, first.sin
        if any(c.cos.shape[0] > 1 or not torch.equal(c.cos, cos) or not torch.equal(c.sin, sin) for c in contexts):
            cos = torch.cat([c.cos.expand(c.rows, -1, -1, -1) for c in contexts])
            sin = torch.cat([c.sin.expand(c.rows, -1, -1, -1) for c in contexts])
        text = torch.cat([F.pad(c.text, (0, 0, 0, longest - m)) for c, m in zip(contexts, lengths)])
        prior = torch.cat([context.prior for context in contexts])
        return first._replace(text=text, bias=bias, prior=prior, cos=cos, sin=sin)

    def bias_or_zeros(self) -> Tensor:
        """[B, 1, 1, M]."""
        return self.text.new_zeros(*self.text.shape[:1], 1, 1, self.text.shape[1]) if self.bias is None else self.bias


class GlmImageModulation(NamedTuple):
    """The timestep and the image's size and crop, embedded: the input of every block's modulation."""

    embedded: Tensor  # [B, time_embed_dim]
    embeds: bool = False  # made by ``denoise``, since someone watches what makes it; then it is [B, 5]

    def made(self, embed: Callable[..., Tensor], dtype: torch.dtype) -> GlmImageModulation:
        """The same, made."""
        if not self.embeds:
            return self
        return GlmImageModulation(embed(self.embedded[:, 0], self.embedded[:, 1:3], self.embedded[:, 3:], dtype))

    def select(self, rows: slice | Tensor | list[int]) -> GlmImageModulation:
        """The modulation of some rows: of one step, where it was made for all of them."""
        return self._replace(embedded=self.embedded[rows])

    @staticmethod
    def concat(modulations: Sequence[GlmImageModulation]) -> GlmImageModulation:
        """One batch of several."""
        if len({modulation.embeds for modulation in modulations}) > 1:
            raise InputError("modulations from before and after a hook on what makes them cannot be joined")
        return modulations[0]._replace(embedded=torch.cat([modulation.embedded for modulation in modulations]))


class GlmImageReferences(NamedTuple):
    """Every layer's keys and values of the reference images, which an image attends to in addition to itself."""

    keys: tuple[Tensor, ...]  # L of [B, heads, R, d]
    values: tuple[Tensor, ...]  # L of [B, heads, R, d]
    bias: Tensor | None = None  # [B, 1, 1, R]; -inf discards

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """R."""
        return self.keys[0].shape[2]

    def for_batch(self, batch: int) -> GlmImageReferences:
        """As many rows as there are images: each row serves equally many images in a row.

        Raises:
            InputError: the rows do not divide the batch.
        """
        rows = self.rows
        if rows == batch:
            return self
        if rows == 0 or batch % rows:
            raise InputError(
                f"the cache holds the reference images of {rows} samples, which do not divide a batch of {batch}"
            )

        def repeat(x: Tensor) -> Tensor:
            return x.expand(batch, -1, -1, -1) if rows == 1 else x.repeat_interleave(batch // rows, dim=0)

        return self._each_layer([self], lambda x: repeat(*x), None if self.bias is None else repeat(self.bias))

    def of_layers(self, mixed: bool, dynamic: bool) -> list[Past]:
        """Each layer's keys and values: [B, heads, R, d]; of a mixed batch, those that each image sees.

        Args:
            dynamic: as one row of keys instead, of which a bias says who sees them.
        """
        layers = zip(self.keys, self.values, strict=True)
        if not mixed:
            return [*layers]
        if dynamic:
            return [(_in_one_row(key), _in_one_row(value)) for key, value in layers]
        kept = [bias.isfinite().nonzero()[:, 0] for bias in self.bias_or_zeros()[:, 0, 0]]  # B of [R']
        return [
            [
                (_kept(key[i], places), _kept(value[i], places)) if places.shape[0] else None
                for i, places in enumerate(kept)
            ]
            for key, value in layers
        ]

    def select(self, rows: slice) -> GlmImageReferences:
        """Those of some rows."""
        return self._each_layer([self], lambda x: x[0][rows], None if self.bias is None else self.bias[rows])

    def seen_by(self, row: int) -> GlmImageReferences | None:
        """Those that one image sees; None if it sees none."""
        places = self.bias_or_zeros()[row, 0, 0].isfinite().nonzero()[:, 0]
        return self._each_layer([self], lambda x: _kept(x[0][row], places)) if places.shape[0] else None

    def unseen(self) -> GlmImageReferences:
        """The same, and no image sees it: for the unconditional half of a batch."""
        some = self.keys[0]
        return self._replace(bias=some.new_full((self.rows, 1, 1, self.length), -torch.inf))

    @staticmethod
    def of_images(parts: Sequence[tuple[GlmImageReferences | None, int]]) -> GlmImageReferences:
        """One batch: those that so many images refer to, or None."""
        some = next(part for part, _ in parts if part is not None)
        none = GlmImageReferences._each_layer([some], lambda x: x[0][:1, :, :0])
        return GlmImageReferences.concat([(none if part is None else part).for_batch(count) for part, count in parts])

    @staticmethod
    def one_after_another(parts: Sequence[GlmImageReferences]) -> GlmImageReferences:
        """Several reference images of the same images as one sequence."""
        biased = any(part.bias is not None for part in parts)
        bias = torch.cat([part.bias_or_zeros() for part in parts], dim=3) if biased else None
        return GlmImageReferences._each_layer(parts, partial(torch.cat, dim=2), bias)

    @staticmethod
    def concat(parts: Sequence[GlmImageReferences]) -> GlmImageReferences:
        """One batch of several; shorter ones are padded with discarded tokens."""
        longest = max(part.length for part in parts)
        bias: Tensor | None = None
        if len({part.length for part in parts}) > 1 or any(part.bias is not None for part in parts):
            bias = torch.cat([F.pad(p.bias_or_zeros(), (0, longest - p.length), value=-torch.inf) for p in parts])

        def join(layer: tuple[Tensor, ...]) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in layer])

        return GlmImageReferences._each_layer(parts, join, bias)

    @staticmethod
    def _each_layer(
        parts: Sequence[GlmImageReferences], join: Callable[[tuple[Tensor, ...]], Tensor], bias: Tensor | None = None
    ) -> GlmImageReferences:
        """``join`` of all parts, of each layer's keys and of its values."""
        keys = tuple(map(join, zip(*(part.keys for part in parts), strict=True)))
        return GlmImageReferences(keys, tuple(map(join, zip(*(part.values for part in parts), strict=True))), bias)

    def bias_or_zeros(self) -> Tensor:
        """[B, 1, 1, R]."""
        return self.keys[0].new_zeros(self.rows, 1, 1, self.length) if self.bias is None else self.bias


def _kept(x: Tensor, places: Tensor) -> Tensor:
    """[heads, R, d] -> those at R' places, [1, heads, R', d]."""
    return x[None] if places.shape[0] == x.shape[1] else x.index_select(1, places)[None]


def _in_one_row(x: Tensor) -> Tensor:
    """[B, heads, R, d] -> [1, heads, B R, d]."""
    return x.transpose(0, 1).flatten(1, 2)[None]


class GlmImageKVCache:
    """The reference images' keys and values, written by some calls of the model and read by others.

    While it is set to ``"write"``, a call of the model with it appends what it computes to the current sample, and
    ``next_sample`` ends that one; set to ``"read"``, the model's tokens attend to what was written; set to ``"skip"``
    (or to None, as at first), it has no effect. One sample serves any batch; n samples serve a batch that n divides,
    each its neighbours.

    Args:
        num_layers: of the transformer.
    """

    def __init__(self, num_layers: int):
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ConfigurationError(f"GlmImageKVCache: num_layers must be a positive whole number, not {num_layers!r}")
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget everything; the cache has no effect until a mode is set."""
        self.mode: Mode | None = None
        self._samples: list[list[GlmImageReferences]] = [[]]  # the images of each sample; the last one is open
        self._joined: GlmImageReferences | None = None

    def set_mode(self, mode: Mode | None) -> None:
        """What calls of the model do with the cache.

        Raises:
            InputError: another mode.
        """
        if mode is not None and mode not in get_args(Mode):
            raise InputError(f"the mode of a cache is one of {', '.join(get_args(Mode))}, or None, not {mode!r}")
        self.mode = mode

    def next_sample(self) -> None:
        """What is written from here on is another sample's. One to which nothing was written does not count."""
        if self._samples[-1]:
            self._samples.append([])

    def write(self, references: GlmImageReferences) -> None:
        """Append to the current sample.

        Raises:
            InputError: of another number of layers than the cache.
        """
        if len(references.keys) != self.num_layers:
            raise InputError(
                f"this cache is of {self.num_layers} layers and the model has {len(references.keys)}: "
                f"GlmImageKVCache(num_layers={len(references.keys)})"
            )
        self._samples[-1].append(references)
        self._joined = None

    def read(self) -> GlmImageReferences | None:
        """All that was written; None if nothing was."""
        samples = [sample for sample in self._samples if sample]
        if not samples:
            return None
        if self._joined is None:
            self._joined = GlmImageReferences.concat([GlmImageReferences.one_after_another(s) for s in samples])
        return self._joined


def check_rows(
    batches: Sequence[Tensor], context: GlmImageContext, modulation: GlmImageModulation, patch_size: int
) -> None:
    """Raise InputError unless context and modulation are those of these latents [B, C, H, W]."""
    check_batch(sum(latents.shape[0] for latents in batches), context.rows, modulation.embedded.shape[0])
    owners = [one for one in context.batches for _ in range(one.text.shape[0] if len(batches) > 1 else 1)]
    for latents, one in zip(batches, owners):
        height, width = latents.shape[2:]
        tokens = height // patch_size * (width // patch_size)
        if one.prior.shape[1] != tokens:
            raise InputError(
                f"the context is of {one.prior.shape[1]} image tokens, and latents of {height} x {width} are {tokens}"
            )
