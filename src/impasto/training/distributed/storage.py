"""The tensors of a checkpoint: safetensors files, to which each process writes its shards and which all may read.

The header of a file has the place of each of its tensors in the whole one; ``state.json`` lists files and tensors and
is written last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...checkpoints.config import read_json
from ...checkpoints.stored import tensor_headers
from ...checks import shown
from ...errors import CheckpointError, OutputError
from ...files import write_file
from ...nn.changes import is_plain_tensor
from .processes import Processes
from .shards import first_row, is_first_copy, local

STATE = "state.json"
_ROWS = "first rows"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], processes: Processes) -> None:
    """Write tensors into a folder that exists, the same in all processes, which all call this.

    The moments of 8-bit optimizers are written in float32, and quantized again in memory, as they will be when they are
    read: so a run that goes on and one that resumes are equal bit for bit.

    Args:
        tensors: plain, and then the same everywhere, or sharded.
        state: for JSON; that of the main process counts.

    Raises:
        OutputError: the disk is full or the folder cannot be written, in any process.
    """
    own: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        mine = is_first_copy(tensor) if isinstance(tensor, DTensor) else i % processes.count == processes.rank
        if mine and (local(tensor).numel() or not tensor.numel()):
            own[name] = _dense(tensor).detach().contiguous()
    rows = {name: first_row(tensors[name]) for name in own}
    with processes.together():
        try:
            path = folder / f"shard-{processes.rank:05d}.safetensors"
            save_file(own, path, {_ROWS: json.dumps(rows)})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {error}; choose another place") from error
    _quantize(tensors, {name: _dense(tensor) for name, tensor in tensors.items()})
    with processes.together():
        if processes.is_main:
            files = {path.name: path.stat().st_size for path in sorted(folder.glob("shard-*.safetensors"))}
            content = {"files": files, "tensors": _described(tensors), "state": state}
            write_file(folder / STATE, json.dumps(content, indent=1))


def replace_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace what ``write_tensors`` stored as ``state``, completely or not at all.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    write_file(folder / STATE, json.dumps({**_contents(folder), "state": state}, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """What ``write_tensors`` stored as ``state``.

    Raises:
        CheckpointError: the folder is not a complete checkpoint.
    """
    state: dict[str, Any] = _contents(folder)["state"]
    return state


@torch.no_grad()
def read_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors, or this process's shards of them, in place.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or a file is damaged; none has changed then.
    """
    content = _contents(folder)
    found, wanted = content["tensors"], _described(into)
    faults = [f"lacks {name}" for name in wanted if name not in found]
    faults += [f"has {shown(name)}, which this run does not have" for name in found if name not in wanted]
    for name, kind in wanted.items():
        if found.get(name, kind) != kind:
            faults.append(f"has {name} as {shown(found[name])}, and this run as {kind}")
    if faults:
        raise CheckpointError(
            f"{folder} is the checkpoint of another model or run: it {faults[0]}. Continue that one, or start another"
        )
    dense = {name: _dense(tensor) for name, tensor in into.items()}
    for part in _parts(folder, content):
        _copy(part, dense[part.name], first_row(into[part.name]))
    _quantize(into, dense)


@torch.no_grad()
def _quantize(tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Set those tensors that are quantized to their values in float32."""
    for name, tensor in tensors.items():
        shard = local(tensor)
        if not is_plain_tensor(shard):
            shard.copy_(dense[name])


class _Part(NamedTuple):
    """Rows of a tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    row: int  # the first


def _copy(part: _Part, into: Tensor, row: int) -> None:
    """Copy those rows of a part that a shard has, whose first row is ``row``."""
    first, last = max(part.row, row), min(part.row + part.shape[0], row + into.shape[0]) if part.shape else 0
    if part.shape and first >= last:
        return
    with safe_open(part.file, framework="pt") as file:
        if part.shape:
            into[first - row : last - row] = file.get_slice(part.name)[first - part.row : last - part.row]
        else:
            into.copy_(file.get_tensor(part.name))


def _parts(folder: Path, content: Mapping[str, Any]) -> Iterator[_Part]:
    for name in content["files"]:
        file = folder / Path(name).name
        headers = tensor_headers(file)
        with safe_open(file, framework="pt") as opened:
            rows = json.loads((opened.metadata() or {}).get(_ROWS, "{}"))
        for tensor, (_, dtype, shape) in headers.items():
            yield _Part(file, tensor, dtype, shape, rows[tensor])


def _contents(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, compared with the headers of its files."""
    path = folder / STATE
    content = read_json(path)
    if not all(isinstance(content.get(name), dict) for name in ("files", "tensors", "state")):
        raise CheckpointError(f"{path} is not that of a training run; {_OTHER}")
    if not all(_is_kind(kind) for kind in content["tensors"].values()):
        raise CheckpointError(f"{path} does not describe its tensors; {_OTHER}")
    for name, size in content["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file} is missing or damaged: {path} describes it; {_OTHER}")
    numbers = dict.fromkeys(content["tensors"], 0)
    try:
        for part in _parts(folder, content):
            dtype, shape = content["tensors"].get(part.name, (None, ()))
            if dtype != part.dtype or part.shape[1:] != tuple(shape[1:]) or len(part.shape) != len(shape):
                raise CheckpointError(f"{part.file} has another {shown(part.name)} than {path} describes; {_OTHER}")
            if shape and not 0 <= part.row <= part.row + part.shape[0] <= shape[0]:
                raise CheckpointError(f"{part.file} has rows of {shown(part.name)} that do not exist; {_OTHER}")
            numbers[part.name] += math.prod(part.shape)
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"a file in {folder} is damaged ({shown(str(error), 200)}); {_OTHER}") from error
    for name, (_, shape) in content["tensors"].items():
        if numbers[name] != math.prod(shape):
            raise CheckpointError(f"{folder} has only a part of {shown(name)}; {_OTHER}")
    return content


_OTHER = "resume from another checkpoint"


def _is_kind(value: Any) -> bool:
    """Whether a value is a dtype and a shape."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        return False
    return isinstance(value[0], str) and all(type(size) is int and size >= 0 for size in value[1])


def _described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """The dtype and the shape of each tensor, as files have it."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def _dense(tensor: Tensor) -> Tensor:
    """This process's shard: itself or, of the moments of 8-bit optimizers, in float32."""
    shard: Any = local(tensor)
    if is_plain_tensor(shard):
        return local(tensor)
    dense: Tensor = shard.dequantize()
    return dense
