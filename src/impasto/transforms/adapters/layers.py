"""peft's layers in a module: what is there, what is active, with which weight."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ...checks import finite, shown, whole_number
from ...errors import ConfigurationError, InputError
from ...nn.changes import Change, is_compiled, unwrapped
from ...optional import require

logger = logging.getLogger("impasto")

#: Where a module's record is.
ATTRIBUTE = "_impasto_adapters"


def peft() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    quantizer = logging.getLogger("bitsandbytes")  # peft imports it, and it warns of kernels that it could download
    level = quantizer.level
    try:
        quantizer.setLevel(logging.ERROR)
        return require("peft", "an adapter", "impasto[adapters]")
    finally:
        quantizer.setLevel(level)


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer of peft around another layer. Without peft there are none."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "get_base_layer")


class Place(NamedTuple):
    """Where a layer is in a module."""

    name: str
    parent: nn.Module
    key: str
    layer: Any


def places(module: nn.Module) -> list[Place]:
    """All layers of a module without those inside of peft's layers, with the names that they have without peft."""
    found = []
    inside: tuple[str, ...] = ()
    for prefix, parent in module.named_modules():
        if f"{prefix}.".startswith(inside) and inside:
            continue
        for key, layer in parent._modules.items():
            if layer is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.append(Place(name, parent, key, layer))
                if is_tuner(layer):
                    inside = (*inside, f"{name}.")
    return found


def tuners(module: nn.Module) -> list[Place]:
    """peft's layers; of nested ones the outermost. Those that ``fuse`` has taken out are among them."""
    found = [place for place in places(module) if is_tuner(place.layer)]
    record = record_of(module)
    return found if record is None else [*found, *record.fused]


def nested(tuner: Any) -> Iterator[Any]:
    """A layer of peft, and those inside of it, which hold adapters of other kinds."""
    while is_tuner(tuner):
        yield tuner
        tuner = tuner.base_layer


def adapters_in(tuner: Any) -> set[str]:
    """The names of the adapters in a layer of peft."""
    names: set[str] = tuner._get_available_adapters()
    return names


class Adapters(Change):
    """The adapters of a module: what was trainable before, and the layers of peft that ``fuse`` has taken out."""

    change: ClassVar[str] = "adapted"
    undo: ClassVar[str] = "call unload_lora() on the model"

    def __init__(self, trainable: Sequence[nn.Parameter]):
        self.trainable = list(trainable)
        self.fused: list[Place] = []
        self.fused_names: list[str] = []
        self.hotswap_rank: int | None = None
        #: Adapters with matrices of other shapes than peft makes from their configs.
        self.unlike_config: set[str] = set()


def record_of(module: nn.Module) -> Adapters | None:
    """Our record of a module's adapters."""
    record = vars(unwrapped(module)).get(ATTRIBUTE)
    return record if isinstance(record, Adapters) else None


def configs_of(module: nn.Module) -> dict[str, Any]:
    """The adapters' configs by name."""
    return dict(getattr(unwrapped(module), "peft_config", None) or {})


def require_adapters(module: nn.Module, names: str | Sequence[str] | None = None) -> list[str]:
    """The names of adapters that a module has.

    Raises:
        InputError: it has none, or none of such a name.
    """
    known = list(configs_of(module))
    what = type(unwrapped(module)).__name__
    if not known:
        raise InputError(f"the {what} has no adapter; load one with load_lora_adapter(), or add_adapter() to train one")
    asked = known if names is None else [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in known:
            raise InputError(f"the {what} has no adapter {shown(name)}; it has {', '.join(known)}")
    return asked


def refuse_fused(module: nn.Module, what: str) -> None:
    """Raise ConfigurationError if adapters are fused into the weights."""
    record = record_of(module)
    if record is not None and record.fused:
        raise ConfigurationError(
            f"{what}: {', '.join(record.fused_names)} is fused into the weights. Call unfuse_lora() first, or "
            f"unload_lora() (unload_lora_weights() of a pipeline) to keep the fused weights without the adapter."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's warnings about what is done on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- activity and weights ---


def active(module: nn.Module) -> list[str]:
    """The active adapters, whether or not they are enabled."""
    first = next(iter(tuners(module)), None)
    if first is None:
        return []
    names: list[str] = list(first.layer.active_adapters)
    return names


def activate(module: nn.Module, names: str | Sequence[str]) -> None:
    """Let exactly these adapters act, with weights as they are, and train.

    Raises:
        InputError: there is no such adapter.
        ConfigurationError: adapters are fused.
    """
    chosen = require_adapters(module, names)
    refuse_fused(module, "the active adapters cannot be changed")
    for place in tuners(module):
        for tuner in nested(place.layer):
            tuner.set_adapter(chosen)


Weight = float | Mapping[str, float] | None


def weigh(module: nn.Module, names: str | Sequence[str], weights: Weight | Sequence[Weight] = None) -> None:
    """Let exactly these adapters act, each multiplied by a weight.

    Args:
        weights: one for all or one each: a number, None for 1, or a dict of numbers by part of a layer's name
            ("transformer_blocks.0", "attn2"), of which the first that fits counts; other layers have 1.

    Raises:
        InputError: an unknown adapter, or another number of weights than of adapters.
        ConfigurationError: adapters are fused.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    listed = list(weights) if isinstance(weights, list | tuple) else [weights] * len(chosen)
    if len(listed) != len(chosen):
        raise InputError(f"{len(chosen)} adapters and {len(listed)} weights are given; give one weight each")
    numbers = [_checked_weight(name, weight) for name, weight in zip(chosen, listed)]
    activate(module, chosen)
    for place in tuners(module):
        for name, number in zip(chosen, numbers):
            for tuner in nested(place.layer):
                if name in tuner.scaling:
                    tuner.set_scale(name, number if isinstance(number, float) else _of_layer(number, place.name))


def _checked_weight(name: str, weight: Any) -> float | dict[str, float]:
    if weight is None:
        return 1.0
    if isinstance(weight, Mapping):
        return {str(part): finite(f"the weight of {name} for {part}", number) for part, number in weight.items()}
    return finite(f"the weight of adapter {name}", weight)


def _of_layer(weights: Mapping[str, float], layer: str) -> float:
    return next((number for part, number in weights.items() if part in layer), 1.0)


def enable(module: nn.Module, enabled: bool) -> None:
    """Let the active adapters act, or none.

    Raises:
        InputError: there is no adapter.
        ConfigurationError: adapters are fused, and are to be disabled.
    """
    require_adapters(module)
    if not enabled:
        refuse_fused(module, "adapters cannot be disabled")
    for place in tuners(module):
        for tuner in nested(place.layer):
            tuner.enable_adapters(enabled)


def move(module: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Move adapters to a device; the layers that they adapt stay where they are."""
    for place in tuners(module):
        for tuner in nested(place.layer):
            for attribute in tuner.adapter_layer_names:
                held = getattr(tuner, attribute)
                for name in names:
                    if name in held:
                        held[name] = held[name].to(device)


def prepare_swapping(module: nn.Module, rank: int, check_compiled: str = "error") -> None:
    """Let the first adapter be loaded with a rank that later ones, swapped in, do not exceed.

    Raises:
        ConfigurationError: there is an adapter already, or the module is compiled and this is not to be ignored.
    """
    module = unwrapped(module)
    rank = whole_number("target_rank", rank)
    if check_compiled not in ("error", "warn", "ignore"):
        raise InputError(f"check_compiled must be 'error', 'warn' or 'ignore', not {shown(check_compiled)}")
    if configs_of(module):
        raise ConfigurationError("enable_lora_hotswap() comes before the first adapter is loaded")
    if any(map(is_compiled, module.modules())) and check_compiled != "ignore":
        message = "the model is compiled already, and would be compiled again for its first adapter"
        if check_compiled == "error":
            raise ConfigurationError(f"{message}: compile it after that is loaded, or give check_compiled='ignore'")
        logger.warning(message)
    record = record_of(module)
    if record is None:
        record = Adapters([parameter for parameter in module.parameters() if parameter.requires_grad])
        record.put(module, ATTRIBUTE)
    record.hotswap_rank = rank


# --- removal ---


def delete(module: nn.Module, names: str | Sequence[str]) -> None:
    """Remove adapters. A layer without any is the plain one again.

    The active ones that are left stay active; if there is none, the first of the others becomes active.

    Raises:
        InputError: there is no such adapter.
        ConfigurationError: adapters are fused.
    """
    chosen = require_adapters(module, names)
    refuse_fused(module, "adapters cannot be deleted")
    left = [name for name in configs_of(module) if name not in chosen]
    if not left:
        unload(module)
        return
    before = active(module)
    for place in tuners(module):
        for name in chosen:
            for tuner in nested(place.layer):
                with quiet():
                    tuner.delete_adapter(name)
        _drop_empty(place)
    record = record_of(module)
    for name in chosen:
        unwrapped(module).peft_config.pop(name, None)
        if record is not None:
            record.unlike_config.discard(name)
    if set(before) & set(chosen):  # peft chooses for each layer alone
        activate(module, [name for name in before if name in left] or left[0])


def _drop_empty(place: Place) -> None:
    """Take peft's layers that hold no adapter out of a place."""
    kept = [tuner for tuner in nested(place.layer) if adapters_in(tuner)]
    layer = place.layer.get_base_layer()
    for tuner in reversed(kept):
        tuner.base_layer = layer
        layer = tuner
    place.parent._modules[place.key] = layer


def unload(module: nn.Module) -> None:
    """Remove all adapters: the layers are those that were there before them. Fused weights stay fused."""
    module = unwrapped(module)
    record = record_of(module)
    for place in places(module):
        if is_tuner(place.layer):
            place.parent._modules[place.key] = place.layer.get_base_layer()
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(module).pop(attribute, None)
    if record is not None:
        record.take(module, ATTRIBUTE)
        for parameter in record.trainable:
            parameter.requires_grad_(True)
