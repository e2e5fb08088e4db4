"""What a checkpoint holds, read from its JSON files and the headers of its weights, without loading them.

Torch is imported only to read the headers, so that a misspelt model name is reported at once.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import hub
from ..checkpoints.config import read_json
from ..checkpoints.layout import INDEX_NAME, WEIGHTS, holds_weights
from ..checks import shown, whole_number
from ..errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, HubError, ImpastoError
from ..family import BLOCK_LISTS, pixels_per_latent
from ..folders import reading
from ..registry import LANGUAGE_MODELS, READERS, accepted_classes, check_role, class_of, component_entries, is_foreign

if TYPE_CHECKING:
    from ..checkpoints.stored import Stored

#: Substrings of the names of tensors that stay float32 when float16 is requested, because they would overflow.
FLOAT32_IN_FLOAT16 = {"T5EncoderModel": (".wo.",)}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
#: A repeated block in the names of tensors.
_BLOCK = re.compile(rf"([^.]+\.)*?({'|'.join(BLOCK_LISTS)})\.\d+\.")


@dataclass(frozen=True)
class Component:
    """One component of a pipeline on disk."""

    name: str
    class_name: str | None
    config: Mapping[str, Any]  # checked, defaults included
    tensors: Mapping[str, tuple[str, int]]  # name -> stored dtype, number of values
    disk_bytes: int  # of all files that loading reads
    pickled: bool = False  # the weights cannot be inspected without loading them
    weights: tuple[Path, ...] = ()  # the files

    @property
    def parameters(self) -> int:
        return sum(count for _, count in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtypes, the most frequent first."""
        counts: Counter[str] = Counter()
        for dtype, count in self.tensors.values():
            counts[dtype] += count
        return tuple(dtype for dtype, _ in counts.most_common())

    def memory(self, dtype: str, names: Iterable[str] | None = None) -> int:
        """Bytes of the weights loaded in ``dtype``, one of ``DTYPES``: of all of them, or of those in ``names``."""
        wide = self.wide(dtype)
        chosen = self.tensors if names is None else names
        return sum(self.tensors[name][1] * (4 if name in wide else DTYPES[dtype]) for name in chosen)

    def wide(self, dtype: str) -> set[str]:
        """The names of the tensors that stay float32 when the others are loaded in ``dtype``."""
        marks = FLOAT32_IN_FLOAT16.get(self.class_name or "", ()) if dtype == "float16" else ()
        return {name for name in self.tensors if any(mark in name for mark in marks)}

    def blocks(self) -> dict[str, list[str]]:
        """The names of the tensors in each of the repeated blocks; those of all others under ""."""
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
    components: Mapping[str, Component]

    @property
    def image_size(self) -> tuple[int, int]:
        """As ``image_size``; (0, 1) without a transformer."""
        transformer, vae = self.components.get("transformer"), self.components.get("vae")
        return (0, 1) if transformer is None else image_size(transformer.config, None if vae is None else vae.config)


def resolve_pipeline(model: str) -> tuple[Path, str]:
    """The local folder of a pipeline and the name of its class. From the hub, only JSON files are downloaded.

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


def image_size(transformer: Mapping[str, Any], vae: Mapping[str, Any] | None) -> tuple[int, int]:
    """From two configs: the side of the training images, and what sides must be multiples of, in pixels.

    Args:
        vae: None: there is no autoencoder, and the usual factor is assumed.

    Raises:
        ConfigurationError: a config that was not checked yet has values that cannot be used.
    """
    if vae is not None:
        widths = vae.get("block_out_channels", (64,))
        if not isinstance(widths, Sequence) or not 1 <= len(widths) <= 16:
            raise ConfigurationError(
                f"vae/config.json: block_out_channels must be a list of numbers, not {shown(widths)}"
            )
        vae = {"block_out_channels": widths}
    factor = pixels_per_latent(vae)
    side, patch = (
        whole_number(f"transformer/config.json: {key}", transformer.get(key, usual), 1, most, error=ConfigurationError)
        for key, usual, most in (("sample_size", 128, 65_536), ("patch_size", 2, 64))
    )
    return side * factor, patch * factor


def read_configs(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The ``config.json`` of components, unchecked; empty for those without one."""
    with reading(folder) as root:
        paths = [root / name / "config.json" for name in names]
        return [read_json(path) if path.is_file() else {} for path in paths]


def inspect_model(model: str | os.PathLike[str], *, deep: bool = False) -> Inspection:
    """Inspect a checkpoint: a folder, a bundled model, or a downloaded hub repository.

    Args:
        deep: also read all weights and check them for NaN and infinity.

    Raises:
        CheckpointError: files are missing or damaged, so that loading would fail.
        ConfigurationError: a config holds a value that cannot be used.
        HubError: a hub repository that was not downloaded yet.
    """
    name = os.fspath(model)
    try:
        folder = hub.resolve(name, local_files_only=True)
    except HubError as error:
        raise HubError(
            f"{name} is neither a folder nor a downloaded repository, and only local files can be inspected; "
            f"download it with `hf download {name}`"
        ) from error
    from ..checkpoints.foreign import from_transformers
    from ..checkpoints.stored import first_non_finite, listing

    with reading(folder) as root:
        _, class_name = resolve_pipeline(str(root))
        found = inspect_components(root, class_name, read_json(root / INDEX_NAME), name=name)
        for component in found.components.values():
            if component.class_name in READERS:  # small enough to be loaded
                from_transformers.load_reader(component.class_name, root / component.name)
            damage = first_non_finite(component.weights) if deep else None
            if damage is not None:
                raise CheckpointError(
                    f"{damage[0]}: {listing([damage[1]])} holds NaN or infinity, and so will every result; download "
                    f"or save it again"
                )
    return found


def inspect_components(
    folder: Path, class_name: str, index: Mapping[str, Any], variant: str | None = None, name: str | None = None
) -> Inspection:
    """Inspect those components of a pipeline's folder that an index lists.

    Args:
        variant: which copy of the weights; None: any, preferably the one without a variant.
        name: the name of the model; None: its folder.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigurationError: a config holds a value that cannot be used.
    """
    components = {}
    try:
        for component, (library, its_class) in component_entries(folder / INDEX_NAME, index).items():
            if its_class is None or not accepted_classes(class_name, component):  # absent, or never loaded
                continue
            check_role(class_name, component, (library, its_class), str(folder))
            if not (folder / component).is_dir():
                raise CheckpointNotFoundError(
                    f"{folder} lacks the component {component} that its {INDEX_NAME} lists; download it"
                )
            with reading(folder / component) as place:
                components[component] = _inspect_component(place, its_class, variant)
    except OSError as error:
        if isinstance(error, ImpastoError):
            raise
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}; check its permissions") from error
    return Inspection(name or str(folder), folder, class_name, components)


def _inspect_component(folder: Path, class_name: str, variant: str | None) -> Component:
    from ..checkpoints.foreign import from_transformers
    from ..models.base import Model

    config: Mapping[str, Any] = {}
    stored: Stored = {}
    chosen = variant if variant is not None and holds_weights(folder, variant) else _stored_variant(folder)
    if class_name in LANGUAGE_MODELS:
        config, _, stored = from_transformers.check_model(class_name, folder, chosen, None)
    elif is_foreign(class_name):
        if (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is a {class_name} of diffusers, whose memory is not known: load it without a memory budget, "
                f"or load it with diffusers and pass it, {folder.name}=..."
            )
        read_json(folder / "scheduler_config.json")
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
    return Component(folder.name, class_name, config, tensors, size, pickled, files)


def _stored_variant(folder: Path) -> str | None:
    """The variant of the preferred copy of the weights: safetensors before pickles, no variant before one."""
    found = [match for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    copies = [(match["kind"] == "bin", match["variant"] or match["index_variant"] or "") for match in found]
    return min(copies, default=(False, ""))[1] or None
