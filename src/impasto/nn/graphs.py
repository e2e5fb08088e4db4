"""Captured CUDA graphs: calls of a module that are captured once for each set of shapes, and replayed.

A graph launches the thousand kernels of a step at once, but reads and writes the memory that it was captured with:
other inputs are copied there first, and the output is copied out before the next replay overwrites it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import changes

#: How many captured graphs are kept; the least recently used one is dropped.
_MOST_GRAPHS = 8

#: Takes a function without arguments; returns one that repeats what it computed, on the same memory.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class CudaGraphs:
    """Captures what a function launches on a device.

    All graphs share a stream and a memory pool: the output of one is copied before the next one is replayed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # kernels are chosen and compiled in the first calls
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class CapturedCalls:
    """Calls a module by replaying the captured graph of a call with the same shapes.

    A graph refers to the submodules that were there and to the memory of their weights. If either has changed when
    ``begin`` is called, it is dropped. Changes that cannot be seen from outside, such as a number that a module keeps,
    need ``forget()``.

    Args:
        make_capture: given a device.
        device_type: where calls are captured; elsewhere the module itself is called.
    """

    def __init__(self, make_capture: Callable[[torch.device], Capture] = CudaGraphs, device_type: str = "cuda"):
        self._make_capture, self._device_type = make_capture, device_type
        self._captures: dict[torch.device, Capture] = {}
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, model: nn.Module) -> Callable[..., Any]:
        """What to call in place of a module for one generation.

        That is the module itself on other devices, and if a submodule has hooks or caches steps.
        """
        device = next(model.parameters()).device
        if device.type != self._device_type or any(map(varies, model.modules())):
            return model
        state = _state_of(model)
        with self._lock:
            for key in [key for key in self._graphs if key[0] == id(model) and key[1] != state]:
                del self._graphs[key]
        return partial(self._call, model, state, device)

    def forget(self) -> None:
        """Free the memory of all captured graphs."""
        with self._lock:
            self._graphs.clear()
            self._captures.clear()

    def _call(
        self, model: nn.Module, state: Any, device: torch.device, hidden_states: Tensor, **arguments: Any
    ) -> tuple[Tensor]:
        """The first output of the module, which the next call does not overwrite."""
        leaves, form = pytree.tree_flatten((hidden_states, arguments))
        key = (id(model), state, form, *(_form_of(leaf) for leaf in leaves))
        with self._lock:  # the memory of a graph serves one call at a time
            graph = self._graphs.pop(key, None)
            if graph is None:
                while len(self._graphs) >= _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                if device not in self._captures:
                    self._captures[device] = self._make_capture(device)
                graph = _Graph(model, leaves, form, self._captures[device])
            self._graphs[key] = graph  # the most recently used one comes last
            return (graph(leaves),)


class _Graph:
    """One call of a model on tensors of its own."""

    def __init__(self, model: nn.Module, leaves: list[Any], form: Any, capture: Capture):
        self._given = leaves
        with torch.inference_mode(False):  # inference tensors cannot be written to outside of it
            self._own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        hidden_states, arguments = pytree.tree_unflatten(self._own, form)
        self._replay = capture(lambda: model(hidden_states, **arguments)[0])

    def __call__(self, leaves: list[Any]) -> Tensor:
        for i, (own, before, now) in enumerate(zip(self._own, self._given, leaves, strict=True)):
            # The keys of a prompt are the same tensors at every step. The latents, the first leaf, may be written to.
            if isinstance(now, Tensor) and (i == 0 or now is not before):
                own.copy_(now)
        self._given = leaves
        return self._replay().clone()


def _form_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def varies(module: nn.Module) -> bool:
    """Whether code that a graph does not capture has to run at each call of a module."""
    return changes.is_observed(module) or any(change.varies for change in changes.of(module))


def _state_of(model: nn.Module) -> Any:
    """What a graph depends on: the modules, what is called in their place, adapters, and where the weights are."""
    modules = tuple((id(m), m.training, id(m._compiled_call_impl)) for m in model.modules())
    adapters = changes.adapters_in_force(model)
    return modules, adapters, tuple((id(x), x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))
