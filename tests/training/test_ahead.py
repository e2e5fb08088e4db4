"""Batches that are read while a GPU computes: the same, and with the same errors."""

from __future__ import annotations

import threading

import pytest
import torch

from impasto.errors import InputError
from impasto.training.data.sample import Batch, Sample
from impasto.training.distributed.processes import ALONE
from impasto.training.running.ahead import Ahead

CPU = torch.device("cpu")


class Counted:
    """Batches of a single sample, of which that of step 3 is broken."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()

    def batch(self, step: int, rank: int, world: int) -> Batch:
        self.read.append(step)
        self.threads.add(threading.current_thread().name)
        if step == 3:
            raise InputError("step 3 is broken")
        return Batch([Sample(caption=str(step))], 0, 1, step)


@pytest.mark.parametrize("active", [False, True])
def test_batches_and_errors_come_with_their_step(active: bool) -> None:
    data = Counted()
    ahead = Ahead(data, 6, ALONE, CPU, active)
    assert [ahead.batch(step).step for step in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="step 3"):
        ahead.batch(3)
    assert [ahead.batch(step).step for step in (4, 5, 1)] == [4, 5, 1]  # also after an error, and after a jump
    ahead.close()
    # The jump back to step 1 reads that and the next one again; nothing is read after the last step.
    assert data.read[:6] == [0, 1, 2, 3, 4, 5]
    assert set(data.read) == set(range(6))
    assert any(name.startswith("ahead") for name in data.threads) == active


def test_the_next_batch_is_read_while_a_step_is_computed() -> None:
    data = Counted()
    ahead = Ahead(data, 6, ALONE, CPU, active=True)
    ahead.batch(0)
    ahead.close()
    assert data.read == [0, 1]


def test_posteriors_and_labels_move_together() -> None:
    samples = [
        Sample(posterior=(torch.zeros(2, size, 4), torch.ones(2, size, 4)), labels=torch.zeros(3, size, 4), caption="x")
        for size in (4, 4, 6)
    ]
    moved = Batch(samples, 5, 9, 7, 3).on(torch.device("meta"))
    assert (moved.first, moved.count, moved.step, moved.largest) == (5, 9, 7, 3)
    for before, after in zip(samples, moved.samples, strict=True):
        assert after.posterior is not None
        assert before.posterior is not None
        assert after.labels is not None
        assert [each.shape for each in after.posterior] == [each.shape for each in before.posterior]
        assert {each.device.type for each in (*after.posterior, after.labels)} == {"meta"}
        assert after.caption == "x"
    storages = [sample.posterior[0].untyped_storage() for sample in moved.samples if sample.posterior]
    assert [storage.nbytes() for storage in storages] == [2 * 2 * 16 * 4, 2 * 2 * 16 * 4, 2 * 24 * 4]


def test_batches_stay_where_they_are_on_the_host_and_without_posteriors() -> None:
    batch = Batch([Sample(caption="x")], 0, 1, 0)
    assert batch.on(torch.device("meta")) is batch
    batch = Batch([Sample(posterior=(torch.zeros(1), torch.zeros(1)))], 0, 1, 0)
    assert batch.on(CPU) is batch
