"""Tensors, optimizers and checkpoints of two processes: what each shard does equals what one process does to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from impasto.errors import CheckpointError
from impasto.training.distributed.parallel import replicated, shard, synchronize, whole
from impasto.training.distributed.processes import Processes, joined
from impasto.training.distributed.shards import clip_norm, each_by_one, full
from impasto.training.distributed.storage import read_state, read_tensors, write_tensors
from impasto.training.optimizers.came import CAME
from impasto.training.optimizers.muon import Muon

from .ranks import in_ranks


class Net(nn.Module):
    """With a convolution, vectors, a matrix of fewer rows than ranks, and frozen layers in a block and outside."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv = nn.Conv1d(3, 5, 2)
            frozen = nn.Linear(7, 7).requires_grad_(False)
            self.block = nn.Sequential(nn.Linear(5, 7), nn.GELU(), frozen, nn.Linear(7, 5))
            self.head = nn.Linear(5, 1)
            self.unused = nn.Linear(2, 2)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.frozen(self.conv(x).mean(2)))).square().flatten()


def inputs(step: int) -> Tensor:
    return torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(step))


OPTIMIZERS: Mapping[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "came": lambda p: CAME(p, lr=1e-2, weight_decay=0.1),
    "muon": lambda p: Muon([m for m in p if m.ndim == 2], lr=1e-2),
}


def trained(net: nn.Module, call: Callable[[Tensor], Tensor], name: str, rows: slice, steps: int = 4) -> dict[str, Any]:
    """A few steps on rows of each batch; the sums of gradients are those of the whole batch."""
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[name](list(named.values()))
    norms = []
    for step in range(steps):
        (call(inputs(step)[rows]).sum() / 3).backward()
        norms.append(float(clip_norm(named.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, **{n: full(p.detach()).clone() for n, p in named.items()}}


def work(folder: Path) -> dict[str, Any]:
    with joined("fsdp") as processes:
        rows = slice(0, 2) if processes.rank == 0 else slice(2, 3)
        found: dict[str, Any] = {}
        for kind in ("ddp", "fsdp", "hsdp"):
            for name in OPTIMIZERS if kind == "fsdp" else ["adamw"]:
                net = Net()
                if kind == "ddp":
                    with torch.no_grad():
                        net.head.weight.add_(processes.rank)
                    synchronize(net, processes)
                    call = replicated(net, processes)
                else:
                    processes.parallel, processes.shards = kind, 1  # type: ignore[assignment]
                    shard(net, [net.block], processes, torch.float32)
                    call = net
                    with torch.no_grad(), whole(net):
                        found[f"{kind} whole"] = net.block(net.conv(inputs(0)).mean(2))
                found[f"{kind} {name}"] = trained(net, call, name, rows)
        named = {n: p.detach() for n, p in net.named_parameters()}
        found["sum"] = processes.sum(torch.tensor(float(processes.rank + 1)))
        found["merged"] = processes.merged({"a": (1.0, 2.0), f"b{processes.rank}": (3.0, 1.0)})
        found["highest"] = processes.highest(processes.rank)
        found["shared"] = processes.shared(f"rank {processes.rank}")
        processes.parallel = "fsdp"
        net = Net()
        shard(net, [net.block], processes, torch.float32)
        named = {n: p.detach() for n, p in net.named_parameters()}
        matrices = [p for p in named.values() if isinstance(p, DTensor) and p.ndim == 2]
        summed = each_by_one(matrices, lambda several: [m.cumsum(0) for m in several])
        found["each"] = [
            full(DTensor.from_local(part, m.device_mesh, m.placements, shape=m.shape, stride=m.stride()))
            for part, m in zip(summed, matrices, strict=True)
        ]
        found["expected"] = [full(m).cumsum(0) for m in matrices]
        found.update(stored(folder, named, processes))
        return found


def stored(folder: Path, named: dict[str, Tensor], processes: Processes) -> dict[str, Any]:
    """What one process wrote is read by two, and the reverse."""
    read_tensors(folder / "one", named)
    found = {n: full(p).clone() for n, p in named.items()}
    for tensor in named.values():
        tensor.mul_(2)
    write_tensors(folder / "two", {**named, "step": torch.tensor(5.0)}, {"step": 5}, processes)
    return {"read": found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("one", "two"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    write_tensors(folder / "one", values(3.0), {}, Processes())
    return in_ranks(work, folder, folder)


def values(factor: float) -> dict[str, Tensor]:
    return {n: p.detach() * factor for n, p in Net().named_parameters()}


@pytest.mark.parametrize("case", ["ddp adamw", "hsdp adamw", *(f"fsdp {name}" for name in OPTIMIZERS)])
def test_two_ranks_equal_one_process(case: str, found: list[dict[str, Any]]) -> None:
    net = Net()
    expected = trained(net, net, case.split()[1], slice(None))
    for result in found:
        assert result[case].keys() == expected.keys()
        assert result[case]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for name, value in expected.items():
            if name != "norms":
                torch.testing.assert_close(result[case][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_models_may_be_called_from_outside_while_they_are_whole(found: list[dict[str, Any]]) -> None:
    net = Net()
    for result in found:
        torch.testing.assert_close(result["fsdp whole"], net.block(net.conv(inputs(0)).mean(2)))


def test_processes_agree_and_add_up(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert float(result["sum"]) == 3
        assert result["merged"] == {"a": (2.0, 4.0), "b0": (3.0, 1.0), "b1": (3.0, 1.0)}
        assert result["highest"] == 1
        assert result["shared"] == "rank 0"


def test_whole_matrices_are_divided_between_ranks(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert len(result["each"]) == 5
        for one, other in zip(result["each"], result["expected"], strict=True):
            assert torch.equal(one, other)


def test_a_checkpoint_is_read_by_another_number_of_ranks(found: list[dict[str, Any]], folder: Path) -> None:
    for result in found:
        for name, value in values(3.0).items():
            assert torch.equal(result["read"][name], value), name
    again = {**values(0.0), "step": torch.tensor(0.0)}
    read_tensors(folder / "two", again)
    assert read_state(folder / "two") == {"step": 5}
    assert float(again.pop("step")) == 5
    for name, value in values(6.0).items():
        assert torch.equal(again[name], value), name
    assert not list(folder.glob(".*"))


def test_an_incomplete_or_foreign_checkpoint_is_refused(found: list[dict[str, Any]], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another model or run: it lacks extra"):
        read_tensors(folder / "two", {**values(0.0), "step": torch.tensor(0.0), "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"conv.bias as \['float32', \[5\]\], and this run"):
        read_tensors(folder / "one", {**values(0.0), "conv.bias": torch.zeros(6)})
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state(folder / "three")
    copy = folder / "copy"
    copy.mkdir()
    for path in (folder / "two").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = next(copy.glob("shard-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_state(copy)
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_tensors(copy, values(0.0))


def of_several(kind: Any, shards: int | None) -> dict[str, Any]:
    found = {}
    with joined(kind, shards=shards) as processes:
        rows = slice(3 * processes.rank // processes.count, 3 * (processes.rank + 1) // processes.count)
        for name in OPTIMIZERS:
            net = Net()
            shard(net, [net.block], processes, torch.float32)
            found[name] = trained(net, lambda x, net=net: net(x) if len(x) else 0 * net(inputs(0)[:1]), name, rows)
    return found


@pytest.mark.cluster
@pytest.mark.parametrize(("kind", "shards", "count"), [("hsdp", 2, 4), ("fsdp", None, 3)])
def test_more_ranks_equal_one_process(kind: str, shards: int | None, count: int, tmp_path: Path) -> None:
    """Also ranks without any rows, of the batch or of a matrix."""
    found = in_ranks(of_several, tmp_path, kind, shards, count=count)
    for name in OPTIMIZERS:
        net = Net()
        expected = trained(net, net, name, slice(None))
        for result in found:
            assert result[name].pop("norms") == pytest.approx(expected["norms"], rel=1e-5)
            for key, value in result[name].items():
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
