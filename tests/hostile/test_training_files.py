"""Training states of other models, damaged and foreign ones; logs after a kill; entries of a prompt cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.running import checkpoints
from impasto.training.running.checkpoints import append_log, trim_log
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ..tiny import tiny_pipeline
from ..training.runs import Of, rows, settings, steps_alone
from .sandbox import refused, run


class Small(nn.Module):
    def __init__(self, width: int = 4, layers: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.norm(x)
        return out


def train_small(folder: str, width: int = 4, layers: int = 2, steps: int = 4) -> list[float]:
    """The steps that the log has afterwards."""
    torch.manual_seed(0)
    model = Small(width, layers)

    def loss(step: int, random: Randomness) -> torch.Tensor:
        x = random.normal([2, width]).to(model.norm.weight.dtype)
        return model(x).float().square().mean() + (model.norm.weight - 2).square().mean()

    plan = settings(steps, log_every=1, checkpoints={"every": 2}, schedule={"warmup": 1})
    train(Of(model, loss), steps_alone(), plan, Path(folder))
    return [row["step"] for row in rows(Path(folder))]


def state_of(folder: Path) -> Path:
    """What the last checkpoint says about itself."""
    last = checkpoints.latest(folder)
    assert last is not None
    return last / "state.json"


def shard_of(path: Path) -> Path:
    (file,) = path.parent.glob("*.safetensors")
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_small(str(folder))
    return folder


class Runs:
    """A pickle that creates a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def mark_of(path: Path) -> Path:
    return path.parents[2] / "ran"


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A checkpoint that says something else about itself."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], names: bool = True) -> Callable[[Path], object]:
    """A checkpoint of other tensors, which it may describe."""

    def damage(path: Path) -> None:
        file = shard_of(path)
        with safe_open(file, framework="pt") as opened:
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        change(held)
        save_file(held, file, {**metadata, "first rows": json.dumps(dict.fromkeys(held, 0))})
        content = json.loads(path.read_text())
        content["files"][file.name] = file.stat().st_size
        if names:
            kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in held.items()}
            content["tensors"] = kinds
        path.write_text(json.dumps(content))

    return damage


BIAS, EMA = "models.module.norm.bias", "ema.module.norm.bias"
MOMENT = "optimizers.1.module.norm.bias.exp_avg"
STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty shard": (lambda path: shard_of(path).write_bytes(b""), "shard-"),
    "half a shard": (lambda path: shard_of(path).write_bytes(shard_of(path).read_bytes()[:900]), "shard-"),
    "no shard": (lambda path: shard_of(path).unlink(), "shard-"),
    "a pickle with code": (lambda path: shard_of(path).write_bytes(pickle.dumps(Runs(mark_of(path)))), "shard-"),
    "a directory": (lambda path: (shard_of(path).rename(path.parent / "x"), shard_of_is_folder(path)), "shard-"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "an empty file": (lambda path: path.write_bytes(b""), "not readable JSON"),
    "a list": (lambda path: path.write_text("[1]"), "list"),
    "no files": (edited(lambda s: s.pop("files")), "not that of a training run"),
    "files are a number": (edited(lambda s: s.update(files=3)), "not that of a training run"),
    "another size": (edited(lambda s: s["files"].update(dict.fromkeys(s["files"], 7))), "missing or damaged"),
    "a file elsewhere": (edited(lambda s: s["files"].update({"../state.json": 3})), "missing or damaged"),
    "no tensors": (edited(lambda s: s.update(tensors={})), "than"),
    "tensors are numbers": (edited(lambda s: s["tensors"].update({BIAS: 3})), "does not describe"),
    "no step": (edited(lambda s: s["state"].pop("step")), "'step'"),
    "a step of text": (edited(lambda s: s["state"].update(step="two")), "'step'"),
    "a negative step": (edited(lambda s: s["state"].update(step=-1)), "'step'"),
    "a tensor too few": (tensors(lambda t: t.pop(BIAS)), "it lacks models.module.norm.bias"),
    "a tensor that is not there": (tensors(lambda t: t.pop(BIAS), names=False), "only a part"),
    "a tensor too many": (tensors(lambda t: t.update(extra=torch.ones(1))), "extra"),
    "another shape": (tensors(lambda t: t.update({BIAS: torch.ones(9)})), "norm.bias"),
    "another shape than it says": (tensors(lambda t: t.update({BIAS: torch.ones(3)}), names=False), "norm.bias"),
    "a complex tensor": (tensors(lambda t: t.update({BIAS: torch.ones(4) + 1j})), "norm.bias"),
    "a tensor of bools": (tensors(lambda t: t.update({BIAS: torch.ones(4) > 0}), names=False), "norm.bias"),
    "an average too few": (tensors(lambda t: t.pop(EMA)), "ema.module.norm.bias"),
    "moments of another shape": (tensors(lambda t: t.update({MOMENT: torch.ones(7)})), "optimizers.1"),
    "a moment too few": (tensors(lambda t: t.pop(MOMENT)), "optimizers.1"),
    "moments of no parameter": (tensors(lambda t: t.update({MOMENT + "x": torch.ones(4)})), "optimizers.1"),
}


def shard_of_is_folder(path: Path) -> None:
    (name,) = json.loads(path.read_text())["files"]
    (path.parent / name).mkdir()


@pytest.mark.parametrize("name", list(STATES))
def test_states_that_do_not_fit(trained: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    damage, named = STATES[name]
    damage(state_of(folder))
    log = (folder / "log.jsonl").read_bytes()
    outcome = run(train_small, str(folder), 4, 2, 6)
    refused(outcome, "CheckpointError", named, "step-00000004")
    assert not (folder / "ran").exists()
    assert (folder / "log.jsonl").read_bytes() == log, "nothing is lost"


@pytest.mark.parametrize(
    ("width", "layers", "named"), [(8, 2, "blocks.0.weight"), (4, 3, "blocks.2"), (4, 1, "blocks.1")]
)
def test_the_state_of_another_model(trained: Path, tmp_path: Path, width: int, layers: int, named: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    refused(run(train_small, str(tmp_path / "run"), width, layers, 6), "CheckpointError", named, "another model")


def test_a_run_goes_on_where_its_state_is(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert train_small(str(tmp_path / "run"), steps=6) == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_run_again_are_logged_once(trained: Path, tmp_path: Path) -> None:
    """Killed after it logged steps that its state does not have, and within a line."""
    shutil.copytree(trained, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    append_log(log, step=5, loss=1.0)
    with log.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert train_small(str(tmp_path / "run"), steps=6) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_begins_anew_begins_its_log_anew(tmp_path: Path) -> None:
    append_log(tmp_path / "log.jsonl", step=3)
    assert train_small(str(tmp_path)) == [1, 2, 3, 4]


def test_trimming(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    trim_log(log, 3)
    assert not log.exists()
    huge = b'{"step": 1' + b"0" * 400 + b"}\n"
    log.write_bytes(b'{"step": 1}\nmy notes\n[]\n{"step": "x"}\n{"step": 3}\n{"step": 4}\n' + huge + b'{"step": 2}')
    assert trim_log(log, 3) == 0
    assert log.read_bytes() == b'{"step": 1}\nmy notes\n[]\n{"step": 3}\n'
    log.write_bytes(b'{"step": 1, "seconds": 5}\n{"step": 2, "seconds": 9.5}\n{"step": 3, "seconds": 12}\nmy notes\n')
    assert trim_log(log, 2) == 9.5


# --- prompt cache ---


def cached(folder: str) -> tuple[bool, int]:
    """Whether a cached embedding is the encoder's, and how often the encoder had to run."""
    from impasto.pipelines import pixart

    runs, encode = list[int](), pixart.encode_texts
    pixart.encode_texts = lambda *args: (runs.append(1), encode(*args))[1]  # type: ignore[assignment]
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    plain = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(folder)
    with torch.no_grad():
        found = pipe.encode_prompt("a cat", do_classifier_free_guidance=False).prompt_embeds
        count = len(runs)
        expected = plain.encode_prompt("a cat", do_classifier_free_guidance=False).prompt_embeds
    return torch.equal(found, expected), count


def rewrite(path: Path, change: Callable[[torch.Tensor], torch.Tensor], keep_checksum: bool = True) -> None:
    with safe_open(path, framework="pt") as file:
        embeds, metadata = file.get_tensor("embeds").clone(), file.metadata()
    save_file({"embeds": change(embeds).contiguous()}, path, metadata if keep_checksum else None)


def forge(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Another entry that is whole: its checksum is right."""
    from impasto.pipelines import prompt_cache

    rewrite(path, change)
    embeds = load_file(path)["embeds"]
    save_file({"embeds": embeds}, path, {"checksum": prompt_cache._checksum(path.stem, embeds)})


def flip(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] += 0.01
    return tensor


ENTRIES: dict[str, Callable[[Path], object]] = {
    "a value flipped": lambda path: rewrite(path, flip),
    "no checksum": lambda path: rewrite(path, lambda x: x, keep_checksum=False),
    "another dtype": lambda path: rewrite(path, lambda x: x.half()),
    "another width": lambda path: rewrite(path, lambda x: x[:, :-1]),
    "fewer tokens": lambda path: rewrite(path, lambda x: x[:-1]),
    "not a number": lambda path: rewrite(path, lambda x: x * float("nan")),
    "integers": lambda path: rewrite(path, lambda x: x.long()),
    "another width, with its checksum": lambda path: forge(path, lambda x: x[:, :-1]),
    "float8, with its checksum": lambda path: forge(path, lambda x: x.to(torch.float8_e4m3fn)),
    "integers, with their checksum": lambda path: forge(path, lambda x: x.long()),
    "one dimension": lambda path: rewrite(path, lambda x: x.flatten()),
    "no tensor": lambda path: save_file({"other": torch.ones(1)}, path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "a header of a gigabyte": lambda path: path.write_bytes((1 << 30).to_bytes(8, "little") + b"{}"),
    "of another prompt": lambda path: (other_entry(path.parent, path), None),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def other_entry(folder: Path, path: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(elsewhere)
    with torch.no_grad():
        pipe.encode_prompt("a dog", do_classifier_free_guidance=False)
    (entry,) = elsewhere.glob("*.safetensors")
    shutil.copyfile(entry, path)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    assert cached_in_fork(folder) == (True, 1)
    (path,) = folder.glob("*.safetensors")
    return path


def cached_in_fork(folder: Path) -> Any:
    outcome = run(cached, str(folder))
    assert outcome.kind == "returned", (outcome.message, outcome.trace)
    return outcome.value


@pytest.mark.parametrize("name", list(ENTRIES))
def test_damaged_entries_are_made_again(entry: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(entry.parent, folder)
    ENTRIES[name](folder / entry.name)
    assert cached_in_fork(folder) == (True, 1)
    if name != "a folder":
        assert cached_in_fork(folder) == (True, 0)


def encoded_together(folder: str) -> bool:
    """Two prompts whose entries differ in width, for a pipeline that does not know the width."""
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(folder)
    cache: Any = pipe.prompt_cache
    with torch.no_grad():
        expected = pipe.encode_prompt(["a cat", "a dog"], do_classifier_free_guidance=False).prompt_embeds
        forge(min(Path(folder).glob("*.safetensors")), lambda x: x[:, :-1])
        read = cache._read
        cache._read = lambda path, length, width: read(path, length, None)
        found = pipe.encode_prompt(["a cat", "a dog"], do_classifier_free_guidance=False).prompt_embeds
    return torch.allclose(found, expected, atol=1e-5)


def test_entries_of_different_widths_are_made_again(tmp_path: Path) -> None:
    outcome = run(encoded_together, str(tmp_path))
    assert outcome.value is True, outcome
    assert "different widths" in outcome.stderr


def cached_by_another_user(folder: str) -> tuple[bool, int]:
    tiny_pipeline(PixArtSigmaPipeline)  # whose tokenizer is made once, and needs a folder
    if os.geteuid() == 0:
        os.setuid(65534)
    return cached(folder)


def test_a_cache_that_may_only_be_read_is_used(entry: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(entry.parent, folder)
    for place in (tmp_path, *(above for above in tmp_path.parents if "pytest-" in str(above))):
        place.chmod(0o755)
    for place in (*folder.iterdir(), folder):
        place.chmod(0o555 if place.is_dir() else 0o444)
    outcome = run(cached_by_another_user, str(folder))
    folder.chmod(0o755)
    assert outcome.value == (True, 0), outcome
    assert "damaged" not in outcome.stderr


def shrink(folder: str) -> list[str]:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(folder, max_bytes="100KB")
    with torch.no_grad():
        pipe.encode_prompt("a dog")
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix == ".tmp")


def test_what_killed_processes_left_is_removed(entry: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(entry.parent, folder)
    for name in (".impasto-0123456789abcdef.tmp", "abc.4711.tmp"):
        (folder / name).write_bytes(bytes(200_000))
    assert run(shrink, str(folder)).value == []
    assert cached_in_fork(folder) == (True, 0)


def encode_broken(folder: str) -> int:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.text_encoder.encoder.final_layer_norm.weight.data[0] = float("inf")
    pipe.enable_prompt_cache(folder)
    try:
        with torch.no_grad():
            pipe.encode_prompt("a cat")
    finally:
        return len(list(Path(folder).glob("*.safetensors")))  # noqa: B012


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    assert run(encode_broken, str(tmp_path / "cache")).value == 0
