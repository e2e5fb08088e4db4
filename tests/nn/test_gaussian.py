from __future__ import annotations

import math

import pytest
import torch

from impasto.errors import InputError
from impasto.nn.gaussian import DiagonalGaussianDistribution


def distribution(batch: int = 3, deterministic: bool = False) -> DiagonalGaussianDistribution:
    parameters = torch.randn(batch, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    return DiagonalGaussianDistribution(parameters, deterministic)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sample_is_mean_plus_scaled_noise() -> None:
    d = distribution()
    noise = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(d.sample(seeded(5)[0]), d.mean + d.std * noise)


def test_each_image_with_its_own_generator_is_drawn_alone() -> None:
    d = distribution()
    together = d.sample(seeded(1, 2, 3))
    for index, seed in enumerate((1, 2, 3)):
        alone = DiagonalGaussianDistribution(d.parameters[index : index + 1]).sample(seeded(seed)[0])
        assert torch.equal(together[index : index + 1], alone)
    assert torch.equal(d.sample(seeded(4)), d.sample(seeded(4)[0]))  # a list of one is one draw over the batch


def test_too_few_generators() -> None:
    with pytest.raises(InputError, match="2 generators were given for 3 images"):
        distribution().sample(seeded(1, 2))


def test_moments_of_many_samples() -> None:
    d = DiagonalGaussianDistribution(torch.tensor([2.0, math.log(0.25)]).reshape(1, 2, 1, 1).expand(20_000, 2, 1, 1))
    samples = d.sample(seeded(0)[0])
    assert samples.mean().item() == pytest.approx(2.0, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, abs=0.02)


def test_log_variance_is_clamped() -> None:
    d = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -100.0, 100.0]).reshape(1, 4, 1, 1))
    assert d.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.allclose(d.std**2, d.var)


def test_deterministic_has_no_spread() -> None:
    d = distribution(deterministic=True)
    assert torch.equal(d.sample(), d.mean)
    assert d.kl().tolist() == d.nll(d.mean).tolist() == [0.0, 0.0, 0.0]
    assert d.var.abs().max() == d.std.abs().max() == 0


def test_kl_agrees_with_torch() -> None:
    p = distribution()
    q = DiagonalGaussianDistribution(torch.randn(3, 8, 4, 6, generator=torch.Generator().manual_seed(9)))
    normal = [torch.distributions.Normal(d.mean.double(), d.std.double()) for d in (p, q)]
    unit = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(p.kl(q).double(), kl(*normal).sum((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(p.kl().double(), kl(normal[0], unit).sum((1, 2, 3)), rtol=1e-5, atol=0)
    assert p.kl(p).abs().max() < 1e-4


def test_nll_agrees_with_torch() -> None:
    d = distribution()
    x = torch.randn(3, 4, 4, 6)
    exact = -torch.distributions.Normal(d.mean.double(), d.std.double()).log_prob(x.double())
    torch.testing.assert_close(d.nll(x).double(), exact.sum((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(d.nll(x, dims=[1]).double(), exact.sum(1), rtol=1e-4, atol=1e-4)
