"""A batch on Ray Data: actors hold the model and generate, this process stores the images and writes the manifest.

The model, adapters and images to edit have to be on a disk that all machines of the cluster see under the same path.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...ray_cluster import ray_session, require_ray, threads_of_an_actor
from ..engine.program import make_engine
from ..engine.spec import EngineSpec
from .generate import by_engine
from .records import Record
from .run import Generate, Made


class Worker:
    """An actor: an engine, loaded once."""

    def __init__(self, spec: EngineSpec, scheduler: str, threads: int):
        import torch

        torch.set_num_threads(threads)  # Ray gives an actor one
        self.generate = by_engine(
            make_engine(spec), spec.name, scheduler, spec.most_running, within_budget=spec.limited
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Pickled records -> their numbers, images (none if there is an error), seconds and errors."""
        records = [pickle.loads(content) for content in batch["record"].tolist()]
        made = list(self.generate(records))
        return {
            "index": [each.record.index for each in made],
            "png": [each.png for each in made],
            "seconds": [each.seconds for each in made],
            "error": [each.error or "" for each in made],
        }


def by_ray(address: str, actors: int, spec: EngineSpec, scheduler: str) -> Generate:
    """What generates the images of records on a Ray cluster. Work of actors and machines that end is done again.

    Args:
        address: of the cluster; "auto" finds a running one, "local" starts one in this machine.
        actors: at most; each takes a GPU if it computes on one.
        spec: of the engines. Without a device they compute on the GPUs of the cluster if it has some, else on CPUs.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    require_ray()

    def generate(records: Sequence[Record]) -> Iterator[Made]:
        with ray_session(address) as ray:
            gpus = ray.cluster_resources().get("GPU", 0)
            device = spec.device or ("cuda" if gpus >= 1 else "cpu")  # this machine may have none
            by_index = {record.index: record for record in records}
            batches = -(-len(records) // spec.most_running)
            rows = ray.data.from_items([{"record": pickle.dumps(record)} for record in records]).map_batches(
                Worker,
                fn_constructor_args=(replace(spec, device=device), scheduler, threads_of_an_actor(ray, actors)),
                batch_size=spec.most_running,
                concurrency=min(actors, batches),  # begins with those that have a place, and grows with the cluster
                num_gpus=1 if device.startswith("cuda") else 0,
            )
            for row in rows.iter_rows():
                yield Made(by_index[row["index"]], row["png"], row["seconds"], row["error"] or None)

    return generate
