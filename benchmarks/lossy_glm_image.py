"""The effect of quantized weights on GLM-Image's images and edits, on the small model of docs/scenes/glm_image.md.

    python benchmarks/lossy_glm_image.py [--model runs/scenes_glm_image/checkpoint] [--count 200]

`scripts/build_scenes_glm_image.py` makes the model. Every option generates the same held-out prompts and edits from the
same seeds. The judge's score is the share of images in which everything is right; next to it is the share of the
prior's tokens that are the same without quantization. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import measure
from impasto import GlmImagePipeline
from impasto.scenes.evaluate import evaluate, evaluate_edits

PRIOR, TRANSFORMER = "vision_language_encoder", "transformer"
#: The quantized components; the others are in bfloat16.
OPTIONS: dict[str, dict[str, str]] = {
    "lossless": {},
    "prior int8": {PRIOR: "int8"},
    "prior NF4": {PRIOR: "nf4"},
    "transformer int8": {TRANSFORMER: "int8"},
    "transformer NF4": {TRANSFORMER: "nf4"},
    "both int8": {PRIOR: "int8", TRANSFORMER: "int8"},
    "both NF4": {PRIOR: "nf4", TRANSFORMER: "nf4"},
}
CALL: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 20, "guidance_scale": 2.0}


def judged(model: Path, dtypes: dict[str, str], count: int) -> tuple[dict[str, Any], Tensor]:
    """The judge's numbers, and the tokens of all images and edits."""
    dtype = {"default": "bfloat16", **dtypes}
    pipe = GlmImagePipeline.from_pretrained(model, dtype=dtype, memory_budget="8GB")
    pipe.set_progress_bar_config(disable=True)
    tokens: list[Tensor] = []

    def generate(texts: list[str], sources: list[Tensor] | None = None) -> list[Image.Image]:
        first = sum(map(len, tokens))
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(texts))]
        images = None if sources is None else [[source] for source in sources]
        prior = pipe.generate_prior_tokens(texts, 128, 128, image=images, generator=generators)
        tokens.append(prior.prior_token_ids)
        given = {name: getattr(prior, name) for name in prior._fields}
        return pipe(texts, image=images, generator=generators, **given, **CALL).images

    reports = {"generated": evaluate(generate, count), "edited": evaluate_edits(generate, count)}
    return {name: report.to_dict()["accuracy"]["all"] for name, report in reports.items()}, torch.cat(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/scenes_glm_image/checkpoint"))
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    whole: Tensor | None = None
    for name, dtypes in OPTIONS.items():
        accuracy, tokens = judged(options.model, dtypes, options.count)
        whole = tokens if whole is None else whole
        same = float((tokens == whole).float().mean())
        results[name] = {"tokens_as_with_all_bits": round(same, 4), **accuracy}
        right = {kind: f"{accuracy[kind]['whole']['percent']:.1f} %" for kind in ("generated", "edited")}
        shares = ", ".join(f"{kind} {share}" for kind, share in right.items())
        print(f"{name:20} {shares}, same tokens {100 * same:.1f} %")
    what = f"GLM-Image with quantized weights: {options.count} prompts and {options.count} edits, CPU"
    measure.write("lossy-glm-image", {"what": what, "options": results})


if __name__ == "__main__":
    main()
