"""The stages of GLM-Image's pipeline before and within its denoising loop: prior, texts, references, schedule.

Shapes: P prompts, B images, M text tokens, N image tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..family import tokens_to_generate
from ..models.glm_image.context import GlmImageContext, GlmImageReferences
from ..models.glm_image.prior import PriorTokens, result_of, sample_prior
from ..nn.changes import is_ours
from .compat.calls import Call
from .glm_image_inputs import GlmImageRequest, checked_prior
from .glyphs import encode_glyphs, most_tokens
from .latents import scaled
from .parallel.guidance import agreed
from .prompts import EncodedTexts
from .request import Schedule
from .sampling import Half


def prior_of(pipe: Any, request: GlmImageRequest, call: Call) -> PriorTokens:
    """The tokens for a request: given, or generated; by ``generate_prior_tokens`` where others have replaced it."""
    texts, (height, width), generators = request.texts, request.size, request.generators
    if request.prior is not None:
        return request.prior
    if not is_ours(pipe.generate_prior_tokens):
        made = pipe.generate_prior_tokens(
            prompt=list(texts.prompts),
            image=request.images,
            height=height,
            width=width,
            device=pipe.device,
            generator=generators[0] if isinstance(generators, list) else generators,  # as in diffusers
        )
        return checked_prior(pipe, texts, request.shape, request.images, *made)
    return run_prior(pipe, texts.prompts, request.size, request.images, generators, texts.images_per_prompt, call)


def run_prior(*arguments: Any) -> PriorTokens:
    """``prior_steps``, to its end."""
    return result_of(prior_steps(*arguments))


def prior_steps(
    pipe: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    images: list[list[Any]] | None,
    generators: torch.Generator | list[torch.Generator] | None,
    per_prompt: int,
    call: Call,
) -> Generator[None, None, PriorTokens]:
    """Generate the tokens of B images, with a progress bar; interrupting ``call`` ends it early.

    Yields after each token: other calls may run between them where components do not take turns on the device.
    Parallel processes get the tokens of rank 0: without seeds each samples others.
    """
    processor = pipe._require("processor")
    total = len(prompts) * per_prompt * tokens_to_generate(*size, images is not None)
    with pipe.using("vision_language_encoder") as model, pipe.progress_bar(total=total) as progress:
        steps = sample_prior(
            model,
            processor,
            prompts,
            size,
            images,
            generators,
            per_prompt,
            int(pipe._require("transformer").config["prior_vq_quantizer_codebook_size"]),
            packed=pipe.plan is None,
            check=partial(pipe._check_output, "vision_language_encoder"),
        )
        goes_on: bool | None = None
        while True:
            try:
                done = steps.send(goes_on)
            except StopIteration as end:
                made: PriorTokens = end.value
                break
            progress.update(done - progress.n)
            yield
            goes_on = not call.interrupted
    ids = agreed(pipe._require("transformer"), made.prior_token_ids.to(pipe.device))
    return made._replace(prior_token_ids=ids)


def encode_quoted_texts(pipe: Any, texts: list[str], length: int) -> EncodedTexts:
    """Embeddings [B, M, channels] and mask [B, M] of quoted texts, each of at most ``length`` bytes."""
    tokenizer = pipe._require("tokenizer")

    def encode(some: list[str]) -> EncodedTexts:
        with pipe.using("text_encoder") as text_encoder:
            quoted = partial(_quoted, pipe)
            encoded = EncodedTexts(*encode_glyphs(tokenizer, text_encoder, some, length, pipe.device, quoted))
        pipe._check_output("text_encoder", encoded.embeds)
        return encoded

    if pipe.prompt_cache is None or not is_ours(pipe.get_glyph_texts):  # entries are found by the prompt
        return encode(texts)
    encoder = pipe.components["text_encoder"]
    kept = {}
    with nullcontext() if encoder is None else pipe.using("text_encoder"):  # once for all
        for text in dict.fromkeys(texts):
            most = most_tokens(text, length)
            kept[text] = pipe.prompt_cache.encode([text], most, pipe.device, encoder, tokenizer, encode)
    join = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return EncodedTexts(
        embeds=join([kept[text].embeds[0] for text in texts]),
        mask=join([kept[text].mask[0] for text in texts]),
    )


def _quoted(pipe: Any, prompt: str) -> list[str]:
    """The texts of a prompt that are to be written, by a method that others may have replaced."""
    texts: list[str] = pipe.get_glyph_texts(prompt)[0]
    return texts


def latent_statistics(vae: Any) -> dict[str, Any]:
    """The autoencoder's statistics that GLM-Image uses: it has no scaling factor."""
    return {name: vae.config.get(name) for name in ("latents_mean", "latents_std")}


def encode_reference(pipe: Any, image: Any, tokens: Tensor, grid: Sequence[int]) -> GlmImageReferences:
    """The keys and values of a reference image.

    Args:
        tokens: of the prior.
        grid: 1, rows and columns of these tokens.
    """
    unit = pipe.vae_scale_factor * pipe._require("transformer").config["patch_size"]
    pixels = pipe.image_processor.preprocess(image, *(side * unit for side in grid[1:]))  # [1, 3, H, W]
    with pipe.using_vae() as (vae, dtype):
        latents = scaled(vae.encode(pixels.to(pipe.device, dtype)).latent_dist.mode(), latent_statistics(vae))
    with pipe.using("transformer") as transformer:
        latents = latents.to(pipe.device, transformer.dtype)
        none = latents.new_zeros(1, 0, transformer.config["text_embed_dim"])
        context = transformer.encode_context(none, None, tokens, None, *latents.shape[-2:])
        size = latents.new_tensor([pixels.shape[-2:]], dtype=torch.float32)
        modulation = transformer.modulate(size.new_zeros(1), size, torch.zeros_like(size))
        references: GlmImageReferences = transformer.encode_references(latents, context, modulation)
    return references


def shifted(scheduler: Any, schedule: Schedule, tokens: int) -> dict[str, Any]:
    """Arguments for the scheduler's ``set_timesteps``: GLM-Image's timesteps are integers and not shifted, its noise
    levels are shifted by the number of image tokens."""
    config, accepted = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
    if "sigmas" not in accepted:
        raise InputError(
            f"{type(scheduler).__name__} takes no sigmas, which GLM-Image's schedule needs; use "
            f"FlowMatchEulerDiscreteScheduler"
        )
    total = config["num_train_timesteps"]
    evenly = np.linspace(total, 1.0, schedule.steps + 1)[:-1]
    times = np.asarray(evenly if schedule.timesteps is None else schedule.timesteps).astype(np.int64).astype(np.float32)
    levels = times / total if schedule.sigmas is None else np.asarray(schedule.sigmas, dtype=np.float32)
    arguments = {"timesteps": times.tolist(), "sigmas": levels.tolist(), "mu": _mu(config, tokens)}
    return {name: value for name, value in arguments.items() if name in accepted}


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """By how much a flow-matching scheduler of this config shifts the noise levels of an image."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    mu = _mu(config, tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _mu(config: Mapping[str, Any], tokens: int) -> float:
    base = config.get("base_image_seq_len", 256)
    return float(config.get("max_shift", 0.75) * (tokens / base) ** 0.5 + config.get("base_shift", 0.25))


def encode_contexts(
    model: Any,
    prior: Tensor,
    references: GlmImageReferences | None,
    rows: int,
    columns: int,
    embeds: Any,
    guided: bool,
) -> list[Half]:
    """Both halves for one call, or one call for each.

    One call is faster unless it needs masking, for texts of different lengths or for references that the negative
    half must not see. Code of others expects two, as in diffusers.

    Args:
        model: the transformer, or its ``ForeignGlmImageStages``.
    """

    def context(text: Tensor, drops: bool) -> Any:
        text = text.to(prior.device, model.dtype)
        drop = torch.full((len(text),), drops, device=prior.device)
        return model.encode_context(text, _mask_of(text), prior, drop, rows, columns)

    def half(context: Any, references: GlmImageReferences | None, copies: int = 1) -> Half:
        return Half(copies, {"encoder_hidden_states": context, "kv_caches": references})

    if references is not None:
        references = references.for_batch(len(embeds.prompt_embeds))
    positive = context(embeds.prompt_embeds, False)
    if not guided:
        return [half(positive, references)]
    assert embeds.negative_prompt_embeds is not None
    negative = context(embeds.negative_prompt_embeds, True)
    unmasked = all(isinstance(each, GlmImageContext) and each.bias is None for each in (negative, positive))
    if references is None and unmasked and negative.text.shape == positive.text.shape:
        return [half(GlmImageContext.concat([negative, positive]), None, copies=2)]
    return [half(negative, None), half(positive, references)]


def _mask_of(embeds: Tensor) -> Tensor | None:
    """[B, M], true for tokens that are not all zeros, and for all tokens of an all-zero row; None if all are true."""
    keep = embeds.any(dim=-1)  # [B, M]
    keep |= ~keep.any(dim=1, keepdim=True)
    return None if bool(keep.all()) else keep
