"""Training on two processes is the same run as on one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.training.data.sample import Batch, Sample, cuts
from impasto.training.distributed.processes import ALONE, Processes, joined
from impasto.training.launch import launch
from impasto.training.objectives.base import Loss, Objective
from impasto.training.objectives.diffusion_loss import DiffusionLoss
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness
from impasto.training.settings import recipe_files

from ...tiny import tiny_transformer, write_pipeline
from ..folders import write_images
from ..runs import rows, settings
from .ranks import in_ranks


class Denoise(Objective):
    """The denoising loss of latents and text features, with a head that some batches leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = tiny_transformer()
        self.loss = DiffusionLoss(torch.linspace(1e-4, 0.02, 1000))
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.head = nn.Linear(32, 1)
            self.encoder = nn.Linear(32, 32)
        self.freeze(self.encoder)

    @property
    def blocks(self) -> Any:
        return self.transformer.transformer_blocks

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        x0 = torch.stack([sample.extra["latents"] for sample in batch.samples])
        text = self.encoder(torch.stack([sample.extra["text"] for sample in batch.samples]))
        t = random.integers(1000, [len(x0)])
        noise = random.normal(x0.shape)
        xt = self.loss.add_noise(x0, noise, t)
        output = self.transformer(xt, self.transformer.encode_context(text), self.transformer.modulate(t)).sample
        each = self.loss(output, x0, noise, xt, t).mse
        if batch.step % 2:
            each = each + self.head(text).square().mean((1, 2))
        return Loss(each, {"t": t.float()})


class Fixed:
    """Batches of 5, 3 and 1 samples, of different weights."""

    def batch(self, step: int, rank: int, world: int) -> Batch:
        count = (5, 3, 1)[step % 3]
        edges = cuts([1] * count, world)
        start, end = edges[rank : rank + 2]
        largest = max(b - a for a, b in itertools.pairwise(edges))
        samples = [self.sample(step, i) for i in range(start, end)]
        if not samples:
            samples = [self.sample(step, 0)]
            samples[0].weight = 0.0
        return Batch(samples, start, count, step, largest)

    def sample(self, step: int, place: int) -> Sample:
        generator = torch.Generator().manual_seed(100 * step + place)
        extra = {"latents": torch.randn(4, 4, 4, generator=generator), "text": torch.randn(3, 32, generator=generator)}
        return Sample(weight=1.0 + place, extra=extra)


STEPS = 20
LAUNCHED = ("launched alone", "launched by two")


def run(folder: Path, processes: Processes = ALONE, steps: int = STEPS, **changes: Any) -> dict[str, Tensor]:
    objective = Denoise()
    given: dict[str, Any] = {
        "optimizer": {"name": "adamw"},
        "ema": 0.9,
        "log_every": 1,
        "checkpoints": {"every": 7},
        "clip": 0.5,
        "precision": "float32",
        "schedule": {"kind": "constant"},
    }
    checked: dict[str, float] = {}

    def check(step: int) -> dict[str, float]:
        x = torch.ones(1, 4, 4, 4)
        out = objective.transformer(x, torch.ones(1, 2, 32), torch.tensor([500])).sample
        checked[str(step)] = float(out.square().mean())
        return {"check": checked[str(step)]}

    train(objective, Fixed(), settings(steps, **{**given, "micro_batch": 2, **changes}), folder, check, processes)
    return {name: p.detach() for name, p in objective.named_parameters()} if processes.is_main else {}


def configuration(folder: Path, **changes: Any) -> Any:
    """A pipeline on a folder of images, of which the last batch of an epoch has one."""
    data = {"sources": [{"path": str(folder / "images")}], "batch_size": 3, "sizes": [[16, 16]]}
    content = {
        "steps": 6,
        "models": {"pipeline": str(folder / "pipeline")},
        "optimizer": {"name": "came"},
        "precision": "float32",
        "log_every": 1,
        "checkpoints": {"every": 3, "best": "validation"},
        "validation": {"count": 2},
        "samples": {"prompts": ["a red cube"], "steps": 1},
        "parallel": "hsdp",
        "hsdp_shards": 2,
        "data": data,
    }
    return recipe_files.checked({**content, **changes}, "test")


BFLOAT16: dict[str, Any] = {
    "precision": "bfloat16",
    "parallel": "ddp",
    "optimizer": {"name": "adamw"},
    "samples": None,
    "steps": 5,
}


def packed(folder: Path) -> dict[str, Any]:
    """Batches of squares and of images that are twice as wide."""
    data = {"sources": [{"path": str(folder / "mixed")}], "batch_size": 1, "sizes": [[16, 16], [16, 32]]}
    return {**BFLOAT16, "precision": "float32", "data": {**data, "pack_pixels": 1100}}


def work(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"stopped": launch(configuration(folder), folder / "launched by two")}
    launch(configuration(folder, **BFLOAT16), folder / "bfloat16 by two")
    launch(configuration(folder, **packed(folder)), folder / "packed by two")
    with joined() as processes:
        for kind in ("ddp", "fsdp"):
            processes.parallel = kind  # type: ignore[assignment]
            found[kind] = run(folder / kind, processes)
        run(folder / "went on by two", processes)  # from the checkpoint that one process wrote
        processes.parallel = "fsdp"
        run(folder / "begun by two", processes, steps=7)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    return run(folder / "alone")


@pytest.fixture(scope="module")
def found(folder: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    run(folder / "went on by two", steps=7)
    write_pipeline(folder / "pipeline")
    write_images(folder / "images", 7)
    for i, path in enumerate(sorted(write_images(folder / "mixed", 9).glob("*.png"))):
        if i % 2:
            Image.open(path).resize((32, 16)).save(path)
    found: dict[str, Any] = in_ranks(work, folder / "results", folder)[0]
    return found


def compare(folder: Path, name: str, expected: str = "alone", steps: int = STEPS) -> None:
    logs = [rows(folder / each) for each in (expected, name)]
    assert [row["step"] for row in logs[1]] == list(range(1, steps + 1))
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "images_per_second", "utilization"}:
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (key, one["step"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(
    kind: str, folder: Path, found: dict[str, Any], expected: dict[str, Tensor]
) -> None:
    compare(folder, kind)
    assert found[kind].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[kind][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_two_ranks_go_on_where_one_process_was(folder: Path, found: dict[str, Any]) -> None:
    compare(folder, "went on by two")


def test_one_process_goes_on_where_two_ranks_were(folder: Path, found: dict[str, Any]) -> None:
    run(folder / "begun by two")
    compare(folder, "begun by two")


def test_a_configured_run_of_two_ranks_ends_in_the_same_pipeline(folder: Path, found: dict[str, Any]) -> None:
    assert found["stopped"] is None
    launch(configuration(folder), folder / "launched alone")
    compare(folder, "launched by two", "launched alone", 6)
    models = [PixArtTransformer2DModel.from_pretrained(folder / name / "result" / "transformer") for name in LAUNCHED]
    for name, one in models[0].state_dict().items():
        if not name.endswith("to_k.bias"):  # it has no effect: its gradients are rounding errors, which CAME scales up
            torch.testing.assert_close(models[1].state_dict()[name], one, rtol=1e-3, atol=1e-4, msg=name)
    images = [sorted(path.name for path in (folder / name / "samples").iterdir()) for name in LAUNCHED]
    assert images[0] == images[1] != []


def test_gradients_are_summed_in_bfloat16_too_before_and_after_a_check(folder: Path, found: dict[str, Any]) -> None:
    launch(configuration(folder, **BFLOAT16), folder / "bfloat16 alone")
    norms = [[row["norm"] for row in rows(folder / f"bfloat16 {name}")] for name in ("alone", "by two")]
    assert len(norms[0]) == 5
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_batches_of_several_sizes_are_divided_too(folder: Path, found: dict[str, Any]) -> None:
    launch(configuration(folder, **packed(folder)), folder / "packed alone")
    compare(folder, "packed by two", "packed alone", 5)
