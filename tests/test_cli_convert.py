"""``impasto convert``, and ``impasto info`` of single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from impasto import cli
from impasto.models.pixart.model import PixArtTransformer2DModel

from .checkpoints.original import originals
from .tiny import tiny_transformer


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def written(state: dict[str, Any], path: Path, prefix: str = "") -> Path:
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_convert_says_what_it_did(tmp_path: Path) -> None:
    both = {"state_dict": originals.pixart(), "state_dict_ema": originals.pixart(seed=1)}
    torch.save(both, tmp_path / "a.pth")
    options = ("--heads", 2, "--weights", "ema", "--dtype", "bfloat16", "--kv-compression", "uniform:2:1-2")
    result = call("convert", tmp_path / "a.pth", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "in the format of the original code, its ema weights" in result.output
    assert "original.safetensors keeps y_embedder.y_embedding, pos_embed" in result.output
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.kv_compression_layers == [1, 2]
    refused = call("convert", tmp_path / "out", tmp_path / "a.pth")
    assert refused.exit_code == 1
    assert "exists already" in refused.output
    again = call("convert", tmp_path / "out", tmp_path / "b.pth")
    assert again.exit_code == 0, again.output
    assert torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]["t_block.1.bias"].dtype == torch.bfloat16


def test_errors_name_the_options_of_the_command(tmp_path: Path) -> None:
    torch.save(originals.pixart(), tmp_path / "a.pth")  # a width without a known number of heads
    heads = call("convert", tmp_path / "a.pth", tmp_path / "out")
    assert heads.exit_code == 1
    assert "(--heads of impasto convert)" in heads.output
    lora = {f"transformer.proj_out.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    adapter = call("convert", written(lora, tmp_path / "lora.safetensors"), tmp_path / "out")
    assert adapter.exit_code == 1
    assert "is an adapter, not a model" in adapter.output
    assert "--lora" in adapter.output


def test_a_failure_is_one_line_and_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 not really")
    for options in ((), ("--kv-compression", "uniform:x")):
        result = call("convert", tmp_path / "a.pth", tmp_path / "out", "--overwrite", *options)
        assert result.exit_code == 1
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


FILES = {
    "original.pth": (originals.pixart(micro=True, conv=(2,), qk_norm=True, scale=2.0), "", "micro-conditions (α)"),
    "sigma.safetensors": (originals.pixart(side=None), "", "Not in the file: sample_size 64"),
    "comfy.safetensors": (originals.pixart(), "model.diffusion_model.", "with the prefix model.diffusion_model."),
    "ours.safetensors": (tiny_transformer().state_dict(), "", "2 layers of width 24"),
    "dit.pt": (originals.dit(), "", "To start training PixArt-α from it: impasto convert"),
    "vae.ckpt": (originals.autoencoder(3), "first_stage_model.", "3 levels of 4, 8, 8 channels, 4 of latents"),
}


@pytest.mark.parametrize("name", FILES)
def test_info_recognizes_each_kind_of_file(name: str, tmp_path: Path) -> None:
    state, prefix, expected = FILES[name]
    path = written(dict(state), tmp_path / name, prefix)
    result = call("info", path)
    assert result.exit_code == 0, result.output
    assert expected in result.output
    assert f"{sum(x.numel() for x in state.values()):,} values, stored as float32" in result.output
    assert "impasto convert" in result.output


def test_info_of_weights_with_a_config_reads_it(tmp_path: Path) -> None:
    tiny_transformer(sample_size=16, interpolation_scale=3).save_pretrained(tmp_path)
    result = call("info", tmp_path / "diffusion_pytorch_model.safetensors")
    assert "images of 128 x 128 px, positions interpolated by 3" in result.output
    assert "Not in the file" not in result.output


def test_info_of_other_files_and_of_broken_values(tmp_path: Path) -> None:
    other = call("info", written({"a.weight": torch.ones(2)}, tmp_path / "a.safetensors"))
    assert other.exit_code == 1
    assert "nothing that is known here" in other.output
    state = originals.pixart()
    state["t_block.1.bias"][0] = float("nan")
    path = written(state, tmp_path / "b.safetensors")
    assert call("info", path).exit_code == 0
    deep = call("info", "--deep", path)
    assert deep.exit_code == 1
    assert "t_block.1.bias holds NaN or infinity" in deep.output
