"""``impasto caption``: dense captions of a folder of images, by a vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checks import MAX_CHARACTERS, MAX_IMAGES, text, whole_number
from . import pipelines
from .entry import say
from .options import DType


def caption(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images.")],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A vision-language model: a folder or hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is asked.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="The longest caption.")] = 300,
    field: Annotated[str, typer.Option(metavar="NAME", help="The field of metadata.jsonl.")] = "dense",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Caption images that have one, too.")] = False,
    mask_suffix: Annotated[str | None, typer.Option(metavar="TEXT", help="Files whose names end so are masks.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 4,
    max_broken: Annotated[
        float, typer.Option(metavar="X", help="Below 1 a share of the images, else a number.")
    ] = 0.01,
    dtype: Annotated[DType, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = DType.AUTO,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; cuda by default, else cpu.")
    ] = None,
) -> None:
    """Write a dense caption of each image of FOLDER into its metadata.jsonl. Run it again after an interruption."""
    whole_number("--batch-size", batch_size, most=MAX_IMAGES)
    whole_number("--max-tokens", max_tokens, most=4096)

    from ..training.data.captions import LONG_FIELDS, SHORT_FIELDS
    from ..training.jobs.caption import PROMPT, Captioner, caption_folder, records_of

    if field not in (*LONG_FIELDS, *SHORT_FIELDS):
        raise typer.BadParameter(f"--field must be one of {', '.join((*LONG_FIELDS, *SHORT_FIELDS))}")
    prompt = text("--prompt", PROMPT if prompt is None else prompt, MAX_CHARACTERS)
    count = len(records_of(folder, mask_suffix))

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..checkpoints import hub
    from ..checkpoints.foreign.vision_language import load_vision_language

    chosen = pipelines.choose_device(device)
    loaded = load_vision_language(hub.resolve(model), pipelines.choose_dtype(dtype, chosen), chosen)
    settings = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
    with tqdm(total=count, unit="image", disable=None, leave=False) as progress:
        counts = caption_folder(
            folder,
            Captioner(*loaded, prompt, max_tokens),
            settings=settings,
            field=field,
            overwrite=overwrite,
            mask_suffix=mask_suffix,
            batch_size=batch_size,
            max_broken=max_broken,
            done=progress.update,
        )
    say(f"{folder / 'metadata.jsonl'}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
