"""Safetensors on disk <-> the tensors of a module.

Loading is strict and lean: the module is built on the meta device, and each tensor goes from the memory-mapped
file to its place in its final dtype, so that no second copy of the weights ever exists.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, CheckpointNotFoundError, OutputError, WeightsMismatchError
from .config import read_json, write_json

logger = logging.getLogger("impasto")

WEIGHTS_NAME = "diffusion_pytorch_model"


def with_variant(filename: str, variant: str | None) -> str:
    """``model.safetensors`` -> ``model.fp16.safetensors``; an index gets it before ``.index``, as on the hub."""
    if variant is None:
        return filename
    stem, dot, suffix = filename.partition(".safetensors" if ".safetensors" in filename else ".bin")
    return f"{stem}.{variant}{dot}{suffix}" if not suffix else f"{stem}{dot}.index.{variant}.json"


def find_weight_files(
    folder: Path, *, variant: str | None = None, use_safetensors: bool | None = None, stem: str = WEIGHTS_NAME
) -> list[Path]:
    """The files that together hold a module's weights: one, or the shards that an index lists.

    Raises:
        CheckpointNotFoundError: the folder holds none, or a shard of the index is missing.
        CheckpointError: an index or a shard is damaged, or they do not belong together.
    """
    suffixes = {None: (".safetensors", ".bin"), True: (".safetensors",), False: (".bin",)}[use_safetensors]
    tried = []
    for suffix in suffixes:
        single = folder / with_variant(stem + suffix, variant)
        index = folder / with_variant(stem + suffix + ".index.json", variant)
        tried += [single.name, index.name]
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards_of(index)
    present = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    raise CheckpointNotFoundError(
        f"{folder} holds no weights: expected {' or '.join(tried)}, "
        f"found {', '.join(present) or 'nothing'}. Check the folder, `variant` and `use_safetensors`."
    )


def _shards_of(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download or save the checkpoint again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{index} points outside its folder: {name!r}; do not trust this checkpoint")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointNotFoundError(
            f"{index.parent} lacks {len(missing)} of its {len(names)} weight files: {', '.join(missing)}. "
            f"Download the missing files into that folder."
        )
    shards = [index.parent / name for name in names]
    for shard in shards:
        if shard.suffix == ".safetensors":
            held = tensor_headers(shard)
            lacking = [key for key, name in weight_map.items() if name == shard.name and key not in held]
            if lacking:
                raise WeightsMismatchError(
                    f"{shard} does not hold what {index.name} lists for it: {_listing('missing', lacking)}"
                    f"The shards are of different saves, or the file is of another model; download them again."
                )
    return shards


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other; safetensors are memory-mapped, pickles hold tensors only.

    Raises:
        CheckpointError: the file is damaged, or a pickle that holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or not a safetensors file ({error}). Delete it and download or save it again."
            ) from error
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not loaded: it is damaged, or a pickle that holds more than tensors, which could run "
            f"code on this machine. Ask for a safetensors file instead. ({str(error).splitlines()[0]})"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    yield from content.items()


def stored_names(files: list[Path]) -> set[str]:
    """The names of all tensors in ``files``; of safetensors only the headers are read."""
    names: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            names.update(tensor_headers(file))
        else:
            names.update(name for name, _ in iterate_tensors(file))
    return names


def load_into(
    module: nn.Module,
    files: list[Path],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str] = lambda name: name,
    keep_in_float32: tuple[str, ...] = (),
) -> None:
    """Fill ``module``, built on the meta device, with the tensors in ``files``. Strict.

    Args:
        dtype: of floating-point weights; None keeps what is stored.
        rename: stored name -> the module's name, for checkpoints of older layouts.
        keep_in_float32: parts of names whose tensors stay float32 in any ``dtype``.

    Raises:
        WeightsMismatchError: tensors are missing, unexpected or misshapen; the message names them.
    """
    expected = dict(module.state_dict(keep_vars=True))
    seen: set[str] = set()
    unexpected: list[str] = []
    for file in files:
        for stored_name, tensor in iterate_tensors(file):
            name = rename(stored_name)
            if name not in expected:
                unexpected.append(stored_name)
                continue
            if tensor.shape != expected[name].shape:
                raise WeightsMismatchError(
                    f"{file.name}: {stored_name} has shape {list(tensor.shape)}, and the config asks for "
                    f"{list(expected[name].shape)}. Weights and config.json do not belong together."
                )
            if tensor.is_floating_point():
                keep = any(part in name for part in keep_in_float32)
                tensor = tensor.to(device, torch.float32 if keep else dtype or tensor.dtype)
            else:
                tensor = tensor.to(device)
            _assign(module, name, tensor, requires_grad=expected[name].requires_grad)
            seen.add(name)
    missing = [name for name in expected if name not in seen]
    if missing or unexpected:
        raise WeightsMismatchError(
            f"the weights in {files[0].parent} do not fit {type(module).__name__}'s config: "
            f"{_listing('missing', missing)}{_listing('unexpected', unexpected)}"
            f"Weights and config.json do not belong together, or the files are of another model."
        )


def _listing(what: str, names: list[str], shown: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more}). "


def _assign(module: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        owner._buffers[leaf] = tensor


def save_weights(
    state_dict: Mapping[str, Tensor],
    folder: Path,
    *,
    variant: str | None = None,
    max_shard_bytes: int = 10_000_000_000,
    stem: str = WEIGHTS_NAME,
) -> None:
    """Write safetensors: one file, or shards with an index where that exceeds ``max_shard_bytes``.

    Files are written beside their final names and moved into place together, so that an interrupted save leaves an
    existing checkpoint as it was.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state_dict.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach()
        size += tensor.nbytes

    single = with_variant(f"{stem}.safetensors", variant)
    index_name = with_variant(f"{stem}.safetensors.index.json", variant)
    middle = f".{variant}" if variant else ""
    names = [f"{stem}{middle}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [single]

    staged: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            staged.append((temporary, folder / name))
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # what the user's umask leaves
            save_file(_standing_alone(shard), temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # safetensors makes files that nobody else may read
        for temporary, final in staged:
            os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot save weights into {folder}: {error}") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
    _remove_stale(folder, stem, middle, keep={*names, index_name} if len(shards) > 1 else {*names})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state_dict.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _standing_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as safetensors want it: parts of larger ones and twins are copied."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            found[name] = tensor.clone(memory_format=torch.contiguous_format)
        else:
            seen.add(storage.data_ptr())
            found[name] = tensor.contiguous()
    return found


def _remove_stale(folder: Path, stem: str, middle: str, keep: set[str]) -> None:
    """Drop the weight files of an earlier save under this stem, so that a reader cannot mix the two."""
    pattern = [f"{stem}{middle}.safetensors", f"{stem}{middle}-?????-of-?????.safetensors"]
    variant = middle.removeprefix(".") or None
    pattern.append(with_variant(f"{stem}.safetensors.index.json", variant))
    for glob in pattern:
        for path in folder.glob(glob):
            if path.name not in keep:
                path.unlink()


def tensor_headers(path: Path) -> dict[str, dict[str, Any]]:
    """dtype and shape of each tensor in a safetensors file, read from its header alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= 100_000_000:
                raise CheckpointError(f"{path} is not a safetensors file; download or save it again")
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); download or save it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (no JSON object); download or save it again")
    header.pop("__metadata__", None)
    return header
