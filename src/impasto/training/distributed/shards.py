"""Tensors that may be divided between processes: plain ones, and the shards of FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This process's shard, which shares its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, in all processes, which all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return isinstance(tensor, DTensor) and any(isinstance(place, Shard) for place in tensor.placements)


def first_row(tensor: Tensor) -> int:
    """The first row of this process's shard in the whole tensor."""
    if not isinstance(tensor, DTensor) or not is_sharded(tensor):
        return 0
    dimension, place = next((i, p) for i, p in enumerate(tensor.placements) if isinstance(p, Shard))
    assert place == Shard(0)  # as FSDP does it
    rows = -(-tensor.shape[0] // tensor.device_mesh.size(dimension))
    return min(tensor.device_mesh.get_local_rank(dimension) * rows, tensor.shape[0])


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this process's shard, which others may have as well, is the first one of its kind."""
    mesh = tensor.device_mesh
    return all(isinstance(p, Shard) or mesh.get_local_rank(i) == 0 for i, p in enumerate(tensor.placements))


def zeros_like_shards(tensor: DTensor, shape: Sequence[int]) -> DTensor:
    """Zeros of another shape, divided like a tensor whose first dimension is the same."""
    rows = tensor.to_local().shape[0]
    stride = torch.empty(shape, device="meta").stride()
    zeros = tensor.to_local().new_zeros(rows, *shape[1:])
    return DTensor.from_local(
        zeros, tensor.device_mesh, tensor.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def sum_of_shards(values: Tensor, like: Tensor) -> Tensor:
    """Add up, in place, values of the processes that share one copy of ``like``."""
    if isinstance(like, DTensor):
        for dimension, place in enumerate(like.placements):
            if isinstance(place, Shard):
                dist.all_reduce(values, group=like.device_mesh.get_group(dimension))
    return values


@torch.no_grad()
def clip_norm(tensors: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients of tensors, sharded or not, so that their global norm is at most ``limit``, unless that is 0.

    Returns:
        The norm before, the same in all processes.
    """
    gradients = [t.grad for t in tensors if t.grad is not None]
    divided = [g for g in gradients if is_sharded(g)]
    squares = _squares([local(g) for g in gradients if not is_sharded(g)])
    if divided:
        squares = sum_of_shards(_squares([local(g) for g in divided]), divided[0]) + squares
    norm = squares.sqrt().float()
    if limit:
        torch._foreach_mul_([local(g) for g in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, float64; of nothing, a number on the host, which adds to any."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def each_by_one(matrices: Sequence[Tensor], function: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
    """Apply a function to whole matrices, of which each process computes a share.

    Args:
        matrices: [n, m], plain, or all sharded in the same way along their first dimension.
        function: from matrices to as many of the same shapes.

    Returns:
        This process's shards of the results.
    """
    if not matrices or not is_sharded(matrices[0]):
        return function([local(matrix) for matrix in matrices])
    first = matrices[0]
    assert isinstance(first, DTensor)
    dimension = next(i for i, place in enumerate(first.placements) if isinstance(place, Shard))
    assert first.placements[dimension] == Shard(0)
    group = first.device_mesh.get_group(dimension)
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    results: list[Tensor] = []
    for start in range(0, len(matrices), count):  # of which the process of rank i computes the i-th
        several = matrices[start : start + count]
        shards = [_padded(matrix, count) for matrix in several]
        parts = [shards[rank].new_empty(count, *shards[rank].shape)] if rank < len(several) else []
        gathered = [
            dist.gather(shard, [*parts[0]] if i == rank else None, group=group, group_dst=i, async_op=True)
            for i, shard in enumerate(shards)
        ]
        _wait(gathered)
        if rank < len(several):
            (whole,) = function([parts[0].flatten(0, 1)[: several[rank].shape[0]]])
            parts[0].flatten(0, 1)[: len(whole)] = whole
        scattered = [
            dist.scatter(shard, [*parts[0]] if i == rank else None, group=group, group_src=i, async_op=True)
            for i, shard in enumerate(shards)
        ]
        _wait(scattered)
        results += [shard[: len(local(matrix))] for shard, matrix in zip(shards, several, strict=True)]
    return results


def _padded(matrix: Tensor, count: int) -> Tensor:
    """A copy of this process's shard with as many rows as the largest one has."""
    shard = local(matrix)
    rows = -(-matrix.shape[0] // count)
    padded = shard.new_zeros(rows, *shard.shape[1:])
    padded[: len(shard)] = shard
    return padded


def _wait(works: Iterable[dist.Work | None]) -> None:
    for work in works:
        assert work is not None
        work.wait()
