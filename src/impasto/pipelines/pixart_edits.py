"""Image to image (SDEdit, 2108.01073) and inpainting with PixArt, over the loop of text to image.

Shapes: P prompts, n images, B generated images, C latent channels, h x w latent pixels, M text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..family import ALPHA, Family
from ..nn.noise import draw_noise
from .base import ImagePipelineOutput
from .defaults import with_defaults
from .edit_inputs import Originals, read_originals
from .latents import scaled
from .pixart import PixArtAlphaPipeline, PixArtPipeline, PromptEmbeds
from .request import Request, read_pixart
from .sampling import Edit, drive


class PixArtEditPipeline(PixArtPipeline):
    """What image to image and inpainting share. Components are those of text to image, and saved as its."""

    saved_as: ClassVar[str | None] = "PixArtSigmaPipeline"

    @torch.no_grad()
    def encode_images(
        self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None, repeats: int = 1
    ) -> Tensor:
        """Latents of images, sampled from the autoencoder's distribution and scaled: the inverse of ``decode``.

        Args:
            images: [n, 3, H, W] in [-1, 1].
            generator: one draw for the n images, or a list with one for each of the n * repeats results.
            repeats: how many latents of each image.

        Returns:
            [n * repeats, C, h, w]
        """
        with self.using_vae() as (vae, dtype):
            # One at a time: an image does not depend on its batch.
            encoded = [vae.encode(image.to(self.device, dtype)) for image in images.split(1)]
            if not hasattr(encoded[0], "latent_dist"):  # an autoencoder without a distribution
                z = torch.cat([each.latents for each in encoded]).repeat_interleave(repeats, dim=0)
                return scaled(z, vae.config)
            mean, std = (torch.cat([getattr(x.latent_dist, name) for x in encoded]) for name in ("mean", "std"))
            if isinstance(generator, list):
                mean, std = (x.repeat_interleave(repeats, dim=0) for x in (mean, std))
            z = mean + std * draw_noise(mean.shape, generator, mean.device, mean.dtype)
            z = scaled(z, vae.config)
        return z if isinstance(generator, list) else z.repeat_interleave(repeats, dim=0)

    def _run(self, arguments: Mapping[str, Any]) -> ImagePipelineOutput | tuple[Any]:
        """A call."""
        originals = read_originals(self, arguments)
        if isinstance(arguments["prompt"], str):
            arguments = {**arguments, "prompt": [arguments["prompt"]] * len(originals)}
        request = read_pixart(self, PromptEmbeds._fields, arguments, originals.canvas)
        prompts = request.shape[0] // request.texts.images_per_prompt
        if len(originals) not in (1, prompts):
            raise InputError(
                f"there are {len(originals)} images for {prompts} prompts; give one for all, or one for each"
            )
        if not originals.latents:
            self._require("vae")
        self._check_conditions()
        self._warn_of_mixtures()
        with torch.no_grad(), self._calling(request.guidance_scale):
            embeds = PromptEmbeds(*self.encode_prompt(**request.texts.of_pixart))
            edit = self.encode_edit(originals, request, arguments["strength"])
            noise = self._noise(request, self.transformer.dtype)
            loop = self.denoise(noise, embeds, eta=request.eta, edit=edit, **request.denoising)
            images = self._finish_edit(drive(self, loop, edit.latents, request), request, originals)
        return ImagePipelineOutput(images) if arguments["return_dict"] else (images,)

    def encode_edit(self, originals: Originals, request: Request, strength: float) -> Edit:
        """What the loop starts from, encoded with the request's generators, before they generate the noise."""
        repeats = request.shape[0] // len(originals)
        latents = originals.to_encode()
        if originals.latents:
            latents = latents.repeat_interleave(repeats, dim=0)
        else:
            latents = self.encode_images(latents, request.generators, repeats)
            self._check_output("vae", latents)
        mask = originals.latent_masks(*request.shape[2:])
        return Edit(latents, strength, None if mask is None else mask.repeat_interleave(repeats, dim=0))

    def _finish_edit(
        self, latents: Tensor, request: Request, originals: Originals
    ) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        if request.output_type == "latent":
            return self._finish(latents, request)
        images = originals.finished(self.image_processor.denormalize(self._decode_checked(latents)))
        return self.image_processor.postprocess(images, request.output_type, do_denormalize=[False] * len(images))


class PixArtImg2ImgPipeline(PixArtEditPipeline):
    """What both pipelines for image to image share."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 300,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Change images as prompts say: noise is added to them, and the rest of the schedule is run from there.

        Arguments that are not listed are those of text to image.

        Args:
            image: PIL images, arrays or tensors as ``ImageProcessor.preprocess`` takes them, or latents [n, C, h, w]
                (scaled, as ``output_type="latent"`` returns them): one for all prompts or one for each.
            strength: the fraction of the steps that are taken, above 0: the larger, the less is left of the image.
            height, width: in pixels, of the result; the image's by default.
            latents: the noise [B, C, h, w], of variance 1; generated with ``generator`` if None.
            use_resolution_binning: generate at the nearest training size, or for models without a table of sizes at
                one of about the training area; the result is resized. If False, at about the image's own size.

        Returns:
            ``.images``: P * num_images_per_prompt images.

        Raises:
            InputError: an argument cannot be used; nothing has been computed yet.
        """
        return self._run(locals())


class PixArtInpaintPipeline(PixArtEditPipeline):
    """What both pipelines for inpainting share."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 300,
        overlay: bool = False,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Repaint what masks select. The other latents are replaced by the image's after every step.

        Arguments that are not listed are those of text to image and of image to image.

        Args:
            image: as for image to image.
            mask_image: what is repainted: white (1) everything, black (0) nothing, gray a mixture. PIL images, arrays
                or tensors of the size of the image: one for all or one for each.
            height, width: in pixels, of the result; with ``padding_mask_crop`` or ``overlay``, of the generation.
            padding_mask_crop: generate only what surrounds the mask, with so many pixels on each side, at the model's
                size, and paste it back. Pixels where the mask is black are returned exactly as they were.
            strength: 1 ignores what was under the mask; with less, it is the start, as in image to image.
            latents: the noise [B, C, h, w], of variance 1; generated with ``generator`` if None.
            overlay: paste the result into the image. Pixels where the mask is black are returned exactly as they
                were; otherwise the autoencoder changes them a little.

        Returns:
            ``.images``: P * num_images_per_prompt images.

        Raises:
            InputError: an argument cannot be used; nothing has been computed yet.
        """
        return self._run(locals())


class PixArtSigmaImg2ImgPipeline(PixArtImg2ImgPipeline):
    """Image to image with PixArt-Σ."""


class PixArtAlphaImg2ImgPipeline(PixArtImg2ImgPipeline):
    """Image to image with PixArt-α."""

    family: ClassVar[Family] = ALPHA
    saved_as: ClassVar[str | None] = "PixArtAlphaPipeline"

    __call__ = with_defaults(PixArtImg2ImgPipeline.__call__, max_sequence_length=120)
    encode_prompt = PixArtAlphaPipeline.encode_prompt


class PixArtSigmaInpaintPipeline(PixArtInpaintPipeline):
    """Inpainting with PixArt-Σ."""


class PixArtAlphaInpaintPipeline(PixArtInpaintPipeline):
    """Inpainting with PixArt-α."""

    family: ClassVar[Family] = ALPHA
    saved_as: ClassVar[str | None] = "PixArtAlphaPipeline"

    __call__ = with_defaults(PixArtInpaintPipeline.__call__, max_sequence_length=120)
    encode_prompt = PixArtAlphaPipeline.encode_prompt
