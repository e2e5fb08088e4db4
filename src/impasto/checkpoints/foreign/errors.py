"""Turn the errors and output of transformers, tokenizers and their Rust code into our errors."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...checks import is_out_of_memory, shown
from ...errors import CheckpointError, ImpastoError, MissingDependencyError


@contextmanager
def translated(what: str, path: Path, *, quantized: bool = False, done: str = "loaded") -> Iterator[None]:
    """Translate everything the libraries raise. Their advice does not apply here, so little is quoted.

    The message says that ``path`` cannot be ``done`` as ``what``.
    """
    try:
        yield
    except (ImpastoError, MemoryError):
        raise
    except ImportError as error:
        if not quantized:
            raise CheckpointError(f"{path} cannot be {done} as {what}. Download or save it again.") from error
        raise MissingDependencyError(
            f"{path} is quantized, but the library for it is not installed: pip install 'impasto[quantize]'"
        ) from error
    except BaseException as error:
        # A panic of a Rust library derives from BaseException directly, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} cannot be {done} as {what}: {_fault(error)}. Download or save it again."
        ) from error


def _fault(error: BaseException) -> str:
    """The first sentence of an error, or the name of its class if the sentence is long or gives advice."""
    if "automatic conversion of the weights" in str(error):  # a thread of transformers failed; its log alone says why
        return "some of its weights could not be read or converted, possibly for lack of memory"
    first = next(iter(str(error).strip().splitlines()), "").split(". ")[0]
    advice = re.search(
        r"install|please|weights_only|ignore_mismatched|trust_remote|https?:|make sure|`|you ", first, re.I
    )
    return type(error).__name__ if not first or advice or len(first) > 200 else shown(first, 200).strip("'\"")


#: Held while a tokenizer works: the truncation of a call stays in it until the next, which may be another thread's.
TOKENIZING = threading.Lock()
#: A process has only one standard error.
_one_at_a_time = threading.Lock()


@contextmanager
def held_back_stderr() -> Iterator[None]:
    """Hold back standard error, including that of Rust code, and print it only if nothing is raised."""
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        try:
            sys.stderr.flush()
            stderr = stack.enter_context(os.fdopen(os.dup(2), "wb", buffering=0))
        except (OSError, ValueError, AttributeError):  # closed
            yield
            return
        held = stack.enter_context(tempfile.TemporaryFile())
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
