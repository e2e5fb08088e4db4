"""What a run shows of itself: a progress bar, a log of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import make_folder, write_file
from ...optional import require
from ..settings.config import Settings
from .checkpoints import append_log, trim_log

#: Dense products per second of GPUs in bfloat16 or float16, by parts of their names; of the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 5090": 210e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "T4": 65e12, "V100": 125e12,
}  # fmt: skip


class Reporter:
    """Reports on the main process; on the others it does nothing.

    Args:
        folder: of the run.
        start: the number of steps done already. Later lines of the log are removed.
        device: that computes; its peak is needed for the utilization.
    """

    def __init__(self, folder: Path, settings: Settings, start: int, device: torch.device, active: bool = True):
        self.folder, self.settings, self.active = folder, settings, active
        self.log = folder / "log.jsonl"
        self.peak = settings.report.peak_flops or _peak(device)
        self.clock = self.window = self.last = time.monotonic()
        self.samples, self.flops = 0, 0.0
        self.boards: list[Any] = []
        self.bar: Any = None
        if active:
            self.clock -= trim_log(self.log, start)  # seconds go on, too
            if settings.report.tensorboard:
                self.boards.append(_TensorBoard(folder / "tensorboard", start))
            if settings.report.wandb is not None:
                self.boards.append(_Wandb(settings.report.wandb, folder, start, settings))
            if settings.report.progress:
                from tqdm.auto import tqdm  # type: ignore[import-untyped]

                self.bar = tqdm(total=settings.steps, initial=start, unit="step", disable=None, leave=True)

    def step(self, samples: int, flops: float, loss: Tensor) -> None:
        """A step is done: of a global batch of ``samples``, of which this process computed ``flops`` operations."""
        self.samples += samples
        self.flops += flops
        self.last = time.monotonic()
        if self.bar is not None and not self.bar.disable:
            speed = self.samples / max(1e-9, time.monotonic() - self.window)
            self.bar.set_postfix_str(f"loss {float(loss):.4g}, {speed:.3g} images/s", refresh=False)
            self.bar.update(1)

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """A line of the log: values averaged since the last one. Speeds are measured over the same steps."""
        if not self.active:
            return
        elapsed = max(1e-9, self.last - self.window)
        speeds = {"images_per_second": self.samples / elapsed}
        if self.peak and self.flops:
            speeds["utilization"] = self.flops / elapsed / self.peak
        append_log(self.log, step=step, seconds=round(self.last - self.clock, 3), **values, **speeds)
        for board in self.boards:
            board.scalars(step, {**values, **speeds})
            board.images(step, sorted((self.folder / "samples").glob(f"step-{step:08d}-*.png")))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start a new window, after what is not training."""
        self.window = time.monotonic()
        self.samples, self.flops = 0, 0.0

    def close(self) -> None:
        """Write what is buffered."""
        if self.bar is not None:
            self.bar.close()
        for board in self.boards:
            board.close()


def _peak(device: torch.device) -> float:
    """The products per second of a GPU; 0 if they are not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0.0)


class _TensorBoard:
    def __init__(self, folder: Path, start: int):
        tensorboard = require("torch.utils.tensorboard", "the report to tensorboard", "tensorboard")
        self.writer = tensorboard.SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def images(self, step: int, paths: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for number, path in enumerate(paths):
            with Image.open(path) as image:
                self.writer.add_image(f"sample {number}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, project: str, folder: Path, start: int, settings: Settings):
        wandb = require("wandb", "the report to wandb", "wandb")
        self.wandb = wandb
        path = folder / "wandb-id"  # kept, so that a resumed run goes on in the same one
        if start == 0 or not path.is_file():
            make_folder(folder)
            write_file(path, uuid.uuid4().hex)
        self.run = wandb.init(
            project=project,
            id=path.read_text(encoding="utf-8"),
            name="-".join(folder.resolve().parts[-2:]),
            resume="allow",
            dir=str(folder),
            config=settings.model_dump(),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def images(self, step: int, paths: Sequence[Path]) -> None:
        if paths:
            self.run.log({"samples": [self.wandb.Image(str(path)) for path in paths]}, step=step)

    def close(self) -> None:
        self.run.finish()
