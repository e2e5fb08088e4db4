"""The command line, assembled. Heavy imports are inside the commands, after the checks that do not need them."""

from __future__ import annotations

from typing import Annotated

import typer

from . import batch, cache, caption, convert, evaluate, generate, info, pipelines, serve, train
from .entry import Commands, say

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(info.info)
app.command()(evaluate.evaluate)
app.command()(convert.convert)
app.command()(train.train)
app.command()(cache.cache)
app.command()(caption.caption)
app.command()(serve.serve)
app.command()(batch.batch)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(pipelines.version())
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate images from text with the PixArt and GLM-Image diffusion transformers."""
