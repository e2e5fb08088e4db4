"""What is in force on a module: what counts as plain, our own records, their copies, and undoing in any order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto import PixArtTransformer2DModel, cache_steps, compute_as_stored, compute_in_float32, quantize
from impasto.errors import ConfigurationError
from impasto.nn import changes
from impasto.nn.changes import CALL, Change, is_plain
from impasto.pipelines.compiling import CompiledCall

from ..tiny import tiny_transformer


def predict(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        predicted: Tensor = model(latents.to(dtype), text.to(dtype), torch.tensor([5]), return_dict=False)[0]
    return predicted


# --- changes made by others ---


class Subclass(nn.Linear):
    pass


class Weight(nn.Parameter):
    pass


def replace_weight(layer: nn.Linear) -> None:
    layer.weight = Weight(layer.weight.data)


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.compile(backend="eager"),
        replace_forward,
        replace_weight,
    ],
)
def test_a_changed_layer_is_not_plain(change: Callable[[nn.Linear], Any]) -> None:
    layer = nn.Linear(3, 4)
    assert is_plain(layer, nn.Linear)
    change(layer)
    assert not is_plain(layer, nn.Linear)


def test_only_the_very_class_is_plain_and_dropout_if_it_is_idle() -> None:
    assert not is_plain(Subclass(3, 4), nn.Linear)
    assert is_plain(Subclass(3, 4), Subclass)
    assert is_plain(nn.Linear(3, 4, bias=False), nn.LayerNorm, nn.Linear)
    dropout = nn.Dropout(0.5)
    assert not is_plain(dropout, nn.Dropout)
    assert is_plain(dropout.eval(), nn.Dropout)
    assert is_plain(nn.Dropout(0.0), nn.Dropout)


def test_dropout_that_drops_is_not_left_out() -> None:
    model = tiny_transformer()
    block, expected = model.transformer_blocks[0], predict(model)
    for dropout in (block.attn1.to_out[1], block.ff.net[1]):
        dropout.p = 0.9
        dropout.train()
        assert not torch.equal(predict(model), expected)
        dropout.eval()
        assert torch.equal(predict(model), expected)
    block.ff.net[1] = nn.Sigmoid()
    assert not torch.equal(predict(model), expected)


# --- our own ---


def fuse(model: PixArtTransformer2DModel) -> None:
    model.fuse_qkv_projections()


def quantize_all(model: PixArtTransformer2DModel) -> None:
    pytest.importorskip("torchao")
    quantize(model, "int8-weight-only")


def compile_blocks(model: PixArtTransformer2DModel) -> None:
    for block in model.transformer_blocks:
        CompiledCall(block, {"backend": "eager"}).put(block, CALL)


MADE: dict[str, Callable[[PixArtTransformer2DModel], Any]] = {
    "fused": fuse,
    "quantized": quantize_all,
    "compiled": compile_blocks,
    "cached": lambda model: cache_steps(model),
    "of a chosen precision": lambda model: compute_in_float32(model.bfloat16()),
}
#: What a copy of a module has too, with layers of its own.
COPIED = {"fused", "quantized", "of a chosen precision"}


def records(model: nn.Module) -> list[Change]:
    return [change for module in model.modules() for change in changes.of(module)]


@pytest.mark.parametrize("name", MADE)
def test_a_copy_has_records_of_its_own_or_none_and_computes_with_its_own_weights(name: str) -> None:
    model = tiny_transformer()
    assert records(model) == []
    MADE[name](model)
    assert {change.change for change in records(model)} == {name}
    expected = predict(model)

    copied = copy.deepcopy(model)
    assert {change.change for change in records(copied)} == ({name} & COPIED)
    assert not {id(change) for change in records(copied)} & {id(change) for change in records(model)}
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(predict(copied), expected, **close)
    for one, other in ((copied, model), (model, copied)):
        own, before, block = predict(one), predict(other), one.transformer_blocks[0]
        block.load_state_dict({key: 2 * value for key, value in block.state_dict().items()})
        assert not torch.allclose(predict(one), own, rtol=0.1)
        assert torch.equal(predict(other), before)
    torch.compiler.reset()


def test_a_conflict_names_what_is_there_and_how_to_undo_it() -> None:
    model = tiny_transformer()
    model.fuse_qkv_projections()
    message = r"^transformer_blocks\.0\.attn1 is fused and cannot be quantized; call unfuse_qkv_projections\(\) on the"
    with pytest.raises(ConfigurationError, match=message):
        quantize(model, "int8-weight-only")
    compile_blocks(model)
    with pytest.raises(ConfigurationError, match=r"^PixArtBlock is compiled already; remove\(\) the handle"):
        changes.refuse_conflicts(model.transformer_blocks[0], CompiledCall)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_precisions_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    model = tiny_transformer().bfloat16()
    handles = [choose(model) for choose in (compute_in_float32, compute_as_stored, compute_in_float32)]
    choices = [handle.choice for handle in handles]
    for i in order:
        assert vars(model)["_impasto_precision"].choice == next(c for c in reversed(choices) if c is not None)
        handles[i].remove()
        handles[i].remove()  # a second time does nothing
        choices[i] = None  # type: ignore[call-overload]
    assert records(model) == []


@pytest.mark.long
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("compiled_first", [True, False])
def test_caches_and_compiled_calls_are_undone_in_any_order(order: tuple[int, ...], compiled_first: bool) -> None:
    model = tiny_transformer()
    expected, block = predict(model), model.transformer_blocks[0]
    compiled = CompiledCall(block, {"backend": "eager"})
    undo: list[Callable[[], None]] = [lambda: compiled.take(block, CALL)]
    if compiled_first:
        compiled.put(block, CALL, innermost=True)
    undo += [cache_steps(model, threshold=0.0).remove, cache_steps(model, threshold=0.0).remove]
    if not compiled_first:
        compiled.put(block, CALL, innermost=True)
    for i in order:
        assert vars(block)[CALL] is not compiled or {i, *order[order.index(i) :]} == {0}
        undo[i]()
        torch.testing.assert_close(predict(model), expected)
    assert CALL not in vars(block)
    torch.compiler.reset()


def test_a_forward_that_training_has_compiled_counts_as_compiled() -> None:
    block = nn.Linear(2, 2)
    block.forward = torch.compile(block.forward, dynamic=False)
    assert changes.is_compiled(block)
    del block.forward
    assert not changes.is_compiled(block)
