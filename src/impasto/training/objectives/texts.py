"""Captions as a denoiser takes them, encoded by a T5 encoder or stored by an earlier job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...pipelines.prompts import encode_texts, prepare
from ..data.sample import Sample


class Text(NamedTuple):
    embeds: Tensor  # [B, M, D]
    mask: Tensor  # [B, M], 1 where there is a token


class Texts:
    """Features of captions.

    Args:
        tokenizer, encoder: of T5; None if all samples have stored features.
        tokens: of a caption, at most.
        empty: [M, D], the stored features of the empty caption, in place of an encoder.
        static: pad to ``tokens`` instead of to the longest caption, so that there is one shape to compile.
        clean: clean captions as the originals did, beyond lower case.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: nn.Module | None,
        tokens: int,
        empty: Tensor | None = None,
        static: bool = False,
        clean: bool = False,
    ):
        self.tokenizer, self.encoder, self.tokens = tokenizer, encoder, tokens
        self.empty, self.static, self.clean = empty, static, clean

    def __call__(self, samples: Sequence[Sample], dropped: Tensor) -> Text:
        """Features of the captions, where ``dropped`` [B] of the empty one, including its mask."""
        without = self.encoder is None and not any(sample.caption for sample in samples)
        if without or any(sample.text is not None for sample in samples):
            return self._stored(samples, dropped)
        if self.encoder is None or self.tokenizer is None:
            raise InputError("the samples have captions, and there is no text encoder; give one, or cache the features")
        captions = ["" if drop else prepare(s.caption or "", self.clean) for s, drop in zip(samples, dropped.tolist())]
        if not any(p.requires_grad for p in self.encoder.parameters()):
            with torch.no_grad():
                device = next(self.encoder.parameters()).device
                encoded = encode_texts(self.tokenizer, self.encoder, captions, self.tokens, device)  # type: ignore[arg-type]
            longest = self.tokens if self.static else max(1, int(encoded.mask.sum(1).max()))
            return Text(encoded.embeds[:, :longest], encoded.mask[:, :longest])
        return self._trained(captions)

    def _trained(self, captions: list[str]) -> Text:
        """Gradients reach the encoder: one padded batch."""
        assert self.encoder is not None
        device = next(self.encoder.parameters()).device
        ids, mask = (tokens.to(device) for tokens in self.tokenize(captions))
        return Text(self._encode(ids, mask), mask)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of prepared captions and their mask, [B, M] each."""
        padding = "max_length" if self.static else "longest"
        options = {"padding": padding, "max_length": self.tokens, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), **options)
        return tokens.input_ids, tokens.attention_mask

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features [B, M, D] of tokens [B, M]."""
        assert self.encoder is not None
        encoded: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return encoded

    def _stored(self, samples: Sequence[Sample], dropped: Tensor) -> Text:
        rows = []
        for sample, drop in zip(samples, dropped.tolist()):
            has_none = sample.text is None and not sample.caption
            row = self._empty() if drop or has_none else sample.text
            if row is None:
                raise InputError("some samples of a batch have stored text features and others do not; cache them all")
            rows.append(row[: self.tokens])
        longest = self.tokens if self.static else max(len(row) for row in rows)
        embeds = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long()
        return Text(embeds, mask)

    def _empty(self) -> Tensor:
        """[M, D], with its own number of tokens."""
        if self.empty is None:
            if self.encoder is None:
                raise InputError(
                    "caption_dropout and images without captions need the features of the empty caption, which are not "
                    "stored; cache them again, or give a text encoder"
                )
            self.empty = self.features([""])[0]
        return self.empty

    @torch.no_grad()
    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """Features [M, D] of the tokens of each caption, as a cache stores them: float32, on the host."""
        if self.encoder is None or self.tokenizer is None:
            raise InputError("there is no text encoder; give one")
        texts = [prepare(caption, self.clean) for caption in captions]
        encoded = encode_texts(self.tokenizer, self.encoder, texts, self.tokens, "cpu")  # type: ignore[arg-type]
        return [row[:length].float() for row, length in zip(encoded.embeds, encoded.mask.sum(1).tolist())]
