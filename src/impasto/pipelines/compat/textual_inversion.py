"""The methods of diffusers' ``TextualInversionLoaderMixin``, for pipelines with one text encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...checks import shown
from ...errors import InputError
from .. import learned_tokens
from ..components import Components

_OPTIONS = frozenset(
    {"weight_name", "subfolder", "cache_dir", "force_download", "local_files_only", "hf_token", "revision"}
)
#: Keywords without an effect here.
_ACCEPTED = frozenset({"proxies", "use_safetensors", "mirror"})


class TextualInversion(Components):
    """Loading of learned tokens."""

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """A prompt, or several, with all tokens of a concept in place of its name."""
        concepts = learned_tokens.concepts_of(tokenizer)
        if isinstance(prompt, str):
            return learned_tokens.spelled_out(prompt, concepts)
        return [learned_tokens.spelled_out(one, concepts) for one in prompt]

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | Mapping[str, Tensor] | Tensor | Sequence[Any],
        token: str | Sequence[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add concepts that were learned by textual inversion: their tokens to the tokenizer, and their embeddings to
        the text encoder. A prompt may then hold their names.

        Args:
            pretrained_model_name_or_path: a file, a folder or hub id with ``learned_embeds.safetensors`` (or ``.bin``),
                a dict of tensors [D] or [n, D] by name, a tensor; or a list of these.
            token: the name of each in place of the stored one.
            tokenizer, text_encoder: the pipeline's by default.
            kwargs: ``weight_name`` (the file in the folder), ``subfolder``, and options of the hub download.

        Raises:
            InputError: no name, a name that exists, embeddings of another width, or an unknown keyword.
            CheckpointError: a file is missing, damaged or holds something else.
        """
        unknown = sorted(set(kwargs) - _OPTIONS - _ACCEPTED)
        if unknown:
            raise InputError(f"load_textual_inversion takes no {unknown[0]}; it takes {', '.join(sorted(_OPTIONS))}")
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS and value is not None}
        given = pretrained_model_name_or_path
        sources: list[Any] = [*given] if isinstance(given, list | tuple) else [given]
        several = isinstance(token, list | tuple)
        names: list[Any] = [*token] if isinstance(token, list | tuple) else [token] * len(sources)
        if several and len(sources) == 1 and isinstance(sources[0], Tensor):
            sources = [*sources[0]]
        if len(names) != len(sources) or (token is not None and not several and len(sources) > 1):
            raise InputError(f"token must be a list of as many names as there are embeddings, {len(sources)}")
        concepts: learned_tokens.Concepts = {}
        for source, name in zip(sources, names, strict=True):
            found = learned_tokens.read_concepts(source, name, **options)
            twice = [name for name in found if name in concepts]
            if twice:
                raise InputError(f"{shown(twice[0])} is the name of two embeddings; give each its own with token=[...]")
            concepts |= found
        learned_tokens.add(self._given("tokenizer", tokenizer), self._given("text_encoder", text_encoder), concepts)

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Remove concepts, by default all, and restore tokenizer and text encoder.

        Args:
            tokens: the names.
            tokenizer, text_encoder: the pipeline's by default.

        Raises:
            InputError: a name that was not loaded.
        """
        names = [tokens] if isinstance(tokens, str) else tokens
        learned_tokens.remove(self._given("tokenizer", tokenizer), self._given("text_encoder", text_encoder), names)

    def _given(self, name: str, component: Any) -> Any:
        found = self.components[name] if component is None else component
        if found is None:
            raise InputError(f"this pipeline has no {name}, which learned tokens need; assign it, or give {name}=...")
        return found
