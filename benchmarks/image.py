"""A whole image with full-size random weights: T5-XXL, 20 guided XL/2 steps, autoencoder; ours against diffusers'.

    python benchmarks/image.py [--pixels 512] [--steps 20] [--rounds 1] [--lossy "cache interval 2" ...]

Both pipelines share the text encoder and the weights; it is checked that they generate the same image. With --lossy,
ours is also timed with lossy options, whose losses are in docs/lossy.md. Takes some minutes and 15 GB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import sentencepiece
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

import impasto
import lossy
import measure

PROMPT = "a small cactus with a happy face in the desert, golden hour, 35mm photograph, sharp focus, very detailed"
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SDXL_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def text_encoder() -> T5EncoderModel:
    """T5-XXL in bfloat16. All layers have the same random weights, which are quick to create."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**T5_XXL))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    made: dict[tuple[int, ...], torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.fill_(1.0)
                continue
            shape = tuple(parameter.shape)
            if shape not in made:
                made[shape] = torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5
            parameter.copy_(made[shape])
    return model


def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of single letters: the prompt has about as many tokens as with the published one."""
    folder = Path(tempfile.mkdtemp())
    words = sorted(set(PROMPT.replace(",", " ,").split()))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT] * 50 + words * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 300}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def pipelines(pixels: int, dtype: torch.dtype) -> dict[str, object]:
    """Both pipelines with the same weights; text encoder and tokenizer are shared."""
    shared = {"tokenizer": tokenizer(), "text_encoder": text_encoder()}
    side = pixels // 8
    xl = {"sample_size": side, "caption_channels": 4096, "use_additional_conditions": False}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    theirs = diffusers.PixArtTransformer2DModel(**xl), diffusers.AutoencoderKL(**SDXL_VAE)
    ours = impasto.PixArtTransformer2DModel(**xl), impasto.AutoencoderKL(**SDXL_VAE)
    torch.set_default_dtype(torch.float32)
    made: dict[str, object] = {}
    for name, library, parts in (("impasto", impasto, ours), ("diffusers", diffusers, theirs)):
        for mine, other in zip(parts, theirs, strict=True):
            mine.load_state_dict(other.state_dict())
            mine.eval()
        scheduler = library.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        made[name] = library.PixArtSigmaPipeline(transformer=parts[0], vae=parts[1], scheduler=scheduler, **shared)
        made[name].set_progress_bar_config(disable=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lossy", nargs="*", default=[], choices=[option.name for option in lossy.OPTIONS])
    options = parser.parse_args()
    pipes = pipelines(options.pixels, torch.bfloat16)

    def generate(name: str, steps: int) -> torch.Tensor:
        return pipes[name](
            PROMPT,
            height=options.pixels,
            width=options.pixels,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            clean_caption=False,
            use_resolution_binning=False,
        ).images

    first = {name: generate(name, 2) for name in pipes}  # also warms both up
    difference = measure.relative_error(first["impasto"], first["diffusers"])
    assert difference < 0.1, difference
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: generate(name, options.steps) for name in pipes}
    for option in lossy.OPTIONS:
        if option.name in options.lossy:

            def generate_lossy(option: lossy.Option = option) -> None:
                with option.applied(pipes["impasto"]):
                    generate("impasto", options.steps)

            calls[f"impasto, {option.name}"] = generate_lossy
    seconds = measure.in_turns(calls, options.rounds)
    measure.write(
        f"image-{options.pixels}-bfloat16",
        {
            "what": f"a whole image, {options.pixels} px, bfloat16, {options.steps} guided steps, T5-XXL, SDXL's VAE",
            "tokens": len(pipes["impasto"].tokenizer(PROMPT).input_ids),
            "difference": difference,
            **measure.compared(seconds),
        },
    )


if __name__ == "__main__":
    main()
