from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import ConfigurationError
from impasto.nn import layers
from impasto.nn.layers import ACTIVATIONS, FeedForward, PatchConvolution, TwoLayerMLP, modulate, unpatchify


def test_modulate_scales_around_one_and_shifts() -> None:
    x = torch.tensor([[1.0, -2.0]])
    assert modulate(x, torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).tolist() == [[2.5, -1.5]]
    assert torch.equal(modulate(x, torch.zeros(1, 2), torch.zeros(1, 2)), x)


@pytest.mark.parametrize(("patch", "height", "width", "channels"), [(2, 3, 5, 4), (1, 2, 2, 3), (4, 1, 2, 8)])
def test_unpatchify_puts_every_number_in_its_place(patch: int, height: int, width: int, channels: int) -> None:
    picture = torch.arange(2 * channels * height * patch * width * patch).reshape(2, channels, height * patch, -1)
    tokens = torch.empty(2, height * width, patch * patch * channels, dtype=picture.dtype)
    for row in range(height):
        for column in range(width):
            cell = picture[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens[:, row * width + column] = cell.permute(0, 2, 3, 1).flatten(1)  # channels vary fastest
    assert torch.equal(unpatchify(tokens, height, width, patch), picture)


VALUES = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu-approximate": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "geglu-approximate": lambda x: x / (1 + math.exp(-1.702 * x)),
    "linear-silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize(("patch", "height", "width"), [(1, 3, 5), (2, 4, 6), (4, 8, 4)])
def test_a_product_of_patches_and_kernels_is_their_convolution(patch: int, height: int, width: int) -> None:
    layer = PatchConvolution(3, 7, kernel_size=patch, stride=patch).double()
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = nn.Conv2d.forward(layer, image)
    torch.testing.assert_close(layer(image), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("x", [-3.0, -0.5, 0.0, 1.7])
def test_plain_activations(name: str, x: float) -> None:
    function, gates = ACTIVATIONS[name]
    assert not gates
    assert function(torch.tensor([x])).item() == pytest.approx(VALUES[name](x), abs=1e-6)


@pytest.mark.parametrize(("name", "plain"), [("geglu", "gelu"), ("swiglu", "linear-silu")])
def test_gated_activations_multiply_by_the_activated_second_half(name: str, plain: str) -> None:
    function, gates = ACTIVATIONS[name]
    assert gates
    assert function(torch.tensor([2.0, 3.0, 0.5, -1.0])).tolist() == pytest.approx(
        [2.0 * VALUES[plain](0.5), 3.0 * VALUES[plain](-1.0)], abs=1e-6
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_is_four_times_as_wide_inside(name: str) -> None:
    layer = FeedForward(6, name)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    inside = 48 if ACTIVATIONS[name][1] else 24
    assert shapes == {
        "net.0.proj.weight": (inside, 6),
        "net.0.proj.bias": (inside,),
        "net.2.weight": (6, 24),
        "net.2.bias": (6,),
    }
    assert layer(torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_feed_forward_drops_out_only_in_training() -> None:
    layer = FeedForward(6, dropout=0.5)
    x = torch.randn(2, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_unknown_activation_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match="activation_fn 'mish' is unknown; use one of gelu, gelu-approximate"):
        FeedForward(6, "mish")


def test_two_layer_mlp_is_linear_silu_linear() -> None:
    mlp = TwoLayerMLP(4, 6)
    x = torch.randn(3, 4)
    expected = mlp.linear_2(nn.SiLU()(mlp.linear_1(x)))
    assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
def test_feed_forward_takes_tokens_in_parts_that_stay_in_cache(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = FeedForward(6, activation)
    x = torch.randn(2, 7, 6)
    whole = layer(x)
    monkeypatch.setattr(layers, "_BYTES_AT_ONCE", 5 * x.element_size())
    lengths: list[int] = []

    class Recording(nn.Sequential):  # a hook would get all tokens at once
        def forward(self, x: Tensor) -> Tensor:
            lengths.append(x.shape[-2])
            return super().forward(x)

    layer.net.__class__ = Recording
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    assert lengths == [5, 5, 4]
    layer.net.__class__ = nn.Sequential
    layer.net.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[-2]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    assert lengths == [5, 5, 4, 7]
