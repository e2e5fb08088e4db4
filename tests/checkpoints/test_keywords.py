"""The keywords that scripts carry: on models, schedulers and pipelines, each acted on, accepted, or refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.checkpoints.keywords import KEYWORDS
from impasto.errors import InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler

from ..tiny import tiny_transformer, write_pipeline

#: What scripts pass: harmless values of keywords that do nothing here.
HARMLESS: dict[str, Any] = {
    "low_cpu_mem_usage": True,
    "offload_folder": "offload",
    "offload_state_dict": True,
    "mirror": "tuna",
    "proxies": {},
    "resume_download": True,
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "custom_pipeline": None,
    "custom_revision": None,
    "trust_remote_code": False,
    "ignore_mismatched_sizes": False,
    "use_flashpack": False,
    "provider": None,
    "use_onnx": None,
    "load_connected_pipeline": False,
    "add_watermarker": False,
    "dduf_file": None,
    "keep_in_fp32_modules": None,
}
REFUSED: dict[str, Any] = {
    "proxies": {"https": "localhost:3128"},
    "safety_checker": object(),
    "requires_safety_checker": True,
    "custom_pipeline": "lpw",
    "trust_remote_code": True,
    "ignore_mismatched_sizes": True,
    "use_flashpack": True,
    "provider": "CPUExecutionProvider",
    "use_onnx": True,
    "dduf_file": "model.dduf",
    "add_watermarker": True,
    "use_auth_token": "hf_x",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"))


def load(kind: str, folder: Path, **options: Any) -> Any:
    if kind == "model":
        return PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer", **options)
    if kind == "scheduler":
        return DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler", **options)
    return PixArtSigmaPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None, **options)


@pytest.mark.parametrize("kind", ["model", "scheduler", "pipeline"])
def test_harmless_values_are_accepted(folder: Path, kind: str) -> None:
    assert load(kind, folder, **HARMLESS) is not None


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["model", "scheduler", "pipeline"])
def test_misleading_values_are_refused_with_what_to_do(folder: Path, kind: str, name: str) -> None:
    instead = KEYWORDS[name].instead
    assert instead is not None
    with pytest.raises(InputError, match=f"cannot act on {name}=") as caught:
        load(kind, folder, **{name: REFUSED[name]})
    assert instead in str(caught.value)


@pytest.mark.parametrize("kind", ["model", "pipeline", "scheduler"])
@pytest.mark.parametrize(("wrong", "right"), [("low_cpu_memory_usage", "low_cpu_mem_usage"), ("subfoldr", "subfolder")])
def test_an_unknown_name_suggests_the_nearest(folder: Path, kind: str, wrong: str, right: str) -> None:
    with pytest.raises(InputError, match=rf"has no argument '{wrong}'.*did you mean '{right}'"):
        load(kind, folder, **{wrong: True})


def test_a_name_like_no_other_gets_no_suggestion(folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no argument 'zzzz'$"):
        load("model", folder, zzzz=1)


def test_arguments_of_the_constructor_still_replace_values_of_the_config(folder: Path) -> None:
    assert load("scheduler", folder, solver_order=3).config.solver_order == 3
    assert load("model", folder, interpolation_scale=2, low_cpu_mem_usage=False).config.interpolation_scale == 2


def test_loading_info_is_empty_because_loading_is_strict(folder: Path) -> None:
    model, info = load("model", folder, output_loading_info=True)
    assert isinstance(model, PixArtTransformer2DModel)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    with pytest.raises(InputError, match="models return it"):
        load("pipeline", folder, output_loading_info=True)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in a mapped file: the line of its address in the process's table of memory names one."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return ".safetensors" in line
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["model", "pipeline"])
def test_disable_mmap_leaves_no_weight_in_a_file(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PixArtTransformer2DModel.__init__

    @functools.wraps(plain)
    def with_a_buffer(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        weight = self.proj_out._parameters.pop("weight")
        self.proj_out.register_buffer("weight", weight.detach())

    monkeypatch.setattr(PixArtTransformer2DModel, "__init__", with_a_buffer)

    def weights(**options: Any) -> list[torch.Tensor]:
        loaded = load(kind, folder, **options)
        model = loaded if kind == "model" else loaded.transformer
        assert len(list(model.buffers())) == 1
        return [*model.parameters(), *model.buffers()]

    mapped, copied = weights(), weights(disable_mmap=True)
    assert is_mapped(mapped[-1])
    assert any(map(is_mapped, mapped[:-1]))
    assert not any(map(is_mapped, copied))
    assert all(torch.equal(a, b) for a, b in zip(mapped, copied, strict=True))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), "balanced"])
def test_a_device_map_of_one_device(folder: Path, device_map: Any) -> None:
    model = load("model", folder, device_map=device_map, max_memory={0: "1GB", "cpu": "1GB"})
    assert model.device.type in ("cpu", "cuda")
    assert load("model", folder, device_map="meta").device.type == "meta"


def test_auto_leaves_a_model_on_the_cpu_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from impasto.nn import machine

    monkeypatch.setattr(machine, "default_device", lambda: torch.device("meta"))  # stands for an accelerator
    assert load("model", folder, device_map="auto").device.type == "meta"
    assert load("model", folder, device_map="auto", max_memory={0: "10KB"}).device.type == "cpu"
    assert load("model", folder, device_map="auto", max_memory={0: "1GB"}).device.type == "meta"
    assert load("model", folder, device_map="auto", max_memory={"cpu": "1GB"}).device.type == "cpu"


def test_a_device_map_of_several_devices_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"on 2 devices.*accelerate\.dispatch_model"):
        load("model", folder, device_map={"pos_embed": "cpu", "transformer_blocks": "meta"})


def test_a_loaded_model_knows_where_it_is_from(folder: Path) -> None:
    assert load("model", folder).config["_name_or_path"] == str(folder)


# --- saving ---


def test_save_takes_the_reference_s_positions(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "a", True, None, True, "fp16", "10KB")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names[0] == "config.json"
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    model.save_pretrained(tmp_path / "b", False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"use_flashpack": True}, {"colour": 1}])
def test_what_is_not_written_is_refused_before_writing(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        tiny_transformer().save_pretrained(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
