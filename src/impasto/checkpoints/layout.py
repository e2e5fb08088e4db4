"""The names of the files in a checkpoint's folders, and which of an earlier save a new one replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

#: Which classes the components of a pipeline have.
INDEX_NAME = "model_index.json"
#: Such as fp16: a part of the names of weight files.
VARIANT = r"\w[\w-]{0,63}"
#: Weights of one component: one file, or shards with an index; ``variant`` is such as fp16.
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    rf"(-\d+-of-\d+)?(\.(?P<variant>(?!safetensors|bin){VARIANT}?))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
    rf"(?P<index>\.index(\.(?P<index_variant>{VARIANT}))?\.json)?"
)
#: The files of tokenizers and processors: a save writes some of them, and those of an older one would mix with these.
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


def superseded(present: Sequence[str], written: Sequence[str]) -> Iterable[str]:
    """Of the files that are there, those that belong to what the written ones replace.

    That is: weights of the same name, variant and kind, in however many shards, and the files of a tokenizer or
    processor. Weights of another variant, pickles, and files that no save writes are kept.
    """
    new = {_owner(name) for name in written} - {None}
    return [name for name in present if _owner(name) in new]


def _owner(name: str) -> tuple[str, ...] | None:
    """What a file belongs to: the weights of one variant in a folder, or the vocabulary in it; None: to neither."""
    path = PurePosixPath(name)
    folder = path.parent.as_posix()
    if path.name in READER_FILES:
        return folder, "vocabulary"
    match = WEIGHTS.fullmatch(path.name)
    if match is None:
        return None
    return folder, match["stem"], match["kind"], match["variant"] or match["index_variant"] or ""
