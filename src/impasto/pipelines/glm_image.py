"""GlmImagePipeline: text and reference images to picture, by GLM-Image's prior, glyphs and denoiser.

Shapes: P prompts, B pictures, C latent channels, h x w latent pixels, M text tokens, N image tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import shown, whole_number
from ..errors import InputError
from ..models.glm_image import GlmImageContext, GlmImageReferences, GlmImageTransformer2DModel
from ..nn.devices import as_device, check_device
from ..nn.module import parse_dtype
from ..nn.noise import draw_noise
from . import inputs, limits
from .base import ImagePipelineOutput, Pipeline
from .glm_image_inputs import check_sides, check_widths, given_prior, images_of_prompts, plan_size, read_prompts
from .glm_image_prior import PriorTokens, generate_prior, reference_picture, tokens_to_generate
from .glyphs import encode_glyphs, most_tokens
from .image import ImageProcessor
from .moving import unwrapped
from .placement import OneAtATime, check_dtype
from .text import EncodedTexts


class GlyphEmbeds(NamedTuple):
    """What ``encode_prompt`` returns. A token of zeros alone is padding and does not count."""

    prompt_embeds: Tensor  # [B, M, channels]
    negative_prompt_embeds: Tensor | None = None  # [B, M, channels]


@dataclass
class GlmDenoisingStep:
    """One step that was taken. Who drives the loop may put other latents or other embeddings here."""

    index: int
    timestep: Tensor  # a single number
    latents: Tensor  # [B, C, h, w], after the step
    embeds: GlyphEmbeds


class GlmImagePipeline(Pipeline):
    """Text to picture and pictures to picture.

    Args:
        tokenizer, text_encoder: the glyphs' byte-level T5; may be None where embeddings are given.
        processor, vision_language_encoder: the prior and its inputs; may be None where its tokens are given.
        vae: the autoencoder of the latents.
        transformer: the denoiser.
        scheduler: the solver: ours, or one that behaves like diffusers' ``FlowMatchEulerDiscreteScheduler``.
    """

    #: Each token of the prior needs all of its blocks.
    never_in_blocks: ClassVar[tuple[str, ...]] = ("vision_language_encoder",)

    tokenizer: Any
    processor: Any
    text_encoder: Any
    vision_language_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        text_encoder: Any,
        vision_language_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
    ):
        super().__init__(
            tokenizer=tokenizer,
            processor=processor,
            text_encoder=text_encoder,
            vision_language_encoder=vision_language_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        levels = 4 if vae is None else len(vae.config.get("block_out_channels", [0] * 4))
        self.vae_scale_factor = 2 ** (levels - 1)
        self.image_processor = ImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.interrupt = False

    @property
    def default_sample_size(self) -> int:
        """The side of the latents that are drawn where nothing tells a size."""
        return 128 if self.transformer is None else int(self.transformer.config.get("sample_size", 128))

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """As for every pipeline; a transformer of diffusers becomes ours, with the same weights in memory."""
        theirs = unwrapped(options.get("transformer", pipeline.components.get("transformer")))
        if theirs is not None and not isinstance(theirs, GlmImageTransformer2DModel):
            with torch.device("meta"):
                ours = GlmImageTransformer2DModel.from_config(theirs.config)
            ours.load_state_dict(theirs.state_dict(), assign=True)
            options["transformer"] = ours.train(theirs.training)
        return super().from_pipe(pipeline, **options)

    def to(self, *args: Any, device: torch.device | str | int | None = None, **options: Any) -> Self:
        """As for every pipeline; but on an accelerator the parts take turns, for together they are too large for most.

        After ``pipe.to("cuda")`` the parts are in the memory of the CPU, and each is on the device while it is used:
        ``enable_model_cpu_offload``. Where there is room for all, ``from_pretrained(..., device_map="cuda")`` keeps
        them there.
        """
        devices = [arg for arg in (*args, device) if isinstance(arg, str | int | torch.device)]
        target = as_device(devices[0]) if len(devices) == 1 else None
        if target is None or target.type == "cpu":
            return super().to(*args, device=device, **options)
        check_device(target)
        others = [arg for arg in args if arg not in devices]
        for dtype in (*others, options.get("dtype")):
            check_dtype(parse_dtype(dtype), target)
        super().to("cpu", *others, **options)
        self._offload(OneAtATime(target))
        return self

    # --- the call ---

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prior_token_ids: Tensor | None = None,
        prior_token_image_ids: list[Tensor] | None = None,
        source_image_grid_thw: list[Tensor] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 2048,
        negative_prompt: str | list[str] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw.

        Args:
            prompt: one or several. What stands in quotes is written in the picture. ``<sop>H W<eop>`` in it asks for
                a picture of 32 H x 32 W pixels, where height and width do not.
            image: images that the picture refers to: one, or a list for one prompt; a list of lists of equal length
                for several.
            height, width: in pixels, multiples of 32. If None, from the prompt, the first image, or the model.
            num_inference_steps: how many steps.
            timesteps, sigmas: given instead of the scheduler's own, descending.
            guidance_scale: how much more than without the prompt; 1 or less leaves that out.
            num_images_per_prompt: pictures of each prompt.
            generator: one, or one for each picture.
            latents: [B, C, h, w], the noise.
            prompt_embeds, negative_prompt_embeds: [P, M, channels], in place of glyphs; tokens of zeros are padding.
            prior_token_ids: [P, N] or [B, N], in place of the prior's: one for each 16 x 16 pixels, row by row.
            prior_token_image_ids, source_image_grid_thw: for each prompt, those of its images, one after the other, and
                the rows and columns of each ([images, 3], the first number is 1).
            crops_coords_top_left: where the picture begins in what it is a part of.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            attention_kwargs: accepted as documented; attention takes none.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; returns those
                that it changes.
            callback_on_step_end_tensor_inputs: which: latents, prompt_embeds, negative_prompt_embeds; a callback that
                has ``tensor_inputs`` says so itself.
            max_sequence_length: bytes of one text in quotes, at most 4096.
            negative_prompt: whose glyphs to keep away from; none by default.

        Raises:
            InputError: what cannot be used, and what could.
        """
        self.interrupt = False
        names = callback_on_step_end_tensor_inputs
        wanted = inputs.check_result(output_type, callback_on_step_end, names, GlyphEmbeds._fields)
        if not isinstance(attention_kwargs, Mapping | None) or {*(attention_kwargs or ())} - {"scale"}:
            raise InputError(f"attention_kwargs must be None, as attention takes none, not {shown(attention_kwargs)}")
        prompts, count = read_prompts(prompt, prompt_embeds)
        images = images_of_prompts(image, count)
        default = self.default_sample_size * self.vae_scale_factor
        texts, height, width = plan_size(prompts, height, width, images, default)
        height, width = int(height), int(width)  # NumPy's numbers are checked as whole ones, and stay what they were
        per_prompt, batch = inputs.count_images(count, num_images_per_prompt)
        generators = inputs.check_generator(generator, batch)
        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        shape = (batch, self._require("transformer").config["in_channels"], rows, columns)
        if latents is not None:
            inputs.check_tensor("latents", latents, shape, f", for images of {height} x {width} pixels")
        guided = inputs.guidance(guidance_scale) > 1.0
        crops_coords_top_left = inputs.corner(crops_coords_top_left)
        whole_number("max_sequence_length", max_sequence_length, most=limits.TOKENS)
        steps = inputs.count_steps(self._require("scheduler"), num_inference_steps, timesteps, sigmas, both=True)
        if negative_prompt is not None:
            inputs.list_of_texts("negative_prompt", negative_prompt, count)
        if output_type != "latent" or images is not None:
            self._require("vae")
        if prompts or negative_prompt_embeds is None:
            self._require("tokenizer")
            if self.prompt_cache is None:
                self._require("text_encoder")

        def encoded() -> GlyphEmbeds:  # before the prior, which takes long
            return self.encode_prompt(
                texts or None,
                guided,
                per_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                max_sequence_length=max_sequence_length,
                negative_prompt=negative_prompt,
            )

        if prior_token_ids is None:
            if prior_token_image_ids is not None or source_image_grid_thw is not None:
                raise InputError(
                    "prior_token_image_ids and source_image_grid_thw belong to prior_token_ids: give those too, or none"
                )
            if not prompts:
                raise InputError("the prior needs a prompt to read: give prompt, or prior_token_ids with prompt_embeds")
            images = None if images is None else [[reference_picture(one) for one in row] for row in images]
            embeds = encoded()
            prior = self.generate_prior_tokens(texts, height, width, images, None, generators, per_prompt)
        else:
            given = (prior_token_ids, prior_token_image_ids, source_image_grid_thw)
            tokens = rows * columns // self.transformer.config["patch_size"] ** 2
            prior = given_prior(*given, images, batch, per_prompt, tokens, self._codebook_size())
            embeds = encoded()
        noise = draw_noise(shape, generators, self.device, torch.float32) if latents is None else latents
        references = self.encode_references(images, prior)
        loop = self.denoise(
            noise,
            embeds,
            prior.prior_token_ids,
            references,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            generator=generators,
            crops_coords_top_left=crops_coords_top_left,
        )
        latents = noise
        with self.progress_bar(total=steps) as progress, closing(loop):
            for step in loop if not self.interrupt else ():
                if callback_on_step_end is not None:
                    inputs.call_back(self, step, callback_on_step_end, wanted)
                    self._check_packed_weights()
                latents = step.latents
                progress.update()
                if self.interrupt:
                    break
        self._check_output("transformer", latents)
        result: list[Image.Image] | np.ndarray[Any, Any] | Tensor = latents
        if output_type != "latent":
            decoded = self.decode(latents)  # [B, 3, H, W]
            self._check_output("vae", decoded)
            result = self.image_processor.postprocess(decoded, output_type=output_type)
        return ImagePipelineOutput(result) if return_dict else (result,)

    # --- the stages ---

    @torch.no_grad()
    def generate_prior_tokens(
        self,
        prompt: str | list[str],
        height: int,
        width: int,
        image: Any = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
    ) -> PriorTokens:
        """Let the prior say what the pictures show. No global random state is read or changed.

        Args:
            prompt: one or several.
            height, width: in pixels, multiples of 32.
            image: as the call takes it: for each prompt, the images that its picture refers to.
            device: of the result; that of the pipeline by default.
            generator: one for all pictures, one after the other, or one for each.
            num_images_per_prompt: pictures of each prompt, each with tokens of its own.

        Returns:
            tokens [B, N] of the transformer's grid; with images also theirs, in what the call takes.

        Raises:
            InputError: what cannot be used, and what could.
        """
        processor = self._require("processor")
        prompts = inputs.list_of_texts("prompt", prompt)
        height, width = whole_number("height", height), whole_number("width", width)
        check_sides(height, width)
        num_images_per_prompt, batch = inputs.count_images(len(prompts), num_images_per_prompt)
        images = images_of_prompts(image, len(prompts))
        images = None if images is None else [[reference_picture(one) for one in row] for row in images]
        generators = inputs.check_generator(generator, batch)
        total = batch * tokens_to_generate(height, width, images is not None)
        with self.using("vision_language_encoder") as model, self.progress_bar(total=total) as progress:

            def goes_on(done: int) -> bool:
                progress.update(done - progress.n)
                return not self.interrupt

            prior = generate_prior(
                model,
                processor,
                prompts,
                (height, width),
                images,
                generators,
                num_images_per_prompt,
                self._codebook_size(),
                goes_on,
                packed=self.plan is None,
                check=partial(self._check_output, "vision_language_encoder"),
            )
        target = self.device if device is None else as_device(device)
        return prior._replace(prior_token_ids=prior.prior_token_ids.to(target))

    def _codebook_size(self) -> int:
        transformer = self._require("transformer")
        return int(transformer.config["prior_vq_quantizer_codebook_size"])

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int = 2048,
        negative_prompt: str | list[str] | None = None,
    ) -> GlyphEmbeds:
        """Embed the letters of what stands in quotes.

        Args:
            prompt: one or several; None where ``prompt_embeds`` are given.
            do_classifier_free_guidance: whether the negative half is wanted.
            num_images_per_prompt: how often each row is repeated.
            prompt_embeds, negative_prompt_embeds: [P, M, channels], in place of texts.
            device, dtype: of the result; by default those of the pipeline.
            max_sequence_length: bytes of one text.
            negative_prompt: one for all or one for each; None is the empty one.

        Returns:
            [P * num_images_per_prompt, M, channels] each, padded behind with zeros.
        """
        length = whole_number("max_sequence_length", max_sequence_length, most=limits.TOKENS)
        prompts, count = read_prompts(prompt, prompt_embeds)
        wanted = list(prompts)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            wanted += inputs.list_of_texts("negative_prompt", negative_prompt or "", count)
        elif negative_prompt and negative_prompt_embeds is not None:
            raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
        check_widths(prompt_embeds, negative_prompt_embeds, count, self.components["transformer"])
        num_images_per_prompt, _ = inputs.count_images(count, num_images_per_prompt)
        target = self.device if device is None else as_device(device)
        if wanted:
            embeds, mask = self._encode_glyphs(wanted, length)
            halves = [_cut(embeds, mask, 0, len(prompts)), _cut(embeds, mask, len(prompts), len(wanted))]
            prompt_embeds = halves[0] if prompts else prompt_embeds
            negative_prompt_embeds = halves[1] if len(wanted) > len(prompts) else negative_prompt_embeds
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        to = self.dtype if dtype is None else dtype

        def repeated(x: Tensor) -> Tensor:
            return x.to(target, to).repeat_interleave(num_images_per_prompt, dim=0)

        assert prompt_embeds is not None
        negative = None if negative_prompt_embeds is None else repeated(negative_prompt_embeds)
        return GlyphEmbeds(repeated(prompt_embeds), negative)

    def _encode_glyphs(self, texts: list[str], length: int) -> EncodedTexts:
        """Embeddings [B, M, channels] and mask [B, M] of the texts in quotes, of at most so many bytes each."""
        tokenizer = self._require("tokenizer")

        def encode(some: list[str]) -> EncodedTexts:
            with self.using("text_encoder") as text_encoder:
                encoded = EncodedTexts(*encode_glyphs(tokenizer, text_encoder, some, length, self.device))
            self._check_output("text_encoder", encoded.embeds)
            return encoded

        if self.prompt_cache is None:
            return encode(texts)
        encoder = self.components["text_encoder"]
        dtype = None if encoder is None else self.computing_dtype("text_encoder")
        kept = {}
        with nullcontext() if encoder is None else self.using("text_encoder"):  # once for all
            for text in dict.fromkeys(texts):
                most = most_tokens(text, length)
                kept[text] = self.prompt_cache.encode([text], most, self.device, encoder, tokenizer, dtype, encode)
        join = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return EncodedTexts(
            embeds=join([kept[text].embeds[0] for text in texts]),
            mask=join([kept[text].mask[0] for text in texts]),
        )

    @torch.no_grad()
    def encode_references(
        self, images: Sequence[Sequence[Any]] | None, prior: PriorTokens
    ) -> GlmImageReferences | None:
        """The keys and values of the images that pictures refer to, P rows; None where there are none."""
        if images is None or prior.prior_token_image_ids is None or prior.source_image_grid_thw is None:
            return None
        rows = []
        for of_prompt, ids, grids in zip(images, prior.prior_token_image_ids, prior.source_image_grid_thw, strict=True):
            parts = []
            each = ids.to(self.device).flatten().split(grids.prod(dim=-1).tolist())
            for image, tokens, (_, high, wide) in zip(of_prompt, each, grids.tolist(), strict=True):
                parts.append(self._encode_reference(image, tokens, high, wide))
            rows.append(GlmImageReferences.one_after_another(parts))
        return GlmImageReferences.concat(rows)

    def _encode_reference(self, image: Any, tokens: Tensor, rows: int, columns: int) -> GlmImageReferences:
        transformer = self._require("transformer")
        unit = self.vae_scale_factor * transformer.config["patch_size"]
        pixels = self.image_processor.preprocess(image, height=rows * unit, width=columns * unit)  # [1, 3, H, W]
        with self.using_vae() as (vae, dtype):
            z = vae.encode(pixels.to(self.device, dtype)).latent_dist.mode()
            mean, std = self._statistics(z)
            latents = (z - mean) / std
        with self.using("transformer") as transformer:
            latents = latents.to(self.device, transformer.dtype)
            none = latents.new_zeros(1, 0, transformer.config["text_embed_dim"])
            context = transformer.encode_context(none, None, tokens, None, *latents.shape[-2:])
            size = latents.new_tensor([pixels.shape[-2:]], dtype=torch.float32)
            modulation = transformer.modulate(size.new_zeros(1), size, torch.zeros_like(size))
            references: GlmImageReferences = transformer.encode_references(latents, context, modulation)
        return references

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        embeds: GlyphEmbeds,
        prior_token_ids: Tensor,
        references: GlmImageReferences | None = None,
        *,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
    ) -> Generator[GlmDenoisingStep, None, None]:
        """The denoising loop: yields after every step, for whoever drives it.

        Args:
            noise: [B, C, h, w] of variance 1.
            embeds: what ``encode_prompt`` returned, for B pictures. There is guidance where it has negative ones and
                ``guidance_scale`` is above 1.
            prior_token_ids: [B, N].
            references: what ``encode_references`` returned, of as many rows as divide B.
            num_inference_steps, timesteps, sigmas, guidance_scale, generator, crops_coords_top_left: as in the call.
        """
        scheduler = self._require("scheduler")
        guidance_scale = inputs.guidance(guidance_scale)
        with self.using("transformer") as transformer:
            device, dtype = self.device, transformer.dtype
            batch, _, rows, columns = noise.shape
            tokens = rows * columns // transformer.config["patch_size"] ** 2
            self._set_timesteps(num_inference_steps, timesteps, sigmas, tokens)
            size = torch.tensor([[rows * self.vae_scale_factor, columns * self.vae_scale_factor]], device=device)
            crop = torch.tensor([crops_coords_top_left], device=device)
            # Timesteps are counted from 0 by the model, and from 1 by the schedule.
            modulation = transformer.modulate(scheduler.timesteps.to(device) - 1, size.float(), crop.float())

            guided = guidance_scale > 1.0 and embeds.negative_prompt_embeds is not None
            prior = prior_token_ids.to(device)
            step_options = inspect.signature(scheduler.step).parameters
            options = {"generator": generator} if "generator" in step_options else {}
            latents = noise.to(device, torch.float32)  # [B, C, h, w]
            call = self._replaying(transformer)
            halves: list[Any] = []
            for i, t in enumerate(scheduler.timesteps):
                halves = halves or _halves(transformer, embeds, prior, references, guided, rows, columns, device, dtype)
                x = latents.to(dtype)
                rest = {"timestep": modulation.select(slice(i, i + 1)), "return_dict": False}
                predicted = [
                    call(
                        torch.cat([x] * (context.rows // batch)), encoder_hidden_states=context, kv_caches=seen, **rest
                    )[0]
                    for context, seen in halves
                ]
                velocity = torch.cat(predicted).float()  # [B or 2 B, C, h, w]
                if guided:
                    unconditional, conditional = velocity.chunk(2)
                    velocity = unconditional + guidance_scale * (conditional - unconditional)
                latents = scheduler.step(velocity, t, latents, **options, return_dict=False)[0]
                step = GlmDenoisingStep(i, t, latents, embeds)
                yield step
                latents = step.latents
                if step.embeds is not embeds:
                    embeds, halves = step.embeds, []

    def _set_timesteps(
        self, steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, tokens: int
    ) -> None:
        """GLM-Image's schedule: whole timesteps that are not shifted, and levels of noise that are, by the size."""
        config = self.scheduler.config
        total = config["num_train_timesteps"]
        count = inputs.count_steps(self.scheduler, steps, timesteps, sigmas, both=True)
        evenly = np.linspace(total, 1.0, count + 1)[:-1]
        times = np.asarray(evenly if timesteps is None else timesteps).astype(np.int64).astype(np.float32)
        levels = times / total if sigmas is None else np.asarray(sigmas, dtype=np.float32)
        base = config.get("base_image_seq_len", 256)
        mu = config.get("max_shift", 0.75) * (tokens / base) ** 0.5 + config.get("base_shift", 0.25)
        given = {"timesteps": times.tolist(), "sigmas": levels.tolist(), "mu": mu}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if "sigmas" not in accepted:
            raise InputError(
                f"{type(self.scheduler).__name__} takes no sigmas, which GLM-Image's schedule is made of; use "
                f"FlowMatchEulerDiscreteScheduler"
            )
        self.scheduler.set_timesteps(device=self.device, **{k: v for k, v in given.items() if k in accepted})
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], as the loop yields them, to pictures [B, 3, H, W] in about [-1, 1]."""
        with self.using_vae() as (vae, dtype):
            z = latents.to(self.device, dtype)
            mean, std = self._statistics(z)
            pictures: Tensor = vae.decode(z * std + mean, return_dict=False)[0]
        return pictures

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, [C, 1, 1] each."""
        config = self.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        channels = z.shape[1]
        pair = ([0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std)
        return z.new_tensor(pair[0])[:, None, None], z.new_tensor(pair[1])[:, None, None]


def _cut(embeds: Tensor, mask: Tensor, start: int, end: int) -> Tensor:
    """Some rows of a batch, without the columns in which they all have padding."""
    return embeds[start:end, : int(mask[start:end].sum(dim=1).max())] if end > start else embeds[:0]


def _mask_of(embeds: Tensor) -> Tensor | None:
    """[B, M], true for tokens that are not all zeros; None where all count, as in a row that has nothing else."""
    keep = embeds.any(dim=-1)  # [B, M]
    keep |= ~keep.any(dim=1, keepdim=True)
    return None if bool(keep.all()) else keep


def _halves(
    transformer: Any,
    embeds: GlyphEmbeds,
    prior: Tensor,
    references: GlmImageReferences | None,
    guided: bool,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[GlmImageContext, GlmImageReferences | None]]:
    """What the transformer is called with at every step: once for both halves, or for each.

    One call is faster unless something has to be masked for it: texts of different lengths, or references that the
    unconditional half is not to see.
    """

    def context(text: Tensor, drops: bool) -> GlmImageContext:
        text = text.to(device, dtype)
        drop = torch.full((len(text),), drops, device=device)
        encoded: GlmImageContext = transformer.encode_context(text, _mask_of(text), prior, drop, rows, columns)
        return encoded

    if references is not None:
        references = references.for_batch(len(embeds.prompt_embeds))
    conditional = context(embeds.prompt_embeds, False)
    if not guided:
        return [(conditional, references)]
    assert embeds.negative_prompt_embeds is not None
    unconditional = context(embeds.negative_prompt_embeds, True)
    alike = unconditional.text.shape == conditional.text.shape and unconditional.bias is None
    if references is None and alike and conditional.bias is None:
        return [(GlmImageContext.concat([unconditional, conditional]), None)]
    return [(unconditional, None), (conditional, references)]
