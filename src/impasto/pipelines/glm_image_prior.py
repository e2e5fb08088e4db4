"""GLM-Image's prior: an autoregressive model that says, token by token, what a picture is to show.

It first draws a small picture and then the large one, or only that where there are images to refer to. Its tokens are
of 32 x 32 pixels; the transformer's are of 16 x 16, so each stands for four of those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from ..checkpoints.foreign.errors import translated
from ..checks import shown
from ..errors import InputError
from ..family import PRIOR_PIXELS
from ..nn.precision import computing
from .images import as_batch, normalize, to_rgb
from .prior_decoder import PriorDecoder, Sampling
from .prompts import TOKENIZING

#: Pictures whose tokens are sampled at a time: the weights are read once for all of them.
_AT_ONCE = 8

#: How many tokens apart the host waits for a GPU; it is at most twice as many ahead.
_AHEAD = 16

#: Told how many tokens there are; whether to go on.
GoesOn = Callable[[int], bool]


class PriorTokens(NamedTuple):
    """What the prior says of B pictures, in the transformer's grid, and of the images that each refers to."""

    prior_token_ids: Tensor  # [B, N]
    prior_token_image_ids: list[Tensor] | None = None  # P of [tokens of all of a prompt's images]
    source_image_grid_thw: list[Tensor] | None = None  # P of [images, 3]: 1, and the rows and columns of each


def reference_picture(image: Any) -> Image.Image:
    """A PIL image, an array [H, W, C] or a tensor [C, H, W], of the values that ``ImageProcessor`` takes, as an RGB
    image whose sides are multiples of 32: so the prior and the autoencoder see the same.

    Raises:
        InputError: something else, or an image that is too small.
    """
    if isinstance(image, np.ndarray | Tensor):
        levels = ((normalize(as_batch(image).detach().cpu()).float() * 0.5 + 0.5) * 255).round().clamp(0, 255)
        if len(levels) != 1 or levels.shape[1] not in (1, 3):
            raise InputError(f"image must be one of 1 or 3 channels, not of shape {list(image.shape)}")
        image = Image.fromarray(levels[0].expand(3, -1, -1).permute(1, 2, 0).to(torch.uint8).numpy())
    if not isinstance(image, Image.Image):
        raise InputError(f"image must be PIL images, arrays or tensors, not a {type(image).__name__}")
    size = tuple(side // PRIOR_PIXELS * PRIOR_PIXELS for side in image.size)
    if 0 in size:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too small to refer to: 32 x 32 at least"
        )
    if max(size) > 4 * min(size):
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too long to refer to: at most 4 times the other side"
        )
    rgb = to_rgb(image)
    return rgb if rgb.size == size else rgb.resize((size[0], size[1]), Image.Resampling.LANCZOS)


@torch.no_grad()
def generate_prior(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    images: Sequence[Sequence[Image.Image]] | None,
    generators: Generator | list[Generator] | None,
    per_prompt: int,
    codebook_size: int,
    goes_on: GoesOn,
    packed: bool = True,
    check: Callable[[Tensor], None] = lambda scores: None,
) -> PriorTokens:
    """Sample the tokens of each picture, with numbers of its own; some pictures at a time.

    Args:
        model, processor: of transformers, ``GlmImageForConditionalGeneration`` and its processor.
        size: height and width in pixels.
        images: for each prompt, those that its picture refers to.
        generators: one for each picture, or one for all, one after the other; None: new numbers each time.
        per_prompt: pictures of each prompt.
        codebook_size: tokens from here on are no tokens of pictures, and are not sampled.
        goes_on: told of the tokens that are made; where it says no, what is missing is 0.
        packed: whether memory may be taken for copies of the weights that are read faster.
        check: sees the first scores of some images, before anything is sampled.
    """
    reserved = [model.config.image_token_id, model.config.image_end_token_id]
    for mark in processor.tokenizer.convert_ids_to_tokens(reserved):
        for i, prompt in enumerate(prompts):
            if mark in prompt:
                raise InputError(
                    f"prompt[{i}] must not contain {shown(mark)}, which stands for an image, and is {shown(prompt)}; "
                    f"give images as image"
                )
    read = [
        _read(model, processor, prompt, size, [] if images is None else images[i]) for i, prompt in enumerate(prompts)
    ]
    drawn = [prompt for prompt in read for _ in range(per_prompt)]
    total = sum(rows * columns for rows, columns in read[0].targets)
    uniform = _numbers(generators, len(drawn), total).to(model.device)  # [B, total]
    made = []
    for start in range(0, len(drawn), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        told = partial(_after, goes_on, start * total)
        with computing(model):
            made.append(_sample(model, drawn[part], uniform[part], codebook_size, told, packed, check))
    rows, columns = read[0].targets[-1]
    ids = torch.stack([_doubled(tokens[total - rows * columns :], rows, columns) for tokens in torch.cat(made)])
    if images is None:
        return PriorTokens(ids)
    doubled = [prompt.grids * prompt.grids.new_tensor([1, 2, 2]) for prompt in read]
    return PriorTokens(ids, [prompt.image_tokens for prompt in read], doubled)


class _Read(NamedTuple):
    """A prompt as the prior reads it."""

    tokens: Tensor  # [S], those of images among them
    positions: Tensor  # [3, S]
    targets: list[tuple[int, int]]  # rows and columns of what is to be drawn, in that order
    grids: Tensor  # [images, 3]: 1, rows and columns of each image
    image_tokens: Tensor  # those of all images, in the transformer's grid


def _read(model: Any, processor: Any, prompt: str, size: tuple[int, int], images: Sequence[Image.Image]) -> _Read:
    # As the released chat template has it; that of a checkpoint is a program, which is not run.
    config = model.config
    frame = [config.image_start_token_id, config.image_token_id, config.image_end_token_id]
    text = "".join(processor.tokenizer.convert_ids_to_tokens(frame)) * len(images) + prompt
    options = {"text": [text], "target_h": size[0], "target_w": size[1], "return_tensors": "pt"}
    with TOKENIZING, _used(processor.tokenizer.name_or_path, "GlmImageProcessor"):
        given = processor(images=list(images) or None, **options).to(model.device)
    with _used(config.name_or_path, "GlmImageForConditionalGeneration"), computing(model):
        return _with_images(model, given, images)


def _used(path: str, name: str) -> AbstractContextManager[None]:
    """What transformers raises of a component, where its files pass every check, is an error of ours."""
    return translated(name, Path(path or name), done="used")


def _with_images(model: Any, given: Mapping[str, Tensor], images: Sequence[Image.Image]) -> _Read:
    """What the processor made of a prompt, with the tokens of the images that it refers to."""
    tokens, all_grids = given["input_ids"], given["image_grid_thw"]
    grids = all_grids[: len(images)]
    # The picture itself, and behind it the small one, which is drawn first.
    targets = [(rows, columns) for _, rows, columns in reversed(all_grids[len(images) :].tolist())]
    positions, _ = model.model.get_rope_index(
        tokens, image_grid_thw=all_grids, images_per_sample=torch.tensor([len(all_grids)])
    )
    image_tokens = tokens.new_empty(0)
    if images:
        features = model.get_image_features(given["pixel_values"], grids).pooler_output
        found = model.get_image_tokens(features).flatten()
        tokens = tokens.masked_scatter(tokens == model.config.image_token_id, found.to(tokens.dtype))
        each = found.split(grids.prod(dim=-1).tolist())
        image_tokens = torch.cat([_doubled(x, *grid[1:]) for x, grid in zip(each, grids.tolist(), strict=True)])
    return _Read(tokens[0], positions[:, 0], targets, grids, image_tokens)


def _sample(
    model: Any,
    prompts: Sequence[_Read],
    uniform: Tensor,
    codebook_size: int,
    goes_on: GoesOn,
    packed: bool,
    check: Callable[[Tensor], None],
) -> Tensor:
    """Tokens [B, total], chosen by numbers [B, total]."""
    batch, total = uniform.shape
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = uniform.new_zeros(batch, longest, dtype=torch.long)
    mask, positions = torch.zeros_like(tokens), tokens.new_ones(3, batch, longest)
    for row, prompt in enumerate(prompts):
        own = slice(longest - len(prompt.tokens), longest)
        tokens[row, own], mask[row, own], positions[:, row, own] = prompt.tokens, 1, prompt.positions
    following = positions[..., -1:] + 1 + target_offsets(prompts[0].targets).to(tokens.device)[:, None]  # [3, B, total]

    decoder = PriorDecoder(model, batch, longest + total, codebook_size, packed)
    sampling = Sampling.of(model.generation_config)
    made = tokens.new_zeros(batch, total)
    behind: list[torch.cuda.Event] = []  # so that what is said of the tokens, and their end, are not far ahead of them
    scores = decoder.prefill(tokens, positions, mask)  # [B, V]
    check(scores)
    for i in range(total):
        made[:, i] = sampling.choose(scores, uniform[:, i])
        if not goes_on(batch * (i + 1)):
            return torch.zeros_like(made)
        if tokens.is_cuda and i % _AHEAD == 0:
            behind.append(torch.cuda.current_stream(tokens.device).record_event())
            if len(behind) > 1:
                behind.pop(0).synchronize()
        if i + 1 < total:
            scores = decoder.step(made[:, i], following[:, :, i])
    return made


def target_offsets(targets: Sequence[tuple[int, int]]) -> Tensor:
    """Where the tokens of pictures lie behind the prompt, [3, total]: picture, row and column."""
    parts, start = [], 0
    for rows, columns in targets:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(start + torch.stack([torch.zeros_like(row), row, column]).flatten(1))
        start += max(rows, columns)
    return torch.cat(parts, dim=1)


def _after(goes_on: GoesOn, before: int, more: int) -> bool:
    return goes_on(before + more)


def _doubled(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns] -> [2 rows * 2 columns], each token four times."""
    grid = tokens.view(rows, columns)
    return grid.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()


def _numbers(generators: Generator | list[Generator] | None, batch: int, total: int) -> Tensor:
    """Numbers [B, total] in [0, 1)."""
    if generators is None:
        generators = Generator()
        generators.seed()
    each = generators if isinstance(generators, list) else [generators] * batch
    return torch.stack([torch.rand(total, generator=one, device=one.device).cpu() for one in each])
