"""``impasto train`` under torchrun, and optimizers of libraries on shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from impasto.errors import ConfigurationError
from impasto.training import checkpoints
from impasto.training.config import OptimizerSettings
from impasto.training.distributed.processes import joined
from impasto.training.loop import train
from impasto.training.optimizers import check_shardable

from ...tiny import write_pipeline
from ..folders import write_images
from ..runs import rows, settings
from .ranks import in_ranks
from .test_two_ranks import Denoise, Fixed


def test_optimizers_that_fail_on_shards_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'prodigy' does not work on parameters that FSDP shards; use one of"):
        check_shardable(OptimizerSettings(name="prodigy"))
    for name in ("adamw", "adamw-8bit", "muon", "came"):
        check_shardable(OptimizerSettings(name=name))  # type: ignore[arg-type]


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


def eight_bits(folder: Path) -> list[float]:
    """Six steps, and from the fourth on once more: the moments that are stored are those in memory."""
    losses = []
    with joined("fsdp") as processes:
        for steps in (6, 3, 6):
            name = "whole" if not losses else "parts"
            plan = settings(steps, optimizer={"name": "adamw-8bit"}, log_every=1, precision="float32", schedule=PLATEAU)
            objective = Denoise()
            objective.encoder = torch.nn.Linear(32, 32).requires_grad_(False)
            torch.nn.init.eye_(objective.encoder.weight)
            torch.nn.init.zeros_(objective.encoder.bias)
            train(objective, Fixed(), plan, folder / name, processes=processes)
            losses = [row["loss"] for row in rows(folder / name)]
        return losses


PLATEAU: dict[str, Any] = {"kind": "constant", "warmup": 2}


@pytest.mark.slow
def test_eight_bit_moments_of_shards_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    found = in_ranks(eight_bits, tmp_path / "results", tmp_path)
    assert found[0] == found[1]
    assert [row["loss"] for row in rows(tmp_path / "whole")] == found[0]
