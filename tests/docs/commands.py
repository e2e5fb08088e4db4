"""Commands in the documentation: that programs, options, files, targets and extras exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from typing import Any

import typer

from impasto.cli import app
from impasto.cli.entry import UsageError

from .names import Checker
from .pages import ROOT

#: Programs of others, whose arguments are not checked.
FOREIGN = (
    "curl",
    "docker",
    "podman",
    "kubectl",
    "systemctl",
    "journalctl",
    "sudo",
    "ray",
    "node",
    "serve",
    "cd",
    "kill",
    "jq",
)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block. Continued lines are joined; comments, prompts and outputs are left out."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):  # a console: the other lines are output
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def problem_with(words: list[str], inline: bool = False) -> str | None:
    """Why a command does not work, if that can be seen without running it.

    Args:
        inline: it stands in a sentence, where only the names of options count.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if inline:
        words = [word.strip("[]") for word in words if word not in ("...", "…")]
    program, *rest = words
    program = program.removeprefix(".venv/bin/").removeprefix("$(BIN)/")
    if program in ("torchrun", "srun"):
        if "-m" not in rest:
            return None if program == "torchrun" and inline else f"{program} starts no module"
        program, rest = "python", rest[rest.index("-m") :]
    if program == "python":
        return _python(rest)
    if program == "impasto":
        return _impasto(rest, inline)
    if program in ("pip", "npm"):
        return _pip(rest)
    if program == "make":
        return _make(rest)
    if program == "pytest":
        missing = [each for each in rest if each.startswith("tests/") and not (ROOT / each.split("::")[0]).exists()]
        return f"there is no {missing[0]}" if missing else None
    if program in FOREIGN or program in ("pre-commit", ".ci/run"):
        return None
    return f"the program {program!r} is not known here"


def _impasto(arguments: list[str], inline: bool) -> str | None:
    group: Any = typer.main.get_command(app)
    while arguments[:1] == ["--debug"]:
        arguments = arguments[1:]
    try:
        if not arguments or arguments[0].startswith("-"):
            group.make_context("impasto", list(arguments))
            return None
        name, *rest = arguments
        command = group.get_command(None, name)
        if command is None:
            return None if name == "COMMAND" else f"there is no command {name!r}"
        if inline:
            known = [option for each in command.params for option in each.opts] + ["--help"]
            unknown = [each for each in rest if each.startswith("--") and each.split("=")[0] not in known]
            return f"impasto {name} has no option {unknown[0]}" if unknown else None
        command.make_context(name, rest)
    except typer.Exit:
        return None  # --help and --version
    except UsageError as error:
        return str(error.format_message())
    return None


def _python(arguments: list[str]) -> str | None:
    if arguments[:1] == ["-c"]:
        return "; ".join(Checker().check(arguments[1])) or None
    if arguments[:1] == ["-m"]:
        return _impasto(arguments[2:], inline=False) if arguments[1] == "impasto" else None
    script = ROOT / arguments[0]
    source = script / "__main__.py" if script.is_dir() else script
    if not source.is_file():
        return f"there is no {arguments[0]}"
    shared = [ROOT / "benchmarks" / "measure.py"] if source.parent.name == "benchmarks" else []
    text = "".join(each.read_text(encoding="utf-8") for each in (source, *shared))
    for word in arguments[1:]:
        option = word.split("=")[0]
        if option.startswith("--") and option != "--help" and f'"{option}"' not in text:
            return f"{arguments[0]} has no option {option}"
    return None


def _pip(arguments: list[str]) -> str | None:
    for extra in re.findall(r"(?:impasto|\.)\[([\w,-]+)\]", " ".join(arguments)):
        for name in extra.split(","):
            if name not in _project()["optional-dependencies"]:
                return f"there is no extra {name!r}"
    return None


def _make(arguments: list[str]) -> str | None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing = [each for each in arguments if "=" not in each and each not in targets]
    return f"make has no target {missing[0]!r}" if missing else None


@cache
def _project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return content
