"""What the scripts share: numbered chunks of arrays in a folder, made by all cores, and each written whole."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impasto.files import write_file


def path_of(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:04d}.npz"


def known(folder: Path) -> list[int]:
    """The numbers of the chunks that there are."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]???.npz"))


def make_missing(folder: Path, chunks: Iterable[int], make: Callable[[int], None]) -> None:
    """Make those that there are not: one process a core, with one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(chunks) - set(known(folder)))
    if not missing:
        return
    with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.map(make, missing, chunksize=1)


def save(path: Path, **arrays: Any) -> None:
    """Whole, or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_file(path, write)


def random_pictures(pictures: Sequence[Tensor], batch: int, seed: int) -> Iterator[Tensor]:
    """Of chunks of pictures, uint8 [N, 3, H, W] -> float [batch, 3, H, W] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    while True:
        chunk = pictures[rng.integers(len(pictures))]
        yield chunk[torch.from_numpy(rng.integers(len(chunk), size=batch))].float() / 127.5 - 1


def steps_done(folder: Path) -> int:
    """How far the training that logs there has come."""
    log = folder / "log.jsonl"
    return int(json.loads(log.read_text().splitlines()[-1])["step"]) if log.exists() else 0
