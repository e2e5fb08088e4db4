"""Webdataset shards as a source: tar files in which the files of a sample have one name and several extensions.

The shards are indexed once, and then read at the stored offsets: so a shard is a finite, ordered collection of samples.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...checks import MAX_FILE_BYTES, shown
from ...errors import ImpastoError, InputError
from ...files import append_line, make_folder
from ...pipelines.image_files import decode_image, measure_image
from ...pipelines.images import reason, to_rgb
from .captions import Captions, captions_of
from .faults import Faults
from .images import ImageSource, Reading
from .listing import EXTENSIONS
from .sizes import index_lines

_THREADS = 8
_BLOCK = 512  # bytes of a tar
_MOST_TEXT = 1 << 20  # bytes of a caption or a record
_MASKS = tuple(f".mask{extension}" for extension in EXTENSIONS)


class ShardSource(ImageSource):
    """The images of webdataset shards, with the captions of their ``.txt`` and ``.json`` files.

    A record in ``.json`` has captions under the names of ``metadata.jsonl``. ``.mask.png`` is a loss mask.

    Args:
        shards: a folder, in which all ``.tar`` files are shards, or files.
        reading: how images become samples.
        index: a file that keeps what the shards hold, so that they are not scanned each time.

    Attributes:
        damaged: the shards that are truncated or not readable, which are left out as a whole.
        without_image: how many samples have no image of a kind that is read.

    Raises:
        InputError: no shards, or too many shards or images that cannot be used.
        OutputError: the index cannot be written.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        reading: Reading | None = None,
        index: str | os.PathLike[str] | None = None,
    ):
        reading = reading or Reading()
        self._shards = _find(shards)
        self.damaged = Faults("the shards", reading.max_broken, len(self._shards))
        folder = shards if isinstance(shards, str | os.PathLike) and Path(shards).is_dir() else None
        names = [path.name if folder is None else path.relative_to(folder).as_posix() for path in self._shards]
        index = None if index is None else Path(index)
        stored = {} if index is None else _read_index(index)
        self._members: list[_Member] = []
        self.without_image = 0
        found: list[tuple[str, Captions, tuple[int, int] | str]] = []
        members: list[_Member] = []
        with ThreadPoolExecutor(_THREADS, "scan") as threads:
            for number, scanned in enumerate(threads.map(lambda path: _scan_once(path, stored), self._shards)):
                path = self._shards[number]
                if isinstance(scanned, str):
                    self.damaged.add(str(path), scanned)
                    continue
                if index is not None and scanned.is_new:
                    make_folder(index.parent)
                    append_line(index, scanned.line())
                self.without_image += scanned.without_image
                for entry in scanned.entries:
                    members.append(_Member(number, entry))
                    found.append((f"{names[number]}/{entry.key}", entry.captions, entry.size))
        if not found:
            raise InputError("the shards have no samples with an image")
        by_name: dict[str, _Member] = {}
        for (name, _, _), member in zip(found, members):
            if name in by_name:
                other = self._shards[by_name[name].shard]
                raise InputError(f"{self._shards[member.shard]} has the sample {name!r}, which {other} has too")
            by_name[name] = member
        super().__init__("the shards", reading, found)
        self._members = [by_name[name] for name in self._names]

    def _open(self, index: int) -> Image.Image:
        member = self._members[index]
        image = decode_image(self._content(member, member.entry.image), self._names[index], upright=True)
        return to_rgb(image, self.reading.background)

    def _open_mask(self, index: int) -> Image.Image | None:
        member = self._members[index]
        if member.entry.mask is None:
            return None
        name = f"the mask of {self._names[index]}"
        return to_rgb(decode_image(self._content(member, member.entry.mask), name, upright=True), "black").convert("L")

    def _content(self, member: _Member, span: _Span) -> io.BytesIO:
        path = self._shards[member.shard]
        if span.length > MAX_FILE_BYTES:
            raise InputError(
                f"a file of {member.entry.key} in {path} has {span.length:,} bytes, and at most {MAX_FILE_BYTES:,} are "
                f"read"
            )
        try:
            with path.open("rb") as file:
                file.seek(span.start)
                content = file.read(span.length)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if len(content) < span.length:
            raise InputError(f"{path} has become shorter since it was indexed; delete the index and start again")
        return io.BytesIO(content)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a file lies in its shard."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample in a shard."""

    key: str
    image: _Span
    mask: _Span | None
    captions: Captions
    size: tuple[int, int] | str  # or why there is none


@dataclass(frozen=True, slots=True)
class _Member:
    """A sample and the number of its shard."""

    shard: int
    entry: _Entry


@dataclass
class _Scanned:
    """What a shard holds."""

    path: Path
    stamp: tuple[int, int]  # time of change in nanoseconds, bytes
    entries: list[_Entry] = field(default_factory=list)
    without_image: int = 0  # samples
    is_new: bool = True

    def line(self) -> str:
        samples = [
            {
                "key": each.key,
                "image": [each.image.start, each.image.length],
                "mask": each.mask and [each.mask.start, each.mask.length],
                "captions": [each.captions.short, each.captions.long],
                "size": each.size,
            }
            for each in self.entries
        ]
        return json.dumps(
            {
                "shard": str(self.path),
                "changed": self.stamp[0],
                "bytes": self.stamp[1],
                "samples": samples,
                "without_image": self.without_image,
            }
        )


def _find(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    if isinstance(shards, str | os.PathLike) and Path(shards).is_dir():
        found = sorted(Path(shards).rglob("*.tar"))
        packed = sorted([*Path(shards).rglob("*.tar.gz"), *Path(shards).rglob("*.tgz")])
        if not found:
            problem = f"{packed[0].name} is compressed; decompress the shards" if packed else "it has no .tar files"
            raise InputError(f"there are no shards in {shards}: {problem}")
        return found
    paths = [Path(shards)] if isinstance(shards, str | os.PathLike) else [Path(each) for each in shards]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise InputError(f"the shard {missing[0]} does not exist" if missing else "no shards are given")
    if len(set(paths)) < len(paths):
        raise InputError("a shard is given twice; give each once")
    return paths


def _scan_once(path: Path, stored: dict[str, _Scanned]) -> _Scanned | str:
    """What a shard holds, from the index if it has not changed since; or why it cannot be read."""
    try:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = stored.get(str(path))
        return known if known is not None and known.stamp == stamp else _scan(path, stamp)
    except (OSError, tarfile.TarError, ImpastoError, ValueError) as error:
        return f"it is no readable tar file: {reason(error)}"


def _scan(path: Path, stamp: tuple[int, int]) -> _Scanned:
    groups: dict[str, dict[str, _Span]] = {}
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise InputError("it is compressed; decompress it")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():
                    raise InputError(f"{shown(member.name)} is a sparse file")
                if member.offset_data + member.size > stamp[1]:
                    raise InputError(f"it is truncated in {shown(member.name)}")
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if member.isreg() and stem and dot:
                    key = f"{folder}/{stem}" if folder else stem
                    span = _Span(member.offset_data, member.size)
                    if groups.setdefault(key, {}).setdefault(f".{extension.lower()}", span) != span:
                        raise InputError(f"it has {shown(member.name)} twice")
            end = tar.offset
        file.seek(end if end % _BLOCK == 0 else 0)
        if file.read(_BLOCK) != bytes(_BLOCK):  # a tar ends with blocks of zeros
            raise InputError("it is truncated: its end is missing")
        entries = [_entry(file, key, files) for key, files in groups.items()]
    found = [entry for entry in entries if entry is not None]
    return _Scanned(path, stamp, found, len(entries) - len(found))


def _entry(file: io.BufferedReader, key: str, files: dict[str, _Span]) -> _Entry | None:
    """A sample, if it has an image."""
    image = next((files[extension] for extension in EXTENSIONS if extension in files), None)
    if image is None:
        return None
    mask = next((files[extension] for extension in _MASKS if extension in files), None)
    try:
        return _Entry(key, image, mask, captions_of(_record(file, files)), _measure(file, image, key))
    except InputError as error:
        return _Entry(key, image, mask, Captions(), str(error))


def _record(file: io.BufferedReader, files: dict[str, _Span]) -> dict[str, Any]:
    """The record of a sample: that of its .json file, and the caption of its .txt file."""
    record: dict[str, Any] = {}
    for extension in (".json", ".txt"):
        span = files.get(extension)
        if span is None:
            continue
        if span.length > _MOST_TEXT:
            raise InputError(f"its {extension} file has {span.length:,} bytes, and at most {_MOST_TEXT:,} are read")
        file.seek(span.start)
        try:
            text = file.read(span.length).decode("utf-8-sig")
            value = json.loads(text) if extension == ".json" else {"text": text, **record}
        except (ValueError, RecursionError) as error:
            raise InputError(f"its {extension} file cannot be read: {shown(str(error))}") from error
        if not isinstance(value, dict):
            raise InputError(f"its .json file is no object but {shown(value)}")
        record = {key: each for key, each in value.items() if each is not None}
    return record


def _measure(file: io.BufferedReader, span: _Span, key: str) -> tuple[int, int]:
    if span.length > MAX_FILE_BYTES:
        raise InputError(f"{key} has {span.length:,} bytes, and at most {MAX_FILE_BYTES:,} are read")
    with io.BufferedReader(_Within(file, span), 1 << 14) as inside:
        return measure_image(inside, key)


class _Within(io.RawIOBase):
    """A file that lies in another one."""

    def __init__(self, file: io.BufferedReader, span: _Span):
        super().__init__()
        self._file, self._span, self._place = file, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._span.length}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._span.start + self._place)
        content = self._file.read(max(0, min(len(buffer), self._span.length - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def _read_index(path: Path) -> dict[str, _Scanned]:
    """What an index holds, by shard; shards of damaged lines are scanned again."""
    found: dict[str, _Scanned] = {}
    for line in index_lines(path):
        try:
            record = json.loads(line)
            entries = [
                _Entry(
                    str(each["key"]),
                    _Span(*map(int, each["image"])),
                    _Span(*map(int, each["mask"])) if each["mask"] else None,
                    Captions(*(tuple(map(str, texts)) for texts in each["captions"])),
                    each["size"] if isinstance(each["size"], str) else (int(each["size"][0]), int(each["size"][1])),
                )
                for each in record["samples"]
            ]
            stamp = (int(record["changed"]), int(record["bytes"]))
            without_image = int(record["without_image"])
            found[record["shard"]] = _Scanned(Path(record["shard"]), stamp, entries, without_image, is_new=False)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    return found
