"""Random numbers as functions of (seed, step, index in the batch), so that the state of a run is a step number."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .philox import normal_rows

CPU = torch.device("cpu")
_WORTH_A_THREAD = 250_000  # normal numbers: some milliseconds


class Randomness:
    """The random numbers of one step. Those of a sample depend only on the seed, the step and its index in the batch.

    Each sample has its own counter-based generator (Philox, Salmon et al. 2011), so the numbers do not change when a
    batch is split between processes.

    Args:
        seed: at least 0.
        first: the index of this process's first sample in the global batch.
        batch: the size of the global batch, if it is split.
    """

    def __init__(self, seed: int, step: int, first: int = 0, batch: int | None = None):
        self.seed, self.step, self.first, self.batch = seed, step, first, batch
        self._sample = functools.cache(lambda place: _generator(seed, step, place))
        self._draws: Counter[int] = Counter()  # of each sample, on a GPU
        #: For random numbers of the whole batch; the same in all processes.
        self.shared = _generator(seed, step, None)

    def __getitem__(self, some: slice) -> Randomness:
        """The random numbers of some of the samples, which go on where they are."""
        of_some = copy.copy(self)
        of_some.first = self.first + some.start
        return of_some

    def normal(self, shape: Sequence[int], device: torch.device = CPU) -> Tensor:
        """Standard normal numbers [B, ...], float32. A GPU draws its own, as it would wait for those of the host: they
        differ from those, but not between GPUs.
        """
        return self._on_host(shape).to(device) if device.type == "cpu" else self._on_device(shape, device)

    def _on_device(self, shape: Sequence[int], device: torch.device) -> Tensor:
        places = range(self.first, self.first + shape[0])
        which = torch.tensor([[*places], [self._draws[place] for place in places]], device=device)
        self._draws.update(places)
        return normal_rows(self.seed, self.step, which[0], which[1], math.prod(shape[1:])).view(*shape)

    def _on_host(self, shape: Sequence[int]) -> Tensor:
        """By as many threads as torch has."""
        numbers = np.empty([shape[0], math.prod(shape[1:])], np.float32)

        def fill(generator: np.random.Generator, row: np.ndarray[Any, Any]) -> None:
            generator.standard_normal(out=row, dtype=np.float32)

        threads = min(torch.get_num_threads(), numbers.size // _WORTH_A_THREAD)
        if threads < 2:
            for generator, row in zip(self._all(shape), numbers):
                fill(generator, row)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, self._all(shape), numbers))  # raises what a thread has raised
        return torch.from_numpy(numbers).view(*shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers [B, ...] in [0, 1), float32."""
        return torch.from_numpy(np.stack([each.random(shape[1:], np.float32) for each in self._all(shape)]))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Numbers [B, ...] from 0 to ``high`` - 1, int64."""
        return torch.from_numpy(np.stack([each.integers(high, size=shape[1:]) for each in self._all(shape)]))

    def stratified(self, count: int, shuffled: bool = False) -> Tensor:
        """Numbers [B] in [0, 1], one in each of N equal intervals, where N is the size of the global batch.

        Args:
            shuffled: draw which sample has which interval, too: for batches in order of size.
        """
        whole = self.batch or self.first + count
        intervals = torch.arange(whole)
        if shuffled:
            bits = np.random.Philox(key=self.seed, counter=[0, 0, self.step, 5]).random_raw(whole)
            intervals = torch.from_numpy(np.argsort(bits, kind="stable"))
        # What fills a micro-batch up has a weight of 0, and may have a place after the last one.
        places = (torch.arange(count) + self.first).clamp(max=whole - 1)
        return (intervals[places] + self.uniform([count])) / whole

    def _all(self, shape: Sequence[int]) -> list[np.random.Generator]:
        return [self._sample(self.first + i) for i in range(shape[0])]


def seed_torch(seed: int, step: int, device: torch.device, first: int = 0) -> None:
    """Seed torch's global generators, which dropout uses, for the part of a step's batch that starts at ``first``."""
    number = int(_generator(seed, step, None).integers(2**63)) + first
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def reading_generator(seed: int, step: int, place: int) -> np.random.Generator:
    """The generator of what is chosen when a sample is read: its crop, its caption, ..."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, place, step, 2]))


def _generator(seed: int, step: int, place: int | None) -> np.random.Generator:
    # Philox itself advances the first word of the counter. The last one says what the numbers are for: 0 and 1 here, 2
    # and 5 above, 3 and 4 in data/order.py.
    counter = [0, 0, step, 1] if place is None else [0, place, step, 0]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))
