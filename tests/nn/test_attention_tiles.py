"""The CPU's tiles against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from impasto.nn.attention import attention_formula
from impasto.nn.backends import tiles
from impasto.nn.machine import has_onednn_products

needs_epilogues = pytest.mark.skipif(
    not has_onednn_products(torch.bfloat16), reason="the processor has no bfloat16 products"
)


def tensors(batch: int, heads: int, n: int, m: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Strided, as projections leave them."""
    qkv = torch.randn(batch, n + 2 * m, heads, size).transpose(1, 2)
    return tuple(x.bfloat16() for x in qkv.split([n, m, m], dim=2))


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (1, 2, 70, 33), (2, 5, 8, 600)], ids=str)
@pytest.mark.parametrize("tile", [1, 700, 5000, 2**21])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_tiles_of_any_size_agree_with_the_formula(
    shape: tuple[int, int, int, int], tile: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_TILE_SCORES", tile)
    monkeypatch.setattr(tiles, "_LEAST_ROWS", 7)
    query, key, value = tensors(*shape, 24)
    exact = attention_formula(query, key, value, None, scale)
    assert distance(tiles.tiled_attention(query, key, value, scale), exact) <= 2**-7
    # In float32 nothing but the order of sums is different.
    assert distance(tiles.tiled_attention(query.float(), key.float(), value.float(), scale), exact) <= 1e-6


def test_tiles_survive_products_that_overflow_float16() -> None:
    query, key, value = (x.half() for x in tensors(2, 3, 40, 40, 32))
    query, key = 200 * query, 200 * key
    assert not (query @ key.transpose(2, 3)).isfinite().all()
    assert tiles.tiled_attention(query, key, value, 1e-4).isfinite().all()


@needs_epilogues
@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (1, 2, 70, 33), (2, 5, 8, 600)], ids=str)
@pytest.mark.parametrize("tile", [1, 700, 2**21])
@pytest.mark.parametrize("scale", [0.2, 3.0])
@torch.no_grad()
def test_exponentials_of_the_epilogue_agree_with_the_formula(
    shape: tuple[int, int, int, int], tile: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large scores too: the weights are rounded, not the scores."""
    monkeypatch.setattr(tiles, "_TILE_SCORES", tile)
    monkeypatch.setattr(tiles, "_LEAST_ROWS", 7)
    query, key, value = tensors(*shape, 24)
    query, key = query / 2, key / 2
    out, exact = tiles._sigmoid_tiles(query, key, value, scale)
    assert exact
    assert distance(out, attention_formula(query, key, value, None, scale)) <= 2**-7
    assert out.transpose(1, 2).is_contiguous()


@needs_epilogues
@torch.no_grad()
def test_a_score_far_above_those_that_were_sampled_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the sigmoid is no exponential: the rounded scores' softmax is taken, where nothing saturates."""
    query, key, value = tensors(1, 2, 512, 600, 24)
    query = query.abs()
    key[0, 1, 7] = 30.0  # not among those that are looked at
    out, exact = tiles._sigmoid_tiles(query, key, value, 1.0)
    assert not exact
    formula = attention_formula(query, key, value, None, 1.0)
    assert distance(tiles.tiled_attention(query, key, value, 1.0), formula) <= 2**-7
    assert distance(out[:, :1], formula[:, :1]) <= 2**-7  # the other head is right

    calls: list[int] = []
    softmax = tiles._softmax_tiles
    monkeypatch.setattr(tiles, "_softmax_tiles", lambda *a: calls.append(1) or softmax(*a))
    tiles.tiled_attention(query, key, value, 1.0)
    assert len(calls) == 1
    tiles.tiled_attention(query, query, query, 1e-3)
    assert len(calls) == 1
    tiles.tiled_attention(query[:, :, :100], key, value, 1.0)  # short ones are not worth it
    assert len(calls) == 2


@needs_epilogues
@torch.no_grad()
def test_scores_so_large_that_their_peak_is_rounded_away_are_noticed() -> None:
    query, key, value = torch.zeros(1, 1, 512, 8), torch.zeros(1, 1, 32, 8), torch.randn(1, 1, 32, 8)
    query[..., 0], query[..., 1], key[..., 0], key[..., 1] = 64.0, 4.0, 128.0, 8.75  # 8227: a multiple of 64 and 35
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    assert not tiles._sigmoid_tiles(query, key, value, 1.0)[1]
    exact = attention_formula(query, key, value, None, 1.0)
    assert distance(tiles.tiled_attention(query, key, value, 1.0), exact) <= 2**-7


@needs_epilogues
@torch.no_grad()
def test_not_a_number_stays_one() -> None:
    query, key, value = tensors(1, 1, 512, 64, 8)
    query[0, 0, 3] = torch.nan
    out = tiles.tiled_attention(query, key, value, None)
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, 4:].isfinite().all()
