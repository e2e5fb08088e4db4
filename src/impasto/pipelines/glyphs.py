"""The quoted texts of a prompt, to be written in the image -> embeddings of their bytes (ByT5, 2105.13626)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.foreign.errors import TOKENIZING

#: ' ', “ ”, " " and 「 」, in the order of the texts in the embedding of a prompt.
_QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")


def quoted_texts(prompt: str) -> list[str]:
    """The quoted texts of a prompt, ordered by the kind of quotes."""
    return [text for quotes in _QUOTES for text in re.findall(quotes, prompt)]


def most_tokens(prompt: str, max_length: int) -> int:
    """An upper bound on the tokens of a prompt's quoted texts: their bytes, end tokens and padding."""
    return sum(min(len(text.encode()) + 1, max_length) + 1 for text in quoted_texts(prompt) or [""])


@torch.no_grad()
def encode_glyphs(
    tokenizer: Any,
    text_encoder: Any,
    prompts: Sequence[str],
    max_length: int,
    device: torch.device | str,
    quoted: Callable[[str], Sequence[str]] = quoted_texts,
) -> tuple[Tensor, Tensor]:
    """The embeddings of each prompt's quoted texts, concatenated; that of the empty text for a prompt without any.

    If the number of a prompt's texts is even, each is preceded by a padding token, which is attended to, as in
    training.

    Args:
        max_length: bytes of one text.
        quoted: the texts of a prompt that are to be written.

    Returns:
        embeddings [P, M, channels], right-padded with zeros, and their mask [P, M], 1 where there is a token.
    """
    texts: list[list[int]] = []  # of all prompts
    counts: list[int] = []  # of the texts of each prompt
    for prompt in prompts:
        found = list(quoted(prompt)) or [""]
        front = [tokenizer.pad_token_id] * ((len(found) + 1) % 2)
        with TOKENIZING:
            texts += [front + ids for ids in tokenizer(found, max_length=max_length, truncation=True).input_ids]
        counts.append(len(found))

    # Equal texts are encoded once.
    different = list(dict.fromkeys(map(tuple, texts)))
    lengths = [len(ids) for ids in different]
    ids = torch.full((len(different), max(lengths)), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(different):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    hidden = text_encoder(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    encoded = {text: hidden[row, : len(text)] for row, text in enumerate(different)}

    remaining = iter(texts)
    rows = [torch.cat([encoded[tuple(next(remaining))] for _ in range(count)]) for count in counts]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [P, M, channels]
    sizes = torch.tensor([len(row) for row in rows], device=embeds.device)
    return embeds, (torch.arange(embeds.shape[1], device=embeds.device) < sizes[:, None]).long()
