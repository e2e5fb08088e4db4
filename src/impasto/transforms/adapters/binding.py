"""An adapter file <-> the layers of models: which layer is which, whether it fits, and its scale."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.adapters.file import AdapterFile
from ...checkpoints.adapters.layer import AdapterLayer, dense
from ...checkpoints.adapters.names import Names
from ...checkpoints.adapters.parsing import FoundLayer, scaled
from ...checkpoints.stored import listing
from ...checks import finite
from ...errors import ConfigurationError, InputError, WeightsMismatchError
from ...nn.changes import unwrapped
from ..quantized_linear import QuantizedLinear
from .layers import is_tuner, places

logger = logging.getLogger("impasto")

#: The adapters of a component's layers, by our names.
Bound = dict[str, AdapterLayer]


def adaptable(module: nn.Module) -> dict[str, Any]:
    """The linear layers and convolutions of a module by name, without what peft has put around them."""
    layers = {p.name: p.layer.get_base_layer() if is_tuner(p.layer) else p.layer for p in places(module)}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}


def shape_of(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight, also of a quantized one."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return layer.out_features, layer.in_features


def bind(
    file: AdapterFile,
    components: Mapping[str, nn.Module],
    *,
    others: Sequence[str] = (),
    alpha: float | Mapping[str, float] | None = None,
) -> dict[str, Bound]:
    """The adapters in a file by component and by our names of layers.

    Args:
        others: components that the pipeline lacks: what the file has for them is left out, with a warning.
        alpha: in place of what the file says: one for all layers, or by their names.

    Raises:
        WeightsMismatchError: layers that the models do not have, or of other shapes. Nothing has been changed.
    """
    layers = {name: adaptable(unwrapped(module)) for name, module in components.items()}
    names = {name: Names(found) for name, found in layers.items()}
    given = _Given(alpha)
    bound: dict[str, Bound] = {name: {} for name in components}
    sources: Counter[str] = Counter()
    strange, misfits = [], []
    left_out: Counter[str] = Counter()
    for found in file.layers:
        wanted = found.dialect.component
        hit = _find(found, names)
        if hit is None:
            if wanted in others:
                left_out[str(wanted)] += 1
            else:
                strange.append(found.full_name)
            continue
        component, targets = hit
        layer, source = scaled(found, given.of(found, targets), file.of(component), file.where)
        own = [layers[component][target] for target in targets]
        problem = misfit(layer, [shape_of(one) for one in own])
        if problem is not None:
            misfits.append(f"{found.full_name} {problem}")
            continue
        sources[source] += 1
        for target, part in zip(targets, _divided(layer, own, file.where), strict=True):
            if target in bound[component]:
                misfits.append(f"{found.full_name} is there twice, under two names of {target}")
            bound[component][target] = part
    if strange or misfits:
        raise WeightsMismatchError(_mismatch(file, components, strange, misfits))
    given.check_used()
    for component, count in left_out.items():
        logger.warning("%s: the %d layers for the %s have no effect: there is none", file.where, count, component)
    _log(file, bound, sources)
    return {component: found for component, found in bound.items() if found}


def _find(found: FoundLayer, names: Mapping[str, Names]) -> tuple[str, tuple[str, ...]] | None:
    wanted = found.dialect.component
    for component in names if wanted is None else [wanted]:
        targets = names[component].find(found.name) if component in names else None
        if targets is not None:
            return component, targets
    return None


def misfit(layer: AdapterLayer, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """What is wrong with an adapter for layers of these shapes, which it adapts as one; None if it fits."""
    out, inputs = sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])
    if len({shape[1:] for shape in shapes}) > 1:
        return "joins layers of different inputs"
    try:
        own = layer.shape
    except ValueError as error:
        return f"cannot be used: {error}"
    if own != (out, inputs):
        return f"is for a weight of {list(own)}, and the model's is {[out, inputs]}"
    magnitude = layer.tensors.get("magnitude")
    fitting = ((out, 1), (1, shapes[0][1]))
    if magnitude is not None and tuple(magnitude.shape) not in fitting:
        return f"has DoRA's norms of shape {list(magnitude.shape)}; expected {list(fitting[0])} or {list(fitting[1])}"
    return None


def _divided(layer: AdapterLayer, own: Sequence[Any], where: str) -> list[AdapterLayer]:
    """The adapter of each of the layers that it adapts as one."""
    if len(own) == 1:
        return [layer]
    sizes = [shape_of(one)[0] for one in own]
    parts = layer.rows(sizes)
    if parts is None:
        weight = torch.cat([plain_weight(one, where) for one in own])
        parts = [dense(part) for part in layer.delta(weight).split(sizes)]
    return parts


def plain_weight(layer: Any, where: str = "the adapter") -> Tensor:
    """The weight of a layer in float32, also of a quantized one.

    Raises:
        ConfigurationError: another library has quantized it.
    """
    weight: Tensor = layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight.detach()
    if not weight.is_floating_point() or tuple(weight.shape) != shape_of(layer):
        raise ConfigurationError(
            f"{where} changes a layer in a way that depends on its weight, which another library has quantized: load "
            f"the adapter and fuse it before the model is quantized"
        )
    return weight.float()


class _Given:
    """Alphas that the caller gives."""

    def __init__(self, alpha: float | Mapping[str, float] | None):
        self._all, self._by_name = None, {}
        if isinstance(alpha, Mapping):
            self._by_name = {str(n).removesuffix(".alpha"): finite(f"alpha of {n}", x) for n, x in alpha.items()}
        elif alpha is not None:
            self._all = finite("alpha", alpha)
        self._unused = set(self._by_name)

    def of(self, found: FoundLayer, targets: Sequence[str]) -> float | None:
        known = (found.full_name, found.name, *targets, *(f"{found.dialect.component}.{name}" for name in targets))
        name = next((name for name in known if name in self._by_name), None)
        self._unused.discard(str(name))
        return self._all if name is None else self._by_name[name]

    def check_used(self) -> None:
        if self._unused:
            raise InputError(f"alpha is given for layers that the adapter does not have: {listing(self._unused)}")


def _mismatch(file: AdapterFile, components: Mapping[str, nn.Module], strange: list[str], misfits: list[str]) -> str:
    models = ", ".join(type(unwrapped(module)).__name__ for module in components.values())
    parts = []
    if strange:
        parts.append(f"{len(strange)} of its {len(file.layers)} layers are not in the model ({listing(strange)})")
    if misfits:
        parts.append(f"{len(misfits)} do not fit: {'; '.join(misfits[:5])}")
    return f"{file.where} does not fit {models}: {'. '.join(parts)}. It is for another model; nothing was loaded."


def _log(file: AdapterFile, bound: Mapping[str, Bound], sources: Counter[str]) -> None:
    count = ", ".join(f"{len(layers)} layers of the {name}" for name, layers in bound.items() if layers)
    alpha = ", ".join(source if len(sources) == 1 else f"{source} ({n})" for source, n in sources.most_common())
    logger.info("%s: %s; alpha: %s", file.where, count or "nothing", alpha)
