"""Checkpoints of the original programs become folders that compute the same, and come back bit by bit."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import impasto
from impasto.conversion import EXTRAS_NAME, convert
from impasto.errors import CheckpointError, InputError, OutputError, WeightsMismatchError
from impasto.models.pixart.model import PixArtTransformer2DModel

from ...tiny import tiny_transformer, write_pipeline
from . import originals

WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS: dict[str, dict[str, Any]] = {
    "sigma": {},
    "alpha": {"tokens": 120, "scale": 1.0},
    "alpha 1024": {"tokens": 120, "micro": True, "scale": 2.0, "side": 8},
    "sigma 256": {"scale": 0.5},
    "sigma 2K": {"scale": 4.0, "side": 16},
    "4K": {"scale": 5.625, "side": 6},
    "q/k norm": {"qk_norm": True},
    "compressed": {"conv": (1, 2)},
    "everything": {"conv": (0, 2), "qk_norm": True, "micro": True, "tokens": 120},
    "without extras": {"tokens": None, "side": None},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "qk_norm": True},
}


def write(state: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_there_and_back_is_exact(variant: str, tmp_path: Path) -> None:
    state = originals.pixart(**VARIANTS[variant])
    given = {"sample_size": 8} if VARIANTS[variant].get("side", 4) is None else {}
    source = write({"state_dict": state, "epoch": 3}, tmp_path / "epoch_3.pth")
    convert(source, tmp_path / "folder", num_attention_heads=2, **given)
    for name in ("back.pth", "back.safetensors"):
        convert(tmp_path / "folder", tmp_path / name)
    assert originals.same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], state)
    assert originals.same(load_file(tmp_path / "back.safetensors"), state)
    assert (tmp_path / "folder" / EXTRAS_NAME).is_file() == ("y_embedder.y_embedding" in state or "pos_embed" in state)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "float16" not in name])
def test_the_model_computes_what_the_original_does(variant: str, tmp_path: Path) -> None:
    options = {"side": 4, "scale": 1.0, **VARIANTS[variant]}
    state = originals.pixart(**options)
    given = {"sample_size": 8} if options["side"] is None else {}
    convert(write({"state_dict": state}, tmp_path / "a.pth"), tmp_path / "folder", num_attention_heads=2, **given)
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert model.config.sample_size == 2 * (options["side"] or 4)
    torch.manual_seed(1)
    latents, text, t = torch.randn(2, 4, 8, 12), torch.randn(2, 5, originals.TEXT), torch.tensor([20.0, 700.0])
    sizes = torch.tensor([[64.0, 96.0, 0.67], [640.0, 960.0, 0.67]]) if options.get("micro") else None
    conditions = None if sizes is None else {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    expected = originals.Original(state, options["side"] or 4, options["scale"]).pixart(latents, text, t, sizes)
    with torch.no_grad():
        ours = model(latents, text, t, conditions).sample
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(("choice", "seed"), [(None, 0), ("raw", 0), ("ema", 1)])
def test_trained_weights_or_their_average(choice: Any, seed: int, tmp_path: Path) -> None:
    both = {"state_dict": originals.pixart(seed=0), "state_dict_ema": originals.pixart(seed=1), "optimizer": {"lr": 1}}
    done = convert(write(both, tmp_path / "a.pth"), tmp_path / "out", weights=choice, num_attention_heads=2)
    assert done.weights == (choice or "raw")
    convert(tmp_path / "out", tmp_path / "b.pth")
    assert originals.same(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], originals.pixart(seed=seed))
    with pytest.raises(InputError, match="has no ema weights"):
        convert(write({"state_dict": both["state_dict"]}, tmp_path / "c.pth"), tmp_path / "x", weights="ema")


def test_compression_without_weights_is_given(tmp_path: Path) -> None:
    write({"state_dict": originals.pixart()}, tmp_path / "a.pth")
    given = {"kv_compression": "uniform", "kv_compression_layers": [2]}
    done = convert(tmp_path / "a.pth", tmp_path / "out", num_attention_heads=2, **given)
    assert "diffusers has no kv_compression" in " ".join(done.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kv_compression_layers"] == [2]


@pytest.mark.parametrize("name", ["PixArt-Sigma-XL-2-256x256", "PixArt-XL-2-256x256", "PixArt-Sigma-XL-2-2K-MS", "x"])
def test_without_a_table_of_positions_the_name_says_the_size(name: str, tmp_path: Path) -> None:
    source = write(originals.pixart(side=None, tokens=None), tmp_path / f"{name}.pth")
    done = convert(source, tmp_path / "out", num_attention_heads=2)
    config = PixArtTransformer2DModel.load_config(tmp_path / "out")
    known = {"PixArt-Sigma-XL-2-256x256": (32, 0.5), "PixArt-XL-2-256x256": (32, 1), "x": (64, 1)}
    assert (config["sample_size"], config["interpolation_scale"]) == known.get(name, (256, 4))
    assert any("sample_size" in note for note in done.notes)


def test_an_autoencoder_there_and_back(tmp_path: Path) -> None:
    state = originals.autoencoder(levels=3, layers=2)
    given = {"norm_num_groups": 2, "scaling_factor": 0.5}
    write({f"first_stage_model.{name}": x for name, x in state.items()}, tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "out", **given)
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert originals.same(load_file(tmp_path / "back.safetensors"), state)
    loaded = impasto.AutoencoderKL.from_pretrained(tmp_path / "out")
    assert loaded.config.block_out_channels == [4, 8, 8]
    alone = impasto.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", **given)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(loaded(image).sample, alone(image).sample, atol=1e-6)


def test_a_config_next_to_the_weights_of_its_model_is_theirs(tmp_path: Path) -> None:
    model = tiny_transformer(sample_size=16, interpolation_scale=3, norm_eps=1e-5)
    model.save_pretrained(tmp_path / "transformer")
    done = convert(tmp_path / "transformer" / WEIGHTS, tmp_path / "out")
    assert done.notes == [f"its config is that next to {WEIGHTS}"]
    stored = [(tmp_path / place / "config.json").read_text() for place in ("transformer", "out")]
    assert stored[0] == stored[1]


def test_what_exists_is_replaced_only_if_asked(tmp_path: Path) -> None:
    source = write(originals.pixart(), tmp_path / "a.pth")
    convert(source, tmp_path / "out", num_attention_heads=2)
    before = source.read_bytes()
    for arguments in ((tmp_path / "out", source), (source, tmp_path / "out")):
        with pytest.raises(OutputError, match=r"exists already; .* overwrite=True \(--overwrite\)"):
            convert(*arguments)
    assert source.read_bytes() == before
    convert(tmp_path / "out", source, overwrite=True)
    assert source.read_bytes() != before
    convert(source, tmp_path / "out", num_attention_heads=2, overwrite=True)


@pytest.mark.parametrize("name", [EXTRAS_NAME, WEIGHTS, "diffusion_pytorch_model-00001-of-00002.safetensors"])
def test_files_in_the_target_are_kept(name: str, tmp_path: Path) -> None:
    source = write(originals.pixart(), tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    there = write(originals.pixart(seed=1), tmp_path / "out" / name)
    with pytest.raises(OutputError, match=rf"{name} exists already; .* overwrite=True \(--overwrite\)"):
        convert(source, tmp_path / "out", num_attention_heads=2)
    assert originals.same(load_file(there), originals.pixart(seed=1))
    (tmp_path / "out" / "notes.txt").touch()
    convert(source, tmp_path / "out", num_attention_heads=2, overwrite=True)
    expected = {"config.json", WEIGHTS, EXTRAS_NAME, "notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    options: Any = {"num_attention_heads": 2, "overwrite": overwrite}
    for name in (EXTRAS_NAME, WEIGHTS):
        folder = tmp_path / name.removesuffix(".safetensors")
        folder.mkdir()
        source = write(originals.pixart(), folder / name)
        before = source.read_bytes()
        with pytest.raises(OutputError, match=f"{name} is part of the source, and would be lost; give another target"):
            convert(source, folder, **options)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: before}
    convert(write(originals.pixart(), tmp_path / "a.pth"), tmp_path / "out", num_attention_heads=2)
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match=r"is part of the source|exists already"):
        convert(tmp_path / "out", tmp_path / "out" / WEIGHTS, overwrite=overwrite)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


# DiT


@pytest.mark.parametrize("classes", [1001, 1000])
def test_a_dit_becomes_a_start_that_computes_the_same_at_500(classes: int, tmp_path: Path) -> None:
    state = originals.dit(classes=classes)
    done = convert(
        write({"model": originals.dit(depth=3), "ema": state}, tmp_path / "DiT-XL-2-256x256.pt"),
        tmp_path / "start",
        num_attention_heads=2,
        caption_channels=10,
    )
    assert done.weights == "ema"
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "start")
    blocks: list[torch.Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    torch.manual_seed(2)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 10)
    program = originals.Original(state, 4, 1.0)
    label = 1000 if classes == 1001 else None
    expected, expected_blocks = program.dit(latents, torch.tensor([500.0, 500.0]), label)
    with torch.no_grad():
        ours = model(latents, text, torch.tensor([500, 500])).sample
    for found, wanted in zip([ours, *blocks], [expected, *expected_blocks], strict=True):
        assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5
    assert model.config.use_additional_conditions is False
    assert model.config.sample_size == 8


# What is refused, with nothing written


def broken(name: str) -> dict[str, Any]:
    state = originals.pixart()
    if name == "unknown":
        state["blocks.0.attn.extra.weight"] = torch.ones(1)
    if name == "missing":
        del state["blocks.1.mlp.fc2.bias"]
    if name == "indivisible":
        state["blocks.1.attn.qkv.weight"] = torch.ones(70, originals.WIDTH)
    if name == "shape":
        state["t_block.1.bias"] = torch.ones(7)
    if name == "integers":
        state["t_block.1.bias"] = torch.ones(6 * originals.WIDTH, dtype=torch.int64)
    if name == "controlnet":
        state["controlnet.0.before_proj.weight"] = torch.ones(1)
    if name == "something else":
        return {"layer.weight": torch.ones(2)}
    if name == "not tensors":
        return {**state, "t_block.1.bias": [1.0]}
    return state


BROKEN = {
    "unknown": (CheckpointError, "blocks.0.attn.extra.weight"),
    "missing": (WeightsMismatchError, "ff.net.2.bias"),
    "indivisible": (WeightsMismatchError, "holds 3 projections"),
    "shape": (WeightsMismatchError, "adaln_single.linear.bias"),
    "integers": (CheckpointError, "int64"),
    "controlnet": (CheckpointError, "ControlNet"),
    "something else": (CheckpointError, "nothing that is known here"),
    "not tensors": (CheckpointError, "is not a tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    kind, message = BROKEN[name]
    write({"state_dict": broken(name)}, tmp_path / "a.pth")
    with pytest.raises(kind, match=message):
        convert(tmp_path / "a.pth", tmp_path / "out", num_attention_heads=2)
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")

    def __init__(self, path: Path):
        self.path = path


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": originals.pixart(), "args": Bomb(tmp_path / "ran")}, tmp_path / "a.pth")
    for call in (convert, lambda source, _: PixArtTransformer2DModel.from_single_file(source)):
        with pytest.raises(CheckpointError, match="could run code"):
            call(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_truncated_files_and_wrong_targets(tmp_path: Path) -> None:
    whole = write({"state_dict": originals.pixart()}, tmp_path / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        convert(tmp_path / "cut.pth", tmp_path / "out")
    with pytest.raises(InputError, match="converted to a folder"):
        convert(tmp_path / "a.pth", tmp_path / "out.pth")
    with pytest.raises(InputError, match="num_attention_heads"):
        convert(tmp_path / "a.pth", tmp_path / "out")
    with pytest.raises(impasto.errors.ConfigurationError, match="did you mean 'sample_size'"):
        convert(tmp_path / "a.pth", tmp_path / "out", sample_sizes=3)
    with pytest.raises(InputError, match="a folder is converted to a file"):
        convert(tmp_path, tmp_path / "folder")
    assert not (tmp_path / "out").exists()


MARKS = [
    *("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.cross_attn.kv_linear.weight", "pos_embed"),
    *("final_layer.linear.weight", "blocks.1.attn.sr.weight", "y_embedder.y_embedding", "blocks.0.attn.qkv.weight"),
]
MARKS_OF_DIT = [
    *("x_embedder.proj.weight", "t_embedder.mlp.2.bias", "t_embedder.mlp.0.weight", "pos_embed"),
    *("y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"),
]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 0), (1, 0, 0, 0), (5, 5, 5, 5)], ids=str)
def test_tensors_of_any_shape_are_an_error_of_ours(shape: tuple[int, ...], tmp_path: Path) -> None:
    for names, whole in ((MARKS, originals.pixart(conv=(1,))), (MARKS_OF_DIT, originals.dit())):
        for name in names:
            write({**whole, name: torch.ones(shape)}, tmp_path / "a.pth")
            try:
                convert(tmp_path / "a.pth", tmp_path / "out", num_attention_heads=2, caption_channels=10)
            except impasto.errors.ImpastoError:
                assert not (tmp_path / "out").exists(), name
            else:  # only what nothing computes with
                assert name in ("pos_embed", "y_embedder.y_embedding")
                shutil.rmtree(tmp_path / "out")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(originals.pixart(), tmp_path / "a.pth")
    convert(source, tmp_path / "out", num_attention_heads=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("impasto.checkpoints.weights.save_file", full)
    again = write(originals.pixart(seed=1), tmp_path / "b.pth")
    with pytest.raises(OutputError, match="No space left"):
        convert(again, tmp_path / "out", num_attention_heads=2, overwrite=True)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OutputError, match="No space left"):
        convert(tmp_path / "out", tmp_path / "back.pth")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "back.pth").exists()


def test_a_component_of_a_pipeline_or_of_a_file_with_several(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline")
    convert(tmp_path / "pipeline", tmp_path / "vae.safetensors", component="vae")
    convert(tmp_path / "pipeline", tmp_path / "transformer.safetensors")
    vae, transformer = (load_file(tmp_path / f"{name}.safetensors") for name in ("vae", "transformer"))
    assert "decoder.up.0.block.0.conv1.weight" in vae
    assert "blocks.0.attn.qkv.weight" in transformer
    both = {f"first_stage_model.{name}": x for name, x in vae.items()}
    both |= {f"model.diffusion_model.{name}": x for name, x in transformer.items()}
    source = write(both, tmp_path / "both.safetensors")
    with pytest.raises(InputError, match="a transformer and an autoencoder"):
        convert(source, tmp_path / "out")
    given = {"transformer": {"num_attention_heads": 2, "sample_size": 8}, "vae": {"norm_num_groups": 4}}
    for component, values in given.items():
        convert(source, tmp_path / component, component=component, **values)  # type: ignore[arg-type]
        stored, back = (load_file(tmp_path / place / WEIGHTS) for place in (f"pipeline/{component}", component))
        assert originals.same(stored, back)
    with pytest.raises(InputError, match="holds no vae but PixArtTransformer2DModel; leave component out"):
        convert(tmp_path / "pipeline" / "transformer", tmp_path / "x.pth", component="vae")
    with pytest.raises(InputError, match="holds no transformer but AutoencoderKL; leave component out"):
        convert(tmp_path / "pipeline" / "vae", tmp_path / "x.pth", component="transformer")
    assert not (tmp_path / "x.pth").exists()
    convert(tmp_path / "pipeline" / "vae", tmp_path / "alone.safetensors", component="vae")
    with pytest.raises(InputError, match="component must be"):
        convert(source, tmp_path / "out", component="text_encoder")
    with pytest.raises(CheckpointError, match="its config says _class_name None"):
        convert(tmp_path / "pipeline" / "text_encoder", tmp_path / "x.pth")
