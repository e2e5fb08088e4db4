"""Images of several sizes in one forward, against as many tokens of images of one size, and against one at a time.

    python benchmarks/packed.py [--pixels 32 64 128 256] [--layers 7] [--dtype float32] [--rounds 15]
        [--family pixart glm] [--device cpu]

Each batch holds four images of about so many pixels to a side, with texts of 20, 1, 12 and 5 tokens, which are encoded
beforehand. The mixed one has sides from half to one and a half of it, and as many tokens in all as the uniform one.
Random weights: PixArt-XL/2's width, or a quarter of GLM-Image's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import impasto
import measure
from impasto.models.glm_image.context import GlmImageContext
from impasto.nn.machine import describe_processor
from step import XL

TEXTS = (20, 1, 12, 5)
#: Height and width in tokens, in halves of a square's side.
MIXED, UNIFORM = ((2, 1), (2, 2), (2, 3), (2, 2)), ((2, 2),) * 4


def pixart(layers: int) -> Callable[[Sequence[tuple[int, int]], torch.dtype], tuple[Any, list[Any]]]:
    model = impasto.PixArtTransformer2DModel(**{**XL, "num_layers": layers, "sample_size": 32}).eval()

    def prepare(grids: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Any, list[Any]]:
        model.to(dtype=dtype)
        latents = [torch.randn(4, 2 * rows, 2 * columns, dtype=dtype) for rows, columns in grids]
        text = torch.randn(4, max(TEXTS), XL["caption_channels"], dtype=dtype)
        mask = torch.arange(max(TEXTS))[None] < torch.tensor(TEXTS)[:, None]
        context = model.encode_context(text, mask)
        return model, [latents, context, model.modulate(torch.tensor([999, 700, 400, 100]))]

    return prepare


def glm(layers: int) -> Callable[[Sequence[tuple[int, int]], torch.dtype], tuple[Any, list[Any]]]:
    model = impasto.GlmImageTransformer2DModel(num_layers=layers, num_attention_heads=8, attention_head_dim=128).eval()

    def prepare(grids: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Any, list[Any]]:
        model.to(dtype=dtype)
        latents = [torch.randn(16, 2 * rows, 2 * columns, dtype=dtype) for rows, columns in grids]
        contexts = []
        for (rows, columns), length in zip(grids, TEXTS, strict=True):
            text, ids = torch.randn(1, length, 1472, dtype=dtype), torch.randint(0, 16384, (rows * columns,))
            contexts.append(model.encode_context(text, None, ids, None, 2 * rows, 2 * columns))
        size = torch.tensor(grids) * 16.0
        modulation = model.modulate(torch.tensor([999.0, 700.0, 400.0, 100.0]), size, torch.zeros(4, 2))
        return model, [latents, GlmImageContext.concat(contexts), modulation]

    return prepare


def one_by_one(model: Any, latents: list[Tensor], context: Any, modulation: Any) -> None:
    for i, image in enumerate(latents):
        model(image[None], context.select([i]), timestep=modulation.select([i]))


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    torch.set_default_device(options.device)
    for family in options.family:
        torch.manual_seed(0)
        prepare = {"pixart": pixart, "glm": glm}[family](options.layers)
        found = {}
        for pixels in options.pixels:
            half = max(1, pixels // 32)
            mixed, uniform = ([(half * h, half * w) for h, w in grids] for grids in (MIXED, UNIFORM))
            model, packed = prepare(mixed, dtype)
            _, same = prepare(uniform, dtype)
            contestants: dict[str, Callable[[], Any]] = {
                "packed": lambda model=model, a=packed: model(a[0], a[1], timestep=a[2]),
                "uniform": lambda model=model, a=same: model(torch.stack(a[0]), a[1], timestep=a[2]),
                "one at a time": lambda model=model, a=packed: one_by_one(model, *a),
            }
            for call in contestants.values():
                for _ in range(3):
                    call()
            seconds = measure.in_turns(contestants, options.rounds)
            found[f"{pixels} px"] = {"tokens": sum(h * w for h, w in mixed), **measure.compared(seconds, "packed")}
        what = f"{family}, {options.layers} layers, {options.dtype}: four images of several sizes in one forward"
        name = f"packed-{family}-{options.dtype}" + ("-gpu" if options.device == "cuda" else "")
        measure.write(name, {"what": what, **found})
    print(describe_processor())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--family", nargs="+", default=["pixart", "glm"], choices=["pixart", "glm"])
    main(parser.parse_args())
