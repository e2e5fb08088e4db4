"""Write a file completely or not at all, even if the process or the machine stops.

A file is written under a temporary name, synced to disk, and renamed. For folders see ``folders.py``.

Locks (``flock``) end with their process. On systems or disks without them, two processes that write to the same place
at once are not synchronized.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checks import shown
from .errors import ImpastoError, InputError, OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HAS_LOCKS = fcntl is not None
#: How long to wait for another process that writes to or reads from the same place.
WAIT_SECONDS = 600.0
#: Of the file that a function creates, next to the locked temporary file.
_CREATED = ".new"


def write_file(
    path: str | os.PathLike[str],
    content: bytes | str | Callable[[Path], object],
    *,
    durable: bool = True,
    overwrite: bool = True,
    tidy: bool = True,
) -> None:
    """Write a file completely or not at all, with the permissions of the umask. Its folder must exist.

    Args:
        content: bytes, text (UTF-8), or a function that creates a file at the path it is given.
        durable: sync it to disk before the rename, so that it survives a power failure; False for caches.
        overwrite: whether a file of this name is replaced. If not, of several processes that write it at once one
            succeeds.
        tidy: whether what killed processes left in the folder is removed if ``durable``, for which it is listed.

    Raises:
        OutputError: the disk is full, or the file or its folder cannot be written, or may not be replaced. The old
            file remains.
    """
    path = plain_path(path)
    temporary = path.with_name(f".impasto-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    written = temporary.with_suffix(_CREATED) if callable(content) else temporary
    try:
        if path.exists() and not path.is_file():  # a rename would replace even a device
            raise OSError(errno.EINVAL, "it is not a regular file")
        descriptor = _open_alone(temporary)
        try:
            if callable(content):
                # Not the locked file: safetensors would replace it by another one, which only the owner can read.
                written.unlink(missing_ok=True)
                content(written)
                written.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
            else:
                _write_all(descriptor, content.encode("utf-8") if isinstance(content, str) else content)
            if durable:
                sync(written)
            if not overwrite and os.path.lexists(path):  # nobody else of us can write it now
                raise OSError(errno.EEXIST, "it exists already")
            if not HAS_LOCKS:  # Windows renames no open file
                os.close(descriptor)
                descriptor = -1
            os.replace(written, path)
            if written != temporary:
                temporary.unlink(missing_ok=True)
            if durable:
                sync_folder(path.parent)
        except BaseException:
            written.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if durable and tidy:
            remove_abandoned(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def plain_path(path: str | os.PathLike[str], error: type[ImpastoError] = OutputError) -> Path:
    """The path of a file or folder, which need not exist: InputError for other types, ``error`` for an invalid name."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(name, str):
        raise InputError(f"a file or folder is named by a str or a pathlib.Path, not {shown(path)}")
    if "\0" in name:
        raise error(f"{shown(name)} is not a valid file name; choose another")
    return Path(name)


def _write_all(descriptor: int, content: bytes) -> None:
    data = memoryview(content)
    while data:
        data = data[os.write(descriptor, data) :]


def _open_alone(path: Path) -> int:
    """Open an empty file and lock it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    end = deadline()
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            lock(descriptor, path, end)
            if os.fstat(descriptor).st_nlink > 1:  # a hard link to a file that is not ours
                path.unlink()
            elif is_same_file(descriptor, path):  # the previous holder has not renamed or removed it
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove_abandoned(folder: Path, pattern: str = ".impasto-*.tmp") -> None:
    """Remove the temporary files of killed processes from a folder; those of running ones are locked."""
    for temporary in folder.glob(pattern) if HAS_LOCKS else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NONBLOCK)
            try:
                lock(descriptor, temporary, None)
                if is_same_file(descriptor, temporary):
                    temporary.with_suffix(_CREATED).unlink(missing_ok=True)
                    temporary.unlink()
            finally:
                os.close(descriptor)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line to a log in one write, so that a killed process leaves no partial line. The folder must exist.

    What a full disk or a power failure left of a line is removed.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    path = plain_path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            lock(descriptor, path, deadline())
            size = _end_of_lines(descriptor)
            data = f"{line}\n".encode()
            if os.write(descriptor, data) < len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def _end_of_lines(descriptor: int, block: int = 1 << 16) -> int:
    """Cut off what follows the last newline of an open file, and return its size."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - block)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Create a folder and its parents, unless it exists.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        plain_path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be created: {error.strerror}; choose another place") from error


# --- shared with folders.py -----------------------------------------------------------------------------------------


def deadline() -> float:
    """When to stop waiting for another process, by the monotonic clock."""
    return time.monotonic() + WAIT_SECONDS


def sync(path: Path) -> None:
    """Sync a file to disk."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if the system supports it."""
    if os.name == "posix":
        try:
            sync(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):  # write-only folders; some network disks
                raise


def publish_folder(complete: Path, target: Path) -> None:
    """Give a folder of complete files its name, which stands for nothing, an old folder, or all of the new one.

    Both are in the same folder. All that is written is on the disk before the name is.
    """
    for path in complete.iterdir():
        sync(path)
    sync_folder(complete)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(complete, target)
    sync_folder(target.parent)


def lock(descriptor: int, path: Path, end: float | None, *, exclusive: bool = True) -> None:
    """Lock an open file or folder until it is closed, waiting until ``end`` if given.

    Raises:
        BlockingIOError: another process or thread still holds it.
    """
    if fcntl is None:
        return
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if end is None or time.monotonic() > end:
                raise BlockingIOError(errno.EAGAIN, f"another process holds {path}") from None
            time.sleep(0.005)
        except OSError:  # a disk without locks, such as some network disks
            return


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
