"""Libraries that one feature needs."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from impasto.errors import MissingDependencyError
from impasto.optional import require

SOURCE = Path(__file__).parents[1] / "src/impasto"


@pytest.mark.parametrize(
    ("install", "command"), [("impasto[train]", "pip install 'impasto[train]'"), ("wandb", "pip install wandb")]
)
def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, install: str, command: str) -> None:
    monkeypatch.setitem(sys.modules, "no_such", None)
    with pytest.raises(MissingDependencyError) as raised:
        require("no_such.part", "the report", install)
    assert str(raised.value) == f"the report needs no_such, which is not installed: {command}"


def test_what_is_missing_is_named_and_not_what_imports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_another.py").write_text("import no_such_library.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"^the report needs no_such_library, .*: pip install x$"):
        require("needs_another", "the report", "x")


def test_a_library_that_is_there() -> None:
    assert require("json.decoder", "this", "x").JSONDecoder


def test_the_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for path in SOURCE.rglob("*.py")
        for group in re.findall(r"impasto\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert named <= set(extras), named - set(extras)
