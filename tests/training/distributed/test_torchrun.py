"""``impasto train`` under torchrun, and optimizers of libraries on shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from impasto.errors import ConfigurationError
from impasto.training.data.sample import Batch
from impasto.training.distributed.parallel import chosen
from impasto.training.distributed.processes import Processes, joined
from impasto.training.objectives.base import Loss, Objective
from impasto.training.optimizers import check_shardable
from impasto.training.running import checkpoints
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import OptimizerSettings

from ...tiny import write_pipeline
from ..folders import write_images
from ..runs import rows, settings
from .ranks import in_ranks
from .test_survival import Data


def test_optimizers_that_fail_on_shards_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'prodigy' does not work on parameters that FSDP shards; use one of"):
        check_shardable(OptimizerSettings(name="prodigy"))
    for name in ("adamw", "adamw-8bit", "muon", "came"):
        check_shardable(OptimizerSettings(name=name))  # type: ignore[arg-type]


def test_an_objective_that_holds_other_values_in_its_parameters_is_not_sharded() -> None:
    objective = Matrix()
    objective.unshardable = "it holds other values in its parameters"
    assert chosen(objective, Processes(0, 2, parallel="auto")) == "ddp"
    with pytest.raises(
        ConfigurationError,
        match="Matrix cannot be sharded, as it holds other values in its parameters; set parallel: ddp",
    ):
        chosen(objective, Processes(0, 2, parallel="hsdp"))
    assert chosen(Matrix(), Processes(0, 2, parallel="hsdp")) == "hsdp"


def torchrun(config: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "impasto"]
    command += ["train", str(config), "--output", str(output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.cluster
def test_a_run_that_is_told_to_end_goes_on_with_torchrun_and_alone(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline")
    data = {"sources": [{"path": str(write_images(tmp_path / "images", 8))}], "batch_size": 3, "sizes": [[16, 16]]}
    content = {"steps": 100_000, "models": {"pipeline": str(tmp_path / "pipeline")}, "data": data, "parallel": "fsdp"}
    config, output = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump({**content, "log_every": 1, "precision": "float32"}))
    process = torchrun(config, output)
    while process.poll() is None and not (output / "log.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0, text
    (saved,) = checkpoints.found(output)
    again = ["--resume", "--set", f"steps={saved + 3}"]
    process = torchrun(config, output, *again)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert [row["step"] for row in rows(output)] == list(range(1, saved + 4))
    assert (output / "result").is_dir()
    command = [sys.executable, "-m", "impasto", "train", str(config), "--output", str(output), "--resume"]
    subprocess.run([*command, "--set", f"steps={saved + 5}"], check=True, timeout=120, capture_output=True)
    assert [row["step"] for row in rows(output)] == list(range(1, saved + 6))


class Matrix(Objective):
    """A matrix large enough for moments of 8 bits on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 128 * 64).view(128, 64))

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        return Loss((self.weight * random.normal([len(batch), 128, 64])).square().mean((1, 2)))


def eight_bits(folder: Path) -> list[list[float]]:
    """The losses of six steps, of which the last three are run once more from a checkpoint."""
    losses = []
    with joined("fsdp") as processes:
        for steps, name in ((6, "whole"), (3, "parts"), (6, "parts")):
            schedule = {"kind": "constant", "warmup": 1}
            optimizer = {"name": "adamw-8bit", "rate": 0.1}
            given = {"optimizer": optimizer, "schedule": schedule, "checkpoints": {"every": 3}}
            plan = settings(steps, log_every=1, precision="float32", **given)
            train(Matrix(), Data(), plan, folder / name, processes=processes)
            losses.append([row["loss"] for row in rows(folder / name)])
    return losses


@pytest.mark.slow
def test_eight_bit_moments_of_shards_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    for whole, _, parts in in_ranks(eight_bits, tmp_path / "results", tmp_path, seconds=300):
        assert whole[5] < 0.7 * whole[0]
        assert parts == whole
