"""A loss on labels of each latent, which asks for what a denoiser learns late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.pixart.model import PixArtTransformer2DModel
from ...nn.layers import unpatchify
from ..randomness import seed_torch


class LabelHead(nn.Module):
    """A linear head that predicts the labels of each latent from the tokens of a block in the middle.

    The denoiser learns late which of two solids has which color, as that is a small part of its loss. This loss asks
    for it directly (like REPA, 2410.06940, with labels from the renderer instead of the features of another network).
    The head is discarded after training.
    """

    def __init__(self, transformer: PixArtTransformer2DModel, block: int, classes: Sequence[int], seed: int = 0):
        super().__init__()
        self.patch_size = transformer.patch_size
        self.classes = tuple(classes)
        with torch.random.fork_rng([]):
            seed_torch(seed, 0, torch.device("cpu"))
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
