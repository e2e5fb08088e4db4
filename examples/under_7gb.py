"""Generate within 7 GB of GPU memory: a text encoder in 4 bits, and every component only while it is needed.

    pip install -U accelerate bitsandbytes
    python examples/under_7gb.py --model PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --prompt "cute cat"

Text embeddings from 4 bits are less accurate than from 8 (examples/under_8gb.py).
Without a GPU it runs on the CPU. For an automatic choice without 4 bits: examples/memory_budget.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
from transformers import T5EncoderModel

import impasto
from impasto.errors import ImpastoError, MissingDependencyError
from impasto.memory.inspection import resolve_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def quantization_config() -> Any:
    """transformers' configuration for a text encoder in 4 bits, NF4 (2305.14314)."""
    try:
        import bitsandbytes  # noqa: F401  (transformers does the rest)
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise MissingDependencyError(
            "4 bits need bitsandbytes: pip install -U accelerate bitsandbytes; or use examples/memory_budget.py"
        ) from error
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)


def flush() -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    parser.add_argument("--prompt", default="cute cat")
    parser.add_argument("--output", default="cat.png")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pipeline_class = getattr(impasto, resolve_pipeline(args.model)[1])

    # 1. The prompt: the text encoder alone, in 4 bits.
    text_encoder = T5EncoderModel.from_pretrained(
        args.model,
        subfolder="text_encoder",
        quantization_config=quantization_config(),
        dtype=DTYPE,
        device_map="auto",
    )
    pipe = pipeline_class.from_pretrained(
        args.model, text_encoder=text_encoder, transformer=None, device_map="balanced"
    )
    with torch.no_grad():
        prompt_embeds, prompt_mask, negative_embeds, negative_mask = pipe.encode_prompt(args.prompt)
    del text_encoder, pipe
    flush()

    # 2. The latents: without the text encoder, which is not loaded at all.
    pipe = pipeline_class.from_pretrained(args.model, text_encoder=None, torch_dtype=DTYPE).to(DEVICE)
    latents = pipe(
        negative_prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        prompt_attention_mask=prompt_mask,
        negative_prompt_attention_mask=negative_mask,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="latent",
    ).images
    del pipe.transformer
    flush()

    # 3. The image: the autoencoder alone.
    image = pipe.image_processor.postprocess(pipe.decode(latents), output_type="pil")[0]
    image.save(args.output)
    print(args.output)
    if DEVICE == "cuda":
        print(f"peak: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    try:
        main()
    except ImpastoError as error:
        sys.exit(f"error: {error}")
