"""AutoencoderKL against diffusers: same keys, same numbers, same folders."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.models.autoencoder.model import AutoencoderKL


def tiny(levels: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "block_out_channels": [8, 16, 16, 24][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        "sample_size": 16,
        **options,
    }


CONFIGS = {
    "defaults": {},
    "one_level": tiny(1),
    "two_levels": tiny(2),
    "three_levels_three_layers": tiny(3, layers_per_block=3),
    "four_levels": tiny(4, layers_per_block=2, norm_num_groups=8),
    "sixteen_channels": tiny(3, latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611),
    "eight_channels": tiny(2, latent_channels=8),
    "no_quant_conv": tiny(2, use_quant_conv=False),
    "no_post_quant_conv": tiny(2, use_post_quant_conv=False),
    "no_mid_attention": tiny(2, mid_block_add_attention=False),
    "like_glm": tiny(
        4,
        latent_channels=16,
        layers_per_block=3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latents_mean=[0.1 * i for i in range(16)],
        latents_std=[1.0 + i for i in range(16)],
        norm_num_groups=8,
    ),
    "grey_to_colour": tiny(2, in_channels=1, out_channels=3, act_fn="swish", sample_size=[16, 24]),
}

# The published configurations, for key sets and shapes at full size.
SDXL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
GLM = {
    **SDXL,
    "block_out_channels": [128, 512, 1024, 1024],
    "layers_per_block": 3,
    "latent_channels": 16,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def pair(config: dict[str, Any]) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Ours and theirs with the same random weights, normalisations included."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = AutoencoderKL(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def image(config: dict[str, Any], batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    shape = (batch, config.get("in_channels", 3), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_same_numbers(config: dict[str, Any]) -> None:
    ours, theirs = pair(config)
    x = image(config)
    mine, reference = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert relative(getattr(mine, name), getattr(reference, name)) <= 1e-5, name
    assert torch.equal(mine.mode(), mine.mean)
    draws = [d.sample(torch.Generator().manual_seed(7)) for d in (mine, reference)]
    assert relative(*draws) <= 1e-5
    assert relative(mine.kl(), reference.kl()) <= 1e-5
    assert relative(mine.nll(draws[1]), reference.nll(draws[1])) <= 1e-5

    z = torch.randn(reference.mean.shape, generator=torch.Generator().manual_seed(2))
    assert relative(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5
    assert relative(ours.decode(z, return_dict=False)[0], theirs.decode(z, return_dict=False)[0]) <= 1e-5


@pytest.mark.parametrize("sample_posterior", [False, True])
@torch.no_grad()
def test_forward(sample_posterior: bool) -> None:
    config = CONFIGS["three_levels_three_layers"]
    ours, theirs = pair(config)
    results = [
        model(image(config), sample_posterior, generator=torch.Generator().manual_seed(3)).sample
        for model in (ours, theirs)
    ]
    assert relative(*results) <= 1e-5


@torch.no_grad()
def test_sides_that_do_not_divide() -> None:
    ours, theirs = pair(CONFIGS["three_levels_three_layers"])
    x = torch.randn(1, 3, 19, 22)
    assert relative(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) <= 1e-5


def test_kl_between_two_distributions() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Reference

    from impasto.nn.gaussian import DiagonalGaussianDistribution

    p, q = torch.randn(2, 3, 8, 4, 4)
    ours = DiagonalGaussianDistribution(p).kl(DiagonalGaussianDistribution(q))
    assert relative(ours, Reference(p).kl(Reference(q))) <= 1e-5


def test_gradients_with_and_without_checkpointing() -> None:
    config = CONFIGS["two_levels"]
    ours, theirs = pair(config)
    ours.train(), theirs.train()
    ours(image(config)).sample.square().mean().backward()
    theirs(image(config)).sample.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert ours.encoder.conv_in.weight.grad is not None
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    ours.zero_grad()
    ours.enable_gradient_checkpointing()
    ours(image(config)).sample.square().mean().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["sixteen_channels", "no_mid_attention", "like_glm"])
@torch.no_grad()
def test_folders_load_in_the_other(name: str, tmp_path: Any) -> None:
    config = CONFIGS[name]
    ours, theirs = pair(config)
    x = image(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again_theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    again_ours = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    expected = theirs(x).sample
    assert relative(again_theirs(x).sample, expected) <= 1e-5
    assert relative(again_ours(x).sample, expected) <= 1e-5
    for key in inspect.signature(AutoencoderKL.__init__).parameters:
        if key != "self":
            assert again_ours.config[key] == again_theirs.config[key] == ours.config[key], key


@torch.no_grad()
def test_names_of_2022(tmp_path: Any) -> None:
    config = CONFIGS["two_levels"]
    ours, theirs = pair(config)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        for part in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                stem = f"{part}.mid_block.attentions.0"
                tensors[f"{stem}.{name}.{kind}"] = tensors.pop(f"{stem}.{new}.{kind}")
    save_file(tensors, path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert relative(loaded(image(config)).sample, theirs(image(config)).sample) <= 1e-5


@pytest.mark.parametrize("config", [SDXL, GLM], ids=["sdxl", "glm"])
def test_published_shapes(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), diffusers.AutoencoderKL(**config)
    mine, reference = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (ours, theirs)
    )
    assert mine == reference


def test_constructor_is_the_same() -> None:
    ours, theirs = (
        {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
        for cls in (AutoencoderKL, diffusers.AutoencoderKL)
    )
    assert list(ours.items()) == list(theirs.items())


def test_bfloat16_is_as_near_to_float64() -> None:
    config = CONFIGS["three_levels_three_layers"]
    ours, theirs = pair(config)
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        exact = theirs.double().decode(z.double()).sample
        errors = [
            (model.bfloat16().decode(z.bfloat16()).sample.double() - exact).norm().item() for model in (ours, theirs)
        ]
    assert errors[0] <= 1.2 * errors[1]
