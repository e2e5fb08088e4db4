"""Models and pipelines from single files, in the names of each program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import impasto
from impasto.errors import CheckpointError, CheckpointNotFoundError, InputError
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.pixart.model import PixArtTransformer2DModel

from ..checkpoints.original import originals
from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae

GIVEN = {"num_attention_heads": 2}


def write(state: dict[str, Any], path: Path, prefix: str = "") -> Path:
    state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


def equal(first: nn.Module, second: nn.Module) -> bool:
    return originals.same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "module."])
def test_a_transformer_with_any_prefix(prefix: str, suffix: str, tmp_path: Path) -> None:
    state = originals.pixart(micro=True, scale=2.0)
    plain = PixArtTransformer2DModel.from_single_file(state, **GIVEN)
    loaded = PixArtTransformer2DModel.from_single_file(write(state, tmp_path / f"a{suffix}", prefix), **GIVEN)
    assert equal(plain, loaded)
    assert not loaded.training
    assert (loaded.config.sample_size, loaded.config.interpolation_scale) == (8, 2)
    ours = PixArtTransformer2DModel.from_single_file(
        write(plain.state_dict(), tmp_path / f"b{suffix}", prefix), **GIVEN, sample_size=8
    )
    assert equal(plain, ours)


def test_the_config_of_a_folder_decides(tmp_path: Path) -> None:
    model = tiny_transformer(upcast_attention=True, interpolation_scale=3, norm_eps=1e-5)
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    write(model.state_dict(), tmp_path / "a.safetensors", "model.diffusion_model.")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        loaded = PixArtTransformer2DModel.from_single_file(
            tmp_path / "a.safetensors", config=place, torch_dtype=torch.bfloat16
        )
        assert loaded.dtype == torch.bfloat16
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
    with pytest.raises(CheckpointError, match="num_layers asks for 3"):
        PixArtTransformer2DModel.from_single_file(tmp_path / "a.safetensors", config=place, num_layers=3)


def test_the_config_next_to_a_file_decides_if_it_is_that_models(tmp_path: Path, caplog: Any) -> None:
    model = tiny_transformer(sample_size=16, interpolation_scale=3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = PixArtTransformer2DModel.from_single_file(file)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert caplog.text == ""
    assert PixArtTransformer2DModel.from_single_file(file, sample_size=8).config.sample_size == 8
    tiny_vae().save_config(tmp_path)
    assert PixArtTransformer2DModel.from_single_file(file, **GIVEN).config.sample_size == 64
    other = file.rename(tmp_path / "other.safetensors")
    model.save_config(tmp_path)
    assert PixArtTransformer2DModel.from_single_file(other, **GIVEN).config.sample_size == 64


def test_an_early_config_leaves_micro_conditions_to_the_tensors(tmp_path: Path) -> None:
    """The class has them at a sample size of 128, as α; a Σ has none."""
    model = tiny_transformer(sample_size=128, use_additional_conditions=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_additional_conditions": None}))
    loaded = PixArtTransformer2DModel.from_single_file(model.state_dict(), config=tmp_path)
    assert loaded.config.use_additional_conditions is False


def test_what_is_assumed_is_logged(caplog: Any) -> None:
    PixArtTransformer2DModel.from_single_file(originals.pixart(side=None), **GIVEN)
    assert "sample_size 64 (images of 512 px) is a guess" in caplog.text
    caplog.clear()
    PixArtTransformer2DModel.from_single_file(originals.pixart(), **GIVEN)
    assert caplog.text == ""


def test_a_glm_image_transformer() -> None:
    sizes = {"text_embed_dim": 20, "time_embed_dim": 28, "condition_dim": 12, "prior_vq_quantizer_codebook_size": 11}
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(num_layers=2, attention_head_dim=8, num_attention_heads=3, **sizes)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in model.state_dict().items()}
    loaded = GlmImageTransformer2DModel.from_single_file(state, attention_head_dim=8)
    assert equal(model, loaded)
    assert loaded.config.num_attention_heads == 3
    assert loaded.config.prior_vq_quantizer_codebook_size == 11


@pytest.mark.parametrize("names", ["diffusers", "old diffusers", "latent diffusion", "with losses"])
def test_an_autoencoder_is_that_of_diffusers(names: str, tmp_path: Path) -> None:
    given = {"norm_num_groups": 2, "scaling_factor": 0.5}
    state = originals.autoencoder(levels=3)
    expected = impasto.AutoencoderKL.from_single_file(state, **given)
    if names != "latent diffusion":
        state = expected.state_dict()
    if names == "with losses":
        state = {**originals.autoencoder(levels=3), "loss.logvar": torch.ones(1)}
    if names == "old diffusers":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, former in old.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{former}."): x for name, x in state.items()}
    assert equal(impasto.AutoencoderKL.from_single_file(write(state, tmp_path / "a.safetensors"), **given), expected)
    theirs = diffusers.AutoencoderKL.from_config(expected.config)
    theirs.load_state_dict(expected.state_dict())
    assert list(theirs.config.block_out_channels) == [4, 8, 8]


def test_diffusers_reads_the_same_file_as_we_do(tmp_path: Path) -> None:
    state = originals.autoencoder(levels=2)
    ours = impasto.AutoencoderKL.from_single_file(
        write(state, tmp_path / "a.safetensors"), norm_num_groups=2, scaling_factor=0.5
    )
    ours.save_pretrained(tmp_path / "config")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    again = impasto.AutoencoderKL.from_single_file(str(tmp_path / "a.safetensors"), config=str(tmp_path / "config"))
    assert originals.same(dict(theirs.state_dict()), dict(again.state_dict()))


# Pipelines


def all_in_one(tmp_path: Path) -> tuple[Any, Path]:
    pipe = tiny_pipeline(impasto.PixArtSigmaPipeline)
    whole = {
        **{f"model.diffusion_model.{name}": x for name, x in pipe.transformer.state_dict().items()},
        **{f"first_stage_model.{name}": x for name, x in pipe.vae.state_dict().items()},
        "text_encoders.t5xxl.transformer.shared.weight": torch.ones(1),
    }
    return pipe, write(whole, tmp_path / "all.safetensors")


def test_a_pipeline_from_a_file_and_a_folder(tmp_path: Path, caplog: Any) -> None:
    pipe, file = all_in_one(tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    for part in ("transformer", "vae"):
        (tmp_path / "base" / part / "diffusion_pytorch_model.safetensors").unlink()
    loaded = impasto.PixArtSigmaPipeline.from_single_file(file, config=tmp_path / "base")
    assert equal(loaded.transformer, pipe.transformer)
    assert equal(loaded.vae, pipe.vae)
    assert "its text encoder is not read" in caplog.text
    own = tiny_vae(seed=5)
    narrow = impasto.PixArtSigmaPipeline.from_single_file(
        file, config=tmp_path / "base", vae=own, torch_dtype={"transformer": torch.bfloat16}
    )
    assert narrow.vae is own
    assert (narrow.transformer.dtype, narrow.text_encoder.dtype) == (torch.bfloat16, torch.float32)


def test_a_pipeline_from_a_file_and_components(tmp_path: Path) -> None:
    pipe, _ = all_in_one(tmp_path)
    file = write(pipe.transformer.state_dict(), tmp_path / "transformer.safetensors")
    others = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "scheduler": pipe.scheduler}
    with pytest.raises(InputError, match="needs vae in addition to transformer"):
        impasto.PixArtSigmaPipeline.from_single_file(file, transformer=pipe.transformer, **others)
    loaded = impasto.PixArtSigmaPipeline.from_single_file(file, vae=pipe.vae, transformer=pipe.transformer, **others)
    assert loaded.transformer is pipe.transformer
    with pytest.raises(InputError, match="no component 'vea'"):
        impasto.PixArtSigmaPipeline.from_single_file(file, vea=pipe.vae, transformer=pipe.transformer, **others)


# What is refused


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    dit = write(originals.dit(), tmp_path / "dit.pt")
    vae = write(originals.autoencoder(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="holds no PixArtTransformer2DModel, but a class-conditional DiT"):
        PixArtTransformer2DModel.from_single_file(dit)
    with pytest.raises(CheckpointError, match="format of latent diffusion"):
        PixArtTransformer2DModel.from_single_file(vae)
    with pytest.raises(CheckpointError, match="holds no AutoencoderKL"):
        impasto.AutoencoderKL.from_single_file(dit)
    with pytest.raises(CheckpointError, match="holds no PixArt"):
        impasto.PixArtSigmaPipeline.from_single_file(vae)


def test_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    load = PixArtTransformer2DModel.from_single_file
    for source, kind, message in (
        (tmp_path, InputError, "is a folder"),
        (tmp_path / "none.pth", CheckpointNotFoundError, "there is no file"),
        (3, InputError, "by its path or by a state dict"),
        ({"a": 1}, CheckpointError, "is not a tensor"),
    ):
        with pytest.raises(kind, match=message):
            load(source)
    with pytest.raises(InputError, match="did you mean 'sample_size'"):
        load(originals.pixart(), sampel_size=8)
    with pytest.raises(InputError, match="original_config"):
        load(originals.pixart(), original_config="x.yaml")
    with pytest.raises(InputError, match="'raw' or 'ema'"):
        load(originals.pixart(), weights="best")


def test_an_address_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def resolve(name: str, **options: Any) -> Path:
        asked.append((name, options["allow_patterns"], options["revision"]))
        return tmp_path

    monkeypatch.setattr("impasto.checkpoints.hub.resolve", resolve)
    (tmp_path / "sub").mkdir()
    write(originals.pixart(), tmp_path / "sub" / "a.safetensors")
    for kind in ("blob", "resolve"):
        address = f"https://huggingface.co/owner/name/{kind}/main/sub/a.safetensors"
        assert PixArtTransformer2DModel.from_single_file(address, **GIVEN).config.sample_size == 8
    assert asked == [("owner/name", ["sub/a.safetensors"], "main")] * 2
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        PixArtTransformer2DModel.from_single_file("https://huggingface.co/owner/name/blob/main/b.safetensors")
