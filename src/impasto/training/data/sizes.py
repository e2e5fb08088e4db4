"""The sizes of image files, from their headers, in an index that is read instead the next time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...files import append_line, make_folder, write_file
from ...pipelines.image_files import measure_image

_THREADS = 16
_CHUNK = 2000  # files measured between two writes


class _Stored(NamedTuple):
    stamp: tuple[int, int]  # time of change in nanoseconds, bytes
    size: tuple[int, int]


def measure(folder: Path, names: Sequence[str], index: Path | None) -> list[tuple[int, int] | str]:
    """Height and width of each file below ``folder``, or why it has none.

    Args:
        index: a JSONL file, extended by what is measured: ``{"file", "changed", "bytes", "size"}``. A file that has
            been changed since is measured again.

    Raises:
        OutputError: the index cannot be written.
    """
    stored = _read_index(index) if index is not None else {}
    found: list[tuple[int, int] | str] = []
    with ThreadPoolExecutor(_THREADS, "measure") as threads:
        for chunk in _chunks(names):
            results = list(threads.map(lambda name: _measure_one(folder, name, stored.get(name)), chunk))
            new = [
                json.dumps({"file": name, "changed": stamp[0], "bytes": stamp[1], "size": size}, ensure_ascii=True)
                for name, (size, stamp) in zip(chunk, results)
                if stamp is not None and not isinstance(size, str)
            ]
            if index is not None and new:
                make_folder(index.parent)
                append_line(index, "\n".join(new))
            found += [size for size, _ in results]
    if index is not None and len(stored) > 2 * len(names):  # mostly of files that are gone
        kept = {name: stored[name] for name in names if name in stored}
        lines = [
            json.dumps({"file": name, "changed": each.stamp[0], "bytes": each.stamp[1], "size": each.size})
            for name, each in kept.items()
        ]
        write_file(index, "".join(f"{line}\n" for line in lines))
    return found


def _measure_one(
    folder: Path, name: str, stored: _Stored | None
) -> tuple[tuple[int, int] | str, tuple[int, int] | None]:
    """The size, and what identifies the measured content if it is not in the index."""
    path = folder / name
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "the file does not exist", None
    except (OSError, ValueError) as error:
        return f"the file cannot be read: {getattr(error, 'strerror', None) or error}", None
    stamp = (status.st_mtime_ns, status.st_size)
    if stored is not None and stored.stamp == stamp:
        return stored.size, None
    try:
        return measure_image(path), stamp
    except InputError as error:
        return str(error), None


def _read_index(path: Path) -> dict[str, _Stored]:
    """What an index holds; damaged lines are measured again."""
    found: dict[str, _Stored] = {}
    for line in index_lines(path):
        try:
            record = json.loads(line)
            height, width = record["size"]
            stored = _Stored((int(record["changed"]), int(record["bytes"])), (int(height), int(width)))
            if height > 0 and width > 0:
                found[str(record["file"])] = stored
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def index_lines(path: Path) -> list[bytes]:
    """The lines of an index; none if it does not exist yet.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"the index {path} cannot be read: {error.strerror}; delete it to make a new one") from error


def _chunks(names: Sequence[str]) -> Iterator[list[str]]:
    remaining = iter(names)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        yield chunk
