"""The manifest of a batch: a line of JSON for each image that is done, or that could not be made.

A line is appended in one write, after its image is stored. The last line of an id counts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...checks import shown
from ...errors import InputError
from ...files import append_line, write_file
from ...optional import require

_SUFFIX = ".jsonl"


class Line(NamedTuple):
    """What a manifest says of an id."""

    key: str
    done: bool
    values: dict[str, Any]


class Manifest:
    """The manifests of a folder, and the one to which this process appends.

    Args:
        part: of this process, and of how many, from (1, 1).
    """

    def __init__(self, folder: Path, part: tuple[int, int] = (1, 1)):
        own = "manifest" if part == (1, 1) else f"manifest-{part[0]}-of-{part[1]}"
        self.folder, self.path = folder, folder / f"{own}{_SUFFIX}"

    def lines(self) -> dict[str, Line]:
        """By id, of all processes. What is half a line, left by a power failure, does not count.

        Raises:
            InputError: a file that is no manifest.
        """
        found: dict[str, Line] = {}
        for path in sorted(self.folder.glob(f"manifest*{_SUFFIX}")):
            for values in _read(path):
                line = Line(values["key"], "error" not in values, values)
                if line.done or values["id"] not in found or not found[values["id"]].done:
                    found[values["id"]] = line
        return found

    def own(self) -> list[dict[str, Any]]:
        """The lines of images that this process, or an earlier one in its place, has made."""
        return [values for values in _read(self.path) if "error" not in values] if self.path.exists() else []

    def append(self, values: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(values))

    def write_parquet(self) -> Path:
        """The lines of this process's ids as a table next to the manifest: the last one of each.

        Raises:
            MissingDependencyError: pyarrow is not installed.
        """
        pyarrow = require_parquet()
        rows = [*{values["id"]: values for values in _read(self.path)}.values()] if self.path.exists() else []
        names = [*dict.fromkeys(name for row in rows for name in row)]
        columns = {name: [row.get(name) for row in rows] for name in names}
        path = self.path.with_suffix(".parquet")
        table = pyarrow.Table.from_pydict(columns)
        write_file(path, lambda place: importlib.import_module("pyarrow.parquet").write_table(table, place))
        return path


def require_parquet() -> Any:
    """pyarrow, with ``pyarrow.parquet``."""
    require("pyarrow.parquet", "--manifest parquet", "pyarrow")
    return importlib.import_module("pyarrow")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last newline is half a line
        try:
            values = json.loads(line)
            if not isinstance(values["id"], str) or not isinstance(values["key"], str):
                raise ValueError("it has no id and key")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is no line of a manifest ({shown(str(error))})") from error
        yield values
