"""Give an autoencoder of the small world latents of mean 0 and deviation 1 in each channel, times its scaling factor.

    python scripts/standardize_latents.py runs/scenes/autoencoder/result runs/scenes/vae

The mean and the deviation are those of 512 scenes of 128 px and 128 of 256 px. Images are decoded as before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.scenes.source import ScenesSource
from impasto.training.objectives.autoencoder import standardize

SEED = 2027
SCENES = {128: 512, 256: 128}  # images by their side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.source)
    latents = torch.cat([modes(vae, side, count) for side, count in SCENES.items()], 1)  # [C, all]
    standardize(vae, latents.mean(1), latents.std(1))
    vae.save_pretrained(options.target)
    for path in options.target.iterdir():
        path.chmod(0o644)


@torch.no_grad()
def modes(vae: AutoencoderKL, side: int, count: int) -> Tensor:
    """The latents [C, N] of scenes of side x side pixels."""
    source = ScenesSource(count, SEED, [(side, side)])
    found = []
    for index in range(count):
        image = source.read(index, (side, side), np.random.default_rng(index)).image
        assert image is not None
        found.append(vae.encode(image[None]).latent_dist.mode()[0].flatten(1))
    return torch.cat(found, 1)


if __name__ == "__main__":
    main()
