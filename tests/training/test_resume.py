"""Runs that were killed or interrupted continue bit for bit: all later losses, and the final weights."""

from __future__ import annotations

import itertools
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
from impasto.training.objectives import flow_matching, prior, text_encoder, visual_codebook
from impasto.training.objectives.autoencoder import Autoencoder
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.labels import LabelHead
from impasto.training.running import checkpoints
from impasto.training.running.checkpoints import load_state, save_state
from impasto.training.running.loop import train
from impasto.training.settings.config import Settings

from ..tiny import tiny_text_encoder
from ..tiny_glm import TRANSFORMER, prior_parts
from .objectives import test_autoencoder, test_glm_image, test_text_encoder, test_text_to_image
from .runs import settings, stored, values

Hook = Callable[[int], None]


def fast(steps: int, **changes: Any) -> Settings:
    """Saves fall within the log's windows."""
    return settings(steps, **{"schedule": {"warmup": 4}, "log_every": 3, "checkpoints": {"every": 5}, **changes})


def hooked(batch: Callable[[int], Any], hook: Hook, size: int | None = None) -> ByStep:
    return ByStep(lambda step: (hook(step), batch(step))[1], size)


def train_text_to_image(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    """With Muon, averages, a label head, dropped captions, dropout and micro-batches."""
    torch.manual_seed(seed)
    models = test_text_to_image.models(seed)
    head = LabelHead(models[0], 0, (2, 3))
    objective = test_text_to_image.objective(models, label_head=head, caption_dropout=0.3)
    train(objective, hooked(test_text_to_image.labelled, hook), fast(steps, ema=0.9, micro_batch=5), folder)
    head.hook.remove()
    return list(models)


def train_autoencoder(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    objective = Autoencoder(test_autoencoder.small_vae(seed))
    plan = fast(steps, optimizer={"name": "adamw"}, ema=0.0)

    def check(step: int) -> dict[str, float]:
        return {"psnr": objective.psnr(test_autoencoder.validation())}

    train(objective, hooked(test_autoencoder.samples, hook), plan, folder, check)
    return [objective.vae]


def train_flow_matching(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    torch.manual_seed(seed)
    model = GlmImageTransformer2DModel(**TRANSFORMER)
    flow_matching.initialize(model)
    data = hooked(lambda step: test_glm_image.flat(True, step), hook)
    train(flow_matching.FlowMatching(model), data, fast(steps), folder)
    return [model]


def train_prior(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    model = prior_parts()["vision_language_encoder"]
    objective = prior.Prior(model)
    data = hooked(test_glm_image.words, hook)
    train(objective, data, fast(steps), folder, lambda step: objective.check([test_glm_image.words(9)]))
    return [model]


def train_codebook(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    model = prior_parts()["vision_language_encoder"].model
    torch.manual_seed(seed)
    reader = visual_codebook.CodeReader(8, (4,), side=4)
    batch = test_glm_image.coloured
    objective = visual_codebook.VisualCodebook(model, reader, batch, steps, continuous_steps=7, first_batches=4)
    train(objective, hooked(batch, hook), fast(steps), folder)
    objective.finish()
    return [model, reader]


def train_warm_start(folder: Path, steps: int, seed: int, hook: Hook) -> list[nn.Module]:
    """With dropout."""
    encoder = tiny_text_encoder(num_layers=1, seed=seed)
    encoder.encoder.dropout.p = 0.3
    torch.manual_seed(seed)
    reader = text_encoder.SlotReader(32, 2, (3, 2))
    plan = fast(steps, optimizer={"name": "adamw"}, ema=0.0)
    objective = text_encoder.WarmStart(encoder, reader, test_text_encoder.tokenize)
    train(objective, hooked(test_text_encoder.captions, hook), plan, folder)
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
        logs.append(values(each))
    assert logs[0] == logs[1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    kept = [checkpoints.found(each) for each in (folder, other)]
    assert list(kept[0]) == list(kept[1])
    states = [stored(each) for each in (folder, other)]
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name


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

STEPS = 40


def work(name: str, folder: str) -> None:
    """A training in a process of its own, which keeps its step in a file."""
    torch.set_num_threads(1)
    descriptor = os.open(Path(folder) / "step", os.O_CREAT | os.O_WRONLY)
    found = TRAININGS[name](Path(folder), STEPS, 0, lambda step: os.pwrite(descriptor, b"%6d" % step, 0) and None)
    save_state(Path(folder) / "final.pt", weights(found))


def test_a_run_killed_at_random_moments_continues_bit_for_bit(tmp_path: Path) -> None:
    kill_at_random(tmp_path, "text to image", 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text to image", "autoencoder"])
def test_a_run_killed_at_ten_random_moments_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    kill_at_random(tmp_path, name, 10)


def kill_at_random(tmp_path: Path, name: str, times: int) -> None:
    context = multiprocessing.get_context("forkserver")  # forks of a process that has run nothing yet
    context.set_forkserver_preload([__name__])

    def start(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=work, args=(name, str(folder)))
        process.start()
        return process

    def step_of(folder: Path) -> int:
        step = folder / "step"
        return int(step.read_text() or -1) if step.exists() else -1

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(whole)
    process.join()
    assert process.exitcode == 0

    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)
    moments = sorted(chance.sample(range(STEPS - 8), times))
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
