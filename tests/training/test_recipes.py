"""Each recipe, made small: it improves its held-out loss, and each stage starts from the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from impasto.errors import InputError
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.glm_image import GlmImagePipeline
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler as Schedule
from impasto.training.assembly import components
from impasto.training.launch import launch
from impasto.training.objectives.glm_image import image_tokens
from impasto.training.settings import recipe_files as recipes
from impasto.training.settings.configuration import Configuration

from ..tiny import write_pipeline
from ..tiny_glm import SCHEDULER, TRANSFORMER, VAE, prior_parts, text_parts
from .folders import write_images
from .runs import rows

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "pipeline")
    write_images(place / "images", 24, size=64)
    return place


def small(name: str, place: Path, steps: int = 12) -> Configuration:
    """A recipe with its optimizer, objective and stages, but a tiny model, small images and a higher rate."""
    full = recipes.read(name).model_dump(mode="json")
    models, data, transformer = full["models"], full["data"], full["models"]["transformer"]
    models["pipeline"] = str(place / "pipeline")
    if transformer["start_from"] is not None:
        transformer["start_from"] = transformer["start_from"].replace("runs", str(place))
    elif transformer["config"]:
        transformer["config"] |= {**SMALL, "caption_channels": 32}
    if "sample_size" in transformer["config"]:
        transformer["config"]["sample_size"] //= 8
    pixels = {None: 256}.get(data["base"], data["base"]) // 32  # the tiny autoencoder makes them half as large
    shapes = [[pixels, pixels]] if data["base"] is None else [[pixels, pixels], [pixels // 2, pixels * 2]]
    sources = [{**source, "path": str(place / "images")} for source in data["sources"]]
    full["data"] = {**data, "sources": sources, "base": None, "sizes": shapes, "batch_size": 4, "workers": 0}
    full["data"]["max_crop"] = 0.9
    full["optimizer"]["rate"] *= 40
    return recipes.checked(
        {
            **full,
            "steps": steps,
            "micro_batch": 2,
            "schedule": {**full["schedule"], "warmup": 2},
            "validation": {"count": 6, "batch_size": 6},
            "checkpoints": {**full["checkpoints"], "every": steps // 3},
            "report": {"progress": False},
            "log_every": 4,
        },
        name,
    )


def improves(name: str, place: Path) -> None:
    folder = place / name
    launch(small(name, place), folder)
    losses = [row["validation"] for row in rows(folder) if "validation" in row]
    assert losses[-1] < losses[0], name


CHAIN = [
    *("pixart-alpha-256", "pixart-alpha-align", "pixart-alpha-512", "pixart-alpha-1024"),
    *("pixart-sigma-256", "pixart-sigma-512", "pixart-sigma-1024", "pixart-sigma-2k", "pixart-sigma-2k-kv"),
]


def test_the_chain_of_the_papers(place: Path) -> None:
    for name in CHAIN:
        improves(name, place)
    config: dict[str, Any] = {}
    for name in CHAIN:
        stored = PixArtTransformer2DModel.from_pretrained(place / name / "result" / "transformer").config
        config[name] = {**stored}
    assert config["pixart-alpha-1024"]["use_additional_conditions"]
    assert config["pixart-sigma-256"]["interpolation_scale"] == 0.5
    assert config["pixart-sigma-2k-kv"]["kv_compression"] == "conv"
    scales = [config[f"pixart-sigma-{size}"]["interpolation_scale"] for size in ("512", "1024", "2k", "2k-kv")]
    assert scales == [1, 2, 4, 4]


@pytest.fixture(scope="module")
def glm_image(place: Path) -> Path:
    parts = {**text_parts(), **prior_parts(), "vae": AutoencoderKL(**VAE), "scheduler": Schedule(**SCHEDULER)}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        GlmImagePipeline(transformer=GlmImageTransformer2DModel(**TRANSFORMER), **parts).save_pretrained(place / "glm")
    return place


@pytest.mark.parametrize("name", ["glm-image", "glm-image-lora"])
def test_glm_image(name: str, glm_image: Path) -> None:
    wanted = small(name, glm_image, steps=9).model_dump(mode="json")
    wanted["models"]["pipeline"] = str(glm_image / "glm")
    wanted["data"]["sizes"] = [[64, 64], [32, 96]]
    if wanted["adapter"]:
        wanted["adapter"]["base"] = "plain"  # the tiny layers are too small for 4 bits
        wanted["adapter"]["rank"] = 4
    else:
        wanted["optimizer"]["name"] = "adamw"
    launch(recipes.checked(wanted, name), glm_image / name)
    losses = [row["validation"] for row in rows(glm_image / name) if "validation" in row]
    assert losses[-1] < losses[0]
    pipe = GlmImagePipeline.from_pretrained(glm_image / "glm")
    if wanted["adapter"]:
        pipe.load_lora_weights(glm_image / name / "result")
        assert pipe.get_active_adapters() == ["default_0"]
    else:
        stored = GlmImageTransformer2DModel.from_pretrained(glm_image / name / "result" / "transformer")
        assert stored.num_parameters() == pipe.transformer.num_parameters()


def test_only_what_trains_is_on_the_device(glm_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = small("glm-image-lora", glm_image).model_dump(mode="json")
    wanted["models"]["pipeline"], wanted["precision"] = str(glm_image / "glm"), "float32"
    wanted["data"]["sizes"] = [[64, 64]]
    quantized = []

    def quantize(module: Any, method: str, *, keep_originals: bool, device: torch.device) -> None:
        quantized.append((module.device.type, method, keep_originals, device.type))

    monkeypatch.setattr(components, "quantize", quantize)
    found = components.load(recipes.checked(wanted, "test"), torch.device("meta"))
    assert quantized == [("cpu", "nf4", False, "meta")]  # never whole on the device
    placed = [found.transformer, found.vae, found.text_encoder, found.prior.model.visual, found.prior.model.vqmodel]
    assert {parameter.device.type for part in placed for parameter in part.parameters()} == {"meta"}
    assert found.prior.model.language_model.device.type == found.prior.lm_head.weight.device.type == "cpu"
    class_images = {"path": "class", "caption": "a cube", "generate": {"count": 2}}
    for key, value in (
        ("samples", {"prompts": ["a red cube"]}),
        ("data", {**wanted["data"], "sources": [class_images]}),
    ):
        found = components.load(recipes.checked({**wanted, key: value}, "test"), torch.device("meta"))
        assert found.prior.model.language_model.device.type == "meta", key


def test_the_tokens_of_an_image_are_those_of_a_reference(glm_image: Path) -> None:
    pipe = GlmImagePipeline.from_pretrained(glm_image / "glm")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    half = F.interpolate(given, (32, 48), mode="bilinear", antialias=True)
    levels = ((half + 1) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    images = pipe.processor.image_processor([levels], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        features = pipe.vision_language_encoder.get_image_features(images["pixel_values"], images["image_grid_thw"])
        expected = pipe.vision_language_encoder.get_image_tokens(features.pooler_output).view(2, 3)
        found = image_tokens(pipe.vision_language_encoder, pipe.processor, given)
    assert torch.equal(found.view(4, 6), expected.repeat_interleave(2, 0).repeat_interleave(2, 1))
    with pytest.raises(InputError, match="multiples of 32, not 48 x 64"):
        image_tokens(pipe.vision_language_encoder, pipe.processor, torch.zeros(1, 3, 48, 64))


@pytest.mark.parametrize("name", ["finetune", "lora", "dora"])
def test_fine_tuning(name: str, place: Path) -> None:
    improves(name, place)
