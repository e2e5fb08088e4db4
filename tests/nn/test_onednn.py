"""A linear layer with gelu in one product, against the two by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.nn.backends import onednn
from impasto.nn.backends.onednn import linear_gelu
from impasto.nn.layers import FeedForward
from impasto.nn.machine import has_onednn_products
from impasto.nn.precision import in_float32

needs_products = pytest.mark.skipif(
    not has_onednn_products(torch.bfloat16), reason="the processor has no bfloat16 products"
)


def layer_and_input(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(48, 96, bias=bias).to(dtype), torch.randn(2, 5, 48).to(dtype)


def exact(layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.gelu(F.linear(x.double(), layer.weight.double(), bias), approximate=approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epilogue", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float64, 1e-14)])
def test_it_is_gelu_of_the_linear_layer(
    dtype: torch.dtype, bound: float, epilogue: bool, bias: bool, approximate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "has_epilogues", lambda _: epilogue)
    layer, x = layer_and_input(dtype, bias)
    with torch.no_grad():
        found = linear_gelu(layer, x, approximate)
    assert found.shape == (2, 5, 96)
    assert found.dtype == dtype
    expected = exact(layer, x, approximate)
    assert ((found - expected).norm() / expected.norm()).item() <= bound


def test_gradients_flow() -> None:
    layer, x = layer_and_input(torch.bfloat16)
    linear_gelu(layer, x, "tanh").sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_layers_that_someone_changed_or_observes_are_called() -> None:
    layer, x = layer_and_input(torch.bfloat16)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))

    class Zero(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(*x.shape[:-1], self.out_features)

    with torch.no_grad():
        linear_gelu(layer, x, "tanh")
        assert calls == [1]
        assert float(linear_gelu(Zero(48, 96), x, "tanh").abs().max()) == 0


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every product of oneDNN from here on."""
    dtypes: list[torch.dtype] = []
    product = onednn._product
    monkeypatch.setattr(onednn, "_product", lambda *a, **k: dtypes.append(a[2].dtype) or product(*a, **k))
    return dtypes


def test_float32_is_multiplied_by_onednn_where_the_machine_says_so(
    products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_and_input(torch.float32)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(onednn, "has_onednn_products", lambda dtype: dtype == torch.float32)
        torch.testing.assert_close(onednn.linear(layer, x), expected)
        assert products == [torch.float32]
        onednn.linear(layer.double(), x.double())
        monkeypatch.setattr(onednn, "has_onednn_products", lambda _: False)
        onednn.linear(layer.float(), x)
    assert products == [torch.float32]


@torch.no_grad()
def test_16_bit_weights_are_widened_for_the_same_products(products: list[torch.dtype]) -> None:
    """In the mode of ``nn/precision.py``: bit for bit the float32 layer of the same numbers."""
    layer, x = layer_and_input(torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    with in_float32():
        found = linear_gelu(layer, x.float(), "tanh")
    assert torch.equal(found, linear_gelu(wide, x.float(), "tanh"))
    assert len(products) == 2 * has_onednn_products(torch.float32)
    assert layer.weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear_gelu(layer, x.float(), "tanh")  # elsewhere it is as if the layer were called


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_traced_graphs_hold_the_plain_layer() -> None:
    graph = str(torch.jit.trace(FeedForward(48).eval(), (torch.randn(2, 5, 48),)).inlined_graph)
    assert "aten::linear" in graph
    assert "mkldnn" not in graph


@torch.no_grad()
def test_float32_is_never_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take as much memory again."""
    monkeypatch.setattr(onednn, "_pack", lambda *_: pytest.fail("packed"))
    monkeypatch.setattr(onednn, "PACKING_PAYS", 1)
    layer, x = layer_and_input(torch.float32)
    torch.testing.assert_close(onednn.product(layer, 10)(x), layer(x))
    torch.testing.assert_close(onednn.joined_product([layer, layer], 10)(x), torch.cat([layer(x)] * 2, dim=-1))


@needs_products
def test_the_epilogue_is_used_and_rounds_once_less(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input(torch.bfloat16)
    expected = exact(layer, x, "tanh")
    with torch.no_grad():
        fused = linear_gelu(layer, x, "tanh")
        monkeypatch.setattr(onednn, "multiplies", lambda *_: False)
        apart = linear_gelu(layer, x, "tanh")
    assert not torch.equal(fused, apart)
    assert (fused - expected).norm() < (apart - expected).norm()


@needs_products
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_packed_for_a_call_changes_no_bit(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input(torch.bfloat16, bias)
    monkeypatch.setattr(onednn, "PACKING_PAYS", 10)
    with torch.no_grad():
        assert torch.equal(onednn.product(layer, 10, "tanh")(x), linear_gelu(layer, x, "tanh"))
        plain = onednn.product(layer, 9)(x)
        assert torch.equal(onednn.product(layer, 10)(x), plain)
        torch.testing.assert_close(plain, layer(x))


@needs_products
def test_a_feed_forward_packs_for_many_tokens_and_what_is_observed_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = FeedForward(32).to(torch.bfloat16).eval()
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16)
    packed: list[int] = []
    pack = onednn._pack
    monkeypatch.setattr(onednn, "_pack", lambda weight, rows: packed.append(rows) or pack(weight, rows))
    with torch.no_grad():
        expected = layer(x)
        assert packed == []
        monkeypatch.setattr(onednn, "PACKING_PAYS", 80)
        assert torch.equal(layer(x), expected)
        assert packed == [80, 80]
        layer.net[2].weight.data.zero_()
        assert torch.equal(layer(x), layer.net[2].bias.expand_as(x))  # nothing was kept
        calls: list[int] = []
        for module in layer.net:
            handle = module.register_forward_hook(lambda *_: calls.append(1))
            layer(x)
            handle.remove()
    assert calls == [1, 1, 1]
