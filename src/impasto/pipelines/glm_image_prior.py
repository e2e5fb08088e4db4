"""GLM-Image's prior: an autoregressive model that says, token by token, what a picture is to show.

It first draws a small picture and then the large one, or only that where there are images to refer to. Its tokens are
of 32 x 32 pixels; the transformer's are of 16 x 16, so each stands for four of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from ..errors import InputError

#: Pixels to a token of the prior along a side; two of the transformer's.
PRIOR_PIXELS = 32

#: Told how many tokens there are; whether to go on.
GoesOn = Callable[[int], bool]


class PriorTokens(NamedTuple):
    """What the prior says of B pictures, in the transformer's grid, and of the images that each refers to."""

    prior_token_ids: Tensor  # [B, N]
    prior_token_image_ids: list[Tensor] | None = None  # P of [tokens of all of a prompt's images]
    source_image_grid_thw: list[Tensor] | None = None  # P of [images, 3]: 1, and the rows and columns of each


def small_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the small picture that comes before one of so many rows and columns of tokens."""
    ratio = rows / columns
    return int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)


def tokens_to_generate(height: int, width: int, with_images: bool) -> int:
    """How many tokens the prior makes of a picture, the small one's included."""
    rows, columns = height // PRIOR_PIXELS, width // PRIOR_PIXELS
    return rows * columns + (0 if with_images else math.prod(small_grid(rows, columns)))


def reference_picture(image: Any) -> Image.Image:
    """A picture, an array [H, W, 3] or a tensor [3, H, W] with values from 0 to 1 (or whole ones to 255), as a picture
    whose sides are multiples of 32: so the prior and the autoencoder see the same.

    Raises:
        InputError: something else, or an image that is too small.
    """
    if isinstance(image, Tensor):
        image = image.squeeze(0) if image.ndim == 4 and len(image) == 1 else image
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
        whole = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).round().astype(np.uint8)
        image = Image.fromarray(whole)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"image must be pictures, arrays [height, width, 3] or tensors [3, height, width], not "
            f"a {type(image).__name__} {list(getattr(image, 'shape', []))}"
        )
    size = tuple(side // PRIOR_PIXELS * PRIOR_PIXELS for side in image.size)
    if 0 in size:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too small to refer to: 32 x 32 at least"
        )
    picture = image.convert("RGB")
    return picture if picture.size == size else picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


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
) -> PriorTokens:
    """Sample the tokens of each picture, with numbers of its own.

    Args:
        model, processor: of transformers, ``GlmImageForConditionalGeneration`` and its processor.
        size: height and width in pixels.
        images: for each prompt, those that its picture refers to.
        generators: one for each picture, or one from which seeds are drawn for them; None: a new seed each time.
        per_prompt: pictures of each prompt.
        codebook_size: tokens from here on are no tokens of pictures, and are not sampled.
        goes_on: told of each token that is made; where it says no, what is missing is 0.
    """
    pictures, of_images, grids = [], [], []
    done = 0
    for i, prompt in enumerate(prompts):
        given = _inputs(processor, prompt, size, [] if images is None else images[i], model.device)
        all_grids = given["image_grid_thw"]
        if images is not None:
            sources = all_grids[: len(images[i])]
            tokens = _image_tokens(model, given["pixel_values"], sources)
            each = tokens.split(sources.prod(dim=-1).tolist())
            of_images.append(torch.cat([_doubled(x, *grid[1:]) for x, grid in zip(each, sources.tolist())]))
            grids.append(sources * sources.new_tensor([1, 2, 2]))
        # The picture itself, and behind it the small one, which is made first.
        targets = all_grids[0 if images is None else len(images[i]) :].tolist()
        rows, columns = targets[0][1:]
        total = sum(high * wide for _, high, wide in targets)
        for j in range(per_prompt):
            seed = _seed(generators, i * per_prompt + j)
            made = _sample(model, given, total, codebook_size, seed, partial(_after, goes_on, done))
            pictures.append(_doubled(made[total - rows * columns :], rows, columns))
            done += total
    ids = torch.stack(pictures)
    return PriorTokens(ids) if images is None else PriorTokens(ids, of_images, grids)


def _inputs(processor: Any, prompt: str, size: tuple[int, int], images: Sequence[Image.Image], device: Any) -> Any:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], tokenize=False)
    given = {"text": [text], "target_h": size[0], "target_w": size[1], "return_tensors": "pt"}
    return processor(images=list(images) or None, **given).to(device)


def _image_tokens(model: Any, pixels: Tensor, grids: Tensor) -> Tensor:
    """The tokens [sum of rows * columns] of images."""
    tokens: Tensor = model.get_image_tokens(model.get_image_features(pixels, grids).pooler_output)
    return tokens.flatten()


def _after(goes_on: GoesOn, before: int, more: int) -> bool:
    return goes_on(before + more)


def _sample(model: Any, given: Any, total: int, codebook_size: int, seed: int, goes_on: GoesOn) -> Tensor:
    """So many tokens, [total]."""
    length = given["input_ids"].shape[1]

    def stops(ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        stop = not goes_on(ids.shape[1] - length)
        return torch.full((len(ids),), stop, dtype=torch.bool, device=ids.device)

    others = list(range(codebook_size, model.config.text_config.vision_vocab_size))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # generate takes no generator: the global state is lent and given back
        torch.manual_seed(seed)
        ids = model.generate(
            **given,
            max_new_tokens=total,
            min_new_tokens=total,
            do_sample=True,
            suppress_tokens=others or None,
            stopping_criteria=[stops],
        )
    made: Tensor = ids[0, length:]
    return torch.nn.functional.pad(made, (0, total - len(made)))


def _doubled(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns] -> [2 rows * 2 columns], each token four times."""
    grid = tokens.view(rows, columns)
    return grid.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()


def _seed(generators: Generator | list[Generator] | None, picture: int) -> int:
    generator = generators[picture] if isinstance(generators, list) else generators
    if generator is None:
        return torch.Generator().seed() % 2**63
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
