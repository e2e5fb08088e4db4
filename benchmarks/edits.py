"""Image to image and inpainting with the bundled model on scenes, as the judge reads the results.

    python benchmarks/edits.py [--count 200] [--steps 20] [--seed 0] [--grid FILE]

- keeps: strength 0.3 with the image's own prompt: the same arrangement, shapes and sizes should be read as before
  (bar: 90 % of each). Guidance is low: it exaggerates, which changes sizes. "autoencoder alone" is without denoising.
- follows: strength 0.9 with the prompt of another scene: everything that it states should be read (bar: 80 %).
- repaints: the mask covers one solid and the prompt describes another one in its place: the right solids should be read
  (bar: 80 %), and no pixel outside of the masks may have changed.

--grid writes an image of some examples: image, mask and result one below the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import measure
from impasto import PixArtSigmaImg2ImgPipeline, PixArtSigmaInpaintPipeline
from impasto.scenes import editing

SIDE = 256  # of the bundled model's images, in pixels
BATCH = 16
SHOWN = 8  # examples of each kind in the grid


def edited(pipe: Any, cases: Sequence[editing.Case], images: Tensor, seed: int, **options: Any) -> Tensor:
    """Results [N, 3, SIDE, SIDE] in [0, 1] of cases with images [N, 3, SIDE, SIDE]."""
    results = []
    for start in tqdm(range(0, len(cases), BATCH), unit="batch", leave=False, disable=None):
        batch = cases[start : start + BATCH]
        masks = [case.mask for case in batch]
        results.append(
            pipe(
                [case.target.text for case in batch],
                images[start : start + BATCH],
                **({} if None in masks else {"mask_image": masks, "overlay": True}),
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
                output_type="pt",
                **options,
            ).images
        )
    return torch.cat(results)


def grid(rows: Sequence[Tensor], scale: int = 3) -> Image.Image:
    """Rows of images [N, 3, SIDE, SIDE] in [0, 1] as one image."""
    whole = torch.cat([torch.cat(list(row[:SHOWN]), dim=2) for row in rows], dim=1)  # [3, H, W]
    pixels = (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((whole.shape[2] * scale, whole.shape[1] * scale), Image.Resampling.LANCZOS)


def share(right: Sequence[bool]) -> dict[str, Any]:
    return {"right": sum(right), "of": len(right), "percent": round(100 * sum(right) / len(right), 1)}


def geometry(before: Tensor, after: Tensor) -> dict[str, Any]:
    return {name: share(same) for name, same in editing.same_geometry(list(before), list(after)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="scenes of each of the three kinds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, metavar="FILE")
    options = parser.parse_args()
    change = PixArtSigmaImg2ImgPipeline.from_pretrained("builtin:scenes")
    change.set_progress_bar_config(disable=True)
    repaint = PixArtSigmaInpaintPipeline.from_pipe(change)
    count, seed, steps = options.count, options.seed, {"num_inference_steps": options.steps}
    rows: list[Tensor] = []
    result: dict[str, dict[str, Any]] = {}

    cases = editing.kept(count, seed)
    sources = torch.stack([case.image(SIDE) for case in cases])
    images = edited(change, cases, sources, seed, strength=0.3, guidance_scale=2.0, **steps)
    decoded = change.decode(change.encode_images(sources * 2 - 1, torch.Generator().manual_seed(seed))) * 0.5 + 0.5
    result["keeps"] = {"strength": 0.3, "guidance_scale": 2.0, **geometry(sources, images)}
    result["keeps"]["autoencoder alone"] = geometry(sources, decoded.clamp(0, 1))
    rows += [sources, images]

    cases = editing.changed(count, seed)
    sources = torch.stack([case.image(SIDE) for case in cases])
    images = edited(change, cases, sources, seed, strength=0.9, **steps)
    scores = editing.judge_cases(cases, list(images))
    result["follows"] = {"strength": 0.9, **share([score.whole for score in scores])}
    rows += [sources, images]

    cases = editing.repainted(count, SIDE, seed)
    sources, masks = (
        torch.stack([case.image(SIDE) for case in cases]),
        torch.stack([case.mask for case in cases])[:, None],
    )
    images = edited(repaint, cases, sources, seed, **steps)
    scores = editing.judge_cases(cases, list(images))
    outside = ((images != sources) & (masks == 0)).sum()
    result["repaints"] = {
        "strength": 1.0,
        **share(editing.shows_solids(scores)),
        "sizes and background too": share([score.whole for score in scores])["percent"],
        "values changed outside of the masks": int(outside),
    }
    rows += [sources, sources * (1 - masks) + 0.5 * masks, images]
    if options.grid is not None:
        grid(rows).save(options.grid)
    what = "edits with the bundled model, read by the judge"
    measure.write("edits", {"what": what, "count": count, "seed": seed, **steps, **result})


if __name__ == "__main__":
    main()
