"""Make the bundled model from nothing: render, autoencoder, latents, tokenizer, text encoder and transformer, export.

    python scripts/build_scenes_model.py --out runs/scenes [--stage render|autoencoder|latents|tokenizer|transformer|export]

Every stage resumes where it was interrupted. Without --stage all of them run in order.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from impasto.models.autoencoder_kl import AutoencoderKL
from impasto.scenes.captions import caption
from impasto.scenes.dataset import scene_batch
from impasto.training.autoencoder import AutoencoderRecipe, train_autoencoder

SEED = 2026
CHUNKS = 400  # of 256 pictures
GEOMETRIES, COLOURINGS, WORDINGS = 32, 8, 4
FRAMES = [(128, 128)] * 4 + [(96, 160), (160, 96), (112, 144), (144, 112)]

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [24, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 128,
    "scaling_factor": 0.13025,
    "mid_block_add_attention": False,
}


def render(out: Path, chunks: int) -> None:
    """Chunks of pictures with several wordings of each caption; one frame size a chunk."""
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for chunk in range(chunks):
        path = folder / f"{chunk:04d}.npz"
        if path.exists():
            continue
        height, width = FRAMES[chunk % len(FRAMES)]
        pictures, scenes, _ = scene_batch(SEED + chunk, GEOMETRIES, COLOURINGS, height, width)
        rng = np.random.default_rng([SEED, chunk])
        captions = [[caption(scene, rng) for _ in range(WORDINGS)] for scene in scenes]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, pictures=pictures.numpy(), captions=json.dumps(captions))
        os.replace(temporary, path)


def pictures_of(out: Path, chunks: list[int]) -> list[Tensor]:
    return [torch.from_numpy(np.load(out / "pictures" / f"{chunk:04d}.npz")["pictures"]) for chunk in chunks]


def crops(pictures: list[Tensor], batch: int, size: int, seed: int) -> Iterator[Tensor]:
    """Random square crops: a convolutional autoencoder learns the same from them, four times as cheaply."""
    rng = np.random.default_rng(seed)
    while True:
        out = torch.empty(batch, 3, size, size)
        for i in range(batch):
            chunk = pictures[rng.integers(len(pictures))]
            picture = chunk[rng.integers(len(chunk))]
            # Of two places the busier one: backgrounds are learnt soonest.
            places = [[rng.integers(side - size + 1) for side in picture.shape[1:]] for _ in range(2)]
            candidates = [picture[:, top : top + size, left : left + size].float() for top, left in places]
            out[i] = max(candidates, key=lambda crop: float(crop.std()))
        yield out / 127.5 - 1


def train_vae(out: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    ready = sorted(int(path.stem) for path in (out / "pictures").glob("[0-9]*.npz") if path.stem.isdigit())
    train, held = [c for c in ready if c != 4][:64], pictures_of(out, [4])[0]
    validation = held[::8].float() / 127.5 - 1  # one colouring of each arrangement
    folder = out / "autoencoder"
    done = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] if (folder / "log.jsonl").exists() else 0
    batches = crops(pictures_of(out, train), 16, 64, seed=SEED + int(done))
    train_autoencoder(model, batches, AutoencoderRecipe(steps=steps), folder, validation)
    model.save_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--stage", choices=["render", "autoencoder"])
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    options = parser.parse_args()
    if options.stage in (None, "render"):
        render(options.out, options.chunks)
    if options.stage in (None, "autoencoder"):
        train_vae(options.out, options.autoencoder_steps)


if __name__ == "__main__":
    main()
