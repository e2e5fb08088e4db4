"""The configuration of a run: what is trained, from what, on which data, and how."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..objectives.diffusion_loss import Weighting
from ..objectives.text_to_image import Timesteps
from .config import Count, NotNegative, Positive, Section, Settings, Share, TimestepRange
from .data_settings import DataSettings, SourceSettings
from .objective_settings import (
    MEASURES,
    Denoising,
    DmdSettings,
    LcmSettings,
    TextualInversionSettings,
    TokenRoutingSettings,
)


class LabelSettings(Section):
    """A loss on labels of the latents that samples bring along; see ``LabelHead``.

    Attributes:
        block: of the transformer, from 0, whose tokens are asked.
        weight: at the highest learning rate; it falls with the rate.
        classes: of each question.
    """

    block: Annotated[int, Field(ge=0)]
    weight: NotNegative = 0.3
    classes: Annotated[list[Count], Field(min_length=1)]


class AgreementSettings(Section):
    """A loss on the difference between the predictions without and with the caption where noise is low.

    An image with little noise shows what its caption says. What still differs is error, which guidance multiplies.

    Attributes:
        below: which timestep.
        weight: of the squared difference.
    """

    below: Count = 500
    weight: Positive = 8.0


class RolloutSettings(Section):
    """Inputs that the model makes itself, by steps like those of the sampler; see ``Rollout``.

    Attributes:
        share: of the samples whose timestep is in the range.
        timestep_range: from the first to below the second.
        steps: at most.
        gap: timesteps between two of them.
    """

    share: Share = 0.5
    timestep_range: TimestepRange = (250, 560)
    steps: Count = 3
    gap: Count = 50


class TextToImageSettings(Denoising):
    """A PixArt transformer on images and captions.

    Attributes:
        caption_dropout: the share of captions replaced by the empty one, for classifier-free guidance.
        timestep_range: the timesteps that are trained, from the first to below the second; None: all. What an image
            shows is decided at high noise, its edges at low noise.
        weighting: of the squared error by timestep; see ``DiffusionLoss.weights``.
        bound_weight: of the variational bound, if the transformer predicts a variance.
        labels: a further loss on labels of the latents.
        agreement: a further loss that makes guidance harmless at low noise, at the cost of a second pass of the samples
            that have little.
        rollout: some inputs are made by the model itself; None: none are.
        token_routing: tokens skip blocks in training; None: none do.
    """

    kind: Literal["text-to-image"] = "text-to-image"
    caption_dropout: Share = 0.1
    timesteps: Timesteps = "uniform"
    timestep_range: TimestepRange | None = None
    weighting: Weighting = "none"
    bound_weight: NotNegative = 1.0
    labels: LabelSettings | None = None
    agreement: AgreementSettings | None = None
    rollout: RolloutSettings | None = None
    token_routing: TokenRoutingSettings | None = None

    @model_validator(mode="after")
    def _within_what_is_trained(self) -> TextToImageSettings:
        first, end = self.timestep_range or (0, math.inf)
        low, high = (first, end) if self.rollout is None else self.rollout.timestep_range
        if low < first or high > end:
            raise ValueError(
                f"rollout.timestep_range, {low} to {high}, must be within what is trained, {first} to {end}"
            )
        if self.agreement is not None and self.agreement.below <= first:
            raise ValueError(f"agreement.below: the first timestep that is trained is {first}; give a higher one")
        return self

    @model_validator(mode="after")
    def _one_pass(self) -> TextToImageSettings:
        if self.token_routing is not None and (self.agreement is not None or self.rollout is not None):
            name = "rollout" if self.agreement is None else "agreement"
            raise ValueError(f"{name} needs predictions for all tokens; leave token_routing out")
        if self.token_routing is not None and self.labels is not None:
            start, end, block = self.token_routing.start, self.token_routing.end, self.labels.block
            if start <= block < end:
                raise ValueError(
                    f"labels.block, {block}, needs all tokens, and token_routing skips {start} to {end - 1}"
                )
        return self


class FlowMatchingSettings(Section):
    """GLM-Image's transformer on images and captions.

    Attributes:
        prior_dropout: the share of images trained without their prior tokens, for guidance.
        spread: standard deviation of the logits of the times (2403.03206, section 3.1).
    """

    kind: Literal["flow-matching"]
    prior_dropout: Share = 0.1
    spread: Positive = 1.0


class AutoencoderSettings(Section):
    """An autoencoder on images; see ``Autoencoder``.

    Attributes:
        standardize: from so many images, the latents of the result get mean 0, and deviation 1 after scaling.
    """

    kind: Literal["autoencoder"]
    kl_weight: NotNegative = 1e-6
    l1_weight: NotNegative = 0.5
    edge_weight: NotNegative = 0.0
    half_scale_weight: NotNegative = 0.0
    standardize: Count | None = None


class TextEncoderSettings(Section):
    """A text encoder on questions about captions, whose answers samples bring along; see ``WarmStart``.

    Attributes:
        slots: places in the answer, each with all questions.
        classes: of each question.
        tokens: of a caption, at most.
    """

    kind: Literal["text-encoder"]
    slots: Count
    classes: Annotated[list[Count], Field(min_length=1)]
    tokens: Count | None = None


ObjectiveSettings = Annotated[
    FlowMatchingSettings
    | TextToImageSettings
    | AutoencoderSettings
    | TextEncoderSettings
    | LcmSettings
    | DmdSettings
    | TextualInversionSettings,
    Field(discriminator="kind"),
]


class ComponentSettings(Section):
    """A model.

    Attributes:
        start_from: a folder or hub id of the model, or of a pipeline that has it. Unless given, it is that of
            ``ModelSettings.pipeline``, or with a config a new one, which only a model that is trained itself can be.
        config: of a new model; of a stored one, what replaces its own.
        train: whether it is trained; unless given, as the objective has it.
        gradient_checkpointing: recompute its blocks in the backward pass, to save memory.
    """

    start_from: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    train: bool | None = None
    gradient_checkpointing: bool = False

    @property
    def is_given(self) -> bool:
        return self.start_from is not None or bool(self.config)


class ModelSettings(Section):
    """The models of a run.

    Attributes:
        family: alpha has micro-conditions at 1024 px and reads 120 tokens, sigma 300; glm-image needs a pipeline.
            Unless given, alpha or sigma, as the pipeline is; sigma without one.
        pipeline: a folder or hub id, for the components that have no ``start_from`` of their own.
        scheduler: its config, in place of the pipeline's: the noise schedule, and the solver of sample images.
    """

    family: Literal["alpha", "sigma", "glm-image"] | None = None
    pipeline: str | None = None
    transformer: ComponentSettings = ComponentSettings()
    vae: ComponentSettings = ComponentSettings()
    text_encoder: ComponentSettings = ComponentSettings()
    tokenizer: str | None = None
    scheduler: dict[str, Any] = Field(default_factory=dict)


#: The models that an objective trains, and those that it can train.
_TRAINED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text-to-image": (("transformer",), ("text_encoder",)),
    "lcm": (("transformer",), ()),  # the teacher reads the same texts
    "dmd": (("transformer",), ()),
    "flow-matching": (("transformer",), ()),
    "autoencoder": (("vae",), ()),
    "text-encoder": (("text_encoder",), ()),
    "textual-inversion": ((), ()),
}
_WITHOUT_MASKS = ("autoencoder", "text-encoder", "lcm", "dmd")


class AdapterSettings(Section):
    """An adapter is trained, and the models under it are frozen.

    Attributes:
        rank: of the transformer's.
        text_encoder_rank: of the text encoder's, if it gets one. ``optimizer.rates`` can give it a rate of its own.
        alpha: its scale is alpha / rank, of rsLoRA alpha / sqrt(rank); equal to the rank unless given.
        targets: the layers, by the last parts of their names.
        base: the weights under it: as loaded, or quantized.
    """

    kind: Literal["lora", "rslora", "dora", "lokr", "loha"] = "lora"
    rank: Count = 16
    alpha: Positive | None = None
    dropout: Share = 0.0
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"]
    )
    text_encoder_rank: Count | None = None
    text_encoder_targets: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["q", "k", "v", "o"]
    )
    base: Literal["plain", "int8", "nf4"] = "plain"

    @model_validator(mode="after")
    def _ordinary_weights(self) -> AdapterSettings:
        if self.kind in ("lokr", "loha") and self.base != "plain":
            raise ValueError(f"base: {self.kind} needs ordinary weights, not {self.base}; leave it out")
        return self


class ValidationSettings(Section):
    """Measured with each checkpoint on the averages: the loss of a fixed set of (image, noise, timestep).

    Attributes:
        count: of images. They are held out from the training data, unless there is a source of their own.
        batch_size: of them at once; as ``micro_batch``, unless given.
    """

    count: Count = 64
    batch_size: Count | None = None
    source: SourceSettings | None = None

    @model_validator(mode="after")
    def _not_generated(self) -> ValidationSettings:
        if self.source is not None and self.source.generate is not None:
            raise ValueError("source.generate: images are generated for training alone; leave it out")
        return self


class SampleSettings(Section):
    """Images of fixed prompts, generated with each checkpoint; ``timesteps`` takes the place of ``steps``.

    Unless given, steps and guidance scale are those of the family, or of what a distillation makes.
    """

    prompts: Annotated[list[str], Field(min_length=1)]
    steps: Count | None = None
    timesteps: list[Annotated[int, Field(ge=0)]] | None = None
    guidance_scale: NotNegative | None = None
    height: Count | None = None
    width: Count | None = None


class Configuration(Settings):
    """The whole of a run.

    Attributes:
        output: the folder of the run.
        parallel: how processes that ``torchrun`` started divide the work: each has all parameters (``ddp``), a shard of
            each (``fsdp``), or shares them with the others of its machine (``hsdp``); ``auto`` is the first, unless
            half of a GPU's memory is too small for that.
        hsdp_shards: processes that share the parameters with ``hsdp``, if not those of a machine.
        validation, samples: None for none.
        checks: further measures that this program adds, by name, with their options.
        export: what the result has: the ``trained`` models, or the whole ``pipeline``.
    """

    output: str | None = None
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    hsdp_shards: Count | None = None
    objective: ObjectiveSettings = TextToImageSettings()
    models: ModelSettings = ModelSettings()
    adapter: AdapterSettings | None = None
    data: DataSettings
    validation: ValidationSettings | None = None
    samples: SampleSettings | None = None
    checks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    export: Literal["trained", "pipeline"] = "trained"

    @property
    def sources(self) -> list[SourceSettings]:
        """Those of the training and the validation data."""
        held = self.validation.source if self.validation else None
        return [*self.data.sources, *([held] if held else [])]

    @property
    def uses_pipeline(self) -> bool:
        """Whether the run generates images or writes a pipeline, and so needs all models."""
        return self.samples is not None or bool(self.checks) or self.export == "pipeline"

    @property
    def trains_texts(self) -> bool:
        """Whether captions are encoded in another way after a step."""
        adapted = self.adapter is not None and self.adapter.text_encoder_rank is not None
        return bool(self.models.text_encoder.train) or adapted or self.objective.kind == "textual-inversion"

    @model_validator(mode="before")
    @classmethod
    def _usual_objective(cls, given: Any) -> Any:
        """An objective without a kind is the usual one of the family."""
        objective = given.get("objective", {}) if isinstance(given, dict) else None
        if not isinstance(objective, dict) or objective.get("kind") is not None:
            return given
        models = given.get("models")
        is_glm_image = isinstance(models, dict) and models.get("family") == "glm-image"
        return {**given, "objective": {**objective, "kind": "flow-matching" if is_glm_image else "text-to-image"}}

    @model_validator(mode="after")
    def _consistent(self) -> Configuration:
        cached = any(source.kind == "cache" for source in self.sources)
        if cached and not isinstance(self.objective, Denoising):
            raise ValueError(f"a cache has no images, which the objective {self.objective.kind} needs; name the images")
        if self.adapter is not None and self.objective.kind not in ("text-to-image", "flow-matching", "lcm"):
            raise ValueError(f"adapter: {self.objective.kind} trains none; leave it out")
        if self.data.pack_pixels is not None and self.objective.kind != "text-to-image":
            raise ValueError(f"data.pack_pixels: {self.objective.kind} takes batches of one size; leave it out")
        if self.objective.kind in _WITHOUT_MASKS and any(source.mask_suffix for source in self.sources):
            raise ValueError(f"mask_suffix: {self.objective.kind} has no masks of the loss; leave it out")
        if (self.models.family == "glm-image") != isinstance(self.objective, FlowMatchingSettings):
            raise ValueError("models.family glm-image and objective.kind flow-matching belong together")
        if self.models.family == "glm-image" and self.models.pipeline is None:
            raise ValueError("models.pipeline must be given for glm-image")
        best, measured = self.checkpoints.best, MEASURES.get(self.objective.kind, ("validation",))
        if best not in (None, "loss") and not self.checks:  # whose values have names of their own
            if best not in measured:
                known = ", ".join(measured)
                raise ValueError(f"checkpoints.best: {self.objective.kind} measures {known}, not {best}; or it is loss")
            if self.validation is None:
                raise ValueError(f"checkpoints.best: {best} needs a validation, or leave it out")
        if self.export == "pipeline" and (self.adapter is not None or self.objective.kind == "textual-inversion"):
            what = "an adapter" if self.adapter is not None else "a word"
            raise ValueError(f"export: the result of training {what} is its file; leave it 'trained'")
        if self.samples is not None and self.objective.kind in ("autoencoder", "text-encoder"):
            raise ValueError(f"samples: {self.objective.kind} has no model that generates images; leave it out")
        return self

    @model_validator(mode="after")
    def _models_are_used(self) -> Configuration:
        models, kind = self.models, self.objective.kind
        trained, possible = _TRAINED[kind]
        for name in ("transformer", "vae", "text_encoder"):
            train = getattr(models, name).train
            if train and name not in (*trained, *possible):
                raise ValueError(f"models.{name}.train: the objective {kind} does not train it; leave it out")
            if train is False and name in trained and self.adapter is None:
                raise ValueError(
                    f"models.{name}.train: the objective {kind} trains it; leave it out, or train an adapter"
                )
        texts_adapted = self.adapter is not None and self.adapter.text_encoder_rank is not None
        if texts_adapted and "text_encoder" not in possible:
            raise ValueError(f"adapter.text_encoder_rank: {kind} keeps the text encoder; leave it out")
        if self.adapter is not None and models.text_encoder.train:
            raise ValueError("models.text_encoder.train: under an adapter it is frozen; give adapter.text_encoder_rank")
        for name in ("vae", "text_encoder", "tokenizer", "scheduler") if models.family == "glm-image" else ():
            if getattr(models, name) != getattr(ModelSettings(), name):
                raise ValueError(f"models.{name}: glm-image has that of models.pipeline; leave it out")
        return self
