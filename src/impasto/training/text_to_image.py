"""Training of a PixArt transformer on latents and captions, together with a small text encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pixart import PixArtTransformer2DModel
from ..nn.layers import unpatchify
from .diffusion_loss import DiffusionLoss
from .ema import EMA
from .state import append_log, load_state, save_state


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], scaled as the transformer sees them
    input_ids: Tensor  # [B, M]
    attention_mask: Tensor  # [B, M]
    labels: Tensor | None = None  # [B, questions, H, W], the class of each answer for each latent


@dataclass(frozen=True)
class TextToImageRecipe:
    """How to train.

    ``prediction_type``: where noise is high, which decides what is where in which colour, a prediction of the noise
    must be many times more exact than bfloat16 is to say anything about the picture; a prediction of the velocity
    need not (2202.00512, appendix D). ``max_weight`` bounds the weight 1 / ᾱ_t of the noise's error, with which all
    noise levels count as the velocity's error lets them count.

    ``label_weight`` is that of what block ``label_block`` must know of each latent, where batches tell it. It falls
    with the learning rate: in the end the picture alone counts.
    """

    steps: int
    batch_size: int = 64  # a multiple of 4
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.3  # of the steps, at the end: the rate falls linearly
    weight_decay: float = 0.01
    clip: float = 1.0
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    prediction_type: str = "v_prediction"
    max_weight: float = 1000.0
    bound_weight: float = 0.02
    label_weight: float = 0.3
    label_block: int = 4
    label_classes: tuple[int, ...] = ()  # of each question
    compile_blocks: bool = True
    log_every: int = 50
    save_every: int = 1000

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


class LabelHead(nn.Module):
    """What a block in the middle of the transformer knows of each latent: a linear reader of its tokens.

    The denoiser finds out late which of two solids has which colour, because that is a small part of its loss. Asked
    directly, it must look it up in the text and carry it to the right place (in the manner of REPA, 2410.06940, with
    what the renderer knows instead of another network's features). Thrown away after training.
    """

    def __init__(self, transformer: PixArtTransformer2DModel, block: int, classes: Sequence[int]):
        super().__init__()
        self.patch_size = transformer.patch_size
        self.classes = tuple(classes)
        self.read = nn.Linear(transformer.inner_dim, self.patch_size**2 * sum(classes))
        self.tokens: Tensor | None = None
        self.hook = transformer.transformer_blocks[block].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.tokens = output if module.training else None

    def forward(self, labels: Tensor) -> Tensor:
        """The sum over questions of the cross-entropy [B] of labels [B, questions, H, W], for the last batch."""
        assert self.tokens is not None
        height, width = labels.shape[-2] // self.patch_size, labels.shape[-1] // self.patch_size
        answers = unpatchify(self.read(self.tokens), height, width, self.patch_size)  # [B, sum of classes, H, W]
        self.tokens = None
        losses = [
            F.cross_entropy(answer.float(), labels[:, i].long(), reduction="none").flatten(1).mean(1)
            for i, answer in enumerate(answers.split(self.classes, dim=1))
        ]
        return torch.stack(losses).sum(0)


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


def make_optimizers(named: Mapping[str, Tensor], recipe: TextToImageRecipe) -> list[torch.optim.Optimizer]:
    """Muon (K. Jordan, 2024) for the matrices inside of blocks, AdamW for all else.

    Muon's steps have the size of AdamW's (2502.16982, eq. 4), so that both take the same rate.
    """
    matrices = {name for name, p in named.items() if _is_hidden_matrix(name, p)}
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon(
            [p for name, p in named.items() if name in matrices],
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.99),
            fused=True,
        ),
    ]


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it maps hidden states to hidden states; tables and the ways in and out do not."""
    inside = ".transformer_blocks." in name or ".block." in name  # T5's are called block
    return inside and parameter.ndim == 2 and name.endswith(".weight") and "relative_attention_bias" not in name


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
    head: LabelHead | None = None
    if recipe.label_classes:
        head = LabelHead(transformer, recipe.label_block, recipe.label_classes)
        models["label_head"] = head
    masters = Masters(models)
    optimizers = make_optimizers(masters.named, recipe)
    objective = DiffusionLoss(betas, recipe.prediction_type)
    weights = torch.ones(len(betas))
    if recipe.prediction_type == "epsilon":
        weights = (1.0 / objective.alphas_cumprod).clamp(max=recipe.max_weight).float()
    weights = weights / weights.mean()
    ema = EMA(masters.named, recipe.ema_decay)
    state_path, start = folder / "state.pt", 0
    if state_path.exists():
        state = load_state(state_path)
        for name, master in masters.named.items():
            if name in state["models"] or not name.startswith("label_head."):  # a finished checkpoint has no head
                master.copy_(state["models"][name])
        for optimizer, saved in zip(optimizers, state.get("optimizers", ()), strict=False):  # nor those
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        masters.publish()
        start = state["step"]
    if recipe.compile_blocks:
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # without the hooks
    generator = torch.Generator().manual_seed(start)
    models.train()
    clock, running = time.monotonic(), torch.zeros(7)
    for step in range(start, recipe.steps):
        for optimizer in optimizers:
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
        told = torch.zeros(())
        if head is not None and batch.labels is not None:
            told = head(batch.labels).mean()
            loss = loss + recipe.label_weight * recipe.rate(step) / recipe.learning_rate * told
        loss.backward()
        masters.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(masters.named.values(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        masters.publish()
        ema.update()

        with torch.no_grad():  # by quarters of t: layout and colour are decided where noise is high
            bands = weighted.unflatten(0, (4, -1)).mean(1)
            running += torch.stack([loss.detach(), norm, told.detach(), *bands])
        if (step + 1) % recipe.log_every == 0:
            values = (running / recipe.log_every).tolist()
            names = ("loss", "norm", "labels", "t0_250", "t250_500", "t500_750", "t750_1000")
            append_log(
                folder / "log.jsonl",
                step=step + 1,
                seconds=time.monotonic() - clock,
                rate=recipe.rate(step),
                **dict(zip(names, values, strict=True)),
            )
            running.zero_()
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            saved = {"models": masters.named, "ema": ema.state_dict(), "step": step + 1}
            save_state(state_path, {**saved, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if on_save is not None:
                models.eval()
                masters.publish(ema.shadow)
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    on_save(step + 1)
                masters.publish()
                models.train()
    if head is not None:
        head.hook.remove()
    if recipe.compile_blocks:
        for block in transformer.transformer_blocks:
            del block.forward
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
    return batch._replace(input_ids=ids, attention_mask=mask)
