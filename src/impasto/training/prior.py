"""Training of GLM-Image's prior, the language model that generates an image's tokens from a prompt.

Shapes: B sequences, the longest of S tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import Loss, Recipe, train
from .randomness import Randomness


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
    """The mean cross-entropy of the targets, in nats, and the share of targets that are the most likely token."""
    logits = scores(model, batch).float()  # [B, T, V]
    wrong = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    right = (logits.detach().argmax(-1) == batch.targets).float()
    weights = torch.ones(wrong.shape[1]) if batch.weights is None else batch.weights
    share = weights / weights.sum() / len(wrong)
    return (wrong * share).sum(), (right * share).sum()


def train_prior(
    model: Any, batch: Callable[[int], Sequences], recipe: Recipe, folder: Path, unseen: Sequence[Sequences] = ()
) -> None:
    """Train the language model in place, resuming from ``folder/state.pt`` if it exists.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``.
        batch: step -> its batch.
        unseen: validation batches; the share of correct tokens is logged with every save, by kind. If it is lower than
            in training, there is too little data.
    """
    language = model.model.language_model
    # Without its rotary table: bfloat16 is too coarse for its frequencies.
    models = nn.ModuleDict(
        {"embed": language.embed_tokens, "layers": language.layers, "norm": language.norm, "head": model.lm_head}
    )

    def loss(step: int, random: Randomness) -> Loss:
        sequences = batch(step)
        total, right = errors(model, sequences)
        return Loss(total, {sequences.kind: right})

    def check(step: int) -> dict[str, float]:
        right: dict[str, list[Tensor]] = {}
        for sequences in unseen:
            right.setdefault(f"unseen_{sequences.kind}", []).append(errors(model, sequences)[1])
        return {kind: float(torch.stack(several).mean()) for kind, several in right.items()}

    way = language.config._attn_implementation
    language.set_attn_implementation("eager")  # its backward pass takes half the time of torch's own on a CPU
    try:
        train(models, loss, recipe, folder, check if unseen else None, list(language.layers))
    finally:
        language.set_attn_implementation(way)
