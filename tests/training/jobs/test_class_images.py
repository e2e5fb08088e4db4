"""Images of a class: those that are missing are generated, each from its own seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from impasto.errors import InputError
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.pipelines.glm_image import GlmImagePipeline
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from impasto.training.jobs.class_images import generate_class_images

from ...tiny import tiny_pipeline
from ...tiny_glm import SCHEDULER, TRANSFORMER, VAE, prior_parts, text_parts


def test_missing_images_are_generated_and_others_are_kept(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)

    def run(folder: str, count: int, **options: int) -> int:
        options = {"steps": 1, "batch_size": 2, **options}
        return generate_class_images(pipe, "a dog", tmp_path / folder, count, size=(16, 16), **options)  # type: ignore[arg-type]

    assert run("all", 3) == 3
    pixels = {path.name: Image.open(path).tobytes() for path in (tmp_path / "all").iterdir()}
    assert sorted(pixels) == ["class_00000.png", "class_00001.png", "class_00002.png"]
    assert len(set(pixels.values())) == 3
    assert run("all", 3) == 0
    (tmp_path / "all" / "class_00001.png").unlink()  # as if the job had been stopped
    assert run("all", 3) == 1
    assert Image.open(tmp_path / "all" / "class_00001.png").tobytes() == pixels["class_00001.png"]

    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / "own.jpg")
    assert run("mixed", 3, world=2) == 1
    assert run("mixed", 3, rank=1, world=2) == 1
    assert sorted(path.name for path in (tmp_path / "mixed").iterdir()) == [*sorted(pixels)[:2], "own.jpg"]
    with pytest.raises(InputError, match="prompt"):
        generate_class_images(pipe, " ", tmp_path, 1, size=(16, 16))
    with pytest.raises(InputError, match="count"):
        run("all", 0)


def test_glm_image_generates_class_images_too(tmp_path: Path) -> None:
    parts = {**text_parts(), **prior_parts(), "vae": AutoencoderKL(**VAE)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe = GlmImagePipeline(transformer=GlmImageTransformer2DModel(**TRANSFORMER).eval(), **parts)
    pipe.set_progress_bar_config(disable=True)
    assert generate_class_images(pipe, "a dog", tmp_path, 2, size=(64, 32), steps=1) == 2
    assert [Image.open(path).size for path in tmp_path.iterdir()] == [(32, 64)] * 2
