"""A loss on labels of each latent, which asks for what a denoiser learns late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...models.pixart.model import PixArtTransformer2DModel
from ...nn.layers import unpatchify
from ..running.randomness import seed_torch


class LabelHead(nn.Module):
    """A linear head that predicts the labels of each latent from the tokens of a block in the middle.

    The denoiser learns late which of two solids has which color, as that is a small part of its loss. This loss asks
    for it directly (like REPA, 2410.06940, with labels from the renderer instead of the features of another network).
    The head is discarded after training.
    """

    def __init__(self, transformer: PixArtTransformer2DModel, block: int, classes: Sequence[int], seed: int = 0):
        super().__init__()
        count = len(transformer.transformer_blocks)
        if block >= count:
            raise ConfigurationError(f"labels.block: the transformer has {count} blocks, 0 to {count - 1}, not {block}")
        self.patch_size = transformer.patch_size
        self.classes = tuple(classes)
        with torch.random.fork_rng([]):  # the same numbers on every device
            seed_torch(seed, 0, torch.device("cpu"))
            self.read = nn.Linear(transformer.inner_dim, self.patch_size**2 * sum(classes))
        self.read.to(next(transformer.parameters()).device)
        self.tokens: Tensor | None = None
        self.hook = transformer.transformer_blocks[block].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.tokens = output if module.training else None

    def forward(self, labels: Sequence[Tensor]) -> Tensor:
        """The cross-entropy [B] of the last batch, summed over questions.

        Args:
            labels: of the images of each size, which are next to each other, [b, questions, H, W].
        """
        assert self.tokens is not None
        p = self.patch_size
        grids = [(each.shape[-2] // p, each.shape[-1] // p) for each in labels]
        counts = [len(each) * rows * columns for each, (rows, columns) in zip(labels, grids)]
        read = self.read(self.tokens).flatten(0, -2).split(counts)
        self.tokens = None
        return torch.cat([self._loss(x, each, grid) for x, each, grid in zip(read, labels, grids)])

    def _loss(self, read: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of images of one size, [b]."""
        if labels.shape[1] != len(self.classes):
            raise ConfigurationError(
                f"samples have labels for {labels.shape[1]} questions, and labels.classes has {len(self.classes)}: "
                f"make them the same, or a cache of samples again"
            )
        answers = unpatchify(read.unflatten(0, (len(labels), -1)), *grid, self.patch_size)  # [b, sum of classes, H, W]
        losses = [
            F.cross_entropy(answer.float(), label.long(), reduction="none").flatten(1).mean(1)
            for answer, label in zip(answers.split(self.classes, dim=1), labels.unbind(1))
        ]
        return torch.stack(losses).sum(0)
