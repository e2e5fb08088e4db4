"""The program of an engine's process, as far as it needs none."""

from __future__ import annotations

import logging

import pytest

from impasto import PixArtAlphaPipeline
from impasto.pipelines.cleaning import clean_prompt
from impasto.serving.engine.process import without_prompts

from ...tiny import tiny_pipeline


def test_warnings_that_quote_prompts_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline(PixArtAlphaPipeline)
    clean_prompt("一只猫")
    pipe.encode_prompt("a secret " * 200, do_classifier_free_guidance=False)
    assert sum("猫" in record.getMessage() or "secret" in record.getMessage() for record in caplog.records) == 2
    logging.getLogger("impasto").warning("something else")
    assert [record.getMessage() for record in caplog.records if without_prompts(record)] == ["something else"]
