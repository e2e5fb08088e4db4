"""A run from its configuration: assembled, trained or resumed, and exported."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigurationError, InputError
from ..files import make_folder, write_file
from .assembly.adapters import export_adapters
from .assembly.assemble import Assembled, Check, MakeSource, assemble
from .assembly.dry_run import describe
from .distributed.processes import joined
from .objectives.autoencoder import latent_moments, standardize
from .running import checkpoints
from .running.loop import train
from .settings.configuration import AutoencoderSettings, Configuration
from .settings.recipe_files import text_of

logger = logging.getLogger("impasto")


def launch(
    configuration: Configuration,
    folder: Path,
    resume: bool = False,
    sources: Mapping[str, MakeSource] | None = None,
    checks: Mapping[str, Check] | None = None,
) -> int | None:
    """Train what a configuration describes; the result is in ``folder/result``.

    Started by ``torchrun``, the process joins the others.

    Args:
        resume: continue the run in ``folder`` from its last checkpoint, if it has one.
        sources, checks: further kinds of sources, and measures of a pipeline, by name.

    Returns:
        None, or the signal that ended the run early, with a checkpoint.

    Raises:
        InputError: the folder has a run already, and ``resume`` is False.
        CheckpointError: the run in it has other settings.
    """
    last = checkpoints.latest(folder)
    if last is not None and not resume:
        raise InputError(
            f"{folder} has a run already, up to {last.name}; continue it with --resume, or give another --output"
        )
    with joined(configuration.parallel, shards=configuration.hsdp_shards) as processes:
        assembled = assemble(configuration, folder, sources, checks, processes, folder / "sizes")
        if processes.is_main:
            for reason, count in assembled.data.left_out.items():
                logger.warning("%d images are left out: %s", count, reason)

        def started() -> None:
            if processes.is_main:
                make_folder(folder)
                write_file(folder / "configuration.yaml", text_of(configuration))

        try:
            parts = (assembled.objective, assembled.data, configuration, folder, assembled.check, processes)
            stopped = train(*parts, started)
            if stopped is None and processes.is_main:
                _export(configuration, assembled, folder / "result")
        finally:
            assembled.data.close()
            for reason, count in assembled.data.faults.counts().items():
                logger.warning("%d images were left out while training: %s", count, reason)
    return stopped


def preview(
    configuration: Configuration,
    folder: Path,
    sources: Mapping[str, MakeSource] | None = None,
    checks: Mapping[str, Check] | None = None,
) -> str:
    """Data, memory and time of a run of one process, in lines; nothing is written.

    Raises:
        ConfigurationError: torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("--dry-run plans for one process; start it without torchrun")
    with joined("none") as processes:
        assembled = assemble(configuration, folder, sources, checks, processes, writes=False)
        try:
            return describe(configuration, assembled)
        finally:
            assembled.data.close()


def _export(configuration: Configuration, assembled: Assembled, folder: Path) -> None:
    if isinstance(configuration.objective, AutoencoderSettings) and configuration.objective.standardize is not None:
        steps = range(-(-configuration.objective.standardize // configuration.data.batch_size))
        vae = assembled.components.vae
        standardize(vae, *latent_moments(vae, (assembled.data.batch(step).samples for step in steps)))
    if configuration.adapter is not None:
        defaults = assembled.objective.adapter_defaults
        export_adapters(configuration.adapter, assembled.components, folder, defaults)
    elif configuration.export == "pipeline":
        assembled.components.as_stored().pipeline().save_pretrained(folder)
    else:
        assembled.objective.export(folder)
