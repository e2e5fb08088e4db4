"""Every path of the seam against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from impasto.nn import attention as seam
from impasto.nn.attention import attention, attention_by_image, attention_formula
from impasto.nn.backends import training
from impasto.nn.tokens import Layout

Tensors = tuple[Tensor, Tensor, Tensor]


def tensors(batch: int = 2, heads: int = 3, n: int = 5, m: int = 7, size: int = 12, **options: object) -> Tensors:
    return tuple(torch.randn(batch, heads, length, size, **options) for length in (n, m, m))


def bias_of(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    if kind == "by key":
        bias = torch.zeros(2, 1, 1, 7)
        bias[0, ..., 4:] = -torch.inf
        return bias
    if kind == "soft":
        return torch.randn(2, 1, 1, 7)
    if kind == "by query and key":
        return torch.randn(2, 3, 5, 7).masked_fill(torch.rand(2, 3, 5, 7) > 0.8, -torch.inf)
    assert kind == "an empty row"
    bias = torch.zeros(2, 1, 1, 7)
    bias[1] = -torch.inf
    return bias


KINDS = [None, "by key", "soft", "by query and key", "an empty row"]


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_float32_agrees_with_the_formula(kind: str | None, scale: float | None, training: bool) -> None:
    query, key, value = tensors(requires_grad=training)
    bias = bias_of(kind)
    out = attention(query, key, value, bias, scale)
    exact = attention_formula(query, key, value, bias, scale)
    assert out.dtype == torch.float32
    assert distance(out, exact) <= 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "an empty row"])  # there the formula has none
def test_gradients_agree_with_the_formula(kind: str | None) -> None:
    inputs = tensors(requires_grad=True)
    bias = bias_of(kind)
    weights = torch.randn(2, 3, 5, 12)

    def gradients(function: Callable[..., Tensor]) -> Tensors:
        return torch.autograd.grad((function(*inputs, bias) * weights).sum(), inputs)

    for ours, exact in zip(gradients(attention), gradients(attention_formula)):
        assert ours.isfinite().all()
        assert distance(ours, exact) <= 1e-5


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_gives_zeros_and_finite_gradients(training: bool, dtype: torch.dtype) -> None:
    query, key, value = tensors(requires_grad=training, dtype=dtype)
    out = attention(query, key, value, bias_of("an empty row"))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().min() > 0
    if training:
        out.sum().backward()
        for x in (query, key, value):
            assert x.grad is not None
            assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
        assert value.grad is not None
        assert value.grad[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bfloat16_is_as_near_as_its_rounding_allows(kind: str | None, training: bool) -> None:
    query, key, value = tensors(batch=2, dtype=torch.bfloat16, requires_grad=training)
    bias = bias_of(kind)
    out = attention(query, key, value, bias)  # the bias may have another dtype
    assert out.dtype == torch.bfloat16
    assert distance(out, attention_formula(query, key, value, bias)) <= 2**-8 * 2


def test_half_precision_biases_may_be_the_lowest_number() -> None:
    """-65504 in float16 discards like -inf, without overflowing to NaN in a sum."""
    query, key, value = tensors(requires_grad=True)
    lowest = torch.zeros(2, 1, 1, 7, dtype=torch.float16)
    lowest[0, ..., 4:] = torch.finfo(torch.float16).min
    exact = attention_formula(query, key, value, bias_of("by key"))
    assert distance(attention(query, key, value, lowest), exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_the_cpu_with_few_keys_takes_the_plain_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only that: inference, and more scores than memory is meant for, do not."""
    calls: list[int] = []
    products = seam.products
    monkeypatch.setattr(seam, "products", lambda *a: calls.append(1) or products(*a))
    query, key, value = tensors(requires_grad=True, dtype=dtype)
    attention(query, key, value)
    assert len(calls) == 1
    with torch.no_grad():
        attention(query, key, value)
    attention(query.detach(), key.detach(), value.detach())
    monkeypatch.setattr(seam, "_MAX_SCORES_STORED", 2 * 3 * 5 * 7 - 1)
    attention(query, key, value)
    assert len(calls) == 1


@pytest.mark.parametrize("at_once", [1, 2 * 5 * 70, 2**21])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_training_with_many_keys_stores_no_scores(
    at_once: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SCORES_AT_ONCE", at_once)
    query, key, value = tensors(m=70, dtype=torch.bfloat16, requires_grad=True)
    stored: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = attention(query, key, value, None, scale)
    assert max(stored) == key.numel()
    assert distance(out, attention_formula(query, key, value, None, scale)) <= 2**-7
    weight = torch.randn(out.shape)
    gradients = torch.autograd.grad((out * weight).sum(), (query, key, value))
    exact = tuple(x.detach().double().requires_grad_() for x in (query, key, value))
    expected = torch.autograd.grad((attention_formula(*exact, None, scale) * weight).sum(), exact)
    for found, right in zip(gradients, expected):
        assert distance(found, right) <= 2**-6


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_NARROW", (torch.float64,))
    inputs = tensors(batch=1, heads=2, n=3, m=70, size=4, dtype=torch.float64, requires_grad=True)

    def penalty(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    for found, right in zip(penalty(attention), penalty(attention_formula)):
        assert distance(found, right) <= 1e-6  # the softmax is float32's


def test_low_precision_takes_tiles_where_the_processor_has_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tiled = seam.tiled_attention
    monkeypatch.setattr(seam, "tiled_attention", lambda *a: calls.append(1) or tiled(*a))
    monkeypatch.setattr(seam, "processor_has", lambda _: False)
    query, key, value = tensors(n=300, m=300, dtype=torch.bfloat16)
    attention(query, key, value)
    assert len(calls) == 1
    attention(query, key[:, :, :64], value[:, :, :64])  # few keys
    attention(query[..., :32], key[:, :, :256, :32], value[:, :, :256, :32])  # few channels
    attention(query, key, value, torch.zeros(300, 300))
    attention(query.float(), key.float(), value.float())
    monkeypatch.setattr(seam, "processor_has", lambda feature: feature == "amx_tile")
    attention(query, key, value)
    assert len(calls) == 1


@pytest.mark.parametrize("learns", range(3))
def test_gradients_in_low_precision_whichever_of_the_three_learns(learns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_MAX_SCORES_STORED", 0)
    inputs = tensors(n=600, m=600, dtype=torch.bfloat16)
    inputs[learns].requires_grad_()
    attention(*inputs).sum().backward()
    assert inputs[learns].grad is not None


def test_without_keys_or_queries() -> None:
    for n, m in ((5, 0), (0, 5)):
        query, key, value = tensors(n=n, m=m, dtype=torch.bfloat16)
        with torch.no_grad():
            out = attention(query, key, value)
        assert out.shape == query.shape
        assert not out.any()


def test_the_formula_is_softmax_of_products_times_values() -> None:
    """By hand: scores 0 and log 3 weigh 1/4 and 3/4."""
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([1.0, 3.0]).log().reshape(1, 1, 2, 1)
    value = torch.tensor([[4.0], [8.0]]).reshape(1, 1, 2, 1)
    assert attention_formula(query, key, value).item() == pytest.approx(7.0)
    assert attention(query, key, value).item() == pytest.approx(7.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [72, 128])
@torch.no_grad()
def test_images_of_several_sizes_on_a_gpu(size: int, dtype: torch.dtype) -> None:
    lengths, cuda = (15, 960, 7, 256), torch.device("cuda")
    layout = Layout.of(lengths, cuda)
    qkv = torch.randn(3, sum(lengths), 4, size, device=cuda, dtype=dtype)
    together = layout.split(attention_by_image(*qkv, layout))
    for i, length in enumerate(lengths):
        own = [layout.split(x)[i] for x in qkv]
        exact = attention_formula(*(x.transpose(0, 1)[None] for x in own))[0].transpose(0, 1)
        assert distance(together[i], exact) <= (1e-5 if dtype == torch.float32 else 5e-3)
        if dtype != torch.float32:  # whatever else is in the batch
            assert torch.equal(together[i], attention_by_image(*own, Layout.of((length,), cuda)))
