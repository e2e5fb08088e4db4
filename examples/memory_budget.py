"""Generate within a memory budget, for which precision, placement and tiling are chosen; nothing else is lost.

    python examples/memory_budget.py --model PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --budget 8GB "cute cat"

With --prompt-cache FOLDER, a prompt used before needs no text encoder. ``impasto info MODEL`` shows the plans for
other budgets.
"""

from __future__ import annotations

import argparse
import sys

import torch

import impasto
from impasto.errors import ImpastoError
from impasto.memory.inspection import resolve_pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="cute cat")
    parser.add_argument("--model", default="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    parser.add_argument("--budget", default="8GB")
    parser.add_argument("--prompt-cache", metavar="FOLDER")
    parser.add_argument("--output", default="cat.png")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pipeline_class = getattr(impasto, resolve_pipeline(args.model)[1])
    pipe = pipeline_class.from_pretrained(args.model, memory_budget=args.budget)
    for line in pipe.plan.lines():
        print(line)
    if args.prompt_cache is not None:
        pipe.enable_prompt_cache(args.prompt_cache, max_bytes="1GB")
    generator = torch.Generator().manual_seed(args.seed)
    pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0].save(args.output)
    print(args.output)


if __name__ == "__main__":
    try:
        main()
    except ImpastoError as error:
        sys.exit(f"error: {error}")
