from __future__ import annotations

import pickle

import pytest
import torch

from impasto.nn.outputs import Transformer2DModelOutput


def test_a_field_is_read_by_attribute_key_index_and_unpacking() -> None:
    sample = torch.randn(2)
    output = Transformer2DModelOutput(sample=sample)
    (unpacked,) = output
    assert output.sample is output["sample"] is output[0] is output[-1] is unpacked is sample


def test_it_is_a_tuple_with_keys() -> None:
    output = Transformer2DModelOutput(torch.zeros(1))
    assert isinstance(output, tuple)
    assert list(output.keys()) == ["sample"]
    assert type(output.to_tuple()) is tuple
    assert output[:1] == (output.sample,)


def test_a_wrong_key_names_those_that_there_are() -> None:
    output = Transformer2DModelOutput(torch.zeros(1))
    with pytest.raises(KeyError, match="Transformer2DModelOutput has no 'images'; it has: sample"):
        output["images"]
    with pytest.raises(IndexError):
        output[1]


def test_it_survives_pytrees_and_pickling() -> None:
    output = Transformer2DModelOutput(torch.ones(1))
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, output)
    assert isinstance(doubled, Transformer2DModelOutput)
    assert doubled.sample.item() == 2.0
    assert pickle.loads(pickle.dumps(output))["sample"].item() == 1.0
