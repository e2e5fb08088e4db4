"""PixArtTransformer2DModel against the diffusers class, in float32, on configurations that cover every option."""

from __future__ import annotations

import diffusers
import pytest
import torch

from impasto.models.pixart.model import PixArtTransformer2DModel

BASE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "caption_channels": 20,
    "sample_size": 8,
    "use_additional_conditions": False,
}

OPTIONS = {
    "base": {},
    "no learned sigma": {"out_channels": None},
    "sixteen channels": {"in_channels": 16, "out_channels": 16},
    "patch 1": {"patch_size": 1},
    "patch 4": {"patch_size": 4},
    "no attention bias": {"attention_bias": False},
    "gelu": {"activation_fn": "gelu"},
    "geglu": {"activation_fn": "geglu"},
    "geglu-approximate": {"activation_fn": "geglu-approximate"},
    "swiglu": {"activation_fn": "swiglu"},
    "linear-silu": {"activation_fn": "linear-silu"},
    "affine norms": {"norm_elementwise_affine": True},
    "norm eps": {"norm_eps": 1e-3},
    "interpolation 2": {"interpolation_scale": 2},
    "interpolation 0.5": {"interpolation_scale": 0.5},
    "micro-conditions": {"use_additional_conditions": True},
    "upcast": {"upcast_attention": True},
    "no caption projection": {"caption_channels": None, "cross_attention_dim": 20},
    "no cross-attention": {"caption_channels": None, "cross_attention_dim": None},
    "dropout in eval": {"dropout": 0.3},
    "sample size 128": {"sample_size": 128, "use_additional_conditions": None},
}


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def pair(**options: object) -> tuple[PixArtTransformer2DModel, diffusers.PixArtTransformer2DModel]:
    torch.manual_seed(0)
    config = {**BASE, **options}
    reference = diffusers.PixArtTransformer2DModel(**config).eval()
    ours = PixArtTransformer2DModel(**config).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def arguments(batch: int = 2, channels: int = 4, height: int = 8, width: int = 8, text: int = 20, tokens: int = 7):
    return {
        "hidden_states": torch.randn(batch, channels, height, width),
        "encoder_hidden_states": torch.randn(batch, tokens, text),
        "timestep": torch.linspace(3, 998, batch).long(),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[1024.0, 512.0]]).repeat(batch, 1),
            "aspect_ratio": torch.tensor([[2.0]]).repeat(batch, 1),
        },
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_every_option(options, grad):
    ours, reference = pair(**options)
    inputs = arguments(channels=ours.config.in_channels)
    if options.get("cross_attention_dim", 48) is None:
        inputs["encoder_hidden_states"] = None
    with torch.set_grad_enabled(grad):
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 4), (6, 10), (2, 2), (32, 32)])
def test_any_size(height, width):
    ours, reference = pair()
    inputs = arguments(height=height, width=width)
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


MASKS = {
    "ragged": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0]]),
    "bool": torch.tensor([[1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool(),
    "float": torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]),
    "bias": torch.tensor([[[0, 0, -10000.0, -10000, 0, -10000, -10000]], [[0, 0, 0, -10000.0, 0, 0, 0]]]),
    "soft bias": torch.tensor([[[0, 0.5, -1.0, -10000, 0, -10000, -10000]], [[0, 2.0, 0, -10000.0, 0, 0, -3.0]]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_encoder_masks(mask, grad):
    ours, reference = pair()
    inputs = arguments() | {"encoder_attention_mask": mask}
    with torch.set_grad_enabled(grad):
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("mask", ["keep", "bias"])
def test_attention_mask_masks_image_tokens(mask):
    ours, reference = pair()
    keep = torch.rand(2, 16) > 0.4
    value = keep.long() if mask == "keep" else ((~keep).float() * -10000.0)[:, None]
    inputs = arguments() | {"attention_mask": value}
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


def test_cross_attention_defaults_to_the_image_tokens():
    ours, reference = pair(caption_channels=None)
    inputs = arguments() | {"encoder_hidden_states": None}
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("timestep", [torch.tensor([17, 801]), torch.tensor([17.25, 801.5])])
def test_timesteps_per_sample_and_fractional(timestep):
    ours, reference = pair()
    inputs = arguments() | {"timestep": timestep}
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_agree(checkpointing):
    """Relative to the largest gradient where one is mathematically zero: softmax does not see the bias of keys."""
    ours, reference = pair()
    if checkpointing:
        ours.enable_gradient_checkpointing()
    inputs = arguments() | {"encoder_attention_mask": MASKS["ragged"]}
    ours(**inputs).sample.square().sum().backward()
    reference(**inputs).sample.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.norm() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        if name.endswith("to_k.bias"):
            assert parameter.grad.norm() <= 1e-6 * largest, name
            assert expected[name].norm() <= 1e-6 * largest, name
        else:
            assert relative(parameter.grad, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("options", [{}, {"attention_bias": False}, {"upcast_attention": True}], ids=str)
def test_fused_projections_agree(options):
    ours, reference = pair(**options)
    inputs = arguments() | {"encoder_attention_mask": MASKS["holes"]}
    ours.fuse_qkv_projections()
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_bfloat16_is_as_near_to_float64_as_the_reference(fused):
    """Averaged over inputs, because each error is a matter of luck."""
    ours, reference = pair(num_layers=4)
    exact = pair(num_layers=4)[1].double()
    ours, reference = ours.bfloat16(), reference.bfloat16()
    if fused:
        ours.fuse_qkv_projections()
    errors, allowed = [], []
    with torch.no_grad():
        for _ in range(8):
            inputs = arguments(height=16, width=16)
            low = {name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
            high = {name: value.double() for name, value in low.items()}
            expected = exact(**inputs | high).sample
            errors.append(relative(ours(**inputs | low).sample.double(), expected))
            allowed.append(relative(reference(**inputs | low).sample.double(), expected))
    assert sum(errors) <= 1.2 * sum(allowed)
    assert 1e-4 < sum(errors) / len(errors) < 0.05  # it did compute in bfloat16


def test_config_loads_without_a_warning(tmp_path, caplog):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert [record.message for record in caplog.records] == []


def test_folders_load_in_either(tmp_path):
    ours, reference = pair(use_additional_conditions=True)
    inputs = arguments()
    ours.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    back = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "ours")
    forth = PixArtTransformer2DModel.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(**inputs).sample
        assert torch.equal(back(**inputs).sample, expected)
        assert relative(forth(**inputs).sample, expected) <= 1e-5


def test_full_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        ours = PixArtTransformer2DModel(caption_channels=4096)
        reference = diffusers.PixArtTransformer2DModel(caption_channels=4096)
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert round(ours.num_parameters() / 1e6) == 611


@pytest.mark.slow
def test_full_size():
    ours, reference = pair(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        cross_attention_dim=1152,
        caption_channels=4096,
        sample_size=64,
    )
    mask = torch.zeros(2, 300, dtype=torch.long)
    mask[0, :1] = 1
    mask[1, :20] = 1
    inputs = arguments(height=64, width=64, text=4096, tokens=300) | {"encoder_attention_mask": mask}
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5
