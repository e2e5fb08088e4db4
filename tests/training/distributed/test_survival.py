"""A process that fails or is gone stops the others, with its error."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from impasto.errors import ConfigurationError, InputError, ResourceError
from impasto.training.data.sample import Batch, Sample
from impasto.training.distributed import storage
from impasto.training.distributed.processes import ALONE, Processes, joined
from impasto.training.objectives.base import Loss, Objective
from impasto.training.running import checkpoints
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ..runs import rows, settings
from .ranks import results, start


def work(way: str) -> str:
    """Steps that all ranks take together, until rank 1 leaves in its way."""
    try:
        with joined(gone=1.5) as processes:
            if way == "exports":
                time.sleep(4.0 if processes.is_main else 0.0)
                return "finished"
            for step in range(10_000):
                if processes.rank == 1 and step == 3:
                    if way == "raises":
                        raise InputError("image 7 is broken")
                    os.kill(os.getpid(), signal.SIGKILL if way == "killed" else signal.SIGSTOP)
                processes.highest(step)
        return "finished"
    except (InputError, ResourceError) as error:
        return f"{type(error).__name__}: {error}"


class Data:
    """One sample for each rank."""

    def batch(self, step: int, rank: int, world: int) -> Batch:
        return Batch([Sample()] * (2 // world), rank, 2, step, 2 // world)


class Line(Objective):
    """A few numbers, whose loss rank 1 may never compute."""

    def __init__(self, way: str, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(3, 2))
        self.way, self.rank = way, rank

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        if self.rank == 1 and batch.step == 7 and self.way == "signalled":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.rank == 1 and batch.step == 7 and self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return Loss((self.weight * random.normal([len(batch), 3, 2])).square().mean((1, 2)))


def work_on(way: str, folder: Path) -> Any:
    """A run that saves at steps 5, 10, ... and whose rank 1 is killed, or killed while it saves, or is to end."""
    try:
        with joined("fsdp", gone=10) as processes:
            if way == "killed while saving" and processes.rank == 1:
                write = storage.save_file
                storage.save_file = lambda own, path, metadata: (  # type: ignore[assignment]
                    os.kill(os.getpid(), signal.SIGKILL) if "00000010" in str(path) else write(own, path, metadata)
                )
            return continued(way, folder, processes)
    except ResourceError as error:
        return f"{type(error).__name__}: {error}"


def continued(way: str, folder: Path, processes: Processes = ALONE) -> int | None:
    plan = settings(12, checkpoints={"every": 5}, optimizer={"name": "adamw"}, log_every=1, precision="float32")
    return train(Line(way, processes.rank), Data(), plan, folder, processes=processes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    started = {way: start(work, folder / way, way) for way in ("raises", "killed", "stopped", "exports")}
    begin = time.monotonic()
    while started["stopped"][0].is_alive() and time.monotonic() < begin + 60:
        time.sleep(0.05)
    started["stopped"][1].kill()
    return {way: results(processes, folder / way) for way, processes in started.items()}


def test_the_error_of_one_rank_stops_the_others(found: dict[str, list[Any]]) -> None:
    first, second = found["raises"]
    assert second == "InputError: image 7 is broken"
    assert first.startswith("ResourceError: rank 1 on ")
    assert "InputError: image 7 is broken" in first


def test_a_killed_rank_stops_the_others(found: dict[str, list[Any]]) -> None:
    assert found["killed"][1] == -signal.SIGKILL
    assert found["killed"][0].startswith("ResourceError: ")
    assert "resume" in found["killed"][0]


def test_a_rank_that_hangs_ends_the_others(found: dict[str, list[Any]]) -> None:
    assert found["stopped"] == [1, -signal.SIGKILL]


def test_the_others_wait_for_a_rank_that_works_alone_at_the_end(found: dict[str, list[Any]]) -> None:
    assert found["exports"] == ["finished", "finished"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    continued("whole", folder / "whole")
    ways = ("signalled", "killed", "killed while saving")
    started = {way: start(work_on, folder / f"results {way}", way, folder / way) for way in ways}
    return folder, {way: results(processes, folder / f"results {way}") for way, processes in started.items()}


@pytest.mark.parametrize(("way", "saved"), [("signalled", [5, 8]), ("killed", [5]), ("killed while saving", [5])])
def test_one_process_continues_what_two_ranks_have_left(
    way: str, saved: list[int], runs: tuple[Path, dict[str, list[Any]]]
) -> None:
    folder, found = runs
    if way == "signalled":  # one rank; both save after the step
        assert found[way] == [signal.SIGTERM, signal.SIGTERM]
    else:
        assert found[way][0].startswith("ResourceError")
        assert found[way][1] == -signal.SIGKILL
    assert list(checkpoints.found(folder / way)) == saved
    assert continued("whole", folder / way) is None
    losses = [[row["loss"] for row in rows(folder / each)] for each in ("whole", way)]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("fsdp", "cpu") as processes:
        assert (processes.rank, processes.count, processes.parallel) == (0, 1, "none")
        assert processes.highest(3) == 3
        with pytest.raises(InputError), processes.together():
            raise InputError("own")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="2 processes were started"), joined("none"):
        pass
    with pytest.raises(ConfigurationError, match="'dp'; it is one of auto"), joined("dp"):  # type: ignore[arg-type]
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigurationError, match="WORLD_SIZE is 'two'"), joined():
        pass
