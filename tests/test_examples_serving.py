"""The examples under ``examples/serving/``, run against a server without a model."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.serving.http.running import Running, running

EXAMPLES = Path(__file__).parents[1] / "examples" / "serving"
KEY = "0123456789abcdefghij"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(keys=(KEY,)) as found:
        yield found


def names(folder: Path) -> set[str]:
    """The names of what was written, all of which are images of 256 x 256 pixels."""
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.size == (256, 256)
    return {path.name for path in folder.iterdir()}


def run(served: Running, *command: str) -> list[str]:
    environment = os.environ | {"IMPASTO_URL": served.url, "IMPASTO_KEY": KEY}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "openai_client",
            {
                "image-0.png",
                "image-1.png",
                "preview-0.png",
                "preview-1.png",
                "preview-2.png",
                "watched.png",
                "edited.png",
            },
        ),
        ("a1111_client", {"generated.png", "changed.png", "repainted.png"}),
    ],
)
def test_python(script: str, expected: set[str], served: Running, tmp_path: Path):
    main = runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"]
    main(["a cat", "--url", served.url, "--key", KEY, "--output", str(tmp_path / "out")])
    assert names(tmp_path / "out") == expected
    prompts = [job.prompt for job in served.service.submitted]
    assert prompts[-1] == "a green cone"
    assert "a cat" in prompts


def test_curl(served: Running, tmp_path: Path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    found = run(served, "bash", str(EXAMPLES / "curl.sh"), 'a "quoted" cat', str(tmp_path / "out"))
    assert found == ["image.png", "edited.png"]
    assert names(tmp_path / "out") == {"image.png", "edited.png"}
    first, second = served.service.submitted[-2:]
    assert first.prompt == 'a "quoted" cat'
    assert second.given.strength == 0.6


@pytest.mark.parametrize("script", ["generate.mjs", "openai_client.mjs"])
def test_javascript(script: str, served: Running, tmp_path: Path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if script == "openai_client.mjs" and not (EXAMPLES / "node_modules" / "openai").is_dir():
        pytest.skip("npm install --prefix examples/serving openai has not been run")
    found = run(served, "node", str(EXAMPLES / script), "a cat", str(tmp_path / "out"))
    expected = (
        ["preview-0.png", "preview-1.png", "image.png"] if script == "generate.mjs" else ["image.png", "edited.png"]
    )
    assert found == expected
    assert names(tmp_path / "out") == set(expected)


def test_a_refusal_ends_the_script_with_its_reason(served: Running, tmp_path: Path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = ["node", str(EXAMPLES / "generate.mjs"), " ", str(tmp_path)]
    environment = os.environ | {"IMPASTO_URL": served.url, "IMPASTO_KEY": KEY}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert "400: prompt is empty" in found.stderr


def test_notebook(served: Running, monkeypatch: pytest.MonkeyPatch):
    notebook = json.loads((EXAMPLES / "images.ipynb").read_text("utf-8"))
    monkeypatch.setenv("IMPASTO_URL", served.url)
    monkeypatch.setenv("IMPASTO_KEY", KEY)
    names: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            *before, last = "".join(cell["source"]).split("\n")
            exec("\n".join(before), names)
            shown.append(eval(last, names))
    assert shown[0] == ["scenes"]
    assert [image.size for image in shown[1:]] == [(384, 128), (512, 128), (512, 128)]
