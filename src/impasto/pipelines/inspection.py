"""What a checkpoint holds, read from its JSON files and the headers of its weights: nothing is loaded.

Only the weights' headers need torch, which is imported there: a misspelt model is noticed at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import hub
from ..checkpoints.config import read_json
from ..errors import CheckpointError, CheckpointNotFoundError, HubError

INDEX_NAME = "model_index.json"
#: Parts of names of tensors that stay float32 where float16 is asked for, because they would overflow.
FLOAT32_IN_FLOAT16 = {"T5EncoderModel": (".wo.",)}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
#: As the headers of safetensors name them.
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
#: What is to be known of an autoencoder that is not there: 8 times smaller latents.
USUAL_VAE = {"block_out_channels": (128, 256, 512, 512)}
#: Tensors of the size of the hidden states that are alive at once in a layer: the feed-forward is four times as wide.
TRANSFORMER_MAPS = 12
#: The repeated blocks in the names of tensors, as ``moving.BLOCK_LISTS`` has them.
_BLOCK = re.compile(r"([^.]+\.)*?(transformer_blocks|blocks|block|layers)\.\d+\.")
_SHARD = r"(-\d+-of-\d+)?"
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)"
    rf"{_SHARD}(\.(?P<variant>\w+))?{_SHARD}\.(safetensors|bin)"
)


@dataclass(frozen=True)
class Part:
    """One part of a pipeline on disk."""

    name: str
    class_name: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, int]]  # name -> stored dtype, number of values
    disk_bytes: int  # of all files that loading reads
    pickled: bool = False  # weights that cannot be looked into without loading them

    @property
    def parameters(self) -> int:
        return sum(count for _, count in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtypes, the most frequent first."""
        counts: dict[str, int] = {}
        for dtype, count in self.tensors.values():
            counts[dtype] = counts.get(dtype, 0) + count
        return tuple(sorted(counts, key=lambda dtype: -counts[dtype]))

    def memory(self, dtype: str, names: Iterable[str] | None = None) -> int:
        """Bytes of the weights, or of those of these names, loaded in ``dtype``, one of ``DTYPES``."""
        kept = FLOAT32_IN_FLOAT16.get(self.class_name or "", ()) if dtype == "float16" else ()
        chosen = self.tensors if names is None else names
        wide = [any(mark in name for mark in kept) for name in chosen]
        return sum(self.tensors[name][1] * (4 if w else DTYPES[dtype]) for name, w in zip(chosen, wide))

    def blocks(self) -> dict[str, list[str]]:
        """The names of the tensors of each of the repeated blocks; those of the rest are under ""."""
        found: dict[str, list[str]] = {"": []}
        for name in self.tensors:
            match = _BLOCK.match(name)
            found.setdefault(match[0] if match else "", []).append(name)
        return found


@dataclass(frozen=True)
class Inspection:
    """A pipeline on disk."""

    model: str
    folder: Path
    class_name: str
    parts: tuple[Part, ...]

    @property
    def by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    def working_memory(self, name: str, dtype: str, pixels: int | None = None, pictures: int = 1) -> int:
        """About how many bytes a part needs beside its weights, for guided pictures.

        The factors were counted: the largest sum of tensors alive at once in our models, attention not included,
        since its backends keep no scores.

        Args:
            pixels: of a picture; by default as many as the pictures of the training have.
            pictures: how many are drawn at once.
        """
        parts = self.by_name
        if "transformer" not in parts:
            return 0
        side, unit = picture_size(parts["transformer"].config, parts["vae"].config if "vae" in parts else USUAL_VAE)
        pixels = (side**2 if pixels is None else pixels) * pictures
        config = parts[name].config
        if name == "vae":  # three feature maps at full size, as wide as the last but one level
            widths = config.get("block_out_channels", (64,))
            values = 3 * int(widths[min(1, len(widths) - 1)]) * pixels
            if dtype == "float16" and config.get("force_upcast", True):  # works in float32, its weights too
                return 4 * values + parts[name].memory("float32") - parts[name].memory(dtype)
            return values * DTYPES[dtype]
        if name == "transformer":  # twice the tokens, because of guidance, and each layer's K and V of the text
            width = int(config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72))
            tokens = pixels // unit**2
            text = 2 * 300 * int(config.get("num_layers", 28)) * pictures
            return 2 * width * (TRANSFORMER_MAPS * tokens + text) * DTYPES[dtype]
        return 0

    def peak_memory(self, dtype: str, *, one_at_a_time: bool) -> int:
        """About how many bytes of the device drawing one picture takes, with all parts there or one at a time."""
        needs = [(part.memory(dtype), self.working_memory(part.name, dtype)) for part in self.parts]
        if one_at_a_time:
            return max((weights + work for weights, work in needs), default=0)
        return sum(weights for weights, _ in needs) + max((work for _, work in needs), default=0)


def resolve_pipeline(model: str) -> tuple[Path, str]:
    """The local folder of a pipeline and the name of its class. Of a hub repository, only JSON files are fetched.

    Raises:
        CheckpointNotFoundError: there is no such model, or it is no whole pipeline.
        HubError: it has to be downloaded and cannot be.
    """
    folder = hub.resolve(model, allow_patterns=[INDEX_NAME, "*/*.json"])
    path = folder / INDEX_NAME
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{model} has no {INDEX_NAME}: it is no whole pipeline. Give one that is; a transformer alone is combined "
            f"with the other parts of a pipeline in Python: from_pretrained(PIPELINE, transformer=...)"
        )
    name = read_json(path).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} does not say which pipeline it is (_class_name); download or save it again")
    return folder, name


def picture_size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """From two configs: the side of the pictures of the training, and what sides must be multiples of, in pixels."""
    factor = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
    return int(transformer.get("sample_size", 128) * factor), int(transformer.get("patch_size", 2) * factor)


def read_part_configs(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The ``config.json`` of parts; empty where there is none."""
    paths = [folder / name / "config.json" for name in names]
    return [read_json(path) if path.is_file() else {} for path in paths]


def inspect_model(model: str | os.PathLike[str]) -> Inspection:
    """Look into a checkpoint: a folder, a bundled model, or a hub repository that is on this machine.

    Raises:
        CheckpointError: files are missing or damaged.
        HubError: a hub repository that was not downloaded yet.
    """
    name = os.fspath(model)
    try:
        folder = hub.resolve(name, local_files_only=True)
    except HubError as error:
        raise HubError(
            f"{name} is neither a folder nor on this machine, and what it holds is read from its files; "
            f"download it with `hf download {name}`"
        ) from error
    folder, class_name = resolve_pipeline(str(folder))
    return inspect_parts(folder, class_name, read_json(folder / INDEX_NAME), name=name)


def inspect_parts(
    folder: Path, class_name: str, index: Mapping[str, Any], variant: str | None = None, name: str | None = None
) -> Inspection:
    """Look into those parts of a pipeline's folder that an index lists.

    Args:
        variant: which copy of the weights; any if None, the one without a variant first.
        name: what to call the model; its folder if None.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    parts = []
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[1] is None:
            continue
        if not (folder / part).is_dir():
            raise CheckpointNotFoundError(f"{folder} lacks the part {part} that its {INDEX_NAME} lists; download it")
        parts.append(_inspect_part(folder / part, str(value[1]), variant))
    return Inspection(name or str(folder), folder, class_name, tuple(parts))


def _inspect_part(folder: Path, class_name: str, variant: str | None) -> Part:
    from ..checkpoints.weights import tensor_headers

    (config,) = read_part_configs(folder.parent, folder.name)
    weights = _weight_files(folder, variant) if config else []
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".safetensors", ".bin")]
    tensors = {}
    for path in weights:
        if path.suffix == ".safetensors":
            for name, header in tensor_headers(path).items():
                stored = str(header["dtype"])
                tensors[name] = (STORED.get(stored, stored.lower()), math.prod(header["shape"]))
    size = sum(path.stat().st_size for path in [*weights, *others])
    return Part(folder.name, class_name, config, tensors, size, any(path.suffix == ".bin" for path in weights))


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of one copy of a model's weights: safetensors before pickles, without a variant before with one."""
    from ..checkpoints.weights import find_weight_files

    found = [match for path in folder.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]
    # Where there is none, the search below says which was expected.
    wanted = [match for match in found if variant is None or match["variant"] == variant]
    match = min(wanted, key=lambda match: (match[0].endswith(".bin"), match["variant"] or ""), default=None)
    if match is None:
        return find_weight_files(folder, variant=variant)
    return find_weight_files(folder, variant=match["variant"], stem=match["stem"])
