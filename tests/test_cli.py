"""The command line: files, seeds, settings, errors, and that help costs nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from impasto import cli
from impasto.cli import entry, pipelines
from impasto.cli.generate import IMAGE_EXTENSIONS
from impasto.cli.options import DType
from impasto.errors import CheckpointNotFoundError, InputError
from impasto.memory.estimate import peak_memory
from impasto.memory.inspection import image_size, inspect_model
from impasto.nn.machine import is_native
from impasto.pipelines.image_files import check_image_path, read_settings
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.pipelines.pixart_edits import PixArtSigmaImg2ImgPipeline
from impasto.scenes.evaluate import held_out_prompts
from impasto.scenes.judge import read
from impasto.schedulers.lcm import LCMScheduler

from .tiny import tiny_pipeline, tiny_transformer, write_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def generate(model: Path, *arguments: Any) -> Result:
    return call("generate", "--model", model, "--steps", 2, "--device", "cpu", *arguments)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def fresh(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


#: Whether this processor computes in bfloat16.
NATIVE = is_native(torch.bfloat16)

# --- generate ---


def test_one_image_goes_into_the_named_file_with_its_settings(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cube.png"
    options = ("--seed", 7, "--guidance-scale", 3.5, "--negative-prompt", "grey, blue", "--scheduler", "ddim")
    result = generate(model, "a red cube", "--output", path, "--height", 16, "--width", 24, *options)
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    assert result.stderr == "seed 7\n"
    settings = read_settings(path)
    assert (settings.prompt, settings.negative_prompt, settings.steps) == ("a red cube", "grey, blue", 2)
    assert (settings.seed, settings.guidance_scale, settings.sampler) == (7, 3.5, "ddim")
    assert (settings.height, settings.width, settings.model) == (16, 24, str(model))
    assert settings.extra["Dtype"] == ("bfloat16" if NATIVE else "float32")
    assert pixels(path).shape == (16, 24, 3)


def test_an_image_does_not_depend_on_its_batch(model: Path, tmp_path: Path) -> None:
    """Order of the files, seeds, and the image itself: generated together, in other batches, and alone."""
    prompts = ["a red cube", "a blue sphere"]
    made = {}
    for batch in (3, 4):
        folder = tmp_path / f"batches of {batch}"
        result = generate(model, *prompts, "--num-images", 2, "--seed", 5, "--batch-size", batch, "--output", folder)
        made[batch] = sorted(folder.iterdir())
        assert result.stdout.split("\n")[:-1] == [str(folder / f"{i:04d}.png") for i in range(4)]
        assert [path.name for path in made[batch]] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    settings = [read_settings(path) for path in made[4]]
    assert [s.prompt for s in settings] == ["a red cube", "a red cube", "a blue sphere", "a blue sphere"]
    assert [s.seed for s in settings] == [5, 6, 7, 8]

    generate(model, "a blue sphere", "--seed", 7, "--output", tmp_path / "alone.png")
    alone = pixels(tmp_path / "alone.png")
    assert abs(pixels(made[4][2]) - alone).max() <= 1
    assert abs(pixels(made[3][2]) - alone).max() <= 1
    assert abs(pixels(made[4][3]) - alone).max() > 5


def test_earlier_images_in_a_folder_stay(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0041.jpg").write_bytes(b"kept")
    for name in ("12.png", "notes.txt", "0099.txt", "cube.png"):  # not numbers of images
        (folder / name).write_bytes(b"")
    first = generate(model, "a red cube", "a cat", "--output", folder)
    assert first.stdout.split() == [str(folder / "0042.png"), str(folder / "0043.png")]
    before = (folder / "0042.png").read_bytes()
    assert generate(model, "a red cube", "--output", folder).stdout == f"{folder / '0044.png'}\n"
    again = generate(model, "a red cube", "--output", folder, "--overwrite")
    assert again.stdout == f"{folder / '0000.png'}\n"
    assert (folder / "0042.png").read_bytes() == before
    (folder / "0000.png").write_bytes(b"old")
    assert generate(model, "a red cube", "--output", folder, "--overwrite").exit_code == 0
    assert (folder / "0000.png").read_bytes() != b"old"
    assert (folder / "0041.jpg").read_bytes() == b"kept"


def test_a_file_is_replaced_on_request_only(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cube.png"
    path.write_bytes(b"old")
    result = generate(model, "a red cube", "--output", path)
    assert (result.exit_code, path.read_bytes()) == (1, b"old")
    assert "--overwrite" in result.stderr
    assert generate(model, "a red cube", "--output", path, "--overwrite").exit_code == 0
    assert read_settings(path).prompt == "a red cube"

    def run(*arguments: Any, **options: Any) -> Any:  # the file appears while the image is generated
        late.write_bytes(b"of another process")
        return plain(*arguments, **options)

    late, plain = tmp_path / "late.png", pipelines.run
    monkeypatch.setattr(pipelines, "run", run)
    result = generate(model, "a red cube", "--output", late)
    assert (result.exit_code, late.read_bytes()) == (1, b"of another process")
    assert "exists already" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_number_that_is_taken_meanwhile_is_left(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain = tmp_path / "images", pipelines.run

    def run(*arguments: Any, **options: Any) -> Any:
        (folder / "0001.png").write_bytes(b"of another process")
        return plain(*arguments, **options)

    monkeypatch.setattr(pipelines, "run", run)
    result = generate(model, "a red cube", "--num-images", 3, "--seed", 5, "--output", f"{folder}/")
    assert [Path(line).name for line in result.stdout.split()] == ["0000.png", "0002.png", "0003.png"]
    assert (folder / "0001.png").read_bytes() == b"of another process"
    assert [read_settings(folder / name).seed for name in ("0000.png", "0002.png", "0003.png")] == [5, 6, 7]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["999999999.png", "1000000000.png"], ["0000.png", "0001.png"]),
        (["0007.jpg", "20240131.png"], ["0008.png", "0009.png"]),
        (["999999.png", "1000000.png"], ["1000001.png", "1000002.png"]),
        (["0003.png", "999999.png", "1000001.png"], ["1000000.png", "1000002.png"]),
    ],
)
def test_numbers_go_on_after_those_of_images(
    model: Path, tmp_path: Path, present: list[str], expected: list[str]
) -> None:
    for name in present:
        (tmp_path / name).write_bytes(b"another")
    result = generate(model, "a red cube", "--num-images", 2, "--output", tmp_path)
    assert [Path(line).name for line in result.stdout.split()] == expected
    assert all((tmp_path / name).read_bytes() == b"another" for name in present)


@pytest.mark.long
def test_two_runs_at_once_lose_nothing(model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "impasto", "generate", "a red cube", "--model", str(model), "--steps", "1",
        "--num-images", "4", "--batch-size", "1", "--output", f"{tmp_path}/out/", "--device", "cpu",
    ]  # fmt: skip
    runs = [
        subprocess.Popen([*command, "--seed", seed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in ("10", "20")
    ]
    printed = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    names = [line for out, _ in printed for line in out.split()]
    assert sorted(names) == [str(tmp_path / "out" / f"{i:04d}.png") for i in range(8)]
    assert sorted(read_settings(name).seed for name in names) == [10, 11, 12, 13, 20, 21, 22, 23]


def test_the_images_are_those_of_the_pipeline(model: Path, tmp_path: Path) -> None:
    generate(model, "a red cube", "--seed", 3, "--scheduler", "lcm", "--output", tmp_path / "x.png")
    pipe = PixArtSigmaPipeline.from_pretrained(model, dtype=torch.bfloat16 if NATIVE else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    expected = pipe("a red cube", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    assert abs(pixels(tmp_path / "x.png") - np.asarray(expected).astype(int)).max() <= 1


def test_a_random_seed_is_printed_and_generates_the_same_again(model: Path, tmp_path: Path) -> None:
    first = generate(model, "a red cube", "--output", f"{tmp_path}/new/folder/")
    path = tmp_path / "new" / "folder" / "0000.png"
    assert first.stdout == f"{path}\n"
    seed = read_settings(path).seed
    assert f"seed {seed}\n" in first.stderr
    generate(model, "a red cube", "--output", tmp_path / "again.png", "--seed", seed)
    assert (pixels(path) == pixels(tmp_path / "again.png")).all()
    other = generate(model, "a red cube", "--output", tmp_path / "other.png")
    assert f"seed {seed}\n" not in other.stderr


def test_alpha_is_generated_by_its_own_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = write_pipeline(tmp_path / "alpha", PixArtAlphaPipeline)
    lengths = []
    encode = PixArtAlphaPipeline.encode_prompt

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["max_sequence_length"])
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(PixArtAlphaPipeline, "encode_prompt", spy)
    assert generate(alpha, "a red cube", "--output", tmp_path / "x.webp").exit_code == 0
    assert lengths == [120]
    assert read_settings(tmp_path / "x.webp").sampler == "dpm++"


def test_dtypes(model: Path, tmp_path: Path) -> None:
    assert pipelines.choose_dtype(DType.AUTO, torch.device("cpu")) == (torch.bfloat16 if NATIVE else torch.float32)
    for dtype in ("bfloat16", "float32"):
        path = tmp_path / f"{dtype}.png"
        generate(model, "a red cube", "--dtype", dtype, "--seed", 1, "--output", path)
        assert read_settings(path).extra["Dtype"] == dtype


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["x", "y", "--output", "{tmp}/x.png"], "2 images do not fit into the one file"),
        (["x", "--num-images", 3, "--output", "{tmp}/x.png"], "3 images do not fit into the one file"),
        (["x", "--output", "{tmp}/x.gif"], "extensions of an image"),
        (["x", "--output", "{tmp}/missing/x.png"], "does not exist; create it"),
        (["x", "--output", "{tmp}/model.1"], "is a file, and should be a folder"),
        (["  "], "a prompt is empty"),
        (["x", "--guidance-scale", "nan"], "--guidance-scale must be a finite number"),
        (["x", "--steps", 0], "--steps must be a whole number from 1"),
        (["x", "--num-images", 0], "--num-images must be a whole number from 1"),
        (["x", "--batch-size", 0], "--batch-size must be a whole number from 1"),
        (["x", "--seed", -1], "--seed must be a whole number from 0"),
        (["x", "--height", 18], "the nearest size is 16 x 16"),
        (["x", "--device", "cuda:99"], "the device cuda:99 is not available; this machine has cpu"),
        (["x", "--device", "toaster"], "there is no device 'toaster'"),
        (["x", "--model", "no/such/model"], "the folder no/such/model does not exist"),
        (["x", "--model", "builtin:nothing"], "there is no bundled model"),
        (["x", "--model", "owner/name"], "the hub cannot be reached"),
        (["x", "--model", "{tmp}"], "has no model_index.json"),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_loading(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "model.1").touch()
    result = generate(model, *(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "x", "--steps", "many"], ["generate", "x", "--scheduler", "magic"], ["fly"]],
)
def test_usage_errors_have_status_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(" --help)\n")
    assert result.stderr.count("\n") == 1


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = call("--debug", "info", tmp_path)
    assert isinstance(result.exception, CheckpointNotFoundError)


def test_an_error_in_the_log_says_its_reason_in_one_line() -> None:
    try:
        raise KeyError("the reason")
    except KeyError:
        record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "it failed\n", None, sys.exc_info())
    record.exc_text = "Traceback of middleware\n" * 100
    assert entry._OneLine("%(levelname)s: %(message)s").format(record) == "ERROR: it failed: KeyError: 'the reason'"
    assert "Traceback" in logging.Formatter("%(message)s").format(record)  # other handlers still have it


def test_an_interruption_has_status_130(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "load", interrupt)
    result = generate(model, "x", "--output", tmp_path / "x.png")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_explained(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PixArtSigmaPipeline, "__call__", exhausted)
    result = generate(model, "x", "--output", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "use a smaller --batch-size" in result.stderr


def test_the_extensions_are_those_that_can_be_written(tmp_path: Path) -> None:
    for extension in IMAGE_EXTENSIONS:
        check_image_path(tmp_path / f"x{extension}")


# --- info ---


def test_info_counts_what_is_stored(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.transformer = tiny_transformer().half()
    pipe.save_pretrained(tmp_path, max_shard_size=20_000)
    found = inspect_model(tmp_path)
    parts = found.components
    assert list(parts) == ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]
    for name in ("vae", "transformer"):
        assert parts[name].parameters == pipe.components[name].num_parameters()
    encoder = {name: p.numel() for name, p in pipe.text_encoder.named_parameters()}
    assert parts["text_encoder"].parameters == sum(encoder.values())
    assert (parts["transformer"].dtypes, parts["vae"].dtypes) == (("float16",), ("float32",))
    assert parts["tokenizer"].parameters == parts["scheduler"].parameters == 0
    assert parts["vae"].disk_bytes == sum(path.stat().st_size for path in (tmp_path / "vae").iterdir())

    assert parts["transformer"].memory("float32") == 4 * parts["transformer"].parameters
    loaded = PixArtSigmaPipeline.from_pretrained(tmp_path, dtype="float16").text_encoder
    assert parts["text_encoder"].memory("float16") == sum(p.nbytes for p in loaded.parameters())
    both, single = (peak_memory(found, "bfloat16", one_at_a_time=flag) for flag in (False, True))
    assert max(part.memory("bfloat16") for part in found.components.values()) < single < both
    config = pipe.transformer.config
    assert image_size(config, pipe.vae.config) == (config.sample_size * pipe.vae_scale_factor, 4)

    result = call("info", tmp_path)
    assert result.exit_code == 0
    assert f"{parts['transformer'].parameters:,}" in result.stdout
    assert "images of 16 x 16 px" in result.stdout


def test_info_of_a_variant(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert inspect_model(tmp_path).components["vae"].parameters == pipe.vae.num_parameters()


@pytest.mark.parametrize(("damage", "expected"), [("remove", "holds no weights"), ("corrupt", "damaged header")])
def test_info_of_a_damaged_checkpoint(tmp_path: Path, damage: str, expected: str) -> None:
    write_pipeline(tmp_path)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes((64).to_bytes(8, "little") + b"x" * 64)
    result = call("info", tmp_path)
    assert result.exit_code == 1
    assert expected in result.stderr


# --- evaluate ---


def test_evaluate_prints_the_table_and_writes_the_verdicts(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = call("evaluate", "--model", model, "--n", 3, "--steps", 1, "--batch-size", 2, "--output", path)
    assert result.exit_code == 0, result.output
    assert "3 images: 2 unseen prompt, 1 never trained." in result.stdout
    report = json.loads(path.read_text())
    assert report["settings"]["n"] == 3
    assert report["settings"]["scheduler"] == "dpm++"
    assert [image["prompt"] for image in report["images"]] == [prompt.text for prompt in held_out_prompts(3)]


# --- in a process of its own ---


def test_help_fits_one_screen_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from impasto import cli\n"
        "try: cli.app(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    *text, loaded = fresh("-c", code).stdout.splitlines()
    assert loaded == "loaded: []"
    assert len(text) <= 40
    assert all(len(line) <= 100 for line in text)
    for option in ("--model", "--output", "--negative-prompt", "--num-images", "--scheduler", "--dtype", "--device"):
        assert any(option in line for line in text), option


def test_an_error_of_the_command_itself(tmp_path: Path) -> None:
    done = fresh("-m", "impasto", "generate", "x", "--model", str(tmp_path / "no model"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" in fresh("-m", "impasto", "--debug", "info", str(tmp_path)).stderr


def test_version() -> None:
    import impasto

    assert call("--version").stdout == f"impasto {impasto.__version__}\n"


def test_the_bundled_model_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    result = call("generate", "a red cube on top of a blue sphere", "--seed", 7, "--output", path)
    assert result.exit_code == 0, result.output
    settings = read_settings(path)
    assert (settings.model, settings.steps, settings.guidance_scale, settings.seed) == ("builtin:scenes", 20, 4.5, 7)
    assert pixels(path).shape == (256, 256, 3)
    with Image.open(path) as image:  # what `make demo` generates
        (reading,) = read([image])
    assert [(solid.color, solid.shape) for solid in reading.solids] == [("red", "cube"), ("blue", "sphere")]
    assert reading.relations == ("on top of",)


# --- edits ---


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image of 30 x 20 px, and a mask of its left half."""
    folder = tmp_path_factory.mktemp("photo")
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "photo.png")
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[:, :15] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "photo.png", folder / "mask.png"


def test_an_image_is_edited(model: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "edit.png"
    options = ("--dtype", "float32", "--seed", 3, "--strength", 0.5, "--output", path)
    result = generate(model, "a cat", "--image", photo[0], *options)
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    pipe = PixArtSigmaImg2ImgPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = pipe("a cat", Image.open(photo[0]), 0.5, num_inference_steps=2, generator=[generator]).images[0]
    assert expected.size == (30, 20)
    assert np.array_equal(pixels(path), np.asarray(expected))
    settings = read_settings(path)
    assert settings.extra["Denoising strength"] == "0.5"
    assert (settings.height, settings.width) == (20, 30)
    path = tmp_path / "small.png"
    assert generate(model, "a cat", "--image", photo[0], "--height", 16, "--width", 24, "--output", path).exit_code == 0
    assert pixels(path).shape == (16, 24, 3)
    assert read_settings(path).extra["Denoising strength"] == "0.8"


def test_what_the_mask_does_not_select_stays(model: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "edits"
    result = generate(model, "a cat", "a dog", "--image", photo[0], "--mask", photo[1], "--output", f"{out}/")
    assert result.exit_code == 0, result.stderr
    for name in ("0000.png", "0001.png"):
        assert np.array_equal(pixels(out / name)[:, 15:], pixels(photo[0])[:, 15:])
        assert not np.array_equal(pixels(out / name)[:, :15], pixels(photo[0])[:, :15])
        assert read_settings(out / name).extra["Denoising strength"] == "1.0"
    assert not np.array_equal(pixels(out / "0000.png"), pixels(out / "0001.png"))


@pytest.mark.parametrize(
    ("options", "expected"), [([], None), (["--dtype", "auto"], None), (["--dtype", "float32"], torch.float32)]
)
def test_a_plan_chooses_the_dtypes_unless_one_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: torch.dtype | None
) -> None:
    given = []

    def load(model: str, class_name: str, device: torch.device, dtype: torch.dtype | None, *_: Any) -> None:
        given.append(dtype)
        raise InputError("enough")

    monkeypatch.setattr(pipelines, "load", load)
    generate(model, "a cat", "--memory-budget", "4GB", "--output", tmp_path / "a.png", *options)
    assert given == [expected]


def test_an_edit_within_a_budget(model: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "edit.png"
    result = generate(model, "a cat", "--image", photo[0], "--memory-budget", "4GB", "--output", path)
    assert result.exit_code == 0, result.stderr
    assert pixels(path).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.5"], "--strength needs --image"),
        (["--mask", "MASK"], "--mask needs --image"),
        (["--image", "PHOTO", "--image", "PHOTO"], "PixArt edits one image, and --image was given 2 times"),
        (["--image", "PHOTO", "--strength", "0.1"], "strength=0.1 leaves none of 2 steps"),
        (["--image", "PHOTO", "--strength", "2"], "strength"),
        (["--image", "PHOTO", "--height", "21"], "multiples of 4, not 21 x 30"),
        (["--image", "PHOTO", "--mask", "SMALL"], "8 x 8 pixels for images of 20 x 30"),
        (["--image", "PHOTO", "--mask", "BLACK"], "black everywhere"),
        (["--image", "PHOTO", "--mask", "missing.png"], "'missing.png' cannot be read as an image"),
        (["--image", "missing.png"], "'missing.png' cannot be read as an image"),
    ],
)
def test_mistakes_of_edits_cost_no_loading(
    model: Path,
    photo: tuple[Path, Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("loaded"))
    files = {"PHOTO": photo[0], "MASK": photo[1], "SMALL": tmp_path / "small.png", "BLACK": tmp_path / "black.png"}
    Image.new("L", (8, 8), 255).save(files["SMALL"])
    Image.new("L", (30, 20)).save(files["BLACK"])
    result = generate(model, "a cat", *(files.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
