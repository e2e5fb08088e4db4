"""The outputs of calls: tuples whose fields can also be read by attribute and by key.

Declare one as a ``NamedTuple`` under the decorator::

    @keyed
    class DecoderOutput(NamedTuple):
        sample: torch.Tensor  # [B, C, H, W]

    output.sample, output["sample"], output[0]
    (sample,) = output

Being tuples, they need no registration with ``torch.compile`` and ``torch.utils._pytree``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T", bound=type[tuple[Any, ...]])


def keyed(cls: T) -> T:
    """Add ``output["name"]``, ``keys()`` and ``to_tuple()`` to a NamedTuple."""

    def getitem(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._fields:
                raise KeyError(f"{cls.__name__} has no {key!r}; it has: {', '.join(self._fields)}")
            return getattr(self, key)
        return tuple.__getitem__(self, key)

    cls.__getitem__ = getitem  # type: ignore[method-assign]
    cls.keys = lambda self: self._fields  # type: ignore[attr-defined]
    cls.to_tuple = lambda self: tuple(self)  # type: ignore[attr-defined]
    return cls


@keyed
class Transformer2DModelOutput(NamedTuple):
    """The prediction of a transformer."""

    sample: torch.Tensor  # [B, out_channels, H, W]
