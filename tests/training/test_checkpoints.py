"""Training states: whole or not at all, and without code."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.errors import CheckpointError
from impasto.training.running.checkpoints import append_log, load_state, save_state


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.pt"
    save_state(path, {"model": {"w": torch.arange(3.0)}, "step": 7, "nested": {"rates": [0.1, 0.2]}})
    state = load_state(path)
    assert torch.equal(state["model"]["w"], torch.arange(3.0))
    assert (state["step"], state["nested"]) == (7, {"rates": [0.1, 0.2]})
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("where", ["while writing", "before renaming"])
def test_an_interrupted_save_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def half(_: Any, target: Path) -> None:
        Path(target).write_bytes(b"PK half of it")
        raise KeyboardInterrupt

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "while writing":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, {"step": 2})
    monkeypatch.undo()
    assert load_state(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def damaged_files() -> dict[str, bytes]:
    whole = _saved({"w": torch.arange(1000.0), "step": 3})
    return {
        "empty": b"",
        "text": b"this is no state\n" * 20,
        "zeros": bytes(500),
        "first half": whole[: len(whole) // 2],
        "first bytes": whole[:40],
        "without its end": whole[:-30],
        "blot on the pickle": whole.replace(b"ctorch._utils", b"\xffXtorch.utils", 1),
        "empty pickle": pickle.dumps(None)[:1],
        "numbers only": pickle.dumps([1, 2, 3], protocol=2),
        "tensor only": _saved(torch.ones(2)),
    }


@pytest.mark.parametrize("kind", list(damaged_files()))
def test_a_damaged_file_is_named_in_the_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(path)


class _Bomb:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_does_not_run(tmp_path: Path, container: str) -> None:
    path, made = tmp_path / "state.pt", tmp_path / "made by the file"
    state = {"step": 1, "bomb": _Bomb(str(made))}
    path.write_bytes(_saved(state) if container == "torch" else pickle.dumps(state, protocol=2))
    with pytest.raises(CheckpointError):
        load_state(path)
    assert not made.exists()


def test_the_log_grows_by_a_line_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    append_log(path, step=1, loss=0.12345678)
    append_log(path, step=2, loss=torch.tensor(0.5))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1.0, "loss": 0.12345678}, {"step": 2.0, "loss": 0.5}]  # not rounded
