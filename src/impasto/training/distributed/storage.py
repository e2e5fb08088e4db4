"""The tensors of a checkpoint: safetensors files, to which each process writes its shards and which all may read."""

from __future__ import annotations

import json
import math
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

from ...checkpoints.config import read_json
from ...checkpoints.stored import tensor_headers
from ...checks import shown
from ...errors import CheckpointError, OutputError
from ...files import write_file
from ...nn.changes import is_plain_tensor
from .processes import Processes
from .shards import local

#: What a checkpoint says about itself; written last.
STATE = "state.json"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], processes: Processes) -> None:
    """Write tensors into a folder that exists, the same in all processes, which all call this.

    Args:
        tensors: plain, and then the same everywhere, or sharded.
        state: for JSON, a dict; that of the main process counts.

    Raises:
        OutputError: the disk is full or the folder cannot be written, in any process.
    """
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(_stored(tensors), storage_writer=writer, no_dist=processes.count == 1)
    except CheckpointException as error:
        raise _as_error(error, f"{folder} cannot be written", OutputError) from error
    with processes.together():
        if processes.is_main:
            files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
            content = {"files": files, "tensors": _described(tensors), "state": state}
            write_file(folder / STATE, json.dumps(content, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """What ``write_tensors`` stored as ``state``.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    state: dict[str, Any] = _contents(folder)["state"]
    return state


def read_tensors(folder: Path, into: Mapping[str, Tensor], processes: Processes) -> None:
    """Read tensors, or this process's shards of them, in place. All processes call it.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or a file is damaged. None has changed.
    """
    found, wanted = _contents(folder)["tensors"], _described(into)
    faults = [f"lacks {name}" for name in wanted if name not in found]
    faults += [f"has {shown(name)}, which this run does not have" for name in found if name not in wanted]
    for name, kind in wanted.items():
        if found.get(name, kind) != kind:
            faults.append(f"has {name} as {shown(found[name])}, and this run as {kind}")
    if faults:
        raise CheckpointError(
            f"{folder} is the checkpoint of another model or run: it {faults[0]}. Continue that one, or start another"
        )
    stored = _stored(into)
    try:
        load(dict(stored), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=processes.count == 1)
    except CheckpointException as error:
        raise _as_error(error, f"{folder} cannot be read", CheckpointError) from error
    with torch.no_grad():
        for name, tensor in into.items():
            if not is_plain_tensor(local(tensor)) or not local(tensor).is_contiguous():
                local(tensor).copy_(local(stored[name]))


def _contents(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, after a look at its files."""
    path = folder / STATE
    content = read_json(path)
    if not all(isinstance(content.get(name), dict) for name in ("files", "tensors", "state")):
        raise CheckpointError(f"{path} is not that of a training run; resume from another checkpoint")
    if not all(_is_kind(kind) for kind in content["tensors"].values()):
        raise CheckpointError(f"{path} does not describe its tensors; {_OTHER}")
    numbers = dict.fromkeys(content["tensors"], 0)
    for name, size in content["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file} is missing or damaged: {path} describes it; resume from another checkpoint")
        for tensor, (_, dtype, shape) in tensor_headers(file).items():
            if content["tensors"].get(tensor, [None])[0] != dtype:
                raise CheckpointError(f"{file} has {shown(tensor)} as {dtype}, and {path} does not; {_OTHER}")
            numbers[tensor] += math.prod(shape)
    for tensor, (_, shape) in content["tensors"].items():
        if numbers[tensor] != math.prod(shape):
            raise CheckpointError(f"{folder} has only a part of {shown(tensor)}; {_OTHER}")
    return content


def _is_kind(value: Any) -> bool:
    """Whether a value is a dtype and a shape."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        return False
    return isinstance(value[0], str) and all(type(size) is int and size >= 0 for size in value[1])


_OTHER = "resume from another checkpoint"


def _described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The dtype and the shape of each tensor, as a file has it."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in _stored(tensors).items()}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files hold them: numbers as vectors of one, and the moments of 8-bit optimizers in float32.

    Quantizing these again gives the same ones.
    """
    return {name: t.reshape(1) if t.ndim == 0 else _dense(t) for name, t in tensors.items()}


def _dense(tensor: Tensor) -> Tensor:
    shard: Any = local(tensor)
    if is_plain_tensor(shard):
        return tensor if shard.is_contiguous() else tensor.contiguous()  # channels last, say
    dense: Tensor = shard.dequantize()
    if not isinstance(tensor, DTensor):
        return dense
    mesh, places = tensor.device_mesh, tensor.placements
    return DTensor.from_local(dense, mesh, places, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _as_error(error: CheckpointException, what: str, kind: type[Exception]) -> Exception:
    """The first failure of any process as an error of ours."""
    rank, (failure, _) = next(iter(error.failures.items()))
    return kind(f"{what}: {shown(str(failure), 300)} (rank {rank})")
