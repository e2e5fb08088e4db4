"""The request of GLM-Image's pipeline: its arguments, validated before anything is computed.

Shapes: B images, N image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import MAX_SIDE, MAX_TOKENS, shown, whole_number
from ..errors import InputError
from ..family import PRIOR_PIXELS
from ..models.glm_image.prior import PriorTokens
from . import inputs
from .images import as_batch, normalize, to_rgb
from .request import Request, Texts, shared_fields

PRIOR_FIELDS = ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw")

#: A size in a prompt: ``<sop>H W<eop>``, in tokens of the prior.
_SIZE = re.compile(r"<sop>\s*(\d{1,9})\s+(\d{1,9})\s*<eop>")


@dataclass(frozen=True)
class GlmImageRequest(Request):
    """A call of GLM-Image's pipeline."""

    size: tuple[int, int] = (0, 0)  # height and width in pixels
    images: list[list[Any]] | None = None  # the reference images of each prompt
    prior: PriorTokens | None = None  # tokens in place of the prior's
    corner: tuple[int, int] = (0, 0)  # top and left


def read_glm_image_texts(pipe: Any, prompts: Sequence[str], guided: bool, arguments: Mapping[str, Any]) -> Texts:
    """The texts whose glyphs are to be encoded, or their embeddings.

    Args:
        prompts: none if embeddings are given.

    Raises:
        InputError: a type or shape that cannot be used, or two arguments that contradict each other.
    """
    embeds, negative_embeds = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
    negative_prompt = arguments["negative_prompt"]
    count = len(prompts) or len(embeds)
    length = whole_number("max_sequence_length", arguments["max_sequence_length"], most=MAX_TOKENS)
    images_per_prompt, _ = inputs.count_images(count, arguments["num_images_per_prompt"])
    negatives = inputs.list_of_texts("negative_prompt", negative_prompt or "", count)
    if guided and negative_prompt and negative_embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    check_widths(embeds, negative_embeds, count, pipe.components["transformer"])
    if not guided or negative_embeds is not None:
        negatives = []
    return Texts(prompts, negatives, embeds, None, negative_embeds if guided else None, None, images_per_prompt, length)


def read_glm_image(pipe: Any, fields: Sequence[str], arguments: Mapping[str, Any]) -> GlmImageRequest:
    """The arguments of a call of GLM-Image's pipeline.

    Args:
        fields: names of the embeddings that a callback may ask for.

    Raises:
        InputError: an argument that cannot be used.
    """
    attention_kwargs = arguments["attention_kwargs"]
    if not isinstance(attention_kwargs, Mapping | None) or {*(attention_kwargs or ())} - {"scale"}:
        raise InputError(f"attention_kwargs must be None, as attention takes none, not {shown(attention_kwargs)}")
    prompts, count = read_prompts(arguments["prompt"], arguments["prompt_embeds"])
    images = images_of_prompts(arguments["image"], count)
    sides, default = (arguments["height"], arguments["width"]), pipe.default_sample_size * pipe.vae_scale_factor
    prompts, size, final = plan_size(prompts, *sides, images, default)
    texts = read_glm_image_texts(pipe, prompts, inputs.guidance(arguments["guidance_scale"]) > 1.0, arguments)
    shared = shared_fields(pipe, fields, arguments, texts, size, both=True)
    ids, image_ids, grids = (arguments[name] for name in PRIOR_FIELDS)
    prior, each = None, texts.images_per_prompt
    if ids is not None:
        config = pipe.transformer.config
        tokens = shared["shape"][2] * shared["shape"][3] // config["patch_size"] ** 2
        codes = config["prior_vq_quantizer_codebook_size"]
        prior = given_prior(ids, image_ids, grids, images, count * each, each, tokens, codes)
    elif image_ids is not None or grids is not None:
        raise InputError(
            "prior_token_image_ids and source_image_grid_thw belong to prior_token_ids: give those too, or none"
        )
    elif not prompts:
        raise InputError("the prior needs a prompt: give prompt, or prior_token_ids with prompt_embeds")
    elif images is not None:
        images = [[reference_image(one) for one in row] for row in images]
    needed = ["vae"] if images is not None else []
    if texts.prompts or texts.negatives:
        needed += ["tokenizer"] if pipe.prompt_cache is not None else ["tokenizer", "text_encoder"]
    for name in needed:
        pipe._require(name)
    corner = inputs.corner(arguments["crops_coords_top_left"])
    final_size = None if size == final else final
    return GlmImageRequest(**shared, final_size=final_size, size=size, images=images, prior=prior, corner=corner)


def read_prompts(prompt: Any, prompt_embeds: Tensor | None) -> tuple[list[str], int]:
    """The texts (none if embeddings are given), and the number of prompts.

    Raises:
        InputError: neither is given, or both are.
    """
    if prompt is not None and prompt_embeds is not None:
        raise InputError("prompt and prompt_embeds were both given; give one of them")
    if prompt_embeds is not None:
        inputs.check_tensor("prompt_embeds", prompt_embeds, ("prompts", "tokens", "channels"))
        whole_number("the number of prompt_embeds", len(prompt_embeds))
        return [], len(prompt_embeds)
    if prompt is None:
        raise InputError("there is nothing to generate: give prompt, or prompt_embeds")
    texts = inputs.list_of_texts("prompt", prompt)
    return texts, len(texts)


def check_widths(embeds: Any, negative_embeds: Any, count: int, transformer: Any) -> None:
    """Check that given embeddings have a row for each prompt and the channels that the transformer takes."""
    channels = "channels" if transformer is None else int(transformer.config["text_embed_dim"])
    for name, given in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)):
        if given is not None:
            inputs.check_tensor(name, given, (count, "tokens", channels))


def images_of_prompts(image: Any, count: int) -> list[list[Any]] | None:
    """A list of images for each prompt, of equal length; None without images.

    Raises:
        InputError: not images, or not equally many for each prompt.
    """
    if image is None or (isinstance(image, list | tuple) and len(image) == 0):
        return None
    if not isinstance(image, list | tuple):
        image = [image]
    flat = [one for row in image for one in (row if isinstance(row, list | tuple) else [row])]
    wrong = [one for one in flat if not isinstance(one, Image.Image | np.ndarray | Tensor)]
    if wrong:
        raise InputError(f"image must be PIL images, arrays or tensors, not a {type(wrong[0]).__name__}")
    flatter = [one for one in flat if not isinstance(one, Image.Image) and one.ndim < 3]
    if flatter:
        raise InputError(
            f"image must be arrays [height, width, 3] or tensors [3, height, width], not {list(flatter[0].shape)}"
        )
    nested = [isinstance(one, list | tuple) for one in image]
    if count == 1 and not any(nested):
        return [list(image)]
    if not all(nested) or len(image) != count:
        raise InputError(f"image must be a list of {count} lists, one for each prompt, of its reference images")
    lengths = {len(one) for one in image}
    if len(lengths) > 1 or 0 in lengths:
        raise InputError(f"every prompt must have as many images as the others; they have {sorted(lengths)}")
    return [list(one) for one in image]


def plan_size(
    prompts: list[str], height: int | None, width: int | None, images: list[list[Any]] | None, default: int
) -> tuple[list[str], tuple[int, int], tuple[int, int]]:
    """The prompts without sizes, the size of generation and that of the result, which differ only with images.

    The size is the given one, the prompt's, the first image's (cut to multiples of 32) or the model's.

    Args:
        default: the side of the model's default size, in pixels.

    Raises:
        InputError: different sizes in one batch, or without images a size that is not a multiple of 32.
    """
    written = {(int(high), int(wide)) for prompt in prompts for high, wide in _SIZE.findall(prompt)[:1]}
    if len(written) > 1 and (height is None or width is None):
        raise InputError(f"the prompts ask for images of different sizes, {sorted(written)}: generate them separately")
    if written:
        high, wide = (PRIOR_PIXELS * side for side in written.pop())
    elif images is not None:
        wide, high = (side // PRIOR_PIXELS * PRIOR_PIXELS for side in _size_of(images[0][0]))
    else:
        high = wide = default
    height, width = high if height is None else height, wide if width is None else width
    check_sides(height, width, images is not None)
    height, width = int(height), int(width)  # NumPy integers pass the check, and stay NumPy integers
    generated = (next_multiple(height), next_multiple(width))
    return [_SIZE.sub("", prompt).strip() for prompt in prompts], generated, (height, width)


def next_multiple(side: int) -> int:
    """The side in pixels at which an edit of this side is generated."""
    return -(-side // PRIOR_PIXELS) * PRIOR_PIXELS


def check_sides(height: Any, width: Any, edits: bool = False) -> None:
    """Refuse sides in pixels that are not multiples of the prior's token size; None: not known yet.

    Args:
        edits: whether there are reference images. Their results are resized, so that any sides are valid.

    Raises:
        InputError: the message has the nearest valid sides.
    """
    sides = (("height", height), ("width", width))
    given = {name: whole_number(name, side, most=MAX_SIDE) for name, side in sides if side is not None}
    if not edits and any(side % PRIOR_PIXELS for side in given.values()):
        nearest = [str(max(1, round(side / PRIOR_PIXELS)) * PRIOR_PIXELS) for side in given.values()]
        raise InputError(
            f"{' and '.join(given)} must be multiples of {PRIOR_PIXELS}, not {' x '.join(map(str, given.values()))}; "
            f"the nearest size is {' x '.join(nearest)}"
        )


def _size_of(image: Any) -> tuple[int, int]:
    """Width and height in pixels of a PIL image, an array [H, W, 3] or a tensor [..., 3, H, W]."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return int(width), int(height)


def given_prior(
    ids: Tensor,
    image_ids: list[Tensor] | None,
    grids: list[Tensor] | None,
    images: list[list[Any]] | None,
    batch: int,
    per_prompt: int,
    tokens: int,
    codes: int,
) -> PriorTokens:
    """Check the tokens that are given in place of the prior's.

    Args:
        batch: B, of which ``per_prompt`` belong to each prompt.
        tokens: N of an image of this size.
        codes: the size of the codebook.

    Raises:
        InputError: another number of tokens, tokens outside of the codebook, or images without their tokens.
    """
    count = batch // per_prompt
    for name, numbers in (("prior_token_ids", [ids]), ("prior_token_image_ids", image_ids)):
        listed = isinstance(numbers, list | tuple | None)
        if not listed or not all(_is_within(x, codes) for x in numbers or ()):
            raise InputError(f"{name} must be tensors of tokens from 0 to {codes - 1}, the range of the codebook")
    if not isinstance(grids, list | tuple | None) or not all(_is_grid(grid) for grid in grids or ()):
        raise InputError("source_image_grid_thw must be tensors [images, 3]: 1, rows and columns of each image")
    if ids.ndim != 2 or ids.shape[1] != tokens or ids.shape[0] not in (count, batch):
        raise InputError(
            f"prior_token_ids has shape {list(ids.shape)}; an image of this size has {tokens} tokens: expected "
            f"{[count, tokens]}"
        )
    if images is None:
        if image_ids is not None or grids is not None:
            raise InputError("prior_token_image_ids and source_image_grid_thw describe images, but image is None")
    elif image_ids is None or grids is None:
        raise InputError(
            "image needs its own tokens in addition to prior_token_ids: give prior_token_image_ids and "
            "source_image_grid_thw, or leave prior_token_ids out"
        )
    else:
        for name, given in (("prior_token_image_ids", image_ids), ("source_image_grid_thw", grids)):
            if len(given) != count:
                raise InputError(f"{name} has entries for {len(given)} prompts; there are {count}")
        for of_prompt, tokens_of_images, grid in zip(images, image_ids, grids, strict=True):
            expected = int(grid.prod(dim=-1).sum())
            if len(grid) != len(of_prompt) or expected != tokens_of_images.numel():
                raise InputError(
                    f"source_image_grid_thw describes {len(grid)} images with {expected} tokens; there are "
                    f"{len(of_prompt)} images and {tokens_of_images.numel()} tokens"
                )
    repeats = batch // ids.shape[0]
    return PriorTokens(ids.repeat_interleave(repeats, dim=0), image_ids, grids)


def _is_whole(numbers: Any) -> bool:
    """Whether this is a dense tensor of whole numbers with values in memory."""
    kinds = (torch.int32, torch.int64)
    return (
        isinstance(numbers, Tensor)
        and numbers.dtype in kinds
        and not numbers.is_meta
        and numbers.layout == torch.strided
    )


def _is_grid(grid: Any) -> bool:
    """Whether this is a tensor [images, 3] of 1, rows and columns for each image."""
    return _is_whole(grid) and grid.shape[1:] == (3,) and bool((grid[:, 0] == 1).all() and (grid > 0).all())


def _is_within(tokens: Any, codes: int) -> bool:
    """Whether these are tokens of a codebook of so many codes."""
    if not _is_whole(tokens):
        return False
    return tokens.numel() == 0 or 0 <= int(tokens.min()) <= int(tokens.max()) < codes


def reference_image(image: Any) -> Image.Image:
    """An RGB image whose sides are multiples of 32, so that the prior and the autoencoder see the same.

    Args:
        image: a PIL image, an array [H, W, C] or a tensor [C, H, W], with the values that ``ImageProcessor`` takes.

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
            f"an image of {image.width} x {image.height} pixels is too small as a reference: at least 32 x 32"
        )
    if max(size) > 4 * min(size):
        raise InputError(f"an image of {image.width} x {image.height} pixels is too long as a reference: at most 4 : 1")
    rgb = to_rgb(image)
    return rgb if rgb.size == size else rgb.resize((size[0], size[1]), Image.Resampling.LANCZOS)
