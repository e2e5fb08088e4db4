"""Training of a tiny PixArt transformer with a tiny text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.training.randomness import Randomness
from impasto.training.state import load_state
from impasto.training.text_to_image import (
    Batch,
    LabelHead,
    TextToImageRecipe,
    drop_captions,
    initialize,
    train_text_to_image,
)

from ..tiny import tiny_text_encoder, tiny_transformer

BETAS = torch.linspace(1e-4, 0.02, 1000)
EMPTY = (torch.tensor([1]), torch.tensor([1]))  # </s> alone


def recipe(steps: int, **overrides: Any) -> TextToImageRecipe:
    small: dict[str, Any] = {"batch_size": 8, "warmup_steps": 2, "compile_blocks": False, "log_every": 1}
    return TextToImageRecipe(steps=steps, **{**small, **overrides})


def flat(step: int, size: int = 8) -> Batch:
    """Flat latents whose sign the caption gives."""
    kind = torch.randint(2, (size,), generator=torch.Generator().manual_seed(step))
    latents = (2.0 * kind - 1).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
    ids = torch.stack([kind + 5, torch.full_like(kind, 1), torch.zeros_like(kind)], 1)
    return Batch(latents, ids, torch.tensor([1, 1, 0]).expand(size, 3))


def labelled(step: int) -> Batch:
    batch = flat(step)
    kind = (batch.latents[:, :1] > 0).long()  # [B, 1, H, W]
    return batch._replace(labels=torch.cat([kind, 2 * kind], 1))


def models(seed: int = 0) -> tuple[PixArtTransformer2DModel, nn.Module]:
    transformer = tiny_transformer(seed)
    initialize(transformer)
    return transformer, tiny_text_encoder(num_layers=1, seed=seed)


def train(
    parts: tuple[PixArtTransformer2DModel, nn.Module],
    recipe: TextToImageRecipe,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
    batch: Callable[[int], Batch] = flat,
) -> None:
    train_text_to_image(*parts, batch, EMPTY, BETAS, recipe, folder, check)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def named(parts: tuple[PixArtTransformer2DModel, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter
        for part, model in zip(("transformer", "text_encoder"), parts, strict=True)
        for name, parameter in model.named_parameters()
    }


def test_a_few_steps_reduce_the_loss(tmp_path: Path) -> None:
    parts = models()
    before = {name: parameter.detach().clone() for name, parameter in named(parts).items()}
    train(parts, recipe(100, learning_rate=3e-3, log_every=5), tmp_path)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [float(step) for step in range(5, 101, 5)]
    assert log[-1]["loss"] < 0.35 * log[0]["loss"]
    for band in ("t0_250", "t250_500", "t500_750", "t750_1000"):
        assert 0 < log[-1][band] < log[0][band]
    changed = {name for name, parameter in named(parts).items() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("text_encoder.") for name in changed)
    assert any(".attn2." in name for name in changed)


def test_models_end_in_float32_holding_the_averages(tmp_path: Path) -> None:
    parts = models()
    train(parts, recipe(5), tmp_path)
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 5
    for name, parameter in named(parts).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state["ema"][name]), name
    assert any(not torch.equal(state["ema"][name], state["models"][name]) for name in named(parts))
    assert not any(model.training for model in parts)


def test_a_finished_run_only_gives_its_averages_back(tmp_path: Path) -> None:
    def refuse(step: int) -> Batch:
        raise AssertionError("there is no step left")

    first, second = models(), models(seed=1)
    train(first, recipe(2), tmp_path)
    train(second, recipe(2), tmp_path, batch=refuse)
    for (name, a), b in zip(named(first).items(), named(second).values(), strict=True):
        assert torch.equal(a, b), name


def test_models_hold_their_averages_while_they_are_checked(tmp_path: Path) -> None:
    parts = models()
    kept: dict[int, dict[str, Tensor]] = {}

    def check(step: int) -> dict[str, float]:
        kept[step] = {name: parameter.detach().clone() for name, parameter in named(parts).items()}
        assert not any(model.training for model in parts)
        assert not torch.is_grad_enabled()
        return {"checked": step / 2}

    train(parts, recipe(5, save_every=2), tmp_path, check)
    assert list(kept) == [2, 4, 5]
    assert [row.get("checked") for row in rows(tmp_path)] == [None, 1, None, 2, 2.5]
    for name, average in load_state(tmp_path / "state.pt")["ema"].items():
        assert average.dtype == kept[5][name].dtype == torch.float32
        assert torch.equal(average, kept[5][name]), name


def test_drop_captions_gives_the_empty_caption_its_own_mask() -> None:
    batch = Batch(torch.randn(2, 4, 8, 8), torch.tensor([[7, 8, 9, 1], [5, 6, 1, 0]]), torch.ones(2, 4).long())
    ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
    dropped = drop_captions(batch, EMPTY, 1.0, Randomness(0, 0))
    assert dropped.input_ids.tolist() == [[1, 0, 0, 0]] * 2
    assert dropped.attention_mask.tolist() == [[1, 0, 0, 0]] * 2
    assert torch.equal(dropped.latents, batch.latents)
    assert torch.equal(batch.input_ids, ids)  # the source may be shared, and is left alone
    assert torch.equal(batch.attention_mask, mask)


def test_drop_captions_drops_about_its_share_and_nothing_of_the_others() -> None:
    n = 4000
    batch = Batch(torch.zeros(n, 1, 1, 1), torch.full((n, 3), 7), torch.ones(n, 3).long())
    result = drop_captions(batch, EMPTY, 0.1, Randomness(0, 0))
    gone = result.input_ids[:, 0] == 1
    assert 0.08 < float(gone.float().mean()) < 0.12
    assert bool((result.input_ids[~gone] == 7).all())
    assert torch.equal(result.attention_mask[:, 1], (~gone).long())
    untouched = drop_captions(batch, EMPTY, 0.0, Randomness(0, 0))
    assert torch.equal(untouched.input_ids, batch.input_ids)


def test_initialize_makes_the_output_zero_and_leaves_text_without_effect() -> None:
    transformer = tiny_transformer()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "timestep": torch.tensor([3, 900]),
    }
    with torch.no_grad():
        assert float(transformer(**inputs).sample.abs().max()) > 0
        initialize(transformer)
        assert float(transformer(**inputs).sample.abs().max()) == 0
        nn.init.normal_(transformer.proj_out.weight)
        first = transformer(**inputs).sample
        second = transformer(**{**inputs, "encoder_hidden_states": torch.randn(2, 5, 32)}).sample
    assert float(first.abs().max()) > 0
    assert torch.equal(first, second)


def test_labels_are_learned_from_the_middle_of_the_transformer_and_leave_no_trace(tmp_path: Path) -> None:
    parts = models()
    names = set(parts[0].state_dict())
    plan = recipe(60, learning_rate=3e-3, label_block=0, label_classes=(2, 3))
    train(parts, plan, tmp_path, batch=labelled)
    log = rows(tmp_path)
    assert log[0]["labels"] == pytest.approx(torch.tensor([2.0, 3.0]).log().sum().item(), rel=0.3)
    assert log[-1]["labels"] < 0.3 * log[0]["labels"]
    assert set(parts[0].state_dict()) == names
    assert any(name.startswith("label_head.") for name in load_state(tmp_path / "state.pt")["models"])


def test_a_label_head_reads_each_latent_of_its_own_token() -> None:
    transformer = tiny_transformer()
    head = LabelHead(transformer.train(), 0, (2, 3))
    torch.nn.init.zeros_(head.read.weight)
    torch.nn.init.zeros_(head.read.bias)
    head.read.bias.data.view(2, 2, 5)[0, 1, 0] = 50.0  # in the upper right of each patch, sure of the first class
    with torch.no_grad():
        transformer(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([3]))
    labels = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    expected = torch.tensor([0.75 * torch.tensor(2.0).log(), torch.tensor(3.0).log()]).sum()
    torch.testing.assert_close(head(labels), expected.view(1))


def test_an_unknown_prediction_type_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prediction_type"):
        train(models(), recipe(1, prediction_type="flow"), tmp_path)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_predictions_learn(kind: str, tmp_path: Path) -> None:
    train(models(), recipe(30, learning_rate=3e-3, prediction_type=kind), tmp_path)
    log = rows(tmp_path)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
