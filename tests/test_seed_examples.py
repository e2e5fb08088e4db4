"""The Python examples of the public documents of these pipelines, with the import and the checkpoint changed.

Left out are 8-bit loading and ``device_map``, which need another device than the CPU.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from PIL import Image

from .tiny import tiny_transformer, tiny_vae, write_pipeline


def flush() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family, of the size that is binned at 256 px."""
    from impasto import PixArtAlphaPipeline, PixArtSigmaPipeline

    root = tmp_path_factory.mktemp("checkpoints")
    families = {"alpha": (PixArtAlphaPipeline, 0.18215), "sigma": (PixArtSigmaPipeline, 0.13025)}
    return {
        name: write_pipeline(
            root / name,
            cls,
            transformer=tiny_transformer(sample_size=32),
            vae=tiny_vae(levels=4, scaling_factor=scaling_factor),
        )
        for name, (cls, scaling_factor) in families.items()
    }


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_under_8_gb(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Prompt, latents and picture, each with only the parts that it needs."""
    from transformers import T5EncoderModel

    import impasto

    checkpoint = checkpoints[family]
    pipeline_class = impasto.PixArtAlphaPipeline if family == "alpha" else impasto.PixArtSigmaPipeline

    text_encoder = T5EncoderModel.from_pretrained(
        checkpoint,
        subfolder="text_encoder",
    )
    pipe = pipeline_class.from_pretrained(
        checkpoint,
        text_encoder=text_encoder,
        transformer=None,
    )
    with torch.no_grad():
        prompt = "cute cat"
        prompt_embeds, prompt_attention_mask, negative_embeds, negative_prompt_attention_mask = pipe.encode_prompt(
            prompt
        )
    del text_encoder
    del pipe
    flush()

    pipe = pipeline_class.from_pretrained(
        checkpoint,
        text_encoder=None,
        torch_dtype=torch.float16,
    ).to("cpu")
    latents = pipe(
        negative_prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        prompt_attention_mask=prompt_attention_mask,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        num_images_per_prompt=1,
        output_type="latent",
    ).images
    del pipe.transformer
    flush()

    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    image = pipe.image_processor.postprocess(image, output_type="pil")[0]
    image.save(tmp_path / "cat.png")
    assert latents.dtype == torch.float16
    assert torch.isfinite(latents).all()
    assert Image.open(tmp_path / "cat.png").size == (256, 256)


def test_alpha_with_offloading(checkpoints: dict[str, Path]) -> None:
    from impasto import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(checkpoints["alpha"], torch_dtype=torch.float16)
    # Enable memory optimizations.
    pipe.enable_model_cpu_offload(device="cpu")
    prompt = "A small cactus with a happy face in the Sahara desert."
    image = pipe(prompt).images[0]
    assert image.size == (256, 256)


def test_sigma_as_on_its_model_card(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from impasto import PixArtSigmaPipeline, Transformer2DModel

    device = torch.device("cpu")
    weight_dtype = torch.float16

    pipe = PixArtSigmaPipeline.from_pretrained(
        checkpoints["sigma"],
        torch_dtype=weight_dtype,
        use_safetensors=True,
    )
    pipe.to(device)

    prompt = "A small cactus with a happy face in the Sahara desert."
    image = pipe(prompt).images[0]
    image.save(tmp_path / "catcus.png")
    assert isinstance(pipe.transformer, Transformer2DModel)
    assert Image.open(tmp_path / "catcus.png").size == (256, 256)


def test_sigma_of_a_transformer_only_repository(checkpoints: dict[str, Path]) -> None:
    from impasto import PixArtSigmaPipeline, Transformer2DModel

    transformer = Transformer2DModel.from_pretrained(
        checkpoints["sigma"],
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        use_safetensors=True,
    )
    pipe = PixArtSigmaPipeline.from_pretrained(
        checkpoints["sigma"],
        transformer=transformer,
        torch_dtype=torch.bfloat16,
        use_safetensors=True,
    )
    pipe.to("cpu")
    assert pipe("cute cat", num_inference_steps=2).images[0].size == (256, 256)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_transformer(backend: str, checkpoints: dict[str, Path]) -> None:
    from impasto import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(checkpoints["sigma"])
    arguments = {"prompt": "cute cat", "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    if backend == "inductor":
        pipe.transformer = torch.compile(pipe.transformer, mode="reduce-overhead", fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    found = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert (found - expected).norm() / expected.norm() < 1e-4
