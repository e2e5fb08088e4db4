"""From a job to a run and from latents to pixels: what comes before and after the steps of an image.

Jobs of one pipeline share its components; each has a run of its own, with its own seed.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...family import GLM_IMAGE, PRIOR_PIXELS, family_of
from ...memory.placement import Resident
from ...nn.changes import unwrapped
from ...pipelines.compat.calls import Call
from ...pipelines.edit_inputs import Originals, read_originals, resize
from ...pipelines.glm_image import GlyphEmbeds
from ...pipelines.glm_image_inputs import read_glm_image
from ...pipelines.glm_image_stages import prior_steps, run_prior
from ...pipelines.images import ImageProcessor
from ...pipelines.pixart import PromptEmbeds
from ...pipelines.request import Request, least_strength, read_pixart
from ...pipelines.resolution import Bins, bins_for, nearest_bin, resize_and_crop
from ...pipelines.sampling import Run
from ...registry import SOLVERS, class_of, pipeline_class
from ..job import GivenImages, Job, RawImage

#: Embeddings of prompts that are kept, the latest ones, and their bytes.
KEPT_TEXTS = 256
KEPT_BYTES = 64 << 20
#: Latent pixels of a preview, at most: those of 512 x 512 px. While a preview is decoded, all other images wait.
PREVIEW_PIXELS = 64 * 64
#: Height and width in pixels; None: the model's.
Sides = tuple[int | None, int | None]


@dataclass
class Begun:
    """An image that has begun."""

    job: Job
    pipe: Any
    request: Request
    run: Run
    originals: Originals | None = None  # of an edit


class Stages:
    """What turns jobs of one pipeline into runs, and their latents into images.

    Args:
        pipe: a PixArt or GLM-Image pipeline for text to image.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.family = family_of(type(pipe).__name__)
        self.pipes: dict[tuple[str, str | None], Any] = {}
        self.texts: OrderedDict[Hashable, Tensor] = OrderedDict()  # embeddings [tokens, channels], the latest last

    @property
    def at_once(self) -> int:
        """How many images begin at a time: the prior of GLM-Image takes memory."""
        return 1 if self.family is GLM_IMAGE else 8

    @property
    def beginning(self) -> str:
        """The name, for metrics, of what ``begin`` spends its time on."""
        return "prior" if self.family is GLM_IMAGE else "text"

    # --- sizes ---

    @property
    def shares(self) -> bool:
        """Whether runs may share a forward pass."""
        pipe = self.pipe
        own = getattr(unwrapped(pipe.transformer), "step_cache", None)
        return pipe.step_cache is None and own is None and pipe.transformer is unwrapped(pipe.transformer)

    def size_of(self, job: Job) -> tuple[int, int]:
        """Height and width in pixels at which a job's image is generated."""
        height, width = (given or self._side for given in self._sides(job))
        bins = self._bins(job)
        return (height, width) if bins is None else nearest_bin(height, width, bins)

    @property
    def _side(self) -> int:
        """Pixels along a side of the model's images."""
        return int(self.pipe.transformer.config["sample_size"] * self.pipe.vae_scale_factor)

    def _bins(self, job: Job) -> Bins | None:
        """The sizes at which a job's image may be generated; None: any multiple of the model's unit."""
        return bins_for(self._side) if job.binning and self.family is not GLM_IMAGE else None

    def tokens_of(self, job: Job) -> int:
        """Tokens of a job's image in the transformer."""
        unit = self.pipe.transformer.config["patch_size"] * int(self.pipe.vae_scale_factor)
        height, width = self.size_of(job)
        return int(max(1, height // unit) * max(1, width // unit))

    # --- texts ---

    def texts_of(self, job: Job) -> list[str]:
        """What has to be encoded for a job."""
        return [job.prompt, job.negative_prompt] if job.guidance_scale > 1.0 else [job.prompt]

    def encode_texts(self, texts: Sequence[str], adapters: Hashable = ()) -> dict[str, Tensor]:
        """Embeddings [tokens, channels] of texts; those that are not kept are encoded in one batch.

        Args:
            adapters: those that are in force; they may change the text encoder.
        """
        new = [text for text in dict.fromkeys(texts) if (adapters, text) not in self.texts]
        if new:
            for text, embeds in zip(new, self._encode(new), strict=True):
                self.texts[adapters, text] = embeds
        found = {}
        for text in dict.fromkeys(texts):
            self.texts.move_to_end((adapters, text))
            found[text] = self.texts[adapters, text]
        size = sum(embeds.nbytes for embeds in self.texts.values())
        while len(self.texts) > KEPT_TEXTS or size > KEPT_BYTES:
            size -= self.texts.popitem(last=False)[1].nbytes
        return found

    def _encode(self, texts: list[str]) -> list[Tensor]:
        if self.family is GLM_IMAGE:
            # One at a time: the texts of a batch are padded, which changes the last digits.
            return [self.pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0] for text in texts]
        encoded = self.pipe.encode_prompt(texts, do_classifier_free_guidance=False, clean_caption=True)
        embeds, mask = encoded[:2]
        return [row[: int(kept.sum())].clone() for row, kept in zip(embeds, mask)]

    def _embeds(self, job: Job, encoded: Mapping[str, Tensor]) -> Any:
        rows = [encoded[text][None] for text in self.texts_of(job)]
        if self.family is GLM_IMAGE:
            return GlyphEmbeds(*rows)
        most = max(row.shape[1] for row in rows)
        padded = [F.pad(row, (0, 0, 0, most - row.shape[1])) for row in rows]
        masks = [torch.arange(most, device=row.device)[None] < row.shape[1] for row in rows]
        both = [x for pair in zip(padded, (mask.long() for mask in masks)) for x in pair]
        return PromptEmbeds(*both)

    # --- the run ---

    @torch.no_grad()
    def begin(self, job: Job, encoded: Mapping[str, Tensor]) -> Generator[None, None, Begun]:
        """The run of a job, before its first step. Yields where others may take a step: after each token of a prior.

        Args:
            encoded: what ``encode_texts`` returned for its texts.

        Raises:
            InputError: the job cannot be used.
        """
        embeds = self._embeds(job, encoded)
        if self.family is GLM_IMAGE:
            return (yield from self._begin_glm_image(job, embeds))
        return self._begin_pixart(job, embeds)

    def _begin_pixart(self, job: Job, embeds: PromptEmbeds) -> Begun:
        given = job.given
        task = "text-to-image" if given is None else "image-to-image" if given.mask is None else "inpainting"
        pipe = self._pipe(task, job.scheduler)
        arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(job.seed)]}
        height, width = self._sides(job)
        if given is not None:
            strength = max(given.strength, least_strength(job.steps))  # clients expect an image at any strength
            arguments |= {"image": _tensor(given.images[0]), "strength": strength}
            if given.mask is not None:
                arguments |= self._masked(job, given)
        arguments |= {"height": height, "width": width, "use_resolution_binning": job.binning}
        bound = self._arguments(pipe, job, arguments)
        originals = None if given is None else read_originals(pipe, bound)
        request = read_pixart(pipe, PromptEmbeds._fields, bound, None if originals is None else originals.canvas)
        edit = None if originals is None else pipe.encode_edit(originals, request, bound["strength"])
        noise = pipe._noise(request, pipe.transformer.dtype)
        with pipe.using("transformer"):
            run = pipe.begin(
                noise,
                embeds,
                request.schedule,
                request.guidance_scale,
                eta=request.eta,
                generator=request.generators,
                edit=edit,
            )
        return Begun(job, pipe, request, run, originals)

    def _begin_glm_image(self, job: Job, embeds: GlyphEmbeds) -> Generator[None, None, Begun]:
        pipe = self.pipe
        arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(job.seed)]}
        height, width = self._sides(job)
        if job.given is not None:
            arguments["image"] = [to_pil(image) for image in job.given.images]
        bound = self._arguments(pipe, job, arguments | {"height": height, "width": width})
        request = read_glm_image(pipe, GlyphEmbeds._fields, bound)
        texts = request.texts
        call = Call(pipe, request.guidance_scale)
        order = (pipe, texts.prompts, request.size, request.images, request.generators, 1, call)
        if type(pipe.placement) is Resident:
            prior = yield from prior_steps(*order)
        else:  # the prior and the transformer take turns on the device: to swap them at each token would take longer
            prior = run_prior(*order)
        noise = pipe._noise(request, torch.float32)
        references = pipe.encode_references(request.images, prior)
        with pipe.using("transformer"):
            run = pipe.begin(
                noise,
                embeds,
                prior.prior_token_ids,
                references,
                request.schedule,
                request.guidance_scale,
                generator=request.generators,
            )
        return Begun(job, pipe, request, run)

    def _pipe(self, task: str, scheduler: str | None) -> Any:
        """The pipeline for a task, with the scheduler of a job; all share their components."""
        key = (task, scheduler)
        if key not in self.pipes:
            cls = pipeline_class(type(self.pipe).__name__, task)
            own = self.pipe.scheduler
            chosen: dict[str, Any] = {}
            if scheduler is not None and SOLVERS[scheduler] != type(own).__name__:
                chosen["scheduler"] = class_of(SOLVERS[scheduler]).from_config(own.config)
            self.pipes[key] = cls.from_pipe(self.pipe, **chosen)
        return self.pipes[key]

    def _arguments(self, pipe: Any, job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the pipeline, by name, as the pipeline itself reads them."""
        own = {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt if self.family is not GLM_IMAGE else job.negative_prompt or None,
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance_scale,
            "output_type": "pt",
        }
        bound = inspect.signature(pipe.__call__).bind(**own, **given)
        bound.apply_defaults()
        return {"kwargs": {}, **bound.arguments}

    def _sides(self, job: Job) -> Sides:
        """Height and width at which a job is generated, where the pipeline takes no other ones."""
        height, width = job.height, job.width
        if self._bins(job) is not None:
            return (height, width) if height and width else (None, None)
        if not (height and width):  # never left to GLM-Image: the text of a prompt could ask for any size
            first = None if job.given is None or job.given.padding is not None else job.given.images[0]
            height, width = (self._side, self._side) if first is None else (first.height, first.width)
        unit = int(self.pipe.transformer.config["patch_size"] * self.pipe.vae_scale_factor)
        unit = PRIOR_PIXELS if self.family is GLM_IMAGE else unit
        height, width = (max(1, round(side / unit)) * unit for side in (height, width))
        return (height, width)

    def _masked(self, job: Job, given: GivenImages) -> dict[str, Any]:
        """The image and the mask. Without padding they have the size of the result, into which the rest is pasted."""
        image = given.images[0]
        assert given.mask is not None
        pixels, mask = _tensor(image), _mask(given.mask, image)
        if given.padding is not None:
            return {"mask_image": mask, "padding_mask_crop": given.padding}
        if job.height and job.width:
            pixels, mask = resize(pixels, job.height, job.width), resize(mask, job.height, job.width)
        return {"image": pixels, "mask_image": mask, "overlay": True}

    # --- images ---

    @torch.no_grad()
    def decode(
        self, begun: Sequence[Begun], latents: Sequence[Tensor]
    ) -> Generator[None, None, list[RawImage | Exception]]:
        """The images of latents [1, C, h, w] of one size; what stands in the way of one is in its place.

        Yields where others may take a step: after each layer of the autoencoder. Latents of previews may be smaller
        than those of their images; what they are decoded to is enlarged.
        """
        pipe = begun[0].pipe
        found: list[RawImage | Exception] = []
        pixels = yield from pipe.decode_by_layer(torch.cat([*latents]))
        for each, decoded in zip(begun, pixels.split(1), strict=True):
            try:
                pipe._check_output("transformer", latents[len(found)])
                pipe._check_output("vae", decoded)
                if not bool(decoded.isfinite().all()):
                    raise ArithmeticError("the image has NaN or infinite values: the model overflowed")
                image = ImageProcessor.denormalize(decoded.float())
                found.append(self._finished(each, _enlarged(image, latents[len(found)], each.run.latents)))
            except Exception as error:
                found.append(error)
        return found

    def _finished(self, begun: Begun, image: Tensor) -> RawImage:
        """Pixels [1, 3, H, W] in [0, 1] at the size of generation -> the result."""
        job, request = begun.job, begun.request
        if begun.originals is not None:
            image = begun.originals.finished(image)
        elif request.final_size is not None:
            image = resize_and_crop(image, *request.final_size)
        pasted = job.given is not None and job.given.padding is not None  # the size of the image that was given
        if job.height and job.width and not pasted and image.shape[-2:] != (job.height, job.width):
            image = resize_and_crop(image, job.height, job.width)
        return as_raw(image)


def preview_latents(latents: Tensor) -> Tensor:
    """Latents [1, C, h, w] as they are decoded for a preview: the means of patches of them if there are many."""
    height, width = latents.shape[-2:]
    square = math.ceil(math.sqrt(height * width / PREVIEW_PIXELS))
    if square <= 1:
        return latents
    return F.adaptive_avg_pool2d(latents, (math.ceil(height / square), math.ceil(width / square)))


def _enlarged(image: Tensor, latents: Tensor, all_latents: Tensor) -> Tensor:
    """Pixels [1, 3, H, W], decoded from ``latents``, at the size that ``all_latents`` would be decoded to."""
    if latents.shape == all_latents.shape:
        return image
    size = [image.shape[side] * all_latents.shape[side] // latents.shape[side] for side in (-2, -1)]
    return F.interpolate(image, size=size, mode="bilinear")


def as_raw(image: Tensor) -> RawImage:
    """Pixels [1, 3, H, W] in [0, 1], as they cross processes."""
    levels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    return RawImage(levels.shape[1], levels.shape[0], levels.numpy().tobytes())


def to_pil(image: RawImage) -> Image.Image:
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def _tensor(image: RawImage) -> Tensor:
    """[1, 3, H, W] in [0, 1]"""
    levels = np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
    return torch.from_numpy(levels.transpose(2, 0, 1)[None].astype(np.float32) / 255)


def _mask(mask: bytes, image: RawImage) -> Tensor:
    """[1, 1, H, W] in [0, 1]"""
    levels = np.frombuffer(mask, np.uint8).reshape(1, 1, image.height, image.width)
    return torch.from_numpy(levels.astype(np.float32) / 255)
