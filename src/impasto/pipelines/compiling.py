"""Compiled blocks, and denoising steps that are recorded once for each size and replayed: ``pipe.compile()``.

A step of the denoiser on a GPU is some thousand kernels, each of which Python has to launch. A CUDA graph launches
all of them at once, but it reads and writes the memory that it was recorded with: what is computed from other numbers
is copied there first, and what comes out is copied away before the next replay overwrites it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, ResourceError
from ..transforms.seam import Seam
from .moving import block_lists

#: Text is padded (and the padding masked) to a multiple of this, so that prompts of most lengths share a recording.
TEXT_MULTIPLE = 32
#: The recordings of so many sizes are kept.
_MOST_RECORDINGS = 4

#: Takes a function without arguments; returns one that does the same again, on the same memory.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def record_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture what ``run`` launches. It runs first, since kernels are chosen and compiled in a first call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class RecordedSteps:
    """Calls a transformer by replaying the recording of a call with the same shapes.

    A recording reads the weights where they lay: ``begin`` forgets all of them where that, or a module, has changed.
    """

    def __init__(self, record: Recorder):
        self._record = record
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._state: Any = None
        self._model: Any = None

    def begin(self, model: Any) -> Any:
        """A generation with this transformer begins: what to call in its place.

        That is the transformer itself where something stands around its blocks that decides anew at every step.
        """
        if any(isinstance(module._compiled_call_impl, Seam) for module in model.modules()):
            return model
        state = _state_of(model)
        if state != self._state:
            self.forget()
        self._model, self._state = model, state
        return self

    def forget(self) -> None:
        """Free the memory of all recordings."""
        self._recordings.clear()
        self._model = self._state = None

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor]:
        """The transformer's prediction [B, C, H, W], which the next call does not overwrite."""
        leaves, form = pytree.tree_flatten((hidden_states, arguments))
        key = (form, *(_form_of(leaf) for leaf in leaves))
        recording = self._recordings.pop(key, None)
        if recording is None:
            while len(self._recordings) >= _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
            recording = _Recording(self._model, leaves, form, self._record)
        self._recordings[key] = recording  # the last one used is the last in order
        return (recording(leaves),)


class _Recording:
    """One call of a model on tensors of its own."""

    def __init__(self, model: Any, leaves: list[Any], form: Any, record: Recorder):
        self._given = leaves
        self._own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        hidden_states, arguments = pytree.tree_unflatten(self._own, form)
        self._replay = record(lambda: model(hidden_states, **arguments)[0])

    def __call__(self, leaves: list[Any]) -> Tensor:
        for i, (own, before, now) in enumerate(zip(self._own, self._given, leaves, strict=True)):
            # A prompt's keys are the same tensors at every step. The latents, first of all, may be written into.
            if isinstance(now, Tensor) and (i == 0 or now is not before):
                own.copy_(now)
        self._given = leaves
        return self._replay().clone()


def _is_compiled(module: nn.Module) -> bool:
    return not isinstance(module._compiled_call_impl, Seam | None)


def _form_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _state_of(model: nn.Module) -> Any:
    """What a recording takes for granted: which modules there are, what stands around them, where weights lie."""
    modules = tuple(
        (id(m), m.training, id(m._compiled_call_impl), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    )
    return modules, tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))


class Compiled:
    """The handle of ``pipe.compile()``: ``remove()`` undoes it, and so does leaving its ``with`` block."""

    def __init__(self, pipe: Any, transformer: nn.Module, vae: nn.Module | None, record: bool | None, **options: Any):
        self._pipe = pipe
        for part in (transformer, vae):
            if part is not None and hasattr(part, "_orig_mod"):
                raise ConfigurationError(
                    f"torch.compile has wrapped the {type(part._orig_mod).__name__} as a whole already, and "
                    f"pipe.compile() compiles block by block: assign the plain one (its _orig_mod) first"
                )
        modules = [block for _, blocks in block_lists(transformer) for block in blocks]
        if vae is not None:
            modules.append(vae.get_submodule("decoder"))
        if any(_is_compiled(module) for module in modules):
            raise ConfigurationError("these blocks are compiled already; remove() the handle of that first")
        device = next(transformer.parameters()).device
        if record and device.type != "cuda":
            raise ResourceError(
                f"record=True records CUDA graphs, and the transformer is on {device}; call pipe.to('cuda') first, or "
                f"leave record away"
            )
        for module in modules:
            module.compile(**options)
        self._modules = modules
        self.steps = RecordedSteps(record_cuda_graph) if record is not False and device.type == "cuda" else None

    def remove(self) -> None:
        """Compute as before."""
        for module in self._modules:
            module.__dict__.pop("_compiled_call_impl", None)
        self._modules = []
        if self.steps is not None:
            self.steps.forget()
        if self._pipe.compiled is self:
            self._pipe.compiled = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
