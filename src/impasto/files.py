"""Write a file or a folder completely or not at all, whenever the process or the machine stops.

A file is written under a temporary name, forced to the disk, and renamed. A folder cannot be replaced by a rename, so
its new files are written into ``FOLDER/.impasto-save``. Then a *journal* in there, which appears by a rename, commits
the save: it lists the files to move into place and those that they supersede. Whoever saves to or reads from the
folder next finishes what a committed journal says, and discards what was never committed.

    with saving(folder) as staging:     # write into ``staging``; the folder is unchanged until the block ends
        ...
    with reading(folder) as folder:     # nobody changes the folder while this block reads it
        ...

Locks are on the folders themselves (``flock``), so they leave nothing behind and end with their process. On systems or
disks without them, two processes that save to one folder at once are not kept apart.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .checks import shown
from .errors import CheckpointError, OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STAGING = ".impasto-save"
JOURNAL = "journal.json"
#: How long to wait for another process that saves to or reads from a folder.
WAIT_SECONDS = 600.0
#: What reading a folder as it stands is left to, where finishing a save in it is not allowed.
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_JOURNAL_BYTES = 10_000_000

Superseded = Callable[[Sequence[str], Sequence[str]], Iterable[str]]


# --- one file -------------------------------------------------------------------------------------------------------


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
    path = _plain(path)
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
                _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error


def _plain(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise OutputError(f"{shown(os.fspath(path))} is no name of a file; choose another")
    return Path(path)


def _open_alone(path: Path) -> int:
    """An empty file of which no other process or thread holds the lock."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path, deadline)
            if _is_still(descriptor, path):  # not renamed or removed by the process before
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
        _lock(descriptor, temporary, deadline=None)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


# --- a folder -------------------------------------------------------------------------------------------------------


def _nothing_superseded(present: Sequence[str], written: Sequence[str]) -> Iterable[str]:
    return ()


@contextmanager
def saving(folder: str | os.PathLike[str], superseded: Superseded = _nothing_superseded) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of ``folder``, all of them together, when the block ends.

    If the block raises, or the process is killed in it, ``folder`` stays as it was. Its other files are kept.

    Args:
        folder: made if it does not exist.
        superseded: given the names that are there and those that were written, each relative to ``folder``, returns
            the names of old files that belong to what is replaced and are to be removed.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or another process keeps saving to it.
    """
    folder = _plain(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            staging = _begin(folder, held)
            try:
                yield staging
                _commit(folder, staging, _finish_staged(folder, staging), superseded)
            except BaseException:
                if not _has_journal(folder):
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}; choose another place") from error


@contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder in which every save is finished, and keep others from changing it until the block ends.

    It is ``folder`` itself. Only where a killed process has committed a save, and this one may not write there, it is
    a temporary folder of links to the files as they would be.

    Raises:
        CheckpointError: a journal is damaged, or another process does not stop writing.
    """
    folder = Path(folder)
    with ExitStack() as held:
        try:
            lock = held.enter_context(ExitStack())
            while True:
                for place in _places(folder):
                    if _has_journal(place):
                        _roll_forward(place)
                lock.enter_context(_locked([folder], exclusive=False))
                if not any(_has_journal(place) for place in _places(folder)):
                    break
                lock.close()  # another process was killed meanwhile
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            if error.errno not in _NOT_WRITABLE:
                raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
            folder = _as_committed(folder, held)
        yield folder


def _begin(folder: Path, held: ExitStack) -> Path:
    """Finish what a killed process has committed, discard what it has not, and hold the right to save."""
    staging = folder / STAGING
    deadline = time.monotonic() + WAIT_SECONDS
    for place in _places(folder):
        if place != folder and _has_journal(place):
            _roll_forward(place)
    while True:
        with _locked([folder], exclusive=True):
            with contextlib.suppress(FileExistsError):
                staging.mkdir()
            descriptor = os.open(staging, os.O_RDONLY)
            try:
                _lock(descriptor, staging, deadline=None)
            except BlockingIOError:  # another process is saving
                os.close(descriptor)
            else:
                held.callback(os.close, descriptor)
                if _has_journal(folder):
                    _apply(folder)
                    staging.mkdir()
                    held.callback(os.close, _locked_anew(staging))
                else:
                    _empty(staging)
                return staging
        if time.monotonic() > deadline:
            raise OutputError(f"another process keeps saving to {folder}; wait for it, or choose another folder")
        time.sleep(0.05)


def _locked_anew(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    _lock(descriptor, folder, deadline=None)
    return descriptor


def _finish_staged(folder: Path, staging: Path) -> list[str]:
    """Force every staged file to the disk, with the umask's permissions. Their names."""
    probe = staging / f"{JOURNAL}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    written = []
    for root, _, names in os.walk(staging):
        for name in names:
            path = Path(root, name)
            if path == probe:
                continue
            path.chmod(mode)  # safetensors makes files that nobody else may read
            _sync(path)
            written.append(path.relative_to(staging).as_posix())
        _sync_folder(Path(root))
    for place in {(folder / name).parent for name in written} - {folder}:
        if place.is_symlink() or (place.exists() and place.stat().st_dev != folder.stat().st_dev):
            raise OSError(errno.EXDEV, f"{place} is a link or lies on another disk; save what it holds there by itself")
    return sorted(written)


def _commit(folder: Path, staging: Path, written: list[str], superseded: Superseded) -> None:
    touched = _folders_of(folder, written)
    for place in touched:
        place.mkdir(parents=True, exist_ok=True)
    with _locked(touched, exclusive=True):
        present = [
            path.relative_to(folder).as_posix()
            for place in touched
            for path in sorted(place.iterdir())
            if path.name != STAGING and not path.is_dir()
        ]
        remove = sorted(set(superseded(present, written)) - set(written))
        probe = staging / f"{JOURNAL}.tmp"
        probe.write_text(json.dumps({"files": written, "remove": remove}), encoding="utf-8")
        _sync(probe)
        os.replace(probe, staging / JOURNAL)
        _sync_folder(staging)
        _apply(folder)


def _roll_forward(folder: Path) -> None:
    """Finish a save that a killed process has committed."""
    files, remove = _read_journal(folder)
    with _locked(_folders_of(folder, files, remove), exclusive=True):
        if _has_journal(folder):  # not finished by another process meanwhile
            _apply(folder)


def _apply(folder: Path) -> None:
    """Do what the journal says, however much of it has been done already, and remove it. The lock is held."""
    files, remove = _read_journal(folder)
    staging = folder / STAGING
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # moved already
            os.replace(staging / name, target)
    for name in remove:
        (folder / name).unlink(missing_ok=True)
    for place in _folders_of(folder, files, remove):
        with contextlib.suppress(FileNotFoundError):
            _sync_folder(place)
    (staging / JOURNAL).unlink()
    _sync_folder(staging)
    shutil.rmtree(staging)


def _folders_of(folder: Path, *names: Sequence[str]) -> list[Path]:
    """The folder and those within it that hold these files, in the order in which everyone locks them."""
    return sorted({(folder / name).parent for some in names for name in some} | {folder})


def _as_committed(folder: Path, held: ExitStack) -> Path:
    """A temporary folder of links to the files of ``folder`` as its journals say that they should be."""
    found: dict[str, Path] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != STAGING]
        found |= {Path(root, name).relative_to(folder).as_posix(): Path(root, name) for name in names}
    for place in _places(folder):
        if not _has_journal(place):
            continue
        files, remove = _read_journal(place)
        changes = {name: place / STAGING / name for name in files if (place / STAGING / name).is_file()}
        for name, source in (*changes.items(), *((name, None) for name in remove)):
            with contextlib.suppress(ValueError):  # not in this folder
                key = (place / name).relative_to(folder).as_posix()
                found.pop(key, None)
                if source is not None:
                    found[key] = source
    view = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="impasto-"))) / folder.resolve().name
    view.mkdir()
    for name, source in found.items():
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        (view / name).symlink_to(source.absolute())
    return view


# --- journals -------------------------------------------------------------------------------------------------------


def _places(folder: Path) -> list[Path]:
    """Where a save of files of this folder may be pending: in it, in the folder around it, and in those within."""
    within = []
    with contextlib.suppress(OSError):
        within = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    return [folder.absolute().parent, folder, *(place for place in within if place.name != STAGING)]


def _has_journal(folder: Path) -> bool:
    """Whether a committed save is pending. Only a regular file counts: hub caches hold links."""
    try:
        return stat.S_ISREG(os.lstat(folder / STAGING / JOURNAL).st_mode)
    except OSError:
        return False


def _read_journal(folder: Path) -> tuple[list[str], list[str]]:
    """The files that a journal moves into place, and those that it removes, as names within the folder.

    Raises:
        CheckpointError: it is damaged, or names something outside the folder.
    """
    path = folder / STAGING / JOURNAL
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_JOURNAL_BYTES))
        files, remove = content["files"], content["remove"]
        if set(content) != {"files", "remove"} or not all(isinstance(names, list) for names in (files, remove)):
            raise ValueError("not two lists of names")
        for name in (*files, *remove):
            _check_name(folder, name)
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({shown(str(error))}): a save was interrupted there; delete {folder / STAGING}"
        ) from error
    return files, remove


def _check_name(folder: Path, name: object) -> None:
    steps = name.split("/") if isinstance(name, str) else [""]
    if any(step in ("", ".", "..", STAGING) or "\\" in step or "\0" in step or ":" in step for step in steps):
        raise ValueError(f"{shown(name)} is no name of a file within the folder")
    for i in range(1, len(steps)):
        if folder.joinpath(*steps[:i]).is_symlink():
            raise ValueError(f"{shown(name)} leads through a link")


# --- the disk and the locks -----------------------------------------------------------------------------------------


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        try:
            _sync(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):  # may be written and not read; some network disks
                raise


@contextmanager
def _locked(folders: Iterable[Path], *, exclusive: bool) -> Iterator[None]:
    """Hold the locks of folders: one process may change them, or any number may read them."""
    deadline = time.monotonic() + WAIT_SECONDS
    with ExitStack() as held:
        for folder in folders:
            if fcntl is None:
                break
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except OSError:  # not there, or not readable: whoever uses it next says so
                continue
            held.callback(os.close, descriptor)
            _lock(descriptor, folder, deadline, exclusive=exclusive)
        yield


def _lock(descriptor: int, path: Path, deadline: float | None, *, exclusive: bool = True) -> None:
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


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
