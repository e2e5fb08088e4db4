"""Finish the autoencoder of the bundled model, after `impasto train scenes-autoencoder`.

    python scripts/finish_scenes_autoencoder.py runs/scenes/autoencoder/result runs/scenes/vae [--records FOLDER]

Its latents, times the scaling factor, get mean 0 and deviation 1 in each channel, measured on 512 scenes of 128 px and
128 of 256 px; images are decoded as before. It is stored in float16 and measured as stored on 200 unseen scenes of
256 px: the PSNR, and the power of the top octave, between a quarter and half a cycle per pixel, relative to that of the
scenes. The records are `autoencoder.json` and `autoencoder.png`, some of these scenes above their reconstructions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.scenes.sharpness import top_octave
from impasto.scenes.source import ScenesSource
from impasto.training.objectives.autoencoder import psnr, standardize

SEED, UNSEEN_SEED = 2027, 9027
STANDARD_SCENES = {128: 512, 256: 128}  # images by their side
UNSEEN_SCENES, SHOWN = 200, 8


def scenes(seed: int, side: int, count: int) -> list[Tensor]:
    """Images [1, 3, side, side]."""
    source = ScenesSource(count, seed, [(side, side)])
    samples = [source.read(index, (side, side), np.random.default_rng(index)) for index in range(count)]
    return [sample.image[None] for sample in samples if sample.image is not None]


@torch.no_grad()
def finish(source: Path, target: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(source)
    found = [
        vae.encode(image).latent_dist.mode()[0].flatten(1)
        for side, count in STANDARD_SCENES.items()
        for image in scenes(SEED, side, count)
    ]
    latents = torch.cat(found, 1)  # [C, all]
    standardize(vae, latents.mean(1), latents.std(1))
    vae.half().save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)
    return AutoencoderKL.from_pretrained(target)


@torch.no_grad()
def measure(vae: AutoencoderKL, records: Path) -> None:
    images = scenes(UNSEEN_SEED, 256, UNSEEN_SCENES)
    decoded = [vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1) for image in images]
    each = sorted(psnr(image, other) for image, other in zip(images, decoded, strict=True))
    powers = np.array([[top_octave(x[0]) for x in pair] for pair in zip(decoded, images, strict=True)])  # [N, 2]
    report = {
        "scenes": len(images),
        "psnr": round(float(np.mean(each)), 2),
        "psnr of the worst tenth": round(float(np.mean(each[: len(each) // 10])), 2),
        "power of the top octave": round(float(np.divide(*powers.mean(0))), 3),
        "median of that power by image": round(float(np.median(powers[:, 0] / powers[:, 1])), 3),
        "parameters": vae.num_parameters(),
    }
    records.mkdir(parents=True, exist_ok=True)
    (records / "autoencoder.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sheet = Image.new("RGB", (256 * SHOWN, 512))
    for column in range(SHOWN):
        for row, shown in enumerate((images[column], decoded[column])):
            pixels = ((shown[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (256 * column, 256 * row))
    sheet.save(records / "autoencoder.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--records", type=Path, default=Path("docs/scenes/training"))
    options = parser.parse_args()
    measure(finish(options.source, options.target), options.records)


if __name__ == "__main__":
    main()
