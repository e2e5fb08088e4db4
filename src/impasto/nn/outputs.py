"""The outputs of calls: dataclasses that are also ordered dicts and, by index, tuples, as in diffusers.

    @dataclass
    class DecoderOutput(BaseOutput):
        sample: torch.Tensor  # [B, C, H, W]

    output.sample, output["sample"], output[0]
    (sample,) = output.to_tuple()

Iteration yields names, as for any dict. Fields that are None are neither keys nor among the values.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch.utils import _pytree

from ..errors import InputError

T = TypeVar("T", bound="BaseOutput")


class BaseOutput(OrderedDict[Any, Any]):
    """The base of every output. Values can be replaced and added, but not removed."""

    def __init_subclass__(cls) -> None:
        def flatten(output: T) -> tuple[list[Any], list[str]]:
            return list(output.values()), list(output.keys())

        def flatten_with_keys(output: T) -> tuple[list[tuple[Any, Any]], list[str]]:
            return [(_pytree.MappingKey(name), value) for name, value in output.items()], list(output.keys())

        def unflatten(values: Iterable[Any], names: list[str]) -> Any:
            return cls(**dict(zip(names, values, strict=True)))

        _pytree.register_pytree_node(
            cls,
            flatten,
            unflatten,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=flatten_with_keys,
        )

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        first, *others = values.values()
        if isinstance(first, dict) and all(other is None for other in others):  # as accelerate rebuilds one
            values = first
        for name, value in values.items():
            if value is not None:
                self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{type(self).__name__} has no {key!r}; it has: {', '.join(self)}")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(f"{type(self).__name__} keeps its values; change a copy, dict(output), instead")

    __delitem__ = setdefault = pop = update = _refuse

    def __reduce__(self) -> Any:
        values = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self), values, None, None, iter(self.items())

    def copy(self) -> Self:
        """An output with the same values."""
        return copy.copy(self)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order, without those that are None."""
        return tuple(self.values())


@dataclass
class Transformer2DModelOutput(BaseOutput):
    """The prediction of a transformer."""

    sample: torch.Tensor  # [B, out_channels, H, W]
