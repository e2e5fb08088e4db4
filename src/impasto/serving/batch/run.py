"""Run a batch: what is missing of it is generated, stored and recorded, one image after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InputError, ResourceError
from ...files import lock, make_folder
from .manifest import Manifest
from .outputs import Output
from .records import Record


class Made(NamedTuple):
    """The image of a record, as a PNG file; or why there is none."""

    record: Record
    png: bytes = b""
    seconds: float = 0.0
    error: str | None = None


#: Generates images of records, in whatever order.
Generate = Callable[[Sequence[Record]], Iterable[Made]]


@dataclass
class Counts:
    """What a run has done."""

    generated: int = 0
    skipped: int = 0
    failed: int = 0
    faults: list[str] = field(default_factory=list)  # the first few


def in_order(records: Iterable[Record]) -> list[Record]:
    """By adapters, so that they are loaded once; then by cost, the largest first: a lack of memory shows at once, and
    at the end no process waits long for another. Neighbours are of one size.
    """

    def cost(record: Record) -> tuple[Any, ...]:
        pixels, halves = record.width * record.height, 2 if record.guidance_scale > 1 else 1
        steps = record.steps * (record.strength if record.images else 1.0)
        adapters = tuple((adapter.source, adapter.weight) for adapter in record.adapters)
        kind = (record.width, record.height, record.steps, record.scheduler or "", bool(record.images))
        return (adapters, -pixels * steps * halves, *kind, record.index)

    return sorted(records, key=cost)


def part_of(records: Sequence[Record], part: tuple[int, int]) -> list[Record]:
    """The records of process i of N, which cost about as much as those of the others."""
    return [*records[part[0] - 1 :: part[1]]]


def missing(records: Iterable[Record], manifest: Manifest, model: str, place: str | None = None) -> list[Record]:
    """The records whose images are not there yet.

    Args:
        place: ``Output.place``; None: of any.

    Raises:
        InputError: an image of the same id has other settings, or is stored in another format.
    """
    lines, found = manifest.lines(), []
    for record in records:
        line = lines.get(record.id)
        if line is not None and line.done and line.key != record.key(model):
            raise InputError(
                f"{manifest.folder} has an image {record.id!r} of another model or other settings; choose another "
                f"folder"
            )
        if line is not None and line.done and place is not None and place not in line.values:
            raise InputError(
                f"{manifest.folder} has an image {record.id!r} in another format; give the --format with which the "
                f"batch was begun, or choose another folder"
            )
        if line is None or not line.done:
            found.append(record)
    return found


def run(
    records: Sequence[Record],
    generate: Generate,
    output: Output,
    manifest: Manifest,
    model: str,
    *,
    max_errors: int = 100,
    done: Callable[[], object] = lambda: None,
) -> Counts:
    """Generate images, store them, and record each in the manifest.

    Args:
        records: what is missing, in the order in which it is generated.
        model: what, besides its settings, an image depends on.
        max_errors: so many records may fail.
        done: called after each record.

    Raises:
        ResourceError: more records have failed. What was generated is kept.
        OutputError: an image or a line cannot be written.
    """
    counts = Counts()
    left = {record.index for record in records}
    try:
        for made in generate(records):
            record = made.record
            if record.index not in left:  # generated twice, after another machine was lost
                continue
            left.remove(record.index)
            line: dict[str, Any] = {"id": record.id, "index": record.index, "key": record.key(model)}
            if made.error is None:
                place = output.add(record, made.png)
                manifest.append({**line, **place, "seconds": round(made.seconds, 3), **record.settings()})
                counts.generated += 1
            else:
                manifest.append({**line, "error": made.error, **record.settings()})
                counts.failed += 1
                counts.faults.append(f"{record.id}: {made.error}")
                if counts.failed > max_errors:
                    raise ResourceError(
                        f"{counts.failed} images could not be generated; the last one, {record.id}: {made.error}"
                    )
            done()
    finally:
        output.close()
    assert not left, f"{len(left)} records were lost"
    return counts


class Alone:
    """Keeps other processes away from a part of a folder, for a ``with`` block.

    Raises:
        InputError: another process works on it, or on a part of the folder that was divided in another way.
    """

    def __init__(self, folder: Path, part: tuple[int, int]):
        make_folder(folder)
        self.path = folder / f".lock-{part[0]}-of-{part[1]}"
        self.parts = part[1]
        self.descriptor = -1

    def __enter__(self) -> None:
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(self.descriptor, self.path, None)
        except BlockingIOError as error:
            os.close(self.descriptor)
            raise InputError(f"another process works on {self.path.parent}; wait for it, or use --shard") from error
        try:
            self._refuse_other_divisions()
        except InputError:
            os.close(self.descriptor)
            raise

    def _refuse_other_divisions(self) -> None:
        for path in self.path.parent.glob(".lock-*-of-*"):
            _, _, parts = path.name.rpartition("-")
            if parts == str(self.parts):
                continue
            descriptor = os.open(path, os.O_RDWR)
            try:
                lock(descriptor, path, None)
            except BlockingIOError as error:
                raise InputError(
                    f"another process works on one of {parts} parts of {self.path.parent}, and this one would on "
                    f"one of {self.parts}: they would do work twice; wait for it, or give the same --shard I/N"
                ) from error
            finally:
                os.close(descriptor)

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def chunks(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Neighbours, at most ``size`` at once."""
    for start in range(0, len(records), size):
        yield records[start : start + size]
