"""Generate an image within 8 GB of GPU memory: an 8-bit text encoder, and each component loaded only while in use.

    pip install -U accelerate bitsandbytes   # or torchao, and --library torchao
    python examples/under_8gb.py --model PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --prompt "cute cat"

An 8-bit text encoder is slightly less accurate; compare the images with those of --bits 16.
Without a GPU it runs on the CPU. To have everything chosen automatically, use examples/memory_budget.py.
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


def quantization_config(bits: int, library: str) -> Any:
    """The configuration of the text encoder's quantization in transformers; None for 16 bits (32 on the CPU)."""
    if bits == 16:
        return None
    try:
        if library == "torchao":
            import torchao.quantization as torchao
            from transformers import TorchAoConfig

            return TorchAoConfig(torchao.Int8WeightOnlyConfig())
        import bitsandbytes  # noqa: F401  (transformers does the rest)
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)
    except ImportError as error:
        raise MissingDependencyError(
            f"{bits} bits need {library}: pip install -U accelerate {library}; or use --library torchao, or --bits 16"
        ) from error


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
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--library", choices=("bitsandbytes", "torchao"), default="bitsandbytes")
    args = parser.parse_args(argv)
    pipeline_class = getattr(impasto, resolve_pipeline(args.model)[1])

    # 1. The prompt: the 8-bit text encoder alone.
    text_encoder = T5EncoderModel.from_pretrained(
        args.model,
        subfolder="text_encoder",
        quantization_config=quantization_config(args.bits, args.library),
        dtype=torch.bfloat16 if args.library == "torchao" else DTYPE,
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
