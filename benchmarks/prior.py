"""The prior of GLM-Image, token by token: ours against transformers' generate, and against reading the weights.

    python benchmarks/prior.py [--layers 16] [--batch 1] [--tokens 48] [--dtype bfloat16] [--rounds 5] [--device cpu]

A language model of GLM-Image's class with random weights; 16 layers of width 1536 are 0.57 B parameters, and 100 are
3.4 B, which take 14 GB with packed copies. Both generate the tokens of one image after a prompt, in turns, once
the logits of the prompt have been compared. A token needs each weight once, so it takes at least the time to read them,
measured as the sum of their bits in the same process. Both times include the prompt; ours is also given without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

import measure
from impasto.models.glm_image.prior_decoder import PriorDecoder, Sampling

VOCABULARY = 16384
PROMPT = 50


def build(layers: int, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY + 600,
        "vision_vocab_size": VOCABULARY + 128,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "pad_token_id": VOCABULARY + 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "image_size": 64}
    codes = {"embed_dim": 8, "num_embeddings": VOCABULARY, "latent_channels": 64}
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = GlmImageForConditionalGeneration(
            GlmImageConfig(text_config=text, vision_config=vision, vq_config=codes)
        )
    torch.set_default_dtype(torch.float32)
    return model.eval()


def reading(weights: list[torch.Tensor], times: int, device: str) -> None:
    """Read all weights ``times`` times."""
    for _ in range(times):
        for weight in weights:
            weight.sum()
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = build(options.layers, getattr(torch, options.dtype), options.device)
    batch, count = options.batch, options.tokens
    ids = torch.randint(0, VOCABULARY, (batch, PROMPT), device=options.device)
    positions = torch.arange(PROMPT, device=options.device).expand(3, batch, -1)
    uniform = torch.rand(batch, count, device=options.device)
    sampling = Sampling.of(model.generation_config)

    start = time.perf_counter()
    decoder = PriorDecoder(model, batch, PROMPT + count, VOCABULARY)  # packs weights if that helps
    made_in = time.perf_counter() - start

    prompts: list[float] = []

    def ours() -> torch.Tensor:
        begun = time.perf_counter()
        scores = decoder.prefill(ids, positions)
        if options.device == "cuda":
            torch.cuda.synchronize()
        prompts.append(time.perf_counter() - begun)
        made = ids.new_zeros(batch, count)
        for i in range(count):
            made[:, i] = sampling.choose(scores, uniform[:, i])
            if i + 1 < count:
                scores = decoder.step(made[:, i], positions[..., -1] + i + 1)
        return made.cpu()

    def theirs() -> torch.Tensor:
        others = list(range(VOCABULARY, VOCABULARY + 128))
        limits = {"max_new_tokens": count, "min_new_tokens": count, "suppress_tokens": others}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, **limits).cpu()

    layers = model.model.language_model.layers
    weights = [x.detach() for layer in layers for x in layer.parameters() if x.ndim == 2]
    weights.append(model.lm_head.weight[:VOCABULARY].detach())
    bits = [weight.flatten().view(torch.int64) for weight in weights]

    expected = model(ids, position_ids=positions).logits[:, -1, :VOCABULARY]
    difference = measure.relative_error(decoder.prefill(ids, positions), expected)
    assert difference < (0.05 if options.dtype == "bfloat16" else 1e-4), difference
    calls = {
        "impasto": ours,
        "reading the weights": lambda: reading(bits, count, options.device),  # right after ours: bandwidth varies
        "transformers generate": theirs,
    }
    for call in calls.values():
        call()
    prompts.clear()
    seconds = measure.in_turns(calls, options.rounds)
    billions = sum(weight.numel() for weight in weights) / 1e9
    result = measure.compared(seconds)
    per_token = {name: statistics.median(values) / count for name, values in seconds.items()}
    # The prompt yields the first token.
    steps = [(whole - prompt) / (count - 1) for whole, prompt in zip(seconds["impasto"], prompts, strict=True)]
    pairs = [step * count / read for step, read in zip(steps, seconds["reading the weights"], strict=True)]
    per_token["impasto, without the prompt"] = statistics.median(steps)
    measure.write(
        f"prior-{billions:.2f}B-{options.dtype}-batch{batch}",
        {
            "what": f"{count} tokens of a prior of {billions:.2f} B after {PROMPT}, {options.dtype}, batch {batch}",
            "difference": difference,
            "seconds_to_make_the_decoder": round(made_in, 2),
            **result,
            "milliseconds_per_token": {name: round(1e3 * value, 2) for name, value in per_token.items()},
            "tokens_per_second": {name: round(batch / value, 2) for name, value in per_token.items()},
            "times_the_reading": round(statistics.median(pairs), 3),
            "times_the_reading_in_each_round": [round(pair, 3) for pair in pairs],
        },
    )


if __name__ == "__main__":
    main()
