"""Names that are imported on first use (PEP 562), and import paths without files of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: The package that names are relative to.
_ROOT = __name__.rpartition(".")[0]


def resolve(module: str, homes: Mapping[str, str], name: str) -> Any:
    """A name of a module, from where ``homes`` says.

    A home is ``"nn.outputs:BaseOutput"``, ``"pipelines.pixart:"`` for a module, or ``":quantize"`` for a public name.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, attribute = homes[name].split(":")
    found = import_module(f"{_ROOT}.{home}" if home else _ROOT)
    value = getattr(found, attribute) if attribute else found
    setattr(sys.modules[module], name, value)  # the next access does not come here
    return value


def publish(package: str, homes: Mapping[str, str], *names: str) -> None:
    """Make ``package.name`` importable for each of these names, with the contents that ``homes`` lists."""
    for name in names:
        path = f"{package}.{name}"
        if path not in sys.modules:
            module = ModuleType(path, f"An import path of diffusers; what it has is in {package}.")
            module.__spec__, module.__path__ = ModuleSpec(path, None, is_package=True), []
            module.__dict__.update(__getattr__=partial(resolve, path, homes), __all__=list(homes))
            sys.modules[path] = module
        parent, _, last = path.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, sys.modules[path])
