"""Training of a PixArt transformer on latents and captions, together with a small text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pixart.model import PixArtTransformer2DModel
from ..nn.layers import unpatchify
from .diffusion_loss import DiffusionLoss
from .loop import Loss, Recipe, train
from .randomness import Randomness, seed_torch


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], scaled as the transformer sees them
    input_ids: Tensor  # [B, M]
    attention_mask: Tensor  # [B, M]
    labels: Tensor | None = None  # [B, questions, H, W], the class of each answer for each latent


@dataclass(frozen=True)
class TextToImageRecipe(Recipe):
    """The training recipe.

    Attributes:
        prediction_type: at high noise, where layout and colors are decided, a prediction of the noise has to be far
            more precise than bfloat16; a prediction of the velocity does not (2202.00512, appendix D).
        max_weight: the upper bound of the weight 1 / ᾱ_t of the noise error, with which noise levels count as in the
            velocity error.
        label_weight: of the loss of ``LabelHead`` on block ``label_block``, if batches have labels. It decays with the
            learning rate.
    """

    batch_size: int = 64  # a multiple of 4
    caption_dropout: float = 0.1
    prediction_type: str = "v_prediction"
    max_weight: float = 1000.0
    bound_weight: float = 0.02
    label_weight: float = 0.3
    label_block: int = 4
    label_classes: tuple[int, ...] = ()  # of each question


class LabelHead(nn.Module):
    """A linear head that predicts the labels of each latent from the tokens of a block in the middle.

    The denoiser learns late which of two solids has which color, as that is a small part of its loss. This loss asks
    for it directly (like REPA, 2410.06940, with labels from the renderer instead of the features of another network).
    The head is discarded after training.
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
        """The cross-entropy [B] of labels [B, questions, H, W] for the last batch, summed over questions."""
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
    """Initialize as DiT (2212.09748, section 3.2) and PixArt-α: the gates make every block the identity.

    The caption projection preserves variance instead of using DiT's standard deviation of 0.02, with which a text of
    few channels would be so faint that attention to it stays uniform for thousands of steps.
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
    batch: Callable[[int], Batch],
    empty: tuple[Tensor, Tensor],
    betas: Tensor,
    recipe: TextToImageRecipe,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
) -> None:
    """Train both models in place, resuming from ``folder/state.pt`` if it exists. The result is their averages.

    Args:
        batch: step -> its batch.
        empty: ``input_ids`` and ``attention_mask``, each [M], of the empty caption, which replaces a share of captions.
        betas: the noise schedule.
        check: called before each save with the number of steps done, while both models hold their averages; its result
            is logged.
    """
    models = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    head: LabelHead | None = None
    if recipe.label_classes:
        with torch.random.fork_rng([]):
            seed_torch(recipe.seed, 0, torch.device("cpu"))
            head = LabelHead(transformer, recipe.label_block, recipe.label_classes)
        models["label_head"] = head
    objective = DiffusionLoss(betas, recipe.prediction_type)
    weights = torch.ones(len(betas))
    if recipe.prediction_type == "epsilon":
        weights = (1.0 / objective.alphas_cumprod).clamp(max=recipe.max_weight).float()
    weights = weights / weights.mean()

    def loss(step: int, random: Randomness) -> Loss:
        x0, ids, mask, labels = drop_captions(batch(step), empty, recipe.caption_dropout, random)
        # Stratified timesteps: the same spread in every batch.
        t = (random.stratified(len(x0)) * len(betas)).long().clamp(max=len(betas) - 1)
        noise = random.normal(x0.shape)
        xt = objective.add_noise(x0, noise, t)
        text = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        output = transformer(xt.to(transformer.dtype), text, t, encoder_attention_mask=mask).sample
        losses = objective(output, x0, noise, xt, t)
        weighted = weights[t] * losses.mse
        total = weighted.mean() + recipe.bound_weight * losses.variational_bound.mean()
        wrong = torch.zeros(())
        if head is not None and labels is not None:
            wrong = head(labels).mean()
            total = total + recipe.label_weight * recipe.rate(step) / recipe.learning_rate * wrong
        # By quarters of t: layout and color are decided at high noise.
        bands = weighted.detach().unflatten(0, (4, -1)).mean(1)
        names = ("t0_250", "t250_500", "t500_750", "t750_1000")
        return Loss(total, {"labels": wrong, **dict(zip(names, bands, strict=True))})

    train(models, loss, recipe, folder, check, list(transformer.transformer_blocks))
    if head is not None:
        head.hook.remove()


def drop_captions(batch: Batch, empty: tuple[Tensor, Tensor], share: float, random: Randomness) -> Batch:
    """Replace a share of the captions by the empty one and its mask, for classifier-free guidance."""
    ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
    dropped = random.uniform([len(ids)]) < share
    length = len(empty[0])
    ids[dropped] = 0
    mask[dropped] = 0
    ids[dropped, :length] = empty[0]
    mask[dropped, :length] = empty[1]
    return batch._replace(input_ids=ids, attention_mask=mask)
