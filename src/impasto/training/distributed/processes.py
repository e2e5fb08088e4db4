"""The processes that train one model together, as ``torchrun`` starts them; or a single process."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ...checks import shown
from ...errors import ConfigurationError, ImpastoError, ResourceError
from .watch import GONE, Watch

Parallel = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
PARALLEL: tuple[Parallel, ...] = ("auto", "none", "ddp", "fsdp", "hsdp")

#: Numbers the groups that this process joins, one after the other.
_GROUPS = itertools.count()
#: How long a collective operation may wait for a process that is alive: the others may still compile or validate.
PATIENCE = timedelta(minutes=30)


class Processes:
    """This process and those that it trains with. Methods that communicate are to be called by all of them.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        local_count: of processes on this machine.
        shards: of HSDP, processes that share one copy of the models; None: those of a machine.
        device: on which this process computes.
        parallel: how they divide the work; ``auto`` becomes ``ddp`` or ``fsdp`` when the models are known.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        device: torch.device | None = None,
        parallel: Parallel = "none",
        local_count: int = 1,
        watch: Watch | None = None,
        shards: int | None = None,
    ):
        self.rank, self.count, self.local_count = rank, count, local_count
        self.device = device or torch.device("cpu")
        self.parallel: Parallel = parallel if count > 1 else "none"
        self.watch, self.shards = watch, shards

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once: logs, images, results."""
        return self.rank == 0

    @property
    def shards_parameters(self) -> bool:
        """Whether each process has only a shard of what is trained."""
        return self.parallel in ("fsdp", "hsdp")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same in all of them."""
        if self.count == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def merged(self, numbers: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """The sums over processes of pairs of numbers, of which each process may have others."""
        if self.count == 1:
            return dict(numbers)
        several: list[dict[str, tuple[float, float]]] = [{}] * self.count
        dist.all_gather_object(several, dict(numbers))
        totals: dict[str, tuple[float, float]] = {}
        for each in several:
            for name, (first, second) in each.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + first, before[1] + second)
        return totals

    def highest(self, number: int) -> int:
        """The highest number of any process. So they agree, for example to stop, at the same step."""
        if self.count == 1:
            return number
        found = torch.tensor(number)  # on the host: a GPU does not have to finish its work first
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def shared(self, value: Any) -> Any:
        """The value that the main process has; it may be anything that can be pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.highest(0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails in all processes if it fails in one of them. It must not communicate.

        Raises:
            ResourceError: it failed elsewhere.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.count > 1:
            failures: list[str | None] = [None] * self.count
            dist.all_gather_object(failures, None if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is None:
                for rank, message in enumerate(failures):
                    if message is not None:
                        raise ResourceError(f"rank {rank} failed: {message}")
        if failure is not None:
            raise failure


#: A process that trains by itself.
ALONE = Processes()


@contextlib.contextmanager
def joined(
    parallel: Parallel = "auto",
    device: torch.device | str | None = None,
    shards: int | None = None,
    gone: float = GONE,
) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started; alone, a process needs nothing.

    Args:
        parallel: how they divide the work.
        device: "cpu", or "cuda", of which each process gets one; by default a GPU if there is one.
        shards: of HSDP, processes that share one copy of the models; by default those of a machine.
        gone: seconds without a sign of life after which a process is gone, and the others end.

    Raises:
        ConfigurationError: an unknown ``parallel``, or ``none`` for several processes.
        ResourceError: too few GPUs, the processes cannot connect, or another process failed or is gone.
    """
    if parallel not in PARALLEL:
        raise ConfigurationError(f"parallel is {shown(parallel)}; it is one of {', '.join(PARALLEL)}")
    rank, count = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    local_rank, local_count = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if count == 1:
        yield Processes(device=kind)
        return
    if parallel == "none":
        raise ConfigurationError(f"parallel is 'none', and {count} processes were started; start one, or use 'auto'")
    if kind.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ResourceError(
                f"{local_count} processes on this machine need as many GPUs, and it has {torch.cuda.device_count()}; "
                "start fewer (torchrun --nproc-per-node)"
            )
        kind = torch.device("cuda", local_rank)
        torch.cuda.set_device(kind)
    watch = _connect(rank, count, kind, gone)
    try:
        yield Processes(rank, count, kind, parallel, local_count, watch, shards)
        dist.barrier()  # the others may wait for one that exports; and the store lives as long as its process
    except Exception as error:
        raise _explained(error, rank, watch) from error
    except BaseException as error:  # SystemExit: the processes have agreed to stop
        if not isinstance(error, SystemExit):
            watch.report(f"rank {rank} was interrupted ({type(error).__name__})")
        watch.stop()
        raise
    watch.stop()
    dist.destroy_process_group()


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigurationError(f"the environment variable {name} is {shown(value)}; torchrun sets it to a number")
    return int(value)


def _connect(rank: int, count: int, device: torch.device, gone: float) -> Watch:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        name = f"impasto {next(_GROUPS)}"
        dist.init_process_group(
            backend,
            store=PrefixStore(name, store),
            rank=rank,
            world_size=count,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    except Exception as error:
        raise ResourceError(
            f"rank {rank} of {count} on {socket.gethostname()} cannot connect to the others "
            f"({shown(str(error), 200)}); check that {os.environ.get('MASTER_ADDR')}, "
            f"port {os.environ.get('MASTER_PORT')}, can be reached"
        ) from error
    return Watch(PrefixStore(f"{name} watch", store.clone()), rank, count, gone)


def _explained(error: Exception, rank: int, watch: Watch) -> Exception:
    """The error to raise: that of another process, if this one failed because of it."""
    secondary = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _of_network(str(error)))
    if secondary and not isinstance(error, ImpastoError):
        elsewhere = watch.wait(2 * watch.beat) or "another process of this run has ended"
        watch.stop()
        return ResourceError(f"{elsewhere}. The last checkpoint remains: resume from it")
    watch.report(f"rank {rank} on {socket.gethostname()} failed: {type(error).__name__}: {error}")
    watch.stop()
    return error


def _of_network(message: str) -> bool:
    """Whether an error that is a plain RuntimeError comes from a collective operation."""
    return any(word in message for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"))
