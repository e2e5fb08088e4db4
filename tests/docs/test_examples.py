"""Every example of the documentation: run, or, where that needs what is not here, compared with the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import impasto
from impasto.training.settings import recipe_files
from impasto.training.settings.configuration import Configuration

from . import session
from .commands import commands, problem_with
from .names import Checker
from .pages import SHELL, Block, blocks, inline, pages

SIGMA, GLM = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "zai-org/GLM-Image"

#: Pages whose Python and `impasto` commands run, in order.
RUN = (
    "README.md",
    "docs/install.md",
    "docs/first-image.md",
    "docs/tasks/less-memory.md",
    "docs/tasks/faster.md",
    "docs/editing.md",
    "docs/adapters.md",
    "docs/lossy.md",
    "docs/glm_image.md",
)
#: The same, but slow.
RUN_SLOWLY = ("docs/tasks/train.md",)

#: Of these pages, examples that do not run, by a piece of their text.
LEFT_OUT = {
    "impasto train": "trains for hours; tests/training runs the recipes",
    "impasto serve": "runs until it is stopped; tests/serving runs it in this process",
    "impasto batch": "needs a file of prompts; tests/serving runs it",
    "impasto evaluate": "generates 200 images; tests/scenes runs it",
    "impasto convert": "needs an original checkpoint; tests/checkpoints/original makes some",
    "cpu_offload()": "needs a GPU",
    "pipe.compile()": "needs a GPU; tests/pipelines/test_compiling.py compiles on the CPU",
    "device_map=": "needs a GPU",
}

#: Pages of which no example runs.
NOT_RUN = {
    "CONTRIBUTING.md": "this is the test run",
    "docs/convert.md": "needs original checkpoints; tests/checkpoints/original makes some",
    "docs/data.md": "needs a data set and a training run; tests/training has them",
    "docs/distillation.md": "needs training runs; tests/training has them",
    "docs/training.md": "needs a data set and a training run; tests/training has them",
    "docs/training-distributed.md": "needs several GPUs; tests/training/distributed runs two processes",
    "docs/scenes/model.md": "trains for hours",
    "docs/scenes/glm_image.md": "trains for hours",
    "examples/emoji/README.md": "trains for hours; tests/test_emoji_example.py runs the chain on a small data set",
    "docs/serving.md": "needs a server; tests/serving runs it in this process",
    "docs/serving-engine.md": "needs a server; tests/serving runs it in this process",
    "docs/serving-a1111.md": "needs a server; tests/serving/http/test_a1111_client.py drives one with this client",
    "docs/page.md": "needs a server and a browser; tests/serving has them",
    "docs/batch.md": "tests/serving runs it",
    "docs/parallel.md": "needs several processes; tests with the marker cluster start them",
    "docs/deploy.md": "needs a server",
    "docs/sizing.md": "needs a server",
}
OTHER_LANGUAGES = ("yaml", "json", "jsonl", "javascript", "js", "ini", "dockerfile", "http", "text", "html")
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
) -> session.Session:
    """Run the examples of a page in a folder, without those that are left out unless ``everything`` is to run."""
    monkeypatch.chdir(folder)
    runner = session.Session(models, monkeypatch)
    for block in blocks(page):
        if block.language == "python" and (everything or not left_out(block.text)):
            runner.python(block.text)
        elif block.language in SHELL:
            for words in commands(block.text):
                if words[0] == "impasto" and (everything or not left_out(" ".join(words))):
                    runner.impasto(words[1:])
        elif block.language == "yaml":
            Path("framed.yaml").write_text(block.text)
    return runner


def left_out(text: str) -> bool:
    return any(piece in text for piece in LEFT_OUT)


@pytest.mark.parametrize("page", RUN)
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
    if page == "docs/adapters.md":
        (tmp_path / "detail.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
    runner = run(page, tmp_path, models, monkeypatch)
    images = list(tmp_path.rglob("*.png"))
    assert len(images) > 2, "nothing was generated"
    assert few.exists() == (page == "docs/adapters.md")
    assert runner is not None


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_SLOWLY)
def test_slow_examples_run(
    page: str, prepared: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.copy_written(prepared, tmp_path)
    run(page, tmp_path, models, monkeypatch, everything=True)
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
    if block.language == "json":
        for text in [block.text] if block.text.startswith(("{\n", "[\n")) else block.text.splitlines():
            json.loads(text)
    known = (*OTHER_LANGUAGES, *DIRECTIVES)
    return [] if block.language in known else [f"nothing checks the language {block.language!r}"]


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


def test_every_page_with_examples_is_run_or_says_why_not() -> None:
    with_code = {page for page in pages() for block in blocks(page) if block.language in ("python", *SHELL)}
    assert not with_code - {*RUN, *RUN_SLOWLY, *NOT_RUN}
    assert not {*RUN, *RUN_SLOWLY} & set(NOT_RUN)
    everything = "".join(block.text for page in (*RUN, *RUN_SLOWLY) for block in blocks(page))
    assert not [piece for piece in LEFT_OUT if piece not in everything], "left out, but not there"


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
