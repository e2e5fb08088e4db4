"""``impasto evaluate``: how well a model follows prompts that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import MAX_IMAGES, whole_number
from ..errors import OutputError
from ..family import family_of
from . import pipelines
from .entry import say
from .options import DType, Guidance, Model, Steps, check_numbers

if TYPE_CHECKING:
    from PIL import Image


def evaluate(
    model: Model = "builtin:scenes",
    n: Annotated[
        int, typer.Option("--n", metavar="N", help="Number of prompts; half of them were never trained.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts and of the first image.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 16,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers and verdicts as JSON.")] = None,
) -> None:
    """Print how well MODEL follows held-out prompts."""
    whole_number("--n", n, most=MAX_IMAGES)
    check_numbers(seed, steps, guidance_scale, batch_size)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"{output} cannot be written: name a file in an existing folder")
    _, class_name = pipelines.resolve(model)

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..checkpoints.config import write_json
    from ..scenes.evaluate import evaluate as judge

    family = family_of(class_name)
    steps = family.steps if steps is None else steps
    guidance_scale = family.guidance_scale if guidance_scale is None else guidance_scale
    device = pipelines.choose_device(None)
    pipe = pipelines.load(model, class_name, device, pipelines.choose_dtype(DType.FLOAT32, device))
    pipe.set_progress_bar_config(disable=True)
    done = 0
    with tqdm(total=n, unit="image", disable=None, leave=False) as progress:

        def generate_batch(prompts: list[str]) -> list[Image.Image]:
            nonlocal done
            options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            images = pipelines.run(pipe, prompts, seed + done, **options)
            done += len(images)
            progress.update(len(images))
            return images

        report = judge(generate_batch, n, seed, batch_size)
    if output is not None:
        settings = {"model": model, "n": n, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        write_json(output, {"settings": {**settings, "version": pipelines.version()}, **report.to_dict()})
    say(report.table())
