"""The parametrizations of the diffusion process: they invert each other, and the posterior is Bayes' rule."""

from __future__ import annotations

import pytest
import torch

from impasto.schedulers import process

KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction"]
LEVELS = {"betas": (0.8, 0.6), "straight": (0.75, 0.25)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", LEVELS)
def test_the_target_implies_the_original_and_the_noise(kind: str, path: str) -> None:
    if (kind, path) in [("flow_prediction", "betas"), ("v_prediction", "straight")]:
        pytest.skip("defined on the other path")
    alpha, sigma = LEVELS[path]
    original, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sample = process.add_noise(original, noise, alpha, sigma)
    target = process.prediction_target(kind, original, noise, alpha, sigma)
    torch.testing.assert_close(process.predicted_original(kind, target, sample, alpha, sigma), original)
    if kind != "flow_prediction":
        torch.testing.assert_close(process.predicted_noise(kind, target, sample, alpha, sigma), noise)


def test_the_posterior_is_the_product_of_prior_and_likelihood() -> None:
    bar, previous = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    alpha = bar / previous
    # x_{t-1} | x_0 ~ N(sqrt(previous) x_0, 1 - previous); x_t | x_{t-1} ~ N(sqrt(alpha) x_{t-1}, 1 - alpha)
    precision = 1 / (1 - previous) + alpha / (1 - alpha)
    q = process.posterior(bar, previous)
    torch.testing.assert_close(q.variance, 1 / precision)
    torch.testing.assert_close(q.on_original, previous.sqrt() / (1 - previous) / precision)
    torch.testing.assert_close(q.on_sample, alpha.sqrt() / (1 - alpha) / precision)
    torch.testing.assert_close(q.beta, 1 - alpha)
