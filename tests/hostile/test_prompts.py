"""Prompts that were written to cost time, or of which cleaning leaves nothing."""

from __future__ import annotations

import time

import pytest

from impasto.checks import shown
from impasto.pipelines.cleaning import clean_caption, clean_prompt
from impasto.pipelines.glyphs import quoted_texts

from .sandbox import run

LENGTH = 100_000
#: Each is repeated. A rule that tries every start of a run takes minutes on some of them.
REPEATED = [
    "a", "1", "a.", "1.", ".", "-", "_", "1a", "a1a1", "'", '"', "'a", " ", "\n", " .", "\n.", "a ", "www:", "http:/",
    "x.http:", "@a", "#1", "\\n", "a.b/", ".com", "a.com@", "a.com/", "a.com_", "1x", "1×", "é", "漢", "&amp;", "&",
    "&#", "<", "<a ", "<a b='", "</", "</a", "<!--", "<!", "<![", "<?", "<b>", "<person>", "%2", "%C3", "page ",
    "click ", "free ", "worldwide ", "download ", "Ã©", "â€œ", ".pn", "x.png", "\ud800", "\0", "\u200b", "3:27 ", "“",
    "「",
]  # fmt: skip
ENDED = {
    "spaces": "x" + " " * LENGTH + "x",
    "page and spaces": "page" + " " * LENGTH,
    "an address without an end": "a.com" + "é" * LENGTH + "@",
    "labels": "a" * LENGTH + "@",
    "an identifier": "1a1" + "1" * LENGTH + "_",
    "dimensions": "1x" + "1" * LENGTH + "a",
    "quotes around everything": "'" + "a" * LENGTH + "'",
    "half a tag": "<a " + "b=" * (LENGTH // 2),
}


def seconds(repeated: str) -> float:
    text = (repeated * (LENGTH // len(repeated) + 1))[:LENGTH] if len(repeated) < 100 else repeated
    start = time.process_time()
    clean_caption(text)
    quoted_texts(text)
    return time.process_time() - start


@pytest.mark.parametrize("repeated", [*REPEATED, *ENDED.values()], ids=[*map(ascii, REPEATED), *ENDED])
def test_cleaning_takes_linear_time(repeated: str) -> None:
    outcome = run(seconds, repeated)
    assert outcome.kind == "returned", outcome
    assert outcome.value < 5, "quadratic rules take minutes"


EMPTIED = ["漢字", "www.example.com", "(((", "#123 @me", "https://a.com/b", "猫\x1b["]


@pytest.mark.parametrize("prompt", EMPTIED, ids=map(ascii, EMPTIED))
def test_a_prompt_that_cleaning_empties_is_reported(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    assert clean_prompt(prompt) == ""
    (record,) = caplog.records
    message = record.getMessage()
    assert message.isprintable()
    assert "clean_caption=False" in message
    assert shown(prompt) in message


@pytest.mark.parametrize("prompt", ["", "  ", "a cat", "кот", "un café"])
def test_other_prompts_are_not(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    assert clean_prompt(prompt) == clean_caption(clean_caption(prompt))
    assert not caplog.records
