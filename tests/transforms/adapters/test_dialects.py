"""Each dialect of adapter files, written by its own conventions, computes what the merged weights compute."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny import tiny_text_encoder, tiny_transformer
from tests.tiny_adapters import DIALECTS, Written
from torch import Tensor, nn

from impasto.transforms.adapters import Request, fuse, load_into, unfuse, unload


def models() -> dict[str, nn.Module]:
    return {"transformer": tiny_transformer(), "text_encoder": tiny_text_encoder()}


def outputs(own: dict[str, nn.Module]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        return {
            "transformer": own["transformer"](latents, text, torch.tensor([7, 500])).sample,
            "text_encoder": own["text_encoder"](ids)[0],
        }


def write(written: Written, folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in written.tensors.items()}, file, written.header)
    if written.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(written.config))
    return file


def difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_output_is_that_of_merged_weights(dialect: str, tmp_path: Path) -> None:
    own = models()
    before = outputs(own)
    written = DIALECTS[dialect](own)
    merged = copy.deepcopy(own)
    for component, deltas in written.deltas.items():
        for layer, delta in deltas.items():
            merged[component].get_parameter(f"{layer}.weight").data += delta
    expected = outputs(merged)
    load_into(own, write(written, tmp_path), Request())
    adapted = outputs(own)
    for component in own:
        assert difference(adapted[component], expected[component]) <= 1e-5
        changed = difference(adapted[component], before[component]) > 1e-2
        assert changed == (component in written.deltas)
    for component in written.deltas:
        fuse(own[component])
    assert all(difference(fused, expected[name]) <= 1e-5 for name, fused in outputs(own).items())
    for component in written.deltas:
        unfuse(own[component])
        unload(own[component])
    assert all(torch.equal(after, before[name]) for name, after in outputs(own).items())
