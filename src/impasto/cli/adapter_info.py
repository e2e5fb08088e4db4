"""``impasto info`` of an adapter file: what it is, which alpha it has and why, and which model it is for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from ..checkpoints.adapters.file import BUILTIN, AdapterDefaults, AdapterFile, read_adapter
from ..checkpoints.adapters.parsing import FoundLayer, is_adapter, scaled
from ..checks import printable
from ..transforms.adapters import locate

KINDS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "full": "whole weights"}
#: The widths of published transformers.
MODELS = {1152: "PixArt-α or PixArt-Σ (XL/2)", 4096: "GLM-Image"}


def find_adapter(model: str) -> Path | None:
    """The adapter file of this name; None if it is something else."""
    if model in BUILTIN:
        return locate(model)
    return Path(model) if os.path.isfile(model) and is_adapter(Path(model)) else None


def describe_adapter(path: Path, name: str) -> Iterator[str]:
    """The lines of ``impasto info``."""
    file = read_adapter(path)
    kinds = Counter("DoRA" if "magnitude" in layer.tensors else KINDS[layer.kind] for layer in file.layers)
    yield f"{printable(name)}: an adapter, {_counted(kinds, 'layers')}"
    yield f"names as of: {', '.join(dict.fromkeys(layer.dialect.written_by for layer in file.layers))}"
    components = Counter(layer.dialect.component or "transformer or text_encoder" for layer in file.layers)
    yield f"for: {_counted(components, 'layers')}"
    ranks, alphas, sources = Counter[str](), Counter[str](), Counter[str]()
    for found in file.layers:
        settings = file.of(found.dialect.component or "transformer")
        layer, source = scaled(found, None, settings, file.where)
        ranks[str(layer.rank or "whole matrices")] += 1
        alphas[f"{layer.scale * (layer.rank or 1):g}"] += 1
        sources[source] += 1
    yield f"rank: {_counted(ranks)}"
    yield f"alpha: {_counted(alphas)}; from: {_counted(sources)}"
    yield f"base: {_base(file)}"
    tensors = [tensor for layer in file.layers for tensor in layer.tensors.values()]
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    yield f"parameters: {sum(tensor.numel() for tensor in tensors):,}, stored as {dtypes}"
    if file.defaults != AdapterDefaults():
        yield f"generate with: {_generation(file.defaults)}"
    yield ""
    yield f"Use it: impasto generate PROMPT --lora {printable(name)}, or pipe.load_lora_weights({printable(name)!r})"


def _counted(counts: Counter[str], unit: str = "") -> str:
    """Values, with how often each occurs if there are several."""
    if len(counts) == 1 and not unit:
        return next(iter(counts))
    shown = [f"{value} ({count}{f' {unit}' if unit else ''})" for value, count in counts.most_common(5)]
    return ", ".join(shown) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def _generation(defaults: AdapterDefaults) -> str:
    given = {"--scheduler": defaults.scheduler, "--steps": defaults.steps, "--guidance-scale": defaults.guidance_scale}
    return " ".join(f"{option} {value}" for option, value in given.items() if value is not None)


def _base(file: AdapterFile) -> str:
    """The width and depth of the transformer that the layers are of, as far as they show it."""
    names = [layer.name.replace("_", ".") for layer in file.layers if layer.dialect.component != "text_encoder"]
    blocks = {number for name in names if (number := _block(name)) is not None}
    width = next((_inputs(x) for x in file.layers if _is_query(x)), None)
    depth = f"{max(blocks) + 1} blocks or more" if blocks else "no blocks"
    if width is None:
        return f"a transformer of {depth}"
    known = f", as {MODELS[width]}" if width in MODELS else ""
    return f"a transformer of width {width} and {depth}{known}"


def _block(name: str) -> int | None:
    parts = name.split(".")
    after = (part for before, part in pairwise(parts) if before == "blocks")
    number = next(after, "")
    return int(number) if number.isdecimal() and len(number) < 6 else None


def _is_query(layer: FoundLayer) -> bool:
    ends = ("attn1.to.q", "attn.qkv", "attn1.to.v", "attn2.to.q", "cross.attn.q.linear")
    return layer.kind == "lora" and layer.name.replace("_", ".").endswith(ends)


def _inputs(layer: FoundLayer) -> int:
    return int(layer.tensors["A"].shape[1])
