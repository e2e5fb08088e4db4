"""Training of an AutoencoderKL: reconstruction, and a little pressure towards a standard normal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder_kl import AutoencoderKL
from ..nn.machine import fast_dtype
from .state import append_log, load_state, restore, restore_optimizers, save_state, section, steps_done, trim_log


@dataclass(frozen=True)
class AutoencoderRecipe:
    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    kl_weight: float = 1e-6
    l1_weight: float = 0.5  # beside the squared error: keeps edges sharp
    clip: float = 1.0
    save_every: int = 100


def cosine_rate(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def psnr(pictures: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], the mean over the batch of each one's."""
    error = ((pictures - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def train_autoencoder(
    model: AutoencoderKL, batches: Iterator[Tensor], recipe: AutoencoderRecipe, folder: Path, validation: Tensor
) -> None:
    """Train in place, resuming from ``folder/state.pt`` where there is one.

    Args:
        batches: endless pictures [B, 3, H, W] in [-1, 1].
        validation: pictures whose PSNR is logged.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    state_path, start = folder / "state.pt", 0
    if state_path.exists():
        state = load_state(state_path)
        start = steps_done(state_path, state)
        restore(state_path, section(state_path, state, "model"), model.state_dict())
        if "optimizer" in state:  # a state made from a finished checkpoint has none
            restore_optimizers(state_path, [optimizer], [state["optimizer"]])
    trim_log(folder / "log.jsonl", start)
    model.train()
    clock = time.monotonic()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * cosine_rate(step, recipe.steps, recipe.warmup_steps)
        pictures = next(batches).contiguous(memory_format=torch.channels_last)
        fast = fast_dtype(pictures.device)
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=fast == torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            reconstruction = model.decode(posterior.sample()).sample.float()
        mse = F.mse_loss(reconstruction, pictures)
        l1 = F.l1_loss(reconstruction, pictures)
        kl = posterior.kl().float().mean() / pictures[0].numel()
        (mse + recipe.l1_weight * l1 + recipe.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save_state(
                state_path,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
            with torch.no_grad():
                model.eval()
                value = psnr(validation, model.decode(model.encode(validation).latent_dist.mode()).sample)
                model.train()
            append_log(
                folder / "log.jsonl",
                step=step + 1,
                mse=mse.item(),
                l1=l1.item(),
                kl=kl.item(),
                psnr=value,
                seconds=time.monotonic() - clock,
            )
    model.eval()
