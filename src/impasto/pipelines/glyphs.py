"""What a prompt wants written in the picture -> embeddings of its letters (byte-level T5, 2105.13626)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.foreign.errors import TOKENIZING

#: ' ', “ ”, " " and 「 」, in the order in which the texts of one prompt follow each other.
_QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotes of a prompt, by kind of quote."""
    return [text for quotes in _QUOTES for text in re.findall(quotes, prompt)]


def most_tokens(prompt: str, max_length: int) -> int:
    """So many tokens a prompt's quoted texts have at most: a byte each, their ends, and padding in front."""
    return sum(min(len(text.encode()) + 1, max_length) + 1 for text in quoted_texts(prompt) or [""])


@torch.no_grad()
def encode_glyphs(
    tokenizer: Any, text_encoder: Any, prompts: Sequence[str], max_length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Each prompt's quoted texts, one after the other; that of no text where there are none.

    Where the number of a prompt's texts is even, each gets a token of padding in front, which is attended to: so the
    model was trained.

    Args:
        max_length: bytes of one text.

    Returns:
        embeddings [P, M, channels], padded behind with zeros, and their mask [P, M], 1 where there is a token.
    """
    texts: list[list[int]] = []  # of all prompts
    counts: list[int] = []  # how many of them are a prompt's
    for prompt in prompts:
        found = quoted_texts(prompt) or [""]
        front = [tokenizer.pad_token_id] * ((len(found) + 1) % 2)
        with TOKENIZING:
            texts += [front + ids for ids in tokenizer(found, max_length=max_length, truncation=True).input_ids]
        counts.append(len(found))

    # Equal texts are encoded once: all pictures without guidance share that of no text.
    different = list(dict.fromkeys(map(tuple, texts)))
    lengths = [len(ids) for ids in different]
    ids = torch.full((len(different), max(lengths)), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(different):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    hidden = text_encoder(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    encoded = {text: hidden[row, : len(text)] for row, text in enumerate(different)}

    parts = iter(texts)
    rows = [torch.cat([encoded[tuple(next(parts))] for _ in range(count)]) for count in counts]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [P, M, channels]
    sizes = torch.tensor([len(row) for row in rows], device=embeds.device)
    return embeds, (torch.arange(embeds.shape[1], device=embeds.device) < sizes[:, None]).long()
