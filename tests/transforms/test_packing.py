"""pack_weights: the same to the bit, and a packed copy is used only as long as it is the weight."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from impasto import PixArtTransformer2DModel, pack_weights
from impasto.errors import ConfigurationError, InputError, ResourceError
from impasto.nn.backends import onednn
from impasto.nn.machine import has_onednn_products
from impasto.transforms import packing

pytestmark = pytest.mark.skipif(not has_onednn_products(torch.bfloat16), reason="no native products of bfloat16")


def small() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    model = PixArtTransformer2DModel(**small, cross_attention_dim=32, caption_channels=24)
    return model.to(torch.bfloat16).eval()


@pytest.fixture
def model() -> PixArtTransformer2DModel:
    return small()


def predict(model: nn.Module, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, side, side, generator=generator).to(torch.bfloat16)
    text = torch.randn(2, 5, 24, generator=generator).to(torch.bfloat16)
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.inference_mode():
        return model(latents, text, torch.tensor([5, 5]), conditions, return_dict=False)[0]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every weight that is packed from here on."""
    weights: list[Tensor] = []
    pack = onednn._pack

    def counted(weight: Tensor, rows: int) -> Tensor:
        weights.append(weight)
        return pack(weight, rows)

    monkeypatch.setattr(onednn, "_pack", counted)
    return weights


def test_each_weight_is_packed_once_and_the_result_is_the_same(
    model: PixArtTransformer2DModel, packed: list[Tensor]
) -> None:
    expected, larger = predict(model), predict(model, 16)
    handle = pack_weights(model)
    for _ in range(3):
        assert torch.equal(predict(model), expected)
    assert len(packed) == 2 * 6  # query, key, value, output, and two of the feed-forward, in each block
    assert torch.equal(predict(model, 16), larger)
    assert len(packed) == 2 * 6
    handle.remove()
    assert torch.equal(predict(model), expected)
    assert len(onednn.KEPT) == 0


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def _train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def _replace(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _replace_and_keep(model: nn.Module) -> None:
    model.old = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]  # type: ignore[assignment]
    _replace(model)


def _assign_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def _cast_and_back(model: nn.Module) -> None:
    model.float()
    _train(model)
    model.to(torch.bfloat16)


def _hook(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [_load, _train, _replace, _replace_and_keep, _assign_data, _cast_and_back, _hook])
def test_what_changes_weights_is_noticed(model: PixArtTransformer2DModel, change: Callable[[nn.Module], None]) -> None:
    with pack_weights(model):
        before = predict(model)
        change(model)
        found = predict(model)
    assert not torch.allclose(found, before, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found, predict(model), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("offset", [0, 1])
def test_what_writes_through_data_is_noticed_by_a_check(model: PixArtTransformer2DModel, offset: int) -> None:
    layer = model.transformer_blocks[1].ff.net[2]
    layer.weight.data = torch.cat([torch.zeros(offset, dtype=torch.bfloat16), layer.weight.detach().flatten()])[
        offset:
    ].view_as(layer.weight)  # files may hold weights at odd places
    handle = pack_weights(model)
    before = predict(model)
    for change in (lambda weight: weight[3, 3].add_(50), lambda weight: weight.copy_(weight.flip(0))):
        change(layer.weight.data)
        assert torch.equal(predict(model), before)  # no trace but the numbers
        handle.check()
        found = predict(model)
        assert not torch.equal(found, before)
        before = found
    handle.remove()
    assert torch.equal(predict(model), before)


def test_gradients_autocast_and_other_dtypes_take_the_plain_weights(
    model: PixArtTransformer2DModel, packed: list[Tensor]
) -> None:
    layer = model.transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    with pack_weights(model):
        onednn.linear(layer, x).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            onednn.linear(layer, x)
        with torch.no_grad():
            onednn.linear(layer.float(), x.float())
    assert packed == []


def test_copies_are_plain(model: PixArtTransformer2DModel, packed: list[Tensor]) -> None:
    with pack_weights(model):
        predict(model)
        twin = copy.deepcopy(model)
        packed.clear()
        predict(twin)
    assert packed == []


def test_nothing_outlives_its_layer() -> None:
    model = small()
    handle = pack_weights(model)
    predict(model)
    assert len(onednn.KEPT) > 0
    del model
    gc.collect()
    assert len(onednn.KEPT) == 0
    handle.remove()


def test_weights_that_have_gone_elsewhere_are_not_kept(model: PixArtTransformer2DModel) -> None:
    with pack_weights(model) as handle:
        predict(model)
        layer = model.transformer_blocks[0].attn1.to_q
        model.to("meta")
        handle.check()
        assert onednn.KEPT[layer]._packed is None


def test_dropout_that_drops_is_not_left_out(model: PixArtTransformer2DModel) -> None:
    block = model.transformer_blocks[0]
    expected = predict(model)
    for dropout in (block.attn1.to_out[1], block.ff.net[1]):
        dropout.p = 0.9
        dropout.train()
        assert not torch.equal(predict(model), expected)
        dropout.eval()
        assert torch.equal(predict(model), expected)
    block.ff.net[1] = nn.Sigmoid()
    assert not torch.equal(predict(model), expected)


def test_what_cannot_be_packed_is_refused(model: PixArtTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"pipe\.transformer"):
        pack_weights("transformer")  # type: ignore[arg-type]
    with pack_weights(model), pytest.raises(ConfigurationError, match="packed already"):
        pack_weights(model)
    monkeypatch.setattr(packing, "has_onednn_products", lambda _: False)
    with pytest.raises(ResourceError, match="AVX-512"):
        pack_weights(model)
