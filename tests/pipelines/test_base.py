"""The components of a pipeline: loaded, saved, moved, shared, placed."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from impasto.checkpoints.stored import WEIGHTS_NAME
from impasto.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    HubError,
    InputError,
    OutputError,
    ResourceError,
    WeightsMismatchError,
)
from impasto.memory.placement import OneAtATime, Resident, offload_device
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines import loading
from impasto.pipelines.base import ImagePipelineOutput
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler

from ..tiny import (
    tiny_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
    write_pipeline,
    write_tokenizer,
)

COMPONENTS = ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "own"))


def edit_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def same_weights(a: Any, b: Any) -> bool:
    """Bit for bit, in every component."""
    for name in ("text_encoder", "vae", "transformer"):
        first, second = getattr(a, name).state_dict(), getattr(b, name).state_dict()
        if first.keys() != second.keys() or not all(torch.equal(x, second[key]) for key, x in first.items()):
            return False
    return True


def generates_the_same(a: Any, b: Any) -> bool:
    """From equal weights, equal images up to rounding: where weights lie in memory decides the order of a sum."""
    return same_weights(a, b) and torch.allclose(draw(a), draw(b), rtol=1e-5, atol=1e-5)


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    return images


# --- components ---


def test_parts_are_attributes_that_can_be_replaced_and_deleted() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    assert list(pipe.components) == COMPONENTS
    assert all(pipe.components[name] is getattr(pipe, name) for name in COMPONENTS)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    assert pipe.components["scheduler"] is scheduler
    before = draw(pipe)
    del pipe.transformer
    assert pipe.components["transformer"] is None
    with pytest.raises(InputError, match="needs the transformer"):
        draw(pipe)
    pipe.transformer = tiny_transformer()
    assert torch.equal(draw(pipe), before)


def test_output_is_read_in_every_way() -> None:
    output = ImagePipelineOutput(images=[])
    assert output.images is output["images"] is output[0]
    (images,) = output.to_tuple()
    assert images is output.images


# --- loading and saving ---


def test_save_and_load_round_trip(folder: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    assert generates_the_same(pipe, tiny_pipeline(PixArtSigmaPipeline))
    assert all(not component.training for component in (pipe.transformer, pipe.vae, pipe.text_encoder))


def test_the_index_is_that_of_diffusers(folder: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text()) == {
        "_class_name": "PixArtSigmaPipeline",
        "_diffusers_version": "0.42.1",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }


def test_missing_parts_are_saved_as_null_and_loaded_as_none(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=None, tokenizer=None)
    del pipe.vae
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == index["tokenizer"] == index["text_encoder"] == [None, None]
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert again.vae is again.tokenizer is again.text_encoder is None
    assert isinstance(again.transformer, PixArtTransformer2DModel)


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pickle"):
        tiny_pipeline(PixArtSigmaPipeline).save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        tiny_pipeline(PixArtSigmaPipeline).save_pretrained(tmp_path / "file")
    (tmp_path / "folder" / "model_index.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        tiny_pipeline(PixArtSigmaPipeline).save_pretrained(tmp_path / "folder")


def test_a_compiled_transformer_is_saved_as_what_it_was(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=None, tokenizer=None, vae=None)
    expected = pipe.transformer.state_dict()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.save_pretrained(tmp_path)
    found = PixArtSigmaPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert found.keys() == expected.keys()


def test_given_parts_are_taken_and_their_files_not_read(own_folder: Path) -> None:
    for name in ("text_encoder", "transformer", "tokenizer"):
        shutil.rmtree(own_folder / name)
    transformer = tiny_transformer(seed=1)
    pipe = PixArtSigmaPipeline.from_pretrained(own_folder, text_encoder=None, tokenizer=None, transformer=transformer)
    assert pipe.text_encoder is None
    assert pipe.transformer is transformer


def test_missing_parts_are_named_with_what_to_do(own_folder: Path) -> None:
    shutil.rmtree(own_folder / "vae")
    index = json.loads((own_folder / "model_index.json").read_text())
    del index["tokenizer"]
    (own_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer, vae.*tokenizer=base.tokenizer, vae=base.vae"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_a_transformer_only_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "transformer")
    with pytest.raises(CheckpointNotFoundError, match=r"transformer=PixArtTransformer2DModel\.from_pretrained"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)
    transformer = PixArtTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    pipe = PixArtSigmaPipeline.from_pretrained(folder, transformer=transformer)
    assert pipe.transformer is transformer


def test_early_names_of_classes(own_folder: Path) -> None:
    edit_index(
        own_folder, transformer=["diffusers", "Transformer2DModel"], tokenizer=["transformers", "T5TokenizerFast"]
    )
    pipe = PixArtSigmaPipeline.from_pretrained(own_folder)
    assert isinstance(pipe.transformer, PixArtTransformer2DModel)
    assert generates_the_same(pipe, tiny_pipeline(PixArtSigmaPipeline))


def test_an_unknown_class_can_be_passed_in(own_folder: Path) -> None:
    edit_index(own_folder, scheduler=["solvers", "SASolverScheduler"])
    with pytest.raises(CheckpointError, match=r"SASolverScheduler.*DPMSolverMultistepScheduler.*scheduler=SASolver"):
        PixArtSigmaPipeline.from_pretrained(own_folder)
    scheduler = DPMSolverMultistepScheduler()
    assert PixArtSigmaPipeline.from_pretrained(own_folder, scheduler=scheduler).scheduler is scheduler


@pytest.mark.parametrize("entry", [["diffusers"], ["diffusers", 3], []])
def test_a_damaged_index(own_folder: Path, entry: list[Any]) -> None:
    edit_index(own_folder, vae=entry)
    with pytest.raises(CheckpointError, match=r"vae should be \[library, class\]"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_options_of_other_pipelines_in_the_index_are_no_parts(own_folder: Path) -> None:
    edit_index(own_folder, requires_safety_checker=True, feature_extractor=[None, None])
    assert list(PixArtSigmaPipeline.from_pretrained(own_folder).components) == COMPONENTS


def test_unknown_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no argument 'unet'; components: tokenizer"):
        PixArtSigmaPipeline.from_pretrained(folder, unet=None)


def test_subfolder(folder: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(folder.parent, subfolder=folder.name, text_encoder=None)
    assert isinstance(pipe.vae, nn.Module)


def test_a_damaged_text_encoder(own_folder: Path) -> None:
    path = own_folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="text_encoder"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_a_text_encoder_with_missing_weights(own_folder: Path) -> None:
    path = own_folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 3}))
    with pytest.raises(WeightsMismatchError, match=r"num_layers is 3, but the weights have 2 layers"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_a_missing_tokenizer_file(own_folder: Path) -> None:
    for path in (own_folder / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="holds no tokenizer"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_the_tokenizer_of_published_checkpoints(own_folder: Path) -> None:
    """They have sentencepiece's file and none of the tokenizers library."""
    shutil.rmtree(own_folder / "tokenizer")
    write_tokenizer(own_folder / "tokenizer")
    assert generates_the_same(PixArtSigmaPipeline.from_pretrained(own_folder), tiny_pipeline(PixArtSigmaPipeline))


def test_a_damaged_tokenizer(own_folder: Path) -> None:
    (own_folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_a_missing_weight_file(own_folder: Path) -> None:
    (own_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="holds no weights"):
        PixArtSigmaPipeline.from_pretrained(own_folder)


def test_no_network() -> None:
    with pytest.raises(HubError, match="PixArt-alpha/nothing-here"):
        PixArtSigmaPipeline.from_pretrained("PixArt-alpha/nothing-here")


def test_only_the_needed_files_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(model: str, *, allow_patterns: list[str], **options: Any) -> Path:
        if Path(model) != Path("owner/name"):
            return Path(model)  # the component's own class, which reads the folder that was found
        assert options["revision"] == "main"
        asked.extend(allow_patterns)
        return folder

    monkeypatch.setattr(loading.hub, "resolve", resolve)
    pipe = PixArtSigmaPipeline.from_pretrained("owner/name", revision="main", text_encoder=None, transformer=None)
    assert pipe.vae is not None
    folders = {pattern.split("/")[0] for pattern in asked if "/" in pattern}
    assert folders == {"vae", "scheduler", "tokenizer"}
    assert "vae/diffusion_pytorch_model.safetensors" in asked
    assert not any(pattern.endswith(".bin") for pattern in asked)


def test_pickled_weights_are_asked_for_where_there_are_no_others(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tiny_vae().state_dict(), own_folder / "vae" / "diffusion_pytorch_model.bin")
    (own_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    transformer = own_folder / "transformer"
    shutil.copy(transformer / f"{WEIGHTS_NAME}.safetensors", transformer / f"{WEIGHTS_NAME}.fp16.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(
        loading.hub, "resolve", lambda model, *, allow_patterns, **_: asked.extend(allow_patterns) or own_folder
    )
    source = loading.Source("owner/name", None, "fp16", None, {})
    index = source.read_index("PixArtSigmaPipeline")
    source.fetch(index, COMPONENTS, "PixArtSigmaPipeline")
    assert "vae/diffusion_pytorch_model.fp16.bin" in asked
    assert "vae/diffusion_pytorch_model.bin" in asked
    assert "transformer/diffusion_pytorch_model.fp16.bin" not in asked
    assert "transformer/diffusion_pytorch_model.safetensors" not in asked
    asked.clear()
    loading.Source("owner/name", None, None, False, {}).fetch(index, COMPONENTS, "PixArtSigmaPipeline")
    assert not any(pattern.endswith(".safetensors") for pattern in asked)
    monkeypatch.undo()
    pipe = PixArtSigmaPipeline.from_pretrained(own_folder)
    assert generates_the_same(pipe, tiny_pipeline(PixArtSigmaPipeline))


# --- dtype and device ---


def test_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert {component.dtype for component in (again.transformer, again.vae, again.text_encoder)} == {torch.float32}
    stored = PixArtSigmaPipeline.from_pretrained(tmp_path, torch_dtype="auto")
    assert {component.dtype for component in (stored.transformer, stored.vae, stored.text_encoder)} == {torch.bfloat16}
    assert stored.dtype == torch.bfloat16


def test_a_dtype_for_each_part(folder: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(
        folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float16, "vae": "float64"}
    )
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.float16,
        torch.float64,
    )
    pipe = PixArtSigmaPipeline.from_pretrained(folder, dtype={"transformer": "bf16"})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(InputError, match="unet"):
        PixArtSigmaPipeline.from_pretrained(folder, dtype={"unet": torch.float16})


def dtypes_of(encoder: T5EncoderModel) -> dict[bool, set[torch.dtype]]:
    """The dtypes of the last layers of the feed-forwards (True), and of everything else (False)."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, parameter in encoder.named_parameters():
        found[".wo." in name].add(parameter.dtype)
    return found


def test_t5_keeps_its_sensitive_weights_in_float32(folder: Path) -> None:
    expected = {True: {torch.float32}, False: {torch.float16}}
    loaded = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    assert dtypes_of(loaded.text_encoder) == expected

    cast = PixArtSigmaPipeline.from_pretrained(folder).to(torch.float16)
    assert dtypes_of(cast.text_encoder) == expected
    pairs = zip(loaded.text_encoder.parameters(), cast.text_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {p.dtype for p in cast.transformer.parameters()} == {torch.float16}

    assert dtypes_of(cast.to(torch.bfloat16).text_encoder) == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert dtypes_of(cast.to(torch.float16).text_encoder) == expected


def test_t5_in_float16_does_not_overflow(folder: Path) -> None:
    """A feed-forward whose result exceeds 65504 is infinite after a plain cast, and finite in the pipeline."""
    encoder = tiny_text_encoder()
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e4)
    expected = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder).encode_prompt("a cat")[0]
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder).to(torch.float16)
    found = pipe.encode_prompt("a cat")[0]
    assert torch.isfinite(found).all()
    assert (found.float() - expected).norm() / expected.norm() < 0.05


def test_to_takes_the_forms_of_diffusers() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.float64).dtype == torch.float64
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(dtype=torch.bfloat16, silence_dtype_warnings=True).dtype == torch.bfloat16
    assert pipe.to(device=torch.device("meta")).device == torch.device("meta")
    for wrong in ((torch.float16, torch.float16), ("cpu", "cpu"), ("cpu", torch.float16, 3), (torch.int8,)):
        with pytest.raises(InputError):
            pipe.to(*wrong)
    with pytest.raises(InputError, match="two values for dtype"):
        pipe.to(torch.float16, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_generates_nearly_the_same(dtype: torch.dtype) -> None:
    expected = draw(tiny_pipeline(PixArtSigmaPipeline))
    pipe = tiny_pipeline(PixArtSigmaPipeline).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pipe("a cat", num_inference_steps=2, latents=noise, output_type="pt").images
    assert (found.float() - expected).abs().max() < 0.1


# --- sharing ---


def test_from_pipe_shares_its_parts() -> None:
    alpha = tiny_pipeline(PixArtAlphaPipeline)
    scheduler = DDIMScheduler()
    sigma = PixArtSigmaPipeline.from_pipe(alpha, scheduler=scheduler, vae=None)
    assert sigma.transformer is alpha.transformer
    assert sigma.text_encoder is alpha.text_encoder
    assert sigma.scheduler is scheduler
    assert sigma.vae is None
    assert alpha.scheduler is not scheduler
    back = PixArtAlphaPipeline.from_pipe(sigma, vae=alpha.vae, torch_dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    with pytest.raises(InputError, match="no component 'unet'"):
        PixArtAlphaPipeline.from_pipe(sigma, unet=None)


# --- components of the wrong family ---


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize(
    ("cls", "overrides", "expected"),
    [
        (PixArtSigmaPipeline, {"vae": {"scaling_factor": 0.18215}}, "the vae is that of PixArt-α"),
        (PixArtAlphaPipeline, {"vae": {"scaling_factor": 0.13025}}, "the vae is that of PixArt-Σ"),
        (PixArtSigmaPipeline, {"vae": {"latent_channels": 16}}, "16 latent_channels"),
        (PixArtSigmaPipeline, {"transformer": {"caption_channels": 48}}, "embeddings of 32 channels"),
        (PixArtSigmaPipeline, {"transformer": {"use_additional_conditions": True}}, "micro-conditions"),
        (PixArtSigmaPipeline, {"tokenizer": 120}, "tokenizer is that of PixArt-α"),
        (PixArtAlphaPipeline, {"tokenizer": 300}, "tokenizer is that of PixArt-Σ"),
    ],
    ids=str,
)
def test_parts_of_the_wrong_family_are_named(
    cls: type[Any], overrides: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    make = {
        "vae": lambda options: tiny_vae(**options),
        "transformer": lambda options: tiny_transformer(**options),
        "tokenizer": tiny_tokenizer,
    }
    pipe = tiny_pipeline(cls, **{name: make[name](options) for name, options in overrides.items()})
    assert expected in warnings_of(caplog)
    assert type(pipe).__name__ in warnings_of(caplog)


def test_right_parts_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    for cls, factor in ((PixArtSigmaPipeline, 0.13025), (PixArtAlphaPipeline, 0.18215), (PixArtSigmaPipeline, 0.7)):
        draw(tiny_pipeline(cls, vae=tiny_vae(scaling_factor=factor)))
    assert warnings_of(caplog) == ""


def test_a_part_that_is_replaced_is_looked_at_in_the_next_call_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.vae = tiny_vae(scaling_factor=0.18215)
    draw(pipe)
    draw(pipe)
    assert warnings_of(caplog).count("the vae is that of PixArt-α") == 1


def test_the_wrong_class_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    PixArtAlphaPipeline.from_pretrained(folder, text_encoder=None)
    assert "was saved by PixArtSigmaPipeline and is loaded as PixArtAlphaPipeline" in warnings_of(caplog)


# --- placement ---


class Recording(Resident):
    """A placement that moves nothing and writes down which component was in use."""

    def __init__(self, pipe: PixArtSigmaPipeline):
        self.names = {id(component): name for name, component in pipe.components.items()}
        self.log: list[str] = []
        self.in_use: str | None = None

    @contextmanager
    def using(self, component: nn.Module) -> Iterator[None]:
        assert self.in_use is None
        self.in_use = self.names[id(component)]
        yield
        self.log.append(self.in_use)
        self.in_use = None


def test_a_call_uses_one_part_after_the_other() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.placement = recording = Recording(pipe)
    draw(pipe)
    assert [name for name, _ in itertools.groupby(recording.log)] == ["text_encoder", "transformer", "vae"]


def test_offload_on_this_machine_generates_the_same() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert isinstance(pipe.placement, OneAtATime)
    assert pipe.device == torch.device("cpu")
    assert torch.equal(draw(pipe), expected)
    assert PixArtAlphaPipeline.from_pipe(pipe).placement is pipe.placement
    pipe.to("cpu")
    assert isinstance(pipe.placement, Resident)


def test_the_device_to_offload_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator, gpu_id, device, expected in (
        (None, None, None, "cpu"),
        (None, None, "cuda:1", "cuda:1"),
        ("cuda", None, None, "cuda"),
        ("cuda", 1, None, "cuda:1"),
        ("cuda", 1, "cuda", "cuda:1"),
        ("cuda", None, "cpu", "cpu"),
    ):
        found = accelerator and torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert offload_device(gpu_id, device) == torch.device(expected)
    with pytest.raises(InputError, match="contradict"):
        offload_device(1, "cuda:0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ResourceError, match="no accelerator"):
        offload_device(0, None)


@pytest.mark.gpu
def test_offload_to_a_gpu() -> None:
    expected = draw(tiny_pipeline(PixArtSigmaPipeline))
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_model_cpu_offload()
    assert pipe.device.type == "cuda"
    assert (draw(pipe).cpu() - expected).abs().max() < 1e-3
    for component in (pipe.text_encoder, pipe.transformer, pipe.vae):
        assert {p.device.type for p in component.parameters()} == {"cpu"}
    resident = tiny_pipeline(PixArtSigmaPipeline).to("cuda")
    assert (draw(resident).cpu() - expected).abs().max() < 1e-3


# --- progress ---


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.set_progress_bar_config(desc="drawing")
    pipe("a cat", num_inference_steps=3, output_type="latent")
    shown = capsys.readouterr().err
    assert "drawing: 100%" in shown
    assert "3/3" in shown
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    pipe.set_progress_bar_config(disable=True)
    capsys.readouterr()
    pipe("a cat", num_inference_steps=3, output_type="latent")
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="iterable or a total"):
        pipe.progress_bar()
