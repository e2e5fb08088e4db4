from __future__ import annotations

from typing import Any

import pytest
import torch

from impasto.errors import ConfigurationError, InputError
from impasto.models.autoencoder.model import AutoencoderKL


def tiny(**options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        **options,
    }
    return AutoencoderKL(**config).eval()


@torch.no_grad()
def test_slicing_changes_nothing() -> None:
    model, x = tiny(), torch.randn(3, 3, 16, 24)
    mean, decoded = model.encode(x).latent_dist.mean, model(x).sample
    batches: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    model.decoder.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    model.enable_slicing()
    torch.testing.assert_close(model.encode(x).latent_dist.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(mean).sample, decoded, rtol=0, atol=1e-5)
    assert batches == [1] * 6
    model.disable_slicing()
    model(x)
    assert batches[6:] == [3, 3]


@torch.no_grad()
def test_inference_on_the_cpu_is_in_channels_last_and_its_results_are_not() -> None:
    model, x = tiny(), torch.randn(2, 3, 16, 24)
    orders: list[bool] = []
    for module in (model.encoder.mid_block, model.decoder.mid_block):
        module.register_forward_hook(lambda *a: orders.append(a[2].is_contiguous(memory_format=torch.channels_last)))
    distribution = model.encode(x).latent_dist
    image = model.decode(distribution.mode()).sample
    assert distribution.parameters.is_contiguous()
    assert image.is_contiguous()
    with torch.enable_grad():
        torch.testing.assert_close(model(x).sample, image, rtol=0, atol=1e-5)
    assert orders == [True, True, False, False]
    one = tiny(latent_channels=1)  # whose latents are in both orders at once
    assert one.decode(torch.randn(2, 1, 4, 4)).sample.shape[0] == 2


@torch.no_grad()
def test_in_16_bits_an_image_does_not_depend_on_its_batch() -> None:
    model, x = tiny(block_out_channels=(32, 64)).to(torch.bfloat16), torch.randn(3, 3, 48, 64).to(torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoded = model.encode(x).latent_dist.mean
        decoded = model.decode(encoded).sample
        for i in range(3):
            assert torch.equal(model.encode(x[i : i + 1]).latent_dist.mean, encoded[i : i + 1])
            assert torch.equal(model.decode(encoded[i : i + 1]).sample, decoded[i : i + 1])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_channels_last_holds() -> None:
    model, x = tiny(), torch.randn(2, 3, 16, 24)
    expected = model(x).sample
    model.to(memory_format=torch.channels_last)
    parameters = model.encode(x.to(memory_format=torch.channels_last)).latent_dist.parameters
    assert parameters.is_contiguous(memory_format=torch.channels_last)
    result = model(x.to(memory_format=torch.channels_last)).sample
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_outputs_by_attribute_key_index_and_unpacking() -> None:
    model, x = tiny(), torch.randn(1, 3, 16, 16)
    output = model.encode(x)
    assert output.latent_dist is output["latent_dist"] is output[0]
    (sample,) = model.decode(output.latent_dist.mode()).to_tuple()
    assert sample.shape == x.shape
    plain = model.decode(output.latent_dist.mode(), return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[0], sample)
    assert type(model.encode(x, return_dict=False)) is tuple


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}, "up_block_types"),
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types has 1"),
        ({"up_block_types": ("UpDecoderBlock2D",) * 3}, "up_block_types has 3"),
        ({"norm_num_groups": 3}, "norm_num_groups=3"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"latents_mean": [0.0] * 3}, "latents_mean has 3"),
        ({"latents_std": [1.0] * 16}, "latents_std has 16"),
    ],
)
def test_refused_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        tiny(**options)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 16, 16)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"encode needs \[batch, 3, height, width\]"):
        tiny().encode(torch.randn(shape))


def test_latents_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"decode needs \[batch, 4, height, width\]; it was given \[1, 16, 4, 4\]"):
        tiny().decode(torch.randn(1, 16, 4, 4))


def test_config_holds_every_argument() -> None:
    config = tiny(shift_factor=0.1, force_upcast=False).config
    assert config.shift_factor == config["shift_factor"] == 0.1
    assert config.force_upcast is False
    assert config.scaling_factor == 0.18215
    assert config.latents_mean is None


def test_checkpointing_computes_the_blocks_again_in_the_backward_pass() -> None:
    model = tiny().train()
    calls: list[int] = []
    model.encoder.down_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def count() -> int:
        calls.clear()
        model(torch.randn(1, 3, 16, 16)).sample.sum().backward()
        return len(calls)

    assert count() == 1
    model.enable_gradient_checkpointing()
    assert count() == 2
    model.disable_gradient_checkpointing()
    assert count() == 1


def test_compiles_without_graph_breaks() -> None:
    model, z = tiny(), torch.randn(1, 4, 8, 8)
    compiled = torch.compile(model.decode, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, return_dict=False)[0], model.decode(z).sample)
