"""How a command fails: with one line on standard error and a non-zero exit status, whatever happened."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..checks import is_out_of_memory, printable
from ..errors import ImpastoError, OutputError

#: The class of usage errors. Newer typers carry a copy of click, and this is that copy's.
UsageError: Any = typer.BadParameter.__base__
LONGEST_LINE = 1000  # characters


def say(text: str, *, error: bool = False) -> None:
    """Print lines to standard output or error, with their control characters escaped."""
    for line in text.split("\n"):
        try:
            typer.echo(printable(line), err=error)
        except (OSError, ValueError) as problem:  # ValueError: this process closed it
            if not error:
                raise _lost_output(problem) from problem


class Commands(TyperGroup):
    """Commands that report an error in one line on standard error, or with ``--debug`` by a traceback."""

    def main(self, args: Any = None, prog_name: str | None = None, **_: Any) -> NoReturn:  # type: ignore[override]
        debug = False
        try:
            if sys.stdout is None:
                raise OutputError("standard output is closed; leave it open, or send it to a file or to /dev/null")
            with self.make_context(prog_name or "impasto", list(sys.argv[1:] if args is None else args)) as context:
                debug = context.params["debug"]
                _keep_to_one_line(debug)
                self.invoke(context)
            status = 0
        except typer.Exit as stop:
            status = stop.exit_code
        except SystemExit:  # from rich, if the pipe that it prints the help to is closed
            status = _report(_lost_output(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))))
        except BaseException as error:
            if debug and not isinstance(error, KeyboardInterrupt | UsageError):
                raise
            status = _report(error)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError) as error:
            lost = _lost_output(error)
            status = status or _report(lost)
        sys.exit(status)


def _keep_to_one_line(debug: bool) -> None:
    """Log each warning in one line, without control characters; with ``--debug`` with tracebacks, and Python's too."""
    handler = logging.StreamHandler()
    handler.setFormatter((logging.Formatter if debug else _OneLine)("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # transformers imports torchao if it is installed, which then warns of kernels that nothing here uses.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not debug:
        logging.raiseExceptions = False  # if standard error is closed
        warnings.simplefilter("ignore")


class _OneLine(logging.Formatter):
    """An error without its traceback, which would leave no room for what it says."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        plain = copy.copy(record)
        plain.exc_info = plain.exc_text = plain.stack_info = None
        text = super().format(plain)
        return _one_line(text if error is None else f"{text[:400].rstrip()}: {type(error).__name__}: {error}")


def _one_line(text: str) -> str:
    line = printable(" ".join(text[: 4 * LONGEST_LINE].split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."


def _report(error: BaseException) -> int:
    """Print one line about an error, and return the status."""
    if isinstance(error, KeyboardInterrupt):
        say("interrupted", error=True)
        return 130
    say(_one_line(f"error: {_explain(error)}"), error=True)
    return 2 if isinstance(error, UsageError) else 1


def _explain(error: BaseException) -> str:
    if isinstance(error, UsageError):
        path = "impasto" if error.ctx is None else error.ctx.command_path
        return f"{error.format_message()[:400]} (see {path} --help)"
    if isinstance(error, ImpastoError):
        return str(error)
    if is_out_of_memory(error):
        return "there is too little memory; use a smaller --batch-size, --dtype bfloat16, or a smaller image"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {str(error)[:400]} (impasto --debug ... shows where; please report it)"


def _lost_output(error: OSError | ValueError) -> OutputError:
    """The error of a standard output that takes no more; what follows, Python's last flush included, is discarded."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"standard output cannot be written: {reason}; send it somewhere else")
