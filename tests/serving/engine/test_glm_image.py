"""GLM-Image in the engine: its prior and references, several sizes in one step, each as the pipeline generates it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator

from impasto.serving.engine.stages import Stages
from impasto.serving.job import GivenImages, Job, Progress, RawImage

from ...tiny_glm import pipelines, prior_parts
from .driving import images, make_engine, run


def test_images_are_those_of_the_pipeline() -> None:
    pipe, _ = pipelines()
    for name, part in prior_parts().items():
        setattr(pipe, name, part)
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = GivenImages((RawImage(64, 64, rgb.tobytes()),))
    common: dict[str, Any] = {"steps": 3, "guidance_scale": 2.0}
    jobs = [
        Job("wide", "glm", 'a sign "open"', width=96, height=64, seed=1, **common),
        Job("edit", "glm", 'a sign "shut"', width=64, height=64, seed=2, given=given, **common),
        Job("written", "glm", "a cube <sop>40 40<eop>", width=64, height=64, seed=3, **common),
    ]
    engine, shared = make_engine(pipe), list[int]()
    found = images(run(engine, jobs, lambda turn: shared.append(engine.tally.image_steps)))
    assert max(shared) >= 2
    for job in jobs:
        image = None if job.given is None else [Image.fromarray(rgb)]
        expected = pipe(
            job.prompt,
            image=image,
            height=job.height,
            width=job.width,
            num_inference_steps=3,
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


def test_no_image_begins_before_the_last_one_has_held_nobody_up() -> None:
    """The prior takes long; images that have begun take a step between those of two others."""
    pipe, _ = pipelines()
    for name, part in prior_parts().items():
        setattr(pipe, name, part)
    # A turn has one step; steps are not shared, so that only the rule lets the first image go on.
    engine = make_engine(pipe, most_tokens=1)
    for i in range(4):
        engine.add(Job(str(i), "glm", "a cube", width=64, height=64, steps=9, guidance_scale=1.0))
    steps = []
    for _ in range(6):
        events, _ = engine.tick()
        steps += [(event.id, event.step) for event in events if isinstance(event, Progress)]
    begins = [i for i, (_, step) in enumerate(steps) if step == 0]
    for one, other in pairwise(begins[1:]):
        running = {id for id, _ in steps[:one]}
        assert {id for id, step in steps[one:other] if step} >= running
