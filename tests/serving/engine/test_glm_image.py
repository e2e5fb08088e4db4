"""GLM-Image in the engine: its prior and references, several sizes in one step, each as the pipeline generates it."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator

from impasto.serving.engine.stages import Stages
from impasto.serving.job import Failed, GivenImages, Job, Progress, RawImage

from ...tiny_glm import pipelines, prior_parts
from .driving import images, make_engine, run


def test_images_are_those_of_the_pipeline() -> None:
    pipe = with_prior()
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = GivenImages((RawImage(64, 64, rgb.tobytes()),))
    common: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0}
    jobs = [
        Job("wide", "glm", 'a sign "open"', width=96, height=64, seed=1, **common),
        Job("edit", "glm", 'a sign "shut"', width=64, height=64, seed=2, given=given, **common),
        Job("written", "glm", "a cube <sop>40 40<eop>", width=64, height=64, seed=3, **common),
    ]
    # By this clock a prior takes about three turns.
    engine, shared = make_engine(pipe, clock=(0.001 * tick for tick in itertools.count()).__next__), list[int]()
    found = images(run(engine, jobs, lambda turn: shared.append(engine.tally.image_steps)))
    assert max(shared) >= 2
    for job in jobs:
        image = None if job.given is None else [Image.fromarray(rgb)]
        expected = pipe(
            job.prompt,
            image=image,
            height=job.height,
            width=job.width,
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=[Generator().manual_seed(job.seed)],
        ).images[0]
        raw = found[job.id]
        ours = np.frombuffer(raw.pixels, np.uint8).reshape(raw.height, raw.width, 3).astype(int)
        assert np.abs(ours - np.asarray(expected).astype(int)).max() <= 1, job.id


def test_the_text_of_a_prompt_does_not_choose_the_size() -> None:
    """Else a request could take more memory than it was admitted with."""
    pipe, _ = pipelines()
    stages = Stages(pipe)
    assert stages.tokens_of(Job("1", "glm", "a cube <sop>400 400<eop>")) == stages.tokens_of(Job("2", "glm", "a cube"))


def with_prior() -> Any:
    pipe, _ = pipelines()
    for name, part in prior_parts().items():
        setattr(pipe, name, part)
    return pipe


def test_steps_are_taken_while_a_prior_runs() -> None:
    """With a clock on which a token takes as long as a step, an image that runs takes one for each token or two."""
    engine = make_engine(with_prior(), clock=itertools.count().__next__)
    engine.add(Job("first", "glm", "a cube", width=64, height=64, steps=60, guidance_scale=1.0))
    engine.add(Job("second", "glm", "a sphere", width=64, height=64, steps=3, guidance_scale=1.0))
    steps = list[tuple[str, int]]()
    spent = Counter[str]()
    while not engine.idle:
        events, tally = engine.tick()
        spent.update(tally.seconds)
        steps += [(event.id, event.step) for event in events if isinstance(event, Progress)]
    before = steps[: steps.index(("second", 0))]
    assert len([step for id, step in before if id == "first" and step]) >= 2
    assert {("first", 60), ("second", 3)} <= {*steps}
    assert min(spent[stage] for stage in ("text", "prior", "denoise", "decode")) > 0


def test_images_that_waited_for_a_prior_do_not_catch_up() -> None:
    engine = make_engine(with_prior(), clock=itertools.count().__next__)
    engine.add(Job("first", "glm", "a cube", width=64, height=64, steps=200, guidance_scale=1.0))
    while not any(isinstance(event, Progress) for event in engine.tick()[0]):
        pass
    for name in "bcd":
        engine.add(Job(name, "glm", "a sphere", width=64, height=64, steps=1, guidance_scale=1.0))
    gap, longest = 0, 0
    while not engine.idle:
        stepped = any(isinstance(event, Progress) and event.id == "first" for event in engine.tick()[0])
        gap = 0 if stepped or "first" not in engine.active else gap + 1
        longest = max(longest, gap)
    assert longest <= 4


def test_an_image_is_cancelled_while_its_prior_runs() -> None:
    engine = make_engine(with_prior(), clock=itertools.count().__next__)
    engine.add(Job("1", "glm", "a cube", width=64, height=64, steps=3, guidance_scale=1.0))
    assert engine.tick()[0] == []
    engine.cancel("1")
    (failed,) = engine.tick()[0]
    assert isinstance(failed, Failed)
    assert failed.reason == "cancelled"
    assert engine.idle
    assert not engine.active
