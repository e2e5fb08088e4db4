"""The files of a tokenizer, checked before libraries read them, without anything that could choose code.

What remains is data: a vocabulary, special tokens, and normalization rules that cannot lengthen a text without bound.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ...checks import finite, printable, shown, whole_number
from ...errors import CheckpointError, ConfigurationError
from ..config import read_json
from ..values import Bounds, check
from .charsmap import fault_of_charsmap
from .configs import Table, TokenId, known_values

MOST_TOKENS = 2**22
MOST_BYTES = 64_000_000
#: Entries of lists and objects, each about 100 bytes in memory.
MOST_ENTRIES = 2**22
MOST_SENTENCEPIECE_BYTES = 8_000_000
#: The factor by which all rules together may lengthen a text.
MOST_GROWTH = 128
_LONGEST = 1000  # characters of a token or a regular expression

_SETTINGS: Table = {
    "extra_ids": Annotated[int, Bounds(0, 1000)],
    "model_max_length": Annotated[float, Bounds(1, 1e31)] | None,
    "padding_side": Literal["left", "right"],
    "truncation_side": Literal["left", "right"],
    "clean_up_tokenization_spaces": bool | None,
    "split_special_tokens": bool,
    "add_prefix_space": bool | None,
    "add_bos_token": bool | None,
    "add_eos_token": bool | None,
    "legacy": bool | None,
}
_MODEL: Table = {
    "dropout": Annotated[float, Bounds(0, 1)] | None,
    "unk_id": TokenId | None,
    "unk_token": str | None,
    "continuing_subword_prefix": str | None,
    "end_of_word_suffix": str | None,
    "fuse_unk": bool,
    "byte_fallback": bool | None,
    "ignore_merges": bool | None,
    "max_input_chars_per_word": Annotated[int, Bounds(1, 100_000)],
}
_MODELS = ("Unigram", "BPE", "WordLevel", "WordPiece")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer_files(folder: Path, *vocabularies: str) -> dict[str, bytes]:
    """The checked contents of a tokenizer's files by name: its settings, and the present ones of ``vocabularies``.

    Raises:
        CheckpointError: a file is damaged, or is not a tokenizer's.
        ConfigurationError: a setting has the wrong type or range.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "tokenizer_config.json": _settings,
        "special_tokens_map.json": lambda path: _special_tokens(f"{path}: ", read_json(path)),
        "added_tokens.json": _added_tokens,
    }
    known = {"tokenizer.json": _tokenizer, "spiece.model": _sentencepiece}
    readers |= {name: known[name] for name in vocabularies}
    found = {}
    for name, reader in readers.items():
        path = folder / name
        if path.is_file():
            content = reader(path)
            found[name] = content if isinstance(content, bytes) else json.dumps(content).encode()
    return found


# --- settings and special tokens ---


def _settings(path: Path) -> dict[str, Any]:
    content = read_json(path)
    where = f"{path}: "
    found = {**known_values(where, content, _SETTINGS), **_special_tokens(where, content)}
    if found.get("model_max_length") is not None:
        found["model_max_length"] = int(found["model_max_length"])
    if (stored := content.get("added_tokens_decoder")) is not None:
        name = f"{where}added_tokens_decoder"
        found["added_tokens_decoder"] = {
            str(_digits(name, key)): _token(f"{name}.{printable(key)}", token)
            for key, token in _object(name, stored).items()
        }
    return found


def _special_tokens(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The named tokens, such as ``pad_token``, and the lists of others."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key.endswith("_token") and key.isidentifier() and key not in _SETTINGS and value is not None:
            found[key] = _token(f"{where}{printable(key)}", value)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = content.get(key)
        if isinstance(value, list):
            found[key] = [_token(f"{where}{key}", token) for token in value]
        elif value is not None:
            named = _object(f"{where}{key}", value)
            found[key] = {name: _token(f"{where}{key}.{printable(name)}", token) for name, token in named.items()}
            if not all(name.isidentifier() and name.endswith("_token") for name in named):
                raise ConfigurationError(f"{where}{key} must name tokens such as image_token, not {shown(list(named))}")
    return found


def _added_tokens(path: Path) -> dict[str, int]:
    content = read_json(path)
    return {
        _text(f"{path}: a token", token): check(f"{path}: {shown(token)}", number, TokenId)
        for token, number in content.items()
    }


def _token(where: str, value: Any) -> str | dict[str, Any]:
    if isinstance(value, str):
        return _text(where, value)
    entry = _object(where, value)
    flags = known_values(f"{where}.", entry, dict.fromkeys(_TOKEN_FLAGS, bool))
    kind = {"__type": "AddedToken"} if entry.get("__type") == "AddedToken" else {}
    return {"content": _text(f"{where}.content", entry.get("content")), **flags, **kind}


# --- tokenizer.json ---


def _tokenizer(path: Path) -> dict[str, Any]:
    data = _bytes(path, MOST_BYTES)
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_ENTRIES:
        raise CheckpointError(f"{path} has more entries than the {MOST_ENTRIES} of the largest tokenizers")
    del data
    content = read_json(path, most_bytes=MOST_BYTES)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_TOKENS:
        raise CheckpointError(f"{path}: added_tokens must be a list of tokens, not {shown(added)}")
    tokens = []
    for number, entry in enumerate(added):
        where = f"{path}: added_tokens[{number}]"
        token = _token(where, _object(where, entry))
        assert isinstance(token, dict)
        tokens.append({"id": check(f"{where}.id", entry.get("id"), TokenId), **token})
    rules = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    for names in (("normalizer", "pre_tokenizer"), ("post_processor",), ("decoder",)):  # one after the other
        growth = math.prod(_check_rules(f"{path}: {name}", rules[name]) for name in names)
        if growth > MOST_GROWTH:
            raise CheckpointError(
                f"{path}: the rules of {' and '.join(names)} may make a text more than {MOST_GROWTH} times as long; "
                f"download or save it again"
            )
    # Drop truncation and padding: they belong to a call, and the file has those of the last one.
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, **rules} | {
        "model": _model(f"{path}: model", content.get("model"))
    }


def _model(where: str, content: Any) -> dict[str, Any]:
    given = _object(where, content)
    vocabulary = given.get("vocab")
    kind = given.get("type", "Unigram" if isinstance(vocabulary, list) else None)  # missing in early files
    if kind not in _MODELS:
        raise CheckpointError(f"{where}.type must be one of {', '.join(_MODELS)}, not {shown(kind)}")
    found = {"type": kind, **known_values(f"{where}.", given, _MODEL)}
    if kind == "Unigram":
        pieces = _list(f"{where}.vocab", vocabulary)
        for i, piece in enumerate(pieces):
            if not isinstance(piece, list) or len(piece) != 2:
                raise CheckpointError(f"{where}.vocab[{i}] must be a piece and its score, not {shown(piece)}")
        _check_pieces(f"{where}.vocab", pieces)
        if (unknown := found.get("unk_id")) is not None and unknown >= len(pieces):
            raise CheckpointError(f"{where}.unk_id must be below {len(pieces)}, the number of pieces, not {unknown}")
        return {**found, "vocab": pieces}
    found["vocab"] = _object(f"{where}.vocab", vocabulary)
    _check_numbers(f"{where}.vocab", found["vocab"])
    if kind == "BPE":
        found["merges"] = _list(f"{where}.merges", given.get("merges"))
        for i, merge in enumerate(found["merges"]):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
                raise CheckpointError(f"{where}.merges[{i}] must be two pieces, not {shown(merge)}")
    return found


def _check_pieces(where: str, pieces: Iterable[Any]) -> None:
    """Check pieces, unique strings, and scores, finite numbers."""
    seen: set[str] = set()
    for i, (piece, score) in enumerate(pieces):
        if not _is_token(piece) or piece in seen:
            raise CheckpointError(
                f"{where}[{i}] must be a unique piece of 1 to {_LONGEST} characters, not {shown(piece)}"
            )
        if type(score) not in (int, float) or not -1e9 <= score <= 1e9:
            finite(f"{where}[{i}]: the score of {shown(piece)}", score, -1e9, 1e9, error=CheckpointError)
        seen.add(piece)
    if not 3 <= len(seen) <= MOST_TOKENS:
        raise CheckpointError(f"{where} must hold 3 to {MOST_TOKENS} pieces, but holds {len(seen)}")


def _check_numbers(where: str, vocabulary: Mapping[str, Any]) -> None:
    """Check tokens and their ids, which are unique."""
    for text, number in vocabulary.items():
        if not _is_token(text):
            raise CheckpointError(f"{where} must hold tokens of 1 to {_LONGEST} characters, not {shown(text)}")
        if type(number) is not int or not 0 <= number <= 2**24:
            whole_number(f"{where}: the number of {shown(text)}", number, 0, 2**24, error=CheckpointError)
    if len(set(vocabulary.values())) != len(vocabulary):
        raise CheckpointError(f"{where} gives the same id to several tokens; download or save it again")
    if not 1 <= len(vocabulary) <= MOST_TOKENS:
        raise CheckpointError(f"{where} must hold 1 to {MOST_TOKENS} tokens, but holds {len(vocabulary)}")


def _check_rules(where: str, rules: Any, depth: int = 0) -> int:
    """Check rules that normalize, split, frame and join a text. Returns the factor by which they may lengthen it."""
    growth = 1
    if isinstance(rules, Mapping) and depth < 12:
        growth = _growth(rules)
        for key, value in rules.items():
            name = f"{where}.{printable(key[:40])}"
            if key == "precompiled_charsmap":
                _check_charsmap(name, value)
                continue
            if key == "length":
                whole_number(name, value, 1, 2**24, error=CheckpointError)
            if key == "normalizers" and isinstance(value, list) and len(value) > 8:
                raise CheckpointError(f"{name} must be at most 8 rules, not {len(value)}")
            if key in ("content", "prepend") and isinstance(value, str) and len(value) > 4:
                raise CheckpointError(f"{name} must be at most 4 characters, not {shown(value)}")
            if key == "Regex" and isinstance(value, str) and _repeats_a_group(value):
                raise CheckpointError(f"{name} repeats a group without bound, which could take forever: {shown(value)}")
            growth = min(growth * _check_rules(name, value, depth + 1), MOST_GROWTH + 1)
    elif isinstance(rules, list) and depth < 12 and len(rules) <= _LONGEST:
        for i, rule in enumerate(rules):
            growth = min(growth * _check_rules(f"{where}[{i}]", rule, depth + 1), MOST_GROWTH + 1)
    elif isinstance(rules, str):
        _text(where, rules)
    elif isinstance(rules, int | float):
        finite(where, int(rules) if isinstance(rules, bool) else rules, -(2**24), 2**24, error=CheckpointError)
    elif rules is not None:
        raise CheckpointError(f"{where} must be a small rule, not {shown(rules)}")
    return growth


def _growth(rule: Mapping[str, Any]) -> int:
    """The factor by which a rule may lengthen a text, without nested rules."""
    grown = {"precompiled_charsmap": 16, "handle_chinese_chars": 3, "trim_offsets": 2, "replacement": 2}
    growth = math.prod(factor for key, factor in grown.items() if key in rule)
    if rule.get("type") == "ByteLevel":
        growth = 2
    for key in ("content", "prepend"):
        if isinstance(text := rule.get(key), str):
            pattern = rule.get("pattern")
            replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
            # An expression may match the empty string between any two characters.
            growth *= max(1, math.ceil(len(text) / len(replaced))) if replaced else len(text) + 1
    frames = [len(rule[key]) for key in ("single", "pair") if isinstance(rule.get(key), list | str)]
    return growth * max([1, *frames])


def _repeats_a_group(pattern: str) -> bool:
    """Whether a group is repeated, which could backtrack exponentially.

    Syntax that could hide it counts as well: comments, free spacing, calls of groups, and controls such as ``\\c[``.
    """
    if re.search(r"\(\?([^:=!<>)]*x|[#~])", pattern):
        return True
    depth, i = 0, 0  # of [classes], which can be nested
    while i < len(pattern):
        if pattern[i] == "\\":
            if pattern[i + 1 : i + 2] in tuple("gcCM"):
                return True
            i += 1
        elif pattern[i] == "[":
            depth += 1
        elif pattern[i] == "]" and depth:
            depth -= 1
        elif pattern[i] == ")" and not depth:
            quantifiers = re.match(r"(?:[*+?]|\{[^}]*\})*", pattern[i + 1 :])
            assert quantifiers is not None
            if re.search(r"[*+]|,\}|\d\d", quantifiers[0]):
                return True
        i += 1
    return False


def _check_charsmap(where: str, value: Any) -> None:
    try:
        fault = fault_of_charsmap(base64.b64decode(value, validate=True))
    except (TypeError, ValueError):  # including strings that are not base64
        fault = "it is not base64"
    if fault:
        raise CheckpointError(f"{where} is damaged: {fault}; download or save it again")


# --- spiece.model ---


def _sentencepiece(path: Path) -> bytes:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    data = _bytes(path, MOST_SENTENCEPIECE_BYTES)
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CheckpointError(f"{path} is damaged or no sentencepiece model; download or save it again") from error
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise CheckpointError(f"{path} is not a Unigram model, as T5's tokenizers are; download or save it again")
    _check_pieces(f"{path}: pieces", ((piece.piece, piece.score) for piece in model.pieces))
    if fault := fault_of_charsmap(model.normalizer_spec.precompiled_charsmap):
        raise CheckpointError(f"{path} has a damaged table of replacements: {fault}; download or save it again")
    return data


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than the limit of {most}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


# --- values ---


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= _LONGEST


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise CheckpointError(f"{where} must be a string of at most {_LONGEST} characters, not {shown(value)}")
    return value


def _digits(where: str, value: str) -> int:
    number = int(value) if re.fullmatch(r"[0-9]{1,8}", value) else math.nan
    return whole_number(f"{where}: the number {shown(value)}", number, 0, 2**24, error=ConfigurationError)


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, not {shown(value)}")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_TOKENS:
        raise CheckpointError(f"{where} must be a list of at most {MOST_TOKENS} entries, not {shown(value)}")
    return value
