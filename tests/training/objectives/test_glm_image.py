"""Training of the components of a tiny GLM-Image: the visual codebook, the prior, the transformer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.glm_image.prior import target_offsets
from impasto.pipelines.glm_image_stages import shift_of, shifted
from impasto.pipelines.request import Schedule
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from impasto.training.data.sample import Batch as SampleBatch
from impasto.training.data.sample import Sample
from impasto.training.objectives.base import ByStep, Tensors
from impasto.training.objectives.flow_matching import Batch, FlowMatching, Reference, initialize
from impasto.training.objectives.glm_image import GlmImageFlowMatching
from impasto.training.objectives.prior import Prior, Sequences, eager_attention, join, scores
from impasto.training.objectives.text_to_image import Latents
from impasto.training.objectives.visual_codebook import (
    CodeReader,
    Images,
    OnlineCodebook,
    VisualCodebook,
    see,
    tokenize,
)
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ...tiny_glm import SCHEDULER, TRANSFORMER, prior_parts
from ..runs import rows, settings

# --- the codebook ---


def test_tokens_of_a_batch_are_those_of_transformers() -> None:
    parts = prior_parts()
    model, images = parts["vision_language_encoder"], parts["processor"].image_processor
    images.image_mean = images.image_std = [0.5] * 3
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = images([Image.fromarray(image)], do_resize=False, return_tensors="pt")
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1  # [1, 3, 64, 64]
    features = model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output[0]
    seen = see(model.model.visual, pixels)[0].T.view_as(features)
    torch.testing.assert_close(seen, features, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokenize(model.model, pixels)[0], model.get_image_tokens([features]).flatten())


def test_codes_follow_tokens_and_rare_ones_begin_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    tokens = centres[torch.randint(6, (600,), generator=generator)]
    tokens = torch.nn.functional.normalize(tokens + 0.01 * torch.randn(600, 4, generator=generator), dim=-1)
    book, random = OnlineCodebook(6, 4, 0.9), np.random.default_rng(0)
    for _ in range(50):
        book.update(tokens, random)
    # Every centre has a code, which needs that those which no token was near started again.
    assert (centres @ book.codes.T).amax(1).min() > 0.99
    assert len(book.nearest(tokens).unique()) == 6
    other = OnlineCodebook(6, 4, 0.9)
    other.load_state_dict(book.state_dict())
    assert torch.equal(other.codes, book.codes)
    book.start(tokens, 3)
    assert float(book.counts.sum()) == 200
    torch.testing.assert_close(book.codes.norm(dim=-1), torch.ones(6))


def coloured(step: int) -> Images:
    """Images of one of four colours, which are their labels."""
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])
    kind = torch.randint(4, (8,), generator=torch.Generator().manual_seed(step))
    pixels = colours[kind][:, :, None, None].expand(-1, -1, 64, 64)
    return Images(pixels, kind.view(-1, 1, 1, 1).expand(-1, 1, 16, 16))


def test_a_codebook_learns_to_tell_images_apart_and_resumes(tmp_path: Path) -> None:
    model = prior_parts()["vision_language_encoder"].model
    torch.manual_seed(0)

    def run(model: Any) -> None:
        objective = VisualCodebook(model, CodeReader(8, (4,), side=4), coloured, steps=150, continuous_steps=50)
        plan = settings(150, optimizer={"rate": 5e-3}, checkpoints={"every": 75}, log_every=5)
        train(objective, ByStep(coloured), plan, tmp_path)
        objective.finish()

    run(model)
    log = rows(tmp_path)
    assert log[-1]["labels"] < 0.2 * log[0]["labels"]
    assert log[0]["codes_in_use"] == 0 < log[-1]["codes_in_use"]
    batch = coloured(1000)
    tokens = tokenize(model, batch.pixels)  # [8, 16]
    kinds = batch.labels[:, 0, 0, 0]
    for kind in kinds.unique():
        assert (tokens[kinds == kind] == tokens[kinds == kind][0]).all()
    assert len({tuple(row.tolist()) for row in tokens}) == len(kinds.unique())
    codes = model.vqmodel.quantize.embedding.weight.clone()

    again = prior_parts()["vision_language_encoder"].model
    run(again)  # nothing is left to do
    assert torch.equal(again.vqmodel.quantize.embedding.weight, codes)
    assert torch.equal(tokenize(again, batch.pixels), tokens)


# --- the prior ---


def test_prompts_of_different_lengths_are_scored_as_transformers_does() -> None:
    model = prior_parts()["vision_language_encoder"]
    prompts = [torch.tensor([40, 41, 42, 43]), torch.tensor([44, 45])]
    positions = [torch.arange(len(prompt)).expand(3, -1) for prompt in prompts]
    targets = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    offsets = target_offsets([(1, 2), (2, 2)])
    batch = join(prompts, positions, targets, offsets, padding=38, kind="generated")
    assert batch.tokens.tolist()[1] == [44, 45, 7, 8, 9, 10, 11, 12, *[38] * 8]  # of few lengths
    assert batch.positions[:, 1, 2].tolist() == [2, 2, 2]
    assert batch.positions[:, 1, 7].tolist() == [2 + 2, 2 + 2 + 1, 2 + 2 + 1]
    said = scores(model, batch)
    for row, prompt in enumerate(prompts):
        tokens = torch.cat([prompt, targets[row]])[None]
        place = torch.cat([positions[row], positions[row][:, -1:] + 1 + offsets], dim=1)[:, None]
        alone = model(input_ids=tokens, position_ids=place).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(said[row], alone, rtol=1e-4, atol=1e-5)


def words(step: int) -> Sequences:
    """Prompts of one word each, which decides the tokens."""
    chosen = torch.randint(40, 44, (8,), generator=torch.Generator().manual_seed(step))
    prompts = [torch.tensor([int(word), 39]) for word in chosen]
    targets = (chosen - 40)[:, None] * 4 + torch.arange(4)
    return join(prompts, [torch.arange(2).expand(3, -1)] * 8, targets, target_offsets([(2, 2)]), 38, "generated")


def test_a_prior_learns_what_to_say_and_keeps_its_positions(tmp_path: Path) -> None:
    model = prior_parts()["vision_language_encoder"]
    frequencies = model.model.language_model.rotary_emb.inv_freq.clone()

    plan = settings(60, optimizer={"rate": 1e-2}, checkpoints={"every": 30}, log_every=5)

    def run(model: Any, *unseen: Sequences) -> None:
        objective = Prior(model)
        with eager_attention(model):
            train(
                objective, ByStep(words, 8), plan, tmp_path, (lambda step: objective.check(unseen)) if unseen else None
            )

    known, other = words(1000), words(2000)
    mistaken = other._replace(targets=(other.targets + 1) % 16)
    vision, way = (part._attn_implementation for part in (model.config.vision_config, model.config.text_config))
    run(model, known, mistaken, other._replace(kind="edited"))
    assert model.config.vision_config._attn_implementation == vision
    assert model.config.text_config._attn_implementation == way
    seen = [row for row in rows(tmp_path) if "generated" in row]
    assert seen[-1]["generated"] == 1.0
    checks = [row for row in rows(tmp_path) if "unseen_generated" in row]
    assert [row["step"] for row in checks] == [30, 60]
    assert checks[-1]["unseen_edited"] > 0.9  # averaged weights
    assert 0.45 < checks[-1]["unseen_generated"] < 0.55  # those of one batch, and none of the other
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, frequencies)
    batch = words(1000)
    assert torch.equal(scores(model, batch).argmax(-1), batch.targets)
    again = prior_parts()["vision_language_encoder"]
    run(again)
    assert torch.equal(scores(again, batch), scores(model, batch))


def test_compiled_layers_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run without a compiler: for two lengths, and with a check of the averages in between."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def batch(step: int) -> Sequences:
        prompt = torch.arange(40, 44).repeat(1 + 4 * (step % 2))  # 8 or 20 tokens with the targets
        positions = torch.arange(len(prompt)).expand(3, -1)
        return join([prompt], [positions], torch.tensor([[1, 2, 3, 4]]), target_offsets([(2, 2)]), 38, "generated")

    losses = []
    for compile_blocks in (False, True):
        folder = tmp_path / str(compile_blocks)
        model = prior_parts()["vision_language_encoder"]
        plan = settings(6, checkpoints={"every": 3}, log_every=1, schedule={"warmup": 1}, compile=compile_blocks)
        objective = Prior(model)
        with eager_attention(model):
            train(objective, ByStep(batch, 1), plan, folder, lambda step, own=objective: own.check([batch(0)]))  # type: ignore[misc]
        losses.append([row["loss"] for row in rows(folder) if "loss" in row])
        assert len(model(input_ids=torch.tensor([[40, 41]])).logits[0]) == 2  # called as before
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][-1] < losses[0][0]


# --- the transformer ---


@pytest.fixture
def transformer() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(**TRANSFORMER)
    initialize(model)
    return model


def flat(edits: bool, step: int) -> Batch:
    """Latents whose sign the token gives; of edits, that of the reference, while the tokens say nothing."""
    kind = torch.randint(2, (8,), generator=torch.Generator().manual_seed(step))
    latents = (2.0 * kind - 1).view(-1, 1, 1, 1).expand(-1, 4, 4, 4)
    tokens = kind[:, None].expand(-1, 4)
    reference = Reference(latents, tokens) if edits and step % 2 else None
    return Batch(latents, tokens if reference is None else torch.full_like(tokens, 2), torch.zeros(8, 1, 16), reference)


def test_it_starts_with_an_output_of_zero(transformer: GlmImageTransformer2DModel) -> None:
    size = torch.tensor([[32.0, 32.0]])
    out = transformer(
        torch.randn(2, 4, 4, 4),
        torch.randn(2, 1, 16),
        torch.zeros(2, 4, dtype=torch.long),
        None,
        torch.tensor([10.0]),
        size,
        torch.zeros_like(size),
    ).sample
    assert not out.any()


@pytest.mark.parametrize("edits", [False, True])
def test_a_transformer_learns_from_tokens_and_references(
    transformer: GlmImageTransformer2DModel, edits: bool, tmp_path: Path
) -> None:
    plan = settings(80, optimizer={"rate": 1e-2}, checkpoints={"every": 40}, log_every=10)
    data = ByStep(partial(flat, edits))
    train(FlowMatching(transformer), data, plan, tmp_path)
    log = rows(tmp_path)
    kinds = ["generated", "edited"] if edits else ["generated"]
    for kind in kinds:  # where there is the most noise, only tokens and references tell the sign
        assert log[-1][f"{kind}_3"] < 0.6 * log[0][f"{kind}_3"], kind
    assert edits or "edited_3" not in log[-1]
    again = GlmImageTransformer2DModel(**TRANSFORMER)
    train(FlowMatching(again), data, plan, tmp_path)
    for name, value in transformer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_operations_are_those_of_linear_layers_and_attention(transformer: GlmImageTransformer2DModel) -> None:
    """Of N image tokens: 24 D² N in linear layers, 4 D N² in attention; forward and twice backward."""
    one = GlmImageFlowMatching(transformer, Latents({}), None, None, None, None)
    width, layers, tokens = transformer.inner_dim, len(transformer.transformer_blocks), 4 * 6
    posterior = (torch.zeros(4, 8, 12), torch.ones(4, 8, 12))
    batch = SampleBatch([Sample(posterior=posterior)] * 2, 0, 2, 0)
    forward = layers * (24 * width**2 * tokens + 4 * width * tokens**2)
    assert one.flops(batch) == 3 * 2 * forward


def test_times_are_logit_normal() -> None:
    objective = FlowMatching(GlmImageTransformer2DModel(**TRANSFORMER), spread=1.5)
    timesteps, levels = objective.times((torch.arange(20_000) + 0.5) / 20_000, 4)
    logits = levels.double().logit()
    assert float(logits.mean()) == pytest.approx(0, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.5, rel=5e-3)
    assert float((logits.abs() < 1.5).double().mean()) == pytest.approx(0.6827, abs=2e-3)  # of a normal distribution
    torch.testing.assert_close(timesteps, 1000 * levels - 1)


@pytest.mark.parametrize(
    "changes", [{}, {"time_shift_type": "exponential"}, {"use_dynamic_shifting": False, "shift": 3}]
)
def test_timesteps_and_noise_levels_are_those_of_sampling(changes: dict[str, Any]) -> None:
    schedule = FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **changes})
    tokens, steps = 4096, 10
    schedule.set_timesteps(**shifted(schedule, Schedule(steps, None, None), tokens))
    shift = partial(shift_of, schedule.config)
    objective = FlowMatching(GlmImageTransformer2DModel(**TRANSFORMER), shift=shift)
    share = torch.special.ndtr((schedule.timesteps / 1000).clamp(max=0.95).logit())
    timesteps, levels = objective.times(share, tokens)
    torch.testing.assert_close(timesteps[1:], schedule.timesteps[1:] - 1, rtol=0, atol=1e-2)
    torch.testing.assert_close(levels[1:], schedule.sigmas[1:-1], rtol=0, atol=1e-4)


def test_masked_latents_are_not_learned(transformer: GlmImageTransformer2DModel) -> None:
    """The output of zero is wrong everywhere; only what the mask shows counts."""
    batch, mask = flat(False, 0), torch.zeros(8, 1, 4, 4)
    mask[:, :, :, :2] = 1.0
    halves = batch.latents.clone()
    halves[..., 2:] = 100.0
    objective = FlowMatching(transformer)
    whole, masked, other = (
        objective(Tensors(values, 8, 0), Randomness(0, 0)).each
        for values in (batch, batch._replace(latents=halves, loss_mask=mask), batch._replace(latents=halves))
    )
    assert torch.allclose(masked.mean(), whole.mean(), rtol=0.3)
    assert (other > 100 * masked).all()
