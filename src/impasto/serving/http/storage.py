"""A folder of generated images, which are found by ids that nobody can guess."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from ...files import make_folder, remove_abandoned, write_file

_NAME = re.compile(r"(img-[0-9a-f]{32})\.(png|jpeg|webp)")
ID_PATTERN = "^img-[0-9a-f]{32}$"


def hide_ids(text: str) -> str:
    """The text as logs may have it: who knows the id of an image can see the image."""
    return re.sub("img-[0-9a-f]{32}", "img-...", text)


class Storage:
    """Images in a folder; the oldest ones are removed when they have too many bytes together.

    Other files of the folder are left alone.

    Args:
        folder: is created if it does not exist.
        most_bytes: of all images.

    Raises:
        OutputError: the folder cannot be created.
    """

    def __init__(self, folder: Path, most_bytes: int):
        make_folder(folder)
        remove_abandoned(folder)
        self.folder, self.most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        found = [(path, path.stat()) for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
        found.sort(key=lambda item: item[1].st_mtime_ns)
        self._sizes = {path.name: state.st_size for path, state in found}  # the oldest first
        self._kinds = {_id(name): name for name in self._sizes}

    def save(self, id: str, kind: str, content: bytes) -> None:
        """Write an image completely or not at all. Raises OutputError."""
        name = f"{id}.{kind}"
        assert _NAME.fullmatch(name)
        write_file(self.folder / name, content, tidy=False)  # __init__ has done it
        with self._lock:
            self._sizes[name] = len(content)
            self._kinds[id] = name
            total = sum(self._sizes.values())
            for old in list(self._sizes)[:-1]:
                if total <= self.most_bytes:
                    break
                total -= self._sizes.pop(old)
                self._kinds.pop(_id(old), None)
                (self.folder / old).unlink(missing_ok=True)

    def find(self, id: str) -> tuple[Path, str] | None:
        """The file of an image, and whether it is png, jpeg or webp."""
        with self._lock:
            name = self._kinds.get(id)
            if name is None and _NAME.fullmatch(f"{id}.png"):  # another server may have stored it in the same folder
                names = (f"{id}.{kind}" for kind in ("png", "jpeg", "webp"))
                name = next((each for each in names if (self.folder / each).is_file()), None)
        return None if name is None else (self.folder / name, name.rpartition(".")[2])


def _id(name: str) -> str:
    return name.partition(".")[0]
