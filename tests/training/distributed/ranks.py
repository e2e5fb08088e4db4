"""Two processes on this machine, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore


def start(function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """Start ``function(*arguments)`` in ``count`` ranks and return their processes; ``results`` waits for them."""
    context = multiprocessing.get_context("forkserver")  # forks of a process that has run nothing yet
    context.set_forkserver_preload([function.__module__, "impasto.training.distributed.storage"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as that of torchrun: of neither rank
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        names = {name: str(value) for name, value in environment.items()}
        process = context.Process(target=_work, args=(function, folder / f"result-{rank}", names, arguments))
        process.start()
        process.store = store  # type: ignore[attr-defined]
        processes.append(process)
    return processes


def results(processes: list[Any], folder: Path, seconds: float = 100.0) -> list[Any]:
    """What the function returned in each rank, or raised."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            for each in processes:
                each.kill()
            raise TimeoutError("a rank does not end")
    found = []
    for rank, process in enumerate(processes):
        path = folder / f"result-{rank}"
        found.append(pickle.loads(path.read_bytes()) if path.exists() else process.exitcode)
    return found


def in_ranks(
    function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2, seconds: float = 100.0
) -> list[Any]:
    """The results of ``function(*arguments)`` in each rank."""
    found = results(start(function, folder, *arguments, count=count), folder, seconds)
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return found


def _work(function: Callable[..., Any], path: Path, environment: dict[str, str], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        result = function(*arguments)
    except Exception:
        result = traceback.format_exc()
    path.write_bytes(pickle.dumps(result))
