"""What the package logs, and how much of it is shown."""

from __future__ import annotations

import logging
import threading
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

__all__ = [
    "CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "NOTSET", "WARN", "WARNING",
    "add_handler", "disable_default_handler", "disable_progress_bar", "disable_propagation", "enable_default_handler",
    "enable_explicit_format", "enable_progress_bar", "enable_propagation", "get_logger", "get_verbosity",
    "remove_handler", "reset_format", "set_verbosity", "set_verbosity_debug", "set_verbosity_error",
    "set_verbosity_info", "set_verbosity_warning",
]  # fmt: skip

_ROOT = logging.getLogger("impasto")
_default = logging.StreamHandler()  # writes to stderr
_lock = threading.Lock()


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of this name; the package's own without a name."""
    return _ROOT if name is None else logging.getLogger(name)


def get_verbosity() -> int:
    """The lowest level that is shown, such as ``logging.WARNING``."""
    return _ROOT.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Show messages of this level and above, on stderr unless the program has other handlers."""
    if not _ROOT.hasHandlers():
        enable_default_handler()
    _ROOT.setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Show everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Show what happens, too."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Show warnings and errors; the default."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show errors only."""
    set_verbosity(ERROR)


def add_handler(handler: logging.Handler) -> None:
    """Add a handler to the package's logger."""
    _ROOT.addHandler(handler)


def remove_handler(handler: logging.Handler) -> None:
    """Remove a handler from the package's logger."""
    _ROOT.removeHandler(handler)


def enable_default_handler() -> None:
    """Write messages to stderr."""
    with _lock:
        _ROOT.addHandler(_default)


def disable_default_handler() -> None:
    """Do not write messages to stderr by ``enable_default_handler``."""
    _ROOT.removeHandler(_default)


def enable_propagation() -> None:
    """Pass messages on to the handlers of the program; the default."""
    _ROOT.propagate = True


def disable_propagation() -> None:
    """Pass no messages on to the handlers of the program."""
    _ROOT.propagate = False


def enable_explicit_format() -> None:
    """Let the package's handlers write level, place and time, too."""
    for handler in _ROOT.handlers:
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"))


def reset_format() -> None:
    """Let the package's handlers write the message alone."""
    for handler in _ROOT.handlers:
        handler.setFormatter(None)


def enable_progress_bar() -> None:
    """Show the progress of downloads; for that of calls see ``pipe.set_progress_bar_config``."""
    from huggingface_hub.utils.tqdm import enable_progress_bars

    enable_progress_bars()


def disable_progress_bar() -> None:
    """Do not show the progress of downloads; for that of calls see ``pipe.set_progress_bar_config``."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
