"""``impasto train``: train or fine-tune a model as a configuration describes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..memory.allocator import keep_freed_memory
from .entry import say

Config = Annotated[str | None, typer.Argument(metavar="CONFIG", help="A .yaml file, or a recipe of --list.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a setting. May be repeated.")]
Output = Annotated[Path | None, typer.Option(metavar="FOLDER", help="The run's folder; runs/CONFIG by default.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint, if there is one.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show data, memory and time, from two steps of which nothing is kept.")
]
List = Annotated[bool, typer.Option("--list", help="List the recipes.")]


def train(
    config: Config = None,
    changes: Changes = None,
    output: Output = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    list_recipes: List = False,
) -> None:
    """Train what CONFIG describes."""
    from ..training.settings import recipe_files as recipes

    if list_recipes:
        found = recipes.recipes()
        width = max(map(len, found), default=0)
        say("\n".join(f"{name:{width}}  {line}" for name, line in found.items()))
        return
    if config is None:
        raise InputError("name a configuration: a .yaml file, or a recipe (impasto train --list)")
    configuration = recipes.read(config, changes or [])
    folder = output or Path(configuration.output or f"runs/{Path(config).stem}")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun has started
    if first:
        say(recipes.text_of(configuration).rstrip())

    from ..training.launch import launch, preview

    if dry_run:
        say(preview(configuration, folder, OWN_SOURCES, CHECKS))
        return
    if first:
        say(f"the run is in {folder}: log.jsonl has its progress")
    keep_freed_memory()
    stopped = launch(configuration, folder, resume, OWN_SOURCES, CHECKS)
    if stopped is not None:
        again = ["impasto", "train", str(folder / "configuration.yaml"), "--output", str(folder), "--resume"]
        say(f"ended by a signal; it goes on with: {shlex.join(again)}", error=True)
        raise typer.Exit(128 + stopped)
    if first:
        say(f"the result is {folder / 'result'}")


def _scenes(options: dict[str, Any]) -> Any:
    """The source ``scenes``: rendered images of the bundled model's small world."""
    from ..scenes.source import ScenesSource

    try:
        return ScenesSource(**options)
    except TypeError as error:
        raise InputError(f"the options of a source of scenes: {error}") from error


#: Kinds of sources that this program adds to those of training.
OWN_SOURCES = {"scenes": _scenes}


def _check_scenes(pipe: Any, options: dict[str, Any]) -> Mapping[str, float]:
    """The check ``scenes``: how well a pipeline follows prompts of that world."""
    from ..scenes.check import check_pipeline

    return check_pipeline(pipe, options)


#: Checks that this program adds.
CHECKS = {"scenes": _check_scenes}
