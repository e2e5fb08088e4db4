"""Compiled blocks, and denoising steps that are recorded once for each size and replayed: ``pipe.compile()``.

A step of the denoiser on a GPU is some thousand kernels, each of which Python has to launch. A CUDA graph launches
all of them at once, but it reads and writes the memory that it was recorded with: what is computed from other numbers
is copied there first, and what comes out is copied away before the next replay overwrites it.
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

from ..errors import ConfigurationError, ResourceError
from ..memory.streaming import block_lists
from ..nn.handle import Handle
from ..transforms.packing import PackedWeights, multiplies_bfloat16, pack_weights
from ..transforms.seam import Seam

#: Text is padded (and the padding masked) to a multiple of this, so that prompts of most lengths share a recording.
TEXT_MULTIPLE = 64
#: The recordings of so many sizes are kept.
_MOST_RECORDINGS = 8
#: What torch.compile would record itself: each block for itself, whose output the next block's replay overwrites.
_RECORDING_MODES = ("reduce-overhead", "max-autotune")

#: Takes a function without arguments; returns one that does the same again, on the same memory.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class CudaGraphs:
    """Captures what a function launches on a device.

    All graphs share a stream and a pool of memory: what comes out of one is copied before the next one is replayed.
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


class RecordedSteps:
    """Calls a transformer by replaying the recording of a call with the same shapes.

    A recording is of the modules that there were and reads the weights where they lay; where either has changed when
    a generation begins, it is forgotten. What cannot be seen from there, such as a number that a module keeps, is for
    ``forget()``.

    Args:
        make_recorder: of a device.
        device_type: where steps are recorded; elsewhere the transformer itself is called.
    """

    def __init__(self, make_recorder: Callable[[torch.device], Recorder] = CudaGraphs, device_type: str = "cuda"):
        self._make_recorder, self._device_type = make_recorder, device_type
        self._recorders: dict[torch.device, Recorder] = {}
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, model: nn.Module) -> Callable[..., Any]:
        """A generation with this transformer begins: what to call in its place, for its steps.

        That is the transformer itself on other devices, and where something decides anew at every step.
        """
        device = next(model.parameters()).device
        if device.type != self._device_type or any(_decides_anew(module) for module in model.modules()):
            return model
        state = _state_of(model)
        with self._lock:
            for key in [key for key in self._recordings if key[0] == id(model) and key[1] != state]:
                del self._recordings[key]
        return partial(self._step, model, state, device)

    def forget(self) -> None:
        """Free the memory of all recordings."""
        with self._lock:
            self._recordings.clear()
            self._recorders.clear()

    def _step(
        self, model: nn.Module, state: Any, device: torch.device, hidden_states: Tensor, **arguments: Any
    ) -> tuple[Tensor]:
        """The transformer's prediction [B, C, H, W], which the next call does not overwrite."""
        leaves, form = pytree.tree_flatten((hidden_states, arguments))
        key = (id(model), state, form, *(_form_of(leaf) for leaf in leaves))
        with self._lock:  # a recording's memory is one call's at a time
            recording = self._recordings.pop(key, None)
            if recording is None:
                while len(self._recordings) >= _MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
                if device not in self._recorders:
                    self._recorders[device] = self._make_recorder(device)
                recording = _Recording(model, leaves, form, self._recorders[device])
            self._recordings[key] = recording  # the last one used is the last in order
            return (recording(leaves),)


class _Recording:
    """One call of a model on tensors of its own."""

    def __init__(self, model: nn.Module, leaves: list[Any], form: Any, record: Recorder):
        self._given = leaves
        with torch.inference_mode(False):  # whose tensors could not be written into elsewhere
            self._own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        hidden_states, arguments = pytree.tree_unflatten(self._own, form)
        self._replay = record(lambda: model(hidden_states, **arguments)[0])

    def __call__(self, leaves: list[Any]) -> Tensor:
        for i, (own, before, now) in enumerate(zip(self._own, self._given, leaves, strict=True)):
            # A prompt's keys are the same tensors at every step. The latents, first of all, may be written into.
            if isinstance(now, Tensor) and (i == 0 or now is not before):
                own.copy_(now)
        self._given = leaves
        return self._replay().clone()


def _form_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _decides_anew(module: nn.Module) -> bool:
    """Whether Python that is not the module's own runs at each of its calls: hooks, a cache, another forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return isinstance(module._compiled_call_impl, Seam) or any(hooks) or "forward" in vars(module)


def _state_of(model: nn.Module) -> Any:
    """What a recording takes for granted: which modules there are, what stands around them, where weights lie."""
    modules = tuple((id(m), m.training, id(m._compiled_call_impl)) for m in model.modules())
    return modules, tuple((id(x), x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))


class Compiled(Handle):
    """The handle of ``pipe.compile()``: ``remove()`` undoes it, and so does leaving its ``with`` block.

    ``steps`` are the recorded ones, ``packed`` the weights; None where there are none.
    """

    def __init__(self, pipe: Any, transformer: nn.Module, vae: nn.Module | None, record: bool | None, **options: Any):
        self._pipe = pipe
        for part in (transformer, vae):
            if part is not None and hasattr(part, "_orig_mod"):
                raise ConfigurationError(
                    f"torch.compile has wrapped the {type(part._orig_mod).__name__} as a whole already, and "
                    f"pipe.compile() compiles block by block: assign the plain one (its _orig_mod) first"
                )
        if options.get("mode") in _RECORDING_MODES or (options.get("options") or {}).get("triton.cudagraphs"):
            raise ConfigurationError(
                "pipe.compile() records whole steps itself, and graphs of single blocks would overwrite each other's "
                "output; use mode='max-autotune-no-cudagraphs', or torch.compile(pipe.transformer, "
                "mode='reduce-overhead', fullgraph=True) in place of pipe.compile()"
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
        self._transformer, self._vae, self._record, self._options = transformer, vae, record, options
        self._apply()

    def _packs(self) -> bool:
        """Whether packing gains what compiling does not: bfloat16 on the CPU."""
        return self._pipe.device.type == "cpu" and not self._options and multiplies_bfloat16(self._transformer)

    def _apply(self) -> None:
        modules = [] if self._vae is None else [self._vae.get_submodule("decoder")]
        self.packed: PackedWeights | None = None
        if self._packs():
            self.packed = pack_weights(self._transformer)
        else:
            modules += [block for _, blocks in block_lists(self._transformer) for block in blocks]
        # On the CPU texts are read row by row: more numbers of rows than there may be graphs are computed as they are.
        options = {"fullgraph": self._pipe.device.type != "cpu", **self._options}
        for module in modules:
            module.compile(**options)
        self._modules = modules
        self.steps = None if self._record is False or self.packed is not None else RecordedSteps()

    def _undo(self) -> None:
        for module in self._modules:
            module.__dict__.pop("_compiled_call_impl", None)
        self._modules = []
        if self.packed is not None:
            self.packed.remove()
        if self.steps is not None:
            self.steps.forget()

    def renew(self) -> None:
        """The pipeline was moved or cast: what was recorded is not true any more, and packing may not suit."""
        if self.steps is not None:
            self.steps.forget()
        if self._packs() != (self.packed is not None):
            self._undo()
            self._apply()

    def remove(self) -> None:
        """Compute as before."""
        self._undo()
        if self._pipe.compiled is self:
            self._pipe.compiled = None


def _is_compiled(module: nn.Module) -> bool:
    return not isinstance(module._compiled_call_impl, Seam | None)
