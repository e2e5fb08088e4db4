"""Images of a class: those that are missing are generated, each from its own seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from impasto.errors import InputError
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.jobs.class_images import generate_class_images

from ...tiny import tiny_pipeline


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
