"""``scripts/sizing.py`` and the page whose numbers it computes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sizing.md"


@pytest.fixture(scope="module")
def sizing() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "sizing.py"))


def test_the_page_has_the_numbers_of_the_script(sizing: dict[str, Any]):
    page = PAGE.read_text("utf-8")
    assert sizing["replaced"](page, sizing["tables"](sizing["Load"]())) == page
    assert page.count("| **") == len(sizing["ways"]()) == 5


def test_machines_suffice_for_the_busiest_hour_and_one_fewer_does_not(sizing: dict[str, Any]):
    load = sizing["Load"](images=1e6, peak=3.0, busy=0.5)
    assert load.per_second == pytest.approx(34.72, abs=0.01)
    for way in sizing["ways"]():
        needed = way.machines(load) - 1  # one is to spare
        assert needed * load.busy / way.seconds >= load.per_second
        assert (needed - 1) * load.busy / way.seconds < load.per_second


def test_the_queue_is_what_can_be_begun_in_time(sizing: dict[str, Any]):
    way = sizing["Way"]("", "", 0.5, 512, "", "")
    assert way.queue(sizing["Load"](wait=3.0)) == 7  # the seventh begins after 3 seconds
    assert way.queue(sizing["Load"](wait=0.1)) == 1


def test_seconds_are_those_of_the_results(sizing: dict[str, Any]):
    measured = sizing["result"]("2026-11-26-gpu-1024")
    large = next(way for way in sizing["ways"]() if way.source == "2026-11-26-gpu-1024")
    parts = measured["median"]["impasto"], measured["decode_seconds"]["impasto"], measured["text_seconds"]["impasto"]
    assert large.seconds == pytest.approx(sum(parts))
    for way in sizing["ways"]():
        assert (ROOT / "benchmarks" / "results" / f"{way.source}.json").is_file()


def test_another_load(sizing: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    sizing["main"](["--images", "1000", "--peak", "1"])
    assert "1,000 images a day are 0.0 a second" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text(f"before\n{sizing['BEGIN']}\nold\n{sizing['END']}\nafter\n", "utf-8")
    sizing["main"](["--write", str(page)])
    text = page.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    with pytest.raises(SystemExit):
        sizing["main"](["--busy", "1.5"])
