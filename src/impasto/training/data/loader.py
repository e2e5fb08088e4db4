"""Batches of a step, read ahead by worker processes: the same for any number of them."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...checks import shown, whole_number
from ...errors import ConfigurationError, ImpastoError, InputError, ResourceError
from ..running.randomness import reading_generator
from .faults import Faults
from .order import GlobalBatch, Order, Place
from .sample import Batch, Sample, Source, name_of

#: Batches that each worker has ready or in progress.
_AHEAD = 2


class Data:
    """The data of a run.

    Args:
        order: which samples form the batch of a step.
        sources: the same as those of the order.
        workers: processes that read ahead; 0 reads in this process when a batch is asked for.
        max_broken: how many samples may turn out to be broken: below 1 a share of all, else a number.
        unusable: how many samples the sources have left out from the beginning, by reason.

    Attributes:
        left_out: how many samples are in no batch, by reason.
        faults: the samples that turned out to be broken, by name.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[Source],
        workers: int = 0,
        max_broken: float = 0.01,
        unusable: Mapping[str, int] | None = None,
    ):
        self.order, self.sources = order, sources
        self.left_out = Counter(unusable or {}) + order.dropped
        self.workers = whole_number("workers", workers, 0, 256, error=ConfigurationError)
        self.faults = Faults("the data", max_broken, sum(len(source) for source in sources))
        self._reader: tuple[tuple[int, int, int], Iterator[_Read]] | None = None  # for (step, rank, world)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples of one rank in a step. Steps that follow each other are read ahead.

        A rank that has none gets the first one of the batch with a weight of 0.

        Raises:
            InputError: too many samples are broken, or all of a batch are.
            ResourceError: a worker process has died.
        """
        reads = _Reads(self.order, self.sources, rank, world)
        read = self._read_ahead(reads, step) if self.workers else reads[step]
        if read.error is not None:
            self.close()
            raise read.error
        for name, problem in read.faults:
            self.faults.add(name, problem)
        return Batch(_unpack(read.packed), read.first, read.size, step, read.largest)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both from 0 on."""
        return self.order.epoch(step)

    def close(self) -> None:
        """End the worker processes; a later batch starts new ones."""
        self._reader = None  # the iterator ends them when it is deleted

    def _read_ahead(self, reads: _Reads, step: int) -> _Read:
        rank, world = reads.rank, reads.world
        if self._reader is None or self._reader[0] != (step, rank, world):
            self.close()
            loader = DataLoader(
                reads,
                sampler=_From(step),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=_AHEAD,
                collate_fn=_unchanged,
                worker_init_fn=_leave_group,
            )
            self._reader = (step, rank, world), iter(loader)
        iterator = self._reader[1]
        try:
            read = next(iterator)
        except (
            RuntimeError
        ) as error:  # whose traceback refers to the iterator, so it has to be gone before that can end
            problem = str(error).split("\n")[0]
        else:
            self._reader = (step + 1, rank, world), iterator
            return read
        del iterator
        self.close()
        raise ResourceError(
            f"a process that reads data has died: {shown(problem, 200)}; the usual cause is a lack of memory. "
            f"Use fewer workers, or 0 to read in this process"
        )


class _Read(NamedTuple):
    """A rank's part of a batch, as it comes from a worker."""

    packed: _Packed
    first: int
    size: int  # of the global batch
    largest: int
    faults: list[tuple[str, str]]
    error: Exception | None = None


class _Reads(torch.utils.data.Dataset[_Read]):
    """Steps -> what one rank reads in them."""

    def __init__(self, order: Order, sources: Sequence[Source], rank: int, world: int):
        self.order, self.sources, self.rank, self.world = order, sources, rank, world

    def __getitem__(self, step: int) -> _Read:
        batch = self.order.batch(step)
        start, end = batch.slice(self.rank, self.world)
        faults: dict[str, str] = {}
        samples: list[Sample] = []
        failure: Exception | None = None
        try:
            samples = [self._read(batch, number, faults) for number in range(start, end)]
            if not samples:  # all ranks take part in every step
                samples = [dataclasses.replace(self._read(batch, 0, faults), weight=0.0)]
        except Exception as error:
            failure = _portable(error)
        largest = batch.largest(self.world)
        return _Read(_pack(samples), start, len(batch.places), largest, list(faults.items()), failure)

    def _read(self, batch: GlobalBatch, number: int, faults: dict[str, str]) -> Sample:
        """A sample of the global batch, or if it is broken, another one that is not, with a weight of 0."""
        following = [*range(number, len(batch.places)), *range(number)]
        # One of the same size, if there is one: the batch has several sizes only if it is packed.
        for other in sorted(following, key=lambda i: batch.places[i].target != batch.places[number].target):
            place = batch.places[other]
            source = self.sources[place.source]
            try:
                rng = reading_generator(self.order.seed, batch.step, other)
                sample: Sample = source.read(place.index, place.target, rng)
            except InputError as error:
                faults[self._name(place)] = str(error)
            except Exception as error:
                error.add_note(f"while reading {self._name(place)} for step {batch.step}")
                raise
            else:
                return sample if other == number else dataclasses.replace(sample, weight=0.0)
        raise InputError(
            f"no sample of step {batch.step} can be read: {'; '.join(list(faults.values())[:3])}. Repair the data"
        )

    def _name(self, place: Place) -> str:
        name = name_of(self.sources[place.source], place.index) or f"sample {place.index}"
        return name if len(self.sources) == 1 else f"{name} of source {place.source + 1}"


class _From(torch.utils.data.Sampler[int]):
    """All steps from a first one on."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        step = self.first
        while True:
            yield step
            step += 1


def _portable(error: Exception) -> Exception:
    """An error that can be sent to another process, with its traceback as a note unless it is one of ours."""
    if not isinstance(error, ImpastoError):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {shown(str(error), 400)}")
    return error


def _unchanged(read: Any) -> Any:
    return read


def _leave_group(worker: int) -> None:
    """Leave the process group: its signals (Ctrl-C, the end of a job) are for the process that trains, which saves."""
    if hasattr(os, "setsid"):
        os.setsid()


# --- the tensors of a batch as a few large ones, as each costs an open file between processes ---


@dataclass
class _Packed:
    """Samples whose tensors are parts of ``buffers``: those of a field are next to each other."""

    samples: list[Any]
    buffers: dict[_Field, Tensor]


_Field = tuple[str, torch.dtype]


@dataclass
class _Part:
    """A tensor's place in the buffer of its field."""

    field: _Field
    start: int
    shape: tuple[int, ...]


def _pack(samples: Sequence[Sample]) -> _Packed:
    parts: dict[_Field, list[Tensor]] = {}
    lengths: dict[_Field, int] = {}

    def put(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            field = name, value.dtype
            start = lengths.get(field, 0)
            parts.setdefault(field, []).append(value.reshape(-1))
            lengths[field] = start + value.numel()
            return _Part(field, start, tuple(value.shape))
        return _mapped(value, put, name)

    packed = [put(vars(sample), "") for sample in samples]
    return _Packed(packed, {field: torch.cat(several) for field, several in parts.items()})


def _unpack(packed: _Packed) -> list[Sample]:
    def take(value: Any, name: str) -> Any:
        if isinstance(value, _Part):
            length = math.prod(value.shape)
            return packed.buffers[value.field][value.start : value.start + length].view(value.shape)
        return _mapped(value, take, name)

    return [Sample(**take(fields, "")) for fields in packed.samples]


def _mapped(value: Any, function: Any, name: str) -> Any:
    """A dict or tuple with the function applied to its values and their names; anything else unchanged."""
    if isinstance(value, dict):
        return {key: function(each, f"{name}.{key}") for key, each in value.items()}
    return tuple(function(each, f"{name}.{i}") for i, each in enumerate(value)) if isinstance(value, tuple) else value
