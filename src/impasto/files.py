"""Write a file completely or not at all, whenever the process or the machine stops.

A file is written under a temporary name, forced to the disk, and renamed. Folders are replaced by ``folders.py``.

Locks (``flock``) leave nothing behind and end with their process. On systems or disks without them, two processes that
write to one place at once are not kept apart.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checks import shown
from .errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: How long to wait for another process that writes to or reads from the same place.
WAIT_SECONDS = 600.0


def write_file(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object], *, durable: bool = True
) -> None:
    """Write a file whole or not at all, with the permissions that the umask leaves. Its folder must exist.

    Args:
        content: bytes, text (UTF-8), or a function that writes to the path it is given.
        durable: force it to the disk first, so that it also survives a power failure; False for caches.

    Raises:
        OutputError: the disk is full, or the file or its folder cannot be written. The old file is then untouched.
    """
    path = plain_path(path)
    temporary = path.with_name(f".impasto-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        descriptor = _open_alone(temporary)
        try:
            if callable(content):
                content(temporary)
            else:
                data = memoryview(content.encode("utf-8") if isinstance(content, str) else content)
                while data:
                    data = data[os.write(descriptor, data) :]
            if durable:
                os.fsync(descriptor)
            os.replace(temporary, path)
            if durable:
                sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def plain_path(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise OutputError(f"{shown(os.fspath(path))} is no name of a file; choose another")
    return Path(path)


def _open_alone(path: Path) -> int:
    """An empty file of which no other process or thread holds the lock."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    deadline = patience()
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            lock(descriptor, path, deadline)
            if is_still(descriptor, path):  # not renamed or removed by the process before
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_abandoned(temporary: Path) -> bool:
    """Whether a temporary file of ``write_file`` was left by a process that is gone."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:
        return False
    try:
        lock(descriptor, temporary, deadline=None)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a log in one piece, so that a killed process leaves no half of it. The folder must exist.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    path = plain_path(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and those around it, unless it exists.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        plain_path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror}; choose another place") from error


# --- what files and folders share -----------------------------------------------------------------------------------


def patience() -> float:
    """Until when to wait for another process, by the monotonic clock."""
    return time.monotonic() + WAIT_SECONDS


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        try:
            sync(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):  # may be written and not read; some network disks
                raise


def lock(descriptor: int, path: Path, deadline: float | None, *, exclusive: bool = True) -> None:
    """Lock an open file or folder until it is closed; with a deadline, wait for it.

    Raises:
        BlockingIOError: another process or thread holds it, and did so until the deadline.
    """
    if fcntl is None:
        return
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if deadline is None or time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, f"another process holds {path}") from None
            time.sleep(0.02)
        except OSError:  # a disk without locks, as some networks have
            return


def is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
