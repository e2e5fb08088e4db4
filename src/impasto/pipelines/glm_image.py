"""GlmImagePipeline: text and reference images to image, by GLM-Image's prior, glyph encoder and denoiser.

Shapes: P prompts, B images, C latent channels, h x w latent pixels, M text tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..checks import whole_number
from ..family import pixels_per_latent
from ..lazy import publish
from ..memory.placement import OneAtATime
from ..models.dtypes import parse_dtype
from ..models.glm_image.context import GlmImageReferences
from ..models.glm_image.model import GlmImageTransformer2DModel
from ..models.glm_image.prior import PriorTokens
from ..nn.changes import takes_stages, unwrapped
from ..nn.machine import as_device, check_device, check_dtype
from . import inputs
from .base import ImagePipelineOutput, Pipeline
from .compat.methods import GlmImageMethods
from .glm_image_inputs import check_sides, images_of_prompts, read_glm_image, read_glm_image_texts, reference_image
from .glm_image_stages import (
    encode_contexts,
    encode_quoted_texts,
    encode_reference,
    latent_statistics,
    prior_of,
    run_prior,
    shifted,
)
from .images import ImageProcessor
from .request import Schedule, read_schedule
from .sampling import DenoisingStep, Run, denoising_steps, drive, own_scheduler, step_options


class GlyphEmbeds(NamedTuple):
    """What ``encode_prompt`` returns. A token that is all zeros is padding and is ignored."""

    prompt_embeds: Tensor  # [B, M, channels]
    negative_prompt_embeds: Tensor | None = None  # [B, M, channels]


class GlmImagePipeline(GlmImageMethods, Pipeline):
    """Text to image and images to image.

    Args:
        tokenizer, text_encoder: the byte-level T5 for glyphs; may be None if embeddings are given.
        processor, vision_language_encoder: the prior's processor and model; may be None if its tokens are given.
        vae: the autoencoder of the latents.
        transformer: the denoiser.
        scheduler: the solver: ours, or one that behaves like diffusers' ``FlowMatchEulerDiscreteScheduler``.
    """

    #: The prior runs all of its blocks for every token.
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
        self.vae_scale_factor = pixels_per_latent(None if vae is None else vae.config)
        self.image_processor = ImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def default_sample_size(self) -> int:
        """The side of the latents if no size is given."""
        return 128 if self.transformer is None else int(self.transformer.config.get("sample_size", 128))

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """As for every pipeline; a diffusers transformer is replaced by ours, which shares its weights."""
        theirs = unwrapped(options.get("transformer", pipeline.components.get("transformer")))
        if theirs is not None and not isinstance(theirs, GlmImageTransformer2DModel):
            with torch.device("meta"):
                ours = GlmImageTransformer2DModel.from_config(theirs.config)
            ours.load_state_dict(theirs.state_dict(), assign=True)
            options["transformer"] = ours.train(theirs.training)
        return super().from_pipe(pipeline, **options)

    def to(self, *args: Any, device: torch.device | str | int | None = None, **options: Any) -> Self:
        """As for every pipeline, but on an accelerator the components take turns, as most cannot hold them all.

        After ``pipe.to("cuda")`` the components are on the host, and each is on the device while it is used, as by
        ``enable_model_cpu_offload``. If all of them fit, ``from_pretrained(..., device_map="cuda")`` keeps them on the
        device.
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
        """Generate images. No gradients are recorded.

        Args:
            prompt: one or several. Text in quotes is rendered in the image. ``<sop>H W<eop>`` in a prompt requests
                an image of 32 H x 32 W pixels, unless height and width are given.
            image: reference images: one, or a list for one prompt; a list of lists of equal length for several
                prompts.
            height, width: in pixels, multiples of 32; with images, any, as the result is resized and cropped to them.
                If None, from the prompt, the first image (cut to multiples of 32), or the model.
            num_inference_steps: number of steps.
            timesteps, sigmas: a custom schedule in place of the scheduler's, descending.
            guidance_scale: w of classifier-free guidance (2207.12598); 1 or less means no guidance.
            num_images_per_prompt: images for each prompt.
            generator: one, or one for each image.
            latents: [B, C, h, w], the noise.
            prompt_embeds, negative_prompt_embeds: glyph embeddings [P, M, channels]; tokens of zeros are padding.
            prior_token_ids: [P, N] or [B, N], in place of the prior's: one for each 16 x 16 pixels, row by row.
            prior_token_image_ids, source_image_grid_thw: for each prompt, the concatenated tokens of its images, and
                the rows and columns of each image ([images, 3], the first number is 1).
            crops_coords_top_left: top and left of the image, in pixels, within the one that it is a crop of.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            attention_kwargs: accepted as documented; attention takes none.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` after each step; the tensors
                that it returns replace those of the same names.
            callback_on_step_end_tensor_inputs: the names in ``tensors``: latents, prompt_embeds,
                negative_prompt_embeds; ``tensor_inputs`` of the callback takes precedence.
            max_sequence_length: bytes of one quoted text, at most 4096.
            negative_prompt: guidance steers away from its quoted texts; none by default.

        Raises:
            InputError: an argument cannot be used; the message says what can.
        """
        request = read_glm_image(self, GlyphEmbeds._fields, locals())
        with torch.no_grad(), self._calling(request.guidance_scale, attention_kwargs) as call:
            embeds = GlyphEmbeds(*self.encode_prompt(**request.texts.of_glm_image))  # before the prior takes long
            prior = prior_of(self, request, call)
            noise = self._noise(request, torch.float32)
            references = self.encode_references(request.images, prior)
            loop = self.denoise(
                noise,
                embeds,
                prior.prior_token_ids,
                references,
                crops_coords_top_left=request.corner,
                **request.denoising,
            )
            images = self._finish(drive(self, loop, noise, request), request)
        return ImagePipelineOutput(images) if return_dict else (images,)

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
        """Generate the tokens of the prior. No global random state is read or changed.

        Args:
            prompt: one or several.
            height, width: in pixels, multiples of 32.
            image: reference images for each prompt, as in the call.
            device: of the result; the pipeline's by default.
            generator: one for all images, one after the other, or one for each.
            num_images_per_prompt: images for each prompt, each with its own tokens.

        Returns:
            tokens [B, N] in the transformer's grid; with reference images also theirs, in the form the call takes.

        Raises:
            InputError: an argument cannot be used; the message says what can.
        """
        self._require("processor")
        prompts = inputs.list_of_texts("prompt", prompt)
        height, width = whole_number("height", height), whole_number("width", width)
        check_sides(height, width)
        num_images_per_prompt = inputs.images_per_prompt(num_images_per_prompt, len(prompts))
        images = images_of_prompts(image, len(prompts))
        images = None if images is None else [[reference_image(one) for one in row] for row in images]
        generators = inputs.check_generator(generator, len(prompts) * num_images_per_prompt)
        with self._calling() as call:
            prior = run_prior(self, prompts, (height, width), images, generators, num_images_per_prompt, call)
        target = self.device if device is None else as_device(device)
        return prior._replace(prior_token_ids=prior.prior_token_ids.to(target))

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
        """Embed the characters of quoted texts.

        Args:
            prompt: one or several; None if ``prompt_embeds`` are given.
            do_classifier_free_guidance: whether to return negative embeddings too.
            num_images_per_prompt: how often each row is repeated.
            prompt_embeds, negative_prompt_embeds: [P, M, channels], in place of texts.
            device, dtype: of the result; the pipeline's by default.
            max_sequence_length: bytes of one text.
            negative_prompt: one for all or one for each; None is the empty one.

        Returns:
            [P * num_images_per_prompt, M, channels] each, right-padded with zeros.
        """
        texts = read_glm_image_texts(self, do_classifier_free_guidance, locals())
        target = self.device if device is None else as_device(device)
        to = self.dtype if dtype is None else dtype
        positive, negative = texts.prompt_embeds, texts.negative_prompt_embeds
        if texts.to_encode:
            embeds, mask = encode_quoted_texts(self, texts.to_encode, texts.length)
            count = len(texts.prompts)
            positive = _trimmed(embeds[:count], mask[:count]) if texts.prompts else positive
            negative = _trimmed(embeds[count:], mask[count:]) if texts.negatives else negative

        def repeated(x: Tensor) -> Tensor:
            return x.to(target, to).repeat_interleave(texts.images_per_prompt, dim=0)

        assert positive is not None
        return GlyphEmbeds(repeated(positive), None if negative is None else repeated(negative))

    @torch.no_grad()
    def encode_references(
        self, images: Sequence[Sequence[Any]] | None, prior: PriorTokens
    ) -> GlmImageReferences | None:
        """The keys and values of the reference images, P rows; None without reference images."""
        if images is None or prior.prior_token_image_ids is None or prior.source_image_grid_thw is None:
            return None
        rows = []
        for of_prompt, ids, grids in zip(images, prior.prior_token_image_ids, prior.source_image_grid_thw, strict=True):
            each = ids.to(self.device).flatten().split(grids.prod(dim=-1).tolist())
            encoded = map(partial(encode_reference, self), of_prompt, each, grids.tolist())
            rows.append(GlmImageReferences.one_after_another(list(encoded)))
        return GlmImageReferences.concat(rows)

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
    ) -> Generator[DenoisingStep, None, None]:
        """The denoising loop: a generator that yields after every step. No gradients are recorded.

        Args:
            noise: [B, C, h, w] of variance 1.
            embeds: what ``encode_prompt`` returned, for B images. Guidance is used if it has negative embeddings and
                ``guidance_scale`` is above 1.
            prior_token_ids: [B, N].
            references: what ``encode_references`` returned; its number of rows divides B.
            num_inference_steps, timesteps, sigmas, guidance_scale, generator, crops_coords_top_left: as in the call.
        """
        schedule, guidance_scale = read_schedule(self, locals(), both=True), inputs.guidance(guidance_scale)
        options: dict[str, Any] = {"generator": generator, "corner": inputs.corner(crops_coords_top_left)}
        given = (noise, embeds, prior_token_ids, references, schedule, guidance_scale)
        return denoising_steps(self, partial(self.begin, *given, **options))

    def begin(
        self,
        noise: Tensor,
        embeds: GlyphEmbeds,
        prior_token_ids: Tensor,
        references: GlmImageReferences | None,
        schedule: Schedule,
        guidance_scale: float,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> Run:
        """The run of such a loop before its first step, for ``sampling.advance``, which takes several at a time.

        The transformer has to be in place: ``with pipe.using("transformer"):``.
        """
        transformer, device = self._require("transformer"), self.device
        model, call = transformer, self._replaying(transformer)
        if not takes_stages(transformer, GlmImageTransformer2DModel):
            from .foreign_stages import ForeignGlmImageStages

            model = call = ForeignGlmImageStages(transformer, call)
        rows, columns = noise.shape[-2:]
        tokens = rows * columns // transformer.config["patch_size"] ** 2
        scheduler = own_scheduler(self.scheduler, device, **shifted(self.scheduler, schedule, tokens))
        size = torch.tensor([[rows * self.vae_scale_factor, columns * self.vae_scale_factor]], device=device)
        crop = torch.tensor([corner], device=device)
        prior = prior_token_ids.to(device)
        return Run(
            self,
            transformer,
            call,
            scheduler,
            noise.to(device, torch.float32),  # [B, C, h, w]
            embeds,
            guidance_scale,
            encode=partial(encode_contexts, model, prior, references, rows, columns),
            # The model counts timesteps from 0, the schedule from 1.
            modulation=model.modulate(scheduler.timesteps.to(device) - 1, size.float(), crop.float()),
            options=step_options(scheduler, generator=generator),
        )

    def _latent_statistics(self, vae: Any) -> Mapping[str, Any]:
        return latent_statistics(vae)


def _trimmed(embeds: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [P, M, channels] without the columns in which all rows are padding."""
    return embeds[:, : int(mask.sum(dim=1).max())]


publish(
    __name__,
    {
        "GlmImagePipeline": "pipelines.glm_image:GlmImagePipeline",
        "retrieve_timesteps": "pipelines.compat.functions:retrieve_timesteps",
    },
    "pipeline_glm_image",
)
