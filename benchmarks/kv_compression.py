"""A step of XL/2 at 2K and 4K with and without compressed keys and values, and what compression changes at first.

    python benchmarks/kv_compression.py [--pixels 2048 2880] [--layers 2] [--samplings conv ave] [--dtype bfloat16]
        [--rounds 1] [--device cpu]

A step is one forward pass of one image with 20 text tokens, random weights, and few of the 28 layers; half of them are
compressed, as in the originals, by 2 on each side. "28 layers" is the time in proportion. On a CPU, times are those of
the processor (of all cores), so that other work there counts less. The distance is that of a
trained model that is turned into a compressed one and not trained any further: the bundled one, its predictions for
noisy latents of its own images at several timesteps, relative to those of the plain model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch

import impasto
import measure
from gpu import synchronize
from impasto.models.pixart.kv_compression import compress_keys
from step import XL

SAMPLINGS = ("conv", "ave", "uniform", "uniform_every")
PROMPTS = ["a red cube to the left of a blue sphere", "a green cone above a yellow cylinder"]
TIMESTEPS = (100, 500, 900)


class Step:
    """A forward pass of one image."""

    def __init__(self, model: Any, pixels: int, device: str):
        self.model, self.device = model, device
        generator = torch.Generator().manual_seed(0)
        where = {"device": device, "dtype": model.dtype}
        self.latents = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator).to(**where)
        with torch.no_grad():
            self.context = model.encode_context(torch.randn(1, 20, 4096, generator=generator).to(**where))
            self.modulation = model.modulate(torch.tensor([500], device=device))

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        output = self.model.denoise(self.latents, self.context, self.modulation)
        synchronize(self.device)
        return output


def times(pixels: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = {**XL, "num_layers": options.layers, "sample_size": pixels // 8, "interpolation_scale": pixels / 512}
    plain = impasto.PixArtTransformer2DModel(**{**shape, "use_additional_conditions": False}).eval()
    plain.to(device=options.device, dtype=getattr(torch, options.dtype))
    models = {"plain": plain}
    for sampling in options.samplings:
        models[sampling] = compress_keys(copy.deepcopy(plain), sampling)
    steps = {name: Step(model, pixels, options.device) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "tokens": (pixels // 16) ** 2,
        "seconds": {name: [round(x, 3) for x in found] for name, found in seconds.items()},
        "28 layers": {name: round(x * 28 / options.layers, 1) for name, x in medians.items()},
        "times as fast": {name: round(medians["plain"] / x, 2) for name, x in medians.items() if name != "plain"},
    }


@torch.no_grad()
def distances(model: str, device: str) -> dict[str, Any]:
    """How far the predictions of the newly compressed model are from those of the plain one, at each timestep."""
    pipe = impasto.PixArtSigmaPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    latents = pipe(PROMPTS, generator=generators, output_type="latent").images
    text, mask, *_ = pipe.encode_prompt(PROMPTS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9)).to(latents)
    found: dict[str, Any] = {}
    for sampling in SAMPLINGS:
        compressed = compress_keys(copy.deepcopy(pipe.transformer), sampling)
        for timestep in TIMESTEPS:
            t = torch.full((len(PROMPTS),), timestep, device=device)
            noisy = pipe.scheduler.add_noise(latents, noise, t)
            inputs = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "timestep": t}
            ours, plain = (m(noisy, **inputs).sample[:, : latents.shape[1]] for m in (compressed, pipe.transformer))
            found.setdefault(sampling, {})[timestep] = round(measure.relative_error(ours, plain), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[2048, 2880])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samplings", nargs="+", default=["conv", "ave"], choices=SAMPLINGS)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="builtin:scenes")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "what": f"a forward pass of XL/2 with {options.layers} layers, half of them with keys compressed 2 x 2 times",
        "dtype": options.dtype,
        "distance": distances(options.model, options.device),
    }
    for pixels in options.pixels:
        result[f"{pixels} px"] = times(pixels, options)
    measure.write(f"kv-compression-{options.dtype}{'-gpu' * (options.device == 'cuda')}", result)


if __name__ == "__main__":
    main()
