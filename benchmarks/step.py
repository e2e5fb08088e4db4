"""A guided PixArt-XL/2 step: ours against diffusers', in turns in one process, with random weights.

    python benchmarks/step.py [--pixels 512] [--dtype bfloat16] [--steps 5] [--real-tokens 20]

A step is what the pipelines do: batch 2 (negative and positive), 300 text tokens of which the real ones are few. The
outputs are compared before anything is timed. Each library's peak memory is measured in a process of its own.
Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch

import impasto
from impasto import PixArtTransformer2DModel

XL = {"caption_channels": 4096, "use_additional_conditions": False}


def build(library: str, pixels: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    cls = PixArtTransformer2DModel if library == "impasto" else diffusers.PixArtTransformer2DModel
    model = cls(sample_size=pixels // 8, **XL).eval()
    torch.set_default_dtype(torch.float32)
    return model


class Step:
    """One guided step of a library, with what its pipeline keeps between steps."""

    def __init__(self, library: str, model: torch.nn.Module, pixels: int, dtype: torch.dtype, real_tokens: int):
        generator = torch.Generator().manual_seed(1)
        self.model, self.library = model, library
        self.latents = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator).to(dtype)
        self.text = torch.randn(2, 300, 4096, generator=generator).to(dtype)
        self.mask = torch.zeros(2, 300, dtype=torch.long)
        self.mask[0, :1] = 1  # the empty prompt is one token
        self.mask[1, :real_tokens] = 1
        self.timestep = torch.tensor([500, 500])
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


def peak_memory(library: str, options: argparse.Namespace) -> float:
    """Peak resident gigabytes of a fresh process that builds the model and takes two steps."""
    command = [sys.executable, __file__, "--memory-of", library, "--pixels", str(options.pixels)]
    command += ["--dtype", options.dtype, "--real-tokens", str(options.real_tokens)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--real-tokens", type=int, default=20)
    parser.add_argument("--memory-of", choices=["impasto", "diffusers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    def step_of(library: str) -> Step:
        model = build(library, options.pixels, dtype)
        return Step(library, model, options.pixels, dtype, options.real_tokens)

    if options.memory_of:
        step = step_of(options.memory_of)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return

    ours, theirs = step_of("impasto"), step_of("diffusers")
    ours.model.load_state_dict(theirs.model.state_dict())
    ours = Step("impasto", ours.model, options.pixels, dtype, options.real_tokens)
    expected, found = theirs().float(), ours().float()
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference < (0.1 if dtype is torch.bfloat16 else 1e-4), difference

    seconds: dict[str, list[float]] = {"impasto": [], "diffusers": []}
    for _ in range(options.steps):
        for name, step in (("impasto", ours), ("diffusers", theirs)):
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    del ours, theirs
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"guided XL/2 step, {options.pixels} px, {options.dtype}, {options.real_tokens} real text tokens",
        "difference": difference,
        "seconds": {name: [round(x, 3) for x in values] for name, values in seconds.items()},
        "median": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio": round(statistics.median(seconds["diffusers"]) / statistics.median(seconds["impasto"]), 3),
        "ratios": [round(b / a, 3) for a, b in zip(seconds["impasto"], seconds["diffusers"], strict=True)],
        "peak_gigabytes": {name: round(peak_memory(name, options), 2) for name in ("impasto", "diffusers")},
        "hardware": f"{os.cpu_count()} cores, {cpu_name()}",
        "threads": torch.get_num_threads(),
        "versions": {"impasto": impasto.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }
    name = f"{result['date']}-step-{options.pixels}-{options.dtype}.json"
    target = Path(__file__).parent / "results" / name
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"written to {target}")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
