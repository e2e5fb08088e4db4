"""A small trained model for distillation, and its data: flat latents whose sign the caption gives."""

from __future__ import annotations

import copy
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.training.data.sample import Batch, Sample
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.diffusion_loss import DiffusionLoss
from impasto.training.objectives.text_to_image import Latents, TextToImage, initialize
from impasto.training.objectives.texts import Texts
from impasto.training.running.loop import train

from ..tiny import tiny_text_encoder, tiny_tokenizer, tiny_transformer
from .runs import settings

BETAS = torch.linspace(1e-4, 0.02, 1000)
CAPTIONS = ("red", "blue cube")


def flat(step: int, size: int = 8) -> Batch:
    kinds = torch.randint(2, (size,), generator=torch.Generator().manual_seed(step)).tolist()
    samples = [
        Sample(posterior=(torch.full((4, 4, 4), 2.0 * kind - 1), torch.zeros(4, 4, 4)), caption=CAPTIONS[kind])
        for kind in kinds
    ]
    return Batch(samples, 0, size, step, size)


def texts() -> Texts:
    encoder = tiny_text_encoder(num_layers=1)
    return Texts(tiny_tokenizer(), encoder.requires_grad_(False), tokens=8)


def parts(transformer: nn.Module, kind: str) -> tuple[Any, ...]:
    return transformer, texts(), Latents({}), DiffusionLoss(BETAS, kind)


@lru_cache
def _trained(kind: str) -> PixArtTransformer2DModel:
    transformer = tiny_transformer(sample_size=4, num_layers=1, patch_size=1, out_channels=4)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        initialize(transformer)
    given: dict[str, Any] = {"weighting": "velocity", "timesteps": "stratified", "bound_weight": 0.01}
    with tempfile.TemporaryDirectory() as folder:
        optimizer = {"name": "muon", "rate": 1e-2}
        plan = settings(150, optimizer=optimizer, schedule={"kind": "cosine", "warmup": 10}, ema=0.0)
        train(TextToImage(*parts(transformer, kind), **given), ByStep(flat), plan, Path(folder))
    return transformer


def teacher(kind: str = "v_prediction") -> PixArtTransformer2DModel:
    """A copy of the trained model, which may be changed."""
    return copy.deepcopy(_trained(kind))
