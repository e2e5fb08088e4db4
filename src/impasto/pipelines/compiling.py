"""``pipe.compile()``: compiled blocks, and denoising steps as captured CUDA graphs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigurationError, ResourceError
from ..memory.streaming import block_lists
from ..nn.changes import CALL, Change, Handle, of, refuse_conflicts, unwrapped
from ..nn.graphs import CapturedCalls

#: Text is padded (and the padding masked) to a multiple of this, so that most prompts share a captured graph.
TEXT_MULTIPLE = 64
#: Modes in which torch.compile captures each block by itself, whose output the replay of the next one overwrites.
_CAPTURING_MODES = ("reduce-overhead", "max-autotune")


class CompiledCall(Change):
    """What is called in place of a module that ``pipe.compile()`` has compiled."""

    change = "compiled"
    undo = "remove() the handle of pipe.compile()"
    conflicts: ClassVar = ("compiled", "parallel")

    def __init__(self, module: nn.Module, options: dict[str, Any]):
        self._call = torch.compile(module._call_impl, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Compiled(Handle):
    """The handle of ``pipe.compile()``: ``remove()`` undoes it, and so does leaving its ``with`` block.

    ``steps`` are the captured ones; None with ``cuda_graphs=False``.
    """

    def __init__(
        self, pipe: Any, transformer: nn.Module, vae: nn.Module | None, cuda_graphs: bool | None, **options: Any
    ):
        for component in (transformer, vae):
            if component is not None and unwrapped(component) is not component:
                raise ConfigurationError(
                    f"torch.compile has wrapped the {type(unwrapped(component)).__name__} as a whole already, and "
                    f"pipe.compile() compiles block by block: assign the plain one (its _orig_mod) first"
                )
        if options.get("mode") in _CAPTURING_MODES or (options.get("options") or {}).get("triton.cudagraphs"):
            raise ConfigurationError(
                "pipe.compile() captures whole steps itself, and graphs of single blocks would overwrite each other's "
                "output; use mode='max-autotune-no-cudagraphs', or torch.compile(pipe.transformer, "
                "mode='reduce-overhead', fullgraph=True) in place of pipe.compile()"
            )
        modules = [block for _, blocks in block_lists(transformer) for block in blocks]
        if vae is not None:
            modules.append(vae.get_submodule("decoder"))
        for module in modules:
            refuse_conflicts(module, CompiledCall)
            if module._compiled_call_impl is not None and not of(module):
                raise ConfigurationError("the blocks are compiled already, by their compile() method; use plain ones")
        device = next(transformer.parameters()).device
        if cuda_graphs and device.type != "cuda":
            raise ResourceError(
                f"cuda_graphs=True captures CUDA graphs, and the transformer is on {device}; call pipe.to('cuda') "
                f"first, or leave cuda_graphs out"
            )
        self._pipe, self._modules, self._options = pipe, modules, options
        self.steps = None if cuda_graphs is False else CapturedCalls()
        self._calls: list[CompiledCall] = []
        self.renew()

    def renew(self) -> None:
        """Compile for where the components are now, and drop graphs of where they were."""
        self._undo()
        # On the CPU texts are read row by row: more numbers of rows than there may be graphs are computed without one.
        options = {"fullgraph": self._pipe.device.type != "cpu", **self._options}
        self._calls = [CompiledCall(module, options) for module in self._modules]
        for module, call in zip(self._modules, self._calls, strict=True):
            call.put(module, CALL, innermost=True)  # a step cache skips compiled blocks whole

    def remove(self) -> None:
        """Compute as before."""
        self._undo()
        if self._pipe.compiled is self:
            self._pipe.compiled = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the pipeline is not compiled, since copies of modules are not."""

    def _undo(self) -> None:
        for module, call in zip(self._modules, self._calls):
            call.take(module, CALL)
        self._calls = []
        if self.steps is not None:
            self.steps.forget()
