"""``impasto info`` of a single file: which program's format it has, its sizes, and what to do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoints.original.files import Part, SingleFile


def describe_file(path: str, deep: bool) -> Iterator[str]:
    """The lines about a file of weights.

    Raises:
        CheckpointError: it is damaged, holds nothing that is known, or, if ``deep``, NaN or infinity.
    """
    from ..checkpoints.original.files import read_single_file
    from ..checkpoints.stored import is_finite, listing

    file = read_single_file(path)
    parts = file.parts()
    if not parts or any(name.startswith("controlnet.") for name in file.tensors):
        file.part("PixArtTransformer2DModel")  # says what it holds
    for part in parts:
        prefix = f", with the prefix {part.prefix}" if part.prefix else ""
        yield f"{path}: {part.kind.description}{prefix}"
        yield from _describe(file, part)
    if file.weights is not None:
        other = "ema" if file.weights == "raw" else "raw"
        yield f"It holds two sets of weights; these are the {file.weights} ones. --weights {other} converts the others."
    if deep:
        broken = next((name for name, tensor in file.tensors.items() if not is_finite(tensor)), None)
        if broken is not None:
            raise CheckpointError(f"{path}: {listing([broken])} holds NaN or infinity, and so will every result")


def _describe(file: SingleFile, part: Part) -> Iterator[str]:
    from ..checkpoints.original.files import AUTOENCODER, DIT, LDM_AUTOENCODER

    count = sum(tensor.numel() for tensor in part.tensors.values())
    yield f"{count:,} values, stored as {', '.join(_dtypes(part.tensors))}"
    if part.kind is DIT:
        depth = sum(name.endswith(".attn.qkv.weight") for name in part.tensors)
        classes, width = part.tensors["y_embedder.embedding_table.weight"].shape
        yield f"{depth} layers of width {width}, {classes} classes"
        yield f"To start training PixArt-α from it: impasto convert {_quoted(file.path)} FOLDER"
        return
    config, assumed = _config(file, part)
    if part.kind in (AUTOENCODER, LDM_AUTOENCODER):
        widths = ", ".join(map(str, config["block_out_channels"]))
        yield f"{len(config['block_out_channels'])} levels of {widths} channels, {config['latent_channels']} of latents"
    else:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        yield f"{config['num_layers']} layers of width {width}, {config['in_channels']} channels of latents"
        yield from _of_pixart(config)
    for sentence in assumed:
        yield f"Not in the file: {sentence}."
    cls = part.kind.class_name
    yield f"To use it: impasto convert {_quoted(file.path)} FOLDER, or in Python {cls}.from_single_file(...)"


def _of_pixart(config: Mapping[str, Any]) -> Iterator[str]:
    if "use_additional_conditions" not in config:
        return
    side, scale = config["sample_size"], config["interpolation_scale"]
    yield f"images of {8 * side} x {8 * side} px, positions interpolated by {scale}"
    has = [
        text
        for text, there in (
            ("micro-conditions (α)", config["use_additional_conditions"]),
            ("normalized queries and keys", config.get("qk_norm")),
        )
        if there
    ]
    if "kv_compression" in config:
        layers = config["kv_compression_layers"]
        has.append(
            f"keys compressed by {config['kv_compression']} {config['kv_compression_factor']} in layers {layers}"
        )
    if has:
        yield f"with {', '.join(has)}"


def _config(file: SingleFile, part: Part) -> tuple[Mapping[str, Any], list[str]]:
    """The config but for the number of heads, which the tensors do not say."""
    from ..checkpoints.original.convert import component_of
    from ..registry import class_of

    class_name = str(part.kind.class_name)
    given = {} if class_name == "AutoencoderKL" else {"num_attention_heads": 1}
    cls: Any = class_of(class_name)
    stored = {name: value for name, value in cls.arguments_next_to(file).items() if value is not None}
    found = component_of(file, class_name, {**given, **stored})
    return found.config, [] if stored else found.assumed


def _dtypes(tensors: Mapping[str, Tensor]) -> list[str]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return [name for name, _ in counts.most_common()]


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
