"""The objectives other than plain training, from their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ConfigurationError
from ...transforms.token_routing import TokenRouting, route_tokens
from ..data.sample import Source
from ..distributed.processes import Processes
from ..jobs.class_images import PlannedImages, generate_class_images, missing_images
from ..objectives.distillation import Distillation
from ..objectives.dmd import DistributionMatching
from ..objectives.lcm import LatentConsistency
from ..objectives.text_to_image import TextToImage
from ..objectives.textual_inversion import TextualInversion
from ..settings.configuration import Configuration, TextToImageSettings
from ..settings.data_settings import DataSettings, SourceSettings
from ..settings.objective_settings import DmdSettings, LcmSettings, TextualInversionSettings
from .components import Components


def make_further(
    settings: LcmSettings | DmdSettings | TextualInversionSettings,
    parts: tuple[Any, ...],
    models: Components,
    seed: int,
) -> TextToImage:
    """The objective. That of a distillation also determines the scheduler of samples and of the result.

    Args:
        parts: transformer, texts, latents and loss.
    """
    if isinstance(settings, TextualInversionSettings):
        return TextualInversion(
            *parts,
            token=settings.token,
            vectors=settings.vectors,
            start_from=settings.start_from,
            seed=seed,
            caption_dropout=settings.caption_dropout,
        )
    made: Distillation
    if isinstance(settings, LcmSettings):
        made = LatentConsistency(
            *parts,
            intervals=settings.intervals,
            guidance_scale=settings.guidance_scale,
            decay=settings.target_decay,
            huber=settings.huber,
        )
    else:
        made = DistributionMatching(
            *parts,
            generator_timestep=settings.generator_timestep,
            noise_levels=settings.noise_levels,
            guidance_scale=settings.guidance_scale,
            regression_weight=settings.regression_weight,
            pair_steps=settings.pair_steps,
        )
    config = {**models.scheduler.config, "prediction_type": made.loss.prediction_type}
    made.sampler = models.scheduler = made.scheduler(config)
    return made


def routing_of(settings: TextToImageSettings, transformer: Any) -> TokenRouting | None:
    """Tokens skip blocks of the transformer, if the settings say so."""
    wanted = settings.token_routing
    return None if wanted is None else route_tokens(transformer, wanted.start, wanted.end, wanted.rate)


def needs_class_images(configuration: Configuration) -> bool:
    """Whether images are generated before training."""
    return any(source.generate is not None for source in configuration.data.sources)


def lacking(source: SourceSettings) -> int:
    """The number of images that will be generated for a source."""
    if source.generate is None or source.path is None:
        return 0
    return len(missing_images(Path(source.path), source.generate.count))


def planned(source: SourceSettings, data: DataSettings) -> Source:
    """A source that stands for one whose images will be generated."""
    assert source.generate is not None
    return PlannedImages(source.caption or "", source.generate.count, _class_image_size(data))


def _class_image_size(data: DataSettings) -> tuple[int, int]:
    if data.base is not None:
        return data.base, data.base
    assert data.sizes is not None
    return data.sizes[0]


def make_class_images(configuration: Configuration, models: Components, processes: Processes) -> None:
    """Generate the images that folders of classes lack, each process its share, with the models as they are."""
    size = _class_image_size(configuration.data)
    for source in configuration.data.sources:
        if source.generate is None:
            continue
        if source.caption is None or source.path is None:
            raise ConfigurationError("a source with generate needs its path and its caption, which is the prompt")
        wanted = source.generate
        generate_class_images(
            models.pipeline(),
            source.caption,
            Path(source.path),
            wanted.count,
            size=size,
            steps=wanted.steps,
            guidance_scale=wanted.guidance_scale,
            batch_size=wanted.batch_size,
            seed=wanted.seed,
            rank=processes.rank,
            world=processes.count,
        )
    processes.barrier()
