"""``impasto cache``: encode the data of a configuration once, for many runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import MAX_IMAGES, shown, whole_number
from ..errors import InputError
from . import pipelines
from .entry import say
from .train import OWN_SOURCES, Changes


def cache(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="As for impasto train.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the cache.")],
    changes: Changes = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="The part of this process, of several that run at once: 1/4 to 4/4.")
    ] = "1/1",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of the stored tensors: float32, bfloat16, float16.")] = (
        "float32"
    ),
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 8,
    threads: Annotated[int, typer.Option(metavar="N", help="That read images ahead.")] = 4,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cuda by default, else cpu.")] = None,
    latents_only: Annotated[
        bool, typer.Option("--latents-only", help="Leave out features of captions: the text encoder is trained.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster ('auto', or local: start one).")
    ] = None,
    actors: Annotated[int, typer.Option(metavar="N", help="With --ray: processes with a model.")] = 1,
) -> None:
    """Encode the images and captions of CONFIG's data into OUT. Run it again after an interruption.

    Then train with --set data.sources.0.kind=cache --set data.sources.0.path=OUT.
    """
    whole_number("--batch-size", batch_size, most=MAX_IMAGES)
    whole_number("--threads", threads, most=256)
    whole_number("--actors", actors, most=10_000)
    part = read_part(shard)

    from ..training.settings import recipe_files

    configuration = recipe_files.read(config, changes or [])
    options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "threads": threads, "texts": not latents_only}
    if ray is not None:
        if part != (1, 1):
            raise InputError("--shard and --ray contradict each other: Ray divides the work itself")
        from ..training.jobs.on_ray import run_on_ray

        counts = run_on_ray(ray, actors, configuration, out, OWN_SOURCES, device, options)
        say(f"{out}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
        return

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..training.jobs.cache import run
    from ..training.jobs.from_configuration import cache_jobs, generate_lacking

    chosen = pipelines.choose_device(device)
    if part == (1, 1):
        generate_lacking(configuration, chosen)
    for job in cache_jobs(configuration, out, OWN_SOURCES, chosen, **options):
        with tqdm(total=job.samples(job.missing(part)), unit="sample", disable=None, leave=False) as progress:
            counts = run(job, part, progress.update)
        chunks = f"chunks: {counts['skipped']} skipped, {counts['written']} written"
        say(f"{job.folder}: {job.settings.samples} samples ({chunks}; {counts['broken']} broken samples)")


def read_part(text: str) -> tuple[int, int]:
    """``--shard I/N``."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be like 1/4, from 1/N to N/N, not {shown(text)}")
    return int(match[1]), int(match[2])
