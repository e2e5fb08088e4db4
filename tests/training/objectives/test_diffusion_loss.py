"""The training objective against textbook formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from impasto.errors import InputError
from impasto.schedulers.ddim import DDIMScheduler
from impasto.training.objectives.diffusion_loss import DiffusionLoss

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETAS).cumprod(0)
LN2 = math.log(2.0)


@pytest.fixture
def objective() -> DiffusionLoss:
    return DiffusionLoss(BETAS)


def posterior_variance(t: int) -> float:
    """β̃_t of DDPM eq. 7; at t = 0, where it is 0, that of t = 1."""
    t = max(t, 1)
    return float(BETAS[t] * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t]))


def sample(t: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, noise = torch.randn(batch, 4, 5, 6), torch.randn(batch, 4, 5, 6)
    steps = torch.full((batch,), t)
    return x0, noise, DiffusionLoss(BETAS).add_noise(x0, noise, steps), steps


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_add_noise_has_the_mean_and_variance_of_the_forward_process(objective: DiffusionLoss, t: int) -> None:
    x0 = torch.full((4, 1, 200, 200), 0.7)
    xt = objective.add_noise(x0, torch.randn_like(x0), torch.full((4,), t))
    alpha_bar = float(ALPHA_BAR[t])
    error = math.sqrt((1 - alpha_bar) / xt.numel())  # standard error of the mean
    assert float(xt.mean()) == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=5 * error + 1e-6)
    assert float(xt.var()) == pytest.approx(1 - alpha_bar, rel=0.02)


def test_add_noise_takes_a_timestep_for_each_image(objective: DiffusionLoss) -> None:
    x0, noise = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    both = objective.add_noise(x0, noise, torch.tensor([7, 900]))
    for i, t in enumerate([7, 900]):
        expected = ALPHA_BAR[t].sqrt() * x0[i].double() + (1 - ALPHA_BAR[t]).sqrt() * noise[i].double()
        torch.testing.assert_close(both[i].double(), expected, rtol=1e-6, atol=1e-6)


def test_mse_is_the_mean_over_each_image_and_there_is_no_bound_without_a_variance(objective: DiffusionLoss) -> None:
    x0, noise, xt, t = sample(300)
    prediction = noise + torch.tensor([0.0, 0.1, 2.0]).view(-1, 1, 1, 1)
    losses = objective(prediction, x0, noise, xt, t)
    torch.testing.assert_close(losses.mse, torch.tensor([0.0, 0.01, 4.0]))
    assert torch.equal(losses.variational_bound, torch.zeros(3))


def test_mse_does_not_look_at_the_variance_half(objective: DiffusionLoss) -> None:
    x0, noise, xt, t = sample(300)
    prediction = torch.randn_like(noise)
    alone = objective(prediction, x0, noise, xt, t)
    learned = objective(torch.cat([prediction, torch.randn_like(noise)], 1), x0, noise, xt, t)
    assert torch.equal(alone.mse, learned.mse)


@pytest.mark.parametrize("t", [1, 2, 30, 400, 999])
def test_bound_is_the_kl_divergence_of_the_two_normals_in_bits(objective: DiffusionLoss, t: int) -> None:
    x0, noise, xt, steps = sample(t)
    epsilon = noise + 0.5 * torch.randn_like(noise)
    interpolation = torch.rand_like(noise) * 3 - 1.5  # v beyond [0, 1] extrapolates
    bound = objective(torch.cat([epsilon, interpolation], 1), x0, noise, xt, steps).variational_bound

    beta, alpha_bar, previous = float(BETAS[t]), float(ALPHA_BAR[t]), float(ALPHA_BAR[t - 1])
    x0, xt, epsilon, interpolation = (x.double() for x in (x0, xt, epsilon, interpolation))
    true_mean = (math.sqrt(previous) * beta * x0 + math.sqrt(1 - beta) * (1 - previous) * xt) / (1 - alpha_bar)
    mean = (xt - beta / math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(1 - beta)  # DDPM eq. 11
    variance = posterior_variance(t)
    v = (interpolation + 1) / 2
    learned = (v * math.log(beta) + (1 - v) * math.log(variance)).exp()
    true = Normal(true_mean, torch.full_like(true_mean, math.sqrt(variance)))
    expected = kl_divergence(true, Normal(mean, learned.sqrt())).mean((1, 2, 3)) / LN2
    torch.testing.assert_close(bound.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mean", [-1.2, -1.0, -0.31, 0.004, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", [-1.0, 0.4, 1.0])
def test_likelihood_at_the_last_step_sums_to_one_over_the_values_of_a_pixel(
    objective: DiffusionLoss, mean: float, interpolation: float
) -> None:
    x0 = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)  # an image of one pixel for each value
    xt = torch.full_like(x0, mean * float(ALPHA_BAR[0].sqrt()))  # with ε = 0 the mean is x_t / √ᾱ_0
    output = torch.cat([torch.zeros_like(x0), torch.full_like(x0, interpolation)], 1)
    bits = objective(output, x0, torch.zeros_like(x0), xt, torch.zeros(256, dtype=torch.long)).variational_bound
    probability = (2.0 ** -bits.double()).flatten()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-5)

    v = (interpolation + 1) / 2
    scale = math.exp(0.5 * (v * math.log(BETAS[0]) + (1 - v) * math.log(posterior_variance(0))))
    value = min(max(round((mean + 1) * 127.5), 1), 254)  # the bin where the mean is, but not an open-ended one
    centre = torch.tensor(value / 127.5 - 1, dtype=torch.float64)
    normal = Normal(torch.tensor(mean, dtype=torch.float64), scale)
    expected = normal.cdf(centre + 1 / 255) - normal.cdf(centre - 1 / 255)
    assert float(probability[value]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("t", [0, 1, 500])
def test_no_gradient_of_the_bound_reaches_the_predicted_noise(objective: DiffusionLoss, t: int) -> None:
    x0, noise, xt, steps = sample(t)
    x0 = x0.clamp(-0.9, 0.9)
    output = torch.cat([noise + 0.1, torch.zeros_like(noise)], 1).requires_grad_()
    objective(output, x0, noise, xt, steps).variational_bound.sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad[:, :4], torch.zeros_like(noise))
    assert float(output.grad[:, 4:].abs().max()) > 0


@pytest.mark.parametrize("t", [1, 10, 100])
def test_the_posterior_variance_is_best_for_a_perfect_mean(objective: DiffusionLoss, t: int) -> None:
    x0, noise, xt, steps = sample(t)

    def bound(interpolation: float) -> float:
        output = torch.cat([noise, torch.full_like(noise, interpolation)], 1)
        return float(objective(output, x0, noise, xt, steps).variational_bound.mean())

    assert bound(-1.0) == pytest.approx(0.0, abs=1e-6)
    assert bound(-1.0) < bound(0.0) < bound(1.0)
    assert bound(-1.0) < bound(-2.0)


def test_a_larger_variance_is_better_for_a_mean_that_is_off(objective: DiffusionLoss) -> None:
    x0, noise, xt, steps = sample(1)
    small, large = (
        objective(torch.cat([noise + 1, torch.full_like(noise, v)], 1), x0, noise, xt, steps).variational_bound
        for v in (-1.0, 1.0)
    )
    assert bool((large < small).all())


def test_first_and_later_timesteps_mix_in_a_batch(objective: DiffusionLoss) -> None:
    t = torch.tensor([0, 1, 640])
    x0, noise = torch.rand(3, 2, 4, 4) * 1.8 - 0.9, torch.randn(3, 2, 4, 4)
    xt = objective.add_noise(x0, noise, t)
    output = torch.cat([noise, torch.randn(3, 2, 4, 4)], 1)
    together = objective(output, x0, noise, xt, t).variational_bound
    for i in range(3):
        one = slice(i, i + 1)
        alone = objective(output[one], x0[one], noise[one], xt[one], t[one]).variational_bound
        torch.testing.assert_close(together[one], alone)
    assert bool(together.isfinite().all())


def test_a_velocity_is_judged_as_the_noise_that_it_implies() -> None:
    x0, noise, xt, t = sample(600)
    alpha_bar = ALPHA_BAR[600].float()
    objective = DiffusionLoss(BETAS, "v_prediction")
    epsilon, interpolation = noise + 0.01 * torch.randn_like(noise), torch.rand_like(noise) * 2 - 1
    velocity = (epsilon - (1 - alpha_bar).sqrt() * xt) / alpha_bar.sqrt()  # from x_t and the noise
    losses = objective(torch.cat([velocity, interpolation], 1), x0, noise, xt, t)
    expected = DiffusionLoss(BETAS)(torch.cat([epsilon, interpolation], 1), x0, noise, xt, t)
    torch.testing.assert_close(losses.mse, expected.mse / alpha_bar, rtol=1e-3, atol=0)
    torch.testing.assert_close(losses.variational_bound, expected.variational_bound, rtol=1e-3, atol=1e-6)

    exact = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    assert float(objective(exact, x0, noise, xt, t).mse.max()) < 1e-10


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(InputError, match="prediction_type is 'sample'"):
        DiffusionLoss(BETAS, "sample")


# --- weights and masks ---


def test_min_snr_weighs_noise_and_velocity_so_that_x0_counts_the_same() -> None:
    """2303.09556: min(SNR, 5) is the weight of the error of x_0."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = (1 - betas.double()).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)
    target = snr.clamp(max=5.0)
    noise = DiffusionLoss(betas, "epsilon").weights("min-snr").double()
    velocity = DiffusionLoss(betas, "v_prediction").weights("min-snr").double()
    # ε' - ε = (α / σ) (x_0 - x_0'), and v' - v = (x_0 - x_0') / σ
    torch.testing.assert_close(noise * snr, target, rtol=1e-5, atol=0)
    torch.testing.assert_close(velocity / (1 - alpha_bar), target, rtol=1e-5, atol=0)
    assert torch.equal(DiffusionLoss(betas).weights("none"), torch.ones(1000))


def test_balanced_weights_count_noise_as_the_velocity_it_implies() -> None:
    velocity = DiffusionLoss(BETAS, "v_prediction").weights("balanced").double()
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    torch.testing.assert_close(velocity**4, snr.clamp(max=1.0), rtol=1e-5, atol=0)
    noise = DiffusionLoss(BETAS, "epsilon").weights("balanced").double() * ALPHA_BAR  # v' - v = (ε' - ε) / α
    common = slice(0, 500)  # further up, the weight of noise has its limit
    torch.testing.assert_close(noise[common] / noise[0], velocity[common] / velocity[0], rtol=1e-5, atol=0)


def test_a_masked_loss_is_the_mean_over_the_mask(objective: DiffusionLoss) -> None:
    x0, noise, xt, t = sample(300)
    torch.manual_seed(1)
    output = torch.randn(x0.shape[0], 2 * x0.shape[1], *x0.shape[2:])
    mask = torch.zeros(len(x0), 1, *x0.shape[2:])
    mask[:, :, :1] = 1.0
    masked = objective(output, x0, noise, xt, t, mask)
    other = output.clone()
    other[:, :, 1:] += 3.0
    for a, b in zip(masked, objective(other, x0, noise, xt, t, mask), strict=True):
        torch.testing.assert_close(a, b)
    channels = x0.shape[1]
    expected = (output[:, :channels, :1] - noise[:, :, :1]).square().flatten(1).mean(1)
    torch.testing.assert_close(masked.mse, expected)
    ones = objective(output, x0, noise, xt, t, torch.ones_like(mask))
    for a, b in zip(ones, objective(output, x0, noise, xt, t), strict=True):
        torch.testing.assert_close(a, b)
    empty = objective(output, x0, noise, xt, t, torch.zeros_like(mask))
    assert not empty.mse.any()


def test_no_epsilon_where_a_schedule_ends_in_pure_noise() -> None:
    betas = DDIMScheduler(rescale_betas_zero_snr=True).betas
    with pytest.raises(InputError, match="ends in pure noise"):
        DiffusionLoss(betas, "epsilon")
    for kind in ("min-snr", "balanced"):
        assert DiffusionLoss(betas, "v_prediction").weights(kind).isfinite().all()
