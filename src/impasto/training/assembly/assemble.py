"""Configuration -> objective, data and checks: the one place that connects them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ConfigurationError, InputError
from ...pipelines.glm_image_stages import latent_statistics, shift_of
from ..data.buckets import Buckets, sizes_of
from ..data.cached import CachedSource
from ..data.faults import Faults
from ..data.folders import FolderSource
from ..data.images import Reading
from ..data.loader import Data
from ..data.order import Order
from ..data.sample import Sample, Source, name_of
from ..data.shards import ShardSource
from ..data.views import Views
from ..distributed.processes import ALONE, Processes
from ..objectives.autoencoder import Autoencoder
from ..objectives.base import Objective
from ..objectives.diffusion_loss import DiffusionLoss
from ..objectives.glm_image import GlmImageFlowMatching
from ..objectives.labels import LabelHead
from ..objectives.rollout import Rollout
from ..objectives.text_encoder import SlotReader, WarmStart
from ..objectives.text_to_image import Latents, TextToImage
from ..objectives.texts import Texts
from ..running.validation import Validation, measure
from ..settings.configuration import (
    AutoencoderSettings,
    Configuration,
    FlowMatchingSettings,
    RolloutSettings,
    TextEncoderSettings,
    TextToImageSettings,
)
from ..settings.data_settings import OWN_KINDS, DataSettings, SourceSettings
from ..settings.objective_settings import Denoising, DmdSettings, LcmSettings, TextualInversionSettings
from .adapters import add_adapters
from .components import Components, family_of_models, load
from .further_objectives import lacking, make_class_images, make_further, needs_class_images, planned, routing_of

#: Makes a source from its options. Programs add kinds of sources by name.
MakeSource = Callable[[dict[str, Any]], Source]
#: Measures a pipeline, given the options of the check.
Check = Callable[[Any, dict[str, Any]], Mapping[str, float]]


@dataclass
class Assembled:
    """All that the loop needs."""

    objective: Objective
    data: Data
    components: Components
    check: Callable[[int], Mapping[str, float]] | None


def assemble(
    configuration: Configuration,
    folder: Path,
    sources: Mapping[str, MakeSource] | None = None,
    checks: Mapping[str, Check] | None = None,
    processes: Processes = ALONE,
    indices: Path | None = None,
    writes: bool = True,
) -> Assembled:
    """Load the models and open the data of a configuration.

    Args:
        folder: of the run.
        sources, checks: further kinds of sources, and measures of a pipeline, by name.
        processes: those that train together.
        indices: a folder that keeps the sizes of images, so that they are not measured each time.
        writes: whether images of classes are generated; else others stand for those that are missing.

    Raises:
        InputError, ConfigurationError, CheckpointError: something that the configuration names does not exist or fit.
    """
    unknown = [name for name in configuration.checks if name not in (checks or {})]
    if unknown:
        raise InputError(f"checks: there is no {unknown[0]!r}; there are {', '.join(checks or {}) or 'none'}")
    components: Components | None = None
    if writes and needs_class_images(configuration):
        components = load(configuration, processes.device)
        make_class_images(configuration, components, processes)
    data, validation, caches = open_data(configuration, sources or {}, indices, writes)
    cached = all(source.kind == "cache" for source in configuration.sources)
    texts_are_stored = cached and all(cache.settings.has_texts for cache in caches)
    components = components or load(configuration, processes.device, texts_are_stored)
    for cache in caches:
        cache.check_models(components.vae, components.text_encoder)
    if configuration.adapter is not None:
        add_adapters(configuration.adapter, components, configuration.seed)
    components.empty_text = next((cache.empty for cache in caches), None)
    objective = make_objective(configuration, components)
    images = folder / "samples" if processes.is_main else None
    check = _checks(configuration, components, objective, validation, images, checks or {})
    return Assembled(objective, data, components, check)


# --- objectives ---


def make_objective(configuration: Configuration, components: Components) -> Objective:
    """The objective of a configuration on its models."""
    settings = configuration.objective
    if isinstance(settings, AutoencoderSettings):
        weights = settings.kl_weight, settings.l1_weight, settings.edge_weight, settings.half_scale_weight
        trained = Autoencoder(components.vae, *weights)
        if settings.standardize is not None:
            trained.unshardable = "objective.standardize encodes images in one process"
        return trained
    if isinstance(settings, FlowMatchingSettings):
        return GlmImageFlowMatching(
            components.transformer,
            Latents(latent_statistics(components.vae), components.vae),
            components.prior,
            components.processor,
            components.tokenizer,
            components.text_encoder,
            settings.prior_dropout,
            settings.spread,
            shift=partial(shift_of, components.scheduler.config),
        )
    if isinstance(settings, TextEncoderSettings):
        return _text_encoder(configuration.seed, settings, components)
    assert isinstance(settings, Denoising)
    return _text_to_image(configuration, settings, components)


def _text_encoder(seed: int, settings: TextEncoderSettings, models: Components) -> WarmStart:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        reader = SlotReader(models.text_encoder.config.d_model, settings.slots, settings.classes)
    texts = Texts(models.tokenizer, models.text_encoder, settings.tokens or models.family.text_tokens)
    return WarmStart(models.text_encoder, reader.to(models.text_encoder.device), texts.tokenize)


def _text_to_image(configuration: Configuration, settings: Denoising, models: Components) -> TextToImage:
    config = models.scheduler.config
    prediction = settings.prediction or config.get("prediction_type", "epsilon")
    if prediction != config.get("prediction_type", "epsilon"):  # what is sampled and stored predicts the same
        models.scheduler = type(models.scheduler).from_config(config, prediction_type=prediction)
    texts = texts_of(settings, models, configuration.compile or models.transformer.device.type != "cpu")
    loss = DiffusionLoss(models.scheduler.betas, prediction)
    latents = Latents({} if models.vae is None else models.vae.config, models.vae)
    parts = (models.transformer, texts, latents, loss)
    if isinstance(settings, TextToImageSettings):
        labels, agreement, rollout, head = settings.labels, settings.agreement, settings.rollout, None
        if labels is not None:
            head = LabelHead(models.transformer, labels.block, labels.classes, configuration.seed)
        objective = TextToImage(
            *parts,
            caption_dropout=settings.caption_dropout,
            timesteps=settings.timesteps,
            timestep_range=settings.timestep_range,
            weighting=settings.weighting,
            bound_weight=settings.bound_weight,
            label_head=head,
            label_weight=lambda step: 0.0 if labels is None else labels.weight * configuration.share(step),
            agreement_below=0 if agreement is None else agreement.below,
            agreement_weight=0.0 if agreement is None else agreement.weight,
            rollout=None if rollout is None else rollout_of(rollout, config),
            routing=routing_of(settings, models.transformer),
            packed=configuration.data.pack_pixels is not None,
        )
    else:
        assert isinstance(settings, LcmSettings | DmdSettings | TextualInversionSettings)
        objective = make_further(settings, parts, models, configuration.seed)
    adapted = configuration.adapter is not None and configuration.adapter.text_encoder_rank is not None
    if models.text_encoder is not None and not adapted and not configuration.models.text_encoder.train:
        objective.freeze(models.text_encoder)
    return objective


def rollout_of(settings: RolloutSettings, scheduler: Mapping[str, Any]) -> Rollout:
    """Steps like those of a scheduler with this config."""
    given = settings.share, *settings.timestep_range, settings.steps, settings.gap
    return Rollout(*given, scheduler.get("refine_span", Rollout._field_defaults["span"]))


def texts_of(settings: Denoising, models: Components, static: bool = False) -> Texts:
    """How captions become features."""
    tokens = settings.tokens or models.family.text_tokens
    encoder, empty = models.text_encoder, models.empty_text
    return Texts(models.tokenizer, encoder, tokens, empty, static=static, clean=settings.clean_captions)


# --- data ---


def open_data(
    configuration: Configuration, kinds: Mapping[str, MakeSource], indices: Path | None = None, writes: bool = True
) -> tuple[Data, Validation | None, list[CachedSource]]:
    """The training data, the validation data if there is any, and those sources of both that are caches.

    Args:
        indices, writes: as of ``assemble``.
    """
    settings, wanted = configuration.data, configuration.validation
    buckets = buckets_of(settings)
    opened = [
        planned(source, settings)
        if not writes and lacking(source)
        else open_source(source, kinds, settings.max_broken, indices)
        for source in settings.sources
    ]
    held: Source | None = None
    if wanted is not None and wanted.source is not None:
        held = open_source(wanted.source, kinds, settings.max_broken, indices)
    unusable = sum((faults_of(source) for source in (*opened, held)), Counter[str]())
    caches = [source for source in (*opened, held) if isinstance(source, CachedSource)]
    for cache in caches:
        assert isinstance(configuration.objective, Denoising)
        tokens = configuration.objective.tokens or family_of_models(configuration.models).text_tokens
        cache.check_settings(buckets, tokens, configuration.objective.clean_captions)
        cache.check_text_encoder(caches[0])
        if cache.settings.has_texts and configuration.trains_texts:
            raise ConfigurationError(
                f"the cache {cache.folder} has the features of a frozen text encoder: do not train it, or make a cache "
                f"of latents alone (--latents-only)"
            )
    if wanted is not None and held is None:
        opened, held = hold_out(opened, wanted.count, buckets)
    given = [source.share for source in settings.sources]
    shares = None if any(share is None for share in given) else [share or 0.0 for share in given]
    repeats = None if shares else [source.repeats or 1.0 for source in settings.sources]
    order = Order(
        opened, buckets, settings.batch_size, configuration.seed, repeats, shares, pack_pixels=settings.pack_pixels
    )
    data = Data(order, opened, settings.workers, settings.max_broken, unusable)
    if wanted is None or held is None:
        return data, None, caches
    at_once = wanted.batch_size or configuration.micro_batch or 16
    faults = data.faults if wanted.source is None else Faults("validation", settings.max_broken, len(held))
    return data, Validation.read(held, buckets, wanted.count, at_once, faults), caches


def faults_of(source: Source | None) -> Counter[str]:
    """How many samples, or whole shards, a source has left out, by reason."""
    found = [getattr(source, name, None) for name in ("faults", "damaged")]
    others = {"unlisted": "their file of captions does not list them", "without_image": "they have no image"}
    counted = Counter({reason: getattr(source, name, 0) for name, reason in others.items()})
    return sum((each.counts() for each in found if each is not None), +counted)


def buckets_of(settings: DataSettings) -> Buckets:
    """The sizes to train at."""
    if settings.base is not None:
        return Buckets.of_base(settings.base, settings.max_upscale, settings.max_crop)
    assert settings.sizes is not None
    return Buckets(sizes_of(settings.sizes), settings.max_upscale, settings.max_crop)


def open_source(
    settings: SourceSettings, kinds: Mapping[str, MakeSource], max_broken: float = 0.01, indices: Path | None = None
) -> Source:
    """One source of samples."""
    if settings.kind in kinds:
        source = kinds[settings.kind](settings.options)
        every = [(source, index) for index in range(len(source))]
        return source if settings.weight == 1 else Part(every, settings.weight)
    if settings.kind not in OWN_KINDS:
        raise InputError(f"there is no source {settings.kind!r}; there are {', '.join([*OWN_KINDS, *kinds])}")
    assert settings.path is not None
    if settings.kind == "cache":
        cache = CachedSource(Path(settings.path), settings.real_prompt_ratio, settings.weight)
        for name in ("crop", "flip"):
            wanted, stored = getattr(settings, name), getattr(cache.settings, name)
            if wanted not in (stored, SourceSettings.model_fields[name].default):
                raise ConfigurationError(f"{name} of the cache {cache.folder} is {stored}, not {wanted}; leave it out")
        return cache
    reading = Reading(
        Views(settings.crop, settings.flip),
        caption=settings.caption,
        needs_caption=settings.needs_caption,
        real_prompt_ratio=settings.real_prompt_ratio,
        background=settings.background,
        weight=settings.weight,
        max_broken=max_broken,
    )
    key = hashlib.sha256(str(Path(settings.path).resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    index = None if indices is None else indices / f"{key}.jsonl"
    if settings.kind == "shards":
        return ShardSource(settings.path, reading, index)
    return FolderSource(settings.path, reading, settings.metadata, settings.mask_suffix, index)


class Part:
    """Some of the samples of a source, or of several, whose weights may be multiplied."""

    def __init__(self, places: Sequence[tuple[Source, int]], weight: float = 1.0):
        self.places, self.weight = places, weight

    def __len__(self) -> int:
        return len(self.places)

    def size(self, index: int) -> tuple[int, int]:
        source, inside = self.places[index]
        return source.size(inside)

    def name(self, index: int) -> str:
        source, inside = self.places[index]
        return name_of(source, inside) or f"sample {inside}"

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        source, inside = self.places[index]
        sample = source.read(inside, target, rng)
        return replace(sample, weight=self.weight * sample.weight)


def hold_out(sources: Sequence[Source], count: int, buckets: Buckets) -> tuple[list[Source], Source]:
    """The sources without ``count`` of their samples, evenly spread over those that have a bucket, and these.

    Raises:
        InputError: there are too few samples.
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    bins, _ = buckets.assign(np.array([source.size(index) for source, index in places], np.int64))
    usable = np.flatnonzero(bins >= 0).tolist()
    if 2 * count > len(usable):
        raise InputError(
            f"validation: {count} of {len(usable)} samples would be held out, which is more than half; lower its count "
            f"or give it a source"
        )
    held = {usable[len(usable) * i // count] for i in range(count)}
    kept: dict[int, list[tuple[Source, int]]] = {id(source): [] for source in sources}
    for number, place in enumerate(places):
        if number not in held:
            kept[id(place[0])].append(place)
    return [Part(kept[id(source)]) for source in sources], Part([places[number] for number in sorted(held)])


# --- checks ---


def _checks(
    configuration: Configuration,
    components: Components,
    objective: Objective,
    validation: Validation | None,
    images: Path | None,
    checks: Mapping[str, Check],
) -> Callable[[int], Mapping[str, float]] | None:
    """All that is measured with each checkpoint."""
    if validation is None and configuration.samples is None and not configuration.checks:
        return None

    def check(step: int) -> Mapping[str, float]:
        values: dict[str, float] = {}
        if validation is not None:
            values |= measure(objective, validation)
        if configuration.samples is not None:
            usual = {**objective.sampling, **objective.prompts(configuration.samples.prompts)}
            components.write_samples(configuration.samples, usual, images, step)
        for name, options in configuration.checks.items():
            values |= checks[name](components.pipeline(), options)
        return values

    return check
