from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import BaseOutput as ReferenceOutput
from torch.utils import _pytree

import impasto
from impasto.errors import InputError
from impasto.nn.outputs import BaseOutput, Transformer2DModelOutput


@dataclass
class Ours(BaseOutput):
    first: Any
    second: Any = None


@dataclass
class Theirs(ReferenceOutput):
    first: Any
    second: Any = None


def test_a_field_is_read_by_attribute_key_and_index() -> None:
    sample = torch.randn(2)
    output = Transformer2DModelOutput(sample=sample)
    (unpacked,) = output.to_tuple()
    assert output.sample is output["sample"] is output[0] is output[-1] is unpacked is sample
    assert output[:1] == (sample,)


@pytest.mark.parametrize("values", [(1,), (1, 2), (None, 2), (1, None), ({"first": 3, "second": 4},), ({"new": 5}, 6)])
def test_it_is_the_dict_and_dataclass_that_it_is_in_diffusers(values: tuple[Any, ...]) -> None:
    ours, theirs = Ours(*values), Theirs(*values)
    views = [
        lambda x: list(x.items()),
        lambda x: (list(x), list(x.keys()), list(x.values()), len(x), x.to_tuple(), type(x.to_tuple())),
        lambda x: ("first" in x, "second" in x, x.get("second", 7), x[0], x[-1], x[:1]),
        lambda x: (x.first, x.second, isinstance(x, dict), dataclasses.is_dataclass(x)),
        lambda x: ([field.name for field in dataclasses.fields(x)], dataclasses.asdict(x)),
        lambda x: repr(x).split("(", 1)[1],
        lambda x: _pytree.tree_leaves(x),
    ]
    for view in views:
        assert view(ours) == view(theirs)


def test_values_are_replaced_and_added_as_in_diffusers() -> None:
    ours, theirs = Ours(1), Theirs(1)
    for output in (ours, theirs):
        output.first = 5
        output["second"] = 6
        output["third"] = 7
        output.fourth = 8  # type: ignore[union-attr]
    for output in (ours, theirs, *map(copy.deepcopy, (ours, theirs))):
        assert list(output.items()) == [("first", 5), ("second", 6), ("third", 7)]
        assert (output.first, output.second, output.third) == (5, 6, 7)  # type: ignore[union-attr]


def test_no_value_is_removed() -> None:
    output = Ours(1, 2)
    removals: list[Any] = [
        lambda: output.pop("first"),
        lambda: output.__delitem__("first"),
        lambda: output.update(first=3),
        lambda: output.setdefault("third", 3),
    ]
    for remove in removals:
        with pytest.raises(InputError, match=r"Ours keeps its values; change a copy, dict\(output\)"):
            remove()
    assert output == Ours(1, 2)


def test_a_wrong_key_names_those_that_there_are() -> None:
    output = Transformer2DModelOutput(torch.zeros(1))
    with pytest.raises(KeyError, match="Transformer2DModelOutput has no 'images'; it has: sample"):
        output["images"]
    with pytest.raises(IndexError):
        output[1]


def test_it_survives_pytrees_and_copies() -> None:
    output = Transformer2DModelOutput(torch.ones(1))
    doubled = _pytree.tree_map(lambda x: 2 * x, output)
    assert isinstance(doubled, Transformer2DModelOutput)
    assert doubled.sample.item() == 2.0
    for twin in (pickle.loads(pickle.dumps(output)), copy.copy(output), copy.deepcopy(output), output.copy()):
        assert isinstance(twin, Transformer2DModelOutput)
        assert twin["sample"].item() == twin.sample.item() == 1.0


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=2 * x)


def test_it_is_made_in_compiled_and_exported_graphs() -> None:
    compiled = torch.compile(Doubling(), fullgraph=True, backend="eager")(torch.ones(3))
    exported = torch.export.export(Doubling(), (torch.ones(3),), strict=False).module()(torch.ones(3))
    strict = torch.export.export(Doubling(), (torch.ones(3),), strict=True).module()(torch.ones(3))
    for output in (compiled, exported, strict):
        assert isinstance(output, Transformer2DModelOutput)
        assert list(output) == ["sample"]
        assert torch.equal(output.sample, torch.full((3,), 2.0))
        assert output[0] is output.sample


def test_it_is_used_in_compiled_graphs() -> None:
    def reads(x: torch.Tensor) -> torch.Tensor:
        output = Doubling()(x)
        return output.sample + output["sample"] + output[0]

    assert torch.equal(torch.compile(reads, fullgraph=True, backend="eager")(torch.ones(2)), torch.full((2,), 6.0))


def test_the_names_are_those_of_diffusers() -> None:
    for name in ("AutoencoderKLOutput", "DecoderOutput", "Transformer2DModelOutput", "ImagePipelineOutput"):
        assert issubclass(getattr(impasto, name), BaseOutput)
    assert issubclass(diffusers.ImagePipelineOutput, ReferenceOutput)
