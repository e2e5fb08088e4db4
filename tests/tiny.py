"""Small real parts for tests: a T5 tokenizer that was trained on a few words, models with random weights, pipelines."""

from __future__ import annotations

import io
import json
import random
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.base import Pipeline
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler

WORDS = """
    a an the and with of on in at to from into is are one two three red green blue yellow purple orange white black
    grey small large cube sphere cylinder cone picture photo painting drawing top left right front behind under above
    wall floor sky forest desert river light shadow cute cat dog cactus happy face , . hello world
"""


@lru_cache
def _sentencepiece_model() -> bytes:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS.split(), k=10)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=128,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, model_max_length: int = 512) -> Path:
    """Write the files of a T5 tokenizer as the published checkpoints have them, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece_model())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": model_max_length,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@lru_cache
def tiny_tokenizer(model_max_length: int = 512) -> T5Tokenizer:
    """A T5 tokenizer of about a hundred pieces. Shared by all tests: do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return T5Tokenizer.from_pretrained(write_tokenizer(Path(folder), model_max_length))


def tiny_text_encoder(
    d_model: int = 32, num_layers: int = 2, seed: int = 0, dropout_rate: float = 0.1
) -> T5EncoderModel:
    """A T5 v1.1 encoder (gated gelu) with random weights, in evaluation mode; a new one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tiny_tokenizer()),
                d_model=d_model,
                d_kv=8,
                d_ff=2 * d_model,
                num_layers=num_layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=dropout_rate,
                tie_word_embeddings=False,
            )
        )
        for parameter in encoder.parameters():  # T5's own start leaves some weights too small to see a difference
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def tiny_transformer(seed: int = 0, **overrides: Any) -> PixArtTransformer2DModel:
    """A denoiser of two layers with random weights: latents of 8 px, 4 -> 8 channels."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "caption_channels": 32,
        "use_additional_conditions": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PixArtTransformer2DModel(**{**config, **overrides}).eval()


def tiny_vae(seed: int = 0, **overrides: Any) -> AutoencoderKL:
    """An autoencoder of two levels (2x), 4 latent channels, random weights; ``levels=4`` makes it 8x."""
    levels = overrides.pop("levels", 2)
    config: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [8] * levels,
        "norm_num_groups": 4,
        "scaling_factor": 0.7,
        "sample_size": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**{**config, **overrides}).eval()


P = TypeVar("P", bound=Pipeline)


def tiny_pipeline(cls: type[P], **overrides: Any) -> P:
    """A pipeline of tiny parts, whose pictures are 16 px wide, without a progress bar."""
    parts = {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_text_encoder,
        "vae": tiny_vae,
        "transformer": tiny_transformer,
        "scheduler": DPMSolverMultistepScheduler,
    }
    pipe = cls(**{name: overrides[name] if name in overrides else make() for name, make in parts.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline(folder: Path, cls: type[Pipeline] = PixArtSigmaPipeline, **overrides: Any) -> Path:
    """Write a tiny pipeline as a published checkpoint, and return its folder."""
    tiny_pipeline(cls, **overrides).save_pretrained(folder)
    return folder
