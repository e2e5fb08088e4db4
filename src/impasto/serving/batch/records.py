"""The records of a batch: lines of JSON, all of which are checked before anything is generated."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoints.adapters.file import AdapterDefaults
from ...checks import (
    MAX_CHARACTERS,
    MAX_FILE_BYTES,
    MAX_GUIDANCE,
    MAX_SIDE,
    MAX_STEPS,
    finite,
    nearest,
    shown,
    text,
    whole_number,
)
from ...errors import ImpastoError, InputError
from ...pipelines.adapters import ChosenAdapter, adapter_defaults
from ...pipelines.image_files import measure_image
from ...pipelines.request import Schedule
from ..served import ServedModel

FIELDS = (
    "id",
    "prompt",
    "negative_prompt",
    "size",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "scheduler",
    "lora",
    "image",
    "mask",
    "strength",
)
#: Names that are file names everywhere, and samples of webdataset: a tar has room for 100 characters, with ".json".
_ID = re.compile(r"[A-Za-z0-9_-]{1,95}")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_MOST_RECORDS = 10_000_000
_MOST_LINE = 1 << 20  # bytes
#: How many faults of records are listed.
_LISTED = 5


@dataclass(frozen=True)
class Record:
    """One image to generate; all values are checked.

    Attributes:
        index: the number of its line, from 0, without empty lines.
        id: unique, whatever its case; if the record has none, its index.
        images: files to edit.
        folder: of the file of records; all paths are absolute, and settings name those inside it relative to it.
    """

    index: int
    id: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None
    adapters: tuple[ChosenAdapter, ...]
    images: tuple[Path, ...]
    mask: Path | None
    strength: float
    folder: Path = Path()

    def settings(self) -> dict[str, Any]:
        """By the names of the file, for the manifest; without what is not set."""
        found: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": self.scheduler,
            "lora": [f"{self._stated(adapter.source)}:{adapter.weight:g}" for adapter in self.adapters],
        }
        if self.images:
            found |= {"image": [self._stated(path) for path in self.images], "strength": self.strength}
            found["mask"] = None if self.mask is None else self._stated(self.mask)
        return {name: value for name, value in found.items() if value not in (None, [], "")}

    def _stated(self, path: str | Path) -> str:
        return str(Path(path).relative_to(self.folder)) if Path(path).is_relative_to(self.folder) else str(path)

    def key(self, model: str) -> str:
        """What an image depends on, as a short hash: with another one, an image of this id is of another batch."""
        content = json.dumps([model, self.settings()], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Options(NamedTuple):
    """What holds for records that say nothing else.

    Attributes:
        seed: of the first record; record i has ``seed + i``.
        steps, guidance_scale: None: those of a record's adapters, or else the model's.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None


DEFAULT = Options()

#: Adapters by how records name them, and how to generate with them.
_Adapters = dict[str, tuple[ChosenAdapter, AdapterDefaults]]


def read_records(path: Path, model: ServedModel, options: Options = DEFAULT) -> list[Record]:
    """The records of a file of JSON lines.

    Args:
        model: whose defaults hold in the end.

    Raises:
        InputError: the file cannot be read, or records cannot be used: the first few are listed, with their lines.
    """
    faults: list[str] = []
    records: list[Record] = []
    known: dict[str, int] = {}
    adapters: _Adapters = {}
    folder = Path(os.path.abspath(path.parent))  # other processes may have another working folder
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file, path), 1):
                if not line.strip():
                    continue
                try:
                    record = _record(line, len(records), folder, model, options, adapters)
                    name = record.id.lower()  # many disks do not tell cases apart
                    if name in known:
                        same = f"its id {shown(record.id)} is that of line {known[name]} too"
                        raise InputError(f"{same}; ids must differ in more than case")
                    known[name] = number
                    records.append(record)
                except ImpastoError as error:
                    faults.append(f"line {number}: {error}")
                    if len(faults) > 1000:
                        break
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise InputError(f"{path} has records that cannot be used. {'; '.join(faults[:_LISTED])}{more}")
    if not records:
        raise InputError(f'{path} has no records; write a line such as {{"prompt": "a red cube"}} for each image')
    if len(records) > _MOST_RECORDS:
        raise InputError(f"{path} has {len(records):,} records, and at most {_MOST_RECORDS:,} are taken; divide it")
    return records


def _lines(file: Any, path: Path) -> Iterator[bytes]:
    while line := file.readline(_MOST_LINE + 1):
        if len(line) > _MOST_LINE:
            raise InputError(f"{path} has a line of more than {_MOST_LINE:,} bytes; each record is a line")
        yield line


def _record(line: bytes, index: int, folder: Path, model: ServedModel, options: Options, adapters: _Adapters) -> Record:
    try:
        given = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON ({shown(str(error))})") from error
    if not isinstance(given, dict):
        raise InputError(f"it is no object but {shown(given)}")
    for name in given:
        if name not in FIELDS:
            hint = nearest(name, FIELDS, f"fields are {', '.join(FIELDS)}")
            raise InputError(f"it has {shown(name)}{hint}")
    given = {name: value for name, value in given.items() if value is not None}
    prompt = text("prompt", given.get("prompt"), MAX_CHARACTERS)
    if not prompt.strip():
        raise InputError("its prompt is empty")
    images = tuple(_file("image", path, folder) for path in _list("image", given.get("image")))
    mask = _file("mask", given["mask"], folder) if "mask" in given else None
    if images and not model.edits:
        raise InputError(f"it has an image, and {model.name} edits none")
    if (mask is not None or "strength" in given) and not (images and model.masks):
        why = "but no image" if model.masks else f"and {model.name} takes none"
        raise InputError(f"it has a mask or a strength {why}")
    if len(images) > 1 and model.masks:
        raise InputError(f"it has {len(images)} images, and {model.name} edits one")
    sizes = [measure_image(image)[::-1] for image in images]  # width and height
    if mask is not None and measure_image(mask)[::-1] != sizes[0]:
        raise InputError(f"its mask is not of the size of its image, {sizes[0][0]} x {sizes[0][1]}")
    width, height = _size(given, sizes[0] if sizes else (model.width, model.height))
    if width * height > model.most_pixels:
        raise InputError(f"{width} x {height} pixels are more than the {model.most_pixels:,} of {model.name}")
    chosen = [_adapter(source, folder, adapters) for source in _list("lora", given.get("lora"))]
    tuned = AdapterDefaults.first(each for _, each in chosen)
    scheduler = given.get("scheduler", tuned.scheduler if tuned.scheduler in model.schedulers else None)
    if scheduler is not None and scheduler not in model.schedulers:
        raise InputError(f"its scheduler is {shown(scheduler)}; {model.name} takes {', '.join(model.schedulers)}")
    name = given.get("id", f"{index:06d}")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InputError(f"its id is {shown(name)}; an id is up to 95 letters, digits, - and _")
    asked = given.get("num_inference_steps", options.steps), given.get("guidance_scale", options.guidance_scale)
    steps, guidance = tuned.numbers(model, *asked)
    steps = whole_number("num_inference_steps", steps, most=MAX_STEPS)
    strength = finite("strength", given.get("strength", 1.0 if mask is not None else 0.8), above=0.0, most=1.0)
    if images and model.masks:
        Schedule(steps, None, None).at(strength)  # leaves at least one step
    return Record(
        index,
        name,
        prompt,
        text("negative_prompt", given.get("negative_prompt", ""), MAX_CHARACTERS),
        width,
        height,
        steps,
        finite("guidance_scale", guidance, -MAX_GUIDANCE, MAX_GUIDANCE),
        whole_number("seed", given.get("seed", options.seed + index), 0, 2**63 - 1),
        scheduler,
        tuple(adapter for adapter, _ in chosen),
        images,
        mask,
        strength,
        folder,
    )


def _size(given: Mapping[str, Any], usual: tuple[int, int]) -> tuple[int, int]:
    """Width and height."""
    if "size" in given:
        match = _SIZE.fullmatch(given["size"]) if isinstance(given["size"], str) else None
        if match is None or "width" in given or "height" in given:
            both = "size, and width or height" if match else shown(given["size"])
            raise InputError(f'its size is {both}; give size as in "1024x768", or width and height')
        given = {"width": int(match[1]), "height": int(match[2])}
    if ("width" in given) != ("height" in given):
        raise InputError("it has one of width and height; give both")
    return (
        whole_number("width", given.get("width", usual[0]), most=MAX_SIDE),
        whole_number("height", given.get("height", usual[1]), most=MAX_SIDE),
    )


def _list(name: str, given: Any) -> list[str]:
    values = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(values, list) or len(values) > 16 or not all(isinstance(one, str) and one for one in values):
        raise InputError(f"its {name} is {shown(given)}; it is a path, or a list of up to 16")
    return values


def _file(name: str, given: Any, folder: Path) -> Path:
    if not isinstance(given, str) or not given or "\0" in given:
        raise InputError(f"its {name} is {shown(given)}; it is the path of a file")
    path = folder / given
    if not path.is_file():
        raise InputError(f"its {name} {shown(str(path))} does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"its {name} {shown(str(path))} has more than {MAX_FILE_BYTES:,} bytes")
    return path


def _adapter(source: str, folder: Path, known: _Adapters) -> tuple[ChosenAdapter, AdapterDefaults]:
    """An adapter, whose path is relative to the file if there is one; else as the command line takes it."""
    if source not in known:
        chosen = ChosenAdapter.parse(source)
        for path in (folder / chosen.source, Path(os.path.abspath(chosen.source))):
            if path.exists():
                chosen = chosen._replace(source=str(path))
                break
        known[source] = (chosen, adapter_defaults([chosen]))
    return known[source]
