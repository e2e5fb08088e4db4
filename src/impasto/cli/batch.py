"""``impasto batch``: thousands of prompts from a file."""

from __future__ import annotations

import enum
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..checks import MAX_IMAGES, parse_size, whole_number
from ..errors import InputError, ResourceError
from .cache import read_part
from .entry import say
from .options import DType, Guidance, Model, Steps, check_numbers


class Format(enum.StrEnum):
    """The values of ``--format``."""

    FOLDER = "folder"
    WEBDATASET = "webdataset"


class Table(enum.StrEnum):
    """The values of ``--manifest``."""

    JSONL = "jsonl"
    PARQUET = "parquet"


def batch(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.jsonl", help="A JSON object in each line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the images and of the manifest.")],
    model: Model = "builtin:scenes",
    format: Annotated[
        Format, typer.Option("--format", metavar="NAME", help="folder: image files; or webdataset: tar shards.")
    ] = Format.FOLDER,
    manifest: Annotated[
        Table, typer.Option("--manifest", metavar="NAME", help="jsonl; or parquet: that, too, at the end.")
    ] = Table.JSONL,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="The part of this process, of several that run at once: 1/4 to 4/4.")
    ] = "1/1",
    seed: Annotated[int, typer.Option(metavar="N", help="Record i has the seed N + i if it has none.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images in work at once.")] = 16,
    samples: Annotated[int, typer.Option("--shard-size", metavar="N", help="Images in a tar shard.")] = 1000,
    max_errors: Annotated[int, typer.Option(metavar="N", help="Stop once more images than this have failed.")] = 100,
    dtype: Annotated[
        DType, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")
    ] = DType.AUTO,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cuda by default, else cpu.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 8GB: choose dtypes and placement to fit.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster ('auto', or local: start one).")
    ] = None,
    actors: Annotated[int, typer.Option(metavar="N", help="With --ray: processes with a model, at most.")] = 1,
) -> None:
    """Generate an image for each record of PROMPTS.jsonl. Run it again after an interruption.

    The exit status is 0 only if each record has its image.

    A record has a prompt, and if need be: id, negative_prompt, size ("WxH") or width and height, num_inference_steps,
    guidance_scale, seed, scheduler, lora, and image, mask and strength for edits.
    """
    check_numbers(seed, steps, guidance_scale, batch_size)
    whole_number("--shard-size", samples, most=1_000_000)
    whole_number("--max-errors", max_errors, 0)
    whole_number("--actors", actors, most=MAX_IMAGES)
    part = read_part(shard)
    if ray is not None and part != (1, 1):
        raise InputError("--shard and --ray contradict each other: Ray divides the work itself")
    budget = None if memory_budget is None else parse_size(memory_budget)

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..nn.machine import as_device
    from ..serving.batch import run as batches
    from ..serving.batch.manifest import Manifest, require_parquet
    from ..serving.batch.outputs import Folders, Shards
    from ..serving.batch.records import Options, read_records
    from ..serving.engine.spec import EngineSpec
    from ..serving.served import MOST_PIXELS, look_at
    from . import pipelines

    if manifest is Table.PARQUET:
        require_parquet()
    # The device is one of the cluster's, which this machine may lack.
    chosen = pipelines.choose_device(device) if ray is None or device is None else as_device(device)
    precision = None if dtype is DType.AUTO else dtype.value
    path = os.path.abspath(model) if os.path.exists(model) else model  # actors have another working folder
    inspected = look_at(model, path, chosen, precision, budget)
    # Without a budget: what is free now must not decide which records are accepted. Images that do not fit fail alone.
    served = inspected.served if budget is not None else replace(inspected.served, most_pixels=MOST_PIXELS)
    options = Options(seed, steps, guidance_scale)
    records = batches.part_of(batches.in_order(read_records(prompts, served, options)), part)
    spec = EngineSpec(
        model,
        inspected.path,
        inspected.class_name,
        device,
        precision,
        budget,
        limited=budget is not None,
        seconds=1.0,
        most_running=batch_size,
    )
    identity = f"{path} {dtype.value}"
    with batches.Alone(out, part):
        lines = Manifest(out, part)
        left = batches.missing(records, lines, identity, (Shards if format is Format.WEBDATASET else Folders).place)
        output = Shards(out, part, lines.own(), samples) if format is Format.WEBDATASET else Folders(out)
        counts = batches.Counts()
        if left:
            if ray is not None:
                from ..serving.batch.on_ray import by_ray

                generate = by_ray(ray, actors, spec, served.scheduler)
            else:
                from ..serving.batch.generate import by_engine
                from ..serving.engine.program import make_engine

                generate = by_engine(make_engine(spec), model, served.scheduler, batch_size, within_budget=spec.limited)
            with tqdm(total=len(left), unit="image", disable=None, leave=False) as progress:
                counts = batches.run(
                    left, generate, output, lines, identity, max_errors=max_errors, done=progress.update
                )
        else:
            output.close()
        if manifest is Table.PARQUET:
            lines.write_parquet()
    for fault in counts.faults[:5]:
        say(f"failed: {fault}", error=True)
    skipped = len(records) - len(left)
    say(f"{out}: {counts.generated} generated, {skipped} skipped, {counts.failed} failed")
    if counts.failed:
        count = f"{counts.failed} of {len(records)}"
        raise ResourceError(f"{count} images could not be generated; run the same command to try them again")
