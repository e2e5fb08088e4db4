"""Checks of arguments and config values: each returns the value as a plain Python number, or raises.

The message names the value, says what was expected, and quotes what was given. NumPy's numbers count as numbers;
booleans, strings, NaN and infinity do not.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable
from typing import Any

from .errors import ImpastoError, InputError


def whole_number(
    name: str, value: Any, least: int = 1, most: int | None = None, *, error: type[ImpastoError] = InputError
) -> int:
    """``value`` as an int from ``least`` to ``most``; ``error`` otherwise."""
    try:
        found = None if _is_bool(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers, or on the meta device
        found = None
    if found is None or found < least or (most is not None and found > most):
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise error(f"{name} must be a whole number {bounds}, not {shown(value)}")
    return found


def finite(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float | None = None,
    error: type[ImpastoError] = InputError,
) -> float:
    """``value`` as a finite float from ``least`` to ``most`` (and greater than ``above``); ``error`` otherwise."""
    try:
        found = math.nan if _is_bool(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found) or not least <= found <= most or (above is not None and found <= above):
        bounds = [] if above is None else [f"above {above:g}"]
        bounds += [f"of {least:g} or more"] if math.isfinite(least) and above is None else []
        bounds += [f"of {most:g} or less"] if math.isfinite(most) else []
        raise error(f"{name} must be a finite number {' and '.join(bounds)}".rstrip() + f", not {shown(value)}")
    return found


def flag(name: str, value: Any, *, error: type[ImpastoError] = InputError) -> bool:
    """``value`` as a bool; only True and False are accepted."""
    if not _is_bool(value):
        raise error(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def nearest(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the known one that is most like it, else ``otherwise``."""
    found = difflib.get_close_matches(name[:100], list(known), 1) if isinstance(name, str) else []
    hint = f"did you mean {found[0]!r}?" if found else otherwise
    return f"; {hint}" if hint else ""


def _is_bool(value: Any) -> bool:
    """Whether it is a bool of Python or NumPy (which this file does not import)."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def text(name: str, value: Any, most: int, *, error: type[ImpastoError] = InputError) -> str:
    """``value`` as a str of at most ``most`` characters, without lone surrogates (undecodable bytes)."""
    if not isinstance(value, str):
        raise error(f"{name} must be a string, not {shown(value)}")
    if len(value) > most:
        raise error(f"{name} has {len(value):,} characters, but at most {most:,} are accepted; shorten it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise error(f"{name} is not valid Unicode: {shown(value)}; give it in UTF-8")
    return value


#: Marks records of the log that quote a prompt: servers leave them out.
QUOTES_PROMPT = {"quotes_prompt": True}


def shown(value: Any, limit: int = 80) -> str:
    """``repr(value)`` for a message: shortened, without control characters. It never raises."""
    try:
        text = repr(value)
    except Exception as problem:  # the repr of a foreign object, or of an integer of 5,000 digits
        text = f"a {type(value).__name__} ({type(problem).__name__})"
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


#: How RuntimeErrors of allocators report a lack of memory.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a MemoryError, or a RuntimeError of torch that reports a lack of memory."""
    said = isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)
    return isinstance(error, MemoryError) or said


def printable(text: str) -> str:
    r"""The text with control characters and lone surrogates escaped (``\x1b``), safe to print on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# --- the largest values that a call or a command accepts: beyond them it is a mistake or an attack ---

MAX_SIDE = 8192  # pixels of a generated image, along a side
MAX_PIXELS = MAX_SIDE**2  # of an image that is given
MAX_FILE_BYTES = 256 << 20  # of an image file
MAX_STEPS = 10_000
MAX_IMAGES = 10_000  # of a call, or of a command
MAX_GUIDANCE = 1000.0  # in magnitude; the largest number of float16 is 65504
MAX_TOKENS = 4096  # of a text
MAX_CHARACTERS = 20_000  # of a prompt: more than any text encoder here reads


def parse_size(size: int | str) -> int:
    """Bytes from a number, or a text such as ``"5GB"`` (powers of ten) or ``"5GiB"`` (powers of two)."""
    if isinstance(size, int):
        found = size
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
        if match is None:
            raise InputError(f"size {shown(size)} is not understood; write it like 5GB or 500MB")
        base = 1024 if match[3] else 1000
        found = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if found <= 0:
        raise InputError(f"size {shown(size)} must be more than zero")
    return found
