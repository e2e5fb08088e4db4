"""Ours as objects of diffusers, over the same tensors, and objects of diffusers loaded next to ours."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import impasto
from impasto.errors import (
    CheckpointError,
    ConfigurationError,
    InputError,
    MissingDependencyError,
    WeightsMismatchError,
)
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.pipelines.pixart_edits import PixArtSigmaImg2ImgPipeline
from impasto.transforms.layerwise_casting import apply_layerwise_casting

from .tiny import tiny_pipeline, tiny_transformer, tiny_vae
from .tiny_glm import pipelines

CALL = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "use_resolution_binning": False}
WITHOUT_TEXT = {"text_encoder": None, "tokenizer": None}


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**CALL, **options, generator=torch.Generator().manual_seed(0)).images)


# --- ours -> theirs ---


@pytest.mark.parametrize("make", [tiny_transformer, tiny_vae], ids=["transformer", "vae"])
def test_a_model_shares_every_tensor(make: Any) -> None:
    ours = make()
    theirs = impasto.to_diffusers(ours)
    assert type(theirs) is getattr(diffusers, type(ours).__name__)
    assert not theirs.training
    own = dict(ours.named_parameters())
    shared = dict(theirs.named_parameters())
    assert own.keys() == shared.keys()
    assert all(shared[name] is parameter for name, parameter in own.items())
    assert {tensor.device.type for tensor in theirs.buffers()} <= {"cpu"}


def test_a_change_of_one_is_seen_by_the_other() -> None:
    ours = tiny_transformer()
    theirs = impasto.to_diffusers(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    options = {
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    latents = torch.randn(1, 4, 8, 8)
    before = ours(latents, **options).sample
    theirs(latents, **options).sample.square().mean().backward()
    optimizer.step()
    after = ours(latents, **options).sample
    expected = theirs(latents, **options).sample
    assert not torch.allclose(before, after)
    assert torch.allclose(after, expected, atol=1e-5)


def test_without_accelerate_it_shares_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffusers.AutoencoderKL  # its own import needs accelerate
    monkeypatch.setitem(sys.modules, "accelerate", None)
    ours = tiny_vae()
    theirs = dict(impasto.to_diffusers(ours).named_parameters())
    assert all(theirs[name] is parameter for name, parameter in ours.named_parameters())


def test_a_pipeline_generates_and_saves_the_same(tmp_path: Path) -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline)
    theirs = impasto.to_diffusers(ours)
    assert type(theirs) is diffusers.PixArtSigmaPipeline
    expected = draw(ours)
    assert torch.allclose(draw(theirs), expected, atol=1e-5)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(draw(PixArtSigmaPipeline.from_pretrained(tmp_path)), expected, atol=1e-5)
    back = PixArtSigmaPipeline.from_pipe(theirs)
    assert back.transformer is theirs.transformer
    assert torch.allclose(draw(back), expected, atol=1e-5)
    again = impasto.to_diffusers(back)
    assert again.transformer is theirs.transformer
    # diffusers compares classes, and our pipeline has used the components.
    pag = diffusers.PixArtSigmaPAGPipeline.from_pipe(again, pag_applied_layers=["blocks.1"])
    assert pag.transformer is theirs.transformer


def test_pag_of_diffusers_runs_on_ours() -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline)
    theirs = impasto.to_diffusers(ours)
    pag = diffusers.PixArtSigmaPAGPipeline(**theirs.components, pag_applied_layers=["blocks.1"])
    assert not torch.allclose(draw(pag, pag_scale=3.0), draw(ours), atol=1e-3)


def test_a_pipeline_for_edits_is_that_of_its_family() -> None:
    edits = tiny_pipeline(PixArtSigmaImg2ImgPipeline, **WITHOUT_TEXT)
    assert type(impasto.to_diffusers(edits)) is diffusers.PixArtSigmaPipeline


def test_glm_image() -> None:
    ours, _ = pipelines()
    theirs = impasto.to_diffusers(ours)
    assert type(theirs) is diffusers.GlmImagePipeline
    assert all(a is b for a, b in zip(ours.transformer.parameters(), theirs.transformer.parameters(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "LCMScheduler",
    ],
)
def test_schedulers(name: str) -> None:
    ours = getattr(impasto, name)(num_train_timesteps=500)
    theirs = impasto.to_diffusers(ours)
    assert type(theirs) is getattr(diffusers, name)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps.float())


def test_switches_of_the_autoencoder_are_kept() -> None:
    vae = tiny_vae()
    vae.enable_slicing()
    theirs = impasto.to_diffusers(vae)
    assert theirs.use_slicing
    assert not theirs.use_tiling


def test_what_is_not_ours_stays_and_nonsense_is_refused() -> None:
    theirs = diffusers.AutoencoderTiny()
    assert impasto.to_diffusers(theirs) is theirs
    with pytest.raises(InputError, match="takes a model, a scheduler or a pipeline"):
        impasto.to_diffusers(3)


def test_changed_layers_are_refused() -> None:
    import peft

    model = tiny_transformer()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), model)
    with pytest.raises(ConfigurationError, match=r"was not given to diffusers.*fuse_lora"):
        impasto.to_diffusers(model)
    pytest.importorskip("torchao")
    quantized = tiny_transformer()
    impasto.quantize(quantized, "int8-weight-only", keep_originals=False)
    with pytest.raises(ConfigurationError):
        impasto.to_diffusers(quantized)


def test_layers_that_need_our_code_to_run_are_refused() -> None:
    model = tiny_transformer()
    casting = apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ConfigurationError, match=r"narrow dtype and cannot be given to diffusers; .*remove\(\)"):
        impasto.to_diffusers(model)
    with pytest.raises(ConfigurationError, match="cannot be given to diffusers"):
        impasto.to_diffusers(tiny_pipeline(PixArtSigmaPipeline, transformer=model, **WITHOUT_TEXT))
    casting.remove()
    assert type(impasto.to_diffusers(model)) is diffusers.PixArtTransformer2DModel
    assert model.enable_layerwise_casting() is None
    with pytest.raises(ConfigurationError, match=r"call its disable_layerwise_casting\(\)"):
        impasto.to_diffusers(model)
    model.disable_layerwise_casting()
    assert type(impasto.to_diffusers(model)) is diffusers.PixArtTransformer2DModel
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    pytest.importorskip("torchao")
    impasto.quantize(model, "int8-weight-only", keep_originals=True)
    with pytest.raises(ConfigurationError, match=r"cannot be given to diffusers; dequantize\(\) the model"):
        impasto.to_diffusers(model)


class OwnTransformer(impasto.PixArtTransformer2DModel):
    pass


class OwnScheduler(impasto.DDIMScheduler):
    pass


class OwnPipeline(PixArtSigmaPipeline):
    pass


class OwnEdits(PixArtSigmaImg2ImgPipeline):
    pass


@pytest.mark.parametrize("kind", [OwnPipeline, OwnEdits])
def test_a_subclass_becomes_what_its_base_would(kind: Any) -> None:
    model = OwnTransformer.from_config(tiny_transformer().config)
    ours = tiny_pipeline(kind, transformer=model, scheduler=OwnScheduler(), **WITHOUT_TEXT)
    theirs = impasto.to_diffusers(ours)
    assert type(theirs) is diffusers.PixArtSigmaPipeline
    assert type(theirs.transformer) is diffusers.PixArtTransformer2DModel
    assert type(theirs.scheduler) is diffusers.DDIMScheduler
    shared = dict(theirs.transformer.named_parameters())
    assert all(shared[name] is parameter for name, parameter in model.named_parameters())


# --- theirs, loaded ---


@pytest.fixture
def with_foreign_parts(tmp_path: Path) -> Path:
    """A pipeline of ours with a scheduler and an autoencoder of diffusers, saved by us."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_end=0.02)
    tiny_pipeline(PixArtSigmaPipeline, vae=vae, scheduler=scheduler, **WITHOUT_TEXT).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_foreign_parts_are_loaded_again(with_foreign_parts: Path) -> None:
    index = json.loads((with_foreign_parts / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    pipe = PixArtSigmaPipeline.from_pretrained(with_foreign_parts, dtype={"vae": torch.bfloat16})
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert pipe.scheduler.config.beta_end == 0.02
    assert type(pipe.vae) is diffusers.AutoencoderTiny
    assert (pipe.vae.dtype, pipe.vae.training) == (torch.bfloat16, False)
    stored = PixArtSigmaPipeline.from_pretrained(with_foreign_parts, dtype="auto").vae.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


def test_a_memory_budget_with_foreign_parts(with_foreign_parts: Path) -> None:
    options = {"memory_budget": "8GB", "vae": tiny_vae()}
    assert PixArtSigmaPipeline.from_pretrained(with_foreign_parts, **options).scheduler.config.beta_end == 0.02
    with pytest.raises(CheckpointError, match=r"AutoencoderTiny of diffusers, whose memory is not known.*vae=\.\.\."):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, memory_budget="8GB")


def test_without_diffusers_the_error_names_the_install(
    with_foreign_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"EulerDiscreteScheduler.*pip install diffusers"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, vae=None)
    with pytest.raises(MissingDependencyError, match="pip install diffusers"):
        impasto.to_diffusers(tiny_vae())


@pytest.mark.parametrize(
    ("component", "name", "expected"),
    [
        ("scheduler", "NoSuchScheduler", "has no scheduler 'NoSuchScheduler'"),
        ("scheduler", "KarrasDiffusionScheduler", "has no scheduler"),
        ("scheduler", "FlaxDDIMScheduler", "has no scheduler|cannot be used"),
        ("vae", "AutoencoderNothing", "has no vae"),
        ("vae", "UNet2DConditionModel", "from_pretrained"),
        ("scheduler", "SchedulerMixin", "from_pretrained"),
        ("transformer", "SD3Transformer2DModel", "from_pretrained"),
    ],
)
def test_only_classes_that_fit_the_role(with_foreign_parts: Path, component: str, name: str, expected: str) -> None:
    path = with_foreign_parts / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), component: ["diffusers", name]}))
    with pytest.raises(CheckpointError, match=expected):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_hostile_configs_of_foreign_parts(with_foreign_parts: Path) -> None:
    edit(with_foreign_parts / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    with pytest.raises(ConfigurationError, match="num_train_timesteps"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, vae=None)
    edit(with_foreign_parts / "scheduler" / "scheduler_config.json", num_train_timesteps=100, beta_schedule="evil")
    with pytest.raises(CheckpointError, match="EulerDiscreteScheduler"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, vae=None)
    edit(with_foreign_parts / "vae" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="quantized AutoencoderTiny is not loaded"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, scheduler=None)


def test_weights_of_a_foreign_part_in_two_forms_are_an_error(with_foreign_parts: Path) -> None:
    folder = with_foreign_parts / "vae"
    diffusers.AutoencoderTiny.from_pretrained(folder).save_pretrained(folder / "many", max_shard_size="2KB")
    for path in (folder / "many").glob("diffusion_pytorch_model*"):
        shutil.copy(path, folder)
    with pytest.raises(CheckpointError, match=r"holds its weights twice, in diffusion_pytorch_model.safetensors and"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, scheduler=None)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert type(PixArtSigmaPipeline.from_pretrained(with_foreign_parts).vae) is diffusers.AutoencoderTiny


def test_weights_that_do_not_fit_a_foreign_part_are_an_error(with_foreign_parts: Path) -> None:
    edit(with_foreign_parts / "vae" / "config.json", num_decoder_blocks=[2, 1])
    with pytest.raises((WeightsMismatchError, CheckpointError), match="AutoencoderTiny"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, scheduler=None)


@pytest.mark.parametrize(
    "values",
    [
        {"num_decoder_blocks": [200_000, 1]},
        {"num_encoder_blocks": [1, 10**30]},
        {"decoder_block_out_channels": [8] * 100_000, "num_decoder_blocks": [1] * 100_000},
        {"decoder_block_out_channels": [8, 1_000_000]},
        {"latent_channels": 10**8},
    ],
)
def test_a_config_cannot_ask_for_more_than_the_weights_hold(
    with_foreign_parts: Path, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(with_foreign_parts / "vae" / "config.json", **values)
    monkeypatch.setattr(diffusers.AutoencoderTiny, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(WeightsMismatchError, match=r"config.json.* the weights.*do not belong together"):
        PixArtSigmaPipeline.from_pretrained(with_foreign_parts, scheduler=None)
