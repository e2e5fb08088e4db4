"""Weights on disk: names as diffusers writes them, strict loading, and an error for each kind of damage."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from impasto.checkpoints import stored, weights
from impasto.checkpoints.config import write_json
from impasto.errors import CheckpointError, CheckpointNotFoundError, OutputError, WeightsMismatchError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.training.running.checkpoints import save_state

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
    "use_additional_conditions": False,
}
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    PixArtTransformer2DModel(**CONFIG).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    PixArtTransformer2DModel(**CONFIG).save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(shards(tmp_path / "many")) >= 3
    return tmp_path / "many"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def load(folder: Path, **options: Any) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(folder, **options)


# Names and contents


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["30KB", "10GB"])
def test_files_are_named_as_diffusers_names_them(tmp_path: Path, variant: str | None, size: str) -> None:
    model = PixArtTransformer2DModel(**CONFIG)
    reference = diffusers.PixArtTransformer2DModel(**CONFIG)
    model.save_pretrained(tmp_path / "ours", variant=variant, max_shard_size=size)
    reference.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)

    def shape(name: str) -> str:  # how many shards there are depends on the order of the tensors
        return name.split("-of-")[0].rstrip("0123456789") if "-of-" in name else name

    ours, theirs = ({shape(path.name) for path in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert ours == theirs
    assert ("diffusion_pytorch_model.fp16-" in ours) == (variant == "fp16" and size == "30KB")
    read = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "ours", variant=variant)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in read.state_dict().items())
    back = load(tmp_path / "theirs", variant=variant)
    assert all(torch.equal(x, reference.state_dict()[name]) for name, x in back.state_dict().items())


def test_the_index_lists_every_tensor_and_the_size(sharded: Path) -> None:
    index = json.loads((sharded / f"{NAME}.index.json").read_text())
    held = {name: path.name for path in shards(sharded) for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for p in shards(sharded) for x in load_file(p).values())
    assert all(sum(x.nbytes for x in load_file(path).values()) <= 30_000 for path in shards(sharded))


def test_dtypes(folder: Path) -> None:
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    load(folder).half().save_pretrained(folder)
    assert load(folder).dtype == torch.float32
    assert load(folder, torch_dtype="auto").dtype == torch.float16


def test_saving_again_leaves_no_file_of_the_last_save(sharded: Path) -> None:
    load(sharded).save_pretrained(sharded)
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", NAME]


@pytest.mark.parametrize("variant", ["fp16", "fp16-ema", "a-1", "b_2"])
def test_saving_a_variant_again_replaces_it_alone(folder: Path, variant: str) -> None:
    for size, value in (("10GB", 1.0), ("30KB", 2.0), ("60KB", 3.0), ("10GB", 4.0)):
        model = load(folder)
        with torch.no_grad():
            model.proj_out.bias.fill_(value)
        model.save_pretrained(folder, variant=variant, max_shard_size=size)
        assert bool((load(folder, variant=variant).proj_out.bias == value).all())
        assert not bool((load(folder).proj_out.bias == value).any())


def test_parts_of_larger_tensors_and_twins_are_saved_as_their_own(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"rows": whole[:2], "more": whole[2:], "columns": whole[:, 1:3], "whole": whole, "twin": whole}
    tensors["turned"] = torch.ones(3, 2).cumsum(0).t()
    weights.write_weights(tensors, tmp_path)
    found = load_file(tmp_path / NAME)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / NAME).stat().st_size < 24 * 4 * 4 + 1000


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("size", [10_000, 36])
def test_tied_weights_are_saved_under_both_names(tmp_path: Path, size: int) -> None:
    model = Tied()
    weights.write_weights(model.state_dict(), tmp_path, max_shard_bytes=size)
    files = stored.find_weight_files(tmp_path)
    assert len(files) == (1 if size > 36 else 2)
    found = {name: tensor for file in files for name, tensor in stored.iterate_tensors(file)}
    assert torch.equal(found["one.weight"], model.one.weight)
    assert torch.equal(found["two.weight"], model.one.weight)


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """As the umask says, and not only the owner, which is how temporary files begin."""
    before = os.umask(0o027)
    try:
        load_later = PixArtTransformer2DModel(**CONFIG)
        load_later.save_pretrained(tmp_path / "model", max_shard_size="30KB")
        write_json(tmp_path / "x.json", {})
        save_state(tmp_path / "state.pt", {"step": 1})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {p.name: "0o640" for p in files}


def test_a_failed_save_leaves_the_last_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OutputError, match=r"one cannot be written: No space left"):
        PixArtTransformer2DModel(**CONFIG).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Damage


def test_no_weights(folder: Path) -> None:
    (folder / NAME).rename(folder / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=f"one holds no weights: expected {NAME}.*found config.json, mod"):
        load(folder)
    with pytest.raises(
        CheckpointNotFoundError, match=r"expected diffusion_pytorch_model.fp16.safetensors or .*variant"
    ):
        load(folder, variant="fp16")
    with pytest.raises(CheckpointNotFoundError, match=r"expected diffusion_pytorch_model.bin .*use_safetensors"):
        load(folder, use_safetensors=False)


def test_missing_shard(sharded: Path) -> None:
    gone = shards(sharded)[1]
    gone.unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"lacks 1 of its \d+ weight files: {gone.name}. Download"):
        load(sharded)


@pytest.mark.parametrize("kept", [0, 5, 100, -100, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{NAME} (is|has).*(download|Delete it and download)"):
        load(folder)


def test_truncated_shard(sharded: Path) -> None:
    path = shards(sharded)[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged.*Delete it and download"):
        load(sharded)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 200,
        b"<html>404 not found, says the proxy</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        with_header(b"{not json}"),
        with_header(b"[1, 2]"),
        with_header(b"[" * 100_000),
        with_header(json.dumps({"scale_shift_table": {"dtype": "F32", "shape": [2, 24]}}).encode()),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()),
    ],
    ids=["noise", "html", "lfs", "no json", "a list", "deep", "no offsets", "no data"],
)
def test_corrupt_header(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{NAME} (is|has).*(download|Delete it and download)"):
        load(folder)


def change(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / NAME) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / NAME)


def test_wrong_shape(folder: Path) -> None:
    change(folder, **{"proj_out.bias": torch.zeros(5)})
    message = rf"{NAME}: proj_out.bias has shape \[5\], but the config requires \[32\]. Weights and config.json do not"
    with pytest.raises(WeightsMismatchError, match=message):
        load(folder)


def test_missing_and_extra_tensors(folder: Path) -> None:
    change(folder, **{"proj_out.bias": None, "stranger": torch.zeros(1), "guest": torch.zeros(1)})
    message = (
        r"one do not fit PixArt.*1 missing \(proj_out.bias\). 2 unexpected \(guest, stranger\). Weights and config"
    )
    with pytest.raises(WeightsMismatchError, match=message):
        load(folder)


def test_weights_of_another_size(folder: Path) -> None:
    with pytest.raises(
        WeightsMismatchError, match=r"num_layers asks for 3 transformer_blocks, .* hold 2.*do not belong"
    ):
        load(folder, num_layers=3)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_that_points_outside(sharded: Path, target: str) -> None:
    index = sharded / f"{NAME}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["proj_out.bias"] = target
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{index.name} points outside its folder: '{target}'; do not trust"):
        load(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / f"{NAME}.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{NAME}.index.json has no weight_map; download"):
        load(sharded)


def test_shard_with_none_of_its_tensors(sharded: Path) -> None:
    path = shards(sharded)[0]
    save_file({"stranger": torch.zeros(1)}, path)
    message = rf"{path.name} does not hold what {NAME}.index.json lists for it: \d+ missing \(.*download them again"
    with pytest.raises(WeightsMismatchError, match=message):
        load(sharded)


class Hostile:
    """Unpickled by a trusting reader, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "legacy"])
def test_a_pickle_that_wants_to_run_code_does_not(folder: Path, tmp_path: Path, how: str) -> None:
    (folder / NAME).unlink()
    path, trap = folder / "diffusion_pytorch_model.bin", tmp_path / "trap"
    content = {"proj_out.bias": torch.zeros(32), "x": Hostile(trap)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(CheckpointError, match=rf"{path.name} was not loaded: .*run code.*Ask for a safetensors file"):
        load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_of_tensors_loads(folder: Path, wrapped: bool) -> None:
    state = load_file(folder / NAME)
    (folder / NAME).unlink()
    torch.save({"state_dict": state} if wrapped else state, folder / "diffusion_pytorch_model.bin")
    assert all(torch.equal(x, state[name]) for name, x in load(folder).state_dict().items())


def test_a_pickle_of_something_else(folder: Path) -> None:
    (folder / NAME).unlink()
    torch.save([1, 2], folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin does not hold a state dict of tensors"):
        load(folder)
