"""``impasto train`` on the command line."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from impasto import cli
from impasto.training import launch as launching


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_recipes_are_listed_a_line_each() -> None:
    outcome = call("train", "--list")
    assert outcome.exit_code == 0
    names = [line.split()[0] for line in outcome.stdout.splitlines()]
    assert names == sorted(names)
    assert {"lora", "finetune", "pixart-sigma-256", "glm-image"} <= set(names)


def test_settings_are_printed_and_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(launching, "launch", lambda *arguments: given.append(arguments))
    outcome = call("train", "lora", "--set", "optimizer.rate=3e-5", "--output", tmp_path, "--resume")
    assert outcome.exit_code == 0
    assert "  rate: 3.0e-05" in outcome.stdout
    configuration, folder, resume, sources, checks = given[0]
    assert (configuration.optimizer.rate, folder, resume) == (3e-5, tmp_path, True)
    assert list(sources) == list(checks) == ["scenes"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_ended_has_its_exit_status(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launching, "launch", lambda *arguments: int(number))
    outcome = call("train", "lora", "--output", tmp_path)
    assert outcome.exit_code == status
    assert outcome.stderr.endswith(f"impasto train {tmp_path}/configuration.yaml --output {tmp_path} --resume\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a configuration"),
        (["loar"], "(impasto train --list); did you mean 'lora'?"),
        (["lora", "--set", "optimizer.lr=1"], "optimizer: there is no 'lr' here"),
        (["lora", "--set", "steps"], "write it as a.b=value"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    outcome = call("train", *arguments)
    assert outcome.exit_code == 1
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
