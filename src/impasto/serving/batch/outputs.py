"""Where the images of a batch go: files in folders, or samples in tar shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError, OutputError
from ...files import make_folder, sync_folder, write_file
from .records import Record

#: Images in a folder, and by default in a shard.
PER_FOLDER = 10_000
PER_SHARD = 1_000
_BLOCK = 512  # bytes of a tar
_END = bytes(2 * _BLOCK)


class Output(Protocol):
    """Takes the images of a batch, one at a time."""

    def add(self, record: Record, png: bytes) -> dict[str, Any]:
        """Store an image, so that it survives the end of this process, and return what its manifest line says."""
        ...

    def close(self) -> None:
        """Nothing more comes for now."""
        ...


class Folders:
    """A file for each image."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, record: Record, png: bytes) -> dict[str, Any]:
        name = f"images/{record.index // PER_FOLDER:04d}/{record.id}.png"
        make_folder((self.folder / name).parent)
        write_file(self.folder / name, png)
        return {"file": name}

    def close(self) -> None:
        pass


class Shards:
    """Tar shards as webdataset reads them: ``ID.png``, ``ID.txt`` (the prompt) and ``ID.json`` (the settings).

    A sample is appended to the open shard as a whole, and then counts as soon as the manifest has its place. What a
    killed process has written of a sample that did not get so far is cut off, so a shard may grow in several runs.

    Args:
        part: of this process, and of how many, from (1, 1): in the names of its shards.
        lines: of the manifest, which say what the shards hold.
        size: samples in a shard.

    Raises:
        InputError: a shard is shorter than the manifest says.
    """

    def __init__(self, folder: Path, part: tuple[int, int], lines: Iterable[Mapping[str, Any]], size: int = PER_SHARD):
        self.folder, self.part, self.size = folder, part, size
        self.number, self.count, self.end = 0, 0, 0  # of the open shard: which one, samples, bytes
        ends: dict[str, tuple[int, int]] = {}
        for line in lines:
            if "shard" in line:
                count, end = ends.get(line["shard"], (0, 0))
                ends[line["shard"]] = (count + 1, max(end, line["offset"] + line["bytes"]))
        # The last shard goes on, unless it is full. Earlier ones may have had a smaller size, and stay as they are.
        while (name := self._name(self.number)) in ends and (
            ends[name][0] >= size or self._name(self.number + 1) in ends
        ):
            self._finish(name, ends[name][1])
            self.number += 1
        if name in ends:
            self.count, self.end = ends[name]
        self._file: Any = None

    def _name(self, number: int) -> str:
        part, parts = self.part
        return f"images-{number:06d}.tar" if parts == 1 else f"images-{part}-of-{parts}-{number:06d}.tar"

    def add(self, record: Record, png: bytes) -> dict[str, Any]:
        settings = json.dumps({"id": record.id, **record.settings()}).encode()
        files = {".png": png, ".txt": record.prompt.encode("utf-8", "replace"), ".json": settings}
        content = b"".join(_member(record.id + extension, data) for extension, data in files.items())
        name = self._name(self.number)
        try:
            if self._file is None:
                self._file = _open(self.folder / name, self.end)
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{name} cannot be written: {error.strerror or error}; choose another place") from error
        place = {"shard": name, "offset": self.end, "bytes": len(content)}
        self.end += len(content)
        self.count += 1
        if self.count == self.size:
            self.close()
            self.number, self.count, self.end = self.number + 1, 0, 0
        return place

    def close(self) -> None:
        """End the open shard, so that it can be read."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.count:
            self._finish(self._name(self.number), self.end)

    def _finish(self, name: str, end: int) -> None:
        file = _open(self.folder / name, end)
        with file:
            file.write(_END)
            file.flush()
            os.fsync(file.fileno())


def _open(path: Path, end: int) -> Any:
    """A shard, cut off at ``end``, to be continued there."""
    size = path.stat().st_size if path.exists() else 0
    if size < end:
        raise InputError(f"{path} has {size:,} bytes, and the manifest says {end:,}: it was changed or lost")
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(end)
    file.seek(end)
    sync_folder(path.parent)
    return file


def _member(name: str, content: bytes) -> bytes:
    """A file in a tar; always the same bytes."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    buffer = io.BytesIO()
    buffer.write(entry.tobuf(tarfile.USTAR_FORMAT))
    buffer.write(content)
    buffer.write(bytes(-len(content) % _BLOCK))
    return buffer.getvalue()
