"""Libraries that one feature needs and a lean installation lacks: imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import MissingDependencyError


def require(module: str, purpose: str, install: str) -> Any:
    """Import ``module``, which ``purpose`` needs.

    Args:
        install: the requirement that brings it: "impasto[train]".

    Raises:
        MissingDependencyError: it cannot be imported; the message has the install command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        quoted = f"'{install}'" if "[" in install else install
        library = (error.name or module).partition(".")[0]  # it may be one that the module itself imports
        raise MissingDependencyError(
            f"{purpose} needs {library}, which is not installed: pip install {quoted}"
        ) from error
