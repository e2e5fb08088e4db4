"""What is in force on a module: our own changes, which are on record, and one predicate for those of others.

A change of ours is an object in an attribute of the module that it changes (or the module that it has put there), so a
record cannot outlive its change, and a copy of the module has its own records or none. Changes under one attribute form
a chain, the last one first, and leave it in any order.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from ..errors import ConfigurationError

#: Where ``nn.Module.compile`` stores what is called in place of the module's own call. Torch leaves it out of copies.
CALL = "_compiled_call_impl"


class Handle:
    """``remove()`` undoes what a function has changed, and so does leaving the handle's ``with`` block."""

    def remove(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


# --- our own changes ---


class Change:
    """One of our changes to a module. The object holds what the change owns."""

    change: ClassVar[str]  # what the module is: "quantized"
    undo: ClassVar[str]  # how to undo it, as an instruction
    conflicts: ClassVar[tuple[str, ...]] = ()  # what the module must not be when the change is made
    varies: ClassVar[bool] = False  # whether calls with equal arguments may compute different things
    before: Any = None  # what was in the same attribute

    def put(self, module: nn.Module, attribute: str, *, innermost: bool = False) -> None:
        """Record this change on a module, after our changes there or, if innermost, before them."""
        present = vars(module).get(attribute)
        if innermost and isinstance(present, Change):
            *_, last = (change for change in _chain(present) if isinstance(change, Change))
            self.before, last.before = last.before, self
        else:
            self.before, module.__dict__[attribute] = present, self

    def take(self, module: nn.Module, attribute: str) -> None:
        """Take this change off a module again; no effect if it is not there."""
        head = vars(module).get(attribute)
        for outer in _chain(head):
            if outer is not self and isinstance(outer, Change) and outer.before is self:
                outer.before = self.before
        if head is self and self.before is None:
            del module.__dict__[attribute]
        elif head is self:
            module.__dict__[attribute] = self.before


def _chain(value: Any) -> Iterator[Any]:
    while value is not None:
        yield value
        value = value.before if isinstance(value, Change) else getattr(value, "__wrapped__", None)


def of(module: nn.Module) -> list[Change]:
    """Our changes in force on a module itself."""
    places = [module, *vars(module).values()]
    return [found for place in places for found in _chain(place) if isinstance(found, Change)]


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype in which a layer computes: of its weight, or that to which it is cast for each call."""
    for call in _chain(vars(layer).get("forward")):
        if getattr(call, "change", None) == "stored in a narrow dtype":
            return cast(torch.dtype, call.dtype)
    # torch.ao's quantized layers have methods of these names; they take float32 and return it.
    tensors = [x() if callable(x) else x for x in (layer.weight, getattr(layer, "bias", None))]
    return next((x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)


def refuse_conflicts(module: nn.Module, change: type[Change]) -> None:
    """Check that a module, with all that is inside, may be changed.

    Raises:
        ConfigurationError: a change that conflicts with this one is in force; the message says how to undo it.
    """
    for name, inner in module.named_modules():
        for present in of(inner):
            if present.change in change.conflicts:
                consequence = "already" if present.change == change.change else f"and cannot be {change.change}"
                raise ConfigurationError(
                    f"{name or type(inner).__name__} is {present.change} {consequence}; {present.undo} first"
                )


# --- changes made by others ---


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module is its parameters alone and nobody would miss a call of it.

    It is of exactly one of the classes (no adapter around it, no subclass), its parameters are ordinary ones (not
    quantized, not sharded), and nothing else runs when it is called. Dropout must be idle.
    """
    if type(module) not in classes or is_observed(module) or module._compiled_call_impl is not None:
        return False
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return False
    return all(parameter is None or type(parameter) is nn.Parameter for parameter in module._parameters.values())


def is_observed(module: nn.Module) -> bool:
    """Whether code that its class does not know runs at each call of a module: hooks, another ``forward``, or, in an
    attention, a processor or a chosen kernel.
    """
    own = vars(module)
    added = "forward" in own or "_processor" in own or "_backend" in own or "processor" in module._modules
    hooks = module._forward_hooks or module._forward_pre_hooks
    return added or bool(hooks or modules._global_forward_hooks or modules._global_forward_pre_hooks)


def is_watched(module: nn.Module | None) -> bool:
    """Whether a module or one inside is observed: then it is called once at every step."""
    return module is not None and any(map(is_observed, module.modules()))


def is_ours(function: Any) -> bool:
    """Whether a function, a method or a callable object is code of this package, whatever it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    while getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib":  # @torch.no_grad()
        function = function.__wrapped__
    # ``functools.wraps`` copies ``__module__``, so it may be that of what is wrapped.
    where = getattr(function, "__globals__", {"__name__": type(function).__module__}).get("__name__", "")
    # FSDP gathers the parameters for our stages, too.
    return bool(where.startswith((f"{__name__.partition('.')[0]}.", "torch.distributed.")))


def is_intercepted(module: nn.Module) -> bool:
    """Whether code of others was put around the calls of a module: a hook, or another ``forward`` on the object."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *modules._global_forward_hooks.values(),
        *modules._global_forward_pre_hooks.values(),
    )
    own = vars(module).get("forward")
    return not all(map(is_ours, hooks if own is None else (*hooks, own)))


def takes_stages(model: Any, cls: type[nn.Module]) -> bool:
    """Whether a model is of a class of ours, and only our code sees what it is called with: then its stages' results.

    Code of others expects the documented tensors: hooks, and a ``forward`` of the object, its class or a subclass.
    """
    model = unwrapped(model)
    if not isinstance(model, cls) or is_intercepted(model):
        return False
    classes = (vars(each) for each in type(model).__mro__ if each is not nn.Module)
    return all(is_ours(own["forward"]) for own in classes if "forward" in own)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass with storage or products of its own."""
    return type(tensor) in (nn.Parameter, Tensor)


def is_managed_elsewhere(module: nn.Module) -> bool:
    """Whether another library has quantized a module or given it its devices."""
    return bool(getattr(module, "is_quantized", False) or getattr(module, "hf_device_map", None))


def refuse_adapters(name: str, module: nn.Module, what: str = "saved") -> None:
    """Check that a module's tensors are those of its class: peft wraps none of its layers, nor the module itself.

    Raises:
        ConfigurationError: the message says what to do.
    """
    wrapped = next((key for key, inner in module.named_modules() if type(inner).__module__.startswith("peft.")), None)
    if wrapped is None:
        return
    if wrapped == "":
        does, undo = "is wrapped by peft", "Merge the adapter first: x = x.merge_and_unload()"
    else:
        does = f"has adapters (at {wrapped})"
        undo = "Put them into the weights first: fuse_lora()"
    raise ConfigurationError(
        f"the {name} was not {what}: it {does}, and its tensors would not fit its class. {undo}; or save the adapter "
        f"alone, by save_adapter() of a pipeline or save_lora_adapter() of a model, and the {name} without it."
    )


class _Saved(Change):
    """What saving does, for the check of conflicts: what is narrow to save memory does not load as the model it was."""

    change = "saved"
    conflicts: ClassVar = ("stored in a narrow dtype",)


def refuse_unsaveable(name: str, module: nn.Module) -> None:
    """Check that a module has the tensors of its class, in dtypes in which it computes.

    Raises:
        ConfigurationError: adapters or layerwise casting are in force; the message says what to do.
    """
    refuse_adapters(name, module)
    refuse_conflicts(module, _Saved)


def adapters_in_force(module: nn.Module) -> tuple[Any, ...]:
    """What peft's layers in a module compute besides their tensors: active adapters and their scales, by layer."""
    return tuple(
        (name, *((key, inner.scaling.get(key)) for key in inner.active_adapters if not inner.disable_adapters))
        for name, inner in module.named_modules()
        if hasattr(inner, "adapter_layer_names") and hasattr(inner, "scaling")
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether the calls of a module are compiled, by us or by its ``compile()``."""
    calls = [*_chain(vars(module).get(CALL)), vars(module).get("forward")]
    return any(
        getattr(call, "change", "") == "compiled" or hasattr(call, "_torchdynamo_orig_callable") for call in calls
    )


def unwrapped(module: Any) -> Any:
    """The module that ``torch.compile`` has wrapped as a whole, or the module itself."""
    return getattr(module, "_orig_mod", module)


def register_methods(modules: Iterable[nn.Module], *names: str) -> None:
    """Let FSDP gather the parameters of modules for these methods too, as it does for ``forward``."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    for module in modules:
        if isinstance(module, FSDPModule):
            for name in names:
                if name not in vars(module) and hasattr(module, name):
                    register_fsdp_forward_method(module, name)
