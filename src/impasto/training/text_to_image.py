"""Training of a PixArt transformer on latents and captions, together with a small text encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.pixart import PixArtTransformer2DModel
from .diffusion_loss import DiffusionLoss
from .ema import EMA
from .state import append_log, load_state, save_state


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], scaled as the transformer sees them
    input_ids: Tensor  # [B, M]
    attention_mask: Tensor  # [B, M]


@dataclass(frozen=True)
class TextToImageRecipe:
    """``max_weight`` bounds the weight 1 / ᾱ_t of the noise's error.

    With that weight all noise levels count alike in what the model says of the velocity (2202.00512, appendix D):
    where things are and which colour they have is decided at high noise, where the plain error is tiny.
    """

    steps: int
    batch_size: int = 32  # a multiple of 4
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_share: float = 0.3  # of the steps, at the end: the rate falls linearly
    weight_decay: float = 0.01
    clip: float = 1.0
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    max_weight: float = 1000.0
    bound_weight: float = 0.02
    compile_blocks: bool = True
    log_every: int = 50
    save_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate: a linear rise, a plateau, a linear fall."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, rise, max(0.02, fall))


class Masters:
    """Parameters in float32, which the optimizer changes, of a model that computes in bfloat16."""

    def __init__(self, model: nn.Module):
        self.named = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        for master in self.named.values():
            master.grad = torch.zeros_like(master)
        model.to(torch.bfloat16)
        self.working = dict(model.named_parameters())

    def take_gradients(self) -> None:
        for name, parameter in self.working.items():
            master = self.named[name]
            assert master.grad is not None
            if parameter.grad is None:
                master.grad.zero_()
            else:
                master.grad.copy_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def publish(self, values: dict[str, Tensor] | None = None) -> None:
        """Give the model the masters' values, or others."""
        torch._foreach_copy_(list(self.working.values()), list((values or self.named).values()))


def initialize(transformer: PixArtTransformer2DModel) -> None:
    """The start of DiT (2212.09748, section 3.2) and PixArt-α: every block begins as the identity for its gates.

    The caption projection keeps its variance instead of DiT's deviation of 0.02: from few channels that would leave the
    text so faint that attention to it stays uniform for thousands of steps.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = transformer.pos_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    for name, parameter in transformer.named_parameters():
        if "timestep_embedder" in name or name == "adaln_single.linear.weight":
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        elif ".attn2.to_out.0." in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)


def train_text_to_image(
    transformer: PixArtTransformer2DModel,
    text_encoder: nn.Module,
    batches: Iterator[Batch],
    empty: tuple[Tensor, Tensor],
    betas: Tensor,
    recipe: TextToImageRecipe,
    folder: Path,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Train both in place, resuming from ``folder/state.pt`` where there is one. They end as their averages.

    Args:
        batches: endless.
        empty: ``input_ids`` and ``attention_mask``, each [M], of the empty caption, which replaces a share of them.
        betas: the noise schedule.
        on_save: called with the step after each save, while both models hold their averages (in bfloat16).
    """
    models = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    masters = Masters(models)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.named.values() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in masters.named.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    objective = DiffusionLoss(betas)
    weights = (1.0 / objective.alphas_cumprod).clamp(max=recipe.max_weight).float()
    weights = weights / weights.mean()
    ema = EMA(masters.named, recipe.ema_decay)
    state_path, start = folder / "state.pt", 0
    if state_path.exists():
        state = load_state(state_path)
        for name, master in masters.named.items():
            master.copy_(state["models"][name])
        if "optimizer" in state:  # a state made from a finished checkpoint has none
            optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        masters.publish()
        start = state["step"]
    if recipe.compile_blocks:
        for block in transformer.transformer_blocks:
            block.compile()
    generator = torch.Generator().manual_seed(start)
    models.train()
    clock, running = time.monotonic(), torch.zeros(6)
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = drop_captions(next(batches), empty, recipe.caption_dropout, generator)
        x0 = batch.latents
        # Stratified timesteps: the same spread in every batch.
        offsets = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
        t = (offsets * len(betas)).long().clamp(max=len(betas) - 1)
        noise = torch.randn(x0.shape, generator=generator)
        xt = objective.add_noise(x0, noise, t)
        text = text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        output = transformer(xt.bfloat16(), text, t, encoder_attention_mask=batch.attention_mask).sample
        losses = objective(output, x0, noise, xt, t)
        weighted = weights[t] * losses.mse
        loss = weighted.mean() + recipe.bound_weight * losses.variational_bound.mean()
        loss.backward()
        masters.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(masters.named.values(), recipe.clip)
        optimizer.step()
        masters.publish()
        ema.update()

        with torch.no_grad():  # by quarters of t: layout and colour are decided where noise is high
            bands = weighted.unflatten(0, (4, -1)).mean(1)
            running += torch.stack([loss.detach(), norm, *bands])
        if (step + 1) % recipe.log_every == 0:
            values = (running / recipe.log_every).tolist()
            names = ("loss", "norm", "t0_250", "t250_500", "t500_750", "t750_1000")
            append_log(
                folder / "log.jsonl",
                step=step + 1,
                seconds=time.monotonic() - clock,
                rate=recipe.rate(step),
                **dict(zip(names, values, strict=True)),
            )
            running.zero_()
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            saved = {"models": masters.named, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save_state(state_path, {**saved, "step": step + 1})
            if on_save is not None:
                models.eval()
                masters.publish(ema.shadow)
                with torch.no_grad():
                    on_save(step + 1)
                masters.publish()
                models.train()
    models.float().eval()
    with torch.no_grad():
        for name, parameter in models.named_parameters():
            parameter.copy_(ema.shadow[name])


def drop_captions(batch: Batch, empty: tuple[Tensor, Tensor], share: float, generator: torch.Generator) -> Batch:
    """Replace a share of the captions by the empty one, with its own mask, so that guidance has its other half."""
    ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
    dropped = torch.rand(len(ids), generator=generator) < share
    length = len(empty[0])
    ids[dropped] = 0
    mask[dropped] = 0
    ids[dropped, :length] = empty[0]
    mask[dropped, :length] = empty[1]
    return Batch(batch.latents, ids, mask)
