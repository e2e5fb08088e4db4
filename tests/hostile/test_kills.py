"""Saves that are killed: what is there afterwards is wholly the old or wholly the new, whatever the instant.

A save runs in a fork in which every call that changes the disk is counted. The fork is killed with SIGKILL before and
after each of them in turn, and then at random instants; another fork loads what is left.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from PIL import Image

import impasto.checkpoints.weights
from impasto import folders
from impasto.errors import CheckpointError
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.image_files import save_image
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.running.checkpoints import append_log, load_state, save_state, trim_log

from .. import tiny_glm
from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from .sandbox import run

#: What changes a disk: counted, and killed before and after.
CALLS = {
    os: [
        *("open", "write", "fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir"),
        *("chmod", "ftruncate", "symlink", "link", "utime"),
    ],
    io: ["open"],
    builtins: ["open"],
    torch: ["save"],
    safetensors.torch: ["save_file", "serialize_file"],
    impasto.checkpoints.weights: ["save_file"],
}


class Counter:
    """Counts the calls that change the disk, and kills the process at one of them."""

    def __init__(self, kill_at: int):
        self.count, self.kill_at, self.names = 0, kill_at, list[str]()
        for module, names in CALLS.items():
            for name in names:
                setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self._step(f"before {name}")
            result = call(*args, **options)
            self._step(f"after {name}")
            return result

        return counted

    def _step(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


# --- what is saved: each kind writes a version, 1 or 2, and says which version it finds ---


def filled(module: Any, value: int) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def value_of(module: Any) -> set[float]:
    return {float(x) for parameter in module.parameters() for x in (parameter.min(), parameter.max())}


def save_model(folder: Path, version: int, size: str = "10GB") -> None:
    filled(tiny_transformer(dropout=version / 10), version).save_pretrained(folder, max_shard_size=size)


def find_model(folder: Path) -> set[float]:
    model = PixArtTransformer2DModel.from_pretrained(folder)
    return value_of(model) | {round(model.config.dropout * 10, 6)}


def save_pipeline(folder: Path, version: int) -> None:
    pipe = tiny_pipeline(
        PixArtSigmaPipeline,
        tokenizer=tiny_tokenizer(64 * version),
        transformer=filled(tiny_transformer(dropout=version / 10), version),
        vae=filled(tiny_vae(scaling_factor=float(version)), version),
        text_encoder=filled(tiny_text_encoder(), version),
    )
    pipe.scheduler = type(pipe.scheduler)(beta_start=version / 100)
    pipe.save_pretrained(folder, max_shard_size="20KB" if version == 2 else "10GB")


def find_pipeline(folder: Path) -> set[float]:
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    found = {round(pipe.transformer.config.dropout * 10, 6), float(pipe.vae.config.scaling_factor)}
    found |= {pipe.tokenizer.model_max_length / 64, round(pipe.scheduler.config.beta_start * 100, 6)}
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        found |= value_of(module)
    return found


def find_components_alone(folder: Path) -> set[float]:
    """Components loaded by themselves out of a pipeline's folder, before the pipeline is."""
    transformer = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    return value_of(transformer) | value_of(vae) | find_pipeline(folder)


def save_training(folder: Path, version: int) -> None:
    save_state(folder / "state.pt", {"models": {"w": torch.full((1000,), float(version))}, "step": version})


def find_training(folder: Path) -> set[float]:
    state = load_state(folder / "state.pt")
    return {float(state["step"]), *state["models"]["w"].tolist()}


def write_image(folder: Path, version: int) -> None:
    save_image(Image.new("RGB", (32, 32), (version,) * 3), folder / "image.png")


def find_image(folder: Path) -> set[float]:
    with Image.open(folder / "image.png") as image:
        return {float(x) for pair in image.convert("RGB").getextrema() for x in pair}  # type: ignore[union-attr]


def save_scheduler(folder: Path, version: int) -> None:
    impasto.DDIMScheduler(beta_start=version / 100).save_pretrained(folder)


def find_scheduler(folder: Path) -> set[float]:
    return {round(impasto.DDIMScheduler.from_pretrained(folder).config.beta_start * 100, 6)}


def save_log(folder: Path, version: int) -> None:
    for step in range(version, 2 * version):
        append_log(folder / "log.jsonl", step=step)
    trim_log(folder / "log.jsonl", 2)


def find_log(folder: Path) -> set[float]:
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.startswith(b'{"step": ') and line.endswith(b"}\n") for line in lines)
    return {1.0}  # lines are whole; which of them are there may differ


def save_cache(folder: Path, version: int) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(folder / "cache", max_bytes="100KB")
    with torch.no_grad():
        pipe.encode_prompt([f"a cat {version}", "a dog"])


def find_cache(folder: Path) -> set[float]:
    """An embedding that the cache holds is the encoder's."""
    plain, cached = tiny_pipeline(PixArtSigmaPipeline), tiny_pipeline(PixArtSigmaPipeline)
    cached.enable_prompt_cache(folder / "cache", max_bytes="100KB")
    prompts = ["a cat 1", "a cat 2", "a dog"]
    with torch.no_grad():
        ours, theirs = (pipe.encode_prompt(prompts).prompt_embeds for pipe in (cached, plain))
    assert torch.equal(ours, theirs)
    assert not list((folder / "cache").glob("*.tmp")), "what a killed process left is removed"
    return {1.0}


def save_glm_image(folder: Path, version: int) -> None:
    components = {name: filled(part, version) for name, part in glm_models().items()}
    processor = glm_texts()["processor"]
    processor.image_processor.image_mean = [version / 10] * 3
    scheduler = impasto.FlowMatchEulerDiscreteScheduler(**{**tiny_glm.SCHEDULER, "max_shift": float(version)})
    tokenizer = glm_texts()["tokenizer"]
    pipe = impasto.GlmImagePipeline(**components, processor=processor, scheduler=scheduler, tokenizer=tokenizer)
    pipe.save_pretrained(folder, max_shard_size="20KB" if version == 2 else "10GB")


def find_glm_image(folder: Path) -> set[float]:
    pipe = impasto.GlmImagePipeline.from_pretrained(folder)
    found = {pipe.scheduler.config.max_shift, round(pipe.processor.image_processor.image_mean[0] * 10, 6)}
    return found | {value for name in glm_models() for value in value_of(getattr(pipe, name))}


@functools.cache
def glm_texts() -> dict[str, Any]:
    return {**tiny_glm.text_parts(), **tiny_glm.prior_parts()}


def glm_models() -> dict[str, Any]:
    return {
        "text_encoder": glm_texts()["text_encoder"],
        "vision_language_encoder": glm_texts()["vision_language_encoder"],
        "transformer": impasto.GlmImageTransformer2DModel(**tiny_glm.TRANSFORMER, sample_size=8),
        "vae": impasto.AutoencoderKL(**tiny_glm.VAE),
    }


def look_by_commands(folder: Path) -> set[float]:
    """What the commands read ahead of loading, before anything else has looked: the size of the images."""
    from impasto.memory.inspection import read_configs, resolve_pipeline

    found, _ = resolve_pipeline(str(folder))
    (transformer,) = read_configs(found, "transformer")
    return {round(transformer["dropout"] * 10, 6)} | find_pipeline(folder)


class Kind(NamedTuple):
    save: Callable[[Path, int], None]
    find: Callable[[Path], set[float]]


def to_shards(folder: Path, version: int) -> None:
    save_model(folder, version, "10GB" if version == 1 else "5KB")


def from_shards(folder: Path, version: int) -> None:
    save_model(folder, version, "5KB" if version == 1 else "10GB")


def other_shards(folder: Path, version: int) -> None:
    save_model(folder, version, "5KB" if version == 1 else "9KB")


KINDS = {
    "model, one file": Kind(save_model, find_model),
    "model, one file to shards": Kind(to_shards, find_model),
    "model, shards to one file": Kind(from_shards, find_model),
    "model, shards to shards": Kind(other_shards, find_model),
    "pipeline": Kind(save_pipeline, find_pipeline),
    "components of a pipeline": Kind(save_pipeline, find_components_alone),
    "pipeline, by a command": Kind(save_pipeline, look_by_commands),
    "GLM-Image": Kind(save_glm_image, find_glm_image),
    "scheduler": Kind(save_scheduler, find_scheduler),
    "training state": Kind(save_training, find_training),
    "training log": Kind(save_log, find_log),
    "prompt cache": Kind(save_cache, find_cache),
    "image": Kind(write_image, find_image),
}


# --- in a fork ---


def in_fork(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run something in a fork, killed after some seconds if so asked; its exit status, negative if killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def versions_after(kind: Kind, folder: Path) -> str:
    """Which version a new process finds: "1", "2", or what is wrong."""
    report = folder.parent / "found"

    def look() -> None:
        try:
            found = kind.find(folder)
            text = str(int(found.pop())) if len(found) == 1 else f"a mixture: {found}"
        except CheckpointError as error:
            text = f"lost: {error}"
        report.write_text(text)

    report.unlink(missing_ok=True)
    in_fork(look)
    return report.read_text() if report.exists() else "a crash"


def prepare(kind: Kind, folder: Path) -> None:
    """Version 1; what is made once in a process, such as tokenizers, is made too."""
    elsewhere = folder.with_name("elsewhere")
    for place, version in ((elsewhere, 2), (folder, 1)):
        place.mkdir(parents=True, exist_ok=True)
        kind.save(place, version)


def count_calls(name: str, place: str) -> list[str]:
    kind, folder = KINDS[name], Path(place) / "folder"
    prepare(kind, folder)
    counter = Counter(0)
    kind.save(folder, 2)
    return list(counter.names)


def kill_at_each(name: str, place: str, steps: list[int]) -> list[tuple[int, str]]:
    """Kill a save of version 2 over version 1 at these calls. What was found each time."""
    kind, folder = KINDS[name], Path(place) / "folder"
    prepared = Path(place) / "old"
    prepare(kind, prepared)
    (prepared / "notes.txt").write_text("mine")
    found = []
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)

        def save(step: int = step) -> None:
            Counter(step)
            kind.save(folder, 2)

        assert in_fork(save) == -signal.SIGKILL, f"call {step} was not reached"
        verdict = versions_after(kind, folder)
        if (folder / "notes.txt").read_text() != "mine":
            verdict = "a foreign file was lost"
        assert in_fork(lambda: kind.save(folder, 2)) == 0
        left = [path.name for path in folder.rglob("*") if path.name == folders.STAGING or path.suffix == ".tmp"]
        found.append((step, verdict if not left else f"the next save leaves {left}"))
    return found


def kill_at_random(name: str, place: str, times: int, seed: int) -> list[tuple[float, str]]:
    kind, folder = KINDS[name], Path(place) / "folder"
    prepare(kind, folder)
    begun = time.perf_counter()
    assert in_fork(lambda: kind.save(folder, 1)) == 0
    lasts = time.perf_counter() - begun
    delays = [random.Random(f"{seed} {name} {i}").uniform(0, 1.2) * lasts for i in range(times)]
    found = []
    for delay in delays:
        in_fork(lambda: kind.save(folder, 2), kill_after=delay)
        found.append((delay, versions_after(kind, folder)))
        assert in_fork(lambda: kind.save(folder, 1)) == 0
    return found


def save_a_scheduler_after_a_kill(place: str) -> tuple[int, set[float]]:
    """A pipeline's save is committed and killed; then a scheduler of its own is saved into the pipeline's folder."""
    folder = Path(place) / "folder"
    prepare(KINDS["pipeline"], folder)

    carry_out = folders._apply

    def apply(place: Path) -> None:
        if place.name == folder.name:  # and not one of a component, in the folder of the save
            os.kill(os.getpid(), signal.SIGKILL)
        carry_out(place)

    def killed() -> None:
        folders._apply = apply
        save_pipeline(folder, 2)

    assert in_fork(killed) == -signal.SIGKILL
    impasto.DPMSolverMultistepScheduler(num_train_timesteps=777).save_pretrained(folder / "scheduler")
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    return pipe.scheduler.config.num_train_timesteps, value_of(pipe.transformer)


def test_a_component_that_is_saved_after_a_kill_is_not_lost(tmp_path: Path) -> None:
    outcome = run(save_a_scheduler_after_a_kill, str(tmp_path))
    assert outcome.value == (777, {2.0}), outcome


def count(name: str, tmp_path: Path) -> int:
    outcome = run(count_calls, name, str(tmp_path / "count"), seconds=60)
    assert outcome.kind == "returned", (outcome.message, outcome.trace, outcome.stderr)
    return len(outcome.value)


def check(found: list[tuple[Any, str]]) -> None:
    wrong = [(step, verdict) for step, verdict in found if verdict not in ("1", "2")]
    assert not wrong


@pytest.mark.parametrize("name", list(KINDS))
def test_killed_at_some_calls(name: str, tmp_path: Path) -> None:
    steps = list(range(1, count(name, tmp_path) + 1))
    some = sorted(random.Random(name).sample(steps, min(len(steps), 6)))
    outcome = run(kill_at_each, name, str(tmp_path / "sweep"), some, seconds=120)
    assert outcome.kind == "returned", (outcome.message, outcome.trace, outcome.stderr)
    check(outcome.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_killed_before_and_after_every_call(name: str, tmp_path: Path) -> None:
    steps = list(range(1, count(name, tmp_path) + 1))
    outcome = run(kill_at_each, name, str(tmp_path / "sweep"), steps, seconds=1200)
    assert outcome.kind == "returned", (outcome.message, outcome.trace, outcome.stderr)
    check(outcome.value)
    assert {verdict for _, verdict in outcome.value} == (
        {"1"} if name in ("training log", "prompt cache") else {"1", "2"}
    )
    print(f"{name}: {len(steps)} kills, {sum(v == '2' for _, v in outcome.value)} times the new version")


@pytest.mark.slow
def test_killed_at_a_hundred_random_instants(tmp_path: Path) -> None:
    total = 0
    for i, name in enumerate(KINDS):
        times = 10 if i else 110 - 10 * len(KINDS)
        outcome = run(kill_at_random, name, str(tmp_path / str(i)), times, 0, seconds=300)
        assert outcome.kind == "returned", (outcome.message, outcome.trace, outcome.stderr)
        check(outcome.value)
        total += len(outcome.value)
    assert total >= 100
