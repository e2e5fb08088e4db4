"""Training of a visual codebook: images to tokens, in the vision tower and quantizer of GLM-Image's prior.

The tower turns square patches into tokens, each of which is replaced by the nearest of the codes, all of unit length. A
reader, discarded afterwards, reconstructs a smaller image from the tokens, and labels of its cells.

Shapes: B images, N tokens per image, P pixels per side of a token, d channels of a code, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.layers import unpatchify
from ..running.randomness import Randomness
from .base import Loss, Objective, Tensors


class Images(NamedTuple):
    pixels: Tensor  # [B, 3, H, W], in [-1, 1]
    labels: Tensor  # [B, questions, h, w], the class of each answer for each cell of the image


class OnlineCodebook(nn.Module):
    """Codes [K, d] of unit length, each the mean direction of the tokens recently assigned to it."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, dim: int, decay: float):
        super().__init__()
        self.decay = decay
        directions = torch.randn(codes, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("codes", F.normalize(directions, dim=-1))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())

    def nearest(self, tokens: Tensor) -> Tensor:
        """Tokens [..., d] of unit length -> the indices [...] of codes."""
        numbers: Tensor = (tokens @ self.codes.T).argmax(-1)
        return numbers

    def start(self, tokens: Tensor, batches: int) -> None:
        """Start from the tokens [T, d] of ``batches`` batches, by spherical k-means."""
        generator = torch.Generator().manual_seed(1)
        self.codes = tokens[torch.randperm(len(tokens), generator=generator)[: len(self.codes)]].clone()
        for _ in range(10):
            self._count(tokens, 0.0)
        self.counts, self.sums = self.counts / batches, self.sums / batches  # the weight of one batch

    def update(self, tokens: Tensor, random: np.random.Generator) -> None:
        """Move codes towards tokens [T, d]; a code that is hardly used restarts at a token."""
        self._count(tokens, self.decay)
        rare = self.counts < 0.1 * len(tokens) / len(self.codes)
        lost = int(rare.sum())
        if lost:
            self.codes[rare] = tokens[torch.from_numpy(random.integers(len(tokens), size=lost))]
            self.counts[rare] = len(tokens) / len(self.codes)
            self.sums[rare] = self.codes[rare] * self.counts[rare][:, None]

    def _count(self, tokens: Tensor, decay: float) -> None:
        numbers = self.nearest(tokens)
        counts = torch.bincount(numbers, minlength=len(self.codes)).float()
        sums = torch.zeros_like(self.codes).index_add_(0, numbers, tokens)
        self.counts = decay * self.counts + (1 - decay) * counts
        self.sums = decay * self.sums + (1 - decay) * sums
        seen = self.counts > 1e-3
        self.codes = torch.where(seen[:, None], F.normalize(self.sums, dim=-1), self.codes)


class CodeReader(nn.Module):
    """Reads smaller images and answers from the tokens [B, N, d] of square images.

    Args:
        dim: d.
        classes: of each question.
        side: tokens per side.
        pixels, cells: of the smaller image and of the answers, per side of a token.
    """

    def __init__(self, dim: int, classes: Sequence[int], side: int, pixels: int = 8, cells: int = 4, width: int = 192):
        super().__init__()
        self.classes, self.side, self.pixels, self.cells = tuple(classes), side, pixels, cells
        self.embed = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.randn(side**2, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 6, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * pixels**2)
        self.to_answers = nn.Linear(width, sum(classes) * cells**2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, side * pixels, side * pixels], and [B, classes, side * cells, side * cells] for each question."""
        x = self.norm(self.blocks(self.embed(tokens) + self.places))
        answers = unpatchify(self.to_answers(x), self.side, self.side, self.cells)
        return unpatchify(self.to_pixels(x), self.side, self.side, self.pixels), list(answers.split(self.classes, 1))


def patches(pixels: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] -> [B, N, 3 P P], in the layout of transformers' image processor of GLM-Image."""
    grid: Tensor = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, 3, rows, P, columns, P]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def see(vision: Any, pixels: Tensor) -> Tensor:
    """transformers' ``GlmImageVisionModel`` on images [B, 3, H, W] of its training size -> [B, N, D].

    The class handles images one by one; here they are a batch.
    """
    embed = vision.patch_embed
    x: Tensor = patches(pixels, embed.patch_size).to(embed.proj.weight.dtype) @ embed.proj.weight.flatten(1).T
    x = x + embed.proj.bias + vision.embeddings.position_embedding.weight  # [B, N, D]
    for block in vision.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        out = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        x = x + attention.proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return x


def directions(model: Any, pixels: Tensor) -> Tensor:
    """Tokens [B, N, d] of unit length in float32, before quantization."""
    convolution = model.vqmodel.quant_conv
    seen = see(model.visual, pixels)
    return F.normalize((seen @ convolution.weight.flatten(1).T + convolution.bias).float(), dim=-1)


class VisualCodebook(Objective):
    """The errors of what a reader reconstructs from the codes. Its batches are Images.

    Args:
        model: transformers' ``GlmImageModel``, whose ``visual`` and ``vqmodel`` are trained.
        reader: discarded afterwards.
        earlier: the images of an earlier step, of which the codes start.
        steps: of the run; in the last tenth the codes stay where they are.
        continuous_steps: without codes; these then start from the tokens of the last ``first_batches`` steps.
        decay: of the averages that define the codes (1711.00937, appendix A.1).
    """

    def __init__(
        self,
        model: Any,
        reader: CodeReader,
        earlier: Callable[[int], Images],
        steps: int,
        continuous_steps: int = 300,
        first_batches: int = 64,
        pixel_weight: float = 4.0,
        label_weight: float = 0.3,
        commitment: float = 0.25,
        decay: float = 0.98,
    ):
        super().__init__()
        self.model = (model,)  # not a module of this one: the language model is not trained
        self.visual, self.quant_conv, self.reader = model.visual, model.vqmodel.quant_conv, reader
        embedding = model.vqmodel.quantize.embedding
        self.book = OnlineCodebook(embedding.num_embeddings, embedding.embedding_dim, decay)
        self.earlier, self.steps = earlier, steps
        self.continuous_steps, self.first_batches = continuous_steps, first_batches
        self.pixel_weight, self.label_weight, self.commitment = pixel_weight, label_weight, commitment

    def forward(self, batch: Tensors, random: Randomness) -> Loss:
        images, step, book = batch.values, batch.step, self.book
        tokens = directions(self.model[0], images.pixels)  # [B, N, d]
        if step == self.continuous_steps:
            steps = range(max(0, step - self.first_batches), step + 1)
            with torch.no_grad():
                recent = torch.cat([directions(self.model[0], self.earlier(number).pixels) for number in steps])
            book.start(recent.flatten(0, 1), len(steps))
        read, far, used = tokens, torch.zeros(len(tokens)), torch.zeros(())
        if step >= self.continuous_steps:
            numbers = book.nearest(tokens.detach())  # [B, N]
            codes = book.codes[numbers]
            read = tokens + (codes - tokens).detach()
            far = (tokens - codes).square().sum(-1).mean(1)
            share = torch.bincount(numbers.flatten(), minlength=len(book.codes)) / numbers.numel()
            used = (-(share * share.clamp_min(1e-12).log()).sum()).exp()
            if step < 0.9 * self.steps:
                book.update(tokens.detach().flatten(0, 1), random.shared)
        smaller, answers = self.reader(read.to(self.reader.embed.weight.dtype))
        target = F.adaptive_avg_pool2d(images.pixels, smaller.shape[-2:])
        error = (smaller.float() - target).square().flatten(1).mean(1)  # [B]
        wrong = torch.stack(
            [
                F.cross_entropy(answer.float(), images.labels[:, i].long(), reduction="none").flatten(1).mean(1)
                for i, answer in enumerate(answers)
            ]
        ).sum(0)
        each = self.pixel_weight * error + self.label_weight * wrong + self.commitment * far
        return Loss(each, {"pixels": error, "labels": wrong, "far": far, "codes_in_use": used})

    @torch.no_grad()
    def finish(self) -> None:
        """Give the codes to the model."""
        self.model[0].vqmodel.quantize.embedding.weight.copy_(self.book.codes)


@torch.no_grad()
def tokenize(model: Any, pixels: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> the indices [B, N] of their codes."""
    codes = F.normalize(model.vqmodel.quantize.embedding.weight.float(), dim=-1)
    numbers: Tensor = (directions(model, pixels) @ codes.T).argmax(-1)
    return numbers
