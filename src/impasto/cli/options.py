"""Options that several commands have, and checks of their values that need no model."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from ..checks import MAX_GUIDANCE, MAX_IMAGES, MAX_SIDE, MAX_STEPS, finite, whole_number
from ..family import GLM_IMAGE, SIGMA

Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A folder, a hub id, or builtin:scenes.")]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="N", help=f"Denoising steps; {SIGMA.steps} by default, {GLM_IMAGE.steps} for GLM-Image."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        metavar="W",
        help=f"{SIGMA.guidance_scale} by default, {GLM_IMAGE.guidance_scale} for GLM-Image; 1 or less: no guidance.",
    ),
]
Height = Annotated[
    int | None, typer.Option("--height", metavar="PX", help="The model's, or that of --image, if not given.")
]
Width = Annotated[
    int | None, typer.Option("--width", metavar="PX", help="The model's, or that of --image, if not given.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="An adapter, and how strong it is; may be repeated."),
]


class Solver(enum.StrEnum):
    """The values of ``--scheduler``."""

    DPM = "dpm++"
    DDIM = "ddim"
    DDPM = "ddpm"
    LCM = "lcm"


class DType(enum.StrEnum):
    """The values of ``--dtype``."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def check_numbers(
    seed: int | None,
    steps: int | None,
    guidance_scale: float | None,
    batch_size: int | None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Refuse numbers that no model takes."""
    if seed is not None:
        whole_number("--seed", seed, 0, 2**63 - 1)  # torch takes up to 2**64 - 1, which leaves room for seed + i
    if steps is not None:
        whole_number("--steps", steps, most=MAX_STEPS)
    if guidance_scale is not None:
        finite("--guidance-scale", guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE)
    if batch_size is not None:
        whole_number("--batch-size", batch_size, most=MAX_IMAGES)
    for option, side in (("--height", height), ("--width", width)):
        if side is not None:
            whole_number(option, side, most=MAX_SIDE)
