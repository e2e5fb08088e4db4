"""A cache of encoded samples: what frozen models make of a source, on disk.

    cache.json                 what was cached, and how: ``CacheSettings``
    chunk-000000.safetensors   tensors of consecutive samples: "12.0.mean" and "12.0.std" of sample 12's view 0, ...
    index-1-of-1.jsonl         a line for each chunk: its checksum, and its samples without their tensors

The samples are those of the source, in its order, so training from a cache forms the same batches. A view is a crop,
mirrored or not (``views.Views``). The mean and deviation of the posterior are stored, not a sample of it, and features
of all captions, so training from a cache chooses what training from images would. A cache of latents alone has no
features: its captions are encoded in training, so the text encoder may be trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...checks import finite, shown, whole_number
from ...errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError
from .buckets import Buckets, sizes_of
from .captions import Captions
from .sample import Sample
from .views import Views

SETTINGS, EMPTY = "cache.json", "empty.safetensors"
_VERSION = 1
_VALUES = 64  # of each tensor, in a fingerprint


@dataclass(frozen=True)
class CacheSettings:
    """What a cache depends on.

    Attributes:
        samples: of the source.
        sizes: the buckets.
        crop, flip: the views of each image.
        autoencoder, text_encoder: ``fingerprint``s of the models; "" for the latter if only latents are stored.
        tokens, clean: how captions were tokenized.
        dtype: of the stored tensors.
        chunk: samples of a file.
    """

    samples: int
    sizes: list[list[int]]
    max_upscale: float
    max_crop: float
    crop: str | int
    flip: bool
    autoencoder: str
    text_encoder: str
    tokens: int
    clean: bool
    dtype: str = "float32"
    chunk: int = 32
    version: int = _VERSION

    @property
    def has_texts(self) -> bool:
        """Whether features of the captions are stored."""
        return self.text_encoder != ""

    def differences(self, other: CacheSettings) -> list[str]:
        """The names of the values that differ."""
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name)]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_settings(folder: Path) -> CacheSettings:
    """The settings of a cache.

    Raises:
        CheckpointError: it is no cache, or one of another version.
    """
    path = folder / SETTINGS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = CacheSettings(**values)
        whole_number("samples", settings.samples, least=0)
        Buckets(sizes_of(settings.sizes), settings.max_upscale, settings.max_crop)
        if settings.version != _VERSION or Views(settings.crop, settings.flip).count is None:  # type: ignore[arg-type]
            raise ValueError(f"version {settings.version}")
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{folder} is no cache: no {SETTINGS}; make it with impasto cache") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not that of a cache of this version: {shown(str(error))}") from error
    return settings


class CachedSource:
    """A cache as a source.

    Args:
        folder: made by ``impasto cache``.
        real_prompt_ratio, weight: as of ``images.Reading``; they are not part of the cache.

    Attributes:
        settings: what the cache depends on.
        empty: [M, D], features of the empty caption; None if only latents are stored.

    Raises:
        CheckpointError: no cache, an incomplete one, or one whose index is damaged.
    """

    def __init__(self, folder: Path, real_prompt_ratio: float = 0.5, weight: float = 1.0):
        self.folder, self.settings = folder, read_settings(folder)
        self.real_prompt_ratio = finite("real_prompt_ratio", real_prompt_ratio, 0, 1, error=ConfigurationError)
        self.weight = finite("weight", weight, 0, error=ConfigurationError)
        self.views = Views(self.settings.crop, self.settings.flip)  # type: ignore[arg-type]
        self._checksums: dict[str, str] = {}
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for line in _current(folder):
            found |= {record["index"]: (record, line["file"]) for record in line["samples"]}
            self._checksums[line["file"]] = line["sha256"]
        for index, (record, _) in found.items():
            views = 0 if record["bucket"] is None or record.get("broken") else self.views.count
            if index >= self.settings.samples or (views and len(record["crops"]) != views):
                raise CheckpointError(f"the sample {index} in the index of {folder} does not fit its {SETTINGS}")
        missing = self.settings.samples - len(found)
        if missing:
            raise CheckpointError(
                f"the cache {folder} lacks {missing} of its {self.settings.samples} samples; complete it by running "
                f"impasto cache again"
            )
        self._records = [found[index][0] for index in range(len(found))]
        self._chunks = [found[index][1] for index in range(len(found))]
        self._checked: set[str] = set()
        self.empty: Tensor | None = None
        if self.settings.has_texts:
            with self._open(EMPTY) as file:
                self.empty = file.get_tensor("text").float()

    def __len__(self) -> int:
        return len(self._records)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        height, width = self._records[index]["size"]
        return height, width

    def name(self, index: int) -> str:
        """The image's name in the source that was cached."""
        return str(self._records[index]["name"])

    def captions(self, index: int) -> Captions:
        """All captions of an image."""
        short, long = self._records[index]["captions"]
        return Captions(tuple(short), tuple(long))

    def check_models(self, vae: nn.Module | None, text_encoder: nn.Module | None) -> None:
        """Check that it was made with these models, as far as they are loaded.

        Raises:
            ConfigurationError: it was made with others.
        """
        for name, model, stored in (
            ("autoencoder", vae, self.settings.autoencoder),
            ("text encoder", text_encoder, self.settings.text_encoder),
        ):
            if model is not None and stored and fingerprint(model) != stored:
                raise ConfigurationError(
                    f"the cache {self.folder} was made with another {name}, or in another precision; name that one, or "
                    f"make the cache again"
                )

    def check_settings(self, buckets: Buckets, tokens: int, clean: bool) -> None:
        """Check that it was made for these buckets and this reading of captions.

        Raises:
            ConfigurationError: it was made for others.
        """
        wanted = {
            "sizes": sorted(map(list, buckets.sizes)),
            "max_upscale": buckets.max_upscale,
            "max_crop": buckets.max_crop,
        }
        wanted |= {"tokens": tokens, "clean": clean} if self.settings.has_texts else {}
        for name, value in wanted.items():
            stored = getattr(self.settings, name)
            if (sorted(stored) if name == "sizes" else stored) != value:
                raise ConfigurationError(
                    f"the cache {self.folder} was made with {name} {shown(stored)}, and here it is {shown(value)}; use "
                    f"the same, or make the cache again"
                )

    def check_text_encoder(self, other: CachedSource) -> None:
        """Check that another cache has features of the same text encoder, which may not be loaded.

        Raises:
            ConfigurationError: it was made with another one, or one of them has latents alone.
        """
        if self.settings.has_texts != other.settings.has_texts:
            raise ConfigurationError(
                f"of the caches {self.folder} and {other.folder}, one has latents alone and the other one texts too; "
                f"make one of them again"
            )
        if self.settings.text_encoder != other.settings.text_encoder:
            raise ConfigurationError(
                f"the caches {self.folder} and {other.folder} were made with different text encoders, or in different "
                f"precisions; make one of them again"
            )

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        """The stored posterior of one view, and one caption, with its features if they are stored.

        Raises:
            InputError: the image could not be read when it was cached, its chunk is damaged, or ``target`` is another
                size than it was cached for.
        """
        record = self._records[index]
        view = self.views.choose(record["name"], rng)
        caption = self.captions(index).choose(rng, self.real_prompt_ratio)
        if record.get("broken"):
            raise InputError(record["broken"])
        if record["bucket"] != list(target):
            raise InputError(f"{record['name']} was cached for {record['bucket']}, not {list(target)}; cache it again")
        prefix = f"{index}.{view.number}."
        try:
            with self._open(self._chunks[index]) as file:
                own = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
                tensors = {name: file.get_tensor(prefix + name) for name in own}
                has_none = caption is None or not self.settings.has_texts
                text = None if has_none else file.get_tensor(text_key(caption or "")).float()
            posterior = tensors["mean"], tensors["std"]
        except (SafetensorError, KeyError) as error:
            path = self.folder / self._chunks[index]
            raise InputError(f"{path} lacks tensors of {shown(record['name'])}: {error}; cache it again") from error
        return Sample(
            posterior=posterior,
            caption=caption,
            text=text,
            size=self.size(index),
            crop=tuple(record["crops"][view.number]),
            loss_mask=tensors["mask"].float() / 255 if "mask" in tensors else None,
            weight=self.weight * record.get("weight", 1.0),
            labels=tensors.get("labels"),
            extra={name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")},
        )

    def _open(self, name: str) -> Any:
        """A chunk, whose checksum is verified the first time."""
        path = self.folder / name
        try:
            if name not in self._checked:
                if _checksum(path) != self._checksums.get(name):
                    raise InputError(f"{path} is damaged: its checksum is not that of the index; cache it again")
                self._checked.add(name)
            return safe_open(path, framework="pt")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}; cache it again") from error


def read_index(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all indices of a cache, by whichever process.

    Raises:
        CheckpointError: a line is damaged, other than a last one that was not written to its end.
    """
    for path in sorted(folder.glob("index-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line) if line else None
                if record is not None:
                    _check_line(record)
                    yield record
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}, line {number}, is damaged; remove this line and run impasto cache again"
                ) from error


def _current(folder: Path) -> Iterator[dict[str, Any]]:
    """The line of each file. A file that was made again, perhaps by another process, has an older one in some index."""
    found: dict[str, dict[str, dict[str, Any]]] = {}  # by file and checksum
    for line in read_index(folder):
        found.setdefault(line["file"], {})[line["sha256"]] = line
    for name, lines in found.items():
        path, last = folder / name, [*lines.values()][-1]
        yield lines.get(_checksum(path), last) if len(lines) > 1 and path.is_file() else last


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_line(record: Mapping[str, Any]) -> None:
    valid = isinstance(record["file"], str) and "/" not in record["file"] and isinstance(record["sha256"], str)
    for sample in record["samples"]:
        height, width = sample["size"]
        whole_number("index", sample["index"], least=0)
        valid = valid and height > 0 and width > 0 and isinstance(sample["name"], str)
        places = [*sample["crops"], *([] if sample["bucket"] is None else [sample["bucket"]])]
        valid = valid and all(isinstance(place, list) and len(place) == 2 for place in places)
        short, long = sample["captions"]
        valid = valid and all(isinstance(caption, str) for caption in (*short, *long))
    if not valid:
        raise ValueError("not a line of an index")


def text_key(caption: str) -> str:
    """The name of a caption's features in a chunk."""
    return f"text.{hashlib.sha256(caption.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def fingerprint(*modules: nn.Module) -> str:
    """Identifies models by their tensors' names, shapes, and evenly spread values, in float32."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            flat = tensor.detach().reshape(-1)
            places = torch.linspace(0, max(0, len(flat) - 1), min(_VALUES, len(flat))).long()
            values = flat[places.to(flat.device)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + values.tobytes())
    return digest.hexdigest()[:32]
