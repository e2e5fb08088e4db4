"""Textual inversion (Gal et al. 2022, 2208.01618): embeddings of a new word, learned from a few images.

Shapes: B images, M text tokens, n embeddings of the word, D channels of the text encoder, V rows of its table.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import shown, whole_number
from ...errors import InputError
from ...pipelines.learned_tokens import FILE_NAME, MOST_ROWS, concepts_of, read_concepts, save_concepts
from ...pipelines.prompts import prepare
from ..data.sample import Sample
from .text_to_image import TextToImage
from .texts import Text, Texts


class LearnedTexts(Texts):
    """Features of captions that hold a new word. The encoder is left as it is: the new rows are put in for each batch.

    Args:
        texts: with a tokenizer and an encoder.
        name: of the word.
        rows: [n, D], trained.
    """

    def __init__(self, texts: Texts, name: str, rows: Tensor):
        if texts.encoder is None or texts.tokenizer is None:
            raise InputError("textual inversion needs the tokenizer and the text encoder: give models.pipeline")
        super().__init__(copy.deepcopy(texts.tokenizer), texts.encoder, texts.tokens, None, texts.static, texts.clean)
        from transformers import AddedToken

        names = [name, *(f"{name}_{i}" for i in range(1, len(rows)))]
        taken = [token for token in names if token in self.tokenizer.get_vocab()]
        if taken:
            raise InputError(f"the tokenizer already has the token {shown(taken[0])}; choose another name")
        self.tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in names])
        self.first = self.tokenizer.convert_tokens_to_ids(name)
        self.name, self.rows, self.concepts = name, rows, concepts_of(self.tokenizer)

    def __call__(self, samples: Sequence[Sample], dropped: Tensor) -> Text:
        """Features of the captions, where ``dropped`` [B] of the empty one, including its mask."""
        captions = []
        for sample, drop in zip(samples, dropped.tolist()):
            if self.name not in (sample.caption or ""):
                raise InputError(
                    f"the caption {shown(sample.caption)} does not hold {shown(self.name)}, which is to be learned; "
                    f"set the captions of the images, such as caption: 'a photo of {self.name}'"
                )
            captions.append("" if drop else sample.caption or "")
        return self.encode(captions)

    def encode(self, captions: Sequence[str]) -> Text:
        """Features of captions with or without the word."""
        return self._trained([prepare(caption, self.clean, self.concepts) for caption in captions])

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features [B, M, D] of tokens [B, M]."""
        encoder: Any = self.encoder
        table: Tensor = encoder.get_input_embeddings().weight  # [V, D]
        new = ids - self.first  # [B, M], of a new row
        known = table[ids.clamp(max=len(table) - 1)]  # [B, M, D]
        embeds = torch.where((new >= 0)[..., None], self.rows[new.clamp(min=0)].to(known), known)
        encoded: Tensor = encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return encoded


class TextualInversion(TextToImage):
    """The denoising loss, of which only the embeddings of a new word are trained.

    Args:
        token: the word, such as ``<cat-toy>``.
        vectors: n, the number of its embeddings.
        start_from: words whose embeddings it starts from, in turn; by default random ones, distributed as the table's.
    """

    unshardable = "its texts read its parameter, which would be replaced"

    def __init__(
        self,
        transformer: Any,
        texts: Texts,
        *arguments: Any,
        token: str,
        vectors: int = 1,
        start_from: str | None = None,
        seed: int = 0,
        **options: Any,
    ):
        vectors = whole_number("vectors", vectors, most=MOST_ROWS)
        rows = nn.Parameter(_start(texts, vectors, start_from, seed))
        (name,) = read_concepts({token: rows.detach()})  # a name that can be loaded again
        super().__init__(transformer, LearnedTexts(texts, name, rows), *arguments, **options)
        self.rows, self.token = rows, name
        self.freeze(self.transformer)
        assert self.text_encoder is not None
        self.freeze(self.text_encoder)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, Any]:
        """As features: the models' own tokenizer does not know the word."""
        learned: Any = self.texts
        embeds, mask = (each.chunk(2) for each in learned.encode([*texts, *[""] * len(texts)]))
        given = {"prompt_embeds": embeds[0], "prompt_attention_mask": mask[0]}
        return {**given, "negative_prompt_embeds": embeds[1], "negative_prompt_attention_mask": mask[1]}

    def export(self, folder: Path) -> None:
        """``learned_embeds.safetensors``, as ``load_textual_inversion`` reads it here and in diffusers."""
        folder.mkdir(parents=True, exist_ok=True)
        save_concepts(folder / FILE_NAME, {self.token: self.rows.detach().float()})


@torch.no_grad()
def _start(texts: Texts, vectors: int, words: str | None, seed: int) -> Tensor:
    if texts.encoder is None or texts.tokenizer is None:
        raise InputError("textual inversion needs the tokenizer and the text encoder: give models.pipeline")
    encoder: Any = texts.encoder
    table: Tensor = encoder.get_input_embeddings().weight.float()
    if words is None:
        random = torch.randn(vectors, table.shape[1], generator=torch.Generator().manual_seed(seed))
        return table.mean(0) + table.std(0) * random.to(table)
    ids = texts.tokenizer(prepare(words, texts.clean), add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"start_from is {shown(words)}, which has no tokens; give a word such as 'toy'")
    return table[[ids[i % len(ids)] for i in range(vectors)]].clone()
