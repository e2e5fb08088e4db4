"""The request of GLM-Image's pipeline. All functions raise InputError for arguments that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import MAX_SIDE, shown, whole_number
from ..errors import InputError
from ..family import PRIOR_PIXELS
from ..models.glm_image.prior import PriorTokens
from . import inputs
from .images import as_batch, normalize, to_rgb
from .request import Request, Texts, read_texts, shared_fields

#: A size in a prompt: ``<sop>H W<eop>``, in tokens of the prior.
_SIZE = re.compile(r"<sop>\s*(\d{1,9})\s+(\d{1,9})\s*<eop>")


@dataclass(frozen=True)
class GlmImageRequest(Request):
    """A call of GLM-Image's pipeline."""

    size: tuple[int, int] = (0, 0)  # height and width in pixels
    images: list[list[Any]] | None = None  # the reference images of each prompt
    prior: PriorTokens | None = None  # tokens in place of the prior's
    corner: tuple[int, int] = (0, 0)  # top and left


def read_glm_image_texts(pipe: Any, guided: bool, arguments: Mapping[str, Any]) -> Texts:
    """The texts whose glyphs are to be encoded, or their embeddings."""
    transformer = pipe.components["transformer"]
    return read_texts(guided, arguments, "channels" if transformer is None else transformer.config["text_embed_dim"])


def read_glm_image(pipe: Any, fields: Sequence[str], arguments: Mapping[str, Any]) -> GlmImageRequest:
    """The arguments of a call of GLM-Image's pipeline.

    Args:
        fields: names of the embeddings that a callback may ask for.
    """
    attention_kwargs = arguments["attention_kwargs"]
    if not isinstance(attention_kwargs, Mapping | None) or {*(attention_kwargs or ())} - {"scale"}:
        raise InputError(f"attention_kwargs must be None, as attention takes none, not {shown(attention_kwargs)}")
    if (attention_kwargs or {}).get("scale") not in (None, 1.0) and pipe.get_list_adapters():
        raise InputError("the strength of adapters is set for the pipeline: pipe.set_adapters(NAMES, WEIGHTS)")
    texts = read_glm_image_texts(pipe, inputs.guidance(arguments["guidance_scale"]) > 1.0, arguments)
    images = images_of_prompts(arguments["image"], texts.prompt_count)
    sides, default = (arguments["height"], arguments["width"]), pipe.default_sample_size * pipe.vae_scale_factor
    prompts, size, final = plan_size(texts.prompts, *sides, images, default)
    texts = texts._replace(prompts=prompts)
    shared = shared_fields(pipe, fields, arguments, texts, size, both=True)
    tokens = [arguments[name] for name in PriorTokens._fields]
    prior = None
    if any(given is not None for given in tokens):
        prior = checked_prior(pipe, texts, shared["shape"], images, *tokens)
    elif not prompts:
        raise InputError("the prior needs a prompt: give prompt, or prior_token_ids with prompt_embeds")
    if images is not None:
        pipe._require("vae")
        images = images if prior else [[reference_image(one) for one in row] for row in images]
    if texts.to_encode:
        for name in ("tokenizer",) if pipe.prompt_cache is not None else ("tokenizer", "text_encoder"):
            pipe._require(name)
    corner = inputs.corner(arguments["crops_coords_top_left"])
    final_size = None if size == final else final
    return GlmImageRequest(**shared, final_size=final_size, size=size, images=images, prior=prior, corner=corner)


def images_of_prompts(image: Any, count: int) -> list[list[Any]] | None:
    """A list of images for each prompt, of equal length; None without images."""
    image = [] if image is None else image if isinstance(image, list | tuple) else [image]
    if not image:
        return None
    for one in (one for row in image for one in (row if isinstance(row, list | tuple) else [row])):
        if not isinstance(one, Image.Image | np.ndarray | Tensor):
            raise InputError(f"image must be PIL images, arrays or tensors, not a {type(one).__name__}")
        if not isinstance(one, Image.Image) and one.ndim < 3:
            raise InputError(
                f"image must be arrays [height, width, 3] or tensors [3, height, width], not {list(one.shape)}"
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
    prompts: Sequence[str], height: int | None, width: int | None, images: list[list[Any]] | None, default: int
) -> tuple[list[str], tuple[int, int], tuple[int, int]]:
    """The prompts without sizes, the size of generation and that of the result, which differ only with images.

    The size is the given one, the prompt's, the first image's (cut to multiples of 32) or the model's.

    Args:
        default: the side of the model's default size, in pixels.
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
    """Width and height in pixels of a PIL image, an array [..., H, W, 3] or a tensor [..., 3, H, W]."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[-3:-1]
    return int(width), int(height)


def checked_prior(
    pipe: Any,
    texts: Texts,
    shape: tuple[int, ...],
    images: list[list[Any]] | None,
    ids: Any,
    image_ids: Any = None,
    grids: Any = None,
) -> PriorTokens:
    """The tokens that are given in place of the prior's, checked.

    Args:
        shape: [B, C, h, w] of the latents.
    """
    if ids is None:
        raise InputError(
            "prior_token_image_ids and source_image_grid_thw belong to prior_token_ids: give those too, or none"
        )
    config, (batch, _, rows, columns), count = pipe.transformer.config, shape, texts.prompt_count
    tokens = rows * columns // config["patch_size"] ** 2
    codes = config["prior_vq_quantizer_codebook_size"]
    for name, numbers in (("prior_token_ids", [ids]), ("prior_token_image_ids", image_ids)):
        listed = isinstance(numbers, list | tuple | None)
        if not listed or not all(_is_whole(x) and bool(((x >= 0) & (x < codes)).all()) for x in numbers or ()):
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
    return PriorTokens(ids.repeat_interleave(batch // len(ids), dim=0), image_ids, grids)


def _is_whole(x: Any) -> bool:
    """Whether this is a dense tensor of whole numbers with values in memory."""
    dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    return dense and x.dtype in (torch.int32, torch.int64)


def _is_grid(grid: Any) -> bool:
    """Whether this is a tensor [images, 3] of 1, rows and columns for each image."""
    return _is_whole(grid) and grid.shape[1:] == (3,) and bool((grid[:, 0] == 1).all() and (grid > 0).all())


def reference_image(image: Any) -> Image.Image:
    """An RGB image whose sides are multiples of 32, so that the prior and the autoencoder see the same.

    Args:
        image: a PIL image, an array [H, W, C] or a tensor [C, H, W], with the values that ``ImageProcessor`` takes.
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
