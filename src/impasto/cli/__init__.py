"""The command line: thin commands. What is heavy is imported inside them, after what can be checked without it."""

from __future__ import annotations

import enum
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import finite, shown, text, whole_number
from ..errors import CheckpointError, InputError, OutputError, ResourceError
from ..files import make_folder
from ..memory.inspection import image_size, inspect_model, read_configs, resolve_pipeline
from ..pipelines import limits
from .describe import GLM_IMAGE, describe
from .entry import Commands, say
from .places import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from .places import plan_files

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..memory.plan import Budget

PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", GLM_IMAGE)
#: Steps and guidance where they are not given.
USUAL: dict[str, tuple[int, float]] = {GLM_IMAGE: (50, 1.5)}
USUAL_OTHERWISE = (20, 4.5)


class Solver(enum.StrEnum):
    """The names of schedulers."""

    DPM = "dpm++"
    DDIM = "ddim"
    DDPM = "ddpm"
    LCM = "lcm"


SOLVERS = {
    Solver.DPM: "DPMSolverMultistepScheduler",
    Solver.DDIM: "DDIMScheduler",
    Solver.DDPM: "DDPMScheduler",
    Solver.LCM: "LCMScheduler",
}


class DType(enum.StrEnum):
    """The names of dtypes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"impasto {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate images from text with the PixArt and GLM-Image diffusion transformers."""


Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="Folder, hub id, or builtin:scenes.")]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="Steps of denoising; 20, or 50 of GLM-Image, if not given.")
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", metavar="W", help="1 or less is none; 4.5, or 1.5 of GLM-Image, if not given."),
]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to show.", show_default=False)],
    model: Model = "builtin:scenes",
    output: Annotated[str, typer.Option(metavar="PATH", help="An image file, or a folder.")] = "out/",
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to steer away from.")] = "",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="An image to edit or refer to; may be given again. GLM-Image."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Image i has the seed N + i; random if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="PX", help="The model's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PX", help="The model's own if not given.")] = None,
    num_images: Annotated[int, typer.Option(metavar="N", help="Images of each prompt.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images at once; 16 up to 256 px, else 4.")
    ] = None,
    scheduler: Annotated[
        Solver | None, typer.Option(metavar="NAME", help="dpm++, ddim, ddpm or lcm; the model's own if not given.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(metavar="NAME", help="auto, float32, bfloat16, float16; auto if not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; cuda if not given and there.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 8GB: plan dtypes and placement to keep to it.")
    ] = None,
) -> None:
    """Generate an image of each PROMPT, with its settings inside the file.

    Several images are 0000.png, 0001.png, ... in the folder --output.
    """
    for prompt in (*prompts, negative_prompt):
        text("a prompt", prompt, limits.CHARACTERS)
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty; say what to show, in quotes")
    whole_number("--num-images", num_images, most=max(1, limits.IMAGES // len(prompts)))
    _check_numbers(seed, steps, guidance_scale, batch_size)
    for option, side in (("--height", height), ("--width", width)):
        if side is not None:
            whole_number(option, side, most=limits.SIDE)
    if memory_budget is not None:
        from ..models.base import parse_size

        try:
            parse_size(memory_budget)
        except InputError as error:
            raise InputError(f"--memory-budget: {error}") from error
    seed = secrets.randbelow(2**32) if seed is None else seed
    files = plan_files(output, len(prompts) * num_images)
    folder, class_name = _resolve(model)

    from ..pipelines import image as image_files
    from ..pipelines import inputs
    from ..pipelines.image_inputs import open_image

    steps, guidance_scale = _usual(class_name, steps, guidance_scale)
    if class_name != GLM_IMAGE and image:
        raise InputError(f"{model} takes text alone; --image is for GLM-Image")
    if class_name == GLM_IMAGE and scheduler is not None:
        raise InputError(f"--scheduler is for PixArt; {model} has one of its own")
    references = [open_image(path) for path in image or ()]
    chosen = _choose_device(device)
    chosen_dtype = _choose_dtype(dtype or DType.AUTO, chosen)
    transformer, vae = read_configs(folder, "transformer", "vae")
    if class_name == GLM_IMAGE:  # what the pipeline would say, before a large model is loaded
        from ..pipelines.glm_image_inputs import check_sides

        check_sides(height, width)
    elif transformer and vae:
        base, unit = image_size(transformer, vae)
        inputs.plan_canvas(height, width, base, unit, binning=True)
    if files[0] != Path(output):
        make_folder(Path(output))
    for file in files:
        image_files.check_picture_path(file)

    if memory_budget is None:
        pipe = _load(model, class_name, chosen, chosen_dtype, scheduler)
    else:
        from ..memory.plan import Budget

        batch_size = batch_size or 1
        if references:  # whose size the images have
            usual = [side // 32 * 32 or None for side in references[0].size]
            height, width = height or usual[1], width or usual[0]
        budget = Budget(memory_budget, chosen, height, width, batch_size)
        pipe = _load(model, class_name, chosen, None if dtype is None else chosen_dtype, scheduler, budget)
        assert pipe.plan is not None
        for line in pipe.plan.lines():
            say(line, error=True)
        chosen_dtype = pipe.dtype
    if batch_size is None:
        base = pipe.transformer.config.get("sample_size", 128) * pipe.vae_scale_factor
        batch_size = 16 if (height or base) * (width or base) <= 256**2 else 4
    say(f"seed {seed}", error=True)

    jobs = list(zip([prompt for prompt in prompts for _ in range(num_images)], files))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        last = start + len(batch)
        which = f"image {last}" if len(batch) == 1 else f"images {start + 1} to {last}"
        # None: no bar where stderr is not a terminal.
        pipe.set_progress_bar_config(disable=None, desc=f"{which} of {len(jobs)}", leave=False)
        images = _generate(
            pipe,
            [prompt for prompt, _ in batch],
            seed + start,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            # Empty is what each has without one; only PixArt's settings write it.
            negative_prompt=negative_prompt or (None if class_name == GLM_IMAGE else ""),
            **({"image": [references] * len(batch)} if references else {}),
        )
        for i, ((prompt, file), made) in enumerate(zip(batch, images), start):
            settings = image_files.GenerationSettings(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=steps,
                sampler=_solver_name(pipe.scheduler),
                guidance_scale=guidance_scale,
                seed=seed + i,
                height=made.height,
                width=made.width,
                model=model,
                extra={"Dtype": str(chosen_dtype).removeprefix("torch."), "Version": _version()},
            )
            image_files.save_picture(made, file, settings)
            say(str(file))


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or builtin:scenes.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read all weights, and refuse NaN and infinite ones.")] = False,
) -> None:
    """Print the components of MODEL, sizes, dtypes and memory."""
    for line in describe(inspect_model(model, deep=deep)):
        say(line)


@app.command()
def evaluate(
    model: Model = "builtin:scenes",
    n: Annotated[int, typer.Option("--n", metavar="N", help="Prompts; half of them never trained.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts and of the first image.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 16,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write numbers and verdicts as JSON.")] = None,
) -> None:
    """Print how well MODEL shows held-out prompts."""
    whole_number("--n", n, most=limits.IMAGES)
    _check_numbers(seed, steps, guidance_scale, batch_size)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"{output} cannot be written: name a file in an existing folder")
    _, class_name = _resolve(model)

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..checkpoints.config import write_json
    from ..scenes.evaluate import evaluate as judge

    steps, guidance_scale = _usual(class_name, steps, guidance_scale)
    device = _choose_device(None)
    pipe = _load(model, class_name, device, _choose_dtype(DType.FLOAT32, device), None)
    pipe.set_progress_bar_config(disable=True)
    done = 0
    with tqdm(total=n, unit="image", disable=None, leave=False) as progress:

        def generate_batch(prompts: list[str]) -> list[Image.Image]:
            nonlocal done
            options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            images = _generate(pipe, prompts, seed + done, **options)
            done += len(images)
            progress.update(len(images))
            return images

        report = judge(generate_batch, n, seed, batch_size)
    if output is not None:
        settings = {"model": model, "n": n, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        write_json(output, {"settings": {**settings, "version": _version()}, **report.to_dict()})
    say(report.table())


# --- what the commands share ---


def _version() -> str:
    from .. import __version__

    return f"impasto {__version__}"


def _check_numbers(seed: int | None, steps: int | None, guidance_scale: float | None, batch_size: int | None) -> None:
    """Refuse numbers that no model takes, before one is looked for."""
    if seed is not None:
        whole_number("--seed", seed, 0, 2**63 - 1)  # of torch's generators; the upper half is left to seed + i
    if steps is not None:
        whole_number("--steps", steps, most=limits.STEPS)
    if guidance_scale is not None:
        finite("--guidance-scale", guidance_scale, -limits.GUIDANCE, limits.GUIDANCE)
    if batch_size is not None:
        whole_number("--batch-size", batch_size, most=limits.IMAGES)


def _resolve(model: str) -> tuple[Path, str]:
    """The folder of a pipeline that can be run, and the name of its class."""
    folder, name = resolve_pipeline(model)
    if name not in PIPELINES:
        raise CheckpointError(f"{model} is a {shown(name)}; known pipelines are {', '.join(PIPELINES)}")
    return folder, name


def _usual(class_name: str, steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
    usual = USUAL.get(class_name, USUAL_OTHERWISE)
    return usual[0] if steps is None else steps, usual[1] if guidance_scale is None else guidance_scale


def _choose_device(name: str | None) -> torch.device:
    """The device of this name; cuda, or else the CPU, if None.

    Raises:
        InputError: no name of a device.
        ResourceError: a device that is not there.
    """
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name is None:
        return torch.device("cuda" if len(there) > 1 and there[1] == "cuda:0" else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {shown(name)}; this machine has {', '.join(there)}") from error
    numbered = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if numbered not in there:
        raise ResourceError(f"the device {name} is not available; this machine has {', '.join(there)}")
    return device


def _choose_dtype(name: DType, device: torch.device) -> torch.dtype:
    """``auto`` is the dtype that the device computes in fastest."""
    import torch

    from ..nn.machine import fast_dtype

    if name is not DType.AUTO:
        found: torch.dtype = getattr(torch, name.value)
        return found
    return fast_dtype(device)


def _load(
    model: str,
    class_name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    solver: Solver | None,
    budget: Budget | None = None,
) -> Any:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    import impasto

    downloads_shown = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads_shown:  # the line above, which is for the loading of weights, has hidden those as well
        enable_progress_bars()
    cls: Any = getattr(impasto, class_name)
    pipe = cls.from_pretrained(model, dtype=dtype, memory_budget=budget)
    if budget is None:
        pipe.to(device)
    if solver is not None:
        pipe.scheduler = getattr(impasto, SOLVERS[solver]).from_config(pipe.scheduler.config)
    return pipe


def _solver_name(scheduler: Any) -> str:
    name = type(scheduler).__name__
    return next((solver.value for solver, class_name in SOLVERS.items() if class_name == name), name)


def _generate(pipe: Any, prompts: list[str], seed: int, **options: Any) -> list[Image.Image]:
    """An image of each prompt, each with a generator of its own on the CPU: it depends on neither batch nor device."""
    import torch

    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    (images,) = pipe(prompts, generator=generators, return_dict=False, **options)
    assert isinstance(images, list)
    return images
