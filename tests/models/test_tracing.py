"""torch.jit.trace, torch.export and ONNX of every model, with masks, and on batches of another size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.pixart.model import PixArtTransformer2DModel

pytestmark = pytest.mark.long

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def pixart() -> tuple[nn.Module, dict[str, Tensor]]:
    model = PixArtTransformer2DModel(
        2, 12, num_layers=1, cross_attention_dim=24, caption_channels=10, sample_size=8, use_additional_conditions=False
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "timestep": torch.tensor([7, 700]),
        "attention_mask": torch.rand(2, 16) > 0.3,
        "encoder_attention_mask": MASK,
    }


def glm_image() -> tuple[nn.Module, dict[str, Tensor]]:
    model = GlmImageTransformer2DModel(2, 16, 16, 1, 8, 3, 10, 12, 4, 30)
    return model, {
        "hidden_states": torch.randn(2, 16, 8, 6),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "prior_token_id": torch.randint(30, (2, 12)),
        "prior_token_drop": torch.rand(2, 12) > 0.5,
        "timestep": torch.tensor([7, 700]),
        "target_size": torch.tensor([[128.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "attention_mask": MASK,
    }


def autoencoder() -> tuple[nn.Module, dict[str, Tensor]]:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**blocks, block_out_channels=[8, 16], norm_num_groups=4), {"sample": torch.randn(2, 3, 16, 16)}


class Positional(nn.Module):
    """A model that takes and returns tensors, as scripts that export wrap it."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]


def check(exported: Any, model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    three = tuple(torch.cat([x, x[:1]]) for x in inputs)
    for values in (inputs, three):
        expected = model(*values)
        assert (exported(*values) - expected).norm() <= tolerance * expected.norm()


@pytest.fixture(params=[pixart, glm_image, autoencoder])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = request.param()
    return Positional(model.eval(), list(inputs)), tuple(inputs.values())


Case = tuple[nn.Module, tuple[Tensor, ...]]


@torch.no_grad()
def test_jit_trace(case: Case) -> None:
    model, inputs = case
    check(torch.jit.trace(model, inputs, check_trace=False), model, inputs)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(case: Case, strict: bool) -> None:
    model, inputs = case
    shapes = (tuple({0: torch.export.Dim("batch", min=2, max=64)} for _ in inputs),)
    check(torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict).module(), model, inputs)


@torch.no_grad()
def test_onnx(case: Case) -> None:
    pytest.importorskip("onnxscript")
    model, inputs = case
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    expected = model(*inputs)
    assert (program.call_reference(*inputs)[0] - expected).norm() <= 1e-4 * expected.norm()
