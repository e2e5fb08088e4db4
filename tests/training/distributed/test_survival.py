"""A process that fails or is gone stops the others, with its error."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from impasto.errors import ConfigurationError, InputError, ResourceError
from impasto.training.distributed.processes import joined

from .ranks import results, start


def work(way: str) -> str:
    """Steps that all ranks take together, until rank 1 leaves in its way."""
    try:
        with joined(gone=1.5) as processes:
            for step in range(10_000):
                if processes.rank == 1 and step == 3:
                    if way == "raises":
                        raise InputError("image 7 is broken")
                    os.kill(os.getpid(), signal.SIGKILL if way == "killed" else signal.SIGSTOP)
                processes.any(False)
        return "finished"
    except (InputError, ResourceError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    started = {way: start(work, folder / way, way) for way in ("raises", "killed", "stopped")}
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


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("fsdp", "cpu") as processes:
        assert (processes.rank, processes.count, processes.parallel) == (0, 1, "none")
        assert processes.any(True)
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
