"""Classes that choose a class, and the config of a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import T5EncoderModel

import impasto
from impasto.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError

from ..tiny import tiny_pipeline, tiny_vae, write_pipeline
from ..tiny_glm import pipelines, prior_parts

LIGHT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sigma"), impasto.PixArtSigmaPipeline)


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("alpha"), impasto.PixArtAlphaPipeline, **LIGHT)


def test_any_pipeline_has_the_class_of_its_index(sigma: Path, alpha: Path) -> None:
    assert type(impasto.DiffusionPipeline.from_pretrained(alpha)) is impasto.PixArtAlphaPipeline
    pipe = impasto.DiffusionPipeline.from_pretrained(sigma, torch_dtype=torch.bfloat16, **LIGHT)
    assert type(pipe) is impasto.PixArtSigmaPipeline
    assert pipe.dtype == torch.bfloat16
    assert isinstance(pipe, impasto.DiffusionPipeline)
    nested = impasto.DiffusionPipeline.from_pretrained(sigma.parent, subfolder=sigma.name, **LIGHT)
    assert type(nested) is impasto.PixArtSigmaPipeline
    assert impasto.DiffusionPipeline.download(sigma) == sigma


def test_unknown_pipelines_are_named(sigma: Path, tmp_path: Path) -> None:
    content = json.loads((sigma / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**content, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match=r"'StableDiffusionPipeline' is not one of.*PixArtSigmaPipeline"):
        impasto.DiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="AutoModel"):
        impasto.DiffusionPipeline.from_pretrained(sigma / "vae")


@pytest.mark.parametrize(
    ("auto", "of_sigma", "of_alpha"),
    [
        ("AutoPipelineForText2Image", "PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        ("AutoPipelineForImage2Image", "PixArtSigmaImg2ImgPipeline", "PixArtAlphaImg2ImgPipeline"),
        ("AutoPipelineForInpainting", "PixArtSigmaInpaintPipeline", "PixArtAlphaInpaintPipeline"),
    ],
)
def test_a_pipeline_for_a_task(sigma: Path, alpha: Path, auto: str, of_sigma: str, of_alpha: str) -> None:
    cls = getattr(impasto, auto)
    pipe = cls.from_pretrained(sigma, **LIGHT)
    assert type(pipe).__name__ == of_sigma
    assert type(cls.from_pretrained(alpha)).__name__ == of_alpha
    for other in ("AutoPipelineForText2Image", "AutoPipelineForInpainting"):
        turned = cls.from_pipe(getattr(impasto, other).from_pipe(pipe))
        assert type(turned) is type(pipe)
        assert turned.transformer is pipe.transformer
    theirs = impasto.to_diffusers(pipe)
    assert type(cls.from_pipe(theirs, vae=None, requires_safety_checker=False)) is type(pipe)
    assert impasto.DiffusionPipeline.from_pipe(theirs).transformer is theirs.transformer
    with pytest.raises(InputError, match="PAG pipeline runs on to_diffusers"):
        cls.from_pretrained(sigma, enable_pag=True)
    with pytest.raises(InputError, match="from_pretrained or from_pipe"):
        cls()


def test_tasks_of_glm_image() -> None:
    pipe, _ = pipelines()
    assert type(impasto.AutoPipelineForImage2Image.from_pipe(pipe)) is impasto.GlmImagePipeline
    with pytest.raises(CheckpointError, match="no inpainting with GlmImagePipeline"):
        impasto.AutoPipelineForInpainting.from_pipe(pipe)


def test_models_by_their_config(sigma: Path) -> None:
    for subfolder, expected in (
        ("transformer", impasto.PixArtTransformer2DModel),
        ("vae", impasto.AutoencoderKL),
        ("scheduler", impasto.DPMSolverMultistepScheduler),
        ("text_encoder", T5EncoderModel),
    ):
        assert isinstance(impasto.AutoModel.from_pretrained(sigma, subfolder), expected)
    model = impasto.AutoModel.from_pretrained(sigma / "vae", torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    encoder = impasto.AutoModel.from_pretrained(sigma, subfolder="text_encoder", torch_dtype="float16")
    assert encoder.dtype == torch.float16
    with pytest.raises(InputError, match="trust_remote_code"):
        impasto.AutoModel.from_pretrained(sigma, subfolder="text_encoder", trust_remote_code=True)


def test_a_text_encoder_is_downloaded_with_its_weights(
    sigma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.relative_to(sigma).as_posix() for path in sigma.rglob("*") if path.is_file()]
    forced = []

    def download(repo_id: str, force_download: bool = False, **options: Any) -> str:
        filters = {key: options[key] for key in ("allow_patterns", "ignore_patterns") if key in options}
        forced.append(force_download)
        for name in huggingface_hub.utils.filter_repo_objects(names, **filters):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(sigma / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    encoder = impasto.AutoModel.from_pretrained("owner/name", subfolder="text_encoder", force_download=True)
    assert isinstance(encoder, T5EncoderModel)
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder"]
    assert all(forced)


def test_an_index_that_diffusers_writes_for_glm_image(tmp_path: Path) -> None:
    """It takes the name of a module in transformers for that of a pipeline."""
    pipe, _ = pipelines()
    pipe = impasto.GlmImagePipeline(**{**pipe.components, **prior_parts()})
    impasto.to_diffusers(pipe).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["processor"] == ["glm_image", "GlmImageProcessor"]
    assert type(impasto.DiffusionPipeline.from_pretrained(tmp_path).processor).__name__ == "GlmImageProcessor"


def test_a_model_of_another_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(CheckpointError, match="'UNet2DConditionModel', which is not a class of this package"):
        impasto.AutoModel.from_pretrained(tmp_path)


# --- the config of a pipeline ---


def test_the_config_names_the_components(sigma: Path) -> None:
    pipe = impasto.PixArtSigmaPipeline.from_pretrained(sigma, text_encoder=None)
    assert dict(pipe.config) == {
        "_class_name": "PixArtSigmaPipeline",
        "_diffusers_version": "0.42.1",
        "_name_or_path": str(sigma),
        "tokenizer": ("transformers", "T5Tokenizer"),
        "text_encoder": (None, None),
        "vae": ("diffusers", "AutoencoderKL"),
        "transformer": ("diffusers", "PixArtTransformer2DModel"),
        "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
    }
    assert pipe.config.vae == ("diffusers", "AutoencoderKL")
    assert pipe.name_or_path == str(sigma)
    built = tiny_pipeline(impasto.PixArtSigmaPipeline, **LIGHT)
    assert built.name_or_path is None
    assert list(built.config) == list(built.components)
    assert json.loads(built.to_json_string())["_class_name"] == "PixArtSigmaPipeline"
    pipe.scheduler = impasto.DDIMScheduler()
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
    with pytest.raises(ConfigurationError):
        pipe.config["vae"] = None
    pipe.register_to_config(note="mine")
    assert pipe.config.note == "mine"
    assert json.loads(pipe.to_json_string())["note"] == "mine"


def test_the_config_is_written_and_read(sigma: Path, tmp_path: Path) -> None:
    cls = impasto.PixArtSigmaPipeline
    assert (cls.config_name, cls.has_compatibles, cls.ignore_for_config) == ("model_index.json", False, [])
    pipe = cls.from_pretrained(sigma)
    pipe.save_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
    pipe.to_json_file(tmp_path / "copy.json")
    stored = json.loads((sigma / "model_index.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == stored
    assert cls.load_config(tmp_path) == cls.get_config_dict(sigma) == stored
    assert cls.load_config(sigma, return_unused_kwargs=True, colour=1) == (stored, {"colour": 1})
    with pytest.raises(CheckpointNotFoundError):
        cls.load_config(sigma / "vae")


def test_options_of_a_download_are_checked(sigma: Path) -> None:
    cls = impasto.PixArtSigmaPipeline
    for method in (cls.download, impasto.DiffusionPipeline.download, cls.load_config, cls.get_config_dict):
        with pytest.raises(InputError, match=r"has no argument 'revison'; did you mean 'revision'"):
            method(sigma, revison="v2")
        with pytest.raises(InputError, match="HTTPS_PROXY"):
            method(sigma, proxies={"https": "x"})
        method(sigma, resume_download=True, force_download=True, revision="v2")
    with pytest.raises(InputError, match="HTTPS_PROXY"):
        cls.load_config(sigma, return_unused_kwargs=True, proxies={"https": "x"})
    with pytest.raises(InputError, match="no code of a checkpoint"):
        cls.download(sigma, trust_remote_code=True)
    assert cls.download(sigma, text_encoder=None, torch_dtype=torch.float16) == sigma


def test_values_that_json_does_not_have_are_written_as_text(tmp_path: Path) -> None:
    pipe = tiny_pipeline(impasto.PixArtSigmaPipeline, **LIGHT)
    pipe.register_to_config(place=torch.device("cpu"), self=[tmp_path])
    assert pipe.config.place == torch.device("cpu")
    assert '"place": "cpu"' in repr(pipe)
    pipe.save_config(tmp_path)
    pipe.to_json_file(tmp_path / "other.json")
    for text in (
        pipe.to_json_string(),
        *((tmp_path / name).read_text() for name in ("model_index.json", "other.json")),
    ):
        assert json.loads(text)["place"] == "cpu"
        assert json.loads(text)["self"] == [str(tmp_path)]


def test_components_are_registered(sigma: Path) -> None:
    pipe = tiny_pipeline(impasto.PixArtSigmaPipeline, **LIGHT)
    vae = tiny_vae(seed=1)
    pipe.register_modules(vae=vae)
    assert pipe.vae is pipe.components["vae"] is vae
    with pytest.raises(InputError, match="no component 'unet'"):
        pipe.register_modules(unet=None)
    with pytest.raises(InputError, match=r"no component 'va'; it has tokenizer, .*; did you mean 'vae'\?"):
        impasto.PixArtSigmaPipeline.from_config({}, va=vae)
    made = impasto.PixArtSigmaPipeline.from_config(pipe.config, vae=vae)
    assert made.vae is vae
    assert made.transformer is None
    chosen, unused, hidden = impasto.PixArtSigmaPipeline.extract_init_dict(
        impasto.PixArtSigmaPipeline.load_config(sigma), vae=vae, colour=1
    )
    assert chosen["vae"] is vae
    assert unused == {"colour": 1}
    assert hidden["_class_name"] == "PixArtSigmaPipeline"
    impasto.PixArtSigmaPipeline.register_for_auto_class()
    assert "auto_map" not in pipe.config
