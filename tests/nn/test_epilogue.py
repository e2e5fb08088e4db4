"""A linear layer with gelu in one product, against the two by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.nn import epilogue
from impasto.nn.cpu import processor_has
from impasto.nn.epilogue import linear_gelu


def parts(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(48, 96, bias=bias).to(dtype), torch.randn(2, 5, 48).to(dtype)


def exact(layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.gelu(F.linear(x.double(), layer.weight.double(), bias), approximate=approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-14)])
def test_it_is_gelu_of_the_linear_layer(dtype: torch.dtype, bound: float, bias: bool, approximate: str) -> None:
    layer, x = parts(dtype, bias)
    with torch.no_grad():
        found = linear_gelu(layer, x, approximate)
    assert found.shape == (2, 5, 96)
    assert found.dtype == dtype
    expected = exact(layer, x, approximate)
    assert ((found - expected).norm() / expected.norm()).item() <= bound


def test_gradients_flow() -> None:
    layer, x = parts(torch.bfloat16)
    linear_gelu(layer, x, "tanh").sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_layers_that_someone_changed_or_watches_are_called() -> None:
    layer, x = parts(torch.bfloat16)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))

    class Zero(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(*x.shape[:-1], self.out_features)

    with torch.no_grad():
        linear_gelu(layer, x, "tanh")
        assert calls == [1]
        assert float(linear_gelu(Zero(48, 96), x, "tanh").abs().max()) == 0


@pytest.mark.skipif(not processor_has("avx512_bf16"), reason="needs AVX-512 with bfloat16")
def test_the_epilogue_is_used_and_rounds_once_less(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = parts(torch.bfloat16)
    expected = exact(layer, x, "tanh")
    with torch.no_grad():
        fused = linear_gelu(layer, x, "tanh")
        monkeypatch.setattr(epilogue, "_has_epilogue", lambda *_: False)
        apart = linear_gelu(layer, x, "tanh")
    assert not torch.equal(fused, apart)
    assert (fused - expected).norm() < (apart - expected).norm()
