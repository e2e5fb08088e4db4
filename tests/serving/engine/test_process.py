"""The program of an engine's process, as far as it needs none."""

from __future__ import annotations

import logging
import queue
import threading

import pytest

from impasto import PixArtAlphaPipeline
from impasto.pipelines.cleaning import clean_prompt
from impasto.serving.engine import process
from impasto.serving.engine.process import without_prompts

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
    monkeypatch.setattr(process, "REST", 0.01)
    monkeypatch.setattr(process, "return_freed_memory", returned.set)
    threading.Thread(target=lambda: incoming.put("job" if returned.wait(10) else "nothing was returned")).start()
    assert process._wait(incoming) == "job"
