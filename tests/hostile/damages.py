"""Ways to damage the weights in a component's folder: name -> what is done, the class of error, what the message names.

Loading and ``impasto info`` are to refuse them alike.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from impasto.checkpoints import weights

NAME = "diffusion_pytorch_model.safetensors"
INDEX = f"{NAME}.index.json"
BIN = "diffusion_pytorch_model.bin"
KEY = "proj_out.bias"


class Damage(NamedTuple):
    apply: Callable[[Path], Any]
    error: str = "CheckpointError"
    named: tuple[str, ...] = (NAME,)


# --- headers ---


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], Any]:
    size = len(header) if length is None else length
    return lambda folder: (folder / NAME).write_bytes(size.to_bytes(8, "little") + header + data)


def cut(keep: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / NAME).write_bytes(keep((folder / NAME).read_bytes()))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the header, and leave the data as they are."""

    def apply(folder: Path) -> None:
        content = (folder / NAME).read_bytes()
        length = int.from_bytes(content[:8], "little")
        parsed = json.loads(content[8 : 8 + length])
        text = change(parsed) or json.dumps(parsed)
        raw(text.encode(), content[8 + length :])(folder)

    return apply


def entry(**values: Any) -> Callable[[Path], Any]:
    return header(lambda parsed: parsed[KEY].update(values))


def text(old: str, new: str) -> Callable[[Path], Any]:
    return header(lambda parsed: json.dumps(parsed).replace(old, new, 1))


def span(move: Callable[[int, int], list[Any]]) -> Callable[[Path], Any]:
    return header(lambda parsed: parsed[KEY].update(data_offsets=move(*parsed[KEY]["data_offsets"])))


HEADERS = {
    "empty file": Damage(cut(lambda content: b"")),
    "seven bytes": Damage(cut(lambda content: content[:7])),
    "eight bytes": Damage(cut(lambda content: content[:8])),
    "length of 100 MB": Damage(raw(b"", length=100_000_000)),
    "length of 2**63": Damage(raw(b"{}", length=2**63)),
    "length of 0": Damage(raw(b"", b"\0" * 100)),
    "no JSON": Damage(raw(b"{not json}")),
    "a list": Damage(raw(b"[1, 2]")),
    "a number": Damage(raw(b"1")),
    "deep": Damage(raw(b'{"a":' + b"[" * 100_000)),
    "not UTF-8": Damage(raw(b'{"\xff": 1}')),
    "cut off by one byte": Damage(cut(lambda content: content[:-1])),
    "cut in half": Damage(cut(lambda content: content[: len(content) // 2])),
    "one byte more": Damage(cut(lambda content: content + b"\0")),
    "name twice": Damage(text('"proj_out.weight"', f'"{KEY}"'), named=(NAME, KEY)),
    "integer of 5,000 digits": Damage(text('"shape": [', f'"shape": [{"9" * 5000}, ')),
    "integer of 4,000 digits": Damage(text('"shape": [', f'"shape": [{"9" * 4000}, ')),
    "unknown dtype": Damage(entry(dtype="F99"), named=(NAME, KEY, "F99")),
    "dtype is a number": Damage(entry(dtype=32), named=(NAME, KEY)),
    "dtype is a list": Damage(entry(dtype=["F32"]), named=(NAME, KEY)),
    "negative shape": Damage(entry(shape=[-32]), named=(NAME, KEY)),
    "fractional shape": Damage(entry(shape=[32.0]), named=(NAME, KEY)),
    "text as shape": Damage(entry(shape="32"), named=(NAME, KEY)),
    "true as shape": Damage(entry(shape=[True, 32]), named=(NAME, KEY)),
    "huge shape": Damage(entry(shape=[2**62] * 60), named=(NAME, KEY)),
    "65 dimensions": Damage(entry(shape=[1] * 65 + [32]), named=(NAME, KEY)),
    "shape of other bytes": Damage(entry(shape=[31]), named=(NAME, KEY)),
    "offsets reversed": Damage(span(lambda first, last: [last, first]), named=(NAME, KEY)),
    "offsets beyond the file": Damage(span(lambda first, last: [first + 2**40, last + 2**40])),
    "offsets overlap": Damage(span(lambda first, last: [first + 4, last + 4])),
    "three offsets": Damage(span(lambda first, last: [first, last, last]), named=(NAME, KEY)),
    "offsets are texts": Damage(span(lambda first, last: [str(first), str(last)]), named=(NAME, KEY)),
    "no offsets": Damage(header(lambda parsed: parsed[KEY].pop("data_offsets") and None), named=(NAME, KEY)),
    "entry is a list": Damage(header(lambda parsed: parsed.update({KEY: [1]})), named=(NAME, KEY)),
    "metadata is a list": Damage(header(lambda parsed: parsed.update(__metadata__=[]))),
    "metadata of numbers": Damage(header(lambda parsed: parsed.update(__metadata__={"a": 1}))),
}


# --- tensors ---


def tensors(**changes: Any) -> Callable[[Path], Any]:
    """Save other tensors; None leaves one out."""

    def apply(folder: Path) -> None:
        content = load_file(folder / NAME) | changes
        save_file({name: tensor for name, tensor in content.items() if tensor is not None}, folder / NAME)

    return apply


def stored_as(dtype: torch.dtype) -> Damage:
    name = str(dtype).removeprefix("torch.")
    return Damage(tensors(**{KEY: torch.zeros(32, dtype=dtype)}), named=(NAME, KEY, name))


TENSORS = {
    **{
        str(dtype): stored_as(dtype)
        for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "same bits as integers": Damage(entry(dtype="I32"), named=(NAME, KEY, "int32")),
    "missing": Damage(tensors(**{KEY: None}), "WeightsMismatchError", ("1 missing", KEY)),
    "left over": Damage(tensors(stranger=torch.zeros(1)), "WeightsMismatchError", ("1 unexpected", "stranger")),
    "left over, a terminal's escape": Damage(
        tensors(**{"\x1b[2J" + "x" * 5000: torch.zeros(1)}), "WeightsMismatchError", ("1 unexpected", "\\x1b[2Jx")
    ),
    "misshapen": Damage(tensors(**{KEY: torch.zeros(5)}), "WeightsMismatchError", (NAME, KEY, "[5]", "[32]")),
    "no tensors": Damage(lambda folder: save_file({}, folder / NAME), "WeightsMismatchError", ("num_layers",)),
}


# --- shards and their index ---


def sharded(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Save in shards, and change the index or the shards."""

    def apply(folder: Path) -> None:
        content = load_file(folder / NAME)
        (folder / NAME).unlink()
        weights.write_weights(content, folder, max_shard_bytes=30_000)
        index = json.loads((folder / INDEX).read_text())
        written = change(folder, index)
        (folder / INDEX).write_text(written if isinstance(written, str) else json.dumps(index))

    return apply


def shard_named(name: Any, *named: str) -> Damage:
    return Damage(sharded(lambda folder, index: index["weight_map"].update({KEY: name})), named=(INDEX, *named))


def _twice(folder: Path, index: dict[str, Any]) -> None:
    first, second = sorted(set(index["weight_map"].values()))[:2]
    content, other = load_file(folder / first), load_file(folder / second)
    name = next(iter(content))
    save_file({**other, name: content[name]}, folder / second)


def _other_save(folder: Path, index: dict[str, Any]) -> None:
    first, second = sorted(set(index["weight_map"].values()))[:2]
    (folder / first).write_bytes((folder / second).read_bytes())


def _missing(folder: Path, index: dict[str, Any]) -> None:
    (folder / index["weight_map"][KEY]).unlink()


def _truncated(folder: Path, index: dict[str, Any]) -> None:
    path = folder / index["weight_map"][KEY]
    path.write_bytes(path.read_bytes()[:-1])


def _pickled_shards(folder: Path, index: dict[str, Any]) -> None:
    for name in set(index["weight_map"].values()):
        torch.save(load_file(folder / name), folder / name.replace(".safetensors", ".bin"))
        (folder / name).unlink()
    index["weight_map"] = {key: name.replace(".safetensors", ".bin") for key, name in index["weight_map"].items()}


SHARDS = {
    "outside, relative": shard_named("../outside.safetensors", "outside.safetensors"),
    "outside, absolute": shard_named("/etc/passwd", "/etc/passwd"),
    "outside, Windows": shard_named("..\\outside.safetensors"),
    "in a subfolder": shard_named("sub/x.safetensors"),
    "the folder": shard_named("."),
    "the parent": shard_named(".."),
    "300 characters": shard_named("x" * 300 + ".safetensors"),
    "300 bytes": shard_named("é" * 130 + ".safetensors"),
    "empty name": shard_named(""),
    "a number": shard_named(5),
    "null": shard_named(None),
    "a list": shard_named(["x.safetensors"]),
    "NUL": shard_named("x\0.safetensors", "x\\x00"),
    "a terminal's escape": shard_named("\x1b[2J.safetensors", "\\x1b[2J"),
    "another kind of file": shard_named("config.json", "config.json"),
    "a pickle": shard_named("diffusion_pytorch_model.bin", ".bin"),
    "all are pickles": Damage(sharded(_pickled_shards), named=(INDEX, ".bin")),
    "a missing shard": Damage(sharded(_missing), "CheckpointNotFoundError", ("lacks 1 of its",)),
    "a truncated shard": Damage(sharded(_truncated), named=("-of-",)),
    "a tensor in two shards": Damage(sharded(_twice), named=("both hold",)),
    "a shard of another place": Damage(sharded(_other_save), "WeightsMismatchError", (INDEX, "-of-")),
    "no map": Damage(sharded(lambda folder, index: "{}"), named=(INDEX, "weight_map")),
    "an empty map": Damage(sharded(lambda folder, index: '{"weight_map": {}}'), named=(INDEX, "weight_map")),
    "a list as map": Damage(sharded(lambda folder, index: '{"weight_map": [1]}'), named=(INDEX, "weight_map")),
    "no JSON index": Damage(sharded(lambda folder, index: "{"), named=(INDEX,)),
    "a deep index": Damage(sharded(lambda folder, index: '{"weight_map": ' + "[" * 100_000), named=(INDEX,)),
    "an index of 11 MB": Damage(
        sharded(lambda folder, index: " " * 11_000_000 + "{}"), named=(INDEX, "11000002 bytes")
    ),
    "an index with 5,000 digits": Damage(
        sharded(lambda folder, index: json.dumps(index).replace('"total_size": ', '"total_size": ' + "9" * 5000)),
        named=(INDEX,),
    ),
}


# --- pickles ---


def pickled(**changes: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        torch.save(load_file(folder / NAME) | changes, folder / BIN)
        (folder / NAME).unlink()

    return apply


def instead(write: Callable[[Path], Any]) -> Damage:
    def apply(folder: Path) -> None:
        (folder / NAME).unlink()
        write(folder / BIN)

    return Damage(apply, named=(BIN,))


def stream(content: bytes, compression: int = zipfile.ZIP_STORED) -> Damage:
    """A file as torch.save makes them, around this pickle."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return instead(write)


class Foreign:
    def __reduce__(self) -> Any:
        return print, ("code of a checkpoint was run",)


def of_kind(tensor: torch.Tensor) -> Damage:
    return Damage(pickled(**{KEY: tensor}), named=(BIN, KEY))


def _quantized(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them; their files stay
        pickled(**{KEY: torch.quantize_per_tensor(torch.zeros(32), 1.0, 0, torch.qint8)})(folder)


PICKLES = {
    "empty": instead(lambda path: path.write_bytes(b"")),
    "noise": instead(lambda path: path.write_bytes(bytes(range(256)) * 10)),
    "foreign class": instead(lambda path: torch.save({KEY: torch.zeros(32), "x": Foreign()}, path)),
    "foreign class, plain pickle": instead(lambda path: path.write_bytes(pickle.dumps({KEY: Foreign()}))),
    "foreign class, old format": instead(
        lambda path: torch.save({KEY: Foreign()}, path, _use_new_zipfile_serialization=False)
    ),
    "names eval": stream(b"\x80\x02c__builtin__\neval\n."),
    "names nothing": stream(b"\x80\x02cno_such_module\nnothing\n."),
    "recalls what it never stored": stream(b"\x80\x02h\x05."),
    "empty stack": stream(b"\x80\x02."),
    "ends early": stream(b"\x80\x02}"),
    "not UTF-8": stream(b"\x80\x02X\x02\x00\x00\x00\xff\xfe."),
    "unknown opcode": stream(b"\x80\x02\xff."),
    "unhashable key": stream(b"\x80\x02}]K\x01s."),
    "no pickle": stream(b""),
    "compressed": stream(b"\x80\x02}." + b"\0" * 50_000_000, zipfile.ZIP_DEFLATED),
    "a list": instead(lambda path: torch.save([torch.zeros(1)], path)),
    "a tensor": instead(lambda path: torch.save(torch.zeros(1), path)),
    "numbers as names": instead(lambda path: torch.save({1: torch.zeros(1)}, path)),
    "a number among tensors": Damage(pickled(**{KEY: 5}), named=(BIN, KEY)),
    "a dict among tensors": Damage(pickled(**{KEY: {"a": torch.zeros(1)}}), named=(BIN, KEY)),
    "sparse": of_kind(torch.zeros(32).to_sparse()),
    "quantized": Damage(_quantized, named=(BIN, KEY)),
    "meta": of_kind(torch.zeros(32, device="meta")),
    "one value repeated": of_kind(torch.zeros(1).expand(2**40)),
    "integers": of_kind(torch.zeros(32, dtype=torch.int64)),
    "bool": of_kind(torch.zeros(32, dtype=torch.bool)),
    "complex": of_kind(torch.zeros(32, dtype=torch.complex64)),
    "misshapen": Damage(pickled(**{KEY: torch.zeros(5)}), "WeightsMismatchError", (BIN, KEY)),
    "cut in half": instead(lambda path: (torch.save({KEY: torch.zeros(3000)}, path), _halve(path))),
}


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
