"""A GLM-Image with random weights, small enough for tests: parts by name, for our pipeline and for diffusers'."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import torch
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

import impasto

TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 6,
    "prior_vq_quantizer_codebook_size": 32,
}

VAE = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.1, 0.9, 1.2, 1.0],
    "sample_size": 64,
}

SCHEDULER = {
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
}


def text_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {"tokenizer": ByT5Tokenizer(), "text_encoder": T5EncoderModel(config).eval()}


def prior_parts() -> dict[str, Any]:
    """A processor and an autoregressive model of 32 image tokens, of random weights."""
    characters = [chr(code) for code in range(32, 127)]
    specials = [f"<v{i}>" for i in range(32)] + ["<start>", "<end>", "<image>", "<sop>", "<eop>", "<pad>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *characters])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<start>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    images = GlmImageImageProcessorPil(
        patch_size=16, temporal_patch_size=1, merge_size=1, min_pixels=64 * 64, max_pixels=256 * 256
    )
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        "<start><image><end>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    torch.manual_seed(0)
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vision_vocab_size": 40,
            "eos_token_id": 33,
            "pad_token_id": vocabulary["<pad>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            },
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "image_size": 64},
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 16},
        image_token_id=vocabulary["<image>"],
        image_start_token_id=32,
        image_end_token_id=33,
    )
    processor = GlmImageProcessor(images, tokenizer, chat_template=template)
    return {"processor": processor, "vision_language_encoder": GlmImageForConditionalGeneration(config).eval()}


def pipelines() -> tuple[impasto.GlmImagePipeline, Any]:
    """Ours and diffusers', with the same weights and without a prior."""
    texts = text_parts()
    reference = {
        "transformer": diffusers.GlmImageTransformer2DModel(**TRANSFORMER).eval(),
        "vae": diffusers.AutoencoderKL(**VAE).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    ours = {
        "transformer": impasto.GlmImageTransformer2DModel(**TRANSFORMER, sample_size=8).eval(),
        "vae": impasto.AutoencoderKL(**VAE).eval(),
        "scheduler": impasto.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    for name in ("transformer", "vae"):
        ours[name].load_state_dict(reference[name].state_dict())
    nothing: dict[str, Any] = {"processor": None, "vision_language_encoder": None}
    pipe = impasto.GlmImagePipeline(**texts, **nothing, **ours)
    other = diffusers.GlmImagePipeline(**texts, **nothing, **reference)
    for one in (pipe, other):
        one.set_progress_bar_config(disable=True)
    return pipe, other
