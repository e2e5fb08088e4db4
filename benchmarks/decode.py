"""Decoding with SDXL's autoencoder and random weights: ours, ours in exact tiles, diffusers', diffusers' blended tiles.

    python benchmarks/decode.py [--pixels 512] [--dtype bfloat16] [--rounds 3]

Also measured are the distance of each from our untiled image, and the peak memory of each in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import diffusers
import torch

import image
import impasto
import measure

NAMES = ("impasto", "impasto tiled", "diffusers", "diffusers tiled")


def decoder(name: str, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    library, _, tiled = name.partition(" ")
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = diffusers.AutoencoderKL(**image.SDXL_VAE).eval()
    torch.set_default_dtype(torch.float32)
    if library == "impasto":
        with torch.device("meta"):
            ours = impasto.AutoencoderKL(**image.SDXL_VAE).eval()
        ours.load_state_dict(model.state_dict(), assign=True)
        model = ours
    if tiled:
        model.enable_tiling()
    latents = torch.randn(1, 4, options.pixels // 8, options.pixels // 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return model.decode(latents.to(dtype), return_dict=False)[0]

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=list(NAMES), help="for sizes at which not all of them fit"
    )
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        decoder(options.memory_of, options)()
        print(measure.own_peak())
        return
    calls = {name: decoder(name, options) for name in options.only}
    outputs = {name: call() for name, call in calls.items()}
    base = options.only[0]
    result = {
        "what": f"decode, SDXL's autoencoder, {options.pixels} px, {options.dtype}",
        "difference": {name: measure.relative_error(out, outputs[base]) for name, out in outputs.items()},
    }
    del outputs
    result |= measure.compared(measure.in_turns(calls, options.rounds), base)
    del calls
    common = ["--pixels", str(options.pixels), "--dtype", options.dtype]
    result["peak_gigabytes"] = {
        name: measure.peak_gigabytes(__file__, "--memory-of", name, *common) for name in options.only
    }
    measure.write(f"decode-{options.pixels}-{options.dtype}", result)


if __name__ == "__main__":
    main()
