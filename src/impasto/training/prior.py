"""Training of GLM-Image's prior: the language model that reads a prompt and says a picture's tokens.

Shapes: B sequences, S tokens of the longest, T tokens that are to be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import Loss, Recipe, train


class Sequences(NamedTuple):
    """Prompts, and behind them what is to be said; padded behind."""

    tokens: Tensor  # [B, S]
    positions: Tensor  # [3, B, S]
    starts: Tensor  # [B], where what is to be said begins
    targets: Tensor  # [B, T]
    kind: str = "tokens"  # under which the log tells how many were right
    weights: Tensor | None = None  # [T], how much each counts; None: all the same


def join(
    prompts: Sequence[Tensor], positions: Sequence[Tensor], targets: Tensor, offsets: Tensor, padding: int, kind: str
) -> Sequences:
    """One batch of several prompts.

    Args:
        prompts: of each, tokens [its length].
        positions: of each, [3, its length].
        targets: [B, T].
        offsets: [3, T], where targets lie behind the end of their prompt.
        padding: the token that fills what is shorter.
    """
    batch, count = targets.shape
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max()) + count
    tokens = torch.full((batch, longest), padding)
    places = torch.zeros(3, batch, longest, dtype=torch.long)
    for row, (prompt, place) in enumerate(zip(prompts, positions, strict=True)):
        end = len(prompt)
        tokens[row, :end], places[:, row, :end] = prompt, place
        tokens[row, end : end + count] = targets[row]
        places[:, row, end : end + count] = place[:, -1:] + 1 + offsets
    return Sequences(tokens, places, lengths, targets, kind)


def scores(model: Any, sequences: Sequences) -> Tensor:
    """Those of the token that is said, and of all others, [B, T, vocabulary]: of transformers' model."""
    language = model.model.language_model
    x = language.embed_tokens(sequences.tokens)  # [B, S, H]
    rotary = language.rotary_emb(x, sequences.positions)
    for layer in language.layers:
        x = layer(x, position_embeddings=rotary, attention_mask=None)
    count = sequences.targets.shape[1]
    before = sequences.starts[:, None] - 1 + torch.arange(count)  # [B, T]
    said = x.gather(1, before[..., None].expand(-1, -1, x.shape[-1]))  # [B, T, H]
    result: Tensor = model.lm_head(language.norm(said))
    return result


def train_prior(model: Any, batches: Iterator[Sequences], recipe: Recipe, folder: Path) -> None:
    """Train the language model in place, resuming from ``folder/state.pt`` where there is one.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``.
        batches: endless.
    """
    language = model.model.language_model
    # Without its rotary table, whose frequencies bfloat16 would spoil.
    models = nn.ModuleDict(
        {"embed": language.embed_tokens, "layers": language.layers, "norm": language.norm, "head": model.lm_head}
    )

    def loss(step: int, generator: torch.Generator) -> Loss:
        batch = next(batches)
        said = scores(model, batch).float()  # [B, T, V]
        errors = F.cross_entropy(said.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
        right = (said.detach().argmax(-1) == batch.targets).float()
        weights = torch.ones(errors.shape[1]) if batch.weights is None else batch.weights
        share = weights / weights.sum() / len(errors)
        return Loss((errors * share).sum(), {batch.kind: (right * share).sum()})

    train(models, loss, recipe, folder)
