"""The same idioms with `import diffusers` and with `import impasto`: what works there works here, with equal results.

Run with `-s` to see the counts. `docs/differences.md` gives the reason for each idiom of `EXPECTED_DIFFERENT`.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

import impasto

from . import generated
from .building import Make, comparable, difference
from .expected import BY_CHANCE, EXPECTED_DIFFERENT
from .idioms import IDIOMS, Idiom, all_idioms

pytestmark = pytest.mark.long

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"


class Failed(NamedTuple):
    error: str
    deliberate: bool  # one of our errors, with a message that says what to do


def run(one: Idiom, lib: ModuleType) -> Any:
    """What an idiom returns, as comparable data, or how it failed."""
    torch.default_generator.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return comparable(one.run(lib, Make(lib, Path(folder))))
        except Exception as error:
            return Failed(f"{type(error).__name__}: {error}"[:300], isinstance(error, impasto.ImpastoError))


class Outcome(NamedTuple):
    name: str
    works_there: bool
    difference: str | None  # None: agrees
    deliberate: bool


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "impasto")}  # which idioms change
    diffusers.utils.logging.set_verbosity_error()
    found = {}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine stops here
    for one in all_idioms():
        theirs = run(one, diffusers)
        different, deliberate = None, True
        if not isinstance(theirs, Failed):
            ours = run(one, impasto)
            different = ours.error if isinstance(ours, Failed) else difference(ours, theirs)
            deliberate = not isinstance(ours, Failed) or ours.deliberate
        assert one.name not in found
        found[one.name] = Outcome(one.name, not isinstance(theirs, Failed), different, deliberate)
    monkeypatch.undo()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    return found


def test_every_argument_has_a_sample() -> None:
    assert generated.samples_missing() == []


def test_what_works_there_works_here(outcomes: dict[str, Outcome]) -> None:
    working = [o for o in outcomes.values() if o.works_there]
    agreeing = [o for o in working if o.difference is None]
    written = [o for o in working if o.name in IDIOMS]
    print(
        f"\n{len(outcomes)} idioms, {len(IDIOMS)} of them from the documentation; {len(working)} work in diffusers "
        f"({len(written)} of the documentation's); {len(agreeing)} of these agree here: "
        f"{100 * len(agreeing) / len(working):.1f} %"
    )
    failing = [f"{o.name}: {o.difference}" for o in working if o.difference and o.name not in EXPECTED_DIFFERENT]
    assert not failing, f"{len(failing)} idioms fail:\n" + "\n".join(failing)
    assert len(agreeing) >= 0.95 * len(working)
    assert len(written) >= 100


def test_listed_differences_are_true_and_documented(outcomes: dict[str, Outcome]) -> None:
    text = " ".join(DIFFERENCES.read_text().split())
    assert not [n for n in EXPECTED_DIFFERENT if n not in outcomes], "no such idiom"
    agreeing = {name for name in EXPECTED_DIFFERENT if outcomes[name].difference is None}
    assert not agreeing - BY_CHANCE, "these agree: take them out"
    assert not [n for n in EXPECTED_DIFFERENT if not outcomes[n].deliberate], "these are faults"
    assert not [n for n, reason in EXPECTED_DIFFERENT.items() if reason not in text], "reasons not in the docs"
