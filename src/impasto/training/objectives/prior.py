"""Training of GLM-Image's prior, the language model that generates an image's tokens from a prompt.

Shapes: B sequences, the longest of S tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..running.randomness import Randomness
from .base import Loss, Objective, Tensors


class Sequences(NamedTuple):
    """Prompts, each followed by its target tokens and padding."""

    tokens: Tensor  # [B, S]
    positions: Tensor  # [3, B, S]
    starts: Tensor  # [B], where the targets start
    targets: Tensor  # [B, T]
    kind: str = "tokens"  # the name in the log of the share of correct tokens
    weights: Tensor | None = None  # [T], of the targets; None: equal


def join(
    prompts: Sequence[Tensor], positions: Sequence[Tensor], targets: Tensor, offsets: Tensor, padding: int, kind: str
) -> Sequences:
    """Combine prompts into one batch.

    Args:
        prompts: the tokens [length] of each.
        positions: [3, length] of each.
        targets: [B, T].
        offsets: [3, T], the positions of targets relative to the end of their prompt.
        padding: the token to pad with.
    """
    batch, count = targets.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = -(-(int(lengths.max()) + count) // 16) * 16  # few different lengths, as layers are compiled for each
    tokens = torch.full((batch, longest), padding)
    places = torch.zeros(3, batch, longest, dtype=torch.long)
    for row, (prompt, place) in enumerate(zip(prompts, positions, strict=True)):
        end = len(prompt)
        tokens[row, :end], places[:, row, :end] = prompt, place
        tokens[row, end : end + count] = targets[row]
        places[:, row, end : end + count] = place[:, -1:] + 1 + offsets
    return Sequences(tokens, places, lengths, targets, kind)


def scores(model: Any, sequences: Sequences) -> Tensor:
    """The logits [B, T, vocabulary] of the targets, from transformers' model."""
    language = model.model.language_model
    x = language.embed_tokens(sequences.tokens)  # [B, S, H]
    rotary = language.rotary_emb(x, sequences.positions)
    length = x.shape[1]
    later = x.new_full((1, 1, length, length), -torch.inf).triu(1)  # no token attends to these
    for layer in language.layers:
        x = layer(x, position_embeddings=rotary, attention_mask=later)
    count = sequences.targets.shape[1]
    before = sequences.starts[:, None] - 1 + torch.arange(count)  # [B, T]
    x = x.gather(1, before[..., None].expand(-1, -1, x.shape[-1]))  # [B, T, H]
    result: Tensor = model.lm_head(language.norm(x))
    return result


def errors(model: Any, batch: Sequences) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy [B] of the targets, in nats, and the share [B] that are the most likely token."""
    logits = scores(model, batch).float()  # [B, T, V]
    wrong = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    right = (logits.detach().argmax(-1) == batch.targets).float()
    weights = torch.ones(wrong.shape[1]) if batch.weights is None else batch.weights
    share = weights / weights.sum()
    return (wrong * share).sum(1), (right * share).sum(1)


class Prior(Objective):
    """The cross-entropy of an image's tokens, given its prompt. Its batches are Sequences.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``, of which the language model is trained.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = (model,)  # not a module of this one: the vision tower is not trained
        language = model.model.language_model
        # Without its rotary table: bfloat16 is too coarse for its frequencies.
        self.embed, self.layers, self.norm, self.head = (
            language.embed_tokens,
            language.layers,
            language.norm,
            model.lm_head,
        )

    def forward(self, batch: Tensors, random: Randomness) -> Loss:
        sequences: Sequences = batch.values
        wrong, right = errors(self.model[0], sequences)
        return Loss(wrong, {sequences.kind: right})

    def check(self, unseen: Sequence[Sequences]) -> Mapping[str, float]:
        """The share of correct tokens, by kind of batch. Less than in training means that there is too little data."""
        right: dict[str, list[Tensor]] = {}
        for sequences in unseen:
            right.setdefault(f"unseen_{sequences.kind}", []).append(errors(self.model[0], sequences)[1].mean())
        return {kind: float(torch.stack(several).mean()) for kind, several in right.items()}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """In this block, the language model's attention is eager: its backward pass takes half the time on a CPU."""
    language = model.model.language_model
    way = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(way)
