"""Put adapters into a module, as layers of peft around its own; and read them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.adapters.layer import AdapterLayer, dense
from ...checks import printable, shown
from ...errors import ConfigurationError, InputError, WeightsMismatchError
from ...nn.changes import dtype_of, unwrapped
from ..quantized_linear import QuantizedLinear
from .binding import Bound, adaptable, plain_weight
from .layers import (
    ATTRIBUTE,
    Adapters,
    activate,
    adapters_in,
    configs_of,
    delete,
    enable,
    nested,
    peft,
    quiet,
    record_of,
    refuse_fused,
    require_adapters,
    tuners,
    unload,
)

#: The prefix of peft's attributes for the parts of an adapter.
_PREFIXES = {"lokr": "lokr_", "loha": "hada_"}
_PARTS = {
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
}


def add(module: nn.Module, config: Any, name: str = "default") -> None:
    """Put a new adapter into a module and make it the active one. The module's own parameters are frozen.

    Args:
        config: of peft, such as ``LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_v"])``.

    Raises:
        InputError: not a config of peft for layers, a name that is in use, or no layer that it chooses.
        ConfigurationError: adapters are fused.
    """
    library = peft()
    module = unwrapped(module)
    if not isinstance(config, library.PeftConfig):
        raise InputError(f"an adapter is described by a config of peft, such as LoraConfig, not by {shown(config)}")
    _check_name(module, name)
    refuse_fused(module, "an adapter cannot be added")
    record = record_of(module)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = configs_of(module)
    config.base_model_name_or_path = None
    try:
        with quiet():
            library.inject_adapter_in_model(config, module, name)
    except Exception as error:
        _take_out(module, name, before, trainable)
        if isinstance(error, ValueError | TypeError | NotImplementedError):
            raise InputError(f"the adapter was not added: {printable(str(error))[:500]}") from error
        raise
    if record is None:
        Adapters(trainable).put(module, ATTRIBUTE)
    for place in tuners(module):
        for tuner in nested(place.layer):
            tuner.train(tuner.base_layer.training)
            _widen(tuner, name, place.layer.get_base_layer())
    # transformers' models have peft's methods, which look at this.
    module._hf_peft_config_loaded = True  # type: ignore[assignment]
    activate(module, name)
    enable(module, True)


def _widen(tuner: Any, name: str, own: Any) -> None:
    """Give a new adapter of a layer that is stored in a narrow dtype the dtype in which the layer computes."""
    if own.weight.dtype == (dtype := dtype_of(own)) or not own.weight.is_floating_point():
        return
    for attribute in tuner.adapter_layer_names:
        held = getattr(tuner, attribute)
        if name in held:
            held[name] = held[name].to(dtype)


def _check_name(module: nn.Module, name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name or len(name) > 200:
        raise InputError(f"the name of an adapter is a text without dots, not {shown(name)}")
    if name in configs_of(module):
        raise InputError(
            f"the {type(module).__name__} has an adapter {name!r} already: choose another name, or delete_adapters() it"
        )


def _take_out(module: nn.Module, name: str, before: Mapping[str, Any], trainable: Sequence[nn.Parameter]) -> None:
    """Undo what a failed injection has begun."""
    if before:
        if name in configs_of(module):
            delete(module, name)
    else:
        unload(module)
    for parameter in trainable:
        parameter.requires_grad_(True)


# --- loading ---


def load(module: nn.Module, bound: Bound, name: str | None = None) -> str:
    """Put the adapters of layers, which fit a module, into it as one adapter, and make it the active one.

    What peft cannot express is stored as a LoRA of full rank: norms of columns (DoRA as OneTrainer has it), changes of
    whole weights, and single layers of another kind than the others.

    Args:
        name: of the adapter; "default_0" and so on if None.

    Returns:
        its name.

    Raises:
        InputError: the name is in use.
        ConfigurationError: adapters are fused, or the layers are quantized in a way that this kind does not support.
    """
    module = unwrapped(module)
    name = next_name(module) if name is None else name
    own = adaptable(module)
    kind, layers = _expressed(bound, own)
    record = record_of(module)
    rank = None if record is None else record.hotswap_rank
    if rank is not None and kind == "lora":
        layers = {key: _padded(layer, rank) for key, layer in layers.items()}
    add(module, _config(kind, layers), name)
    by_name = {place.name: place.layer for place in tuners(module)}
    made, filled = [], []
    for key, layer in layers.items():
        tuner = next(one for one in nested(by_name[key]) if name in adapters_in(one))
        made.append(_shapes(tuner, name))
        _fill(tuner, name, layer, own[key])
        filled.append(_shapes(tuner, name))
    record = record_of(module)
    if made != filled and record is not None:
        record.unlike_config.add(name)
    activate(module, name)
    return name


def _shapes(tuner: Any, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of an adapter in a layer of peft."""
    return {key: tuple(x.shape) for key, x in tuner.named_parameters() if name in key.split(".")}


def next_name(*modules: nn.Module) -> str:
    """The first of ``default_0``, ``default_1``, ... that no module has an adapter of."""
    taken = {name for module in modules for name in configs_of(module)}
    return next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)


def _expressed(bound: Bound, own: Mapping[str, Any]) -> tuple[str, Bound]:
    """The kind of adapter of peft that holds all layers, and the layers as this kind."""
    kinds = Counter(layer.kind for layer in bound.values())
    kind = kinds.most_common(1)[0][0]
    plain = all("magnitude" not in layer.tensors for layer in bound.values())
    if len(kinds) == 1 and kind in _PREFIXES and plain:
        for key in bound:
            if isinstance(own[key], QuantizedLinear) or not own[key].weight.is_floating_point():
                raise ConfigurationError(
                    f"a {'LoKr' if kind == 'lokr' else 'LoHa'} adapter needs ordinary weights, and {key} is quantized: "
                    f"load the adapter and fuse it before the model is quantized"
                )
        return kind, bound
    dora = all(
        layer.kind == "lora" and "magnitude" in layer.tensors and layer.magnitude_is_by_row for layer in bound.values()
    )
    return "lora", {
        key: layer
        if layer.kind == "lora" and "mid" not in layer.tensors and (dora or "magnitude" not in layer.tensors)
        else dense(layer.delta(plain_weight(own[key])))
        for key, layer in bound.items()
    }


def _config(kind: str, layers: Bound) -> Any:
    """peft's config of an adapter with these layers."""
    ranks = {key: layer.rank or max(layer.tensors["w2"].shape) for key, layer in layers.items()}
    alphas = {key: layer.scale * ranks[key] for key, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns: dict[str, Any] = {
        "rank_pattern": {f"^{key}": value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{key}": value for key, value in alphas.items() if value != alpha},
    }
    common: dict[str, Any] = {"r": rank, "target_modules": [*layers], **patterns}
    library = peft()
    if kind == "lora":
        dora = any("magnitude" in layer.tensors for layer in layers.values())
        return library.LoraConfig(lora_alpha=alpha, use_dora=dora, **common)
    if kind == "loha":
        return library.LoHaConfig(alpha=alpha, use_effective_conv2d=True, **common)
    common["decompose_both"] = any("w1_a" in layer.tensors for layer in layers.values())
    return library.LoKrConfig(
        alpha=alpha, decompose_factor=_decompose_factor(layers), use_effective_conv2d=True, **common
    )


def _decompose_factor(layers: Bound) -> int:
    """The factor with which peft divides layers as these do: the one size of all first matrices, or its default."""
    tensors = [layer.tensors for layer in layers.values()]
    shapes = [t["w1"].shape if "w1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1]) for t in tensors]
    sizes = {size for shape in shapes for size in shape}
    return sizes.pop() if len(sizes) == 1 else -1


def _fill(tuner: Any, name: str, layer: AdapterLayer, own: Any) -> None:
    """Give an adapter of a layer of peft its tensors, in the dtype in which the layer that it adapts computes."""
    weight = own.weight
    dtype = dtype_of(own) if weight.is_floating_point() else torch.float32
    tensors = {part: tensor.to(weight.device, dtype, copy=True) for part, tensor in layer.tensors.items()}
    if layer.kind == "lora":
        for part in "AB":
            held = getattr(tuner, f"lora_{part}")[name]
            held.weight.data = tensors[part].reshape(held.weight.shape)
        if "magnitude" in tensors:
            norms = tuner.lora_magnitude_vector[name]
            norms.weight.data = tensors["magnitude"].reshape(norms.weight.shape)
        return
    for part in _PARTS[layer.kind]:
        held = getattr(tuner, _PREFIXES[layer.kind] + part)
        if name in held:
            del held[name]
        if part in tensors:
            held[name] = nn.Parameter(tensors[part])
    tuner.r[name] = layer.rank or 1
    tuner.alpha[name] = layer.scale * tuner.r[name]
    tuner.scaling[name] = layer.scale


def _padded(layer: AdapterLayer, rank: int) -> AdapterLayer:
    """The same LoRA with a higher rank, whose further rows and columns are zero."""
    a, b = layer.tensors["A"], layer.tensors["B"]
    more = rank - a.shape[0]
    if more < 0:
        raise InputError(
            f"an adapter of rank {a.shape[0]} is loaded, and enable_lora_hotswap() was given target_rank={rank}; it is "
            f"to be the highest rank"
        )
    a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1)
    return layer._replace(tensors={**layer.tensors, "A": a, "B": b})


def swapping(module: nn.Module, bound: Bound, name: str) -> Callable[[], None]:
    """Check that a LoRA of a module can be given other numbers in place, so that compiled code stays valid.

    Layers that the new one does not adapt get zeros. A lower rank is filled up with zeros.

    Args:
        bound: the layers of the new one; there may be none.

    Returns:
        the function that does it.

    Raises:
        InputError: there is no such adapter, or it is not a LoRA.
        WeightsMismatchError: the new one adapts other layers, or has a higher rank.
    """
    module = unwrapped(module)
    require_adapters(module, name)
    refuse_fused(module, "adapters cannot be swapped")
    kind, layers = _expressed(bound, adaptable(module)) if bound else ("lora", bound)
    found = {place.name: one for place in tuners(module) for one in nested(place.layer) if name in adapters_in(one)}
    if kind != "lora" or not all(hasattr(tuner, "lora_A") for tuner in found.values()):
        raise InputError("hotswap replaces a LoRA by a LoRA; delete the adapter and load the other one")
    problems = [key for key in layers if key not in found]
    problems += [key for key in layers if key in found and (layers[key].rank or 0) > found[key].r[name]]
    dora = {key for key, layer in layers.items() if "magnitude" in layer.tensors}
    problems += [key for key, tuner in found.items() if (key in dora) != (name in tuner.lora_variant)]
    if problems:
        raise WeightsMismatchError(
            f"adapter {name} cannot be swapped: {len(problems)} layers are not in it, have a lower rank there, or are "
            f"DoRA on one side ({', '.join(problems[:5])}). Load the adapter with the most layers first, after "
            f"enable_lora_hotswap(target_rank=...) with the highest rank."
        )

    @torch.no_grad()
    def swap() -> None:
        for key, tuner in found.items():
            a, b = tuner.lora_A[name].weight, tuner.lora_B[name].weight
            if key not in layers:
                b.zero_()
                continue
            layer = _padded(layers[key], tuner.r[name])
            # The scale stays, since compiled code has it as a constant: B absorbs the difference.
            a.copy_(layer.tensors["A"].reshape(a.shape))
            b.copy_((layer.tensors["B"].float() * (layer.scale / _own_scale(tuner, name))).reshape(b.shape))
            if "magnitude" in layer.tensors:
                norms = tuner.lora_magnitude_vector[name].weight
                norms.copy_(layer.tensors["magnitude"].reshape(norms.shape))

    return swap


# --- reading them back ---


def _own_scale(tuner: Any, name: str) -> float:
    """alpha / r, without the weight with which the adapter acts."""
    if hasattr(tuner, "lora_alpha"):
        rank = tuner.r[name] ** 0.5 if tuner.use_rslora.get(name) else tuner.r[name]
        return float(tuner.lora_alpha[name] / rank)
    return float(tuner.alpha[name] / tuner.r[name])


def collect(module: nn.Module, name: str) -> Bound:
    """The adapters of a module's layers that are one adapter, as they would be loaded.

    Raises:
        InputError: there is no such adapter, or it is of a kind that files here do not have.
    """
    require_adapters(module, name)
    found: Bound = {}
    for place in tuners(module):
        for tuner in nested(place.layer):
            if name in adapters_in(tuner):
                found[place.name] = _read(tuner, name, place.name)
    return found


def _read(tuner: Any, name: str, key: str) -> AdapterLayer:
    scale = _own_scale(tuner, name) if hasattr(tuner, "scaling") else 1.0
    if hasattr(tuner, "lora_A") and name in tuner.lora_A:
        if tuner.lora_B[name].bias is not None:
            raise InputError(f"{key}: an adapter with a bias (lora_bias=True) cannot be saved here; use peft's methods")
        tensors = {"A": tuner.lora_A[name].weight, "B": tuner.lora_B[name].weight}
        if name in tuner.lora_magnitude_vector:
            tensors["magnitude"] = tuner.lora_magnitude_vector[name].weight.reshape(-1, 1)
        return AdapterLayer("lora", _detached(tensors), scale)
    for kind, prefix in (("lokr", "lokr_"), ("loha", "hada_")):
        held = {part: getattr(tuner, prefix + part, {}) for part in _PARTS[kind]}
        tensors = {part: values[name] for part, values in held.items() if name in values}
        if tensors:
            return AdapterLayer(kind, _detached(tensors), scale)  # type: ignore[arg-type]
    raise InputError(f"{key}: adapters of {type(tuner).__module__} cannot be saved here; use peft's methods")


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.detach() for part, tensor in tensors.items()}
