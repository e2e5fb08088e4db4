"""Training of GLM-Image's prior: the language model that reads a prompt and says a picture's tokens.

Shapes: B sequences, S tokens of the longest, T tokens that are to be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import Loss, Recipe, train
from .state import append_log


class Sequences(NamedTuple):
    """Prompts, and behind them what is to be said; padded behind."""

    tokens: Tensor  # [B, S]
    positions: Tensor  # [3, B, S]
    starts: Tensor  # [B], where what is to be said begins
    targets: Tensor  # [B, T]
    kind: str = "tokens"  # under which the log tells how many were right
    weights: Tensor | None = None  # [T], how much each counts; None: all the same


@dataclass(frozen=True)
class PriorRecipe(Recipe):
    """How to train."""

    compile_blocks: bool = True


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
    longest = -(-(int(lengths.max()) + count) // 16) * 16  # few lengths, for each of which layers are compiled
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
    length = x.shape[1]
    later = x.new_full((1, 1, length, length), -torch.inf).triu(1)  # which no token sees
    for layer in language.layers:
        x = layer(x, position_embeddings=rotary, attention_mask=later)
    count = sequences.targets.shape[1]
    before = sequences.starts[:, None] - 1 + torch.arange(count)  # [B, T]
    said = x.gather(1, before[..., None].expand(-1, -1, x.shape[-1]))  # [B, T, H]
    result: Tensor = model.lm_head(language.norm(said))
    return result


def errors(model: Any, batch: Sequences) -> tuple[Tensor, Tensor]:
    """The mean error of what is said, in nats, and how much of it is right."""
    said = scores(model, batch).float()  # [B, T, V]
    wrong = F.cross_entropy(said.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    right = (said.detach().argmax(-1) == batch.targets).float()
    weights = torch.ones(wrong.shape[1]) if batch.weights is None else batch.weights
    share = weights / weights.sum() / len(wrong)
    return (wrong * share).sum(), (right * share).sum()


def train_prior(
    model: Any, batches: Iterator[Sequences], recipe: PriorRecipe, folder: Path, unseen: Sequence[Sequences] = ()
) -> None:
    """Train the language model in place, resuming from ``folder/state.pt`` where there is one.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``.
        batches: endless.
        unseen: batches that training does not see: with every save the log tells how many of their tokens are right, by
            kind. Where these are fewer than those of training, it lacks data.
    """
    language = model.model.language_model
    # Without its rotary table, whose frequencies bfloat16 would spoil.
    models = nn.ModuleDict(
        {"embed": language.embed_tokens, "layers": language.layers, "norm": language.norm, "head": model.lm_head}
    )

    def loss(step: int, generator: torch.Generator) -> Loss:
        batch = next(batches)
        total, right = errors(model, batch)
        return Loss(total, {batch.kind: right})

    def check(step: int) -> None:
        right: dict[str, list[Tensor]] = {}
        for batch in unseen:
            right.setdefault(f"unseen_{batch.kind}", []).append(errors(model, batch)[1])
        means = {kind: float(torch.stack(several).mean()) for kind, several in right.items()}
        append_log(folder / "log.jsonl", step=step, **means)

    way = language.config._attn_implementation
    language.set_attn_implementation("eager")  # whose backward takes half as long on a CPU as that of torch's own
    blocks = list(language.layers) if recipe.compile_blocks else []
    try:
        train(models, loss, recipe, folder, on_save=check if unseen else None, blocks=blocks)
    finally:
        language.set_attn_implementation(way)
