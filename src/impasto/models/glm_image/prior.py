"""GLM-Image's prior: an autoregressive model that generates the content of an image as tokens.

It first generates a small image and then the large one, or only the large one if there are reference images. Its tokens
are 32 x 32 pixels and those of the transformer 16 x 16, so each stands for four of those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Steps
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor

from ...checkpoints.foreign.errors import TOKENIZING, translated
from ...checks import shown
from ...errors import InputError
from ...nn.precision import computing
from .prior_decoder import PriorDecoder, Sampling

#: Images whose tokens are sampled at a time: the weights are read once for all of them.
_AT_ONCE = 8

#: The host waits for the GPU every so many tokens, and is at most twice as many ahead.
_AHEAD = 16


class PriorTokens(NamedTuple):
    """The prior's tokens of B images, in the grid of the transformer, and those of their reference images."""

    prior_token_ids: Tensor  # [B, N]
    prior_token_image_ids: list[Tensor] | None = None  # P of [tokens of all reference images of a prompt]
    source_image_grid_thw: list[Tensor] | None = None  # P of [images, 3]: 1, and the rows and columns of each


@torch.no_grad()
def sample_prior(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    images: Sequence[Sequence[Image.Image]] | None,
    generators: Generator | list[Generator] | None,
    per_prompt: int,
    codebook_size: int,
    packed: bool = True,
    check: Callable[[Tensor], None] = lambda scores: None,
) -> Steps[int, bool | None, PriorTokens]:
    """Sample the tokens of each image with its own random numbers, some images at a time.

    Yields the number of tokens so far after each one. If it is sent False, those that are missing are 0.

    Args:
        model, processor: transformers' ``GlmImageForConditionalGeneration`` and its processor.
        size: height and width in pixels.
        images: the reference images of each prompt.
        generators: one for each image, or one for all, one after the other; None: new random numbers each time.
        per_prompt: images per prompt.
        codebook_size: higher tokens are no image tokens, and are not sampled.
        packed: whether copies of the weights that are read faster may take memory.
        check: called with the first scores of some images, before anything is sampled.
    """
    reserved = [model.config.image_token_id, model.config.image_end_token_id]
    marks = processor.tokenizer.convert_ids_to_tokens(reserved)
    for i, prompt in enumerate(prompts):
        mark = next((mark for mark in marks if mark in prompt), None)
        if mark is not None:
            raise InputError(
                f"prompt[{i}] must not contain {shown(mark)}, which stands for an image, and is {shown(prompt)}; give "
                f"images as image"
            )
    given: Sequence[Sequence[Image.Image]] = [[]] * len(prompts) if images is None else images
    read = [_read(model, processor, prompt, size, some) for prompt, some in zip(prompts, given, strict=True)]
    repeated = [prompt for prompt in read for _ in range(per_prompt)]
    total = sum(rows * columns for rows, columns in read[0].targets)
    uniform = _numbers(generators, len(repeated), total).to(model.device)  # [B, total]
    made = []
    for start in range(0, len(repeated), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        made.append(
            (yield from _sample(model, repeated[some], uniform[some], codebook_size, start * total, packed, check))
        )
    rows, columns = read[0].targets[-1]
    ids = torch.stack([doubled(tokens[total - rows * columns :], rows, columns) for tokens in torch.cat(made)])
    if images is None:
        return PriorTokens(ids)
    grids = [prompt.grids * prompt.grids.new_tensor([1, 2, 2]) for prompt in read]
    return PriorTokens(ids, [prompt.image_tokens for prompt in read], grids)


def result_of(steps: Steps[Any, Any, PriorTokens]) -> PriorTokens:
    """What a generator of tokens returns, without a stop on the way."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: PriorTokens = end.value
            return made


class _Read(NamedTuple):
    """A prompt as the prior reads it."""

    tokens: Tensor  # [S], including those of reference images
    positions: Tensor  # [3, S]
    targets: list[tuple[int, int]]  # rows and columns of the images to generate, in that order
    grids: Tensor  # [images, 3]: 1, rows and columns of each reference image
    image_tokens: Tensor  # of all reference images, in the grid of the transformer


def _read(model: Any, processor: Any, prompt: str, size: tuple[int, int], images: Sequence[Image.Image]) -> _Read:
    # The same as the released chat template, which is a program and not run.
    config = model.config
    frame = [config.image_start_token_id, config.image_token_id, config.image_end_token_id]
    text = "".join(processor.tokenizer.convert_ids_to_tokens(frame)) * len(images) + prompt
    options = {"text": [text], "target_h": size[0], "target_w": size[1], "return_tensors": "pt"}
    with TOKENIZING, _used(processor.tokenizer.name_or_path, "GlmImageProcessor"):
        given = processor(images=list(images) or None, **options).to(model.device)
    with _used(config.name_or_path, "GlmImageForConditionalGeneration"), computing(model):
        return _with_images(model, given, images)


def _used(path: str, name: str) -> AbstractContextManager[None]:
    """Translate what transformers raises when a component is used, even if its files passed every check."""
    return translated(name, Path(path or name), done="used")


def _with_images(model: Any, given: Mapping[str, Tensor], images: Sequence[Image.Image]) -> _Read:
    """The output of the processor for a prompt, with the tokens of its reference images."""
    tokens, all_grids = given["input_ids"], given["image_grid_thw"]
    grids = all_grids[: len(images)]
    # The image itself and after it the small one, which is generated first.
    targets = [(rows, columns) for _, rows, columns in reversed(all_grids[len(images) :].tolist())]
    positions, _ = model.model.get_rope_index(
        tokens, image_grid_thw=all_grids, images_per_sample=torch.tensor([len(all_grids)])
    )
    image_tokens = tokens.new_empty(0)
    if images:
        features = model.get_image_features(given["pixel_values"], grids).pooler_output
        if features[0].ndim == 3:  # maps; older versions of transformers give tokens
            found = model.get_image_tokens(features).flatten()
        else:
            found = model.get_image_tokens(torch.cat(list(features)), grids).flatten()
        tokens = tokens.masked_scatter(tokens == model.config.image_token_id, found.to(tokens.dtype))
        each = found.split(grids.prod(dim=-1).tolist())
        image_tokens = torch.cat([doubled(x, *grid[1:]) for x, grid in zip(each, grids.tolist(), strict=True)])
    return _Read(tokens[0], positions[:, 0], targets, grids, image_tokens)


def _sample(
    model: Any,
    prompts: Sequence[_Read],
    uniform: Tensor,
    codebook_size: int,
    before: int,
    packed: bool,
    check: Callable[[Tensor], None],
) -> Steps[int, bool | None, Tensor]:
    """Tokens [B, total], sampled with numbers [B, total]; ``before`` of others were sampled before."""
    batch, total = uniform.shape
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = uniform.new_zeros(batch, longest, dtype=torch.long)
    mask, positions = torch.zeros_like(tokens), tokens.new_ones(3, batch, longest)
    for row, prompt in enumerate(prompts):
        own = slice(longest - len(prompt.tokens), longest)
        tokens[row, own], mask[row, own], positions[:, row, own] = prompt.tokens, 1, prompt.positions
    following = positions[..., -1:] + 1 + target_offsets(prompts[0].targets).to(tokens.device)[:, None]  # [3, B, total]

    sampling = Sampling.of(model.generation_config)
    made = tokens.new_zeros(batch, total)
    pending: list[torch.cuda.Event] = []  # so that progress and interruption are not far ahead of the device
    with computing(model):
        decoder = PriorDecoder(model, batch, longest + total, codebook_size, packed)
        scores = decoder.prefill(tokens, positions, mask)  # [B, V]
    check(scores)
    for i in range(total):
        made[:, i] = sampling.choose(scores, uniform[:, i])
        if (yield before + batch * (i + 1)) is False:
            return torch.zeros_like(made)
        if tokens.is_cuda and i % _AHEAD == 0:
            pending.append(torch.cuda.current_stream(tokens.device).record_event())
            if len(pending) > 1:
                pending.pop(0).synchronize()
        if i + 1 < total:
            with computing(model):
                scores = decoder.step(made[:, i], following[:, :, i])
    return made


def target_offsets(targets: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of image tokens relative to the end of the prompt, [3, total]: image, row and column."""
    offsets, start = [], 0
    for rows, columns in targets:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        offsets.append(start + torch.stack([torch.zeros_like(row), row, column]).flatten(1))
        start += max(rows, columns)
    return torch.cat(offsets, dim=1)


def doubled(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns] -> [2 rows * 2 columns], each token repeated four times."""
    grid = tokens.view(rows, columns)
    return grid.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()


def _numbers(generators: Generator | list[Generator] | None, batch: int, total: int) -> Tensor:
    """Random numbers [B, total] in [0, 1)."""
    if generators is None:
        generators = Generator()
        generators.seed()
    each = generators if isinstance(generators, list) else [generators] * batch
    return torch.stack([torch.rand(total, generator=one, device=one.device, dtype=torch.float32).cpu() for one in each])
