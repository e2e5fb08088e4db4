"""Runs that were killed or interrupted continue bit for bit: all later losses, and the final weights."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.training import autoencoder, flow_matching, prior, text_encoder, text_to_image, visual_codebook
from impasto.training.loop import Recipe
from impasto.training.state import load_state, save_state

from ..tiny import tiny_text_encoder
from ..tiny_glm import TRANSFORMER, prior_parts
from . import test_autoencoder, test_glm_image, test_text_encoder, test_text_to_image

#: Saves fall within the log's windows.
FAST: dict[str, Any] = {"warmup_steps": 4, "log_every": 3, "save_every": 5, "compile_blocks": False}
Hook = Callable[[int], None]


def hooked(batch: Callable[[int], Any], hook: Hook) -> Callable[[int], Any]:
    return lambda step: (hook(step), batch(step))[1]


def train_text_to_image(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    """With Muon, averages, a label head, dropped captions and dropout."""
    torch.manual_seed(seed)
    models = list(test_text_to_image.models(seed))
    recipe = text_to_image.TextToImageRecipe(
        steps, batch_size=8, label_block=0, label_classes=(2, 3), caption_dropout=0.3, ema_decay=0.9, **FAST
    )
    batch = hooked(test_text_to_image.labelled, hook)
    train = text_to_image.train_text_to_image
    train(*models, batch, test_text_to_image.EMPTY, test_text_to_image.BETAS, recipe, folder)  # type: ignore[arg-type]
    return models


def train_autoencoder(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    model = test_autoencoder.small_vae(seed)
    recipe = autoencoder.AutoencoderRecipe(steps, **FAST)
    batch = hooked(test_autoencoder.patchwork, hook)
    autoencoder.train_autoencoder(model, batch, recipe, folder, test_autoencoder.validation())
    return [model]


def train_flow_matching(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    torch.manual_seed(seed)
    model = GlmImageTransformer2DModel(**TRANSFORMER)
    flow_matching.initialize(model)
    recipe = flow_matching.FlowMatchingRecipe(steps, **FAST)
    flow_matching.train_flow_matching(model, hooked(lambda step: test_glm_image.flat(True, step), hook), recipe, folder)
    return [model]


def train_prior(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    model = prior_parts()["vision_language_encoder"]
    prior.train_prior(
        model, hooked(test_glm_image.words, hook), Recipe(steps, **FAST), folder, [test_glm_image.words(9)]
    )
    return [model]


def train_codebook(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    model = prior_parts()["vision_language_encoder"].model
    torch.manual_seed(seed)
    reader = visual_codebook.CodeReader(8, (4,), side=4)
    recipe = visual_codebook.CodebookRecipe(steps, continuous_steps=7, first_batches=4, **FAST)
    visual_codebook.train_visual_codebook(model, reader, hooked(test_glm_image.coloured, hook), recipe, folder)
    return [model, reader]


def train_warm_start(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    """With dropout."""
    encoder = tiny_text_encoder(num_layers=1, seed=seed)
    encoder.encoder.dropout.p = 0.3
    torch.manual_seed(seed)
    reader = text_encoder.SlotReader(32, 2, (3, 2))
    recipe = Recipe(steps, optimizer="adamw", ema_decay=0.0, **FAST)
    text_encoder.warm_start(encoder, hooked(test_text_encoder.captions, hook), reader, recipe, folder)
    return [encoder, reader]


TRAININGS = {
    "text to image": train_text_to_image,
    "autoencoder": train_autoencoder,
    "flow matching": train_flow_matching,
    "prior": train_prior,
    "codebook": train_codebook,
    "warm start": train_warm_start,
}


def weights(models: list[nn.Module]) -> dict[str, Tensor]:
    return {f"{i}.{name}": tensor for i, model in enumerate(models) for name, tensor in model.state_dict().items()}


def assert_equal(folder: Path, other: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    logs = []
    for each in (folder, other):
        rows = [json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()]
        logs.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert logs[0] == logs[1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    states = [load_state(each / "state.pt") for each in (folder, other)]
    for name, value in states[1]["models"].items():
        assert torch.equal(states[0]["models"][name], value), name


@pytest.mark.parametrize("name", list(TRAININGS))
def test_an_interrupted_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    steps, training = 14, TRAININGS[name]
    expected = weights(training(tmp_path / "whole", steps, 0, lambda step: None))
    for attempt, last in enumerate((2, 8, 13)):

        def interrupt(step: int, last: int = last) -> None:
            if step == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # once there is a state, weights before it do not matter
            training(tmp_path / "parts", steps, attempt if attempt > 1 else 0, interrupt)
    found = weights(training(tmp_path / "parts", steps, 3, lambda step: None))
    assert_equal(tmp_path / "parts", tmp_path / "whole", found, expected)


# --- kills ---

STEPS = 60


def work(name: str, folder: str) -> None:
    """A training in a process of its own, which keeps its step in a file."""
    torch.set_num_threads(1)
    descriptor = os.open(Path(folder) / "step", os.O_CREAT | os.O_WRONLY)
    found = TRAININGS[name](Path(folder), STEPS, 0, lambda step: os.pwrite(descriptor, b"%6d" % step, 0) and None)
    save_state(Path(folder) / "final.pt", weights(found))


@pytest.mark.parametrize("name", ["text to image", "autoencoder"])
def test_a_run_killed_at_random_moments_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # forks of a process that has run nothing yet
    context.set_forkserver_preload([__name__])

    def start(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=work, args=(name, str(folder)))
        process.start()
        return process

    def step_of(folder: Path) -> int:
        step = folder / "step"
        return int(step.read_text() or 0) if step.exists() else 0

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(whole)
    process.join()
    assert process.exitcode == 0

    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)
    moments = sorted(chance.sample(range(STEPS - 8), 5))
    for before, moment in itertools.pairwise((-1, *moments)):
        process = start(parts)
        while (step_of(parts) < moment or step_of(parts) <= before) and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (parts / "step").unlink()
    process = start(parts)
    process.join()
    assert process.exitcode == 0
    assert_equal(parts, whole, load_state(parts / "final.pt"), load_state(whole / "final.pt"))
