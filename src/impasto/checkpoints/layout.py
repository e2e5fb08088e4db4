"""The names of the files in a checkpoint's folders, and which files of an earlier save are superseded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

#: The file that lists the classes of a pipeline's components.
INDEX_NAME = "model_index.json"
#: A variant such as fp16, in the names of weight files.
VARIANT = r"\w[\w-]{0,63}"
#: Weights of a component: one file, or shards with an index.
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    rf"(-\d+-of-\d+)?(\.(?P<variant>(?!safetensors|bin){VARIANT}?))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
    rf"(?P<index>\.index(\.(?P<index_variant>{VARIANT}))?\.json)?"
)
#: The files of tokenizers and processors. A save writes only some of them, so older ones must go.
READER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    }
)


def weight_patterns(variant: str | None, kind: str) -> list[str]:
    """The files of a component in a repository, which may hold its weights in several forms.

    Args:
        kind: "safetensors" or "bin".
    """
    number = "[0-9]" * 5  # "*" would match the shards of a variant too
    shards = f"-{number}-of-{number}"
    forms = ("", shards) if variant is None else (f".{variant}", f".{variant}{shards}", f"{shards}.{variant}")
    weights = [
        f"{stem}{form}.{kind}" for stem in ("diffusion_pytorch_model", "model", "pytorch_model") for form in forms
    ]
    return ["*.json", "*.jinja", "*.model", "*.txt", *weights]


def holds_weights(folder: Path, variant: str | None, kind: str | None = None) -> bool:
    """Whether the weights of a model in this form are there; tokenizers and schedulers (no config.json) have none."""
    try:
        present = os.listdir(folder)
    except OSError:  # reading it will say what is wrong
        return True
    found = [match for name in present if (match := WEIGHTS.fullmatch(name))]
    return "config.json" not in present or any(
        (match["variant"] or match["index_variant"] or "") == (variant or "") and kind in (None, match["kind"])
        for match in found
    )


def superseded(present: Sequence[str], written: Sequence[str]) -> Iterable[str]:
    """The present files that the written ones supersede.

    These are weights of the same name, variant and kind, in any number of shards, and the files of a tokenizer or
    processor. Weights of other variants, pickles, and files that no save writes are kept.
    """
    new = {_owner(name) for name in written} - {None}
    return [name for name in present if _owner(name) in new]


def _owner(name: str) -> tuple[str, ...] | None:
    """The group of a file: the weights of one variant in a folder, or its vocabulary; None: neither."""
    path = PurePosixPath(name)
    folder = path.parent.as_posix()
    if path.name in READER_FILES:
        return folder, "vocabulary"
    match = WEIGHTS.fullmatch(path.name)
    if match is None:
        return None
    return folder, match["stem"], match["kind"], match["variant"] or match["index_variant"] or ""
