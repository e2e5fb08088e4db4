"""PixArtAlphaPipeline (2310.00426) and PixArtSigmaPipeline (2403.04692): text to picture, in one denoising loop.

Shapes: P prompts, B pictures, C latent channels, h x w latent pixels, M text tokens.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import finite, shown, whole_number
from ..errors import InputError
from ..models.pixart import PixArtContext, PixArtTransformer2DModel
from ..nn.devices import as_device
from ..nn.noise import draw_noise
from . import inputs, limits
from .base import ImagePipelineOutput, Pipeline, unwrapped
from .compiling import TEXT_MULTIPLE
from .families import ALPHA, SIGMA, Family, mixtures
from .image import ImageProcessor
from .resolution import resize_and_crop
from .text import EncodedTexts, clean_prompt, encode_texts, normalize_caption

logger = logging.getLogger("impasto")

F = TypeVar("F", bound=Callable[..., Any])


class PromptEmbeds(NamedTuple):
    """What ``encode_prompt`` returns; a mask is 1 where there is a token. Without guidance the last two are None."""

    prompt_embeds: Tensor  # [B, M, channels]
    prompt_attention_mask: Tensor  # [B, M]
    negative_prompt_embeds: Tensor | None = None  # [B, M, channels]
    negative_prompt_attention_mask: Tensor | None = None  # [B, M]


@dataclass
class DenoisingStep:
    """One step that was taken. Who drives the loop may put other latents or other embeddings here."""

    index: int
    timestep: Tensor  # a single number
    latents: Tensor  # [B, C, h, w], after the step
    embeds: PromptEmbeds


class PixArtPipeline(Pipeline):
    """What both pipelines share; they differ by their family and by a default.

    Args:
        tokenizer, text_encoder: T5's; both may be None where embeddings are given.
        vae: the autoencoder of the latents: ours, or one that behaves like diffusers'.
        transformer: the denoiser; may be None where only prompts are encoded.
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
        factor = 8 if vae is None else _vae_scale_factor(vae)
        self.image_processor = ImageProcessor(vae_scale_factor=factor, vae_latent_channels=channels)
        self._interrupt = False
        self._warned: set[str] = set()
        self._warn_of_mixtures()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent along a side; without an autoencoder, those of the one there was, or 8."""
        vae = vars(self).get("vae")
        return int(self.image_processor.config.vae_scale_factor) if vae is None else _vae_scale_factor(vae)

    @property
    def interrupt(self) -> bool:
        """Set it to True, in a callback or from another thread, to end the loop and decode what there is."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def enable_vae_slicing(self) -> None:
        """Decode one picture of a batch at a time."""
        self._require("vae").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the whole batch at once."""
        self._require("vae").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode in parts, in less memory; exactly, with our autoencoder: without seams."""
        self._require("vae").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole pictures."""
        self._require("vae").disable_tiling()

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
        """Draw pictures. No gradients are kept.

        Args:
            prompt: what to show, in at most 20,000 characters; None where ``prompt_embeds`` are given.
            negative_prompt: what to lead away from: one for all prompts or one for each. None is the empty one.
            num_inference_steps: number of steps; without effect where timesteps or sigmas are given.
            timesteps, sigmas: a schedule of one's own, descending, for schedulers that take one.
            guidance_scale: w of classifier-free guidance (2207.12598), as in equation 2 of Imagen (2205.11487);
                1 or less is none, and then nothing negative has an effect.
            num_images_per_prompt: pictures of each prompt; they follow each other.
            height, width: in pixels; those of the training by default.
            eta: of the DDIM paper (2010.02502), from 0 to 1; for schedulers that take it.
            generator: one for a draw over the batch, or a list with one for each picture, whose noise then does
                not depend on the batch. A generator of the CPU gives the same on every device.
            latents: noise [B, C, h, w] to start from, of variance 1; drawn by ``generator`` if None.
            prompt_embeds, negative_prompt_embeds: embeddings [P, M, channels] in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks [P, M]; 1 keeps.
            output_type: "pil", "np" ([B, H, W, 3]), "pt" ([B, 3, H, W]) or "latent" ([B, C, h, w], still scaled).
            return_dict: False returns a plain tuple.
            callback: called as ``callback(step, timestep, latents)`` every ``callback_steps`` steps.
            clean_caption: remove from the prompts what was removed from the captions of the training.
            use_resolution_binning: draw at the nearest size of the training (for models of 256, 512, 1024 and
                2048 px) and bring the result to ``height`` x ``width``.
            max_sequence_length: tokens of a prompt, at most 4096; what goes beyond is cut off, with a warning.
            callback_on_step_end: called as ``callback_on_step_end(pipe, step, timestep, tensors)`` after each step;
                what it returns under the names of ``tensors`` takes their place.
            callback_on_step_end_tensor_inputs: the names in ``tensors``: latents, and the fields of PromptEmbeds.

        Returns:
            ``.images``: P * num_images_per_prompt pictures.

        Raises:
            InputError: an argument that cannot be used; nothing has been computed then.
        """
        inputs.check_extra(kwargs)
        transformer = self._require("transformer")
        prompts = inputs.count_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        images_per_prompt, batch = inputs.count_images(prompts, num_images_per_prompt)
        guidance_scale = inputs.guidance(guidance_scale)
        guided = guidance_scale > 1.0
        finite("eta", eta, 0.0, 1.0)
        whole_number("callback_steps", callback_steps)
        whole_number("max_sequence_length", max_sequence_length, most=limits.TOKENS)
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be a function, not {shown(callback)}")
        names = callback_on_step_end_tensor_inputs
        wanted = inputs.check_result(output_type, callback_on_step_end, names, PromptEmbeds._fields)
        generator = inputs.check_generator(generator, batch)
        steps = inputs.count_steps(self._require("scheduler"), num_inference_steps, timesteps, sigmas)
        canvas = inputs.plan_canvas(
            height,
            width,
            base=transformer.config["sample_size"] * self.vae_scale_factor,
            unit=transformer.config["patch_size"] * self.vae_scale_factor,
            binning=use_resolution_binning,
        )
        channels, factor = transformer.config["in_channels"], self.vae_scale_factor
        shape = (batch, channels, canvas.height // factor, canvas.width // factor)
        if latents is not None:
            of = f", of images generated at {canvas.height} x {canvas.width} pixels (give height and width, or "
            inputs.check_tensor("latents", latents, shape, f"{of}use_resolution_binning=False)")
        if output_type != "latent":
            self._require("vae")
        inputs.check_text_width(
            transformer.config,
            [x for x in (prompt_embeds, negative_prompt_embeds if guided else None) if x is not None],
            self.components,
            encoder_needed=(prompt is not None or (guided and negative_prompt_embeds is None))
            and (self.prompt_cache is None or self.components["text_encoder"] is not None),
        )
        self._check_conditions()
        self._warn_of_mixtures()

        self._interrupt = False
        with torch.no_grad():
            embeds = self.encode_prompt(
                cast(Any, prompt),
                guided,
                negative_prompt=negative_prompt,
                num_images_per_prompt=images_per_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                clean_caption=clean_caption,
                max_sequence_length=max_sequence_length,
            )
            if latents is None:
                latents = draw_noise(shape, generator, self.device, transformer.dtype)
            loop = self.denoise(
                latents,
                embeds,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                eta=eta,
                generator=generator,
            )
            order = getattr(self.scheduler, "order", 1)
            with self.progress_bar(total=steps) as progress, closing(loop):
                for step in loop:
                    if callback_on_step_end is not None:
                        inputs.call_back(self, step, callback_on_step_end, wanted)
                        self._check_packed_weights()
                    latents = step.latents
                    total = len(self.scheduler.timesteps)
                    warm_up = max(total - steps * order, 0)  # calls before the first whole step (PNDM has some)
                    done = step.index + 1
                    if done == total or (done > warm_up and done % order == 0):
                        progress.update()
                        if callback is not None and step.index % callback_steps == 0:
                            callback(step.index // order, step.timestep, latents)
                    if self._interrupt:
                        break
            self._check_output("transformer", latents)

            images: list[Image.Image] | np.ndarray[Any, Any] | Tensor = latents
            if output_type != "latent":
                decoded = self.decode(latents)  # [B, 3, H, W]
                self._check_output("vae", decoded)
                if (canvas.final_height, canvas.final_width) != (canvas.height, canvas.width):
                    decoded = resize_and_crop(decoded, canvas.final_height, canvas.final_width)
                images = self.image_processor.postprocess(decoded, output_type=output_type)
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

        Gradients of the text encoder are recorded, unless under ``torch.no_grad()``.

        Args:
            prompt: one or several; None where ``prompt_embeds`` are given.
            do_classifier_free_guidance: whether the negative half is wanted.
            negative_prompt: one for all or one for each; None is the empty one.
            num_images_per_prompt: how often each row is repeated.
            device: of the result; that of the pipeline by default.
            prompt_embeds, negative_prompt_embeds: given embeddings [P, M, channels], in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks [P, M].
            clean_caption: remove from the prompts what was removed from the captions of the training.
            max_sequence_length: tokens of a prompt, M.

        Returns:
            embeddings [P * num_images_per_prompt, M, channels], their mask, and both of the negative prompts.

        Raises:
            InputError: a kind or shape that cannot be used.
        """
        inputs.check_extra(kwargs)
        count = inputs.count_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        length = whole_number("max_sequence_length", max_sequence_length, most=limits.TOKENS)
        images_per_prompt, _ = inputs.count_images(count, num_images_per_prompt)
        target = self.device if device is None else as_device(device)
        negative_texts: list[str] = []
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_texts = inputs.list_of_texts("negative_prompt", negative_prompt or "", count)
        texts = [] if prompt is None else inputs.list_of_texts("prompt", prompt)
        if texts or negative_texts:
            if prompt_embeds is not None:
                length = prompt_embeds.shape[1]
            encoded = self._encode([*texts, *negative_texts], clean_caption, length, target)
            if texts:
                prompt_embeds, prompt_attention_mask = (x[: len(texts)] for x in encoded)
            if negative_texts:
                negative_prompt_embeds, negative_prompt_attention_mask = (x[len(texts) :] for x in encoded)

        parts = self.components
        dtype = next((parts[name].dtype for name in ("text_encoder", "transformer") if parts[name] is not None), None)

        def repeated(x: Tensor | None, dtype: torch.dtype | None) -> Any:
            return None if x is None else x.to(device=target, dtype=dtype).repeat_interleave(images_per_prompt, dim=0)

        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        return PromptEmbeds(
            repeated(prompt_embeds, dtype),
            repeated(prompt_attention_mask, None),
            repeated(negative_prompt_embeds, dtype),
            repeated(negative_prompt_attention_mask, None),
        )

    def _encode(self, texts: list[str], cleaned: bool, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        texts = [clean_prompt(text) if cleaned else normalize_caption(text) for text in texts]

        def encode(texts: list[str]) -> EncodedTexts:
            tokenizer = self._require("tokenizer")
            with self.using("text_encoder") as text_encoder:
                encoded = encode_texts(tokenizer, text_encoder, texts, length, device)
            self._check_output("text_encoder", encoded.embeds)
            return encoded

        if self.prompt_cache is None:
            return encode(texts)
        encoder, tokenizer = (self.components[name] for name in ("text_encoder", "tokenizer"))
        dtype = None if encoder is None else self.computing_dtype("text_encoder")
        return self.prompt_cache.encode(texts, length, device, encoder, tokenizer, dtype, encode)

    @torch.no_grad()
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
    ) -> Generator[DenoisingStep, None, None]:
        """The denoising loop: yields after every step, for whoever drives it.

        Previews, progress and cancellation are the driver's: it may change ``step.latents`` or ``step.embeds``, and
        stop at any step (``close()`` the generator, or let it go).

        Args:
            noise: [B, C, h, w] of variance 1.
            embeds: what ``encode_prompt`` returned, for B pictures. There is guidance where it has negative ones and
                ``guidance_scale`` is above 1.
            num_inference_steps, timesteps, sigmas, guidance_scale, eta, generator: as in the call.
        """
        steps = inputs.count_steps(self._require("scheduler"), num_inference_steps, timesteps, sigmas)
        guidance_scale = inputs.guidance(guidance_scale)
        scheduler = self.scheduler
        with self.using("transformer") as transformer:
            device, dtype = self.device, transformer.dtype
            if timesteps is None and sigmas is None:
                scheduler.set_timesteps(steps, device=device)
            else:
                custom = {"timesteps": timesteps, "sigmas": sigmas}
                scheduler.set_timesteps(device=device, **{k: v for k, v in custom.items() if v is not None})
                steps = len(scheduler.timesteps)
            options = _step_options(scheduler, eta=eta, generator=generator)
            begin = getattr(scheduler, "set_begin_index", None)
            if begin is not None:  # otherwise looked up, which is ambiguous where timesteps repeat
                begin(0)

            guided = guidance_scale > 1.0 and embeds.negative_prompt_embeds is not None
            latents = noise.to(device, dtype) * scheduler.init_noise_sigma  # [B, C, h, w]
            channels = latents.shape[1]
            conditions = self._conditions(latents)
            scales = self.guidance_of_steps(scheduler.timesteps, guidance_scale)
            texts: dict[bool, dict[str, Any]] = {}  # by whether the negative half is in it
            times = _prepare_timesteps(transformer, scheduler.timesteps, conditions, device)
            call = self._replaying(transformer)
            for i, t in enumerate(scheduler.timesteps):
                guides = guided and scales[i] > 1.0
                if guides not in texts:
                    multiple = 1 if call is transformer else TEXT_MULTIPLE
                    texts[guides] = _prepare_text(transformer, embeds, guides, device, dtype, multiple)
                x = torch.cat([latents, latents]) if guides else latents
                x = scheduler.scale_model_input(x, t)
                predicted = call(x, **texts[guides], **times(i, x.shape[0]), return_dict=False)[0]
                predicted = predicted[:, :channels]  # the rest is a learned variance
                if transformer is not unwrapped(
                    transformer
                ):  # a graph of torch.compile's may write its next output in its place
                    predicted = predicted.clone()
                if guides:
                    unconditional, conditional = predicted.chunk(2)
                    predicted = unconditional + scales[i] * (conditional - unconditional)
                result = scheduler.step(predicted, t, latents, **options, return_dict=False)
                original = self.family.single_step_takes_original and steps == 1 and len(result) > 1
                latents = result[1 if original else 0]

                step = DenoisingStep(i, t, latents, embeds)
                yield step
                latents = step.latents
                if step.embeds is not embeds:
                    embeds = step.embeds
                    texts.clear()

    def guidance_of_steps(self, timesteps: Tensor, scale: float) -> list[float]:
        """The guidance scale of each step, of which 1 or less leaves the negative half out.

        ``impasto.transforms.guidance_interval`` puts another function in its place.
        """
        return [scale] * len(timesteps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], as the loop yields them, to pictures [B, 3, H, W] in about [-1, 1]."""
        with self.using_vae() as (vae, dtype):
            config = vae.config
            z = latents.to(self.device, dtype)
            z = z / config.get("scaling_factor", 1.0)
            if config.get("latents_mean") is not None and config.get("latents_std") is not None:
                mean, std = (z.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
                z = z * std + mean
            elif config.get("shift_factor") is not None:
                z = z + config["shift_factor"]
            return cast(Tensor, vae.decode(z, return_dict=False)[0])

    # --- checks ---

    def _conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """α's micro-conditions of a picture: its size in pixels, and height / width."""
        if not (self.family.micro_conditions and self._takes_conditions()):
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        return {
            "resolution": latents.new_tensor([[height, width]], dtype=torch.float32),  # [1, 2]
            "aspect_ratio": latents.new_tensor([[height / width]], dtype=torch.float32),  # [1, 1]
        }

    def _takes_conditions(self) -> bool:
        return bool(unwrapped(self.transformer).use_additional_conditions)

    def _check_conditions(self) -> None:
        if self._takes_conditions() and not self.family.micro_conditions:
            raise InputError(
                "the transformer takes micro-conditions (use_additional_conditions), which is α's; "
                "use PixArtAlphaPipeline.from_pipe(pipe)"
            )

    def _warn_of_mixtures(self) -> None:
        """Name parts that were not trained together; once each."""
        for message in mixtures(self.components, self.family):
            if message not in self._warned:
                self._warned.add(message)
                logger.warning("%s: %s", type(self).__name__, message)


def _with_defaults(method: F, **defaults: Any) -> F:
    """The same method with other default values."""
    plain = cast(FunctionType, method)
    values = [
        defaults.get(name, parameter.default)
        for name, parameter in inspect.signature(plain).parameters.items()
        if parameter.default is not parameter.empty
    ]
    copy = FunctionType(plain.__code__, plain.__globals__, plain.__name__, tuple(values), plain.__closure__)
    copy.__doc__, copy.__annotations__ = plain.__doc__, plain.__annotations__
    copy.__qualname__, copy.__module__ = plain.__qualname__, plain.__module__
    return cast(F, copy)


class PixArtSigmaPipeline(PixArtPipeline):
    """Text to picture with PixArt-Σ: SDXL's autoencoder, 300 text tokens, up to 2048 px."""


class PixArtAlphaPipeline(PixArtPipeline):
    """Text to picture with PixArt-α: Stable Diffusion's autoencoder, 120 text tokens, micro-conditions at 1024 px."""

    family = ALPHA

    __call__ = _with_defaults(PixArtPipeline.__call__, max_sequence_length=120)
    encode_prompt = _with_defaults(PixArtPipeline.encode_prompt, max_sequence_length=120)


def _vae_scale_factor(vae: Any) -> int:
    levels = vae.config.get("block_out_channels")
    return 8 if levels is None else int(2 ** (len(levels) - 1))


def _step_options(scheduler: Any, **options: Any) -> dict[str, Any]:
    """Those options that the scheduler's ``step`` takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in accepted}


def _is_staged(transformer: Any) -> bool:
    return isinstance(unwrapped(transformer), PixArtTransformer2DModel)


def _prepare_text(
    transformer: Any, embeds: PromptEmbeds, guided: bool, device: torch.device, dtype: torch.dtype, multiple: int
) -> dict[str, Any]:
    """The text arguments of the transformer, for all steps: what does not change is computed here, once.

    Keys and values are padded to a multiple of tokens where that is above 1.
    """
    halves = [(embeds.prompt_embeds, embeds.prompt_attention_mask)]
    if guided:
        assert embeds.negative_prompt_embeds is not None
        assert embeds.negative_prompt_attention_mask is not None
        halves.insert(0, (embeds.negative_prompt_embeds, embeds.negative_prompt_attention_mask))
    for text, mask in halves:
        inputs.check_embeds("prompt_embeds", text, mask)
    halves = [(text.to(device, dtype), mask.to(device)) for text, mask in halves]
    if _is_staged(transformer):
        context = PixArtContext.concat([transformer.encode_context(text, mask) for text, mask in halves])
        return {"encoder_hidden_states": context if multiple == 1 else context.padded(multiple)}
    return {
        "encoder_hidden_states": torch.cat([text for text, _ in halves]),
        "encoder_attention_mask": torch.cat([mask for _, mask in halves]),
    }


def _prepare_timesteps(
    transformer: Any, timesteps: Tensor, conditions: dict[str, Tensor | None], device: torch.device
) -> Callable[[int, int], dict[str, Any]]:
    """A function of a step's index and the batch, to the arguments of the transformer that say which step it is."""
    timesteps = timesteps.to(device)
    if _is_staged(transformer):
        modulation = transformer.modulate(timesteps, conditions)  # of all steps at once
        return lambda i, batch: {"timestep": modulation.select(slice(i, i + 1))}

    def plain(i: int, batch: int) -> dict[str, Any]:
        rows = {name: None if x is None else x.expand(batch, -1) for name, x in conditions.items()}
        return {"timestep": timesteps[i].expand(batch), "added_cond_kwargs": rows}

    return plain
