"""Processes of one run notice that another has failed or is gone, although a collective operation may block them.

Each process counts its heartbeats in the store of the process group, and a thread of its own watches those of the next
rank, so that all ranks form a ring. The first failure is stored with its message, which all ranks read.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

#: After this many seconds without a heartbeat, a process is gone.
GONE = 30.0
#: Between two heartbeats, at most.
BEAT = 2.0
#: For this many seconds after a failure elsewhere, a process may stop by itself, with its files closed.
GRACE = 5.0

_FAILURE = "failure"


class Watch:
    """The heartbeat of this process, and the thread that ends the process if another one has failed or is gone.

    Saves are atomic, so a process may end at any moment.

    Args:
        store: of the process group; a connection of its own.
        gone: seconds without a heartbeat after which a process is gone.
    """

    def __init__(self, store: Any, rank: int, count: int, gone: float = GONE):
        self.store, self.rank, self.next = store, rank, (rank + 1) % count
        self.gone, self.beat, self.grace = gone, min(BEAT, gone / 4), min(GRACE, gone)
        self.failure: str | None = None  # of another process
        self.noticed = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impasto-watch", daemon=True)
        self._thread.start()

    def report(self, message: str) -> None:
        """Store the failure of this process, unless another one failed first."""
        try:
            self.store.compare_set(_FAILURE, "", f"{self.rank}:{message}")
        except Exception:
            return  # the process that hosts the store is gone

    def wait(self, seconds: float) -> str | None:
        """The failure of another process, which becomes known within ``seconds`` or not at all."""
        self.noticed.wait(seconds)
        return self.failure

    def stop(self) -> None:
        """Stop watching: the run is over."""
        self._stopped.set()
        self._thread.join(self.beat + 1)

    def _run(self) -> None:
        seen, since = -1, time.monotonic()
        while self.failure is None:
            try:
                self.store.add(f"beat/{self.rank}", 1)
                beats = self.store.add(f"beat/{self.next}", 0)
                if beats != seen:
                    seen, since = beats, time.monotonic()
                elif time.monotonic() - since > self.gone:
                    message = f"rank {self.next} has given no sign of life for {self.gone:.0f} seconds"
                    self.store.compare_set(_FAILURE, "", f"{self.next}:{message}")
                self._read()
            except Exception as error:
                if not self._stopped.is_set():
                    self.failure = f"the process that coordinates the run is gone ({type(error).__name__})"
            if self._stopped.wait(self.beat):
                return
        self.noticed.set()
        if not self._stopped.wait(self.grace):
            _end(self.failure)

    def _read(self) -> None:
        if self.store.check([_FAILURE]):
            rank, _, message = self.store.get(_FAILURE).decode(errors="replace").partition(":")
            if int(rank) != self.rank:
                self.failure = message


def _end(message: str) -> None:
    print(f"impasto: {message}; this process ends. The last checkpoint remains: resume from it", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
