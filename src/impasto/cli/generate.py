"""``impasto generate``: images of prompts, as files with their settings inside."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import MAX_CHARACTERS, MAX_IMAGES, text, whole_number
from ..errors import InputError, OutputError
from ..family import GLM_IMAGE, PRIOR_PIXELS, Family, family_of
from ..files import make_folder
from ..memory.allocator import keep_freed_memory
from ..memory.inspection import image_size, read_configs
from . import pipelines
from .entry import say
from .options import DType, Guidance, Height, Lora, Model, Solver, Steps, Width, check_numbers

if TYPE_CHECKING:
    from PIL import Image

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to show.", show_default=False)],
    model: Model = "builtin:scenes",
    output: Annotated[str, typer.Option(metavar="PATH", help="An image file, or a folder.")] = "out/",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files: --output, or in a folder from 0000.png on.")
    ] = False,
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What guidance steers away from.")] = "",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="The image to edit. GLM-Image takes several."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="X", help="How much --image may change, up to 1; 0.8, or 1 with --mask.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", metavar="FILE", help="Repaint --image where this is white. PixArt only.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Image i has the seed N + i; random by default.")
    ] = None,
    height: Height = None,
    width: Width = None,
    num_images: Annotated[int, typer.Option(metavar="N", help="Images per prompt.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images at once; 16 up to 256 px, else 4.")
    ] = None,
    scheduler: Annotated[
        Solver | None, typer.Option(metavar="NAME", help="dpm++, ddim, ddpm or lcm; the model's own by default.")
    ] = None,
    lora: Lora = None,
    dtype: Annotated[DType, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = DType.AUTO,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps; cuda by default, else cpu.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 8GB: choose dtypes and placement to fit.")
    ] = None,
) -> None:
    """Generate an image of each PROMPT and save it with its settings.

    Under torchrun the processes compute each image together, and the first one saves it.

    Several images are saved as 0000.png, 0001.png, ... in the folder --output, after those that are there.
    """
    for prompt in (*prompts, negative_prompt):
        text("a prompt", prompt, MAX_CHARACTERS)
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty; say what to show, in quotes")
    whole_number("--num-images", num_images, most=max(1, MAX_IMAGES // len(prompts)))
    check_numbers(seed, steps, guidance_scale, batch_size, height, width)
    if memory_budget is not None:
        from ..checks import parse_size

        try:
            parse_size(memory_budget)
        except InputError as error:
            raise InputError(f"--memory-budget: {error}") from error
    seed = secrets.randbelow(2**32) if seed is None else seed
    files = plan_files(output, len(prompts) * num_images, overwrite)
    folder, class_name = pipelines.resolve(model)

    from ..pipelines import image_files

    family = family_of(class_name)
    chosen_adapters, defaults = pipelines.choose_adapters(lora or [])
    adapter_names = "; ".join(f"{adapter.name} {adapter.weight:g}" for adapter in chosen_adapters)
    steps, guidance_scale = defaults.numbers(family, steps, guidance_scale)
    if scheduler is None and family is not GLM_IMAGE:
        scheduler = pipelines.solver_of(defaults.scheduler)
    if family is GLM_IMAGE and scheduler is not None:
        raise InputError(f"--scheduler is for PixArt; {model} has a scheduler of its own")
    _check_edit(family, steps, image or [], strength, mask)
    references = [image_files.open_image(path) for path in image or ()]
    edit: dict[str, Any] = {}
    if references and family is not GLM_IMAGE:
        class_name, edit = _edit(class_name, references[0], strength, mask)
    with pipelines.processes(device) as processes:
        chosen = pipelines.choose_device(device) if processes is None else processes.device
        seed, writes = (seed, True) if processes is None else (processes.shared(seed), processes.is_main)
        chosen_dtype = pipelines.choose_dtype(dtype, chosen)
        _check_size(folder, family, height, width, references)
        if files[0] != Path(output):
            make_folder(Path(output))
        for file in files:
            image_files.check_image_path(file)

        if memory_budget is None:
            keep_freed_memory()
            pipe = pipelines.load(model, class_name, chosen, chosen_dtype, scheduler)
        else:
            from ..memory.plan import Budget

            batch_size, sides = batch_size or 1, (height, width)
            seen = tuple(_reference_sides(image) for image in references)
            if references and family is GLM_IMAGE:
                sides = _generated_sides(height, width, seen[0])
            budget = Budget(memory_budget, chosen, *sides, batch_size, seen)
            given = None if dtype is DType.AUTO else chosen_dtype
            pipe = pipelines.load(model, class_name, chosen, given, scheduler, budget)
            assert pipe.plan is not None
            for line in pipe.plan.lines() if writes else ():
                say(line, error=True)
            chosen_dtype = pipe.dtype
        pipelines.apply(pipe, chosen_adapters)
        if processes is not None:
            from ..pipelines.parallel.parallelize import parallelize

            parallelize(pipe, guidance=None if guidance_scale > 1 else False)
        if batch_size is None:
            base = pipe.transformer.config.get("sample_size", 128) * pipe.vae_scale_factor
            batch_size = 16 if (height or base) * (width or base) <= 256**2 else 4
        if writes:
            say(f"seed {seed}", error=True)

        def save(image: Image.Image, prompt: str, file: Path, seed: int) -> None:
            settings = image_files.GenerationSettings(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=steps,
                sampler=pipelines.solver_name(pipe.scheduler),
                guidance_scale=guidance_scale,
                seed=seed,
                height=image.height,
                width=image.width,
                model=model,
                extra={
                    **({"Denoising strength": str(edit["strength"])} if edit else {}),
                    **({"Lora": adapter_names} if chosen_adapters else {}),
                    "Dtype": str(chosen_dtype).removeprefix("torch."),
                    "Version": pipelines.version(),
                },
            )
            while True:
                try:
                    image_files.save_image(image, file, settings, overwrite)
                    break
                except OutputError:
                    if overwrite or file == Path(output) or not os.path.lexists(file):
                        raise
                    file = _numbered(file.parent, _next_number(file.parent))  # another process has taken this one
            say(str(file))

        options: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            # PixArt's default is an empty negative prompt, GLM-Image's is none.
            "negative_prompt": negative_prompt or (None if family is GLM_IMAGE else ""),
            **edit,
        }
        jobs = list(zip([prompt for prompt in prompts for _ in range(num_images)], files))
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            last = start + len(batch)
            which = f"image {last}" if len(batch) == 1 else f"images {start + 1} to {last}"
            # disable=None: no bar unless stderr is a terminal.
            pipe.set_progress_bar_config(disable=None if writes else True, desc=f"{which} of {len(jobs)}", leave=False)
            if references and family is GLM_IMAGE:
                options["image"] = [references] * len(batch)
            images = pipelines.run(pipe, [prompt for prompt, _ in batch], seed + start, **options)
            for i, ((prompt, file), generated) in enumerate(zip(batch, images), start) if writes else ():
                save(generated, prompt, file, seed + i)


def plan_files(output: str, count: int, overwrite: bool = False) -> list[Path]:
    """The file of each image: after those that are in the folder, unless they may be replaced."""
    path = Path(output)
    is_folder = path.is_dir() or output.endswith("/")
    if not is_folder and path.suffix.lower() in IMAGE_EXTENSIONS:
        if count > 1:
            raise InputError(f"{count} images do not fit into the one file {path}; give a folder, as in --output out")
        if not overwrite and os.path.lexists(path):
            raise OutputError(f"{path} exists already; give another name, or --overwrite to replace it")
        return [path]
    if not is_folder and path.suffix[1:].isalpha():
        known = ", ".join(IMAGE_EXTENSIONS)
        raise OutputError(f"{path} has none of the extensions of an image ({known}); or, for a folder, end it with /")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, and should be a folder or end in .png; choose another name")
    first = 0 if overwrite else _next_number(path)
    return [_numbered(path, first + i) for i in range(count)]


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.png"


def _next_number(folder: Path) -> int:
    """The first free number above those of the images in the folder, which need not exist. Dates do not count."""
    try:
        names = os.listdir(folder)
    except OSError:  # it does not exist, or is reported when it is written
        names = []
    numbered = (re.fullmatch(r"([0-9]{4,6})(\.[a-z]+)", name.lower()) for name in names)
    number = max((int(found[1]) for found in numbered if found and found[2] in IMAGE_EXTENSIONS), default=-1) + 1
    while os.path.lexists(_numbered(folder, number)):
        number += 1
    return number


def _check_edit(family: Family, steps: int, image: list[Path], strength: float | None, mask: Path | None) -> None:
    """Refuse combinations of the options of edits, and a strength that leaves no step."""
    for option, value in (("--strength", strength), ("--mask", mask)):
        if value is not None and (family is GLM_IMAGE or not image):
            reason = "is for PixArt" if family is GLM_IMAGE else "needs --image, the image to edit"
            raise InputError(f"{option} {reason}")
    if family is not GLM_IMAGE and len(image) > 1:
        raise InputError(f"PixArt edits one image, and --image was given {len(image)} times")
    if strength is not None:
        from ..pipelines.request import Schedule

        Schedule(steps, None, None).at(strength)


def _edit(class_name: str, image: Image.Image, strength: float | None, mask: Path | None) -> tuple[str, dict[str, Any]]:
    """The class of PixArt's pipeline that edits an image, and the options of its call."""
    if mask is None:
        return class_name.replace("Pipeline", "Img2ImgPipeline"), {
            "image": image,
            "strength": 0.8 if strength is None else strength,
        }
    from ..pipelines.edit_inputs import read_masks
    from ..pipelines.image_files import open_image

    masks = read_masks(open_image(mask), image.height, image.width)
    strength = 1.0 if strength is None else strength
    options = {"image": image, "mask_image": masks, "strength": strength, "overlay": True}
    return class_name.replace("Pipeline", "InpaintPipeline"), options


def _reference_sides(image: Image.Image) -> tuple[int, int]:
    """The height and width at which GLM-Image sees an image."""
    height, width = (max(1, side // PRIOR_PIXELS) * PRIOR_PIXELS for side in (image.height, image.width))
    return height, width


def _generated_sides(height: int | None, width: int | None, reference: tuple[int, int]) -> tuple[int, int]:
    """The height and width at which GLM-Image generates an edit of this reference."""
    from ..pipelines.glm_image_inputs import next_multiple

    return next_multiple(height or reference[0]), next_multiple(width or reference[1])


def _check_size(folder: Path, family: Family, height: int | None, width: int | None, images: list[Image.Image]) -> None:
    """Refuse sides that the pipeline would refuse, before a large model is loaded."""
    if family is GLM_IMAGE:
        from ..pipelines.glm_image_inputs import check_sides

        check_sides(height, width, edits=bool(images))
        return
    if images:
        if height is None and width is None:  # any size is valid
            return
        height, width = height or images[0].height, width or images[0].width
    from ..pipelines.inputs import plan_canvas

    transformer, vae = read_configs(folder, "transformer", "vae")
    if transformer and vae:
        base, unit = image_size(transformer, vae)
        plan_canvas(height, width, base, unit, binning=True)
