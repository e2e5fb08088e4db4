"""PixArtAlphaPipeline (2310.00426) and PixArtSigmaPipeline (2403.04692): text to image, in one denoising loop.

Shapes: P prompts, B images, C latent channels, h x w latent pixels, M text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..family import ALPHA, SIGMA, Family, mixtures, pixels_per_latent
from ..models.pixart.model import PixArtTransformer2DModel
from ..models.pixart.text import PixArtContext
from ..nn.changes import takes_stages
from ..nn.machine import as_device
from . import inputs
from .base import ImagePipelineOutput, Pipeline
from .compat.methods import PixArtMethods
from .compat.textual_inversion import TextualInversion
from .defaults import with_defaults
from .images import PixArtImageProcessor
from .prompts import EncodedTexts, encode_texts
from .request import Schedule, read_pixart, read_schedule, read_texts
from .sampling import DenoisingStep, Edit, Half, Run, denoising_steps, drive, first_latents, own_scheduler

logger = logging.getLogger("impasto")


class PromptEmbeds(NamedTuple):
    """What ``encode_prompt`` returns; a mask is 1 where there is a token. Without guidance the last two are None."""

    prompt_embeds: Tensor  # [B, M, channels]
    prompt_attention_mask: Tensor  # [B, M]
    negative_prompt_embeds: Tensor | None = None  # [B, M, channels]
    negative_prompt_attention_mask: Tensor | None = None  # [B, M]


class PixArtPipeline(PixArtMethods, TextualInversion, Pipeline):
    """What both pipelines share; they differ in their family and in a default value.

    Args:
        tokenizer, text_encoder: T5's; both may be None if embeddings are given.
        vae: the autoencoder of the latents: ours, or one that behaves like diffusers'.
        transformer: the denoiser; may be None if only prompts are encoded.
        scheduler: the solver: ours, or one that behaves like diffusers'.
    """

    family: ClassVar[Family] = SIGMA

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any):
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        channels = 4 if vae is None else vae.config.get("latent_channels", 4)
        factor = pixels_per_latent(None if vae is None else vae.config)
        self.image_processor = PixArtImageProcessor(vae_scale_factor=factor, vae_latent_channels=channels)
        self._warned: set[str] = set()
        self._warn_of_mixtures()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along a side; without an autoencoder, that of the previous one, or 8."""
        vae = vars(self).get("vae")
        return int(self.image_processor.config.vae_scale_factor) if vae is None else pixels_per_latent(vae.config)

    @vae_scale_factor.setter
    def vae_scale_factor(self, value: int) -> None:
        raise InputError("vae_scale_factor is that of the vae (its block_out_channels): assign another one to pipe.vae")

    # --- the call ---

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 300,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray[Any, Any] | Tensor]:
        """Generate images. No gradients are recorded.

        Args:
            prompt: what to show, in at most 20,000 characters; None if ``prompt_embeds`` are given.
            negative_prompt: what guidance steers away from: one for all prompts or one for each; None is the empty one.
            num_inference_steps: number of steps; without effect if timesteps or sigmas are given.
            timesteps, sigmas: a custom schedule, descending, for schedulers that take one.
            guidance_scale: w of classifier-free guidance (2207.12598), as in equation 2 of Imagen (2205.11487);
                1 or less means no guidance, and negative prompts then have no effect.
            num_images_per_prompt: images for each prompt; they follow each other in the result.
            height, width: in pixels; the training size by default.
            eta: η of the DDIM paper (2010.02502), from 0 to 1; for schedulers that take it.
            generator: one for the whole batch, or a list with one for each image, whose noise then does not depend
                on the batch. A CPU generator gives the same noise on every device.
            latents: noise [B, C, h, w] to start from, of variance 1; generated with ``generator`` if None.
            prompt_embeds, negative_prompt_embeds: embeddings [P, M, channels] in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks [P, M]; 1 keeps.
            output_type: "pil", "np" ([B, H, W, 3]), "pt" ([B, 3, H, W]) or "latent" ([B, C, h, w], still scaled).
            return_dict: False returns a plain tuple.
            callback: called as ``callback(step, timestep, latents)`` every ``callback_steps`` steps.
            clean_caption: clean the prompts as the training captions were cleaned.
            use_resolution_binning: generate at the nearest training size (for models of 256 to 2048, and 2880 px),
                then resize and crop the result to ``height`` x ``width``.
            max_sequence_length: tokens of a prompt, at most 4096; longer prompts are truncated, with a warning.
            callback_on_step_end: called as ``callback_on_step_end(pipe, step, timestep, tensors)`` after each step;
                the tensors that it returns replace those of the same names.
            callback_on_step_end_tensor_inputs: the names in ``tensors``: latents, and the fields of PromptEmbeds.

        Returns:
            ``.images``: P * num_images_per_prompt images.

        Raises:
            InputError: an argument cannot be used; nothing has been computed yet.
        """
        request = read_pixart(self, PromptEmbeds._fields, locals())
        self._check_conditions()
        self._warn_of_mixtures()
        with torch.no_grad(), self._calling(request.guidance_scale):
            embeds = PromptEmbeds(*self.encode_prompt(**request.texts.of_pixart))  # a subclass may return a tuple
            noise = self._noise(request, self.transformer.dtype)
            loop = self.denoise(noise, embeds, eta=request.eta, **request.denoising)
            images = self._finish(drive(self, loop, noise, request), request)
        return ImagePipelineOutput(images) if return_dict else (images,)

    # --- the three stages ---

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        **kwargs: Any,
    ) -> PromptEmbeds:
        """Turn prompts into embeddings, padded with zeros to ``max_sequence_length``.

        Gradients of the text encoder are recorded unless ``torch.no_grad()`` is active.

        Args:
            prompt: one or several; None if ``prompt_embeds`` are given.
            do_classifier_free_guidance: whether to return negative embeddings too.
            negative_prompt: one for all or one for each; None is the empty one.
            num_images_per_prompt: how often each row is repeated.
            device: of the result; the pipeline's by default.
            prompt_embeds, negative_prompt_embeds: embeddings [P, M, channels], in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks [P, M].
            clean_caption: clean the prompts as the training captions were cleaned.
            max_sequence_length: tokens of a prompt, M.

        Returns:
            embeddings [P * num_images_per_prompt, M, channels] and their mask, and the same for the negative prompts.

        Raises:
            InputError: a type or shape that cannot be used.
        """
        inputs.check_extra(kwargs, locals())
        texts = read_texts(do_classifier_free_guidance, locals())
        target = self.device if device is None else as_device(device)
        given = (texts.prompt_embeds, texts.prompt_attention_mask)
        negative = (texts.negative_prompt_embeds, texts.negative_prompt_attention_mask)
        if texts.prompts or texts.negatives:
            length = texts.length if given[0] is None else given[0].shape[1]
            count = len(texts.prompts)
            encoded = self._encode_texts([*texts.prompts, *texts.negatives], texts.clean, length, target)
            given = (encoded.embeds[:count], encoded.mask[:count]) if texts.prompts else given
            negative = (encoded.embeds[count:], encoded.mask[count:]) if texts.negatives else negative
        components = self.components
        present = [components[name] for name in ("text_encoder", "transformer") if components[name] is not None]
        dtype = present[0].dtype if present else None

        def repeated(x: Tensor | None, dtype: torch.dtype | None = None) -> Any:
            return None if x is None else x.to(target, dtype).repeat_interleave(texts.images_per_prompt, dim=0)

        return PromptEmbeds(
            repeated(given[0], dtype), repeated(given[1]), repeated(negative[0], dtype), repeated(negative[1])
        )

    def _encode_texts(self, texts: list[str], cleaned: bool, length: int, device: torch.device) -> EncodedTexts:
        texts = self._text_preprocessing(texts, clean_caption=cleaned)

        def encode(texts: list[str]) -> EncodedTexts:
            tokenizer = self._require("tokenizer")
            with self.using("text_encoder") as text_encoder:
                encoded = encode_texts(tokenizer, text_encoder, texts, length, device)
            self._check_output("text_encoder", encoded.embeds)
            return encoded

        if self.prompt_cache is None:
            return encode(texts)
        encoder, tokenizer = (self.components[name] for name in ("text_encoder", "tokenizer"))
        return self.prompt_cache.encode(texts, length, device, encoder, tokenizer, encode)

    def denoise(
        self,
        noise: Tensor,
        embeds: PromptEmbeds,
        *,
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        edit: Edit | None = None,
    ) -> Generator[DenoisingStep, None, None]:
        """The denoising loop: a generator that yields after every step. No gradients are recorded.

        The caller adds previews, progress and cancellation: it may change ``step.latents`` or ``step.embeds``, and
        stop at any step (``close()`` or drop the generator). Loops of one pipeline may take turns.

        Args:
            noise: [B, C, h, w] of variance 1.
            embeds: what ``encode_prompt`` returned, for B images. Guidance is used if it has negative embeddings and
                ``guidance_scale`` is above 1.
            num_inference_steps, timesteps, sigmas, guidance_scale, eta, generator: as in the call.
            edit: an image to start from, all or part of which is changed.
        """
        schedule, guidance_scale = read_schedule(self, locals()), inputs.guidance(guidance_scale)
        schedule = schedule if edit is None else schedule.at(edit.strength)
        options: dict[str, Any] = {"eta": eta, "generator": generator, "edit": edit}
        return denoising_steps(self, partial(self.begin, noise, embeds, schedule, guidance_scale, **options))

    def begin(
        self,
        noise: Tensor,
        embeds: PromptEmbeds,
        schedule: Schedule,
        guidance_scale: float,
        *,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        edit: Edit | None = None,
    ) -> Run:
        """The run of such a loop before its first step, for ``sampling.advance``, which takes several at a time.

        The transformer has to be in place: ``with pipe.using("transformer"):``.

        Args:
            schedule: the steps; those that an edit leaves out are left out already.
        """
        transformer, device = self._require("transformer"), self.device
        call = self._replaying(transformer)
        multiple = 1
        if call is not transformer:  # a captured CUDA graph, which serves texts of several lengths
            from .compiling import TEXT_MULTIPLE as multiple
        model = transformer
        if not takes_stages(transformer, PixArtTransformer2DModel):
            from .foreign_stages import ForeignStages

            model = call = ForeignStages(transformer, call)
        start = schedule.skipped * getattr(self.scheduler, "order", 1)
        scheduler = own_scheduler(self.scheduler, device, start, **schedule.arguments)
        latents, known = first_latents(scheduler, noise.to(device, model.dtype), edit, start)  # [B, C, h, w]
        return Run(
            self,
            transformer,
            call,
            scheduler,
            latents,
            embeds,
            guidance_scale,
            encode=partial(_encode_contexts, model, device, multiple),
            modulation=model.modulate(scheduler.timesteps.to(device), self._conditions(latents)),
            options=self.prepare_extra_step_kwargs(generator, eta),
            takes_original=self.family.single_step_takes_original and schedule.steps == 1,
            start=start,
            known=known,
        )

    # --- checks ---

    def _conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """PixArt-α's micro-conditions of an image: its size in pixels, and height / width."""
        if not (self.family.micro_conditions and self._takes_conditions()):
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        return {
            "resolution": latents.new_tensor([[height, width]], dtype=torch.float32),  # [1, 2]
            "aspect_ratio": latents.new_tensor([[height / width]], dtype=torch.float32),  # [1, 1]
        }

    def _takes_conditions(self) -> bool:
        config = self.transformer.config
        given = config.get("use_additional_conditions")
        return bool(config["sample_size"] == 128 if given is None else given)

    def _check_conditions(self) -> None:
        if self._takes_conditions() and not self.family.micro_conditions:
            raise InputError(
                "the transformer takes micro-conditions (use_additional_conditions), as PixArt-α does; "
                "use PixArtAlphaPipeline.from_pipe(pipe)"
            )

    def _warn_of_mixtures(self) -> None:
        """Warn of components that were not trained together, once for each message."""
        components = self.components
        if not hasattr(components["text_encoder"], "config"):  # a wrapper, about which nothing is known
            components["text_encoder"] = None
        for message in mixtures(components, self.family):
            if message not in self._warned:
                self._warned.add(message)
                logger.warning("%s: %s", type(self).__name__, message)


class PixArtSigmaPipeline(PixArtPipeline):
    """Text to image with PixArt-Σ: SDXL's autoencoder, 300 text tokens, up to 2048 px."""


class PixArtAlphaPipeline(PixArtPipeline):
    """Text to image with PixArt-α: Stable Diffusion's autoencoder, 120 text tokens, micro-conditions at 1024 px."""

    family = ALPHA

    __call__ = with_defaults(PixArtPipeline.__call__, max_sequence_length=120)
    encode_prompt = with_defaults(PixArtPipeline.encode_prompt, max_sequence_length=120)


def _encode_contexts(model: Any, device: torch.device, multiple: int, embeds: PromptEmbeds, guided: bool) -> list[Half]:
    """Both halves for one call: what depends only on the text is computed here, once for all steps.

    Args:
        multiple: keys and values are padded to a multiple of this number of tokens.
    """
    halves = [(embeds.prompt_embeds, embeds.prompt_attention_mask)]
    if guided:
        assert embeds.negative_prompt_embeds is not None
        assert embeds.negative_prompt_attention_mask is not None
        halves.insert(0, (embeds.negative_prompt_embeds, embeds.negative_prompt_attention_mask))
    for text, mask in halves:
        inputs.check_embeds("prompt_embeds", text, mask)
    contexts = [model.encode_context(text.to(device, model.dtype), mask.to(device)) for text, mask in halves]
    context = type(contexts[0]).concat(contexts)
    if multiple > 1 and isinstance(context, PixArtContext):
        context = context.padded(multiple)
    return [Half(len(halves), {"encoder_hidden_states": context})]
