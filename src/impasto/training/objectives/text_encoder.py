"""A warm start for a small text encoder, which learns to answer questions about the caption.

The denoiser can bind a color to its shape only if the text does. Slots with learned queries read the encoder's output
as cross-attention will, and answer a few questions each. Reader and answers are discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attention
from ...pipelines.prompts import prepare
from ..data.sample import Batch
from ..running.randomness import Randomness
from .base import Loss, Objective


class SlotReader(nn.Module):
    """Reads encoder output [B, M, D] into one answer for each slot and question."""

    def __init__(self, dim: int, slots: int, classes: Sequence[int]):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(slots, dim) * dim**-0.5)
        self.key = nn.Linear(dim, dim)
        self.answers = nn.ModuleList(nn.Linear(dim, count) for count in classes)

    def forward(self, hidden: Tensor, mask: Tensor) -> list[Tensor]:
        bias = hidden.new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]  # [B, 1, 1, M]
        queries = self.queries.expand(len(hidden), 1, -1, -1)  # [B, 1, slots, D]
        read = attention(queries, self.key(hidden)[:, None], hidden[:, None], bias)[:, 0]  # [B, slots, D]
        return [answer(read) for answer in self.answers]  # [B, slots, classes] each


class WarmStart(Objective):
    """The cross-entropy of the answers that ``reader`` gives, summed over questions.

    Args:
        tokenize: captions -> input_ids and attention_mask [B, M]. Samples have a caption and ``extra["answers"]``
            [slots, questions], the class of each answer.
    """

    def __init__(self, encoder: Any, reader: SlotReader, tokenize: Callable[[list[str]], tuple[Tensor, Tensor]]):
        super().__init__()
        self.encoder, self.reader, self.tokenize = encoder, reader, tokenize

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        device = next(self.encoder.parameters()).device
        captions = [prepare(sample.caption or "", clean=False) for sample in batch.samples]  # as pipelines do
        ids, mask = (each.to(device) for each in self.tokenize(captions))
        labels = torch.stack([sample.extra["answers"] for sample in batch.samples]).to(device)
        answers = self.reader(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        errors = [
            F.cross_entropy(answer.float().transpose(1, 2), labels[..., i], reduction="none").mean(1)
            for i, answer in enumerate(answers)
        ]
        hits = [(answer.argmax(-1) == labels[..., i]).float().mean(1) for i, answer in enumerate(answers)]
        return Loss(torch.stack(errors).sum(0), {"right": torch.stack(hits).mean(0)})

    def validation(self, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        """The loss, and the share of answers that are right."""
        each, parts = self(batch, random)
        return {"validation": each.mean(), "validation_right": parts["right"].mean()}

    def export(self, folder: Path) -> None:
        self.encoder.save_pretrained(folder / "text_encoder")
