"""The training loop: gradients of an objective, optimizers, averages, checkpoints.

Data and random numbers are functions of the step, so the state of a run is its step number and tensors. A run that was
killed continues bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..data.order import Order
from ..distributed.processes import ALONE, Processes
from ..objectives.base import Data, Objective
from ..settings.config import Settings
from . import checkpoints
from .ahead import Ahead
from .guard import signals
from .report import Reporter
from .run import Run

Check = Callable[[int], Mapping[str, float]]


def train(
    objective: Objective,
    data: Data,
    settings: Settings,
    folder: Path,
    check: Check | None = None,
    processes: Processes = ALONE,
    started: Callable[[], None] | None = None,
) -> int | None:
    """Train in place, resuming from the last checkpoint in ``folder`` if there is one.

    The result is the averages, in float32, of the last step or of the best checkpoint.

    Args:
        objective: what it trains computes in ``settings.precision`` meanwhile.
        check: called after each checkpoint with the number of steps done, while what is trained holds its averages;
            its result is logged. All processes call it, with the same result. A run that was killed meanwhile, or
            ended early at such a step, calls it first when it resumes.
        processes: all of which call this, with the same objective.
        started: called when the state in ``folder``, if any, has been accepted.

    Returns:
        None, or the signal, SIGTERM or SIGINT, after which the run ended early, with a checkpoint.

    Raises:
        CheckpointError: the state is damaged or belongs to another training run.
        DivergedError: too many steps in a row were not finite.
        OutputError: a checkpoint or the log cannot be written.
        InputError: ``checkpoints.best`` is not measured, or processes see other data.
    """
    order: Order | None = getattr(data, "order", None)
    run = Run(objective, settings, processes, "" if order is None else order.fingerprint)
    if processes.shared(run.data) != run.data:
        raise InputError(
            f"rank {processes.rank} sees other data than rank 0; give all machines the same files under the same paths"
        )
    last = processes.shared(checkpoints.latest(folder))
    start = 0 if last is None else run.load(last)
    if started is not None:
        started()
    stopped = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        if settings.compile:
            stack.enter_context(_recompiled(1 if order is None else len(order.in_buckets)))
        packed = order is not None and order.pack_pixels is not None  # batches of many shapes
        for block in objective.blocks if settings.compile else ():
            block.forward = torch.compile(block.forward, dynamic=packed)  # without the hooks
            stack.callback(delattr, block, "forward")
        noted = stack.enter_context(signals())
        if run.unchecked is not None and processes.is_main:
            checkpoints.trim_log(folder / "log.jsonl", start - 1)  # its line comes with the check
        reporter = Reporter(folder, settings, start, run.device, processes.is_main)
        stack.callback(reporter.close)
        objective.train()
        means = Means()
        if run.unchecked is not None:
            _check(run, check, folder, start, reporter)
        ahead = Ahead(data, settings.steps, processes, run.device, active=run.device.type == "cuda")
        stack.callback(ahead.close)
        for step in range(start, settings.steps):
            batch = ahead.batch(step)
            loss, parts = run.gradients(batch)
            norm = run.update(step, loss)
            means.add({"loss": loss, "norm": norm, **parts})
            reporter.step(batch.count, objective.flops(batch), loss)

            done = step + 1
            stopped = processes.highest(noted.received or 0) or None  # of any process
            due = done % settings.checkpoints.every == 0 or done == settings.steps
            saves = due or stopped is not None
            if saves or done % settings.log_every == 0:  # the window is not part of the state
                rates = {"rate": settings.optimizer.rate * settings.share(step), "skipped": float(run.guard.skipped)}
                values = {**rates, **means.take(processes)}
                if due and check is not None:  # which may take long: if stopped, the run begins with it when it resumes
                    run.unchecked = values
                    _save(run, folder, done)
                    if stopped is None:
                        _check(run, check, folder, done, reporter)
                        stopped = processes.highest(noted.received or 0) or None
                else:
                    if due:
                        run.note_best(done, values)
                    reporter.line(done, values)
                    if saves:
                        _save(run, folder, done)
                if saves:
                    reporter.restart_clock()
            if stopped is not None:
                break
    if stopped is None and settings.checkpoints.result == "best":
        run.take_best(functools.partial(checkpoints.path_of, folder))
    run.finish()
    objective.eval()
    return stopped


def _save(run: Run, folder: Path, step: int) -> None:
    write = functools.partial(run.save, step=step)
    checkpoints.save(folder, step, write, run.settings.checkpoints.keep, run.best_step, run.processes)
    if run.unchecked is None:
        run.require_best()


def _check(run: Run, check: Check | None, folder: Path, step: int, reporter: Reporter) -> None:
    """Measure the checkpoint of a step, log it, and note in the checkpoint that this is done, and the best one."""
    values = {**(run.unchecked or {}), **({} if check is None else run.checked(check, step))}
    run.note_best(step, values)
    reporter.line(step, values)
    run.unchecked = None
    checkpoints.amend(folder, step, run.state(step), run.settings.checkpoints.keep, run.best_step, run.processes)
    run.require_best()


def _recompiled(shapes: int) -> contextlib.AbstractContextManager[None]:
    """Blocks may be compiled for so many shapes of images, each with several sizes of micro-batches."""
    config = torch._dynamo.config
    most = max(config.recompile_limit, 8 * shapes)
    total = max(config.accumulated_recompile_limit, 8 * most)
    patch: Any = config.patch
    return patch(recompile_limit=most, accumulated_recompile_limit=total)  # type: ignore[no-any-return]


class Means:
    """Means of logged values over samples and steps."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values [B], or single numbers, of which NaN do not count."""
        for name, value in values.items():
            value = value.detach().float()
            there = ~value.isnan()
            total, number = value.nan_to_num(0.0, torch.inf, -torch.inf).sum(), there.sum()
            before = self.sums.get(name)
            self.sums[name] = (total, number) if before is None else (before[0] + total, before[1] + number)

    def take(self, processes: Processes) -> dict[str, float]:
        """The means over all processes; from here on, new ones."""
        sums = processes.merged({name: (float(total), float(number)) for name, (total, number) in self.sums.items()})
        self.sums.clear()
        return {name: total / number for name, (total, number) in sums.items() if number}
