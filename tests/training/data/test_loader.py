"""Loading: the same batches for any number of workers, and what happens to broken samples."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from impasto.errors import InputError, ResourceError
from impasto.training.data.buckets import Buckets
from impasto.training.data.folders import FolderSource
from impasto.training.data.images import Reading
from impasto.training.data.loader import Data
from impasto.training.data.order import Order
from impasto.training.data.sample import Batch, Sample, Source, stacked
from impasto.training.data.views import Views

from .folder_of_images import smooth_image, write_folder

BUCKETS = Buckets(((16, 16), (8, 32)))


def data(sources: list[Source], workers: int = 0, batch_size: int = 4, **options: float) -> Data:
    return Data(Order(sources, BUCKETS, batch_size, seed=1), sources, workers, **options)


def folder(path: Path) -> FolderSource:
    sizes = [(20, 20), (12, 48), (33, 30), (16, 16), (8, 32), (40, 40), (17, 70)]
    return FolderSource(write_folder(path, sizes), Reading(views=Views("random", flip=True)))


def same(a: Batch, b: Batch) -> bool:
    fields = ("caption", "size", "crop", "weight")
    return (a.first, a.count, a.step, a.largest, len(a)) == (b.first, b.count, b.step, b.largest, len(b)) and all(
        torch.equal(x.image, y.image) and all(getattr(x, name) == getattr(y, name) for name in fields)  # type: ignore[arg-type]
        for x, y in zip(a.samples, b.samples)
    )


def test_batches_are_bit_equal_for_any_number_of_workers(tmp_path: Path) -> None:
    source = folder(tmp_path)
    plain = [data([source]).batch(step) for step in range(6)]
    several = data([source], workers=2)
    for step in (0, 1, 2, 3, 4, 5, 1, 2, 5):  # with jumps
        assert same(several.batch(step), plain[step])
    assert len(children()) == 2
    eventually(lambda: not any(os.getpgid(pid) == os.getpgid(0) for pid in children()))  # so Ctrl-C does not reach them
    several.close()
    no_children()


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def no_children() -> None:
    eventually(lambda: not children())


def test_ranks_have_slices_of_the_global_batch(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for step in range(4):
        whole = data([source]).batch(step)
        parts = [data([source]).batch(step, rank, 3) for rank in range(3)]
        joined = [sample for part in parts for sample in part.samples]
        assert same(Batch(joined, 0, whole.count, step, whole.largest), whole)
        assert [part.first for part in parts] == [0, len(parts[0]), len(parts[0]) + len(parts[1])]
        assert {part.largest for part in parts} == {max(map(len, parts))}


def test_a_rank_without_samples_takes_part_with_one_that_does_not_count(tmp_path: Path) -> None:
    source = folder(tmp_path)
    parts = [data([source], batch_size=2).batch(0, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert sorted(sample.weight for part in parts for sample in part.samples) == [0, 1, 1]


def test_an_epoch_is_read_with_other_crops_than_the_last(tmp_path: Path) -> None:
    source = folder(tmp_path)
    loaded = data([source])
    steps = loaded.order.steps_in(0)
    crops = [[s.crop for k in range(steps) for s in loaded.batch(e * steps + k).samples] for e in (0, 1)]
    assert sorted(crops[0]) != sorted(crops[1])
    assert [loaded.epoch(steps - 1), loaded.epoch(steps)] == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_leaves_its_place_empty(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, [(16, 16)] * 6)
    content = io.BytesIO()
    smooth_image(16, 16).save(content, "PNG")
    (tmp_path / "2.png").write_bytes(content.getvalue()[:-40])  # its header is fine
    source = FolderSource(tmp_path)
    loaded = data([source], workers, batch_size=6, max_broken=1)
    with caplog.at_level(logging.WARNING):
        batches = [loaded.batch(step) for step in (0, 1)]
    loaded.close()
    for batch in batches:
        assert len(batch) == batch.count == 6
        (number,) = (i for i, sample in enumerate(batch.samples) if sample.weight == 0)
        others = {sample.caption for i, sample in enumerate(batch.samples) if i != number}
        assert len(others) == 5
        assert "a red cube 2" not in others
        assert "a large red cube 2" not in others
    assert [record.message.split(" ")[0] for record in caplog.records] == ["2.png"]  # once
    assert loaded.faults.reasons.keys() == {"2.png"}
    with pytest.raises(InputError, match=r"1 of 6 samples of the data cannot be used.*2.png.*max_broken"):
        data([source], batch_size=6, max_broken=0).batch(0)


def test_broken_images_of_one_name_in_two_sources_are_two(tmp_path: Path) -> None:
    sources: list[Source] = []
    for name in ("a", "b"):
        sources.append(FolderSource(write_folder(tmp_path / name, [(16, 16)] * 3)))
        (tmp_path / name / "2.png").write_bytes(b"gone")
    loaded = data(sources, batch_size=6, max_broken=2)
    loaded.batch(0)
    assert loaded.faults.reasons.keys() == {"2.png of source 1", "2.png of source 2"}


def test_what_stands_in_for_a_broken_sample_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    write_folder(tmp_path, [(16, 16)] * 6)
    source = FolderSource(tmp_path)
    (tmp_path / "2.png").write_bytes(b"gone")
    whole = data([source], batch_size=6, max_broken=1).batch(0)
    parts = [data([source], batch_size=6, max_broken=1).batch(0, rank, 6) for rank in range(6)]
    assert same(Batch([part.samples[0] for part in parts], 0, 6, 0, 6), whole)


def test_in_a_packed_batch_an_image_of_another_size_stands_in_for_a_broken_one(tmp_path: Path) -> None:
    write_folder(tmp_path, [(16, 16)] * 3 + [(32, 16)])
    source = FolderSource(tmp_path)
    (tmp_path / "3.png").write_bytes(b"gone")
    order = Order([source], Buckets(((16, 16), (32, 16))), 1, pack_pixels=10_000)
    batch = Data(order, [source], 0, 1).batch(0)
    assert sorted(sample.weight for sample in batch.samples) == [0, 1, 1, 1]
    assert {sample.image.shape for sample in batch.samples if sample.image is not None} == {(3, 16, 16)}


class Faulty:
    """A source that fails with an error that is no fault of the data."""

    def __len__(self) -> int:
        return 4

    def size(self, index: int) -> tuple[int, int]:
        return 16, 16

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        raise ZeroDivisionError("a bug")


class Dying(Faulty):
    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        os._exit(3)


def test_errors_of_workers_arrive(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as stop:
        data([Faulty()]).batch(0)
    assert "while reading sample" in stop.value.__notes__[0]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        data([Faulty()], workers=1).batch(0)
    no_children()
    with pytest.raises(ResourceError, match="a process that reads data has died"):
        data([Dying()], workers=2).batch(0)
    no_children()
    write_folder(tmp_path, [(16, 16)] * 2)
    source = FolderSource(tmp_path)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="no sample of step 0 can be read"):
        data([source], workers=1, max_broken=2).batch(0)


def test_a_batch_as_it_is_read_is_stacked_without_copying(tmp_path: Path) -> None:
    class Posteriors:
        def __len__(self) -> int:
            return 8

        def size(self, index: int) -> tuple[int, int]:
            return 16, 16

        def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
            posterior = torch.full([2, 2, 2], index).half(), torch.full([2, 2, 2], -index).half()
            return Sample(posterior=posterior, labels=torch.full([3], index, dtype=torch.uint8))

    samples = data([Posteriors()]).batch(0).samples
    means, deviations = (stacked([*tensors]) for tensors in zip(*(s.posterior for s in samples if s.posterior)))
    labels = stacked([s.labels for s in samples if s.labels is not None])
    assert torch.equal(means, -deviations)
    assert means.shape == (4, 2, 2, 2)
    assert means.dtype == torch.float16
    assert torch.equal(labels[:, 0], means[:, 0, 0, 0].byte())
    assert len(set(labels[:, 0].tolist())) == 4
    first = samples[0].posterior
    assert first is not None
    assert means.data_ptr() == first[0].data_ptr()


def test_other_tensors_are_stacked_by_copying() -> None:
    row = torch.arange(12.0).view(4, 3)
    for tensors in ([row[0], row[2]], [row[1], row[0]], [row[0], torch.ones(3)], [row[:, 0], row[:, 1]], [row[0]] * 2):
        found = stacked(tensors)
        assert torch.equal(found, torch.stack(tensors))
        assert found.data_ptr() != row.data_ptr()
    assert torch.equal(stacked([row[1], row[2]]), row[1:3])
