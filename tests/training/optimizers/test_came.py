"""CAME against the library's, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from impasto.training.optimizers.came import CAME
from impasto.training.optimizers.state import start_state, state_tensors


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 5), "row": (1, 5), "vector": (7,), "convolution": (4, 3, 2, 2), "number": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, Tensor], first: int, last: int) -> None:
    """Gradients of very different sizes."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(named.values()):
            parameter.grad = 10.0 ** (3 - 2 * i) * torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_equal_the_librarys(decay: float) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    ours, theirs = parameters(), parameters()
    steps(CAME(ours.values(), lr=1e-2, weight_decay=decay, clip=0.7), ours, 0, 6)
    steps(library.CAME(list(theirs.values()), lr=1e-2, weight_decay=decay, clip_threshold=0.7), theirs, 0, 6)
    for name, value in theirs.items():
        assert not torch.allclose(value, parameters()[name], rtol=1e-3)
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_matrix_costs_one_moment_and_four_vectors() -> None:
    named = parameters()
    optimizer = CAME(named.values())
    steps(optimizer, named, 0, 1)
    sizes = dict.fromkeys(named, 0)
    for name, tensor in state_tensors([optimizer], named).items():
        sizes[name.split(".")[2]] += tensor.numel()
    assert sizes["matrix"] == 30 + 2 * (6 + 5)
    assert sizes["vector"] == 14
    assert sizes["convolution"] == 48 + 2 * (12 * 2 + 12 * 2)


def test_a_stored_state_continues_the_same_run() -> None:
    whole, parts = parameters(), parameters()
    steps(CAME(whole.values(), lr=1e-2), whole, 0, 5)
    first = CAME(parts.values(), lr=1e-2)
    steps(first, parts, 0, 3)
    kept = {name: tensor.clone() for name, tensor in state_tensors([first], parts).items()}
    second = CAME(parts.values(), lr=1e-2)
    before = {name: tensor.clone() for name, tensor in parts.items()}
    start_state([second])
    assert all(torch.equal(parts[name], value) for name, value in before.items())
    assert state_tensors([second], parts).keys() == kept.keys()
    for name, tensor in state_tensors([second], parts).items():
        tensor.copy_(kept[name])
    steps(second, parts, 3, 5)
    for name, value in whole.items():
        assert torch.equal(parts[name], value)
