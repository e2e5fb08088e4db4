"""The cache: training from it equals training from images, and it survives being killed, divided and damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from impasto.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError, OutputError
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.training.data.buckets import Buckets
from impasto.training.data.cached import CachedSource, fingerprint
from impasto.training.data.folders import FolderSource
from impasto.training.data.images import Reading
from impasto.training.data.loader import Data
from impasto.training.data.order import Order
from impasto.training.data.sample import Sample, Source
from impasto.training.data.views import Views
from impasto.training.jobs import cache as module
from impasto.training.jobs.cache import Encoders, Job, run, settings_for
from impasto.training.jobs.on_ray import _missing as missing_on_ray
from impasto.training.objectives.diffusion_loss import DiffusionLoss
from impasto.training.objectives.text_to_image import Latents, TextToImage
from impasto.training.objectives.texts import Texts
from impasto.training.running.randomness import Randomness

from ...tiny import tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from ..data.folder_of_images import smooth_image, write_folder

BUCKETS = Buckets(((16, 16), (8, 32)))
SIZES = [(20, 20), (12, 48), (33, 30), (16, 16), (8, 32), (40, 40), (17, 70), (3, 3)]  # the last one is dropped
VIEWS = Views(2, flip=True)


def folder(path: Path, views: Views = VIEWS, **options: Any) -> FolderSource:
    source = write_folder(path, SIZES)
    smooth_image(20, 20, 9).convert("L").save(path / "0_mask.png")
    return FolderSource(source, Reading(views, **options), mask_suffix="_mask")


def models() -> tuple[Latents, Texts]:
    vae = tiny_vae()
    return Latents(vae.config, vae), Texts(tiny_tokenizer(), tiny_text_encoder(), 20)


def job(
    source: Source, out: Path, models: tuple[Latents, Texts] | None = None, dtype: str = "float32", **options: Any
) -> Job:
    latents, texts = models or globals()["models"]()
    settings = settings_for(
        source, BUCKETS, autoencoder=fingerprint(latents.vae), text_encoder=fingerprint(texts.encoder),
        tokens=texts.tokens, clean=texts.clean, dtype=dtype, chunk=3,
    )  # fmt: skip
    return Job(source, out, Encoders(latents.posterior, texts.features), settings, batch_size=2, **options)


def data(source: Source) -> Data:
    return Data(Order([source], BUCKETS, 3, seed=4), [source])


def test_training_from_a_cache_equals_training_from_images(tmp_path: Path) -> None:
    latents, texts = models()
    live = folder(tmp_path / "data", real_prompt_ratio=0.3, weight=0.5)
    run(job(live, tmp_path / "cache", (latents, texts)))
    cached = CachedSource(tmp_path / "cache", real_prompt_ratio=0.3, weight=0.5)
    transformer = tiny_transformer()
    loss = DiffusionLoss(DPMSolverMultistepScheduler().betas)
    objectives = (
        TextToImage(transformer, texts, latents, loss, caption_dropout=0.3),
        TextToImage(
            transformer, Texts(None, None, 20, cached.empty), Latents(latents.config), loss, caption_dropout=0.3
        ),
    )
    loaders = (data(live), data(cached))
    assert loaders[0].order.steps_in(0) == loaders[1].order.steps_in(0) >= 3
    captions, views = set(), set()
    for step in range(12):
        batches = [loader.batch(step) for loader in loaders]
        for a, b in zip(*(batch.samples for batch in batches)):
            assert (a.caption, a.size, a.crop, a.weight) == (b.caption, b.size, b.crop, b.weight)
            assert (a.loss_mask is None) == (b.loss_mask is None)
            captions.add(a.caption)
            views.add(b.posterior[0].numpy().tobytes())  # type: ignore[index]
        losses = [objective(batch, Randomness(4, step)).each for objective, batch in zip(objectives, batches)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
    assert len(captions) > 9
    assert len(views) > 10  # of seven images


def everything(cache: Path) -> dict[str, Any]:
    """All tensors, and all records."""
    found: dict[str, Any] = {}
    for path in sorted(cache.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.name} {name}": file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    for path in cache.glob("index-*.jsonl"):
        for line in path.read_text().splitlines():
            found[json.loads(line)["file"]] = json.loads(line)
    return found


def test_a_killed_job_goes_on_and_several_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "data")
    assert run(job(source, tmp_path / "whole")) == {"skipped": 0, "written": 3, "broken": 0}

    class Killed(BaseException): ...

    append = module.append_line
    lines: list[str] = []

    def kill(path: Path, line: str) -> None:
        lines.append(line)
        if len(lines) == 3:  # the second chunk is written, and its line is not
            raise Killed
        append(path, line)

    monkeypatch.setattr(module, "append_line", kill)
    with pytest.raises(Killed):
        run(job(source, tmp_path / "killed"))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"lacks 5 of its 8 samples.*running impasto cache again"):
        CachedSource(tmp_path / "killed")
    assert run(job(source, tmp_path / "killed")) == {"skipped": 1, "written": 2, "broken": 0}

    for part in (2, 1):
        run(job(source, tmp_path / "shared"), (part, 2))
    assert {path.name for path in (tmp_path / "shared").glob("index*")} == {"index-1-of-2.jsonl", "index-2-of-2.jsonl"}
    expected = everything(tmp_path / "whole")
    assert everything(tmp_path / "killed") == expected
    assert everything(tmp_path / "shared") == expected
    assert run(job(source, tmp_path / "shared"), (1, 1)) == {"skipped": 3, "written": 0, "broken": 0}
    with pytest.raises(ConfigurationError, match="the shard 3/2 does not exist"):
        run(job(source, tmp_path / "shared"), (3, 2))


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    run(job(folder(tmp_path / "data"), tmp_path / "cache"))
    path = tmp_path / "cache" / "chunk-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    source = CachedSource(tmp_path / "cache")
    damaged = [i for i in range(8) if source._chunks[i] == path.name]
    with pytest.raises(InputError, match=r"chunk-000001.safetensors is damaged"):
        source.read(damaged[0], tuple(source._records[damaged[0]]["bucket"]), np.random.default_rng(0))
    path.unlink()
    with pytest.raises(InputError, match=r"chunk-000001.safetensors cannot be read: No such file"):
        source.read(damaged[0], tuple(source._records[damaged[0]]["bucket"]), np.random.default_rng(0))
    assert run(job(folder(tmp_path / "data"), tmp_path / "cache"))["written"] == 1  # it is made again
    index = tmp_path / "cache" / "index-1-of-1.jsonl"
    with index.open("ab") as file:
        file.write(b'{"file": "chunk-9')  # what a full disk left of a line
    assert len(CachedSource(tmp_path / "cache")) == 8
    index.write_bytes(index.read_bytes().removesuffix(b'{"file": "chunk-9'))
    index.write_bytes(index.read_bytes() + b'{"file": 3}\n')
    with pytest.raises(CheckpointError, match=r"index-1-of-1.jsonl, line 6, is damaged"):
        CachedSource(tmp_path / "cache")


def test_features_of_the_empty_caption_are_made_again(tmp_path: Path, rendered: Path) -> None:
    shutil.copytree(rendered, tmp_path / "cache")
    empty = CachedSource(rendered).empty
    (tmp_path / "cache" / "empty.safetensors").unlink()
    with pytest.raises(InputError, match=r"empty.safetensors cannot be read: .*; cache it again"):
        CachedSource(tmp_path / "cache")
    again = job(Rendered(), tmp_path / "cache")
    assert missing_on_ray(again) == [-1]
    assert run(again)["written"] == 0
    assert missing_on_ray(again) == []
    assert torch.equal(CachedSource(tmp_path / "cache").empty, empty)  # type: ignore[arg-type]


def test_a_chunk_that_another_process_has_made_again_is_read(tmp_path: Path) -> None:
    """The older line of the index, which comes last, has the checksum of what was deleted."""
    for part in (1, 2):
        run(job(Rendered(), tmp_path / "cache"), (part, 2))
    (tmp_path / "cache" / "chunk-000001.safetensors").unlink()
    again = job(Rendered(), tmp_path / "cache")
    posterior = again.encoders.posterior

    def rounded_otherwise(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = posterior(samples)
        return mean + 1e-6, deviation

    again.encoders = Encoders(rounded_otherwise, again.encoders.features)
    assert run(again) == {"skipped": 1, "written": 1, "broken": 0}
    source = CachedSource(tmp_path / "cache")
    assert source.read(3, (16, 16), np.random.default_rng(0)).caption == "cube 3"


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("cache.json", '"samples": 4', '"samples": "a"', "is not that of a cache of this version"),
        ("cache.json", '"samples": 4', '"samples": 10000000000000', "lacks 9999999999996 of its"),
        ("cache.json", '"samples": 4', '"samples": 3', "the sample 3 in the index"),
        ("cache.json", '"max_crop": 0.5', '"max_crop": "x"', "is not that of a cache of this version"),
        ("cache.json", '"crop": "centre"', '"crop": -1', "is not that of a cache of this version"),
        ("index-1-of-1.jsonl", '"crops": [[0, 0]]', '"crops": []', "the sample 0 in the index"),
        ("index-1-of-1.jsonl", '"crops": [[0, 0]]', '"crops": [0]', "line 2, is damaged"),
        ("index-1-of-1.jsonl", '"index": 0', '"index": "0"', "line 2, is damaged"),
        ("index-1-of-1.jsonl", '"bucket": [16, 16]', '"bucket": 3', "line 2, is damaged"),
        ("index-1-of-1.jsonl", '"captions": [["cube 0"], []]', '"captions": [[0], []]', "line 2, is damaged"),
    ],
)
def test_what_a_cache_says_is_not_trusted(
    tmp_path: Path, rendered: Path, name: str, before: str, after: str, message: str
) -> None:
    shutil.copytree(rendered, tmp_path / "cache")
    path = tmp_path / "cache" / name
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(CheckpointError, match=message):
        CachedSource(tmp_path / "cache")


def test_a_caption_without_features_is_a_broken_sample(tmp_path: Path, rendered: Path) -> None:
    shutil.copytree(rendered, tmp_path / "cache")
    path = tmp_path / "cache" / "index-1-of-1.jsonl"
    path.write_text(path.read_text().replace("cube 0", "cube 9"))
    with pytest.raises(InputError, match=r"chunk-000000.safetensors lacks tensors of '0'"):
        CachedSource(tmp_path / "cache").read(0, (16, 16), np.random.default_rng(0))


def test_broken_images_are_left_out_of_training_as_if_live(tmp_path: Path) -> None:
    source = folder(tmp_path / "data")
    path = tmp_path / "data" / "2.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match="1 of 8 samples"):
        run(job(source, tmp_path / "cache", max_broken=0))
    assert run(job(source, tmp_path / "cache", max_broken=1))["broken"] == 1
    cached = CachedSource(tmp_path / "cache")
    assert len(cached) == 8
    with pytest.raises(InputError, match=r"2.png' cannot be read as an image"):
        cached.read(2, (16, 16), np.random.default_rng(0))


class Rendered:
    """A source that makes its samples, which is neither a folder nor shards."""

    def __len__(self) -> int:
        return 4

    def size(self, index: int) -> tuple[int, int]:
        return 16, 16

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        image = torch.full((3, *target), index / 4)
        labels, extra = torch.full((2, 8, 8), index), {"prior_token_ids": torch.arange(index)}
        return Sample(image, caption=f"cube {index}", labels=labels, extra=extra, weight=2.0)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of it."""
    folder = tmp_path_factory.mktemp("rendered") / "cache"
    run(job(Rendered(), folder))
    return folder


def test_any_source_can_be_cached_and_in_half_the_space(tmp_path: Path) -> None:
    latents, texts = models()
    run(job(Rendered(), tmp_path / "full", (latents, texts)))
    run(job(Rendered(), tmp_path / "half", (latents, texts), dtype="bfloat16"))
    full, half = CachedSource(tmp_path / "full"), CachedSource(tmp_path / "half")
    a, b = (source.read(3, (16, 16), np.random.default_rng(0)) for source in (full, half))
    assert a.caption == "cube 3"
    assert a.weight == 2.0
    assert torch.equal(a.labels, torch.full((2, 8, 8), 3))  # type: ignore[arg-type]
    assert a.extra["prior_token_ids"].tolist() == [0, 1, 2]
    assert torch.equal(b.posterior[0], a.posterior[0].bfloat16().float())  # type: ignore[index]
    assert torch.equal(b.text, a.text.bfloat16().float())  # type: ignore[union-attr, arg-type]
    expected = latents.posterior([Rendered().read(3, (16, 16), np.random.default_rng(0))])
    torch.testing.assert_close(a.posterior, (expected[0][0], expected[1][0]))


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="random crops cannot be cached"):
        settings_for(folder(tmp_path / "data", Views("random")), BUCKETS)
    with pytest.raises(CheckpointNotFoundError, match="is no cache"):
        CachedSource(tmp_path)
    with pytest.raises(ConfigurationError, match="dtype must be one of float32"):
        settings_for(Rendered(), BUCKETS, dtype="float8")
    run(job(Rendered(), tmp_path / "cache"))
    with pytest.raises(ConfigurationError, match=re.escape("is a cache with another dtype; choose another folder")):
        job(Rendered(), tmp_path / "cache", dtype="float16")
    with pytest.raises(InputError, match=re.escape("0 was cached for [16, 16], not [8, 32]")):
        CachedSource(tmp_path / "cache").read(0, (8, 32), np.random.default_rng(0))
    (tmp_path / "cache" / "cache.json").write_text('{"samples": 3}')
    with pytest.raises(CheckpointError, match="is not that of a cache of this version"):
        CachedSource(tmp_path / "cache")
    monkeypatch.setattr("impasto.files._write_all", full)
    with pytest.raises(OutputError, match="full"):
        run(job(Rendered(), tmp_path / "full"))


def full(descriptor: int, content: bytes) -> None:
    raise OSError(28, "the disk is full")


def test_a_fingerprint_tells_models_apart() -> None:
    assert fingerprint(tiny_vae()) == fingerprint(tiny_vae())
    assert fingerprint(tiny_vae()) != fingerprint(tiny_vae(seed=1))
    assert fingerprint(tiny_vae()) != fingerprint(tiny_vae().bfloat16())
