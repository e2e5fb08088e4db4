"""Caching on Ray Data: actors hold the models and write chunks, this process writes the index.

The data and the cache have to be on a disk that all machines of the cluster see under the same path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import append_line
from ...ray_cluster import ray_session, require_ray, threads_of_an_actor
from ..assembly.assemble import MakeSource
from ..data.cached import EMPTY
from ..settings.configuration import Configuration
from .cache import Job
from .from_configuration import cache_jobs


class Worker:
    """An actor: the jobs with their models, loaded once."""

    def __init__(
        self,
        configuration: dict[str, Any],
        out: str,
        kinds: Mapping[str, MakeSource],
        device: str,
        options: dict[str, Any],
        threads: int,
    ):
        import torch

        torch.set_num_threads(threads)  # Ray gives an actor one
        checked = Configuration.model_validate(configuration)
        self.jobs = cache_jobs(checked, Path(out), kinds, torch.device(device), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Write chunks, and return their lines of the index."""
        sources, chunks = batch["source"].tolist(), batch["chunk"].tolist()
        lines = [
            self.jobs[source].write_empty() if chunk < 0 else self.jobs[source].write_chunk(chunk)
            for source, chunk in zip(sources, chunks)
        ]
        return {"source": sources, "line": lines}


def run_on_ray(
    address: str,
    actors: int,
    configuration: Configuration,
    out: Path,
    kinds: Mapping[str, MakeSource],
    device: str | None,
    options: dict[str, Any],
) -> dict[str, int]:
    """Write what is missing of the caches of a configuration on a Ray cluster.

    Args:
        address: of the cluster; "auto" finds a running one, "local" starts one, even if another one runs.
        actors: that hold models; each takes a GPU, unless ``device`` is "cpu".

    Raises:
        MissingDependencyError: Ray is not installed.
        ResourceError: there is no cluster at the address, or an actor has failed; what was written is kept.
    """
    require_ray()
    import torch

    local = "cuda" if torch.cuda.is_available() else "cpu"
    target = device or local
    jobs = cache_jobs(configuration, out.resolve(), kinds, torch.device("cpu"), **options)
    work = [{"source": number, "chunk": chunk} for number, job in enumerate(jobs) for chunk in _missing(job)]
    counts = {"written": 0, "skipped": sum(job.chunks for job in jobs) - sum(each["chunk"] >= 0 for each in work)}
    if not work:
        return counts
    folders = [job.folder for job in jobs]
    del jobs  # and the models
    with ray_session(address) as ray:
        threads = threads_of_an_actor(ray, actors)
        lines = ray.data.from_items(work).map_batches(
            Worker,
            fn_constructor_args=(
                configuration.model_dump(mode="json"),
                str(out.resolve()),
                kinds,
                target,
                options,
                threads,
            ),
            batch_size=1,
            concurrency=actors,
            num_gpus=1 if target.startswith("cuda") else 0,
        )
        for row in lines.iter_rows():
            append_line(folders[row["source"]] / "index-ray.jsonl", row["line"])
            counts["written"] += json.loads(row["line"])["file"] != EMPTY
    return counts


def _missing(job: Job) -> list[int]:
    """The missing chunks; -1 stands for the empty caption."""
    return [*([-1] if job.lacks_empty() else []), *job.missing()]
