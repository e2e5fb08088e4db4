"""16-bit weights on a processor that does not multiply 16-bit numbers, against float32 weights.

    python benchmarks/precision.py [step] [text] [image] [--pixels 256] [--layers 7] [--rounds 9] [--exact]

step: a guided XL/2 step; text: one layer of the size of T5-XXL's, at 1, 20 and 300 tokens; image: a whole image of the
bundled model. All but the last have random weights. The step is also timed with diffusers in the 16-bit dtype, for
--theirs rounds. --exact measures the distance of both from float64, with the same 16-bit weights.

A machine that multiplies bfloat16 imitates one that does not with
``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2``; the result says so.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Block

import impasto
import measure
import step
from impasto.nn.machine import describe_processor, is_native
from impasto.nn.precision import adapt

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
TOKENS = (1, 20, 300)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """A guided step with float32, bfloat16 and float16 weights."""
    config = {**step.XL, "num_layers": options.layers, "sample_size": options.pixels // 8}
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(**config).eval()
    ours = impasto.PixArtTransformer2DModel(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    models = {"float32": ours}
    for name, dtype in HALVES.items():
        models[name] = copy.deepcopy(ours).to(dtype)
        adapt(models[name])
    contestants = {name: step.Step("impasto", model, options, model.dtype) for name, model in models.items()}
    slow = {
        f"diffusers {name}": step.Step("diffusers", copy.deepcopy(theirs).to(dtype), options, dtype)
        for name, dtype in HALVES.items()
    }
    result = timed(contestants, options)
    result["weight_bytes"] = {name: weight_bytes(model) for name, model in models.items()}
    if options.theirs:
        seconds = measure.in_turns({"float32": contestants["float32"], **slow}, options.theirs)
        result["diffusers"] = measure.compared(seconds, "float32")
    if options.exact:
        result["distance_from_float64"] = {}
        for name, dtype in HALVES.items():
            exact = step.Step("diffusers", copy.deepcopy(slow[f"diffusers {name}"].model).double(), options, dtype)
            exact.latents, exact.text = exact.latents.double(), exact.text.double()
            expected = exact()
            for library, found in (("impasto", contestants[name]), ("diffusers", slow[f"diffusers {name}"])):
                result["distance_from_float64"][f"{library} {name}"] = measure.relative_error(found(), expected)
    return {"what": f"guided XL/2 step, {options.pixels} px, {options.layers} layers", **result}


def text_layer(options: argparse.Namespace) -> dict[str, Any]:
    """A single layer of T5-XXL's size: for a short prompt the time is that of reading its weights."""
    torch.manual_seed(0)
    layer = T5Block(T5Config(**T5_XXL, is_decoder=False), has_relative_attention_bias=True).eval()
    layers = {"float32": layer}
    for name, dtype in HALVES.items():
        layers[name] = copy.deepcopy(layer).to(dtype)
        adapt(layers[name])
    found: dict[str, Any] = {"weight_bytes": {name: weight_bytes(each) for name, each in layers.items()}}
    for tokens in TOKENS:
        hidden = torch.randn(1, tokens, T5_XXL["d_model"])

        def call(layer: torch.nn.Module, hidden: torch.Tensor = hidden) -> Callable[[], Any]:
            given = hidden.to(next(layer.parameters()).dtype)
            return torch.no_grad()(lambda: layer(given))

        found[f"{tokens} tokens"] = timed({name: call(each) for name, each in layers.items()}, options)
    return {"what": "a layer of T5-XXL's size", **found}


def image(options: argparse.Namespace) -> dict[str, Any]:
    """A whole image of the bundled model, from prompt to pixels."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in {"float32": torch.float32, **HALVES}.items():
        pipe = impasto.PixArtSigmaPipeline.from_pretrained("builtin:scenes", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        calls[name] = lambda pipe=pipe: (
            pipe(
                "a large red cube and a small blue sphere", generator=torch.Generator().manual_seed(0), output_type="pt"
            ).images
        )
    images = {name: call().float() for name, call in calls.items()}
    errors = {name: float((images[name] - images["float32"]).abs().mean()) for name in HALVES}
    return {"what": "a whole bundled image", "mean_difference": errors, **timed(calls, options)}


def timed(contestants: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The time of each relative to float32, in turns, after a warm-up round."""
    measure.in_turns(contestants, 1)
    return measure.compared(measure.in_turns(contestants, options.rounds), "float32")


PARTS = {"step": steps, "text": text_layer, "image": image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all by default")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--theirs", type=int, default=1, help="rounds of diffusers; 0: none")
    parser.add_argument("--exact", action="store_true", help="measure the distance from float64")
    options = parser.parse_args()
    options.batch, options.real_tokens = 1, 20
    widened = [name for name, dtype in HALVES.items() if not is_native(dtype)]
    print(*describe_processor(), f"widened: {widened or 'nothing, so this says little'}", sep="; ")
    for name in options.parts or PARTS:
        suffix = f"-{options.pixels}" if name == "step" else ""
        measure.write(f"precision-{name}{suffix}", {"widened": widened, **PARTS[name](options)})


if __name__ == "__main__":
    main()
