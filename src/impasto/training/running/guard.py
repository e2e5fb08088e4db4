"""What protects a run: from signals that end it, from steps that would ruin it."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError, ImpastoError
from ..settings.config import GuardSettings

logger = logging.getLogger("impasto")


class DivergedError(ImpastoError, RuntimeError):
    """Too many steps in a row could not be used."""


class Guard:
    """Decides which steps are skipped: those that are not finite, and spikes of the loss or of the gradient.

    Its state is part of a run's, so a resumed run decides the same.
    """

    def __init__(self, settings: GuardSettings):
        self.settings = settings
        self.skipped = 0
        self.in_a_row = 0
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.norms: deque[float] = deque(maxlen=settings.window)

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Whether the optimizers may use the gradient of a step. What is skipped is logged.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        reason = self._fault(loss, norm)
        if math.isfinite(loss) and math.isfinite(norm):  # spikes too: so the medians follow a new level
            self.losses.append(loss)
            self.norms.append(norm)
            self.in_a_row = 0
        if reason is None:
            return True
        self.skipped += 1
        logger.warning("step %d is skipped: %s", step + 1, reason)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.in_a_row += 1
            if self.in_a_row >= self.settings.most_in_a_row:
                raise DivergedError(
                    f"{self.in_a_row} steps in a row were not finite, up to step {step + 1}: lower optimizer.rate, or "
                    f"look for broken data; continue from the last checkpoint"
                )
        return False

    def _fault(self, loss: float, norm: float) -> str | None:
        for name, value, recent in (("loss", loss, self.losses), ("gradient's norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if self.settings.spike and len(recent) >= min(self.settings.window, 50):
                usual = statistics.median(recent)
                if value > self.settings.spike * usual:
                    return f"its {name} is {value:.3g}, and the median of the last {len(recent)} steps {usual:.3g}"
        return None

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, as JSON can hold it."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self.losses),
            "norms": list(self.norms),
        }

    def restore(self, state: Any) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
            for own, name in ((self.losses, "losses"), (self.norms, "norms")):
                own.clear()
                own.extend(float(value) for value in state[name])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the state of skipped steps is damaged ({error}); use an earlier checkpoint"
            ) from error


class Signals:
    """The signal that asks this process to end, if there was one: ``SIGTERM`` or ``SIGINT``."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.received = number
        logger.warning("%s: the run ends after this step and a checkpoint", signal.Signals(number).name)


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Within the block, SIGTERM and Ctrl-C are noted instead of ending the process at once. In the main thread only."""
    noted = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, noted._receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
