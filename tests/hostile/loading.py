"""Loading some components of a checkpoint in a fork of the sandbox, with the checkpoint's folder importable."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import impasto

from . import sandbox

Change = Callable[[Any], Any]


def load(folder: str, *components: str) -> list[str]:
    """Load these components alone. Modules in the folders of the checkpoint could be imported by their names."""
    sys.path[:0] = [folder, *(f"{folder}/{name}" for name in components)]
    cls: Any = getattr(impasto, json.loads((Path(folder) / "model_index.json").read_text())["_class_name"])
    others = {name: None for name in cls.component_names() if name not in components}
    loaded = cls.from_pretrained(folder, **others)
    return [type(loaded.components[name]).__name__ for name in components]


def outcome_of(folder: Path, *components: str) -> sandbox.Outcome:
    return sandbox.run(load, str(folder), *components)


def accepted(outcome: sandbox.Outcome) -> None:
    """Assert that a case loaded, and printed nothing but progress."""
    assert outcome.kind == "returned", (
        f"{outcome.kind} {outcome.error}: {outcome.message}\n{outcome.trace}{outcome.stderr}"
    )


def copy_components(folder: Path, target: Path, *components: str) -> Path:
    """A checkpoint's index and some of its components."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "model_index.json", target)
    for name in components:
        sandbox.copy_of(folder / name, target / name)
    return target


def edit_nested(path: Path, keys: str, value: Any) -> None:
    """Set a value of a JSON file by a dotted path, in which numbers index lists; ``...`` removes it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *steps, last = [int(key) if key.lstrip("-").isdigit() else key for key in keys.split(".")]
    place: Any = content
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")
