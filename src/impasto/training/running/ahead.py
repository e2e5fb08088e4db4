"""Batches that are ready when a GPU asks for them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..data.sample import Batch
from ..distributed.processes import Processes
from ..objectives.base import AnyBatch, Data


class Ahead:
    """The batches of a run's steps, which are the same as those of ``data``.

    Args:
        steps: of the run; none is read beyond them.
        device: where batches are used.
        active: whether a thread takes the next batch and moves it to the device meanwhile: worth it if that is a GPU,
            which would wait for the host.
    """

    def __init__(self, data: Data, steps: int, processes: Processes, device: torch.device, active: bool):
        self.data, self.steps, self.processes, self.device = data, steps, processes, device
        self._thread = ThreadPoolExecutor(1, "ahead") if active else None
        self._next: tuple[int, Future[AnyBatch]] | None = None

    def batch(self, step: int) -> AnyBatch:
        """This process's share of the batch of a step. What reading it has raised is raised here."""
        (number, future), self._next = self._next or (None, None), None
        batch = self._read(step) if future is None or number != step else future.result()
        if self._thread is not None and step + 1 < self.steps:
            self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batch

    def _read(self, step: int) -> AnyBatch:
        batch = self.data.batch(step, self.processes.rank, self.processes.count)
        return batch.on(self.device) if isinstance(batch, Batch) else batch

    def close(self) -> None:
        """Wait for what is being read, and forget it."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
