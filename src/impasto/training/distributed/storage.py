"""The tensors of a checkpoint as safetensors files, which as many processes read as there are, whoever wrote them.

Every process writes its shards. The folder appears under its name when all files are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from ...checks import shown
from ...errors import CheckpointError, OutputError
from ...files import make_folder, sync, sync_folder, write_file
from ...nn.changes import is_plain_tensor
from .processes import Processes
from .shards import local

#: What a checkpoint says about itself; written last.
STATE = "state.json"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Any, processes: Processes) -> None:
    """Write a folder completely or not at all. All processes call it, on one file system that they share.

    Args:
        folder: must not exist.
        tensors: plain, and then the same everywhere, or sharded.
        state: for JSON; that of the main process counts.

    Raises:
        OutputError: the disk is full, or the folder exists or cannot be written, in any process.
    """
    staging = folder.with_name(f".{folder.name}.incomplete")
    with processes.together():
        if processes.is_main:
            if folder.exists():
                raise OutputError(f"{folder} exists already; choose another folder")
            shutil.rmtree(staging, ignore_errors=True)
            make_folder(staging)
    try:
        writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        save(_stored(tensors), storage_writer=writer, no_dist=processes.count == 1)
    except CheckpointException as error:
        raise _as_error(error, f"{folder} cannot be written", OutputError) from error
    with processes.together():
        if processes.is_main:
            files = {path.name: path.stat().st_size for path in sorted(staging.glob("*.safetensors"))}
            for name in files:
                sync(staging / name)
            content = {"files": files, "tensors": _shapes(tensors), "state": state}
            write_file(staging / STATE, json.dumps(content, indent=1))
            try:
                os.replace(staging, folder)
                sync_folder(folder.parent)
            except OSError as error:
                raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


def read_state(folder: Path) -> Any:
    """What ``write_checkpoint`` stored as ``state``.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    try:
        content = json.loads((folder / STATE).read_bytes())
        files, state, _ = content["files"], content["state"], dict(content["tensors"])
        missing = [name for name, size in files.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint of a run ({type(error).__name__}: {shown(str(error), 200)}); "
            "remove it and resume from another"
        ) from error
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is damaged: its size is wrong; resume from another checkpoint")
    return state


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a checkpoint, by name."""
    read_state(folder)
    shapes: dict[str, list[int]] = json.loads((folder / STATE).read_bytes())["tensors"]
    return shapes


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def read_tensors(folder: Path, into: Mapping[str, Tensor], processes: Processes) -> None:
    """Read tensors, or this process's shards of them, in place. All processes call it.

    Raises:
        CheckpointError: tensors are missing or misshapen, or a file is damaged.
    """
    found, wanted = shapes_of(folder), _shapes(into)
    faults = [f"lacks {name}" for name in wanted if name not in found]
    faults += [f"has {shown(name)}, which this run does not have" for name in found if name not in wanted]
    faults += [
        f"has {n} as {found[n]}, and this run as {wanted[n]}" for n in wanted if found.get(n, wanted[n]) != wanted[n]
    ]
    if faults:
        raise CheckpointError(
            f"{folder} is the checkpoint of another run: it {faults[0]}. Continue that run, or start another"
        )
    stored = _stored(into)
    try:
        load(dict(stored), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=processes.count == 1)
    except CheckpointException as error:
        raise _as_error(error, f"{folder} does not fit this run", CheckpointError) from error
    with torch.no_grad():
        for name, tensor in into.items():
            if not is_plain_tensor(local(tensor)):
                local(tensor).copy_(local(stored[name]))


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files hold them: numbers as vectors of one, and the moments of 8-bit optimizers in float32.

    Quantizing these again gives the same ones.
    """
    return {name: t.reshape(1) if t.ndim == 0 else _dense(t) for name, t in tensors.items()}


def _dense(tensor: Tensor) -> Tensor:
    shard: Any = local(tensor)
    if is_plain_tensor(shard):
        return tensor
    dense: Tensor = shard.dequantize()
    if not isinstance(tensor, DTensor):
        return dense
    mesh, places = tensor.device_mesh, tensor.placements
    return DTensor.from_local(dense, mesh, places, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _as_error(error: CheckpointException, what: str, kind: type[Exception]) -> Exception:
    """The first failure of any process as an error of ours."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return kind(f"{what}: {shown(str(failure), 300)} (rank {rank})")
