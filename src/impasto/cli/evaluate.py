"""``impasto evaluate``: how well a model follows prompts that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import MAX_IMAGES, whole_number
from ..errors import OutputError
from ..family import GLM_IMAGE, family_of
from ..memory.allocator import keep_freed_memory
from . import pipelines
from .entry import say
from .options import DType, Guidance, Lora, Model, Steps, check_numbers

if TYPE_CHECKING:
    from PIL import Image


def evaluate(
    model: Model = "builtin:scenes",
    n: Annotated[int, typer.Option("--n", metavar="N", help="Number of prompts.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts and of the first image.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Annotated[int | None, typer.Option(metavar="PX", help="The model's if not given.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PX", help="The model's if not given.")] = None,
    lora: Lora = None,
    adapter_words: Annotated[
        bool, typer.Option("--adapter-words", help="Prompts with the dome and cyan, which only adapters know.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 16,
    dtype: Annotated[DType, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = DType.FLOAT32,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers and verdicts as JSON.")] = None,
) -> None:
    """Print how well MODEL follows held-out prompts; half of them have combinations that were never trained."""
    whole_number("--n", n, most=MAX_IMAGES)
    check_numbers(seed, steps, guidance_scale, batch_size, height, width)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"{output} cannot be written: name a file in an existing folder")
    _, class_name = pipelines.resolve(model)

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..checkpoints.config import write_json
    from ..scenes.evaluate import adapter_prompts, held_out_prompts
    from ..scenes.evaluate import evaluate as judge

    family = family_of(class_name)
    adapters, defaults = pipelines.choose_adapters(lora or [])
    steps, guidance_scale = defaults.numbers(family, steps, guidance_scale)
    solver = None if family is GLM_IMAGE else pipelines.solver_of(defaults.scheduler)
    device = pipelines.choose_device(None)
    keep_freed_memory()
    pipe = pipelines.load(model, class_name, device, pipelines.choose_dtype(dtype, device), solver)
    pipelines.apply(pipe, adapters)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    done = 0
    with tqdm(total=n, unit="image", disable=None, leave=False) as progress:

        def generate_batch(prompts: list[str]) -> list[Image.Image]:
            nonlocal done
            images = pipelines.run(pipe, prompts, seed + done, **options)
            done += len(images)
            progress.update(len(images))
            return images

        prompts = adapter_prompts if adapter_words else held_out_prompts
        report = judge(generate_batch, n, seed, batch_size, sample=prompts)
    if output is not None:
        settings = {"model": model, "lora": lora or [], "adapter_words": adapter_words, "n": n, "seed": seed}
        settings |= {**options, "scheduler": pipelines.solver_name(pipe.scheduler), "dtype": str(pipe.dtype)}
        write_json(output, {"settings": {**settings, "version": pipelines.version()}, **report.to_dict()})
    say(report.table())
