"""Every example of the documentation: run, or, where that needs what is not here, compared with the code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import impasto
from impasto.serving.batch.manifest import Manifest
from impasto.training.settings import recipe_files
from impasto.training.settings.configuration import Configuration

from ..serving.http.running import running
from . import session
from .commands import commands, problem_with
from .names import Checker
from .pages import SHELL, Block, blocks, inline, pages

SIGMA, GLM = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "zai-org/GLM-Image"

#: Commands that do not run, by how they begin. All others do.
COMMANDS_LEFT_OUT = {
    "pip install": "installs",
    "make demo": "installs; docs/first-image.md has its command",
    "make test": "is this test run",
    "make scenes": "trains for hours; tests/training/test_scenes_recipes.py runs its recipes",
    ".venv/bin/pre-commit": "changes the checkout",
    "impasto train": "trains for hours; tests/training runs the recipes",
    "impasto cache": "needs a data set; tests/training/jobs has some",
    "impasto caption": "needs a large model; tests/training/jobs captions with another",
    "python examples/emoji": "needs a download; tests/test_emoji_example.py runs the chain on a small data set",
    "impasto generate 'red apple'": "needs the model of examples/emoji",
    "python scripts/build_scenes_glm_image.py": "trains for hours",
    "impasto evaluate": "generates 200 images; tests/test_cli.py has it with 3",
    "impasto convert": "needs an original checkpoint; tests/checkpoints/original makes some",
    "impasto info PixArt-XL": "needs an original checkpoint; tests/checkpoints/original makes some",
    "impasto serve": "runs until it is stopped; tests/test_cli_serve.py starts and stops it",
    "impasto batch prompts.jsonl out --ray": "needs Ray; tests/serving/batch/test_ray.py has it",
    "serve run": "needs Ray; tests/serving/test_ray_serve.py has it",
    "podman": "needs a container engine; tests/test_deploy.py reads the file",
    "torchrun": "needs several processes; tests with the marker cluster start them",
    "srun": "needs Slurm",
}
#: Python code that does not run, by a piece of it that no other code has. All other code does.
CODE_LEFT_OUT = {
    "from_single_file(": "needs an original checkpoint; tests/checkpoints/original makes some",
    "compress_keys(": "needs the model of another one; tests/models/test_kv_compression.py has one",
    "runs/lcm/": "needs the result of a training run; tests/training has some",
    "runs/dmd/": "needs the result of a training run; tests/training has some",
    "runs/textual-inversion/": "needs the result of a training run; tests/training has some",
    "init_process_group()": "needs several processes; tests/pipelines/test_parallel.py starts them",
    "cpu_offload()": "needs a GPU",
    "pipe.compile()": "needs a GPU; tests/pipelines/test_compiling.py compiles on the CPU",
    "device_map=": "needs a GPU",
}

#: Pages with examples of clients, which ask a server without a model.
CLIENTS = ("docs/serving.md", "docs/serving-a1111.md")
BATCH, ENGINE, SLOW = "docs/batch.md", "docs/serving-engine.md", "docs/tasks/train.md"
#: Pages that have a test of their own.
APART = (*CLIENTS, BATCH, ENGINE, SLOW)

#: Where examples find the files that a page shows, by language.
FILES = {"yaml": "framed.yaml", "jsonl": "prompts.jsonl"}
DATA = ("yaml", "json", "jsonl", "text")
DIRECTIVES = ("{eval-rst}", "{commands}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples name."""
    folder = tmp_path_factory.mktemp("prepared")
    session.write_images(folder)
    session.write_adapter(folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for published models and for words in capitals."""
    folder = tmp_path_factory.mktemp("models")
    sigma = str(session.write_sigma(folder))
    return {SIGMA: sigma, "/models/sigma": sigma, GLM: str(session.write_glm(folder))}


def run(
    page: str, folder: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, everything: bool = False
) -> None:
    """Run the examples of a page in a folder, in order, with those that are left out if ``everything`` is to run."""
    monkeypatch.chdir(folder)
    runner = session.Session(models, monkeypatch)
    for block in blocks(page):
        if block.language in FILES:
            Path(FILES[block.language]).write_text(block.text)
        for example in examples(block, everything):
            if block.language == "python":
                runner.python(example)
            else:
                program, *arguments = shlex.split(example)
                assert program == "impasto", f"{block}: nothing runs {example}, and no reason is given"
                runner.impasto(arguments)


def examples(block: Block, everything: bool = False) -> list[str]:
    """What runs of a block: its code, or commands."""
    if block.language == "python":
        return [block.text] if everything or not any(piece in block.text for piece in CODE_LEFT_OUT) else []
    found = [shlex.join(words) for words in commands(block.text)] if block.language in SHELL else []
    return [each for each in found if everything or not each.startswith((*COMMANDS_LEFT_OUT,))]


def pages_that_run() -> list[str]:
    return [page for page in pages() if any(examples(block) for block in blocks(page))]


@pytest.mark.parametrize("page", [page for page in pages_that_run() if page not in APART])
def test_examples_run(
    page: str, prepared: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.copy_written(prepared, tmp_path)
    few = tmp_path / "few"
    if page == "docs/glm_image.md":
        models = {**models, "1024": "64"}
    if page == "README.md":
        models = {**models, "PATH": "builtin:scenes", "ADAPTER": "style"}
        (tmp_path / "cube.png").write_bytes((tmp_path / "sign.png").read_bytes())
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red cube"}\n')
    if page == "docs/adapters.md":
        (tmp_path / "detail.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
    run(page, tmp_path, models, monkeypatch)
    images = list(tmp_path.rglob("*.png"))
    assert len(images) > 2, "nothing was generated"
    assert few.exists() == (page == "docs/adapters.md")


@pytest.mark.parametrize("page", CLIENTS)
def test_examples_of_clients_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as served:
        run(page, tmp_path, {"8000": str(served.port)}, monkeypatch)
    jobs = served.service.submitted
    assert [job.seed for job in jobs] == ([7, 8] if page == "docs/serving.md" else [7])
    assert {(job.width, job.height, job.steps, job.guidance_scale) for job in jobs} == {(256, 256, 20, 4.5)}
    assert (tmp_path / "cube.png").exists() == (page == "docs/serving-a1111.md")


def test_examples_of_batches_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (256, 256), "teal").save(tmp_path / "photos" / "forest.jpg")
    run(BATCH, tmp_path, {}, monkeypatch)
    found = {line["id"]: tmp_path / "out" / line["file"] for line in Manifest(tmp_path / "out").own()}
    sizes = {name: Image.open(path).size for name, path in found.items()}
    assert sizes == {"000000": (256, 256), "cone": (128, 96), "000002": (256, 256)}


def test_the_example_of_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as a file of its own would import everything once more."""
    run(ENGINE, tmp_path, {"height=192": "height=192, steps=2"}, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [[f"{seed}", "320", "192"] for seed in range(4)]


@pytest.mark.slow
def test_slow_examples_run(
    prepared: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.copy_written(prepared, tmp_path)
    run(SLOW, tmp_path, models, monkeypatch, everything=True)
    assert len(list(tmp_path.glob("framed/*.png"))) == 24
    assert len(list(tmp_path.glob("framed-images/*.png"))) == 2


@pytest.mark.parametrize("page", pages())
def test_examples_are_valid(page: str) -> None:
    """Commands, options, files, names and arguments of all examples exist, of those that run as well."""
    problems, checker = [], Checker()
    for block in blocks(page):
        for problem in found_in(block, checker):
            problems.append(f"{block}: {problem}")
    for token in inline(page):
        if token.type == "code_inline" and (problem := wrong_inline(token.content)):
            problems.append(f"{page}: `{token.content}`: {problem}")
    assert not problems, "\n".join(problems)


def found_in(block: Block, checker: Checker) -> list[str]:
    if block.language == "python":
        return checker.check(block.text)
    if block.language in SHELL:
        return [f"{' '.join(words)}: {problem}" for words in commands(block.text) if (problem := problem_with(words))]
    if block.language == "yaml":
        return wrong_settings(yaml.safe_load(block.text))
    if block.language in ("json", "jsonl"):
        for text in [block.text] if block.language == "json" else block.text.splitlines():
            json.loads(text)
    return [] if block.language in (*DATA, *DIRECTIVES) else [f"nothing checks the language {block.language!r}"]


def wrong_inline(code: str) -> str | None:
    """What is wrong with a command or a call in running text."""
    if re.match(r"(impasto|python|make|pytest|pip|torchrun) \S", code):
        return problem_with(commands(code)[0], inline=True)
    if not re.fullmatch(r"(impasto\.)?\w+\(.+\)", code):
        return None
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    call = tree.body[0].value if isinstance(tree.body[0], ast.Expr) else None
    if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in impasto.__all__:
        return "; ".join(Checker().check(code)) or None
    return None


def wrong_settings(content: Any) -> list[str]:
    """What is wrong with a configuration of a training run, or with a piece of one."""
    if not isinstance(content, dict) or not set(content) & set(Configuration.model_fields):
        return []  # of another program
    whole = {"steps", "models", "data"} <= set(content)
    changes = [] if whole else [f"{path}={json.dumps(value)}" for path, value in leaves(content)]
    try:
        recipe_files.checked(content, "example") if whole else recipe_files.read("finetune", changes)
    except impasto.ImpastoError as error:
        return [str(error)]
    return []


def leaves(content: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        found += leaves(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]
    return found


def test_what_is_left_out_is_there() -> None:
    found = [(block.language, each) for page in pages() for block in blocks(page) for each in examples(block, True)]
    code = [each for language, each in found if language == "python"]
    others = [each for language, each in found if language != "python"]
    assert not [piece for piece in CODE_LEFT_OUT if sum(piece in each for each in code) != 1]
    assert not [start for start in COMMANDS_LEFT_OUT if not any(each.startswith(start) for each in others)]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("impasto.quantise(x)", "impasto.quantise does not exist"),
        ("from impasto import Missing", "has no Missing"),
        ("quantize(pipe, 'nf4', keep=True)", "no argument 'keep'"),
        ("guide_between(pipe, 0, 1, 'noise', 5)", "by position"),
        ("pipe = PixArtSigmaPipeline.from_pretrained('x')\npipe.enable_tea()", "pipe.enable_tea does not"),
        ("pipe = PixArtSigmaPipeline.from_pretrained('x')\npipe('a', step=3)", "no argument 'step'"),
        ("PixArtSigmaPipeline.from_pretrained('x').transformer.fuse()", ".fuse does not exist"),
    ],
)
def test_wrong_names_are_found(code: str, problem: str) -> None:
    assert any(problem in found for found in Checker().check(code))


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("impasto generat 'a cube'", "no command"),
        ("impasto generate 'a cube' --stepps 3", "No such option"),
        ("impasto generate", "Missing"),
        ("impasto generate 'a cube' --steps many", "a valid integer"),
        ("python benchmarks/missing.py", "there is no"),
        ("python benchmarks/step.py --pixel 3", "no option"),
        ("python -c 'import impasto; impasto.quantise'", "does not exist"),
        ("torchrun --nnodes 2 -m impasto trian", "no command"),
        ("make tests", "no target"),
        ("pip install 'impasto[trian]'", "no extra"),
        (".venv/bin/pytest tests/missing.py", "there is no"),
        ("impasta generate", "not known"),
    ],
)
def test_wrong_commands_are_found(command: str, problem: str) -> None:
    found = problem_with(commands(command)[0])
    assert found is not None
    assert problem in found


def test_wrong_settings_are_found() -> None:
    assert "bach_size" in wrong_settings({"data": {"bach_size": 3}})[0]
    assert not wrong_settings({"data": {"batch_size": 3}})
