"""Stored weights before they are read: their files, and the dtype and shape of each tensor.

A safetensors header is checked completely against the size of its file, so a damaged one is detected at no cost.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checks import is_out_of_memory, printable, shown
from ..errors import CheckpointError, CheckpointNotFoundError, InputError, WeightsMismatchError
from .config import MOST_BYTES, parse_json, read_json
from .layout import VARIANT

WEIGHTS_NAME = "diffusion_pytorch_model"
#: The dtypes that a model may be stored in.
FLOATS = ("float32", "bfloat16", "float16", "float64")
#: The name in headers -> torch's name, and the bits per value.
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "C64": ("complex64", 64),
    "BOOL": ("bool", 8),
    **{f"I{bits}": (f"int{bits}", bits) for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (f"uint{bits}", bits) for bits in (8, 16, 32, 64)},
}
_ENTRY = ("shape", "data_offsets", "dtype")
_AGAIN = "Delete it and download or save it again."


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read."""

    file: Path
    dtype: str  # torch's name
    shape: tuple[int, ...]


Stored = Mapping[str, StoredTensor]


# --- the files of a model's weights ---


def with_variant(filename: str, variant: str | None) -> str:
    """``model.safetensors`` -> ``model.fp16.safetensors``; in an index it precedes ``.index``, as on the hub."""
    if variant is None:
        return filename
    if not isinstance(variant, str) or not re.fullmatch(VARIANT, variant):
        raise InputError(f"variant must be a short word from file names, such as 'fp16', not {shown(variant)}")
    stem, dot, suffix = filename.partition(".safetensors" if ".safetensors" in filename else ".bin")
    return f"{stem}.{variant}{dot}{suffix}" if not suffix else f"{stem}{dot}.index.{variant}.json"


def find_weight_files(
    folder: Path, *, variant: str | None = None, use_safetensors: bool | None = None, stem: str = WEIGHTS_NAME
) -> list[Path]:
    """The files with a module's weights: one, or the shards in an index.

    Raises:
        CheckpointNotFoundError: the folder has none, or a shard is missing.
        CheckpointError: an index or a shard is damaged, or they do not match.
    """
    if use_safetensors not in (None, True, False):
        raise InputError(f"use_safetensors must be True, False or None, not {shown(use_safetensors)}")
    suffixes = {None: (".safetensors", ".bin"), True: (".safetensors",), False: (".bin",)}[use_safetensors]
    tried = []
    try:
        for suffix in suffixes:
            single = folder / with_variant(stem + suffix, variant)
            index = folder / with_variant(stem + suffix + ".index.json", variant)
            tried += [single.name, index.name]
            if single.is_file():
                return [single]
            if index.is_file():
                return _shards_of(index, suffix)
        present = sorted(printable(path.name) for path in folder.glob("*")) if folder.is_dir() else []
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}; check its permissions") from error
    raise CheckpointNotFoundError(
        f"{folder} holds no weights: expected {' or '.join(tried)}, "
        f"found {', '.join(present[:20]) or 'nothing'}. Check the folder, `variant` and `use_safetensors`."
    )


def _shards_of(index: Path, suffix: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download or save the checkpoint again")
    listed: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        require_plain_name(name, index)
        if not name.endswith(suffix):
            raise CheckpointError(f"{index} lists {shown(name)}, which is not a {suffix} file; download it again")
        listed.setdefault(name, []).append(key)
    shards = [index.parent / name for name in sorted(listed)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointNotFoundError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} weight files: {listing(missing)}. "
            f"Download the missing files into that folder."
        )
    for shard in shards if suffix == ".safetensors" else ():
        held = tensor_headers(shard)
        lacking = [key for key in listed[shard.name] if key not in held]
        if lacking:
            raise WeightsMismatchError(
                f"{shard} does not hold what {index.name} lists for it: {len(lacking)} missing ({listing(lacking)}). "
                f"The shards are from different saves, or the file from another model; download them again."
            )
    return shards


def require_plain_name(name: Any, index: Path) -> None:
    """Require the name of a file in the folder of ``index``. Links are not resolved, as hub caches consist of links.

    Raises:
        CheckpointError: a path, an invalid name, or not a string.
    """
    if isinstance(name, str) and (name in (".", "..") or re.search(r"[/\\]", name)):
        raise CheckpointError(f"{index} points outside its folder: {shown(name)}; do not trust this checkpoint")
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(os.fsencode(name)) <= 255:
        raise CheckpointError(f"{index} lists {shown(name)}, which is not a file name; download it again")


def listing(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first ``most``, shortened and printable."""
    given = list(names)
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return ", ".join(printable(name if len(name) <= 200 else f"{name[:200]}...") for name in given[:most]) + more


# --- their contents ---


def describe(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor in ``files``. Only headers of safetensors are read; pickles are memory-mapped.

    Raises:
        CheckpointError: a file is damaged, or two files have a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        held = tensor_headers(file) if file.suffix == ".safetensors" else _pickled_headers(file)
        twice = next((name for name in held if name in found), None)
        if twice is not None:
            raise CheckpointError(
                f"{file} and {found[twice].file.name} both hold {listing([twice])}: the shards are of different saves; "
                f"download them again"
            )
        found |= held
    return found


def tensor_headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the header is damaged or does not match the size of the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= size - 8:
                raise CheckpointError(f"{path} is damaged or not a safetensors file (of {size} bytes). {_AGAIN}")
            if length > MOST_BYTES:  # the header of 10,000 tensors has about a megabyte
                raise ValueError(f"{length} bytes of header, more than the limit of {MOST_BYTES}")
            header = parse_json(file.read(length))
        return dict(_read_header(path, header, size - 8 - length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        if isinstance(error, PermissionError):
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        raise CheckpointError(f"{path} is damaged or has a damaged header ({error}). {_AGAIN}") from error


def _read_header(path: Path, header: Any, data_bytes: int) -> Iterator[tuple[str, StoredTensor]]:
    if not isinstance(header, dict):
        raise ValueError("not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    spans = []
    for name, entry in header.items():
        shape, span, dtype = ((entry if isinstance(entry, dict) else {}).get(key) for key in _ENTRY)
        if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
            raise ValueError(f"{shown(name)} needs a shape and data_offsets, but has {shown(entry)}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}, which is unknown")
        if (span[1] - span[0]) * 8 != math.prod(shape) * DTYPES[dtype][1]:
            raise ValueError(f"{shown(name)} of shape {shown(shape)} does not have {span[1] - span[0]} bytes")
        spans.append(span)
        yield name, StoredTensor(path, DTYPES[dtype][0], tuple(shape))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"its tensors overlap, or leave a gap, at byte {min(first, end)}")
        end = last
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, but the file has {data_bytes}: it was truncated or extended")


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _pickled_headers(path: Path) -> dict[str, StoredTensor]:
    return {name: StoredTensor(path, _name(held.dtype), tuple(held.shape)) for name, held in _unpickle(path).items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the tensors ---


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, memory-mapped.

    Raises:
        CheckpointError: the file is damaged, or a pickle of anything but dense tensors.
    """
    if path.suffix != ".safetensors":
        yield from _unpickle(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}). {_AGAIN}") from error


def load_pickle(path: Path, advice: str) -> Any:
    """Load a file of ``torch.save`` with tensors, numbers, strings, and lists and dicts of them, without running code.

    Args:
        advice: for the message, if it cannot be loaded.

    Raises:
        CheckpointError: the file is damaged, unreadable, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save does not compress; compressed entries may be a bomb
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise pickle.UnpicklingError("compressed")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything: KeyError, UnicodeDecodeError, ...
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        raise CheckpointError(
            f"{path} was not loaded: it is damaged, or a pickle that holds more than tensors, which could run "
            f"code on this machine. {advice}. ({type(error).__name__})"
        ) from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    content = load_pickle(path, "Ask for a safetensors file instead")
    return checked_tensors(path, content.get("state_dict", content) if isinstance(content, dict) else content)


def checked_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The content of a pickle as a state dict of dense tensors.

    Raises:
        CheckpointError: it is anything else.
    """
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} does not hold a state dict of tensors; ask for a safetensors file instead")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} does not hold a state dict of tensors: {listing([name])} is not a tensor")
        if not is_dense(tensor):
            raise CheckpointError(f"{path}: {listing([name])} is not a plain, dense tensor; ask for a safetensors file")
    return content


def is_dense(tensor: Tensor) -> bool:
    """Whether every value is stored once: not sparse, quantized, meta, nested, or expanded."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def first_non_finite(files: Iterable[Path]) -> tuple[Path, str] | None:
    """The file and name of the first tensor with NaN or infinity. Reads all tensors, one by one."""
    tensors = ((file, name, tensor) for file in files for name, tensor in iterate_tensors(file))
    return next(((file, name) for file, name, tensor in tensors if not is_finite(tensor)), None)


def non_finite_parameter(module: nn.Module) -> str | None:
    """The name of the first parameter or buffer with NaN or infinity."""
    return next((name for name, tensor in module.state_dict().items() if not is_finite(tensor)), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, by its extremes, which needs no copy."""
    if not is_dense(tensor) or tensor.numel() == 0 or _name(tensor.dtype) not in FLOATS:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
