"""A warm start for a small text encoder: learn to say what the caption says.

Before the denoiser can bind a colour to its shape, the text must. Slots with learned queries read the encoder's output
the way that cross-attention will, and answer a few questions each. Reader and answers are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.attention import attention


class LabelledText(NamedTuple):
    input_ids: Tensor  # [B, M]
    attention_mask: Tensor  # [B, M]
    labels: Tensor  # [B, slots, questions], the class of each answer


class SlotReader(nn.Module):
    """Reads encoder output [B, M, D] into one answer for each slot and question."""

    def __init__(self, dim: int, slots: int, classes: Sequence[int]):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(slots, dim) * dim**-0.5)
        self.key = nn.Linear(dim, dim)
        self.answers = nn.ModuleList(nn.Linear(dim, count) for count in classes)

    def forward(self, hidden: Tensor, mask: Tensor) -> list[Tensor]:
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]  # [B, 1, 1, M]
        queries = self.queries.expand(len(hidden), 1, -1, -1)  # [B, 1, slots, D]
        read = attention(queries, self.key(hidden)[:, None], hidden[:, None], bias)[:, 0]  # [B, slots, D]
        return [answer(read) for answer in self.answers]  # [B, slots, classes] each


def warm_start(
    encoder: nn.Module, batches: Iterator[LabelledText], reader: SlotReader, steps: int, learning_rate: float = 2e-3
) -> float:
    """Train in place, and return the share of right answers in the last tenth of the steps."""
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    encoder.train()
    right: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        batch = next(batches)
        hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        answers = reader(hidden, batch.attention_mask)
        loss = torch.stack(
            [F.cross_entropy(a.flatten(0, 1), batch.labels[..., i].flatten()) for i, a in enumerate(answers)]
        ).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hits = [(a.argmax(-1) == batch.labels[..., i]).float().mean() for i, a in enumerate(answers)]
        right.append(float(torch.stack(hits).mean()))
    encoder.eval()
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
