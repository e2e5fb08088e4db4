"""The command line: thin commands. What is heavy is imported inside them, after what can be checked without it."""

from __future__ import annotations

import contextlib
import enum
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import CheckpointError, ImpastoError, InputError, OutputError, ResourceError
from .pipelines.inspection import Inspection, inspect_model, picture_size, read_part_configs, resolve_pipeline

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .pipelines.planner import Budget

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
#: Class name in ``model_index.json`` -> the public name of the class that draws with it.
PIPELINES = {name: name for name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "GlmImagePipeline")}
GLM_IMAGE = "GlmImagePipeline"
#: Steps and guidance where they are not given.
USUAL: dict[str, tuple[int, float]] = {GLM_IMAGE: (50, 1.5)}
USUAL_OTHERWISE = (20, 4.5)
#: What ``impasto info`` prints plans for.
BUDGETS = ("4GB", "6GB", "8GB", "12GB", "16GB", "24GB")


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


class Commands(TyperGroup):
    """Commands whose errors are one line on stderr, and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ImpastoError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"impasto {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Draw pictures from text with the PixArt and GLM-Image diffusion transformers."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Where torchao is installed, transformers imports it, and it tells everyone of kernels that nobody asked for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)],
    model: Model = "builtin:scenes",
    output: Annotated[str, typer.Option(metavar="PATH", help="A picture file, or a folder.")] = "out/",
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to lead away from.")] = "",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="A picture to edit or refer to; may be given again. GLM-Image."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Picture i has the seed N + i; random if not given.")
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="PX", help="The model's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PX", help="The model's own if not given.")] = None,
    num_images: Annotated[int, typer.Option(metavar="N", help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures at once; 16 up to 256 px, else 4.")
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
    """Draw a picture of each PROMPT, with its settings inside the file.

    Several pictures are 0000.png, 0001.png, ... in the folder --output.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise InputError("a prompt is empty; say what to draw, in quotes")
    seed = secrets.randbelow(2**32) if seed is None else _check_seed(seed)
    files = _plan_files(output, len(prompts) * max(num_images, 1))
    folder, class_name = _resolve(model)

    from .pipelines import image as pictures_on_disk
    from .pipelines import inputs

    steps, guidance_scale = _usual(class_name, steps, guidance_scale)
    inputs.whole_number("num_images", num_images)
    inputs.whole_number("steps", steps)
    inputs.finite("guidance_scale", guidance_scale)
    if class_name != GLM_IMAGE and image:
        raise InputError(f"{model} draws from text alone; --image is for GLM-Image")
    if class_name == GLM_IMAGE and scheduler is not None:
        raise InputError(f"--scheduler is for PixArt; {model} has one of its own")
    references = [_open_image(path) for path in image or ()]
    if batch_size is not None:
        inputs.whole_number("batch_size", batch_size)
    chosen = _choose_device(device)
    chosen_dtype = _choose_dtype(dtype or DType.AUTO, chosen)
    transformer, vae = read_part_configs(folder, "transformer", "vae")
    if class_name == GLM_IMAGE:  # what the pipeline would say, before a large model is loaded
        from .pipelines.glm_image_inputs import check_sides

        check_sides(height, width)
    elif transformer and vae:
        base, unit = picture_size(transformer, vae)
        inputs.plan_canvas(height, width, base, unit, binning=True)
    if files[0] != Path(output):
        _make_folder(Path(output))
    for file in files:
        pictures_on_disk.check_picture_path(file)

    if memory_budget is None:
        pipe = _load(model, class_name, chosen, chosen_dtype, scheduler)
    else:
        from .pipelines.planner import Budget

        batch_size = batch_size or 1
        if references:  # whose size the pictures have
            usual = [side // 32 * 32 or None for side in references[0].size]
            height, width = height or usual[1], width or usual[0]
        budget = Budget(memory_budget, chosen, height, width, batch_size)
        pipe = _load(model, class_name, chosen, None if dtype is None else chosen_dtype, scheduler, budget)
        assert pipe.plan is not None
        for line in pipe.plan.lines():
            typer.echo(line, err=True)
        chosen_dtype = pipe.computing_dtype("transformer")
    if batch_size is None:
        base = pipe.transformer.config.get("sample_size", 128) * pipe.vae_scale_factor
        batch_size = 16 if (height or base) * (width or base) <= 256**2 else 4
    typer.echo(f"seed {seed}", err=True)

    jobs = [(prompt, file) for prompt, file in zip([p for p in prompts for _ in range(num_images)], files)]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        last = start + len(batch)
        which = f"picture {last}" if len(batch) == 1 else f"pictures {start + 1} to {last}"
        # None: no bar where stderr is not a terminal.
        pipe.set_progress_bar_config(disable=None, desc=f"{which} of {len(jobs)}", leave=False)
        pictures = _draw(
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
        for i, ((prompt, file), picture) in enumerate(zip(batch, pictures), start):
            settings = pictures_on_disk.GenerationSettings(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=steps,
                sampler=_solver_name(pipe.scheduler),
                guidance_scale=guidance_scale,
                seed=seed + i,
                height=picture.height,
                width=picture.width,
                model=model,
                extra={"Dtype": str(chosen_dtype).removeprefix("torch."), "Version": _version()},
            )
            pictures_on_disk.save_picture(picture, file, settings)
            typer.echo(str(file))


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or builtin:scenes.")],
) -> None:
    """Print the parts of MODEL, sizes, dtypes and memory."""
    for line in _describe(inspect_model(model)):
        typer.echo(line)


@app.command()
def evaluate(
    model: Model = "builtin:scenes",
    n: Annotated[int, typer.Option("--n", metavar="N", help="Prompts; half of them never trained.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts and of the first picture.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Pictures at once.")] = 16,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write numbers and verdicts as JSON.")] = None,
) -> None:
    """Print how well MODEL draws held-out prompts."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"{output} cannot be written: name a file in an existing folder")
    _check_seed(seed)
    _, class_name = _resolve(model)

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from .checkpoints.config import write_json
    from .pipelines import inputs
    from .scenes.evaluate import evaluate as judge

    steps, guidance_scale = _usual(class_name, steps, guidance_scale)
    inputs.whole_number("n", n)
    inputs.whole_number("steps", steps)
    inputs.whole_number("batch_size", batch_size)
    inputs.finite("guidance_scale", guidance_scale)
    device = _choose_device(None)
    pipe = _load(model, class_name, device, _choose_dtype(DType.FLOAT32, device), None)
    pipe.set_progress_bar_config(disable=True)
    done = 0
    with tqdm(total=n, unit="picture", disable=None, leave=False) as progress:

        def draw(prompts: list[str]) -> list[Image.Image]:
            nonlocal done
            options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            pictures = _draw(pipe, prompts, seed + done, **options)
            done += len(pictures)
            progress.update(len(pictures))
            return pictures

        report = judge(draw, n, seed, batch_size)
    if output is not None:
        settings = {"model": model, "n": n, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        try:
            write_json(output, {"settings": {**settings, "version": _version()}, **report.to_dict()})
        except OSError as error:
            raise OutputError(f"{output} cannot be written: {error.strerror}; choose another place") from error
    typer.echo(report.table())


# --- what the commands share ---


def _version() -> str:
    from . import __version__

    return f"impasto {__version__}"


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:  # of torch's generators; the upper half is left to seed + i
        raise InputError(f"the seed must be a whole number from 0 to 2^63 - 1, not {seed}")
    return seed


def _plan_files(output: str, count: int) -> list[Path]:
    """Where the pictures go.

    Raises:
        InputError: several pictures into one file.
        OutputError: a file that is not one of a picture, or a file in the place of a folder.
    """
    path = Path(output)
    is_folder = path.is_dir() or output.endswith("/")
    if not is_folder and path.suffix.lower() in PICTURE_EXTENSIONS:
        if count > 1:
            raise InputError(f"{count} pictures do not fit into the one file {path}; give a folder, as in --output out")
        return [path]
    if not is_folder and path.suffix[1:].isalpha():
        known = ", ".join(PICTURE_EXTENSIONS)
        raise OutputError(f"{path} has none of the extensions of a picture ({known}); or, for a folder, end it with /")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, and should be a folder or end in .png; choose another name")
    return [path / f"{i:04d}.png" for i in range(count)]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror}; choose another place") from error


def _resolve(model: str) -> tuple[Path, str]:
    """The folder of a pipeline that can be drawn with, and the name of its class here."""
    folder, stored = resolve_pipeline(model)
    if stored not in PIPELINES:
        raise CheckpointError(f"{model} is a {stored}, and none of those that are known: {', '.join(PIPELINES)}")
    return folder, PIPELINES[stored]


def _usual(class_name: str, steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
    usual = USUAL.get(class_name, USUAL_OTHERWISE)
    return usual[0] if steps is None else steps, usual[1] if guidance_scale is None else guidance_scale


def _open_image(path: Path) -> Image.Image:
    """A picture to refer to.

    Raises:
        InputError: no file, or none of a picture.
    """
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture: {error.strerror or error}; name another") from error


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
        raise InputError(f"there is no device {name!r}; this machine has {', '.join(there)}") from error
    numbered = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if numbered not in there:
        raise ResourceError(f"the device {name} is not available; this machine has {', '.join(there)}")
    return device


def _choose_dtype(name: DType, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes in it, and float32 elsewhere."""
    import torch

    from .nn.cpu import processor_has

    if name is not DType.AUTO:
        found: torch.dtype = getattr(torch, name.value)
        return found
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    else:
        native = device.type == "cpu" and processor_has("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


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
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if downloads_shown:  # the line above, which is for the loading of weights, has hidden those as well
        enable_progress_bars()
    cls: Any = getattr(impasto, class_name)
    with _out_of_memory_explained():
        pipe = cls.from_pretrained(model, dtype=dtype, memory_budget=budget)
        if budget is None:
            pipe.to(device)
    if solver is not None:
        pipe.scheduler = getattr(impasto, SOLVERS[solver]).from_config(pipe.scheduler.config)
    return pipe


def _solver_name(scheduler: Any) -> str:
    name = type(scheduler).__name__
    return next((solver.value for solver, class_name in SOLVERS.items() if class_name == name), name)


@contextlib.contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "the device has too little memory; use a smaller --batch-size, --dtype bfloat16, or a smaller picture"
        ) from error


def _draw(pipe: Any, prompts: list[str], seed: int, **options: Any) -> list[Image.Image]:
    """A picture of each prompt. Each has a generator of its own on the CPU, so that neither batch nor device count."""
    import torch

    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with _out_of_memory_explained():
        (images,) = pipe(prompts, generator=generators, return_dict=False, **options)
    assert isinstance(images, list)
    return images


def _describe(found: Inspection) -> Iterator[str]:
    """The lines of ``impasto info``."""
    from .pipelines.inspection import DTYPES

    yield f"{found.model}: {found.class_name}"
    by_name = {part.name: part for part in found.parts}
    side = 0
    if "transformer" in by_name and "vae" in by_name:
        side, unit = picture_size(by_name["transformer"].config, by_name["vae"].config)
        unit = 32 if found.class_name == GLM_IMAGE else unit  # of its prior
        yield f"pictures of {side} x {side} px; sides are multiples of {unit}"
    yield ""
    rows: list[tuple[str, ...]] = [("part", "class", "parameters", "stored as", "on disk")]
    for part in found.parts:
        stored = "pickle" if part.pickled else ", ".join(part.dtypes) or "-"
        count = f"{part.parameters:,}" if part.tensors else "-"
        rows.append((part.name, part.class_name or "-", count, stored, _amount(part.disk_bytes)))
    total = sum(part.parameters for part in found.parts)
    rows.append(("all", "", f"{total:,}", "", _amount(sum(part.disk_bytes for part in found.parts))))
    yield from _aligned(rows, left=2)
    yield ""
    if any(part.pickled for part in found.parts):
        yield "The pickled weights are not opened, and are missing from these numbers."
    memory: list[tuple[str, ...]] = [("memory", *DTYPES)]
    for part in found.parts:
        if part.tensors:
            memory.append((part.name, *(_amount(part.memory(dtype)) for dtype in DTYPES)))
    for title, single in (("peak, all parts resident", False), ("peak, one part at a time", True)):
        peaks = (_amount(found.peak_memory(dtype, one_at_a_time=single)) for dtype in DTYPES)
        memory.append((title, *peaks))
    yield from _aligned(memory, left=1)
    if side:
        yield f"Peaks are estimates, and hold what one guided picture of {side} x {side} px takes beside the weights."
        if not any(part.pickled for part in found.parts):
            yield ""
            yield from _describe_plans(found)


def _describe_plans(found: Inspection) -> Iterator[str]:
    """How memory budgets would be kept on this machine."""
    from .pipelines import planner

    device = planner.default_device()
    rows: list[tuple[str, ...]] = [("memory budget", "peak", "plan")]
    for size in BUDGETS:
        try:
            plan = planner.plan_memory(found, size, device=device, limited=False)
        except planner.BudgetTooSmallError as error:
            rows.append((size, "-", f"too small; the least that works is {_amount(error.smallest)}"))
            continue
        first, *others = (f"{part.name}: {part.describe()}" for part in plan.parts)
        rows.append((size, _amount(plan.peak), first))
        rows += [("", "", line) for line in others]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for a, b, c in rows:
        yield f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}"
    yield f"Budgets are for {device}, and are kept with --memory-budget."


def _aligned(rows: list[tuple[str, ...]], left: int) -> Iterator[str]:
    """Columns as wide as their widest cell; the first ``left`` are aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        yield "  ".join(cells).rstrip()


def _amount(size: int) -> str:
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 1e3:.1f} kB"


def main() -> None:
    """The entry of the command ``impasto``."""
    app(prog_name="impasto")
