"""The models that a configuration names, loaded or new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints import hub
from ...checkpoints.layout import INDEX_NAME
from ...checks import nearest, shown
from ...errors import ConfigurationError
from ...family import ALPHA, GLM_IMAGE, SIGMA, Family, family_of
from ...files import make_folder
from ...memory.inspection import resolve_pipeline
from ...models.autoencoder.model import AutoencoderKL
from ...models.glm_image.model import GlmImageTransformer2DModel
from ...models.pixart.model import PixArtTransformer2DModel
from ...pipelines.image_files import save_image
from ...pipelines.loading import load_component
from ...schedulers.dpm_solver import DPMSolverMultistepScheduler
from ...transforms.quantize import Method, quantize
from ..objectives.text_to_image import initialize
from ..running.masters import working_dtype
from ..settings.configuration import (
    AutoencoderSettings,
    ComponentSettings,
    Configuration,
    ModelSettings,
    SampleSettings,
    TextEncoderSettings,
)
from .fitting import check_fit
from .start import start_stage

FAMILIES: Mapping[str, Family] = {"alpha": ALPHA, "sigma": SIGMA, "glm-image": GLM_IMAGE}

#: What objectives can train from nothing. Distillation, like an adapter, goes on from what a model knows.
_FROM_NOTHING = {"text-to-image": "transformer", "autoencoder": "vae", "text-encoder": "text_encoder"}


@dataclass
class Components:
    """Those of a pipeline; what a run does not need is None."""

    family: Family
    transformer: Any = None
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler: Any = None
    processor: Any = None
    prior: Any = None  # GLM-Image's vision_language_encoder
    empty_text: Tensor | None = None  # stored features of the empty caption
    #: Where components are stored that are not trained, and may compute in a lower precision meanwhile.
    stored: dict[str, Path] = field(default_factory=dict)

    def as_stored(self) -> Components:
        """The same with those that are not trained as they are stored."""
        found = replace(self)
        if "vae" in self.stored:
            found.vae = AutoencoderKL.from_pretrained(self.stored["vae"], dtype="auto")
        if "text_encoder" in self.stored:
            kind = ["transformers", "T5EncoderModel"]
            found.text_encoder = load_component(kind, self.stored["text_encoder"], None, None, None)
        return found

    def pipeline(self) -> Any:
        """A pipeline of the live models."""
        if self.family is GLM_IMAGE:
            from ...pipelines.glm_image import GlmImagePipeline

            parts = {"vision_language_encoder": self.prior, "vae": self.vae, "scheduler": self.scheduler}
            pipe: Any = GlmImagePipeline(
                tokenizer=self.tokenizer,
                processor=self.processor,
                text_encoder=self.text_encoder,
                transformer=self.transformer,
                **parts,
            )
            pipe.set_progress_bar_config(disable=True)
            return pipe
        from ...pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline

        cls = PixArtAlphaPipeline if self.family is ALPHA else PixArtSigmaPipeline
        pipe = cls(self.tokenizer, self.text_encoder, self.vae, self.transformer, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def write_samples(self, settings: SampleSettings, usual: Mapping[str, Any], folder: Path | None, step: int) -> None:
        """Generate images of fixed prompts with fixed seeds, and write them as PNG files if there is a folder.

        Args:
            usual: arguments of the pipeline, of which settings may change some; see ``prompts`` and ``sampling`` of
                ``Objective``.
        """
        generators = [torch.Generator().manual_seed(i) for i in range(len(settings.prompts))]
        chosen = settings.model_dump(include={"guidance_scale", "timesteps", "height", "width"}, exclude_none=True)
        if settings.steps is not None and settings.timesteps is None:
            chosen |= {"num_inference_steps": settings.steps, "timesteps": None}
        images = self.pipeline()(**{**usual, **chosen}, generator=generators).images
        if folder is not None:
            make_folder(folder)
            for i, image in enumerate(images):
                save_image(image, folder / f"step-{step:08d}-{i}.png")


def family_of_models(models: ModelSettings) -> Family:
    """The family of a run: that of its pipeline, unless another one is given for a transformer from elsewhere.

    Raises:
        ConfigurationError: the pipeline is of another family than the one given.
        CheckpointError: it is not a pipeline.
    """
    given = None if models.family is None else FAMILIES[models.family]
    if models.pipeline is None:
        return given or SIGMA
    _, class_name = resolve_pipeline(models.pipeline)
    own = family_of(class_name)
    if given is own or (given is None and own is not GLM_IMAGE):
        return own
    if given is None or GLM_IMAGE in (given, own) or not models.transformer.is_given:
        name = next(name for name, family in FAMILIES.items() if family is own)
        raise ConfigurationError(
            f"models.family: {models.pipeline} is a {class_name}; set it to {name}, or name another models.pipeline"
        )
    return given


def load(configuration: Configuration, device: torch.device, texts_are_stored: bool = False) -> Components:
    """Load or make the models of a run.

    New weights depend on the seed alone.

    Raises:
        ConfigurationError: a model that is needed is not named, or models or sizes of images do not fit.
        CheckpointError: a folder is not one of a model, or weights do not fit its config.
    """
    models = configuration.models
    reader = _Reader(configuration, device)
    found = Components(reader.family)
    with torch.random.fork_rng([]):
        torch.manual_seed(configuration.seed)
        if isinstance(configuration.objective, AutoencoderSettings):
            found.vae = reader.vae(models.vae, trained=True)
            check_fit(configuration, None, found.vae)
            return found
        if found.family is GLM_IMAGE:
            reader.glm_image(found)
            check_fit(configuration, found.transformer, found.vae, is_glm_image=True)
            return found
        found.tokenizer = reader.tokenizer()
        if configuration.uses_pipeline or not texts_are_stored:
            found.text_encoder = reader.text_encoder(models.text_encoder, found.tokenizer)
        if isinstance(configuration.objective, TextEncoderSettings):
            return found
        found.transformer = reader.transformer(models.transformer)
        found.vae = reader.vae(models.vae, trained=False)
        found.scheduler = reader.scheduler()
    check_fit(configuration, found.transformer, found.vae)
    for name, settings in (("vae", models.vae), ("text_encoder", models.text_encoder)):
        folder = reader.folder(name, settings) if getattr(found, name) is not None else None
        if folder is not None and not settings.train and not settings.config:
            found.stored[name] = folder
    return found


def load_encoders(configuration: Configuration, device: torch.device, texts: bool = True) -> Components:
    """The same autoencoder, and with ``texts`` text encoder and tokenizer, frozen: what a cache is made with.

    Raises:
        ConfigurationError: one of them is trained, or sizes of images do not fit.
    """
    models = configuration.models
    if texts and configuration.trains_texts:
        raise ConfigurationError(
            "the text_encoder is trained here, so what it encodes changes and cannot be cached; cache latents alone "
            "(--latents-only)"
        )
    reader = _Reader(configuration, device)
    found = Components(reader.family)
    with torch.random.fork_rng([]):
        torch.manual_seed(configuration.seed)
        if texts:
            found.tokenizer = reader.tokenizer()
            found.text_encoder = reader.text_encoder(models.text_encoder, found.tokenizer).requires_grad_(False).eval()
        found.vae = reader.vae(models.vae, trained=False).requires_grad_(False).eval()
    check_fit(configuration, None, found.vae)
    return found


_METHODS: dict[str, Method] = {"int8": "int8-weight-only", "nf4": "nf4"}


class _Reader:
    def __init__(self, configuration: Configuration, device: torch.device):
        self.models, self.device = configuration.models, device
        self.adapter, self.seed = configuration.adapter, configuration.seed
        new = None if self.adapter is not None else _FROM_NOTHING.get(configuration.objective.kind)
        self.may_be_new = {new, "text_encoder" if self.models.text_encoder.train else None}
        self.generates = configuration.samples is not None or bool(configuration.checks)
        self.generates |= any(source.generate is not None for source in configuration.data.sources)
        self.dtype = working_dtype(configuration.precision, device)
        self.family = family_of_models(self.models)
        self.pipeline = None if self.models.pipeline is None else hub.resolve(self.models.pipeline)

    def folder(self, name: str, settings: ComponentSettings) -> Path | None:
        """Where a component is stored; None if it is new.

        Raises:
            ConfigurationError: it is not given, or would be new where a trained one is needed.
        """
        if settings.start_from is not None:
            root = hub.resolve(settings.start_from)
            return root / name if (root / INDEX_NAME).exists() or (root / name).is_dir() else root
        if self.pipeline is not None and not settings.config:
            return self.pipeline / name
        if settings.config and name in self.may_be_new:
            return None
        if settings.config:
            raise ConfigurationError(
                f"models.{name}: a config alone is for a new model, and this run needs a trained one; give start_from"
            )
        raise ConfigurationError(
            f"models.{name} is not given: set models.pipeline, or models.{name}.start_from, or its config for a new one"
        )

    def transformer(self, settings: ComponentSettings) -> Any:
        folder = self.folder("transformer", settings)
        if folder is None:
            model = PixArtTransformer2DModel.from_config({}, **settings.config)
            initialize(model)
        else:
            dtype = torch.float32 if self.adapter is None else self.dtype
            model = start_stage(PixArtTransformer2DModel, folder, settings.config, seed=self.seed).to(dtype)
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return self.placed(model)

    def placed(self, transformer: Any) -> Any:
        """On the device, quantized if an adapter is trained on such weights: then it is never there as a whole."""
        if self.adapter is not None and self.adapter.base != "plain":
            quantize(transformer, _METHODS[self.adapter.base], keep_originals=False, device=self.device)
        return transformer.to(self.device)

    def vae(self, settings: ComponentSettings, trained: bool) -> Any:
        folder = self.folder("vae", settings)
        if folder is None:
            model = AutoencoderKL.from_config({}, **settings.config)
        else:
            model = AutoencoderKL.from_pretrained(folder, **settings.config)
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        dtype = torch.float32 if trained or self.dtype == torch.float16 else self.dtype
        model = model.to(self.device, dtype)
        if trained and self.device.type == "cpu":
            return model  # the gradient of group normalization takes many times as long with channels last
        channels_last: Any = {"memory_format": torch.channels_last}
        return model.to(**channels_last)

    def glm_image(self, found: Components) -> None:
        """The components of a GLM-Image pipeline, of which the transformer may come from elsewhere."""
        from ...pipelines.glm_image import GlmImagePipeline

        settings = self.models.transformer
        assert self.pipeline is not None
        given = None if settings.start_from is None else self.folder("transformer", settings)
        source = given or self.pipeline / "transformer"
        dtype = torch.float32 if self.adapter is None else self.dtype
        transformer = GlmImageTransformer2DModel.from_pretrained(source, dtype=dtype, **settings.config)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        pipe = GlmImagePipeline.from_pretrained(self.pipeline, transformer=transformer, dtype=self.dtype)
        found.tokenizer, found.scheduler, found.processor = pipe.tokenizer, pipe.scheduler, pipe.processor
        found.transformer = self.placed(transformer)
        found.vae, found.text_encoder = pipe.vae.to(self.device), pipe.text_encoder.to(self.device)
        found.prior = pipe.vision_language_encoder
        # Training tokenizes images; only generating them needs the language model, most of the prior.
        for part in [found.prior] if self.generates else [found.prior.model.visual, found.prior.model.vqmodel]:
            part.to(self.device)

    def tokenizer(self) -> Any:
        from ...checkpoints.foreign.from_transformers import load_reader

        if self.models.tokenizer is not None:
            root = hub.resolve(self.models.tokenizer)
            return load_reader("T5Tokenizer", root / "tokenizer" if (root / "tokenizer").is_dir() else root)
        if self.pipeline is None:
            raise ConfigurationError("models.tokenizer is not given; set it, or models.pipeline")
        return load_reader("T5Tokenizer", self.pipeline / "tokenizer")

    def text_encoder(self, settings: ComponentSettings, tokenizer: Any) -> Any:
        folder = self.folder("text_encoder", settings)
        if folder is None:
            from transformers import T5Config, T5EncoderModel

            known = T5Config().to_dict()
            for name in settings.config.keys() - known.keys():
                raise ConfigurationError(f"models.text_encoder.config: T5 has no {shown(name)}{nearest(name, known)}")
            model: Any = T5EncoderModel(T5Config(**{"vocab_size": len(tokenizer), **settings.config}))
        else:
            if settings.config:
                raise ConfigurationError(
                    "models.text_encoder.config: a stored text encoder keeps its own; leave out config or start_from"
                )
            dtype = torch.float32 if settings.train else self.dtype
            model = load_component(["transformers", "T5EncoderModel"], folder, dtype, None, None)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.to(self.device)

    def scheduler(self) -> Any:
        if self.pipeline is None:
            return DPMSolverMultistepScheduler(**self.models.scheduler)
        config = DPMSolverMultistepScheduler.load_config(self.pipeline / "scheduler")
        return DPMSolverMultistepScheduler.from_config(config, **self.models.scheduler)
