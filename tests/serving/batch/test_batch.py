"""``impasto batch``: images of records, a manifest of all of them, and runs that are killed at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from impasto.cli import app
from impasto.cli.entry import Commands
from impasto.nn import machine
from impasto.pipelines.image_files import read_settings
from impasto.serving.batch.manifest import Manifest
from impasto.serving.batch.outputs import Folders, Shards
from impasto.serving.batch.run import Made, missing, run

from ...tiny import write_pipeline
from .test_outputs import check, png, records


def command(*arguments: str) -> int:
    import typer

    click: Any = typer.main.get_command(app)
    assert isinstance(click, Commands)
    with pytest.raises(SystemExit) as stop:
        click.main(list(arguments), prog_name="impasto")
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "model")


def write(folder: Path, *given: dict[str, Any]) -> str:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
    return str(folder / "prompts.jsonl")


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_records_are_images_of_their_own_settings(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "room.png")
    given: list[dict[str, Any]] = [
        {"prompt": "a cat", "num_inference_steps": 2},
        {"prompt": "a red cube", "num_inference_steps": 3, "size": "24x16", "id": "cube", "seed": 5},
        {"prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 1, "scheduler": "ddim"},
        {"prompt": "a cat", "num_inference_steps": 4, "image": "room.png", "strength": 0.5, "id": "edit"},
    ]
    prompts, out = write(tmp_path, *given), tmp_path / "out"
    options = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]
    assert command("batch", prompts, str(out), *options) == 0, capsys.readouterr().err
    lines = {line["id"]: line for line in Manifest(out).own()}
    assert sorted(lines) == ["000000", "000002", "cube", "edit"]
    assert {name: line["seed"] for name, line in lines.items()} == {"000000": 0, "cube": 5, "000002": 2, "edit": 3}
    settings = read_settings(out / lines["cube"]["file"])
    assert (settings.prompt, settings.steps, settings.seed, settings.width) == ("a red cube", 3, 5, 24)
    alone = ["generate", "a red cube", *options, "--seed", "5", "--steps", "3", "--width", "24", "--height", "16"]
    assert command(*alone, "--output", str(tmp_path / "alone.png")) == 0
    assert np.abs(pixels(tmp_path / "alone.png") - pixels(out / lines["cube"]["file"])).max() <= 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    capsys.readouterr()

    monkeypatch.setattr(machine, "free_memory", lambda device: 0)  # does not decide which records are accepted
    more = write(tmp_path, *given, {"prompt": "a cactus", "num_inference_steps": 1})
    assert command("batch", more, str(out), *options) == 0
    assert "1 generated, 4 skipped, 0 failed" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    changed = write(tmp_path, {**given[0], "seed": 99})
    assert command("batch", changed, str(out), *options) == 1
    assert "of another model or other settings" in capsys.readouterr().err
    assert command("batch", write(tmp_path, *given), str(out), "--format", "webdataset", *options) == 1
    assert "in another format; give the --format" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))
    assert command("batch", write(tmp_path, {"promt": "x"}), str(tmp_path / "new"), *options) == 1
    assert not (tmp_path / "new").exists()


def test_failures_are_recorded_and_tried_again(tmp_path: Path) -> None:
    todo, manifest = records(6), Manifest(tmp_path)

    def some(each: Any) -> Any:
        return (Made(r, png(r)) if r.index % 2 else Made(r, error="no memory") for r in each)

    counts = run(todo, some, Folders(tmp_path), manifest, "m", max_errors=3)
    assert (counts.generated, counts.failed) == (3, 3)
    assert counts.faults[0] == "r0: no memory"
    left = missing(todo, manifest, "m")
    assert [record.index for record in left] == [0, 2, 4]
    assert manifest.lines()["r2"].values["error"] == "no memory"
    with pytest.raises(RuntimeError, match="2 images could not be generated; the last one, r2: no memory"):
        run(left, some, Folders(tmp_path), manifest, "m", max_errors=1)
    run(left, lambda each: (Made(r, png(r)) for r in each), Folders(tmp_path), manifest, "m")
    assert missing(todo, manifest, "m") == []


def test_the_exit_status_says_whether_every_record_has_its_image(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"b"}

    def by_engine(*_: Any, **__: Any) -> Any:
        return lambda each: (Made(r, error="no memory") if r.prompt in failing else Made(r, png(r)) for r in each)

    monkeypatch.setattr("impasto.serving.engine.program.make_engine", lambda spec: None)
    monkeypatch.setattr("impasto.serving.batch.generate.by_engine", by_engine)
    prompts = write(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    arguments = ["batch", prompts, str(tmp_path / "out"), "--model", str(model), "--device", "cpu"]
    assert command(*arguments) == 1
    said = capsys.readouterr()
    assert "2 generated, 0 skipped, 1 failed" in said.out
    assert "1 of 3 images could not be generated; run the same command" in said.err
    failing.clear()
    assert command(*arguments) == 0
    assert "1 generated, 2 skipped, 0 failed" in capsys.readouterr().out


def test_images_that_come_twice_count_once(tmp_path: Path) -> None:
    todo, manifest = records(3), Manifest(tmp_path)
    counts = run(todo, lambda each: (Made(r, png(r)) for r in [*each, *each]), Folders(tmp_path), manifest, "m")
    assert counts.generated == 3
    assert [line["id"] for line in manifest.own()] == ["r0", "r1", "r2"]


def test_half_a_line_of_the_manifest_does_not_count(tmp_path: Path) -> None:
    todo, manifest = records(2), Manifest(tmp_path)
    run(todo, lambda each: (Made(r, png(r)) for r in each), Folders(tmp_path), manifest, "m")
    content = manifest.path.read_bytes()
    manifest.path.write_bytes(content[:-20])
    assert [record.index for record in missing(todo, manifest, "m")] == [1]
    run(todo[1:], lambda each: (Made(r, png(r)) for r in each), Folders(tmp_path), manifest, "m")
    assert [line["id"] for line in manifest.own()] == ["r0", "r1"]


def test_a_table_of_the_manifest(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    manifest = Manifest(tmp_path, (2, 3))
    run(records(3), lambda each: (Made(r, png(r)) for r in each), Folders(tmp_path), manifest, "m")
    path = manifest.write_parquet()
    assert path.name == "manifest-2-of-3.parquet"
    rows = parquet.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == ["r0", "r1", "r2"]
    assert rows[1]["prompt"] == "prompt 1"


def make_forty(folder: Path, kind: str, started: Path) -> None:
    """What a process does that is killed."""
    manifest = Manifest(folder)
    output = Folders(folder) if kind == "folder" else Shards(folder, (1, 1), manifest.own(), 3)
    left = missing(records(40), manifest, "m")
    started.touch()
    run(left, lambda each: (Made(r, png(r)) for r in each), output, manifest, "m")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_batch_that_is_killed_at_any_moment_has_no_gaps_and_no_duplicates(kind: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    out, chance, kills = tmp_path / "out", random.Random(0), 0
    out.mkdir()
    for turn in range(6):
        process = context.Process(target=make_forty, args=(out, kind, tmp_path / f"started-{turn}"))
        process.start()
        deadline = time.monotonic() + 100
        while not (tmp_path / f"started-{turn}").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        ids = [line["id"] for line in Manifest(out).own()]
        assert len(set(ids)) == len(ids)
    assert kills
    process = context.Process(target=make_forty, args=(out, kind, tmp_path / "last"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert sorted(line["index"] for line in Manifest(out).own()) == list(range(40))
    if kind == "webdataset":
        check(out, 40)
    else:
        assert len(list(out.rglob("*.png"))) == 40
        for line in Manifest(out).own():
            assert Image.open(out / line["file"]).getpixel((0, 0)) == (line["index"], 0, 0)


@pytest.mark.cluster
def test_the_command_killed_and_resumed_makes_the_images_of_one_run(model: Path, tmp_path: Path) -> None:
    """With a real engine, in two shards of a batch."""
    prompts = write(
        tmp_path,
        *(
            {"prompt": f"a cat {i}", "num_inference_steps": 2 + i % 3, "size": f"{16 + 8 * (i % 2)}x16"}
            for i in range(40)
        ),
    )
    options = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, out, chance = tmp_path / "whole", tmp_path / "out", random.Random(1)

    def start(*more: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "impasto", "batch", prompts, *more, *options]
        return subprocess.Popen(arguments, env=environment)

    assert start(str(whole)).wait() == 0
    for turn in range(4):
        process = start(str(out), "--shard", f"{1 + turn % 2}/2")
        deadline = time.monotonic() + 200
        before = len(list(out.rglob("*.png")))
        while process.poll() is None and time.monotonic() < deadline and len(list(out.rglob("*.png"))) == before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    for part in (1, 2):
        assert start(str(out), "--shard", f"{part}/2").wait() == 0
    lines = [line for part in (1, 2) for line in Manifest(out, (part, 2)).own()]
    assert sorted(line["index"] for line in lines) == list(range(40))
    expected = {line["id"]: line["file"] for line in Manifest(whole).own()}
    assert sorted(path.name for path in out.rglob("*.png")) == sorted(path.name for path in whole.rglob("*.png"))
    for line in lines:
        assert np.abs(pixels(out / line["file"]) - pixels(whole / expected[line["id"]])).max() <= 1
