"""Checks of weights packed by bitsandbytes, whose compiled code trusts the stored sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from ...checks import shown
from ...errors import CheckpointError, ConfigurationError
from ..config import parse_json
from ..stored import DTYPES, FLOATS, Stored, iterate_tensors, listing
from ..values import Bounds, check
from .configs import Dtype, Table

_AGAIN = "Download or save it again."
_MOST_BYTES = 4096
_BITS = dict(DTYPES.values())

Block = Literal[64, 128, 256, 512, 1024, 2048, 4096]
#: What is stored with each 4-bit weight.
_STATE: Table = {
    "quant_type": Literal["fp4", "nf4"],
    "blocksize": Block,
    "dtype": Dtype,
    "shape": Annotated[Sequence[Annotated[int, Bounds(1, 2**24)]], Bounds(2, 2)],
}
#: Additionally, if the scales of its blocks are quantized too.
_NESTED: Table = {
    "nested_blocksize": Block,
    "nested_dtype": Dtype,
    "nested_offset": Annotated[float, Bounds(-1e6, 1e6)],
}


def check_bitsandbytes(files: Sequence[Path], stored: Stored) -> None:
    """Check that every packed weight has the tensors needed to unpack it, in the right sizes.

    Raises:
        CheckpointError: one is missing or has another size; the message names the file and the tensor.
    """
    packed = set()
    for file in files:
        for name, tensor in iterate_tensors(file):
            weight, mark, kind = name.partition(".quant_state.bitsandbytes__")
            if mark and name in stored:
                _check_sizes(stored, file, weight, _read_state(file, name, kind, tensor))
                packed.add(weight)
    for name, (file, dtype, shape) in stored.items():
        if not name.endswith(".weight") or dtype in FLOATS or name in packed:
            continue
        if dtype != "int8" or not shape:
            raise CheckpointError(f"{file}: {listing([name])} is stored as {dtype}, but has no quant_state. {_AGAIN}")
        _require(stored, file, f"{name.removesuffix('weight')}SCB", shape[0], "float32")


def _read_state(file: Path, name: str, kind: str, tensor: Tensor) -> Mapping[str, Any]:
    where = f"{file}: {listing([name])}"
    try:
        if str(tensor.dtype) != "torch.uint8" or tensor.numel() > _MOST_BYTES:
            raise ValueError(f"{tensor.numel()} values of {tensor.dtype}")
        content = parse_json(bytes(tensor.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not readable JSON ({error}). {_AGAIN}") from error
    table = _STATE
    if isinstance(content, Mapping) and content.keys() & _NESTED.keys():
        table = {**_STATE, **_NESTED}
    if not isinstance(content, Mapping) or content.keys() != table.keys() or content["quant_type"] != kind:
        raise CheckpointError(
            f"{where} must be an object of {', '.join(table)}, with the quant_type {shown(kind)}, not "
            f"{shown(content)}. {_AGAIN}"
        )
    try:
        return {key: check(f"{where}: {key}", content[key], hint) for key, hint in table.items()}
    except ConfigurationError as error:
        raise CheckpointError(f"{error}. {_AGAIN}") from error


def _check_sizes(stored: Stored, file: Path, weight: str, state: Mapping[str, Any]) -> None:
    values = math.prod(state["shape"])
    scales = math.ceil(values / state["blocksize"])
    nested = "nested_blocksize" in state
    _require(stored, file, weight, math.ceil(values / 2), None)
    _require(stored, file, f"{weight}.quant_map", 16, "float32")
    _require(stored, file, f"{weight}.absmax", scales, "uint8" if nested else "float32")
    if nested:
        _require(stored, file, f"{weight}.nested_quant_map", 256, "float32")
        _require(stored, file, f"{weight}.nested_absmax", math.ceil(scales / state["nested_blocksize"]), "float32")
    elif extra := next((key for key in stored if key.startswith(f"{weight}.nested_")), None):
        raise CheckpointError(f"{stored[extra].file}: {listing([extra])} does not belong to its quant_state. {_AGAIN}")


def _require(stored: Stored, file: Path, name: str, count: int, dtype: str | None) -> None:
    """Require a tensor of ``count`` values, or, if ``dtype`` is None, bytes."""
    tensor = stored.get(name)
    if tensor is None:
        raise CheckpointError(f"{file}: {listing([name])} is missing and needed to unpack the weights. {_AGAIN}")
    found = math.prod(tensor.shape) * (_BITS.get(tensor.dtype, 8) // 8 if dtype is None else 1)
    if found != count or dtype not in (None, tensor.dtype):
        raise CheckpointError(
            f"{tensor.file}: {listing([name])} must have {count} {'bytes' if dtype is None else f'values of {dtype}'}, "
            f"as its weight was packed, not the shape {list(tensor.shape)} of {tensor.dtype}. {_AGAIN}"
        )
