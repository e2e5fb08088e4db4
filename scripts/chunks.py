"""Shared by the scripts: numbered chunks of arrays in a folder, made on all cores, each written completely."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from impasto.files import write_file
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.nn.machine import fast_dtype
from impasto.training.data.sample import Batch, Sample
from impasto.training.settings.config import Settings


def path_of(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:04d}.npz"


def known(folder: Path) -> list[int]:
    """The numbers of the chunks that exist."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]???.npz"))


def make_missing(folder: Path, chunks: Iterable[int], make: Callable[[int], None]) -> None:
    """Make the missing chunks: one process per core, with one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(chunks) - set(known(folder)))
    if not missing:
        return
    with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.map(make, missing, chunksize=1)


def save(path: Path, **arrays: Any) -> None:
    """Write the arrays completely or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_file(path, write)


def image_batch(images: Sequence[Tensor], size: int, seed: int, step: int) -> Batch:
    """Some of a chunk of images, uint8 [N, 3, H, W] -> float in [-1, 1]."""
    rng = np.random.default_rng([seed, step])
    chunk = images[rng.integers(len(images))]
    chosen = chunk[torch.from_numpy(rng.integers(len(chunk), size=size))].float() / 127.5 - 1
    return Batch([Sample(image=image) for image in chosen], 0, size, step)


def autoencoder_settings(steps: int) -> Settings:
    return Settings(
        steps=steps,
        optimizer={"rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        schedule={"kind": "cosine", "warmup": 100, "floor": 0.02},
        checkpoints={"every": 100},
        log_every=100,
    )


def fast_autoencoder(folder: Path) -> AutoencoderKL:
    """A stored autoencoder in the fastest dtype of this machine."""
    model = AutoencoderKL.from_pretrained(folder, dtype=fast_dtype(torch.device("cpu")))
    return model.to(memory_format=torch.channels_last)


def encode_images(model: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior's modes, float32, of images, uint8 [N, 3, H, W]."""
    given = (images.float() / 127.5 - 1).to(model.dtype, memory_format=torch.channels_last)
    return model.encode(given).latent_dist.mode().float()


def steps_done(folder: Path) -> int:
    """The steps that the training with a log in this folder has done."""
    log = folder / "log.jsonl"
    return int(json.loads(log.read_text().splitlines()[-1])["step"]) if log.exists() else 0
