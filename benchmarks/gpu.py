"""On a GPU: 20 guided XL/2 steps at 1024 px in bfloat16, ours and diffusers', plain and compiled; text encoder and VAE.

    python benchmarks/gpu.py [--pixels 1024] [--steps 20] [--rounds 5] [--skip text vae attention]

All candidates use the same weights and embeddings, and the latents are compared before anything is timed. diffusers is
compiled as its model card says, as a whole with mode="reduce-overhead" and fullgraph=True; ours by ``pipe.compile()``
and also as a whole. "share of the peak" is relative to matrix products of 8192 x 8192 on this card, measured in the
same run. Attention: each of torch's kernels at 4096 tokens, 2 x 16 heads of 72 channels, and of 72 padded to 80.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import image
import impasto
import measure

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, rounds: int) -> float:
    """The median over calls, after two warm-up calls."""
    found = []
    for turn in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if turn >= 2:
            found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


def matmul_rate(device: str, side: int) -> float:
    """FLOP/s of a large product in bfloat16."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / seconds_of(lambda: a @ a, device, 10)


def flops(pixels: int, layers: int, real_tokens: int) -> float:
    """Multiplications and additions of a guided step: linear layers and both attentions, without padding."""
    tokens, width = (pixels // 16) ** 2, 1152
    linear = (4 + 2 + 8) * width * width * tokens  # self-attention, cross-attention's query and output, feed-forward
    attention = 2 * width * tokens * (tokens + real_tokens)
    return 2 * 2 * layers * (linear + attention)


def compare_attention(device: str, tokens: int, rounds: int) -> dict[str, float | str]:
    """Milliseconds of each kernel, or its error message."""
    found: dict[str, float | str] = {}
    for size in (72, 80):
        qkv = [torch.randn(2, 16, tokens, size, device=device, dtype=torch.bfloat16) for _ in range(3)]
        for name, backend in KERNELS.items():
            try:
                with sdpa_kernel(backend):
                    seconds = seconds_of(lambda qkv=qkv: F.scaled_dot_product_attention(*qkv), device, rounds)
                found[f"{name}, {size}"] = round(1e3 * seconds, 3)
            except RuntimeError as error:
                found[f"{name}, {size}"] = str(error).partition("\n")[0]
        found[f"torch's choice, {size}"] = round(
            1e3 * seconds_of(lambda qkv=qkv: F.scaled_dot_product_attention(*qkv), device, rounds), 3
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick trial")
    parser.add_argument("--real-tokens", type=int, default=20)
    parser.add_argument("--skip", nargs="*", default=[], choices=["text", "vae", "attention", "compiled"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tests the script")
    options = parser.parse_args()
    device, side = options.device, options.pixels // 8

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    xl = {"sample_size": side, "caption_channels": 4096, "use_additional_conditions": False}
    theirs = diffusers.PixArtTransformer2DModel(**xl, num_layers=options.layers).eval().to(device)
    torch.set_default_dtype(torch.float32)
    schedule = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    masks = torch.zeros(2, 1, 300, dtype=torch.long, device=device)
    masks[0, :, : options.real_tokens] = 1
    masks[1, :, :1] = 1  # the empty prompt is one token
    texts = torch.randn(2, 1, 300, 4096, device=device, dtype=torch.bfloat16)
    vae = diffusers.AutoencoderKL(**image.SDXL_VAE).to(device, torch.bfloat16).eval()

    def pipeline(library: Any, transformer: torch.nn.Module) -> Any:
        parts = {"tokenizer": None, "text_encoder": None, "vae": vae}
        scheduler = library.DPMSolverMultistepScheduler(**schedule)
        pipe = library.PixArtSigmaPipeline(**parts, transformer=transformer, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def copy_of_ours() -> torch.nn.Module:
        with torch.device("meta"):
            model = impasto.PixArtTransformer2DModel(**xl, num_layers=options.layers)
        model.load_state_dict(theirs.state_dict(), assign=True)  # the same memory
        return model.eval()

    whole = {"mode": "reduce-overhead", "fullgraph": True} if device == "cuda" else {"backend": "aot_eager"}
    pipes = {"impasto": pipeline(impasto, copy_of_ours()), "diffusers": pipeline(diffusers, theirs)}
    if "compiled" not in options.skip:
        pipes["impasto compiled"] = pipeline(impasto, copy_of_ours())
        pipes["impasto compiled"].compile(**({} if device == "cuda" else {"backend": "aot_eager"}))
        pipes["impasto compiled whole"] = pipeline(impasto, torch.compile(copy_of_ours(), **whole))
        pipes["diffusers compiled"] = pipeline(diffusers, torch.compile(theirs, **whole))

    def generate(name: str) -> torch.Tensor:
        return pipes[name](
            prompt=None,
            negative_prompt=None,
            prompt_embeds=texts[0],
            prompt_attention_mask=masks[0],
            negative_prompt_embeds=texts[1],
            negative_prompt_attention_mask=masks[1],
            height=options.pixels,
            width=options.pixels,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            use_resolution_binning=False,
        ).images

    latents = {name: generate(name) for name in pipes}  # also compiles
    differences = {name: measure.relative_error(found, latents["diffusers"]) for name, found in latents.items()}
    assert max(differences.values()) < 0.1, differences
    for name in pipes:
        generate(name)
    seconds = measure.in_turns({name: lambda name=name: generate(name) for name in pipes}, options.rounds)
    result = measure.compared(seconds)
    peak = matmul_rate(device, 8192 if device == "cuda" else 1024)
    work = options.steps * flops(options.pixels, options.layers, options.real_tokens)
    result["peak_flops_per_second"] = round(peak)
    result["share_of_the_peak"] = {name: round(work / found / peak, 3) for name, found in result["median"].items()}
    if device == "cuda":
        result["peak_gigabytes"] = {}
        for name in pipes:
            torch.cuda.reset_peak_memory_stats()
            generate(name)
            result["peak_gigabytes"][name] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    pipes.clear()
    if "attention" not in options.skip:
        result["attention_milliseconds"] = compare_attention(device, (options.pixels // 16) ** 2, options.rounds)
    if "vae" not in options.skip:
        ours = impasto.AutoencoderKL(**image.SDXL_VAE).to(device, torch.bfloat16).eval()
        ours.load_state_dict(vae.state_dict())
        z = torch.randn(1, 4, side, side, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            result["decode_seconds"] = {
                name: seconds_of(lambda model=model: model.decode(z), device, options.rounds)
                for name, model in (("impasto", ours), ("diffusers", vae))
            }
    if "text" not in options.skip:
        encoder = image.text_encoder().to(device)
        tokens = torch.ones(1, options.real_tokens, dtype=torch.long, device=device)
        padded = torch.ones(2, 300, dtype=torch.long, device=device)
        with torch.no_grad():
            result["text_seconds"] = {
                "impasto": seconds_of(lambda: encoder(tokens), device, options.rounds),
                "diffusers": seconds_of(lambda: encoder(padded), device, options.rounds),
            }
    what = f"{options.steps} guided XL/2 steps, {options.pixels} px, bfloat16, on {device}"
    result = {"what": what, "differences": differences, **result}
    if device == "cuda":
        measure.write(f"gpu-{options.pixels}", result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
