"""A guided PixArt-XL/2 step: ours against diffusers', in turns in one process, with random weights.

    python benchmarks/step.py [--pixels 512] [--dtype bfloat16] [--layers 28] [--rounds 5] [--exact] [--best] ...

A step is that of the pipelines: each image twice (negative and positive), and 300 text tokens, few of them real. With
--best, diffusers is also timed with fused projections and compiled. The outputs are compared before anything is timed;
--exact also measures the distance of each from float64 (on the blocks' own weights; slow). The peak memory of each
library is measured in a process of its own. All layers have the same shape, so a few of them show the ratio.
"""

from __future__ import annotations

import argparse

import diffusers
import torch

import measure
from impasto import PixArtTransformer2DModel

XL = {"caption_channels": 4096, "use_additional_conditions": False, "num_layers": 28}


def build(library: str, pixels: int, dtype: torch.dtype) -> torch.nn.Module:
    """An XL/2 with the random weights of its constructor."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    cls = PixArtTransformer2DModel if library == "impasto" else diffusers.PixArtTransformer2DModel
    model = cls(sample_size=pixels // 8, **XL).eval()
    torch.set_default_dtype(torch.float32)
    return model


class Step:
    """One guided step of a library, including what its pipeline keeps between steps."""

    def __init__(self, library: str, model: torch.nn.Module, options: argparse.Namespace, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)
        side, batch = options.pixels // 8, options.batch
        self.model, self.library = model, library
        self.latents = torch.randn(batch, 4, side, side, generator=generator).to(dtype)
        self.text = torch.randn(2 * batch, 300, 4096, generator=generator).to(dtype)
        self.mask = torch.zeros(2 * batch, 300, dtype=torch.long)
        self.mask[:batch, :1] = 1  # the empty prompt is one token
        self.mask[batch:, : options.real_tokens] = 1
        self.timestep = torch.full((2 * batch,), 500)
        if library == "impasto":
            with torch.no_grad():
                self.context = model.encode_context(self.text, self.mask)
                self.modulation = model.modulate(self.timestep[:1])

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        latents = torch.cat([self.latents] * 2)
        if self.library == "impasto":
            output = self.model(latents, self.context, self.modulation, return_dict=False)[0]
        else:
            output = self.model(
                latents,
                self.text,
                self.timestep,
                {"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=self.mask,
                return_dict=False,
            )[0]
        negative, positive = output.chunk(2)
        return negative + 4.5 * (positive - negative)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=1, help="images, two rows each")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real-tokens", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="measure the distance of both from float64")
    parser.add_argument("--best", action="store_true", help="diffusers with its options, too")
    parser.add_argument("--memory-of", choices=["impasto", "diffusers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    XL["num_layers"] = options.layers

    if options.memory_of:
        model = build(options.memory_of, options.pixels, dtype)
        step = Step(options.memory_of, model, options, dtype)
        step()
        step()
        print(measure.own_peak())
        return

    theirs = build("diffusers", options.pixels, dtype)
    ours = build("impasto", options.pixels, dtype)
    ours.load_state_dict(theirs.state_dict())
    steps = {"impasto": Step("impasto", ours, options, dtype), "diffusers": Step("diffusers", theirs, options, dtype)}
    if options.best:
        fused = build("diffusers", options.pixels, dtype)
        fused.load_state_dict(theirs.state_dict())
        fused.fuse_qkv_projections()
        steps["diffusers fused"] = Step("diffusers", fused, options, dtype)
        steps["diffusers compiled"] = Step("diffusers", torch.compile(theirs), options, dtype)
    outputs = {name: step() for name, step in steps.items()}
    difference = measure.relative_error(outputs["impasto"], outputs["diffusers"])
    assert difference < (0.1 if dtype is torch.bfloat16 else 1e-4), difference
    result = {
        "what": f"guided XL/2 step, {options.pixels} px, {options.dtype}, {options.layers} of 28 layers, "
        f"batch {options.batch}, {options.real_tokens} of 300 text tokens real",
        "difference": difference,
        **measure.compared(measure.in_turns(steps, options.rounds)),
    }
    if options.exact:
        reference = Step("diffusers", theirs.double(), options, torch.float64)
        reference.latents, reference.text = steps["diffusers"].latents.double(), steps["diffusers"].text.double()
        exact = reference()
        result["distance_from_float64"] = {name: measure.relative_error(out, exact) for name, out in outputs.items()}
        del reference, exact
    del steps, ours, theirs, outputs
    common = ["--pixels", str(options.pixels), "--dtype", options.dtype, "--batch", str(options.batch)]
    common += ["--layers", str(options.layers)]
    names = ("impasto", "diffusers")
    result["peak_gigabytes"] = {name: measure.peak_gigabytes(__file__, "--memory-of", name, *common) for name in names}
    kind = (f"-layers{options.layers}" if options.layers < 28 else "") + ("-best" if options.best else "")
    measure.write(f"step-{options.pixels}-{options.dtype}-batch{options.batch}{kind}", result)


if __name__ == "__main__":
    main()
