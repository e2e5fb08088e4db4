"""An engine's process and its program, without a model."""

from __future__ import annotations

import logging
import queue
import signal
import subprocess
import sys
import threading
from typing import cast

import pytest

from impasto import PixArtAlphaPipeline
from impasto.pipelines.cleaning import clean_prompt
from impasto.serving.engine import process, program
from impasto.serving.engine.process import starting_with
from impasto.serving.engine.program import without_prompts
from impasto.serving.engine.spawning import Spawned, spawn
from impasto.serving.engine.spec import EngineSpec

from ...tiny import tiny_pipeline


def test_warnings_that_quote_prompts_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline(PixArtAlphaPipeline)
    clean_prompt("一只猫")
    pipe.encode_prompt("a secret " * 200, do_classifier_free_guidance=False)
    assert sum("猫" in record.getMessage() or "secret" in record.getMessage() for record in caplog.records) == 2
    logging.getLogger("impasto").warning("something else")
    assert [record.getMessage() for record in caplog.records if without_prompts(record)] == ["something else"]


def test_an_idle_engine_returns_memory_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    incoming: queue.SimpleQueue[str] = queue.SimpleQueue()
    returned = threading.Event()
    monkeypatch.setattr(program, "REST", 0.01)
    monkeypatch.setattr(program, "return_freed_memory", returned.set)
    threading.Thread(target=lambda: incoming.put("job" if returned.wait(10) else "nothing was returned")).start()
    assert program._wait(incoming) == "job"


def test_the_first_engine_has_the_process_that_was_started_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(process, "EngineProcess", lambda spec, receive, spawned: made.append(spawned))
    early = cast(Spawned, object())
    start = starting_with(early)
    for _ in range(3):
        start(cast(EngineSpec, None), lambda *_: None)
    assert made == [early, None, None]


@pytest.mark.long
def test_a_process_without_a_model_ends_with_its_context_or_its_server() -> None:
    with spawn() as left:
        pass
    other = spawn()
    other.connection.close()  # as when the server ends
    for one in (left, other):
        one.process.join(60)
        assert one.process.exitcode is not None
    assert left.process.exitcode == -signal.SIGKILL
    assert other.process.exitcode == 0


def test_starting_a_process_imports_next_to_nothing() -> None:
    """It comes first so that it imports while the server does."""
    code = "import sys, impasto.serving.engine.spawning; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
