"""What a checkpoint holds, read from its JSON files and the headers of its weights: nothing is loaded.

Only the weights' headers need torch, which is imported there: a misspelt model is noticed at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import hub
from ..checkpoints.config import read_json
from ..checkpoints.layout import INDEX_NAME, WEIGHTS
from ..checks import shown, whole_number
from ..errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, HubError, ImpastoError
from ..folders import reading
from ..registry import LANGUAGE_MODELS, READERS, accepted_classes, check_role, class_of, component_entries

if TYPE_CHECKING:
    from ..checkpoints.stored import Stored

#: Parts of names of tensors that stay float32 where float16 is asked for, because they would overflow.
FLOAT32_IN_FLOAT16 = {"T5EncoderModel": (".wo.",)}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
#: What is to be known of an autoencoder that is not there: 8 times smaller latents.
USUAL_VAE = {"block_out_channels": (128, 256, 512, 512)}
#: Tensors of the size of the hidden states that are alive at once in a layer: the feed-forward is four times as wide.
TRANSFORMER_MAPS = 12
#: The repeated blocks in the names of tensors, as ``moving.BLOCK_LISTS`` has them.
_BLOCK = re.compile(r"([^.]+\.)*?(transformer_blocks|blocks|block|layers)\.\d+\.")


@dataclass(frozen=True)
class Part:
    """One component of a pipeline on disk."""

    name: str
    class_name: str | None
    config: Mapping[str, Any]  # checked, defaults included
    tensors: Mapping[str, tuple[str, int]]  # name -> stored dtype, number of values
    disk_bytes: int  # of all files that loading reads
    pickled: bool = False  # weights that cannot be looked into without loading them
    weights: tuple[Path, ...] = ()  # their files

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
        wide = self.wide(dtype)
        chosen = self.tensors if names is None else names
        return sum(self.tensors[name][1] * (4 if name in wide else DTYPES[dtype]) for name in chosen)

    def wide(self, dtype: str) -> set[str]:
        """The names of the tensors that are float32 where the others are loaded in ``dtype``."""
        marks = FLOAT32_IN_FLOAT16.get(self.class_name or "", ()) if dtype == "float16" else ()
        return {name for name in self.tensors if any(mark in name for mark in marks)}

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
        """About how many bytes a component needs in addition to its weights, for guided images.

        The factors were counted: the largest sum of tensors alive at once in our models, attention not included,
        since its backends keep no scores.

        Args:
            pixels: of an image; by default as many as the training images have.
            pictures: the number of images generated at once.
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
            overflows = dtype == "float16" and config.get("force_upcast", True)  # and computes in float32
            return values * (4 if overflows else DTYPES[dtype])
        if name == "transformer":  # twice the tokens, because of guidance, and each layer's K and V of the text
            width = int(config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72))
            tokens = pixels // unit**2
            text = 2 * 300 * int(config.get("num_layers", 28)) * pictures
            return 2 * width * (TRANSFORMER_MAPS * tokens + text) * DTYPES[dtype]
        return 0

    def peak_memory(self, dtype: str, *, one_at_a_time: bool) -> int:
        """About how many bytes of the device generating one image takes, with all components there or one at a time."""
        needs = [(part.memory(dtype), self.working_memory(part.name, dtype)) for part in self.parts]
        if one_at_a_time:
            return max((weights + work for weights, work in needs), default=0)
        return sum(weights for weights, _ in needs) + max((work for _, work in needs), default=0)


def resolve_pipeline(model: str) -> tuple[Path, str]:
    """The local folder of a pipeline and the name of its class. Of a hub repository, only JSON files are fetched.

    Raises:
        CheckpointNotFoundError: there is no such model, or it is not a whole pipeline.
        HubError: it has to be downloaded and cannot be.
    """
    folder = hub.resolve(model, allow_patterns=[INDEX_NAME, "*/*.json"])
    with reading(folder) as root:
        path = root / INDEX_NAME
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{model} has no {INDEX_NAME}: it is not a whole pipeline. Give one that is; in Python, a transformer "
                f"alone is combined with the other components of one: from_pretrained(PIPELINE, transformer=...)"
            )
        name = read_json(path).get("_class_name")
        if not isinstance(name, str) or not name.isidentifier():
            raise CheckpointError(f"{path} does not say which pipeline it is (_class_name); download or save it again")
    return folder, name


def picture_size(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
    """From two configs: the side of the training images, and what sides must be multiples of, in pixels.

    Raises:
        ConfigurationError: a config that was not checked yet has values that cannot be used.
    """
    widths = vae.get("block_out_channels", (64,))
    if not isinstance(widths, Sequence) or not 1 <= len(widths) <= 16:
        raise ConfigurationError(f"vae/config.json: block_out_channels must be a list of numbers, not {shown(widths)}")
    factor = 2 ** (len(widths) - 1)
    numbers = (("sample_size", 128, 65_536), ("patch_size", 2, 64))
    side, patch = (
        whole_number(f"transformer/config.json: {key}", transformer.get(key, usual), 1, most, error=ConfigurationError)
        for key, usual, most in numbers
    )
    return side * factor, patch * factor


def read_part_configs(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The ``config.json`` of components, unchecked; empty if there is none."""
    with reading(folder) as root:
        paths = [root / name / "config.json" for name in names]
        return [read_json(path) if path.is_file() else {} for path in paths]


def inspect_model(model: str | os.PathLike[str], *, deep: bool = False) -> Inspection:
    """Look into a checkpoint: a folder, a bundled model, or a hub repository that is on this machine.

    Args:
        deep: read all weights, and look for NaN and infinity in them.

    Raises:
        CheckpointError: files are missing or damaged, as loading would find.
        ConfigurationError: a config holds a value that cannot be used.
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
    from ..checkpoints.foreign import from_transformers

    with reading(folder) as root:
        _, class_name = resolve_pipeline(str(root))
        found = inspect_parts(root, class_name, read_json(root / INDEX_NAME), name=name)
        for part in found.parts:
            if part.class_name in READERS:  # small enough to be loaded
                from_transformers.load_reader(part.class_name, root / part.name)
            if deep:
                _check_values(part.weights)
    return found


def inspect_parts(
    folder: Path, class_name: str, index: Mapping[str, Any], variant: str | None = None, name: str | None = None
) -> Inspection:
    """Look into those components of a pipeline's folder that an index lists.

    Args:
        variant: which copy of the weights; any if None, the one without a variant first.
        name: what to call the model; its folder if None.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigurationError: a config holds a value that cannot be used.
    """
    parts = []
    with _disk_errors(folder):
        for part, (library, part_class) in component_entries(folder / INDEX_NAME, index).items():
            if part_class is None or not accepted_classes(class_name, part):  # absent, or never loaded
                continue
            check_role(class_name, part, (library, part_class), str(folder))
            if not (folder / part).is_dir():
                raise CheckpointNotFoundError(
                    f"{folder} lacks the component {part} that its {INDEX_NAME} lists; download it"
                )
            with reading(folder / part) as place:
                parts.append(_inspect_part(place, part_class, variant))
    return Inspection(name or str(folder), folder, class_name, tuple(parts))


def _inspect_part(folder: Path, class_name: str, variant: str | None) -> Part:
    from ..checkpoints.foreign import from_transformers
    from ..models.base import Model

    config: Mapping[str, Any] = {}
    stored: Stored = {}
    chosen = _variant_there(folder) if variant is None else variant
    if class_name in LANGUAGE_MODELS:
        config, _, stored = from_transformers.check_model(class_name, folder, chosen, None)
    elif class_name not in READERS:
        cls = class_of(class_name)
        if issubclass(cls, Model):
            skeleton, stored = cls.skeleton(folder, variant=chosen)
            config = skeleton.config
        else:
            cls.from_pretrained(folder)
    files = tuple(dict.fromkeys(tensor.file for tensor in stored.values()))
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".safetensors", ".bin")]
    pickled = any(path.suffix == ".bin" for path in files)
    tensors = {} if pickled else {name: (dtype, math.prod(shape)) for name, (_, dtype, shape) in stored.items()}
    size = sum(path.stat().st_size for path in [*files, *others])
    return Part(folder.name, class_name, config, tensors, size, pickled, files)


def _variant_there(folder: Path) -> str | None:
    """Of the copies of a model's weights: safetensors before pickles, without a variant before with one."""
    found = [match for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    copies = [(match["kind"] == "bin", match["variant"] or match["index_variant"] or "") for match in found]
    return min(copies, default=(False, ""))[1] or None


def _check_values(files: Iterable[Path]) -> None:
    from ..checkpoints.stored import first_non_finite, listing

    found = first_non_finite(files)
    if found is not None:
        raise CheckpointError(
            f"{found[0]}: {listing([found[1]])} holds NaN or infinity, and so will what it computes; download or save "
            f"it again"
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, ImpastoError):
            raise
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}; check its permissions") from error
