"""One image on several processes: the images of one process, in batches of one size and of several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import impasto
from impasto import DDIMScheduler, PixArtSigmaPipeline
from impasto.errors import ConfigurationError, InputError
from impasto.models.glm_image.prior import PriorTokens
from impasto.nn.changes import of
from impasto.pipelines import glm_image as glm_module
from impasto.pipelines import pixart as pixart_module
from impasto.pipelines.parallel.guidance import PartOfRows
from impasto.pipelines.parallel.partition import Group, Partition
from impasto.pipelines.sampling import Run, advance
from impasto.training.distributed.processes import joined

from ..tiny import tiny_pipeline, tiny_transformer, write_pipeline
from ..tiny_glm import TRANSFORMER, pipelines, prior_parts
from ..training.distributed.ranks import in_ranks

#: Prompt, height and width of the latents, guidance scale.
PIXART = [("a cat", (8, 8), 4.5), ("a very large red cube on a blue ball", (6, 12), 1.0), ("", (10, 6), 2.0)]
GLM_IMAGE = [('"a"', (8, 12), 1.5), ('"long text"', (12, 8), 1.0), ("", (8, 8), 3.0)]


def pixart() -> Any:
    transformer = tiny_transformer(num_attention_heads=4, attention_head_dim=6)
    return tiny_pipeline(PixArtSigmaPipeline, transformer=transformer, scheduler=DDIMScheduler())


def glm_image() -> Any:
    pipe, _ = pipelines()
    torch.manual_seed(0)
    pipe.transformer = impasto.GlmImageTransformer2DModel(**{**TRANSFORMER, "num_attention_heads": 4}, sample_size=8)
    pipe.transformer.eval()
    return pipe


def pixart_runs(pipe: Any) -> list[Run]:
    runs = []
    for i, (prompt, size, scale) in enumerate(PIXART):
        noise = torch.randn(1 + i % 2, 4, *size, generator=torch.Generator().manual_seed(i))
        embeds = pipe.encode_prompt(prompt, num_images_per_prompt=len(noise))
        runs.append(pipe.denoise(noise, embeds, num_inference_steps=3 + i, guidance_scale=scale))
    return runs


def glm_image_runs(pipe: Any) -> list[Run]:
    """The first and the last one have a reference image each."""
    runs = []
    for i, (prompt, size, scale) in enumerate(GLM_IMAGE):
        ids = torch.full((1, size[0] * size[1] // 4), i)
        noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(i))
        references = None
        if i != 1:
            image = Image.new("RGB", (8 * size[1], 8 * size[0]), (200, 20 * i, 30))
            grid = torch.tensor([[1, size[0] // 2, size[1] // 2]])
            references = pipe.encode_references([[image]], PriorTokens(ids, [ids[0]], [grid]))
        embeds = pipe.encode_prompt(prompt)
        runs.append(pipe.denoise(noise, embeds, ids, references, num_inference_steps=3 + i, guidance_scale=scale))
    return runs


MAKE = {"pixart": (pixart, pixart_runs), "glm_image": (glm_image, glm_image_runs)}


@torch.no_grad()
def in_a_rank(guidance: bool, sequence: int) -> dict[str, list[float]]:
    """How far the latents of parallel runs are from those of this process alone: together, and one at a time."""
    found: dict[str, list[float]] = {}
    glm_module.denoising_steps = pixart_module.denoising_steps = lambda pipe, begin: begin()  # type: ignore
    with joined("auto", "cpu"):
        for name, (make, runs_of) in MAKE.items():
            pipe = make()
            alone, again = runs_of(pipe), runs_of(pipe)
            with impasto.parallelize(pipe, guidance=guidance, sequence=sequence):
                together, apart = runs_of(pipe), runs_of(pipe)
                for _ in range(2):
                    advance(together)
                    for run in apart:
                        advance([run])
            assert not any(of(module) for module in pipe.transformer.modules())
            for _ in range(2):
                for run in alone + again:
                    advance([run])
            assert all(torch.equal(a.latents, b.latents) for a, b in zip(alone, again))
            for kind, runs in (("together", together), ("apart", apart)):
                pairs = zip(runs, alone, strict=True)
                found[f"{name} {kind}"] = [distance(run.latents, own.latents) for run, own in pairs]
    return found


def distance(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def check(found: list[dict[str, list[float]]]) -> None:
    for rank in found:
        assert len(rank) == 4
        for name, distances in rank.items():
            assert max(distances) <= 1e-5, f"{name}: {distances}"


@pytest.mark.long
def test_two_processes_divide_the_tokens(tmp_path: Path) -> None:
    check(in_ranks(in_a_rank, tmp_path, False, 2))


@pytest.mark.cluster
@pytest.mark.parametrize(("guidance", "sequence"), [(True, 1), (True, 2), (False, 4), (True, 4)])
def test_more_ways_to_divide(guidance: bool, sequence: int, tmp_path: Path) -> None:
    check(in_ranks(in_a_rank, tmp_path, guidance, sequence, count=(1 + guidance) * sequence))


def what_is_refused() -> list[str]:
    found = []

    def refused(function: Any, *args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except (ConfigurationError, InputError) as error:
            found.append(str(error))

    class Config:
        ulysses_degree = 2

    with joined("auto", "cpu"), torch.no_grad():
        pipe = tiny_pipeline(
            PixArtSigmaPipeline, transformer=tiny_transformer(num_attention_heads=3, attention_head_dim=8)
        )
        refused(impasto.parallelize, pipe, sequence=2)
        refused(impasto.parallelize, pipe, sequence=4)
        refused(impasto.parallelize, pipe.vae)
        refused(pipe.transformer.enable_parallelism, config=Config())
        with impasto.cache_steps(pipe):
            refused(impasto.parallelize, pipe)
        with impasto.parallelize(pipe) as parallel:
            assert (parallel.guidance, parallel.sequence) == (2, 1)
            refused(impasto.parallelize, pipe)
        pipe = pixart()
        pipe.transformer.enable_parallelism(config=Config())
        refused(impasto.cache_steps, pipe)
        refused(pipe.compile)

        pipe.transformer.set_attn_processor(lambda attn, hidden_states, *args, **kwargs: hidden_states)
        refused(pipe, "a cat", num_inference_steps=1)
    return found


def test_what_is_refused(tmp_path: Path) -> None:
    expected = [
        "the 3 heads of the attention cannot be divided among 2 processes; sequence must be one of 1, 3,",
        "guidance=False and sequence=4 need 4 processes, and there are 2",
        "parallelize takes a pipeline of PixArt or GLM-Image or its transformer, not AutoencoderKL",
        "the 3 heads",
        "a pipeline that caches steps cannot be parallel",
        "is parallel already; remove() the handle of parallelize() first",
        "is parallel and cannot be cached",
        "is parallel and cannot be compiled",
        "attention processors see all tokens",
    ]

    for found in in_ranks(what_is_refused, tmp_path):
        assert len(found) == len(expected), found
        for message, part in zip(found, expected):
            assert part in message


def test_a_process_alone_is_no_group() -> None:
    with pytest.raises(ConfigurationError, match="start them with torchrun"):
        impasto.parallelize(pixart())


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "glm_image"])
def test_arguments_may_be_given_by_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda x, src: None)
    transformer = MAKE[name][0]().transformer
    x, times = torch.randn(1, 4, 8, 8), torch.tensor([500])
    if name == "pixart":
        given: list[Any] = [torch.randn(1, 3, transformer.config["caption_channels"]), times, None, None, None, None]
    else:
        size = torch.tensor([[64, 64]])
        given = [torch.randn(1, 3, 16), torch.zeros(1, 16, dtype=torch.long), torch.tensor([False]), times, size]
        given += [torch.zeros_like(size), None]
    (expected,) = transformer(x, *given, False)
    change = PartOfRows(transformer, Group(None, 0, 1))
    (found,) = transformer(x, *given, False)
    change.remove()
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "glm_image"])
def test_all_processes_refuse_a_small_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those alone whose rows have it, while the others wait for them."""
    monkeypatch.setattr(dist, "broadcast", lambda x, src: None)
    monkeypatch.setattr(Group, "gather", lambda *args: pytest.fail("this process waits"))
    for module in (pixart_module, glm_module):
        monkeypatch.setattr(module, "denoising_steps", lambda pipe, begin: begin())
    make, runs_of = MAKE[name]
    pipe = make()
    change = PartOfRows(pipe.transformer, Group(None, 0, 2), 20)
    with pytest.raises(InputError, match=r"an image of 1[0-9] tokens cannot be divided among 20 processes"):
        advance(runs_of(pipe))
    change.remove()


def test_processes_continue_with_the_prior_tokens_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda x, src: x.fill_(7))
    pipe = glm_image()
    for part, component in prior_parts().items():
        setattr(pipe, part, component)
    change = PartOfRows(pipe.transformer, Group(None, 1, 2))
    found = pipe.generate_prior_tokens("a cat", 64, 64)
    assert found.prior_token_ids.eq(7).all()
    change.remove()
    assert not pipe.generate_prior_tokens("a cat", 64, 64).prior_token_ids.eq(7).all()


def test_the_pieces_of_a_partition_are_all_tokens_once() -> None:
    lengths = (7, 4, 9)
    parts = [Partition(lengths, Group(None, rank, 3), torch.device("cpu")) for rank in range(3)]
    assert sorted(torch.cat([part.own for part in parts]).tolist()) == list(range(20))
    assert [part.own_lengths for part in parts] == [[2, 1, 3], [2, 1, 3], [3, 2, 3]]
    assert torch.equal(parts[1].own, torch.tensor([2, 3, 8, 14, 15, 16]))
    batch = torch.arange(24.0).view(2, 12, 1)
    middle = Partition((12, 12), Group(None, 1, 3), torch.device("cpu"))
    assert torch.equal(middle.part(batch), batch[:, 4:8])
    with pytest.raises(InputError, match="an image of 2 tokens cannot be divided among 3 processes"):
        Partition((9, 2), Group(None, 0, 3), torch.device("cpu"))


@pytest.mark.cluster
def test_the_command_under_torchrun_writes_the_same_image_once(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "model", transformer=tiny_transformer(num_attention_heads=4, attention_head_dim=6))
    options = ["generate", "a cat", "--model", str(tmp_path / "model"), "--steps", "3", "--dtype", "float32"]
    options += ["--seed", "5", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "impasto"]
    for start, name in ((["-m", "impasto"], "alone"), (launch, "parallel")):
        command = [sys.executable, *start, *options, "--output", f"{tmp_path}/{name}/"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{tmp_path}/{name}/0000.png"]
    alone, parallel = (np.asarray(Image.open(tmp_path / name / "0000.png"), int) for name in ("alone", "parallel"))
    assert np.abs(alone - parallel).max() <= 1
