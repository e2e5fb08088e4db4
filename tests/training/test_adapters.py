"""Training of adapters, from a configuration to a file that pipelines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.errors import ConfigurationError, InputError
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.assembly.assemble import assemble
from impasto.training.launch import launch
from impasto.training.running.run import Run
from impasto.training.settings import recipe_files as recipes

from ..tiny import write_pipeline
from .folders import write_images
from .runs import rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "pipeline")
    write_images(place / "images", 16)
    return place


def configuration(place: Path, adapter: dict[str, Any], **changes: Any) -> Any:
    content: dict[str, Any] = {
        "steps": 12,
        "models": {"pipeline": str(place / "pipeline")},
        "adapter": {"rank": 2, **adapter},
        "optimizer": {"rate": 1e-2, "rates": {"text_encoder.*": 1e-3}},
        "data": {"sources": [{"path": str(place / "images")}], "batch_size": 8, "sizes": [[16, 16]]},
        "validation": {"count": 4},
        "checkpoints": {"every": 6},
        "report": {"progress": False},
    }
    return recipes.checked({**content, **changes}, "test")


def latents(pipe: PixArtSigmaPipeline) -> torch.Tensor:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    return pipe("a red cube", generator=torch.Generator().manual_seed(0), **options).images


def test_an_adapter_of_transformer_and_text_encoder_is_trained_and_loads(place: Path, tmp_path: Path) -> None:
    wanted = configuration(place, {"kind": "lora", "text_encoder_rank": 3, "alpha": 4.0})
    launch(wanted, tmp_path)
    losses = [row["validation"] for row in rows(tmp_path) if "validation" in row]
    assert losses[-1] < losses[0]
    (file,) = (tmp_path / "result").glob("*.safetensors")
    pipe = PixArtSigmaPipeline.from_pretrained(place / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    before = latents(pipe)
    pipe.load_lora_weights(file)
    assert sorted(pipe.get_list_adapters()) == ["text_encoder", "transformer"]
    assert not torch.equal(latents(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"kind": "lokr"}, {"kind": "rslora", "base": "int8"}])
def test_only_the_adapter_is_trained(adapter: dict[str, Any], place: Path, tmp_path: Path) -> None:
    found = assemble(configuration(place, adapter), tmp_path)
    trained = {name for name, p in found.objective.named_parameters() if p.requires_grad}
    parts = {"dora": ("lora_A", "lora_B", "lora_magnitude_vector"), "lokr": ("lokr_",), "rslora": ("lora_A", "lora_B")}
    assert trained
    assert all(any(part in name for part in parts[adapter["kind"]]) for name in trained)
    assert not found.objective.state_buffers()


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_it_is_trained_on_quantized_weights(base: str, place: Path, tmp_path: Path) -> None:
    wanted = configuration(place, {"base": base}, optimizer={"rate": 1e-2}, steps=24)
    launch(wanted, tmp_path)
    losses = [row["validation"] for row in rows(tmp_path) if "validation" in row]
    assert losses[-1] < losses[0]
    pipe = PixArtSigmaPipeline.from_pretrained(place / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    before = latents(pipe)
    pipe.load_lora_weights(tmp_path / "result")  # on plain weights
    assert not torch.equal(latents(pipe), before)


def test_each_has_the_rate_that_is_written(place: Path, tmp_path: Path) -> None:
    wanted = configuration(place, {"text_encoder_rank": 2}, schedule={"kind": "constant"})
    assembled = assemble(wanted, tmp_path)
    run = Run(assembled.objective.train(), wanted)
    loss, _ = run.gradients(assembled.data.batch(0))
    run.update(0, loss)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    found = {name.split(".")[0]: rates[id(parameter)] for name, parameter in run.masters.named.items()}
    assert found == {"transformer": 1e-2, "text_encoder": 1e-3}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": ["to_nowhere"]}, "adapter.targets: the PixArt.* has no linear layer 'to_nowhere'"),
        ({"targets": ["to_q", "to_kk"]}, r"adapter.targets: .* 'to_kk'; did you mean 'to_k'\?"),
        ({"text_encoder_rank": 2, "text_encoder_targets": ["q", "vv"]}, "adapter.text_encoder_targets: the T5.* 'vv'"),
    ],
)
def test_targets_that_do_not_exist_are_named(
    adapter: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        assemble(configuration(place, adapter), tmp_path)


def test_rates_of_nothing_are_refused(place: Path, tmp_path: Path) -> None:
    found = assemble(configuration(place, {}), tmp_path)
    with pytest.raises(ConfigurationError, match=r"'text_encoder\.\*' matches nothing that is trained"):
        Run(found.objective, configuration(place, {}))
