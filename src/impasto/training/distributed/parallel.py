"""How processes divide the training of an objective: DDP (every process has all parameters), FSDP2 (each has a shard
of every parameter), HSDP (shards within a machine, copies across machines).

Whatever they do, gradients are the sums over processes, in float32, so that the loss is the mean over the global batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...errors import ConfigurationError
from ...nn.changes import is_plain_tensor
from .processes import Parallel, Processes
from .shards import full

#: Bytes for each trained parameter: a float32 master, its gradient, two moments and an average, a copy in 16 bits.
STATE_BYTES = 22
#: The share of a GPU's memory that this state may take before it is sharded.
STATE_SHARE = 0.5


def chosen(objective: nn.Module, processes: Processes) -> Parallel:
    """What ``auto`` means for an objective: DDP as long as its state leaves half of a GPU's memory free, else FSDP.

    Raises:
        ConfigurationError: FSDP, for an objective that cannot be sharded.
    """
    reason = getattr(objective, "unshardable", "")
    if reason:
        if processes.parallel in ("fsdp", "hsdp"):
            raise ConfigurationError(f"{type(objective).__name__} cannot be sharded, as {reason}; set parallel: ddp")
        return "ddp" if processes.parallel == "auto" else processes.parallel
    if processes.parallel != "auto":
        return processes.parallel
    if processes.device.type != "cuda":
        return "ddp"
    state = STATE_BYTES * sum(p.numel() for p in objective.parameters() if p.requires_grad)
    memory = torch.cuda.get_device_properties(processes.device).total_memory
    return "ddp" if state < STATE_SHARE * memory else "fsdp"


# --- DDP ------------------------------------------------------------------------------------------------------------


def replicated(objective: nn.Module, processes: Processes) -> nn.Module:
    """The objective under DDP. Call it in place of the objective where gradients are needed.

    Gradients have to leave the parameters after each backward pass (``Masters.take_gradients``).
    """
    ignored = [name for name, p in objective.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, ignored)
    wrapped = DistributedDataParallel(
        objective,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        find_unused_parameters=True,  # a batch may leave a head without gradients
        init_sync=False,  # see ``synchronize``
    )
    wrapped.register_comm_hook(None, lambda state, bucket: _sum_in_float32(bucket.buffer()))
    return wrapped


def _sum_in_float32(gradients: Tensor) -> torch.futures.Future[Any]:
    """The sum of a bucket of gradients over processes."""
    work = dist.all_reduce(gradients.float(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Any] = work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
    return summed


@torch.no_grad()
def synchronize(objective: nn.Module, processes: Processes) -> None:
    """Give all processes the main process's values of what is trained, such as new layers, before it is divided."""
    if processes.count > 1:
        for parameter in objective.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter, src=0)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


def mesh_of(processes: Processes) -> DeviceMesh:
    """All processes, or for HSDP copies x shards.

    Raises:
        ConfigurationError: the number of shards does not divide that of processes.
    """
    if processes.parallel == "fsdp":
        return init_device_mesh(processes.device.type, (processes.count,), mesh_dim_names=("shard",))
    shards = processes.shards or processes.local_count
    if processes.count % shards:
        raise ConfigurationError(f"{processes.count} processes cannot be divided into groups of {shards}")
    shape = (processes.count // shards, shards)
    return init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(objective: nn.Module, blocks: Sequence[nn.Module], processes: Processes, dtype: torch.dtype) -> None:
    """Shard an objective in place: each block by itself, and what is trained outside of blocks together.

    Sharded parameters are float32 and compute in ``dtype``. Parameters outside of blocks are whole while the objective
    runs, and those of a block while it runs. Frozen parameters outside of blocks, and quantized ones, stay as they are
    in every process.
    """
    mesh = mesh_of(processes)
    # Inputs are as they are for one process: batches have float32 images and latents.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside = {id(p) for block in blocks for p in block.parameters()}
    kept = {p for p in objective.parameters() if not is_plain_tensor(p) or not p.is_floating_point()}
    outside = {p for p in objective.parameters() if not p.requires_grad and id(p) not in inside}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=kept)
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=kept | outside)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no others
            module.set_gradient_divide_factor(1.0)  # the sum instead of the mean
    cast(Any, fully_shard).state(objective)._lazy_init()  # otherwise a block that is called alone becomes a root


@contextlib.contextmanager
def whole(objective: nn.Module) -> Iterator[None]:
    """A block, entered by all processes, in which models of the objective may be called from outside of it."""
    if not isinstance(objective, FSDPModule):
        yield
        return
    objective.unshard()
    try:
        yield
    finally:
        objective.reshard()


def gather(objective: nn.Module, values: Mapping[str, Tensor], processes: Processes) -> None:
    """End the sharding of an objective: in the main process, its parameters are whole again, on the host.

    Args:
        values: of the parameters by name; all processes call this with theirs.
    """
    for module_name, module in objective.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if isinstance(parameter, DTensor):
                value = full(values.get(f"{module_name}.{name}" if module_name else name, parameter.detach()))
                if processes.is_main:
                    module._parameters[name] = nn.Parameter(value.cpu(), parameter.requires_grad)
