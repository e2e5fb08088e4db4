"""Layers around the call of a module, for code that changes it from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

#: Takes the call that it wraps and the arguments of that call, and returns the result of the module.
Layer = Callable[..., Any]

_SLOT = "_compiled_call_impl"


class Seam:
    """Layers around the call of a module, the last one outermost.

    It is stored where ``nn.Module.compile`` stores its result, so it is outside of compiled graphs and hooks: if a
    layer skips the module, neither runs. A replaced ``forward`` would be inside of both. A copy of the module has no
    layers, since torch leaves this attribute out of copies and pickles; a replaced ``forward`` would be copied with
    the module and keep computing with the weights of the original.

    A later ``module.compile()`` overwrites it: callers that need a layer check ``is_around`` and insert it again.
    Removing the last layer restores what was there before.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._before: Callable[..., Any] | None = module._compiled_call_impl
        self.layers: list[Layer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = self._before or self._module._call_impl
        for layer in self.layers:
            call = partial(layer, call)
        return call(*args, **kwargs)

    def remove(self) -> None:
        if vars(self._module).get(_SLOT) is not self:  # wrapped by something else: it stays, empty
            return
        if self._before is None:
            del self._module.__dict__[_SLOT]
        else:
            self._module.__dict__[_SLOT] = self._before


def _find(module: nn.Module) -> Seam | None:
    """The seam of a module, even if something else has been wrapped around it in the meantime."""
    found = vars(module).get(_SLOT)
    while found is not None and not isinstance(found, Seam):
        found = getattr(found, "__wrapped__", None)
    return found


def insert(module: nn.Module, layer: Layer) -> None:
    """Put a layer around the call of ``module``: ``layer(call, *args, **kwargs)``."""
    seam = _find(module)
    if seam is None:
        seam = module.__dict__[_SLOT] = Seam(module)
    seam.layers.append(layer)


def take_out(module: nn.Module, layer: Layer) -> None:
    """Undo ``insert``; no effect if the layer is no longer there."""
    seam = _find(module)
    if seam is None or layer not in seam.layers:
        return
    seam.layers.remove(layer)
    if not seam.layers:
        seam.remove()


def is_around(module: nn.Module, layer: Layer) -> bool:
    """Whether the layer is around the call of the module."""
    seam = _find(module)
    return seam is not None and layer in seam.layers
