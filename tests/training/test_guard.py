"""Steps that are skipped, and signals that end a run."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest

from impasto.errors import CheckpointError
from impasto.training.running.guard import DivergedError, Guard, signals
from impasto.training.settings.config import GuardSettings


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_end_the_run() -> None:
    guard = Guard(GuardSettings(most_in_a_row=3))
    given = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.inf, 1.0), (1.0, math.nan)]
    assert [guard.accepts(step, *each) for step, each in enumerate(given)] == [True, False, False, True, False, False]
    assert guard.skipped == 4
    with pytest.raises(DivergedError, match=r"3 steps in a row.*up to step 7"):
        guard.accepts(6, math.nan, math.nan)


def test_spikes_are_skipped_until_they_are_the_rule() -> None:
    guard = Guard(GuardSettings(spike=10.0, window=100))
    for step in range(49):
        assert guard.accepts(step, 1.0, 2.0)
    assert guard.accepts(49, 11.0, 2.0)  # there are too few to know
    assert not guard.accepts(50, 10.5, 2.0)
    assert not guard.accepts(51, 1.0, 20.5)
    assert guard.accepts(52, 9.5, 19.5)
    accepted = [guard.accepts(53 + i, 50.0, 2.0) for i in range(100)]
    assert not accepted[0]
    assert accepted[-1]
    assert Guard(GuardSettings(spike=0.0)).accepts(0, 1e9, 1e9)


def test_a_guard_goes_on_from_its_state() -> None:
    one, other = Guard(GuardSettings(spike=4.0, window=60)), Guard(GuardSettings(spike=4.0, window=60))
    for step in range(70):
        one.accepts(step, 1.0 + step % 7, math.nan if step % 5 == 0 else 1.0)
    other.restore(one.state())
    assert other.state() == one.state()
    for step in range(70, 140):
        loss = 1.0 + (40 if step % 9 == 0 else step % 7)
        assert one.accepts(step, loss, 1.0) == other.accepts(step, loss, 1.0)
    for damaged in (None, {}, {"skipped": 1, "in_a_row": 0, "losses": ["x"], "norms": []}):
        with pytest.raises(CheckpointError, match="damaged"):
            other.restore(damaged)


def test_signals_are_noted_and_their_handlers_return() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signals() as noted:
        assert noted.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_other_threads_signals_are_left_alone() -> None:
    found: list[object] = []

    def enter() -> None:
        with signals() as noted:
            found.append(noted.received)
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None, signal.getsignal(signal.SIGTERM)]
