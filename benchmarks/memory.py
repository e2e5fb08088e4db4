"""The peak memory of generating an image within a budget, with full-size random weights in the published layout.

    python benchmarks/memory.py [--folder FOLDER] [--budgets 8GB 7GB] [--steps 2] [--dtype float32] [--device cpu]

Creates a folder like that of PixArt-Σ at 1024 px (T5-XXL, XL/2, SDXL's autoencoder; 22 GB in float32, a minute or two)
once, and has the command line generate an image from it within each budget. On the CPU the peak is that of memory that
no file backs (RssAnon, every 5 ms); on a GPU that of its allocator.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

import image
import impasto
import measure
from impasto.models.base import parse_size

TRANSFORMER = {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False}
GPU_CALL = """
import sys, torch, impasto
pipe = impasto.PixArtSigmaPipeline.from_pretrained(sys.argv[1], memory_budget=sys.argv[2])
torch.cuda.reset_peak_memory_stats()
pipe(sys.argv[3], num_inference_steps=int(sys.argv[4]))
print(*pipe.plan.lines(), sep='\\n', file=sys.stderr)
print(torch.cuda.max_memory_allocated())
"""


def save_random(model: nn.Module, folder: Path, stem: str, dtype: torch.dtype) -> None:
    """Write a component's weights, a file for each block. Weights of the same shape are equal, which is fast."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[str]] = {}
    state = model.state_dict()
    for name in state:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    made: dict[torch.Size, torch.Tensor] = {}
    weight_map = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = state[name].shape
            if shape not in made:
                made[shape] = torch.ones(shape) if len(shape) < 2 else torch.randn(shape) * shape[1:].numel() ** -0.5
            tensors[name] = made[shape].to(dtype, copy=True)
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_folder(folder: Path, dtype: torch.dtype) -> None:
    scheduler = impasto.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**image.T5_XXL))
        transformer = impasto.PixArtTransformer2DModel(**TRANSFORMER)
        vae = impasto.AutoencoderKL(**image.SDXL_VAE)
    pipe = impasto.PixArtSigmaPipeline(None, None, None, None, scheduler)
    pipe.save_pretrained(folder)
    image.tokenizer().save_pretrained(folder / "tokenizer")
    save_random(encoder, folder / "text_encoder", "model", dtype)
    encoder.config.save_pretrained(folder / "text_encoder")
    for name, model in (("transformer", transformer), ("vae", vae)):
        save_random(model, folder / name, "diffusion_pytorch_model", dtype)
        config = {"_class_name": type(model).__name__, **dict(model.config)}
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 after it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = status.partition("RssAnon:")[2].split()
    return int(found[0]) * 1024 if found else 0


def generate_on_cpu(folder: Path, budget: str, steps: int) -> dict[str, object]:
    target = folder.parent / f"{budget}.png"
    command = [sys.executable, "-m", "impasto", "generate", image.PROMPT, "--model", str(folder)]
    command += ["--memory-budget", budget, "--steps", str(steps), "--device", "cpu", "--seed", "0"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(target)], stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    assert process.stderr is not None
    said = process.stderr.read()
    target.unlink(missing_ok=True)
    assert process.returncode == 0, said
    plan = [line for line in said.splitlines() if any(word in line for word in (" peak", "resident", "turn", "block"))]
    return {"peak_gigabytes": round(peak / 1e9, 2), "seconds": round(time.perf_counter() - start, 1), "plan": plan}


def generate_on_gpu(folder: Path, budget: str, steps: int) -> dict[str, object]:
    arguments = [sys.executable, "-c", GPU_CALL, str(folder), budget, image.PROMPT, str(steps)]
    start = time.perf_counter()
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1])
    seconds = round(time.perf_counter() - start, 1)
    return {"peak_gigabytes": round(peak / 1e9, 2), "seconds": seconds, "plan": done.stderr.splitlines()[-8:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="created unless it exists, and kept; by default a temporary one")
    parser.add_argument("--budgets", nargs="+", default=["8GB", "7GB"])
    parser.add_argument("--steps", type=int, default=2, help="more do not need more memory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the stored weights")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    folder = options.folder or Path(f"full-size-{options.dtype}")
    if not (folder / "model_index.json").exists():
        make_folder(folder, getattr(torch, options.dtype))
    generate = generate_on_cpu if options.device == "cpu" else generate_on_gpu
    try:
        measured = {budget: generate(folder, budget, options.steps) for budget in options.budgets}
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    kept = {budget: found["peak_gigabytes"] <= parse_size(budget) / 1e9 for budget, found in measured.items()}
    what = f"peak memory within a budget, 1024 px, weights stored in {options.dtype}, {options.device}"
    measure.write(f"memory-{options.device}-{options.dtype}", {"what": what, "kept": kept, "budgets": measured})


if __name__ == "__main__":
    main()
