"""Training of a tiny autoencoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.models.autoencoder_kl import AutoencoderKL
from impasto.training.autoencoder import AutoencoderRecipe, cosine_rate, psnr, train_autoencoder
from impasto.training.state import load_state

from ..tiny import tiny_vae


def patchwork(seed: int) -> Tensor:
    """Pictures [4, 3, 16, 16] of sixteen patches each, in eight strong colours."""
    colours = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).round() * 1.6 - 0.8
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3)


class Patchworks(Iterator[Tensor]):
    """Endless patchworks; counts the batches that were asked for."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> Tensor:
        self.taken += 1
        return patchwork(self.taken)


def validation() -> Tensor:
    return patchwork(0)


def small_vae(seed: int = 0) -> AutoencoderKL:
    return tiny_vae(seed, layers_per_block=1, mid_block_add_attention=False)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_few_steps_reduce_the_error(tmp_path: Path) -> None:
    model = small_vae()
    recipe = AutoencoderRecipe(steps=100, learning_rate=2e-2, warmup_steps=5, save_every=20)
    train_autoencoder(model, Patchworks(), recipe, tmp_path, validation())
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [20, 40, 60, 80, 100]
    assert log[-1]["mse"] < 0.75 * log[0]["mse"]
    assert log[-1]["psnr"] > log[0]["psnr"] + 1.5
    blank = psnr(validation(), torch.zeros_like(validation()))
    assert log[-1]["psnr"] > blank + 2
    assert not model.training
    with torch.no_grad():
        drawn = model.decode(model.encode(validation()).latent_dist.mode()).sample
    assert psnr(validation(), drawn) == pytest.approx(log[-1]["psnr"], abs=1e-3)


def test_an_interrupted_run_continues_with_its_weights(tmp_path: Path) -> None:
    class Interrupted(Patchworks):
        def __next__(self) -> Tensor:
            if self.taken == 5:
                raise KeyboardInterrupt
            return super().__next__()

    recipe = AutoencoderRecipe(steps=8, warmup_steps=2, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(small_vae(), Interrupted(), recipe, tmp_path, validation())
    halfway = load_state(tmp_path / "state.pt")
    assert halfway["step"] == 4

    batches, model = Patchworks(), small_vae(seed=1)
    train_autoencoder(model, batches, recipe, tmp_path, validation())
    assert batches.taken == 4
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 8
    assert float(state["optimizer"]["state"][0]["step"]) == 8
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name])
        assert float((tensor - halfway["model"][name]).abs().max()) < 10 * recipe.learning_rate, name


@pytest.mark.parametrize(("error", "expected"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, 100.0)])
def test_psnr_of_a_known_error(error: float, expected: float) -> None:
    pictures = torch.full((2, 3, 4, 4), -1.0)
    assert psnr(pictures, pictures + error) == pytest.approx(expected, abs=1e-3)


def test_psnr_is_a_mean_over_pictures_and_clips_what_no_screen_can_show() -> None:
    pictures = torch.full((2, 3, 4, 4), 1.0)
    errors = torch.tensor([-0.2, -0.02]).view(2, 1, 1, 1)
    assert psnr(pictures, pictures + errors) == pytest.approx(30.0, abs=1e-3)
    assert psnr(pictures, pictures + 5) == pytest.approx(100.0)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.51), (110, 0.02), (500, 0.02)])
def test_the_rate_rises_and_falls_along_a_cosine(step: int, factor: float) -> None:
    assert cosine_rate(step, steps=110, warmup=10) == pytest.approx(factor)
