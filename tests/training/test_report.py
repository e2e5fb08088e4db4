"""What the boards of a run show: TensorBoard's files, and what Weights & Biases is told."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from impasto.errors import MissingDependencyError
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from .runs import Of, rows, settings, steps_alone

COLOURS = ((255, 0, 0), (0, 0, 255))


def run(folder: Path, steps: int, **report: Any) -> None:
    """A run that finds two samples of step 4."""
    model = nn.Linear(3, 1)

    def loss(step: int, random: Randomness) -> torch.Tensor:
        return (model(random.normal([8, 3])) - 1).square().mean(1)

    (folder / "samples").mkdir(exist_ok=True)
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (6, 4), colour).save(folder / "samples" / f"step-00000004-{i}.png")
    plan = settings(
        steps, precision="float32", log_every=2, checkpoints={"every": 2}, report={"progress": False, **report}
    )
    train(Of(model, loss), steps_alone(8), plan, folder)


def test_tensorboard_shows_what_the_log_has_and_the_samples(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 6, tensorboard=True, peak_flops=1e9)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {"loss", "norm", "rate", "images_per_second", "skipped"} <= set(found.Tags()["scalars"])
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows(tmp_path)
    ]
    for i, colour in enumerate(COLOURS):
        (event,) = found.Images(f"sample {i}")
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert (event.step, image.size, image.getpixel((0, 0))) == (4, (6, 4), colour)


class Wandb:
    """What Weights & Biases is called with."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **given: Any) -> SimpleNamespace:
        self.begun.append(given)
        return SimpleNamespace(log=lambda what, step: self.logged.append((step, what)), finish=self.finish)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, path: str) -> Any:
        return Image.open(path).getpixel((0, 0))


def test_weights_and_biases_are_told_the_same_and_a_run_that_goes_on_is_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, 4, wandb="a project")
    run(tmp_path, 6, wandb="a project")
    assert [(each["project"], each["resume"]) for each in wandb.begun] == [("a project", "allow")] * 2
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"]
    assert wandb.begun[0]["name"] == "-".join(tmp_path.parts[-2:])
    assert wandb.begun[1]["config"]["steps"] == 6
    assert wandb.finished == 2
    losses = [(step, what["loss"]) for step, what in wandb.logged if "loss" in what]
    assert losses == [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert [(step, what["samples"]) for step, what in wandb.logged if "samples" in what] == [(4, [*COLOURS])]


def test_runs_in_folders_of_the_same_name_are_different_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in (tmp_path / "one" / "runs" / "lora", tmp_path / "two" / "runs" / "lora"):
        folder.mkdir(parents=True)
        run(folder, 2, wandb="a project")
    assert wandb.begun[0]["id"] != wandb.begun[1]["id"]


def test_a_board_that_is_not_installed_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        run(tmp_path, 2, wandb="a project")
