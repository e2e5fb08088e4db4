"""The state of a training run on disk: written atomically, read without running code, checked before use.

A run keeps its checkpoints in ``FOLDER/checkpoints/step-00001000``, one folder each.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.stored import load_pickle
from ...errors import CheckpointError, OutputError
from ...files import append_line, make_folder, publish_folder, write_file
from ..distributed.processes import ALONE, Processes
from ..distributed.storage import replace_state

_NAME = re.compile(r"step-(\d{8,})")


def found(folder: Path) -> dict[int, Path]:
    """The checkpoints of the run in ``folder``, by step, in ascending order."""
    inside = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    named = {int(match[1]): path for path in inside if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(named.items()))


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step of the run in ``folder``."""
    return folder / "checkpoints" / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The last checkpoint of the run in ``folder``, if it has any."""
    return next(reversed(found(folder).values()), None)


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    keep: int,
    best: int | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write a checkpoint completely or not at all, and then remove old ones.

    Args:
        folder: of the run.
        write: writes files into the folder that it is given.
        keep: so many are kept, and that of step ``best``.
        processes: all of which call this, and write into the same folder.

    Raises:
        OutputError: it cannot be written, as when the disk is full. Earlier checkpoints remain.
    """
    parent = folder / "checkpoints"
    make_folder(parent)
    target, temporary = path_of(folder, step), parent / f".step-{step:08d}.tmp"
    try:
        with processes.together():
            if processes.is_main:
                for left in parent.glob(".step-*.tmp"):  # of killed runs
                    shutil.rmtree(left)
                temporary.mkdir()
        try:
            write(temporary)
            with processes.together():
                if processes.is_main:
                    publish_folder(temporary, target)
        except BaseException:
            if processes.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        reason = str(error) if isinstance(error, OutputError) else error.strerror or error
        last = latest(folder)
        rest = f"the last one is {last}" if last is not None else "there is no earlier one"
        raise OutputError(f"the checkpoint of step {step} was not saved, and {rest}: {reason}") from error
    if processes.is_main:
        _remove_old(folder, keep, best)
    return target


def amend(
    folder: Path, step: int, state: Mapping[str, Any], keep: int, best: int | None = None, processes: Processes = ALONE
) -> None:
    """Replace the state, without its tensors, in the checkpoint of a step; then remove old ones, as ``save`` does.

    Raises:
        OutputError: it cannot be written.
    """
    with processes.together():
        if processes.is_main:
            replace_state(path_of(folder, step), state)
            _remove_old(folder, keep, best)


def _remove_old(folder: Path, keep: int, best: int | None) -> None:
    for step, path in list(found(folder).items())[:-keep]:
        if step != best:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and dicts of them; an interrupted save leaves a previous file intact.

    Raises:
        OutputError: the file cannot be written.
    """
    make_folder(path.parent)
    write_file(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors, numbers, strings, and dicts or lists of
            them.
    """
    if not path.is_file():  # reading a pipe would block
        raise CheckpointError(f"{path} is not a file; remove it to start again")
    state = load_pickle(path, "Delete it to start again")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a training state but a {type(state).__name__}; delete it to start again")
    return state


# --- logs -----------------------------------------------------------------------------------------------------------


def append_log(path: Path, **values: float) -> None:
    """Append one line to a JSONL log, in one write, without rounding.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    append_line(path, json.dumps({name: float(value) for name, value in values.items()}))


def trim_log(path: Path, step: int) -> float:
    """Remove what a resumed run will log again: lines beyond ``step``, and a partial last line.

    Returns:
        The seconds that the run had taken by the last of the remaining lines.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0.0
    except OSError as error:
        raise OutputError(f"the log {path} cannot be read: {error.strerror}; choose another place") from error
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept != lines:
        write_file(path, b"".join(kept), durable=False)
    return next((seconds for line in reversed(kept) if math.isfinite(seconds := _number(line, "seconds"))), 0.0)


def _step_of(line: bytes) -> float:
    step = _number(line, "step")
    if not math.isnan(step):
        return step
    return math.inf if line.startswith(b'{"step"') else -math.inf  # damaged, or not one of ours


def _number(line: bytes, name: str) -> float:
    """A number in a line of a log; NaN if it has none."""
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.nan
