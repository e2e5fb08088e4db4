"""The tensors of an adapter file, by name -> adapters of layers, by the file's names of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...checks import finite, shown
from ...errors import CheckpointError
from ..stored import FLOATS, describe, is_finite, listing
from .layer import TENSORS, AdapterLayer, Kind
from .names import Dialect, dialect_of

#: The end of a tensor's name -> its kind, and its name in ``AdapterLayer``. peft may add the name of the adapter.
_ENDINGS: tuple[tuple[re.Pattern[str], Kind | None, str], ...] = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight|\.lora_down\.weight|\.lora\.down\.weight"), "lora", "A"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight|\.lora_up\.weight|\.lora\.up\.weight"), "lora", "B"),
    (re.compile(r"\.lora_mid\.weight"), "lora", "mid"),
    (re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?"), None, "magnitude"),
    (re.compile(r"\.dora_scale"), None, "dora_scale"),
    (re.compile(r"\.lokr_(?P<part>w1_a|w1_b|w1|w2_a|w2_b|w2|t2)(\.[^.]+)?"), "lokr", ""),
    (re.compile(r"\.hada_(?P<part>w1_a|w1_b|w2_a|w2_b|t1|t2)(\.[^.]+)?"), "loha", ""),
    (re.compile(r"\.diff"), "full", "diff"),
    (re.compile(r"\.alpha"), None, "alpha"),
)
_LARGEST_ALPHA = 1e6


@dataclass
class FoundLayer:
    """A layer as it is in a file."""

    dialect: Dialect
    name: str  # without its prefix
    kind: Kind
    tensors: dict[str, Tensor]
    alpha: float | None

    @property
    def full_name(self) -> str:
        return f"{self.dialect.prefix}{self.name}"


class Settings(NamedTuple):
    """What a config of peft says about all layers of a component."""

    source: str  # where it was found, for the log
    content: Mapping[str, Any]


def is_adapter(path: Path) -> bool:
    """Whether a file holds an adapter, by the names of its tensors.

    Raises:
        CheckpointError: the file is damaged.
    """
    return has_adapter(describe([path]))


def has_adapter(names: Iterable[str]) -> bool:
    """Whether some of these names of tensors are those of an adapter."""
    return any(match[1] is not None for name in names if (match := _ending(name)) is not None)


def find_layers(tensors: Iterable[tuple[str, Tensor]], where: str) -> list[FoundLayer]:
    """Group the tensors of a file by layer.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: tensors that are no adapter's, that are incomplete, not finite or of a wrong dtype.
    """
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, set[Kind]] = {}
    strange = []
    for name, tensor in tensors:
        match = _ending(name)
        if match is None:
            strange.append(name)
            continue
        layer, kind, part = match
        _check_values(tensor, name, where)
        if part in found.setdefault(layer, {}):
            raise CheckpointError(f"{where}: {shown(layer)} has two tensors for {part}, such as {shown(name)}")
        found[layer][part] = tensor
        if kind is not None:
            kinds.setdefault(layer, set()).add(kind)
    if strange or not found:
        what = f"{len(strange)} tensors are no adapter's ({listing(strange)})" if strange else "it has no tensors"
        raise CheckpointError(
            f"{where} is not an adapter that can be loaded: {what}. Adapters are LoRA, DoRA, LoKr or LoHa, of linear "
            f"layers and convolutions."
        )
    return [_complete(layer, kinds.get(layer, set()), parts, where) for layer, parts in found.items()]


def _ending(name: str) -> tuple[str, Kind | None, str] | None:
    """A tensor's name -> that of its layer, the kind that it shows, and the tensor's part in it."""
    start = max(0, len(name) - 200)
    for pattern, kind, part in _ENDINGS:
        for match in pattern.finditer(name, start):
            if match.end() == len(name) and match.start() > 0:
                return name[: match.start()], kind, part or match["part"]
    return None


def _check_values(tensor: Tensor, name: str, where: str) -> None:
    if str(tensor.dtype).removeprefix("torch.") not in FLOATS and not (name.endswith(".alpha") and tensor.numel() == 1):
        raise CheckpointError(f"{where}: {listing([name])} is stored as {tensor.dtype}; adapters are floating-point")
    if tensor.numel() == 0:
        raise CheckpointError(f"{where}: {listing([name])} of shape {list(tensor.shape)} is empty")
    if not is_finite(tensor):
        raise CheckpointError(f"{where}: {listing([name])} has NaN or infinite values; the file cannot be used")


def _complete(layer: str, kinds: set[Kind], parts: dict[str, Tensor], where: str) -> FoundLayer:
    alpha = parts.pop("alpha", None)
    named = listing([layer])
    if len(kinds) != 1:
        what = " and ".join(sorted(kinds)) or f"only {', '.join(parts) or 'alpha'}"
        raise CheckpointError(f"{where}: {named} has {what}, and should be of one kind")
    (kind,) = kinds
    required, optional = TENSORS[kind]
    missing = required - set(parts)
    if kind == "lokr":
        for number in "12":
            if f"w{number}" not in parts and not {f"w{number}_a", f"w{number}_b"} <= set(parts):
                missing = missing | {f"w{number}"}
    if missing or not set(parts) <= required | optional | {"dora_scale"}:
        raise CheckpointError(f"{where}: {named} lacks {', '.join(sorted(missing)) or 'nothing, and has too much'}")
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(f"{where}: the alpha of {named} has shape {list(alpha.shape)}, and should be one number")
    value = None if alpha is None else _checked(alpha.item(), f"{where}: the alpha of {named}")
    dialect = dialect_of(layer)
    # Files for several programs have DoRA's norms under both names.
    norms = parts.pop("dora_scale", None)
    norms = parts.pop("magnitude", norms)
    if norms is not None:
        parts["magnitude"] = _magnitude(norms, parts, named, where)
    return FoundLayer(dialect, layer.removeprefix(dialect.prefix), kind, parts, value)


def _magnitude(tensor: Tensor, parts: Mapping[str, Tensor], named: str, where: str) -> Tensor:
    """DoRA's norms as [out, 1] or [1, in]; peft has [out] (of convolutions [1, out, 1, 1]), others have both."""
    if tensor.ndim == 4 and tensor.shape[0] == 1 and tensor.shape[1] > 1:
        # peft (one norm per output) and OneTrainer (one per input) have the same number of dimensions here. If a layer
        # has as many inputs as outputs, it is taken for peft's, which is the common one.
        by_input = "B" in parts and parts["B"].shape[:1] != tensor.shape[1:2] == parts["A"].shape[1:2]
        return tensor.flatten(1) if by_input else tensor.reshape(-1, 1)
    if tensor.ndim == 1:
        return tensor[:, None]
    flat = tensor.reshape(tensor.shape[0], -1)
    if 1 not in flat.shape:
        raise CheckpointError(f"{where}: the norms of {named} have shape {list(tensor.shape)}; expected [out, 1]")
    return flat


def _checked(value: Any, name: str) -> float:
    return finite(name, value, -_LARGEST_ALPHA, _LARGEST_ALPHA, error=CheckpointError)


# --- scales ---


def scaled(layer: FoundLayer, given: float | None, settings: Settings | None, where: str) -> tuple[AdapterLayer, str]:
    """The layer with its scale, and where its alpha came from.

    Alpha is, in this order: given; in the file (``.alpha``); in the config of peft that came with it; what the
    software that wrote it uses; the rank.

    Args:
        given: alpha, as given by the caller.
        settings: of peft.
    """
    rank = AdapterLayer(layer.kind, layer.tensors, 1.0).rank
    number: float = rank or 1
    content = {} if settings is None else settings.content
    if given is not None:
        source, alpha = "given", given if rank is not None else 1.0
    elif layer.alpha is not None:
        source, alpha = ".alpha in the file", layer.alpha if rank is not None else 1.0  # LyCORIS: whole matrices
    elif settings is not None and (stored := _alpha_of(content, layer.name, where)) is not None:
        source, alpha = settings.source, stored
        if layer.kind in ("lokr", "loha"):
            number = _pattern(content.get("rank_pattern"), layer.name, where) or content.get("r") or number
            number = finite(f"{where}: r", number, 0, _LARGEST_ALPHA, above=0, error=CheckpointError)
        if content.get("use_rslora") is True:
            number = math.sqrt(number)
    elif layer.dialect.alpha is not None:
        source, alpha = f"the default of {layer.dialect.written_by}, {layer.dialect.alpha:g}", layer.dialect.alpha
    else:
        source, alpha = "the rank, since there is none", number
    return AdapterLayer(layer.kind, layer.tensors, alpha / number), source


def _alpha_of(content: Mapping[str, Any], name: str, where: str) -> float | None:
    own = _pattern(content.get("alpha_pattern"), name, where)
    value = own if own is not None else content.get("lora_alpha", content.get("alpha"))
    return None if value is None else _checked(value, f"{where}: alpha")


def _pattern(patterns: Any, name: str, where: str) -> Any:
    """The value of a pattern of peft that is the name of a layer or its end."""
    if not isinstance(patterns, dict):
        return None
    for key, value in patterns.items():
        plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]{1,300}", plain):
            raise CheckpointError(
                f"{where}: its config chooses layers by the expression {shown(key)}, and only names are read; give the "
                f"alpha of each layer: alpha={{NAME: ALPHA}}"
            )
        if name == plain or (name.endswith(f".{plain}") and not str(key).startswith("^")):
            return value
    return None
