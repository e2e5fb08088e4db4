"""What transformers, tokenizers and the Rust below them raise and print, as errors of ours."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...checks import shown
from ...errors import CheckpointError, ImpastoError, MissingDependencyError


@contextmanager
def translated(what: str, path: Path) -> Iterator[None]:
    """Whatever the libraries raise is an error of ours. They advise what does not help here, so little is quoted."""
    try:
        yield
    except (ImpastoError, MemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs {error.name or 'a library'}, which is not installed: pip install 'impasto[quantize]'"
        ) from error
    except BaseException as error:
        # A panic of a Rust library derives from BaseException alone, and its class is not importable.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise
        raise CheckpointError(
            f"{path} cannot be loaded as {what}: {_fault(error)}. Download or save it again."
        ) from error


def _fault(error: BaseException) -> str:
    """The first sentence of an error, or the name of its class if that gives advice or is long."""
    first = next(iter(str(error).strip().splitlines()), "").split(". ")[0]
    advice = re.search(
        r"install|please|weights_only|ignore_mismatched|trust_remote|https?:|make sure|`|you ", first, re.I
    )
    return type(error).__name__ if not first or advice or len(first) > 200 else shown(first, 200).strip("'\"")


@contextmanager
def held_back_stderr() -> Iterator[None]:
    """Keep back what is printed to standard error, by Rust too, and print it only if nothing is raised."""
    try:
        sys.stderr.flush()
        real = os.dup(2)
    except (OSError, ValueError, AttributeError):  # closed
        yield
        return
    with tempfile.TemporaryFile() as held, contextlib.closing(os.fdopen(real, "wb", buffering=0)) as stderr:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.truncate(0)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            held.seek(0)
            stderr.write(held.read())
