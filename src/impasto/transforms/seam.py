"""A place around the call of a module, for whoever changes it from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

#: Gets what it stands around and that one's arguments, and returns what the module is to return.
Layer = Callable[..., Any]

_SLOT = "_compiled_call_impl"


class Seam:
    """Layers around the call of a module, the last one outermost.

    It sits where ``nn.Module.compile`` puts its result. So it is outside of compiled graphs and of hooks: a layer may
    leave the module out, and then neither runs. A forward put in place of the module's own would be inside of both.
    And a copy of the module is a plain one, since torch leaves this place out of copies and pickles; a replaced
    forward would be copied with the module and go on computing with the weights of the first.

    A later ``module.compile()`` takes the place: who needs a layer asks ``is_around`` and inserts it again. When the
    last layer is taken out, what was there before is there again.
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
        if vars(self._module).get(_SLOT) is not self:  # someone stands around it, and will leave it behind, empty
            return
        if self._before is None:
            del self._module.__dict__[_SLOT]
        else:
            self._module.__dict__[_SLOT] = self._before


def _find(module: nn.Module) -> Seam | None:
    """The seam of a module, also where something else has been put around it in the meantime."""
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
    """Undo ``insert``; nothing happens where the layer is not there any more."""
    seam = _find(module)
    if seam is None or layer not in seam.layers:
        return
    seam.layers.remove(layer)
    if not seam.layers:
        seam.remove()


def is_around(module: nn.Module, layer: Layer) -> bool:
    """Whether the layer is in its place."""
    seam = _find(module)
    return seam is not None and layer in seam.layers
