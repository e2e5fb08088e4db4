"""The jobs that cache the sources of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import ConfigurationError
from ..assembly.assemble import MakeSource, buckets_of, open_source, texts_of
from ..assembly.components import load, load_encoders
from ..assembly.further_objectives import lacking, make_class_images
from ..data.cached import fingerprint
from ..distributed.processes import Processes
from ..objectives.text_to_image import Latents
from ..settings.configuration import Configuration
from ..settings.objective_settings import Denoising
from .cache import RANDOM_CROPS, Encoders, Job, settings_for


def generate_lacking(configuration: Configuration, device: torch.device) -> None:
    """Generate the images of classes that the folders of a configuration lack, as training does.

    Raises:
        ConfigurationError: random crops, which cannot be cached.
    """
    sources = [source for source in configuration.data.sources if lacking(source)]
    if any(source.crop == "random" for source in sources):
        raise ConfigurationError(RANDOM_CROPS)
    if sources:
        make_class_images(configuration, load(configuration, device), Processes(device=device))


def cache_jobs(
    configuration: Configuration,
    out: Path,
    kinds: Mapping[str, MakeSource],
    device: torch.device,
    *,
    dtype: str = "float32",
    batch_size: int = 8,
    threads: int = 4,
    chunk: int = 32,
    texts: bool = True,
) -> list[Job]:
    """A job for each source of the training data, with the frozen models of the configuration.

    Args:
        out: the folder of the cache; with several sources, that of the i-th is ``out/i``, from 1 on.
        kinds: further kinds of sources, by name.
        texts: whether features of the captions are stored; without them the text encoder may be one that is trained.

    Raises:
        ConfigurationError: the text encoder is trained, crops are random, images of a class are not generated yet, or
            there is a cache of other settings.
    """
    settings, objective = configuration.data, configuration.objective
    if not isinstance(objective, Denoising):
        raise ConfigurationError(
            f"a run of {objective.kind} reads its data itself; caches are of latents and texts for PixArt's transformer"
        )
    if any(source.kind == "cache" for source in settings.sources):
        raise ConfigurationError("a source is a cache already; name the images")
    buckets = buckets_of(settings)
    plain = [source.model_copy(update={"weight": 1.0}) for source in settings.sources]  # weights are not stored
    for given in plain:
        if count := lacking(given):
            raise ConfigurationError(
                f"{given.path} lacks {count} images of its class, which one process has to generate first: run "
                f"impasto cache without --shard and --ray, or impasto train"
            )
    sources = [open_source(source, kinds, settings.max_broken, out / "sizes") for source in plain]
    for source in sources:
        settings_for(source, buckets, autoencoder="", text_encoder="", tokens=1, clean=False, dtype=dtype, chunk=chunk)
    models = load_encoders(configuration, device, texts)
    reader = texts_of(objective, models)
    encoders = Encoders(Latents(models.vae.config, models.vae).posterior, reader.features if texts else None)
    common = {
        "autoencoder": fingerprint(models.vae),
        "text_encoder": fingerprint(models.text_encoder) if texts else "",
        "tokens": reader.tokens if texts else 1,
        "clean": reader.clean and texts,
        "dtype": dtype,
        "chunk": chunk,
    }
    return [
        Job(
            source,
            out if len(sources) == 1 else out / str(number),
            encoders,
            settings_for(source, buckets, **common),
            batch_size,
            threads,
            settings.max_broken,
        )
        for number, source in enumerate(sources, 1)
    ]
