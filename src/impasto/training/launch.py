"""A run from its configuration: assembled, trained or resumed, and exported."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ConfigurationError, InputError, OutputError
from ..files import lock, make_folder, write_file
from .assembly.adapters import export_adapters
from .assembly.assemble import Assembled, Check, MakeSource, assemble
from .assembly.dry_run import describe
from .distributed.processes import Processes, joined
from .objectives.autoencoder import latent_moments, standardize
from .running import checkpoints
from .running.loop import train
from .settings.configuration import AutoencoderSettings, Configuration
from .settings.recipe_files import text_of

logger = logging.getLogger("impasto")

#: Open files that lock folders. A fork, such as a worker that reads data, gives them up: it may outlive a killed run.
_locks: set[int] = set()
#: Seconds in which one that was just forked does so.
_PATIENCE = 0.5


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
        InputError: the folder has a run already, and ``resume`` is False, or only the result of one; or another process
            trains in it.
        CheckpointError: the run in it has other settings.
    """
    with (
        joined(configuration.parallel, shards=configuration.hsdp_shards) as processes,
        _held(folder, resume, processes),
    ):
        assembled = assemble(configuration, folder, sources, checks, processes, folder / "sizes")
        if processes.is_main:
            for reason, count in assembled.data.left_out.items():
                logger.warning("%d images are left out: %s", count, reason)

        def started() -> None:
            if processes.is_main:
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


@contextlib.contextmanager
def _held(folder: Path, resume: bool, processes: Processes) -> Iterator[None]:
    """Within the block, no other run writes into the folder. Its lock ends with the main process, however that ends."""
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_main:
                make_folder(folder)
                path = folder / ".lock"
                try:
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                    _locks.add(descriptor)
                    held.callback(_release, descriptor)
                    lock(descriptor, path, time.monotonic() + _PATIENCE)
                except BlockingIOError:
                    raise InputError(f"another process trains in {folder}; give another --output") from None
                except OSError as error:
                    raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error
                last = checkpoints.latest(folder)
                if last is not None and not resume:
                    raise InputError(
                        f"{folder} has a run already, up to {last.name}; continue it with --resume, or give another "
                        f"--output"
                    )
                if last is None and (folder / "result").exists():
                    raise InputError(
                        f"{folder} has the result of a run, and no checkpoint to continue from; give another --output"
                    )
        yield


def _release(*descriptors: int) -> None:
    for descriptor in _locks.intersection(descriptors):
        os.close(descriptor)
        _locks.remove(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _release(*_locks))


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
        vae, at_once = assembled.components.vae, configuration.micro_batch or 16
        parts = (part.samples for step in steps for part in assembled.data.batch(step).split(at_once))
        standardize(vae, *latent_moments(vae, parts))
    if configuration.adapter is not None:
        defaults = assembled.objective.adapter_defaults
        export_adapters(configuration.adapter, assembled.components, folder, defaults)
    elif configuration.export == "pipeline":
        assembled.components.as_stored().pipeline().save_pretrained(folder)
    else:
        assembled.objective.export(folder)
