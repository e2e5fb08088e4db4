"""Learned tokens (textual inversion, Gal et al. 2022, 2208.01618): words of a text encoder that stand for a concept.

A concept has a name, such as ``<cat-toy>``, and one or several embeddings. In the tokenizer it is as many added tokens,
``<cat-toy>``, ``<cat-toy>_1`` and so on, and a prompt that holds the name means all of them.

Shapes: n embeddings of a concept, D channels of the text encoder, V rows of its table of embeddings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints import hub
from ..checkpoints.stored import FLOATS, is_dense, is_finite, iterate_tensors, load_pickle
from ..checkpoints.weights import disk_errors
from ..checks import printable, shown, text
from ..errors import CheckpointError, CheckpointNotFoundError, InputError
from ..files import write_file
from ..nn.changes import Change, unwrapped

FILE_NAME = "learned_embeds.safetensors"
PICKLE_NAME = "learned_embeds.bin"
#: The most embeddings of a concept that are accepted.
MOST_ROWS = 1024

Concepts = dict[str, Tensor]  # name -> [n, D]


class LearnedRows(Change):
    """On a text encoder: what its table of embeddings was before concepts were added."""

    change: ClassVar[str] = "given learned tokens"
    undo: ClassVar[str] = "unload_textual_inversion()"

    def __init__(self, rows: int, spare: Tensor):
        self.rows = rows  # V
        self.spare = spare  # [rows beyond the tokenizer's tokens, D]; T5's table has some


# --- in a text ---


def concepts_of(tokenizer: Any) -> dict[str, list[str]]:
    """The concepts of a tokenizer, each with its tokens: those added to it that have no role of their own."""
    added_tokens = getattr(tokenizer, "added_tokens_decoder", {})  # those of other libraries may have none
    added = [token.content for _, token in sorted(added_tokens.items()) if not token.special]
    known, found = {*added}, {}
    for name in added:
        stem, _, number = name.rpartition("_")
        if not (number.isdecimal() and stem in known):
            found[name] = [name]
            while f"{name}_{len(found[name])}" in known:
                found[name].append(f"{name}_{len(found[name])}")
    return found


def pattern_of(concepts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the names of concepts, and those of their tokens; None if there are none."""
    names = sorted(concepts, key=len, reverse=True)
    return re.compile("(" + "|".join(rf"{re.escape(name)}(?:_\d+)?" for name in names) + ")") if names else None


def spelled_out(prompt: str, concepts: Mapping[str, Sequence[str]]) -> str:
    """The prompt with all tokens of a concept in place of its name."""
    pattern = pattern_of(concepts)
    if pattern is None:
        return prompt
    return pattern.sub(lambda found: " ".join(concepts.get(found[0], [found[0]])), prompt)


# --- in a tokenizer and a text encoder ---


def add(tokenizer: Any, text_encoder: Any, concepts: Concepts) -> None:
    """Add concepts to a tokenizer and their embeddings to a text encoder; all of them or, with an error, none.

    Raises:
        InputError: a name that the tokenizer has already, or embeddings of another width.
    """
    encoder = unwrapped(text_encoder)
    table: Tensor = encoder.get_input_embeddings().weight
    vocabulary = tokenizer.get_vocab()
    tokens: list[str] = []
    rows: list[Tensor] = []
    for name, embeds in concepts.items():
        names = [name, *(f"{name}_{i}" for i in range(1, len(embeds)))]
        stem, _, number = name.rpartition("_")
        numbered = [stem] if number.isdecimal() else []  # it would be read as one more token of that concept
        taken = [t for t in (*names, f"{name}_{len(embeds)}", *numbered) if t in vocabulary or t in tokens]
        if taken:
            raise InputError(
                f"the tokenizer already has the token {shown(taken[0])}; give another name with token=..., or unload "
                f"that one first with unload_textual_inversion"
            )
        if embeds.shape[1] != table.shape[1]:
            raise InputError(
                f"{shown(name)} has embeddings of {embeds.shape[1]} channels and the text encoder takes "
                f"{table.shape[1]}: they are for another text encoder"
            )
        tokens += names
        rows += [*embeds]
    if not tokens:
        return
    from transformers import AddedToken

    first = len(tokenizer)
    if not isinstance(vars(encoder).get("learned_rows"), LearnedRows):
        LearnedRows(len(table), table.detach()[first:].clone()).put(encoder, "learned_rows")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    grown = torch.zeros(max(len(table), len(tokenizer)), table.shape[1], dtype=table.dtype, device=table.device)
    grown[: len(table)] = table.detach()
    grown[ids] = torch.stack(rows).to(grown)
    _set_table(encoder, grown, table)


def remove(tokenizer: Any, text_encoder: Any, names: Sequence[str] | None = None) -> None:
    """Remove concepts, by default all, and restore the tokens and embeddings that were there before.

    Raises:
        InputError: a name that the tokenizer has not.
    """
    concepts = concepts_of(tokenizer)
    unknown = [name for name in names or () if name not in concepts]
    if unknown:
        known = ", ".join(map(printable, concepts)) or "none"
        raise InputError(f"the tokenizer has no learned token {shown(unknown[0])}; it has: {known}")
    encoder = unwrapped(text_encoder)
    table: Tensor = encoder.get_input_embeddings().weight
    kept = {
        name: table.detach()[tokenizer.convert_tokens_to_ids(tokens)].clone()
        for name, tokens in concepts.items()
        if names is not None and name not in names
    }
    _strip(tokenizer, {token for tokens in concepts.values() for token in tokens})
    record = vars(encoder).get("learned_rows")
    if isinstance(record, LearnedRows):
        before = table.detach()[: record.rows].clone()
        before[record.rows - len(record.spare) :] = record.spare.to(before)
        record.take(encoder, "learned_rows")
        _set_table(encoder, before, table)
    add(tokenizer, text_encoder, kept)


def _set_table(encoder: Any, rows: Tensor, like: Tensor) -> None:
    embedding = nn.Embedding(len(rows), rows.shape[1], _weight=rows).requires_grad_(like.requires_grad)
    encoder.set_input_embeddings(embedding.train(encoder.training))
    encoder.config.vocab_size = len(rows)


def _strip(tokenizer: Any, tokens: set[str]) -> None:
    """Remove added tokens. Neither kind of tokenizer has a method for it."""
    if hasattr(tokenizer, "backend_tokenizer"):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in tokens]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        return
    for token in tokens:
        number = tokenizer._added_tokens_encoder.pop(token)
        tokenizer._added_tokens_decoder.pop(number)
    tokenizer._update_trie()


# --- in files ---


def save_concepts(path: Path, concepts: Mapping[str, Tensor]) -> None:
    """Write concepts, each a tensor [n, D] under its name, as diffusers and others read them (one concept a file).

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.torch import save

    stored = {name: embeds.detach().to("cpu", copy=True).contiguous() for name, embeds in concepts.items()}
    with disk_errors():
        write_file(path, save(stored, {"format": "pt"}))


def read_concepts(source: Any, token: str | None = None, **options: Any) -> Concepts:
    """Read concepts from a file, a folder, the hub, or tensors that were loaded already.

    Args:
        source: a path, a hub id, a tensor [D] or [n, D], or a dict of such tensors by name, as a file has it: ours and
            diffusers' form ({name: embeddings}), or A1111's (``string_to_param`` and ``name``).
        token: the name of the concept, in place of the stored one.
        options: ``weight_name``, the file in a folder; ``subfolder`` and options of the hub download.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
        InputError: ``token`` is missing or not a name.
    """
    if isinstance(source, Tensor | Mapping):
        content, where = source, "the given embeddings"
    else:
        path = _find(source, **options)
        content, where = _load(path), str(path)
    if isinstance(content, Tensor):
        if token is None:
            raise InputError(f"{where} has no name; give one with token=..., such as token='<cat-toy>'")
        content = {token: content}
    elif "string_to_param" in content:
        parameters = content["string_to_param"]
        if not isinstance(parameters, Mapping) or "*" not in parameters:
            raise CheckpointError(f"{where}: string_to_param holds no embeddings '*'; it is not a textual inversion")
        content = {content.get("name") if token is None else token: parameters["*"]}
    elif "emb_params" in content:
        if token is None:
            raise InputError(f"{where} has no name; give one with token=..., such as token='<cat-toy>'")
        content = {token: content["emb_params"]}
    elif token is not None:
        if len(content) != 1:
            raise InputError(f"{where} holds {len(content)} concepts, which one token=... cannot name")
        content = {token: next(iter(content.values()))}
    if not content:
        raise CheckpointError(f"{where} holds no embeddings")
    return {_name(name): _rows(where, name, embeds) for name, embeds in content.items()}


def _name(name: Any) -> str:
    found = text("token", name, 100)
    if not found or found != found.strip() or not found.isprintable():
        raise InputError(f"token must be a name without spaces around it, such as '<cat-toy>', not {shown(name)}")
    return found


def _rows(where: str, name: str, embeds: Any) -> Tensor:
    if not isinstance(embeds, Tensor) or not is_dense(embeds) or str(embeds.dtype).removeprefix("torch.") not in FLOATS:
        raise CheckpointError(f"{where}: {shown(name)} is not a tensor of embeddings")
    rows = embeds.detach()[None] if embeds.ndim == 1 else embeds.detach()
    if rows.ndim != 2 or not 0 < len(rows) <= MOST_ROWS or rows.shape[1] == 0:
        raise CheckpointError(
            f"{where}: {shown(name)} has shape {list(embeds.shape)}; expected [D], or [n, D] with n up to {MOST_ROWS}"
        )
    if not is_finite(rows):
        raise CheckpointError(f"{where}: {shown(name)} has values that are not finite; save or download it again")
    return rows


def _find(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    subfolder: str | None = None,
    hf_token: str | None = None,
    **options: Any,
) -> Path:
    given = Path(os.path.expanduser(source)) if isinstance(source, str | os.PathLike) else None
    if given is None:
        raise InputError(f"expected a path, a hub id or tensors, not {shown(source)}")
    if given.is_file():
        return given
    names = [weight_name] if weight_name is not None else [FILE_NAME, PICKLE_NAME]
    for name in names:
        if "/" in text("weight_name", name, 255) or "\\" in name or name in ("", ".", ".."):
            raise InputError(f"weight_name must be the name of a file, not {shown(name)}")
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in names]
    folder = hub.inside(hub.resolve(source, allow_patterns=wanted, token=hf_token, **options), subfolder)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointNotFoundError(
            f"{printable(str(folder))} holds no {' or '.join(map(printable, names))}; give the file, or its name with "
            f"weight_name=..."
        )
    return found


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return dict(iterate_tensors(path))
    content = load_pickle(path, "Ask for a safetensors file instead")
    named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not named and not isinstance(content, Tensor):
        raise CheckpointError(f"{path} does not hold embeddings by name; ask for a safetensors file instead")
    return content
