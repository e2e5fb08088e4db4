"""Training of a tiny PixArt transformer with a tiny text encoder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import ConfigurationError, InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.training.assembly.assemble import rollout_of
from impasto.training.data.sample import Batch, Sample
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.diffusion_loss import DiffusionLoss
from impasto.training.objectives.labels import LabelHead
from impasto.training.objectives.rollout import Rollout
from impasto.training.objectives.text_to_image import Latents, TextToImage, initialize
from impasto.training.objectives.texts import Texts
from impasto.training.running.loop import train as run
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import Settings
from impasto.training.settings.configuration import RolloutSettings
from impasto.transforms.token_routing import route_tokens

from ...tiny import tiny_text_encoder, tiny_tokenizer, tiny_transformer
from ..runs import rows, settings, stored

BETAS = torch.linspace(1e-4, 0.02, 1000)
Models = tuple[PixArtTransformer2DModel, nn.Module]


def plan(steps: int, **changes: Any) -> Settings:
    return settings(steps, **{"log_every": 1, **changes})


def flat(step: int, size: int = 8) -> Batch:
    """Flat latents whose sign the caption gives."""
    kind = torch.randint(2, (size,), generator=torch.Generator().manual_seed(step)).tolist()
    samples = [
        Sample(posterior=(torch.full((4, 8, 8), 2.0 * k - 1), torch.zeros(4, 8, 8)), caption=("red", "blue cube")[k])
        for k in kind
    ]
    return Batch(samples, 0, size, step)


def labelled(step: int) -> Batch:
    batch = flat(step)
    for sample in batch.samples:
        assert sample.posterior is not None
        kind = (sample.posterior[0][:1] > 0).long()  # [1, H, W]
        sample.labels = torch.cat([kind, 2 * kind])
    return batch


def models(seed: int = 0) -> Models:
    transformer = tiny_transformer(seed)
    initialize(transformer)
    return transformer, tiny_text_encoder(num_layers=1, seed=seed)


def objective(parts: Models, kind: str = "v_prediction", **options: Any) -> TextToImage:
    given: dict[str, Any] = {"bound_weight": 0.02, "timesteps": "stratified", "weighting": "velocity", **options}
    texts = Texts(tiny_tokenizer(), parts[1], tokens=8)
    return TextToImage(parts[0], texts, Latents({}), DiffusionLoss(BETAS, kind), **given)


def train(
    parts: Models,
    settings: Settings,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
    batch: Callable[[int], Batch] = flat,
    **options: Any,
) -> None:
    run(objective(parts, **options), ByStep(batch), settings, folder, check)


def named(parts: Models) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter
        for part, model in zip(("transformer", "text_encoder"), parts, strict=True)
        for name, parameter in model.named_parameters()
    }


def test_a_few_steps_reduce_the_loss(tmp_path: Path) -> None:
    parts = models()
    before = {name: parameter.detach().clone() for name, parameter in named(parts).items()}
    train(parts, plan(100, optimizer={"rate": 3e-3}, log_every=5), tmp_path)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [float(step) for step in range(5, 101, 5)]
    assert log[-1]["loss"] < 0.35 * log[0]["loss"]
    for band in ("t0_250", "t250_500", "t500_750", "t750_1000"):
        assert 0 < log[-1][band] < log[0][band]
    changed = {name for name, parameter in named(parts).items() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("text_encoder.") for name in changed)
    assert any(".attn2." in name for name in changed)


def test_logged_errors_of_timesteps_have_no_weights() -> None:
    """Runs whose losses weigh timesteps differently can be compared."""
    found = [
        objective(models(), weighting=kind).eval()(flat(0), Randomness(0, 0))
        for kind in ("none", "balanced", "min-snr")
    ]
    for other in found[1:]:
        assert not torch.equal(other.each, found[0].each)
        torch.testing.assert_close(other.parts, found[0].parts, equal_nan=True)


def test_models_end_in_float32_holding_the_averages(tmp_path: Path) -> None:
    parts = models()
    train(parts, plan(5), tmp_path)
    state = stored(tmp_path)
    for name, parameter in named(parts).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[f"ema.{name}"]), name
    assert any(not torch.equal(state[f"ema.{name}"], state[f"models.{name}"]) for name in named(parts))
    assert not any(model.training for model in parts)


def test_a_finished_run_only_gives_its_averages_back(tmp_path: Path) -> None:
    def refuse(step: int) -> Batch:
        raise AssertionError("there is no step left")

    first, second = models(), models(seed=1)
    train(first, plan(2), tmp_path)
    train(second, plan(2), tmp_path, batch=refuse)
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

    train(parts, plan(5, checkpoints={"every": 2}), tmp_path, check)
    assert list(kept) == [2, 4, 5]
    assert [row.get("checked") for row in rows(tmp_path)] == [None, 1, None, 2, 2.5]
    averages = {name: tensor for name, tensor in stored(tmp_path).items() if name.startswith("ema.")}
    assert len(averages) == len(kept[5])
    for name, average in ((name.removeprefix("ema."), tensor) for name, tensor in averages.items()):
        assert average.dtype == kept[5][name].dtype == torch.float32
        assert torch.equal(average, kept[5][name]), name


def test_a_dropped_caption_is_the_empty_one_with_its_own_mask() -> None:
    encoder = tiny_text_encoder(num_layers=1)
    samples = [Sample(caption="A red cube "), Sample(caption="a")]
    kept, dropped = (torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    for trained in (False, True):
        encoder.requires_grad_(trained)
        texts = Texts(tiny_tokenizer(), encoder, tokens=8)
        ids = [tiny_tokenizer()(text).input_ids for text in ("a red cube", "a", "")]
        assert texts(samples, kept).mask.sum(1).tolist() == [len(ids[0]), len(ids[1])]
        gone = texts(samples, dropped)
        assert gone.mask.tolist() == [[1], [1]]
        with torch.no_grad():
            empty = encoder(torch.tensor([ids[2]])).last_hidden_state[0]  # </s> alone
        torch.testing.assert_close(gone.embeds[0], empty)
        mixed = texts(samples, torch.tensor([False, True]))
        assert mixed.mask.sum(1).tolist() == [len(ids[0]), 1]
        torch.testing.assert_close(mixed.embeds[1, :1], empty)


def test_stored_features_are_those_of_the_encoder() -> None:
    encoder = tiny_text_encoder(num_layers=1).requires_grad_(False)
    live = Texts(tiny_tokenizer(), encoder, tokens=8)
    samples = [Sample(caption="a red cube"), Sample(caption="blue")]
    dropped = torch.tensor([True, False])
    expected = live(samples, torch.zeros(2, dtype=torch.bool))
    stored = [Sample(text=row[: int(mask.sum())]) for row, mask in zip(*expected)]
    for drop in (dropped, ~dropped):
        for texts in (live, Texts(None, None, tokens=8, empty=live._empty())):
            given = live(samples, drop)
            found = texts(stored, drop)
            assert torch.equal(found.mask, given.mask)
            torch.testing.assert_close(found.embeds * found.mask[..., None], given.embeds * given.mask[..., None])
    with pytest.raises(InputError, match="empty caption"):
        Texts(None, None, tokens=8)(stored, dropped)


def test_an_image_without_a_caption_has_the_stored_features_of_the_empty_one() -> None:
    empty = torch.randn(1, 32)
    texts, kept = Texts(None, None, tokens=8, empty=empty), torch.zeros(2, dtype=torch.bool)
    row = torch.randn(3, 32)
    mixed = texts([Sample(caption="a red cube", text=row), Sample()], kept)
    assert torch.equal(mixed.embeds[0], row)
    assert torch.equal(mixed.embeds[1, :1], empty)
    assert mixed.mask.sum(1).tolist() == [3, 1]
    assert torch.equal(texts([Sample(), Sample()], kept).embeds, empty.expand(2, 1, 32))
    with pytest.raises(InputError, match="others do not"):
        texts([Sample(caption="a red cube", text=row), Sample(caption="blue")], kept)


def test_about_the_share_of_captions_is_dropped() -> None:
    parts = models()
    seen: list[Tensor] = []
    trained = objective(parts, caption_dropout=0.1)
    texts = trained.texts
    trained.texts = lambda samples, dropped: (seen.append(dropped), texts(samples, dropped))[1]  # type: ignore
    for step in range(5):
        trained(flat(step, 200), Randomness(0, step))
    assert 0.07 < float(torch.cat(seen).float().mean()) < 0.13


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
    head = LabelHead(parts[0], 0, (2, 3))
    train(parts, plan(60, optimizer={"rate": 3e-3}), tmp_path, batch=labelled, label_head=head)
    head.hook.remove()
    log = rows(tmp_path)
    assert log[0]["labels"] == pytest.approx(torch.tensor([2.0, 3.0]).log().sum().item(), rel=0.3)
    assert log[-1]["labels"] < 0.3 * log[0]["labels"]
    assert set(parts[0].state_dict()) == names
    assert any(name.startswith("models.label_head.") for name in stored(tmp_path))


def test_labels_of_a_block_that_does_not_exist_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"labels\.block: the transformer has 2 blocks, 0 to 1, not 2"):
        LabelHead(tiny_transformer(), 2, (2, 3))


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
    torch.testing.assert_close(head([labels]), expected.view(1))
    with torch.no_grad():
        transformer(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([3]))
    with pytest.raises(ConfigurationError, match="3 questions"):
        head([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])


def of_sizes(*sides: tuple[int, int]) -> Batch:
    """Random latents of these sizes, with labels and some masks."""
    samples = []
    for i, (height, width) in enumerate(sides):
        rng = torch.Generator().manual_seed(i)
        mean = torch.randn(4, height, width, generator=rng)
        labels = torch.randint(2, (2, height, width), generator=rng)
        mask = torch.rand(1, 8 * height, 8 * width, generator=rng) if i % 2 else None
        posterior = (mean, 0.1 * torch.ones_like(mean))
        samples.append(Sample(posterior=posterior, caption=f"blue cube {i}", labels=labels, loss_mask=mask))
    return Batch(samples, 0, len(sides), 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_batch_has_the_losses_and_gradients_of_batches_of_one_size(compiled: bool) -> None:
    parts = models()
    nn.init.normal_(parts[0].proj_out.weight, std=0.1)
    head = LabelHead(parts[0], 0, (2, 3))
    whole = of_sizes((8, 8), (8, 8), (4, 12), (12, 4), (12, 4))
    rollout = Rollout(0.6, 250, 560)
    options = {"timesteps": "uniform", "timestep_range": (200, 600), "caption_dropout": 0.3}
    trained = objective(parts, label_head=head, rollout=rollout, **options).train()
    parts[1].eval()  # without its dropout
    if compiled:
        for block in parts[0].transformer_blocks:
            block.compile(backend="eager", dynamic=True)

    def losses(batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        trained.zero_grad()
        found = torch.cat([trained(batch, Randomness(3, 0, batch.first, 5)).each for batch in batches])
        found.sum().backward()
        return found.detach(), {name: p.grad.clone() for name, p in named(parts).items() if p.grad is not None}

    packed, gradients = losses([whole])
    apart, expected = losses([Batch(whole.samples[start:end], start, 5, 0) for start, end in ((0, 2), (2, 3), (3, 5))])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    head.hook.remove()


def test_a_rollout_is_trained_to_become_the_data() -> None:
    """Whatever the model makes of its own inputs, only x_0 itself has no error."""
    one = objective(models(), timestep_range=(250, 560), weighting="none", rollout=Rollout(1.0, 250, 560, steps=2))
    batch = of_sizes((8, 8), (8, 8), (8, 8))
    for sample in batch.samples:
        sample.loss_mask = None
    x0 = one.latents(batch.samples, Randomness(0, 0), torch.device("cpu"))
    inputs: list[tuple[Tensor, Tensor]] = []

    def predict(part: float) -> Callable[..., list[Tensor]]:
        def velocity(samples: Any, xt: list[Tensor], text: Tensor, mask: Tensor, t: Tensor) -> list[Tensor]:
            inputs.append((xt[0], t))
            alpha, sigma = one.loss.levels(t)
            return [(alpha * xt[0] - part * x0) / sigma]  # x_0 = alpha x_t - sigma v

        return velocity

    for part in (1.0, 0.5):
        inputs.clear()
        one._predict = predict(part)  # type: ignore[method-assign]
        loss = one.train()(batch, Randomness(0, 0))
        s, (xt, t) = inputs[0][1], inputs[-1]
        assert len(inputs) in (2, 3)
        assert torch.equal(s, t + 50 * (len(inputs) - 1))  # it begins with data as noisy as that
        known = torch.stack([row.flatten() @ x.flatten() / x.square().sum() for row, x in zip(xt, x0)])
        torch.testing.assert_close(known, part * one.loss.levels(t)[0].flatten(), atol=0.15, rtol=0)
        expected = (1 - part) ** 2 * (x0.square() / one.loss.levels(t)[1] ** 2).flatten(1).mean(1)
        torch.testing.assert_close(loss.each, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.parts["rollout"], loss.each)
    inputs.clear()
    one.eval()(batch, Randomness(0, 0))
    assert len(inputs) == 1


def test_tokens_of_a_packed_batch_may_skip_blocks() -> None:
    parts = models()
    routing = route_tokens(parts[0], 0, 1, 0.5)
    loss = objective(parts, routing=routing).train()(of_sizes((8, 8), (4, 12)), Randomness(3, 0, 0, 2))
    assert loss.each.shape == (2,)
    assert loss.each.isfinite().all()
    routing.remove()


def test_an_unknown_prediction_type_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prediction_type"):
        train(models(), plan(1), tmp_path, kind="flow")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_predictions_learn(kind: str, tmp_path: Path) -> None:
    train(models(), plan(30, optimizer={"rate": 3e-3}), tmp_path, kind=kind)
    log = rows(tmp_path)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_token_routing_at_rate_zero_is_plain_and_evaluation_always_is() -> None:
    def losses(rate: float | None, training: bool) -> Tensor:
        transformer = tiny_transformer(num_layers=3)
        routing = None if rate is None else route_tokens(transformer, 1, 2, rate)
        one = objective((transformer, tiny_text_encoder(num_layers=1)), routing=routing)
        torch.manual_seed(0)  # of the dropout of the text encoder
        each: Tensor = one.train(training)(flat(0), Randomness(0, 0)).each
        return each

    for training in (True, False):
        assert torch.equal(losses(0.0, training), losses(None, training))
        assert torch.equal(losses(0.5, training), losses(None, training)) is not training


def test_operations_are_those_of_linear_layers_and_attention() -> None:
    """Of N image tokens and M text tokens: 14 D² N in linear layers, 2 D² M in keys and values, 2 D N (N + M)."""
    parts = models()
    width, layers = parts[0].inner_dim, len(parts[0].transformer_blocks)
    n, m = 16, 8  # 8 x 8 latents in patches of 2 x 2, padded texts
    forward = 2 * layers * (14 * width**2 * n + 2 * width**2 * m + 2 * width * n * (n + m))
    assert objective(parts).flops(flat(0, 2)) == 3 * 2 * forward  # forward and twice backward, of two images


def test_a_rollout_averages_like_the_scheduler() -> None:
    rollout = rollout_of(RolloutSettings(timestep_range=(100, 300), gap=40), {"refine_span": 90.0})
    assert (rollout.low, rollout.high, rollout.steps, rollout.gap) == (100, 300, 3, 40)
    assert rollout.share_of_last == pytest.approx(1 - math.exp(-40 / 90))
    assert rollout_of(RolloutSettings(), {}).span == DPMSolverMultistepScheduler()._refine_span


@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
def test_a_range_of_timesteps(timesteps: Any) -> None:
    """All of it is trained, and nothing else."""
    one = objective(models(), timesteps=timesteps, timestep_range=(400, 410))
    assert set(one.sample_timesteps(1000, Randomness(0, 0)).tolist()) == set(range(400, 410))
    with pytest.raises(ConfigurationError, match="ends at 1001, and there are 1000 timesteps"):
        objective(models(), timestep_range=(400, 1001))
    with pytest.raises(ConfigurationError, match="ends at 1001"):
        objective(models(), rollout=Rollout(0.5, 400, 1001))


def apart(one: TextToImage, batch: Batch, random: Randomness, below: int) -> Tensor:
    """The squared differences [B] that the loss of agreement asks for, from two plain passes; NaN where it does not."""
    found, given = [], Randomness(random.seed, random.step)
    x0 = one.latents(batch.samples, given, torch.device("cpu"))
    dropped = given.uniform([len(batch.samples)]) < one.caption_dropout
    t = one.sample_timesteps(len(batch.samples), given)
    xt = one.loss.add_noise(x0, given.normal(x0.shape), t)
    for i, sample in enumerate(batch.samples):
        predictions = []
        for drop in (False, True):
            text, mask = one.texts([sample], torch.tensor([drop]))
            output = one.transformer(xt[i : i + 1], text, t[i : i + 1], encoder_attention_mask=mask).sample
            predictions.append(output[:, : x0.shape[1]])
        error = (predictions[0] - predictions[1]).square().mean()
        found.append(error if t[i] < below and not dropped[i] else torch.tensor(torch.nan))
    return torch.stack(found)


def test_agreement_is_the_difference_of_predictions_with_and_without_captions_at_low_noise() -> None:
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1, dropout_rate=0.0)
    options: dict[str, Any] = {"caption_dropout": 0.3, "agreement_below": 600}
    plain = objective(parts, **options)
    one = objective(parts, agreement_weight=3.0, **options).train()
    batch, random = flat(0, 12), Randomness(0, 0)
    expected = apart(one, batch, random, 600)
    loss = one(batch, random)
    assert 2 < int(expected.isnan().sum()) < 10
    assert torch.allclose(loss.parts["agreement"], expected, rtol=1e-4, atol=1e-7, equal_nan=True)
    before = plain.train()(batch, Randomness(0, 0)).each
    assert torch.allclose(loss.each, before + 3 * expected.nan_to_num(), rtol=1e-4, atol=1e-6)
    assert "agreement" not in one.eval()(batch, Randomness(0, 0)).parts


def test_agreement_has_the_masks_of_the_loss() -> None:
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1, dropout_rate=0.0)
    one = objective(parts, agreement_weight=1.0, agreement_below=1000, caption_dropout=0.0).train()
    masks = [torch.zeros(1, 64, 64), torch.ones(1, 64, 64)]
    batch = flat(0, 2)
    plain = one(batch, Randomness(0, 0)).parts["agreement"]
    samples = [dataclasses.replace(sample, loss_mask=mask) for sample, mask in zip(batch.samples, masks)]
    masked = one(Batch(samples, 0, 2, 0), Randomness(0, 0)).parts["agreement"]
    assert masked[0] == 0 < plain[0]
    assert torch.allclose(masked[1], plain[1])


def test_agreement_draws_both_predictions_to_each_other() -> None:
    """Its gradient is that of the difference of two plain passes, in both of them."""
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1, dropout_rate=0.0)
    options: dict[str, Any] = {"caption_dropout": 0.0, "agreement_below": 700}
    one, plain = objective(parts, agreement_weight=2.0, **options).train(), objective(parts, **options).train()
    batch, weights = flat(0, 4), [p for p in one.parameters() if p.requires_grad]
    expected = plain(batch, Randomness(0, 0)).each + 2 * apart(one, batch, Randomness(0, 0), 700).nan_to_num()
    gradients = [torch.autograd.grad(each.sum(), weights) for each in (one(batch, Randomness(0, 0)).each, expected)]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-6)


def given(t: Tensor, count: int, random: Randomness) -> Tensor:
    random.uniform([count])  # which drawing them would take
    return t


def test_a_packed_batch_agrees_as_batches_of_one_size_do() -> None:
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1, dropout_rate=0.0)
    options: dict[str, Any] = {"agreement_below": 1000, "agreement_weight": 1.0, "caption_dropout": 0.0}
    samples = [
        Sample(posterior=(torch.full((4, size, 8), value), torch.zeros(4, size, 8)), caption="red")
        for size, value in ((8, 1.0), (8, -1.0), (12, 0.5))
    ]
    packed = objective(parts, packed=True, **options).train()
    random = Randomness(0, 0)
    for shape in ([2, 4, 8, 8], [1, 4, 12, 8]):
        random[slice(0, 2) if shape[0] == 2 else slice(2, 3)].normal(shape)
    random.uniform([3])  # as a step draws, up to its timesteps
    t = packed.sample_timesteps(3, random)
    one = packed(Batch(samples, 0, 3, 0), Randomness(0, 0))
    for i, sample in enumerate(samples):
        alone = objective(parts, **options).train()
        alone.sample_timesteps = functools.partial(given, t[i : i + 1])  # type: ignore[method-assign]
        other = alone(Batch([sample], i, 3, 0), Randomness(0, 0, first=i, batch=3))
        assert torch.allclose(one.parts["agreement"][i], other.parts["agreement"][0], rtol=1e-3)


def test_agreement_below_a_timestep_that_does_not_exist_is_refused() -> None:
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1)
    objective(parts, agreement_below=1000, agreement_weight=1.0)
    with pytest.raises(ConfigurationError, match="at most 1000, not 1001"):
        objective(parts, agreement_below=1001, agreement_weight=1.0)


def test_without_low_noise_nothing_is_added() -> None:
    parts = tiny_transformer(0), tiny_text_encoder(num_layers=1, dropout_rate=0.0)
    one = objective(parts, agreement_below=1, agreement_weight=5.0, timesteps="uniform").train()
    loss = one(flat(0, 4), Randomness(0, 0))
    assert loss.parts["agreement"].isnan().all()
    assert torch.equal(loss.each, objective(parts, timesteps="uniform").train()(flat(0, 4), Randomness(0, 0)).each)
    loss.each.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())
