"""Safetensors on disk <-> the tensors of a module.

Loading is strict and needs no second copy of the weights: the module is built on the meta device, and each tensor is
converted from the memory-mapped file to its final dtype and device.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, WeightsMismatchError
from .config import write_json
from .stored import FLOATS, WEIGHTS_NAME, Stored, iterate_tensors, listing, with_variant


def check_fit(module: nn.Module, stored: Stored, rename: Callable[[str], str] = lambda name: name) -> None:
    """Compare the stored tensors with those of ``module``, built on the meta device, without reading them.

    Args:
        rename: stored name -> the module's name, for checkpoints of older layouts.

    Raises:
        WeightsMismatchError: tensors are missing, unexpected or misshapen; the message names them.
        CheckpointError: a tensor has a dtype that cannot be converted to the module's.
    """
    expected = module.state_dict(keep_vars=True)
    seen: dict[str, str] = {}
    unexpected: list[str] = []
    for stored_name, (file, dtype, shape) in stored.items():
        name = rename(stored_name)
        if name not in expected:
            unexpected.append(stored_name)
            continue
        if name in seen:
            raise WeightsMismatchError(f"{file.name}: {seen[name]} and {stored_name} are two names of one tensor")
        if shape != tuple(expected[name].shape):
            raise WeightsMismatchError(
                f"{file.name}: {stored_name} has shape {list(shape)}, but the config requires "
                f"{list(expected[name].shape)}. Weights and config.json do not belong together."
            )
        wanted = expected[name].dtype
        fitting = FLOATS if wanted.is_floating_point else (str(wanted).removeprefix("torch."),)
        if dtype not in fitting:
            raise CheckpointError(
                f"{file}: {stored_name} is stored as {dtype}, but {type(module).__name__} needs "
                f"{' or '.join(fitting)}: the file is quantized, or from another model. Download weights as published."
            )
        seen[name] = stored_name
    missing = [name for name in expected if name not in seen]
    if missing or unexpected:
        folder = next((tensor.file.parent for tensor in stored.values()), "an empty file")
        listed = "".join(
            f"{len(names)} {what} ({listing(names)}). "
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise WeightsMismatchError(
            f"the weights in {folder} do not fit {type(module).__name__}'s config: {listed}"
            f"Weights and config.json do not belong together, or the files are from another model."
        )


def load_into(
    module: nn.Module,
    stored: Stored,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str] = lambda name: name,
    copy: bool = False,
) -> None:
    """Fill ``module``, built on the meta device, with stored tensors that fit it (``check_fit``).

    Args:
        dtype: of floating-point weights; None keeps the stored one.
        rename: stored name -> the module's name, for checkpoints of older layouts.
        copy: leave no tensor in the memory-mapped file.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = dict.fromkeys(tensor.file for tensor in stored.values())
    pairs = ((rename(name), tensor) for file in files for name, tensor in iterate_tensors(file))
    fill(module, pairs, dtype=dtype, device=device, copy=copy)


def fill(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    copy: bool = False,
) -> None:
    """Put tensors, by their names in ``module``, in place of those of the meta device; options as for ``load_into``."""
    expected = module.state_dict(keep_vars=True)
    for name, tensor in tensors:
        tensor = tensor.detach().to(device, dtype if tensor.is_floating_point() else None, copy=copy)
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=expected[name].requires_grad)
        else:
            owner._buffers[leaf] = tensor


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the errors of Rust libraries about disks (full, read-only, ...) into OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or (type(error) is Exception and "(os error " in str(error)):
            raise OSError(errno.EIO, str(error)) from error
        raise


def write_weights(
    state_dict: Mapping[str, Tensor], folder: Path, *, variant: str | None = None, max_shard_bytes: int = 10_000_000_000
) -> None:
    """Write safetensors into a folder that no process reads yet: one file, or shards with an index if it would exceed
    ``max_shard_bytes``."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state_dict.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach()
        size += tensor.nbytes

    names = [with_variant(f"{WEIGHTS_NAME}.safetensors", variant)]
    if len(shards) > 1:
        stem = names[0].removesuffix(".safetensors")
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with disk_errors():
        for name, shard in zip(names, shards, strict=True):
            save_file(_standing_alone(shard), folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state_dict.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = with_variant(f"{WEIGHTS_NAME}.safetensors.index.json", variant)
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _standing_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as safetensors requires: views and shared tensors are copied."""
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
