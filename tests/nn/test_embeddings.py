from __future__ import annotations

import math

import pytest
import torch

from impasto.nn.embeddings import apply_rotary, sincos_1d, sincos_2d, timestep_features


@pytest.mark.parametrize("t", [0.0, 1.0, 17.25, 999.0])
def test_timestep_features_by_the_formula(t: float) -> None:
    features = timestep_features(torch.tensor([t]), dim=8)[0]
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(t * w) for w in frequencies] + [math.sin(t * w) for w in frequencies]
    assert features.tolist() == pytest.approx(expected, abs=2e-4)  # float32 angles, up to 1000 radians


def test_timestep_features_stay_float32() -> None:
    """Integers and half precision are widened first: neighbours near 1000 differ."""
    assert timestep_features(torch.tensor([998, 999])).dtype == torch.float32
    features = timestep_features(torch.tensor([998, 999]))
    assert (features[0] - features[1]).abs().max() > 0.5
    assert timestep_features(torch.tensor([992.0], dtype=torch.bfloat16)).dtype == torch.float32


def test_positions_by_the_formula() -> None:
    features = sincos_1d(torch.tensor([0.0, 2.5], dtype=torch.float64), 4)
    assert features[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    expected = [math.sin(2.5), math.sin(0.025), math.cos(2.5), math.cos(0.025)]
    assert features[1].tolist() == pytest.approx(expected, abs=1e-12)


def test_grid_has_the_column_in_its_first_half_and_the_row_in_its_second() -> None:
    grid = sincos_2d(16, 3, 5, base_size=5, interpolation_scale=1, device=torch.device("cpu")).reshape(3, 5, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # the column's half is the same in every row
    assert torch.equal(grid[:, 0, 8:], grid[:, 4, 8:])
    assert not torch.equal(grid[:, 0, :8], grid[:, 4, :8])
    columns = sincos_1d(torch.arange(5, dtype=torch.float64), 8).float()
    assert torch.equal(grid[1, :, :8], columns)  # 5 columns over a base of 5: whole steps
    rows = sincos_1d(torch.arange(3, dtype=torch.float64) * 5 / 3, 8).float()
    assert torch.allclose(grid[:, 1, 8:], rows, atol=1e-7)  # 3 rows are stretched over the same extent


def test_interpolation_compresses_positions() -> None:
    device = torch.device("cpu")
    once = sincos_2d(16, 4, 4, base_size=8, interpolation_scale=1, device=device)
    twice = sincos_2d(16, 4, 4, base_size=16, interpolation_scale=2, device=device)
    assert torch.equal(once, twice)
    assert not torch.equal(once, sincos_2d(16, 4, 4, base_size=8, interpolation_scale=2, device=device))


def test_rotated_pairs_keep_float64() -> None:
    x, angles = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.complex(x[:, :2], x[:, 2:]) * torch.complex(cos[:, :2], sin[:, :2])
    torch.testing.assert_close(apply_rotary(x, cos, sin), torch.cat([pairs.real, pairs.imag], 1), rtol=0, atol=1e-14)
