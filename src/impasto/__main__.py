"""The command ``impasto``: what signals do is settled before anything slow is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line; a signal that ends it is said in one line, and seen by the shell (130, 143)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after nohup
            signal.signal(number, _end)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would take its number, and what is printed would go there
            os.open(os.devnull, os.O_RDWR)
    from .cli import app

    app(prog_name="impasto")


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    try:
        os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")  # a progress bar has left its line open
    finally:
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
