"""Every public name of diffusers' classes and their instances exists here, or docs/differences.md gives the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
from torch import nn

import impasto

from .building import Make
from .generated import CLASSES, PIPELINES, SCHEDULERS, instance

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"
#: The section of the page whose rows start with the names that are missing.
MISSING = "## Names that are not here"


def section(title: str) -> str:
    text = DIFFERENCES.read_text()
    start = text.index(f"{title}\n")
    level = title.split()[0]
    end = re.search(rf"^#{{1,{len(level)}}} ", text[start + len(title) :], re.M)
    return text[start : start + len(title) + end.start()] if end else text[start:]


def documented(title: str = MISSING) -> set[str]:
    """The names in the first column of the tables of a section."""
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", section(title), re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def public(thing: Any) -> set[str]:
    return {n for n in dir(thing) if not n.startswith("_")} - set(dir(nn.Module()))


def missing(owner: str, tmp_path: Path) -> set[str]:
    """Names of the reference's class or instance that ours lacks."""
    found = set()
    theirs, ours = (instance(Make(lib, tmp_path), owner) for lib in (diffusers, impasto))
    for thing in (theirs, ours) if owner in SCHEDULERS else ():
        thing.set_timesteps(3)
    found |= (public(getattr(diffusers, owner)) | public(theirs)) - public(getattr(impasto, owner)) - public(ours)
    if owner in PIPELINES:
        found |= public(theirs.image_processor) - public(ours.image_processor)
    return found


@pytest.fixture(scope="module")
def all_missing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    return {owner: missing(owner, tmp_path_factory.mktemp("names")) for owner in CLASSES}


@pytest.mark.parametrize("owner", CLASSES)
def test_every_name_is_here_or_documented(owner: str, all_missing: dict[str, set[str]]) -> None:
    assert sorted(all_missing[owner] - documented()) == []


def test_the_list_is_true(all_missing: dict[str, set[str]]) -> None:
    assert sorted(documented() - set().union(*all_missing.values())) == [], "these exist: take them off the list"


def test_the_list_is_short() -> None:
    print(f"\n{len(documented())} names are not here")
    assert len(documented()) <= 15


def test_what_is_read_and_done_on_instances_works(tmp_path: Path) -> None:
    """A name that exists can be read: no property raises."""
    for owner in CLASSES:
        thing = instance(Make(impasto, tmp_path), owner)
        for name in sorted(public(getattr(diffusers, owner)) & public(thing)):
            getattr(thing, name)
