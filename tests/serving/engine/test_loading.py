"""What an engine takes its jobs to need, how its process uses memory, and how many tokens images have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from impasto import PixArtSigmaPipeline
from impasto.serving import served
from impasto.serving.engine import loading, stages
from impasto.serving.engine.loading import memory_need
from impasto.serving.engine.spec import EngineSpec
from impasto.serving.job import GivenImages, Job, RawImage
from impasto.serving.served import look_at

from ...tiny import write_pipeline
from ...tiny_glm import pipelines

BINS = {0.25: (16, 64), 1.0: (32, 32)}


def job(width: int, height: int, **fields: Any) -> Job:
    return Job("1", "tiny", "a cat", width=width, height=height, **fields)


def test_an_image_needs_what_the_size_of_its_bin_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_pipeline(tmp_path / "tiny"))
    pipe, spec = PixArtSigmaPipeline.from_pretrained(path), EngineSpec("tiny", path, "PixArtSigmaPipeline", "cpu")
    known = look_at("tiny", path, torch.device("cpu"), None, None)
    need, _ = memory_need(pipe, spec)
    assert need(job(8, 8)) < need(job(32, 32))
    assert known.tokens(job(8, 8)) < known.tokens(job(32, 32))
    for module in (stages, served):
        monkeypatch.setattr(module, "bins_for", lambda side: BINS)
    need, _ = memory_need(pipe, spec)
    assert need(job(8, 8)) == need(job(32, 32))
    assert known.tokens(job(8, 8)) == known.tokens(job(32, 32))
    assert known.tokens(job(64, 16)) == stages.Stages(pipe).tokens_of(job(64, 16))
    assert need(job(64, 64)) > need(job(32, 32))  # it is enlarged afterwards
    assert need(job(8, 8, binning=False)) < need(job(8, 8))
    assert known.tokens(job(8, 8, binning=False)) == stages.Stages(pipe).tokens_of(job(8, 8, binning=False))


def test_each_reference_of_an_edit_needs_memory(tmp_path: Path) -> None:
    pipe, _ = pipelines()
    pipe.save_pretrained(tmp_path / "glm")
    need, _ = memory_need(pipe, EngineSpec("glm", str(tmp_path / "glm"), "GlmImagePipeline", "cpu"))
    image = RawImage(64, 64, bytes(3 * 64 * 64))
    needs = [need(job(64, 64, given=GivenImages((image,) * count))) for count in (1, 2, 3)]
    config = pipe.transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    each = 2 * config["num_layers"] * width * 4 * (64 // (config["patch_size"] * pipe.vae_scale_factor)) ** 2
    assert needs[1] - needs[0] == needs[2] - needs[1] == each


@pytest.mark.parametrize("limited", [True, False])
def test_freed_memory_does_not_count_against_a_budget(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(loading, "limit_kernel_caches", lambda: done.append("limited"))
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: done.append("kept"))
    loading.prepare_memory(limited)
    assert done == (["limited"] if limited else ["limited", "kept"])
