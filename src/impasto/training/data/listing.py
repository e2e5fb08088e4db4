"""What a folder of images holds: image files and their captions, in the forms that data sets have."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...checks import MAX_CHARACTERS, shown
from ...errors import InputError
from ...pipelines.images import reason
from .captions import Captions, captions_of

logger = logging.getLogger("impasto")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
METADATA = "metadata.jsonl"
#: Where the original code keeps captions and images: lists of {"path", "prompt", "sharegpt4v", "ratio", ...}.
_ORIGINAL_JSON = ("InternData/data_info.json", "InternData/partition/data_info.json", "data_info.json")
_ORIGINAL_IMAGES = "InternImgs"
_MOST_BYTES = 8 << 30  # of a file of captions
_MOST_TEXT = 4 * MAX_CHARACTERS  # bytes of a caption's file


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file and its captions."""

    name: str  # relative to the folder, with slashes
    captions: Captions
    problem: str | None = None  # why its captions cannot be read


def list_folder(folder: Path, metadata: Path | None = None, mask_suffix: str | None = None) -> list[Entry]:
    """The images of a folder, in a fixed order, with their captions.

    The captions come from ``metadata`` if given, else from the first of these that exists: ``metadata.jsonl``; the
    original code's ``data_info.json``, with images in ``InternImgs``; a ``.txt`` file next to each image.

    Args:
        mask_suffix: files whose names end with it, before the extension, are masks and no images.

    Raises:
        InputError: no such folder, no image in it, or captions that cannot be read; the message has the line.
    """
    if not folder.is_dir():
        raise InputError(f"the folder of images {folder} does not exist; set data.sources to folders that do")
    metadata = metadata or metadata_of(folder)
    if metadata is None:
        entries = [with_text(folder, name) for name in _image_names(folder, mask_suffix)]
    elif metadata.suffix == ".json":
        images = _ORIGINAL_IMAGES if (folder / _ORIGINAL_IMAGES).is_dir() else ""
        entries = _listed(metadata, _json_records(metadata), "path", images)
    else:
        entries = _listed(metadata, _jsonl_records(metadata), "file_name", "")
    if not entries:
        raise InputError(f"{metadata or folder} has no images; expected files of the kinds {', '.join(EXTENSIONS)}")
    return entries


def metadata_of(folder: Path) -> Path | None:
    """The file of captions that a folder has, if any."""
    candidates = [folder / METADATA, *(folder / name for name in _ORIGINAL_JSON)]
    return next((path for path in candidates if path.is_file()), None)


def unlisted(folder: Path, entries: Sequence[Entry], mask_suffix: str | None = None) -> list[str]:
    """The names of the images in a folder that are not among the entries, as its file of captions leaves them out."""
    listed = {entry.name for entry in entries}
    return [name for name in _image_names(folder, mask_suffix) if name not in listed]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metadata.jsonl`` that ``list_folder`` has read, with all their fields."""
    return [record for _, record in _jsonl_records(path)]


def _image_names(folder: Path, mask_suffix: str | None) -> list[str]:
    names: list[str] = []
    for parent, folders, files in os.walk(folder):  # which follows no links, as they may lead to a folder above
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for linked in (Path(parent, name) for name in folders):
            if linked.is_symlink():
                logger.warning("%s is a link to a folder and is skipped; make it a data source of its own", linked)
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            is_mask = mask_suffix is not None and stem.endswith(mask_suffix)
            if extension.lower() in EXTENSIONS and not is_mask and not file.startswith("."):
                names.append(Path(parent, file).relative_to(folder).as_posix())
    return names


def with_text(folder: Path, name: str) -> Entry:
    """An image with the caption in the ``.txt`` file next to it, if that exists."""
    path = (folder / name).with_suffix(".txt")
    try:
        if not path.is_file():
            return Entry(name, Captions())
        with path.open("rb") as file:
            content = file.read(_MOST_TEXT + 1)
        return Entry(name, captions_of({"text": content.decode("utf-8-sig")}))
    except (OSError, UnicodeDecodeError, InputError) as error:
        return Entry(name, Captions(), f"the caption {path.name} cannot be read: {reason(error)}")


def _listed(path: Path, records: Iterable[tuple[str, Any]], key: str, images: str) -> list[Entry]:
    """The entries of records, each of which comes with its place in the file for messages."""
    entries: list[Entry] = []
    places: dict[str, str] = {}
    for place, record in records:
        try:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise InputError(f'a record must be an object with the file\'s name as "{key}", not {shown(record)}')
            name = _inside(images, record[key])
            if name in places:
                raise InputError(f"{shown(name)} is listed already in {places[name]}; keep one of the two")
            entries.append(Entry(name, captions_of(record)))
        except InputError as error:
            raise InputError(f"{path}, {place}: {error}") from error
        places[name] = place
    return entries


def _inside(images: str, name: str) -> str:
    """A file's name below the folder.

    Raises:
        InputError: the name leads out of it.
    """
    path = PurePosixPath(images) / name.replace("\\", "/")
    outside = path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name) is not None
    if "\0" in name or not path.parts or outside:
        raise InputError(f"{shown(name)} is not the name of a file below the folder")
    return path.as_posix()


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(path, line, number - 1)


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parsed(path, _content(path), 0)
    if not isinstance(records, list):
        raise InputError(f"{path} must hold a list of records, not {shown(records)}")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} has more than {_MOST_BYTES:,} bytes; divide it into several folders")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(path: Path, content: bytes, lines_before: int) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {lines_before + error.lineno}, column {error.colno}"
        raise InputError(f"{path}, {place}: not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path}, line {lines_before + 1}: not valid JSON in UTF-8: {shown(str(error))}") from error
