"""The command ``impasto``: signal handlers are installed before anything slow is imported."""

from __future__ import annotations

import functools
import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line; a signal that ends it is reported in one line, and the shell sees it (130, 143)."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would get its number, and with it all that is printed
            os.open(os.devnull, os.O_RDWR)
    stderr = os.dup(2)  # a copy, as libraries may redirect descriptor 2 for a while
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, functools.partial(_end, stderr))
    from .cli import app

    app(prog_name="impasto")


def _end(stderr: int, number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    try:
        # On a terminal, a progress bar has left its line open.
        os.write(stderr, b"\ninterrupted\n" if os.isatty(stderr) else b"interrupted\n")
    finally:
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
