"""The training loop: masters, optimizers, rates, buffers, logs."""

from __future__ import annotations

import errno
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from impasto.errors import ConfigurationError, InputError, OutputError
from impasto.training.distributed.processes import Processes
from impasto.training.objectives.base import Loss
from impasto.training.optimizers import make_optimizers
from impasto.training.running import checkpoints
from impasto.training.running.guard import DivergedError
from impasto.training.running.loop import train
from impasto.training.running.masters import Masters
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import OptimizerSettings, Settings

from ..tiny import tiny_text_encoder, tiny_transformer
from .runs import Of, rows, settings, steps_alone, stored, values


def run(model: nn.Module, folder: Path, steps: int, **options: Any) -> None:
    def loss(step: int, random: Randomness) -> Loss:
        x = random.normal([8, 3])
        with torch.autocast("cpu", torch.bfloat16):
            each = (model(x).float() - x.sum(1, keepdim=True)).square().mean(1)
        return Loss(each, {"global": torch.rand(())})

    train(Of(model, loss), steps_alone(8), settings(steps, **{"log_every": 4, **options}), folder)


# --- masters ---


def test_masters_add_up_changes_that_bfloat16_would_lose() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    masters = Masters(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    for _ in range(100):
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        masters.take_gradients()
        assert model.weight.grad is None
        master = masters.named["weight"]
        assert master.grad is not None
        master -= 1e-4 * master.grad
        master.grad = None
        masters.publish()
    torch.testing.assert_close(masters.named["weight"], torch.full((1, 2), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(model.weight, masters.named["weight"].bfloat16())
    for value in (1.0, 0.001):
        model(torch.full((1, 2), value, dtype=torch.bfloat16)).sum().backward()
        masters.take_gradients()
    summed = torch.tensor([1.0, 0.001], dtype=torch.bfloat16).float().sum()
    assert torch.equal(masters.named["weight"].grad, summed.expand(1, 2))  # type: ignore[arg-type]
    masters.named["weight"].grad = None
    masters.take_gradients()  # a parameter that took no part has a gradient of zero
    assert float(masters.named["weight"].grad.abs().max()) == 0  # type: ignore[union-attr]


def test_in_float32_the_parameters_are_the_masters() -> None:
    model = nn.Linear(2, 1)
    masters = Masters(model, torch.float32)
    masters.named["weight"].fill_(3.0)
    assert torch.equal(model.weight, torch.full((1, 2), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_values_are_held_for_a_while(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 1)
    masters = Masters(model, dtype)
    before = model.weight.detach().clone()
    with masters.replaced_by({name: torch.ones_like(p) for name, p in masters.named.items()}):
        assert torch.equal(model.weight, torch.ones(1, 2))  # in float32
    assert model.weight.dtype == dtype
    assert torch.equal(model.weight, before)


def test_batch_normalization_stays_float32_and_its_statistics_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    assert Masters(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), torch.bfloat16).working["1.weight"].dtype == (
        torch.float32
    )
    run(model, tmp_path, 6, precision="bfloat16")
    assert float(model[1].running_mean.abs().max()) > 0
    again = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    run(again, tmp_path, 6, precision="bfloat16")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert int(again[1].num_batches_tracked) == 6


# --- optimizers and rates ---


def test_muon_takes_the_matrices_between_hidden_states_alone() -> None:
    models = nn.ModuleDict({"transformer": tiny_transformer(), "text_encoder": tiny_text_encoder(num_layers=1)})
    named = dict(models.named_parameters())
    muon, adamw = make_optimizers(named, OptimizerSettings(name="muon"))
    by_id = {id(p): name for name, p in named.items()}
    names = {by_id[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {n for n in names if "text_encoder" in n and "relative" not in n}
    assert "transformer.transformer_blocks.0.attn1.to_q.weight" in names
    assert not [n for n in names if "table" in n or "bias" in n or "embed" in n or "proj_out" in n or "shared" in n]
    others = {by_id[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert names | others == set(named)
    assert not names & others


def test_adamw_alone_takes_everything_and_decays_no_vectors() -> None:
    named = dict(tiny_transformer().named_parameters())
    (adamw,) = make_optimizers(named, OptimizerSettings(weight_decay=0.5, betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(named)
    assert adamw.defaults["betas"] == (0.8, 0.9)
    for group in adamw.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.5}


# --- the loop ---


def test_a_save_ends_a_window_of_the_log(tmp_path: Path) -> None:
    losses: list[float] = []
    model = nn.Linear(1, 1)

    def loss(step: int, random: Randomness) -> Loss:
        total = model.weight.float().square().sum() + step
        losses.append(float(total))
        return Loss(total[None])

    plan = settings(10, log_every=4, checkpoints={"every": 6})
    train(Of(model, loss), steps_alone(), plan, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [4, 6, 8, 10]
    windows = [losses[0:4], losses[4:6], losses[6:8], losses[8:10]]
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx([sum(w) / len(w) for w in windows])


def test_training_neither_reads_nor_disturbs_the_global_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for i, model in enumerate(models):
        torch.manual_seed(i)
        before = torch.random.get_rng_state()
        run(model, tmp_path / str(i), 5)
        assert torch.equal(torch.random.get_rng_state(), before)
    logs = [values(tmp_path / str(i)) for i in range(2)]
    assert logs[0] == logs[1]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(0)
        run(nn.Linear(3, 1), tmp_path / str(seed), 2, seed=seed)
    assert rows(tmp_path / "0")[0]["loss"] != rows(tmp_path / "1")[0]["loss"]


def test_masters_and_averages_are_saved_in_float32(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    run(model, tmp_path, 5)
    state = stored(tmp_path)
    assert list(checkpoints.found(tmp_path)) == [5]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == state[f"models.module.{name}"].dtype == torch.float32
        assert torch.equal(parameter, state[f"ema.module.{name}"])
        assert not torch.equal(parameter, state[f"models.module.{name}"])
    assert not model.training


# --- steps that are skipped, signals, a full disk ---


def plain(steps: int, **options: Any) -> Settings:
    constant = {"kind": "constant"}
    return settings(steps, **{"log_every": 1, "precision": "float32", "schedule": constant, **options})


def spoiled(folder: Path, steps: int, bad: set[int], **options: Any) -> nn.Linear:
    """A run some of whose losses are not finite."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step: int, random: Randomness) -> torch.Tensor:
        x = random.normal([8, 3])
        return (model(x) - x.sum(1, keepdim=True)).square().mean(1) * (math.nan if step in bad else 1.0)

    train(Of(model, loss), steps_alone(8), plain(steps, **options), folder)
    return model


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path: Path) -> None:
    every: dict[str, Any] = {"checkpoints": {"every": 1, "keep": 9}}
    spoiled(tmp_path / "whole", 8, {2, 3, 6}, **every)
    assert [row["skipped"] for row in rows(tmp_path / "whole")] == [0, 0, 1, 2, 2, 2, 3, 3]
    tensors = [load_file(next(path.glob("*.safetensors"))) for path in checkpoints.found(tmp_path / "whole").values()]
    for before, after in ((1, 2), (2, 3), (5, 6)):
        assert all(torch.equal(tensors[before][name], value) for name, value in tensors[after].items())
    assert not torch.equal(tensors[3]["models.module.weight"], tensors[4]["models.module.weight"])
    with pytest.raises(DivergedError, match=r"3 steps in a row"):
        spoiled(tmp_path / "ended", 8, {3, 4, 5}, guard={"most_in_a_row": 3}, **every)
    assert max(checkpoints.found(tmp_path / "ended")) == 5
    with pytest.raises(DivergedError, match="up to step 6"):  # the count is part of the state
        spoiled(tmp_path / "ended", 8, {3, 4, 5}, guard={"most_in_a_row": 3}, **every)


def test_a_signal_ends_a_run_after_a_checkpoint_from_which_it_goes_on(tmp_path: Path) -> None:
    def run_until(folder: Path, last: int | None) -> int | None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss(step: int, random: Randomness) -> torch.Tensor:
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return model(random.normal([8, 3])).square().mean(1)

        return train(Of(model, loss), steps_alone(8), plain(6), folder)

    assert run_until(tmp_path / "parts", 2) == signal.SIGTERM
    assert list(checkpoints.found(tmp_path / "parts")) == [3]
    assert run_until(tmp_path / "parts", None) is None
    assert run_until(tmp_path / "whole", None) is None
    assert values(tmp_path / "parts") == values(tmp_path / "whole")


def test_processes_that_see_other_data_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, data, model = Processes(rank=1), steps_alone(8), nn.Linear(3, 1)
    data.order = SimpleNamespace(fingerprint="own", in_buckets={}, pack_pixels=None)  # type: ignore[attr-defined]
    monkeypatch.setattr(processes, "shared", lambda value: "another")
    objective = Of(model, lambda step, random: model(random.normal([8, 3])).square().mean(1))
    with pytest.raises(InputError, match="rank 1 sees other data than rank 0"):
        train(objective, data, plain(1), tmp_path, processes=processes)


def test_blocks_may_be_compiled_for_all_shapes_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    config = torch._dynamo.config
    seen: list[int] = []

    def loss(step: int, random: Randomness) -> torch.Tensor:
        seen.append(config.recompile_limit)
        return model(random.normal([8, 3])).square().mean(1)

    model, data, before = nn.Linear(3, 1), steps_alone(8), config.recompile_limit
    sizes = {(16 * i, 16): 1 for i in range(1, 41)}
    data.order = SimpleNamespace(fingerprint="", in_buckets=sizes, pack_pixels=None)  # type: ignore[attr-defined]
    train(Of(model, loss), data, plain(1, compile=True), tmp_path)
    assert seen[0] >= 2 * 40
    assert config.recompile_limit == before


def test_a_checkpoint_is_saved_before_it_is_measured(tmp_path: Path) -> None:
    def start(folder: Path, killed: int | None) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def check(step: int) -> dict[str, float]:
            if step == killed:
                raise KeyboardInterrupt
            return {"error": float(model.weight.abs().sum())}

        objective = Of(model, lambda step, random: (model(random.normal([8, 3])) - 1).square().mean(1))
        plan = plain(6, log_every=4, checkpoints={"every": 3, "keep": 1, "best": "error", "best_is": "highest"})
        train(objective, steps_alone(8), plan, folder, check)

    start(tmp_path / "whole", None)
    for killed in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "parts", killed)
        assert max(checkpoints.found(tmp_path / "parts")) == killed
    start(tmp_path / "parts", None)
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole") if "error" in row] == [3, 6]
    states = [(checkpoints.latest(tmp_path / name) / "state.json").read_text() for name in ("parts", "whole")]  # type: ignore[operator]
    assert states[0] == states[1]
    assert list(checkpoints.found(tmp_path / "parts")) == list(checkpoints.found(tmp_path / "whole"))


@pytest.mark.parametrize("last", [3, 6])
def test_a_signal_at_a_checkpoint_leaves_its_measure_to_the_next_run(last: int, tmp_path: Path) -> None:
    def start(folder: Path, stopped: int | None) -> int | None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss(step: int, random: Randomness) -> torch.Tensor:
            if step + 1 == stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            return model(random.normal([8, 3])).square().mean(1)

        plan = plain(6, checkpoints={"every": 3, "keep": 1, "best": "error", "best_is": "highest"})
        check = lambda step: {"error": float(model.weight.abs().sum())}  # noqa: E731
        return train(Of(model, loss), steps_alone(8), plan, folder, check)

    assert start(tmp_path / "parts", last) == signal.SIGTERM
    assert not any("error" in row for row in rows(tmp_path / "parts") if row["step"] == last)
    assert start(tmp_path / "parts", None) is None
    assert start(tmp_path / "whole", None) is None
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    assert list(checkpoints.found(tmp_path / "parts")) == list(checkpoints.found(tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(tmp_path, 4, set(), checkpoints={"every": 2})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "publish_folder", full)
    with pytest.raises(OutputError, match=r"step 6 was not saved, and the last one is .*step-00000004: No space left"):
        spoiled(tmp_path, 8, set(), checkpoints={"every": 2})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    spoiled(tmp_path, 8, set(), checkpoints={"every": 2})
    spoiled(tmp_path / "whole", 8, set(), checkpoints={"every": 2})
    assert values(tmp_path) == values(tmp_path / "whole")


def test_float16_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float16 needs a GPU"):
        run(nn.Linear(3, 1), tmp_path, 2, precision="float16")


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """Each sample's random numbers depend on its place in the global batch."""
    from .objectives import test_text_to_image as images

    losses = []
    for size in (None, 3):
        torch.manual_seed(0)
        parts = images.models()
        for module in parts[1].modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plan = settings(2, log_every=1, micro_batch=size, precision="float32", optimizer={"name": "adamw"})
        images.train(parts, plan, tmp_path / str(size), timesteps="uniform")
        losses.append([(row["loss"], row["norm"]) for row in rows(tmp_path / str(size))])
    assert losses[0] == [pytest.approx(pair, rel=1e-4) for pair in losses[1]]


@pytest.mark.parametrize(("name", "saved"), [("prodigy", 3), ("prodigy", 30), ("came", 30)])
def test_other_optimizers_learn_and_go_on(name: str, saved: int, tmp_path: Path) -> None:
    def start(folder: Path, steps: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        rate = {"prodigy": 1.0, "came": 0.05}[name]
        plan = plain(steps, optimizer={"name": name, "rate": rate, "betas": (0.9, 0.99)}, checkpoints={"every": saved})
        objective = Of(model, lambda step, random: (model(random.normal([8, 3])) - 1).square().mean(1))
        train(objective, steps_alone(8), plan, folder)

    start(tmp_path / "parts", saved)
    start(tmp_path / "parts", 60)
    start(tmp_path / "whole", 60)
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
