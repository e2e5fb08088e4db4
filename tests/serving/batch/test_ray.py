"""A batch on a Ray cluster of two nodes: an actor and then a node are killed, and every record has one image."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from impasto import ray_cluster
from impasto.errors import ResourceError
from impasto.serving.batch import on_ray
from impasto.serving.batch.generate import by_engine
from impasto.serving.batch.manifest import Manifest
from impasto.serving.batch.outputs import Folders
from impasto.serving.batch.records import Record
from impasto.serving.batch.run import in_order, run
from impasto.serving.engine.costs import StepCosts
from impasto.serving.engine.program import make_engine
from impasto.serving.engine.spec import EngineSpec

from ...tiny import write_pipeline
from .test_batch import pixels

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
COSTS = StepCosts(((16, 0.01), (64, 0.02)), ((16, 0.01), (64, 0.02)))


def spec_of(folder: Path) -> EngineSpec:
    path = str(write_pipeline(folder / "model"))
    return EngineSpec("tiny", path, "PixArtSigmaPipeline", "cpu", "float32", costs=COSTS, most_running=4)


def records(count: int) -> list[Record]:
    made = [
        Record(i, f"r{i}", f"a cat {i}", "", 16 + 8 * (i % 2), 16, 2 + i % 3, 4.5, i, None, (), (), None, 0.8)
        for i in range(count)
    ]
    return in_order(made)


class Slow(on_ray.Worker):
    """One that says where it runs, and takes a while."""

    def __init__(self, spec: Any, *more: Any):
        super().__init__(spec, *more)
        self.folder = Path(spec.path).parent

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        import time

        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"worker-{os.getpid()}").write_text(node)
        time.sleep(1.0)
        return super().__call__(batch)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    places = [str(Path(importlib.import_module("impasto").__file__).parents[1]), *sys.path]  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.cluster
@needs_ray
def test_every_record_once_though_an_actor_and_a_node_are_killed(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    importlib.import_module("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(on_ray, "Worker", Slow)
    spec, todo = spec_of(tmp_path), records(60)
    manifest, seen, killed = Manifest(tmp_path), 0, []

    def workers() -> dict[int, str]:
        return {int(path.name.split("-")[1]): path.read_text() for path in tmp_path.glob("worker-*")}

    def kill_some() -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            pid = next(iter(workers()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append("actor")
        if seen == 24:
            cluster.remove_node(node, allow_graceful=False)
            killed.append("node")

    generate = on_ray.by_ray(cluster.address, 2, spec, "dpm++")
    counts = run(todo, generate, Folders(tmp_path), manifest, "m", done=kill_some)
    assert killed == ["actor", "node"]
    assert (counts.generated, counts.failed) == (60, 0)
    lines = manifest.own()
    assert sorted(line["index"] for line in lines) == list(range(60))
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 60
    assert len(workers()) >= 3

    alone = tmp_path / "alone"
    alone.mkdir()
    run(todo, by_engine(make_engine(spec), "tiny", "dpm++", 4), Folders(alone), Manifest(alone), "m")
    # In levels of 255. Images that differ by at most 1e-5 differ in a few rounded pixels, and on average by no more.
    differences = [np.abs(pixels(tmp_path / line["file"]) - pixels(alone / line["file"])) for line in lines]
    assert max(each.max() for each in differences) <= 1
    assert np.mean([each.mean() for each in differences]) <= 255 * 1e-5


@pytest.mark.cluster
@needs_ray
def test_an_address_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **options: Any) -> None:
        raise ConnectionError(f"nobody answers at {address}")

    monkeypatch.setattr(importlib.import_module("ray"), "init", init)
    spec = EngineSpec("tiny", str(tmp_path), "PixArtSigmaPipeline", "cpu")
    with pytest.raises(ResourceError, match="there is no Ray cluster at 'gone:1': ConnectionError: nobody answers"):
        list(on_ray.by_ray("gone:1", 1, spec, "dpm++")(records(1)))


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        ([{"CPU": 8.0, "GPU": 1.0}, {}, {"CPU": 4.0}], None, ("cuda", 1, 4)),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}], "cpu", ("cpu", 0, 4)),
        ([{"GPU": 0.5}], None, ("cpu", 0, 1)),
    ],
)
def test_the_devices_are_those_of_the_cluster(
    nodes: list[dict[str, float]], device: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stand-in for the library, which notes what it is asked for."""
    found: dict[str, Any] = {}

    def map_batches(worker: Any, **options: Any) -> Any:
        found.update(options)
        return SimpleNamespace(iter_rows=lambda: [{"index": 0, "png": b"", "seconds": 1.0, "error": ""}])

    totals = {name: sum(node.get(name, 0) for node in nodes) for name in {name for node in nodes for name in node}}
    ray: Any = SimpleNamespace(
        init=lambda **options: found.update(options),
        data=SimpleNamespace(
            DataContext=SimpleNamespace(get_current=SimpleNamespace),
            from_items=lambda rows: SimpleNamespace(map_batches=map_batches),
        ),
        nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes],
        cluster_resources=lambda: totals,
        exceptions=SimpleNamespace(RayError=RuntimeError),
        shutdown=lambda: None,
    )
    monkeypatch.setattr(on_ray, "require_ray", lambda: ray)
    monkeypatch.setattr(ray_cluster, "require_ray", lambda: ray)
    spec = EngineSpec("tiny", "model", "PixArtSigmaPipeline", device)
    (made,) = on_ray.by_ray("local", 1, spec, "dpm++")(records(1))
    assert made.record.index == 0
    assert found["address"] == "local"
    spec, _, threads = found["fn_constructor_args"]
    assert (spec.device, found["num_gpus"], threads) == expected
