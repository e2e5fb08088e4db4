"""What a run would need, measured by its first two steps, of which nothing is kept."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor

from ..optimizers.state import state_tensors
from ..running.run import Run
from ..settings.configuration import Configuration
from .assemble import Assembled
from .further_objectives import lacking

MEASURED_STEPS = 2


def describe(configuration: Configuration, assembled: Assembled) -> str:
    """Buckets, steps, memory and time of a run, in lines.

    Memory and time are measured: the models are loaded, and two steps are computed on this machine.
    """
    data, order = assembled.data, assembled.data.order
    lines = ["", "data"]
    for (height, width), count in sorted(order.in_buckets.items()):
        lines.append(f"  {height} x {width}: {count} images")
    lines += [f"  left out: {count}: {reason}" for reason, count in data.left_out.items()]
    for source in configuration.data.sources:
        if count := lacking(source):
            lines.append(f"  {count} class images will be generated in {source.path}")
    lines.append(f"  {order.samples_per_epoch} samples and {order.steps_in(0)} steps in an epoch")
    lines.append(f"  {configuration.steps} steps: {configuration.steps / order.steps_in(0):.3g} epochs")

    run = Run(assembled.objective, configuration)
    assembled.objective.train()
    seconds = 0.0
    for step in range(MEASURED_STEPS):
        batch = data.batch(step, 0, 1)
        start = time.monotonic()
        loss, _ = run.gradients(batch)
        held = _bytes(p.grad for p in run.masters.named.values() if p.grad is not None)
        run.update(step, loss)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds = time.monotonic() - start  # the first one also warms up
    trained = _bytes(run.masters.named.values())
    weights = _bytes([*assembled.objective.parameters(), *assembled.objective.buffers()])
    masters = _bytes(
        master for name, master in run.masters.named.items() if master.dtype != run.masters.working[name].dtype
    )
    parts = {
        "weights, as they compute": weights,
        "float32 copies of what is trained": masters,
        "gradients": held,
        "optimizer": _bytes(state_tensors(run.optimizers, run.masters.named).values()),
        "averages": trained if configuration.ema else 0,
    }
    lines += ["", f"memory on {run.device}"]
    lines += [f"  {name}: {_size(size)}" for name, size in parts.items() if size]
    peak = _peak(run.device)
    rest = peak - sum(parts.values())
    what = "activations and the like" if run.device.type == "cuda" else "activations, libraries and the like"
    lines += [f"  {what}: {_size(max(0, rest))}", f"  peak, measured: {_size(peak)}"]
    images = len(batch) / seconds
    lines += ["", "time", f"  {seconds:.3g} s for a step, {images:.3g} images/s, without reading ahead"]
    lines.append(f"  {timedelta(seconds=round(seconds * configuration.steps))} for {configuration.steps} steps")
    return "\n".join(lines)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _peak(device: torch.device) -> int:
    """The most memory that this process has had: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
