"""Replace the files of a folder all together or not at all, even if the process or the machine stops.

A rename cannot replace a folder, so its new files are written into ``FOLDER/.impasto-save``. A *journal*, renamed into
place there, commits the save: it lists the files to move into place and the files that they supersede. The next process
that saves to or reads from the folder completes committed saves and discards uncommitted ones.

    with saving(folder) as staging:     # write into ``staging``; the folder is unchanged until the block ends
        ...
    with reading(folder) as folder:     # no other process changes the folder during this block
        ...

Locks are on the folders themselves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .checks import shown
from .errors import CheckpointError, OutputError
from .files import HAS_LOCKS, deadline, is_same_file, lock, plain_path, sync, sync_folder

STAGING = ".impasto-save"
JOURNAL = "journal.json"
#: Errors of folders that are readable but not writable.
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_JOURNAL_BYTES = 10_000_000
_MOST_NAMES = 10_000

Superseded = Callable[[Sequence[str], Sequence[str]], Iterable[str]]


def _nothing_superseded(present: Sequence[str], written: Sequence[str]) -> Iterable[str]:
    return ()


@contextmanager
def saving(folder: str | os.PathLike[str], superseded: Superseded = _nothing_superseded) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of ``folder``, all together, when the block ends.

    If the block raises or the process is killed, ``folder`` is unchanged. Files that are not replaced are kept.

    Args:
        folder: created if it does not exist.
        superseded: takes the present and the written names, relative to ``folder``, and returns the names of old files
            to remove.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or another process keeps saving to it.
        CheckpointError: an earlier save left an untrustworthy journal.
    """
    folder = _real(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            staging = _begin(folder, held)
            try:
                yield staging
                _commit(folder, staging, _finish_staged(folder, staging), superseded)
            except BaseException:
                if not _has_journal(folder):  # otherwise it is committed, and the next process completes it
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}; choose another place") from error


@contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the folder with every committed save completed, locked against changes until the block ends.

    This is ``folder`` itself, unless it has a committed save that this process has no permission to complete: then it
    is a temporary folder of links to the files as they should be.

    Raises:
        CheckpointError: a journal is damaged, or another process does not stop writing.
    """
    folder = _real(folder)
    with ExitStack() as held:
        shared = held.enter_context(ExitStack())
        try:
            while True:
                for place in _pending(folder):
                    _roll_forward(place)
                shared.enter_context(_locked([folder], exclusive=False))
                if not _pending(folder):
                    break
                shared.close()  # another process was killed meanwhile
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            if error.errno not in _NOT_WRITABLE:
                raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
            held.enter_context(_locked([folder], exclusive=False))
            folder = _as_committed(folder, held)
        yield folder


def _begin(folder: Path, held: ExitStack) -> Path:
    """Complete or discard the saves of killed processes, and lock the folder for a save."""
    staging = folder / STAGING
    end = deadline()
    while True:
        for place in _pending(folder):
            _roll_forward(place)
        with _locked([folder], exclusive=True):
            if not _has_journal(folder):
                _make_real_folder(staging)
                if _hold(staging, held):
                    _empty(staging)
                    return staging
        if time.monotonic() > end:
            raise OutputError(f"another process keeps saving to {folder}; wait for it, or choose another folder")
        time.sleep(0.05)


def _make_real_folder(staging: Path) -> None:
    """Create a folder; a link or pipe of this name is replaced, because the target of a link is not ours."""
    if os.path.lexists(staging) and not _is_real_folder(staging):
        staging.unlink()
    with contextlib.suppress(FileExistsError):
        staging.mkdir()


def _is_real_folder(path: Path) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


def _hold(staging: Path, held: ExitStack) -> bool:
    """Lock the staging folder until the end of the save; False if another process holds it."""
    if not HAS_LOCKS:
        return True
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        lock(descriptor, staging, None)
        if is_same_file(descriptor, staging):
            held.callback(os.close, descriptor)
            return True
    except BlockingIOError:
        pass
    os.close(descriptor)
    return False


def _finish_staged(folder: Path, staging: Path) -> list[str]:
    """Sync every staged file to disk, with the permissions of the umask, and return the names."""
    probe = staging / f"{JOURNAL}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    written = []
    for root, _, names in os.walk(staging):
        for name in names:
            path = Path(root, name)
            if path == probe:
                continue
            path.chmod(mode)  # safetensors creates files that only the owner can read
            sync(path)
            written.append(path.relative_to(staging).as_posix())
        sync_folder(Path(root))
    for name in written:
        if (folder / name).is_dir():
            raise OSError(errno.EISDIR, f"{folder / name} is a folder, but a file of this name is to be saved")
    for place in {(folder / name).parent for name in written} - {folder}:
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{place} is not writable")
        if place.is_symlink() or (place.exists() and place.stat().st_dev != folder.stat().st_dev):
            raise OSError(errno.EXDEV, f"{place} is a link or lies on another disk; save to it separately")
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
        journal = {"inode": staging.stat().st_ino, "files": written, "remove": remove}
        probe.write_text(json.dumps(journal), encoding="utf-8")
        sync(probe)
        os.replace(probe, staging / JOURNAL)
        sync_folder(staging)
        _apply(folder)


def _roll_forward(folder: Path) -> None:
    """Complete a save that a killed process has committed."""
    with _locked([folder], exclusive=True):  # held by a saving process as long as its journal exists
        files, remove = _read_journal(folder)
        with _locked(_folders_of(folder, files, remove)[1:], exclusive=True):
            if _has_journal(folder):  # not yet completed by another process
                _apply(folder)


def _apply(folder: Path) -> None:
    """Do what the journal says, as far as it is not done, and remove it. The caller holds the lock."""
    files, remove = _read_journal(folder)
    staging = folder / STAGING
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # already moved
            os.replace(staging / name, target)
    for name in remove:
        (folder / name).unlink(missing_ok=True)
    for place in _folders_of(folder, files, remove):
        with contextlib.suppress(FileNotFoundError):
            sync_folder(place)
    (staging / JOURNAL).unlink()
    sync_folder(staging)
    shutil.rmtree(staging)


def _folders_of(folder: Path, *names: Sequence[str]) -> list[Path]:
    """The folder and its subfolders that hold these files, in locking order."""
    return sorted({(folder / name).parent for some in names for name in some} | {folder})


def _as_committed(folder: Path, held: ExitStack) -> Path:
    """A temporary folder of links to the files of ``folder`` as its journals say they should be."""
    found: dict[str, Path] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != STAGING]
        found |= {Path(root, name).relative_to(folder).as_posix(): Path(root, name) for name in names}
    for place in _pending(folder):
        files, remove = _read_journal(place)
        staged = {name: place / STAGING / name for name in files if (place / STAGING / name).is_file()}
        for name in (*staged, *remove):
            with contextlib.suppress(ValueError):  # not in this folder
                key = (place / name).relative_to(folder).as_posix()
                found.pop(key, None)
                if name in staged:
                    found[key] = staged[name]
    view = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="impasto-"))) / folder.name
    view.mkdir()
    for name, source in found.items():
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        (view / name).symlink_to(source)
    return view


def _real(folder: str | os.PathLike[str]) -> Path:
    """The folder with links resolved."""
    return Path(os.path.realpath(plain_path(folder)))


# --- journals -------------------------------------------------------------------------------------------------------


def _pending(folder: Path) -> list[Path]:
    """The folders with a committed save that concerns ``folder``, a real path: itself, its parent, its subfolders.

    The parent may belong to anyone, such as ``/tmp``: there, only a save by this user or the owner counts, and only if
    it has files for ``folder``.
    """
    around = folder.parent
    found = [around] if _has_journal(around) and _is_trusted(around) and _has_files_for(around, folder) else []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        within = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        found += [place for place in (folder, *sorted(within)) if place.name != STAGING and _has_journal(place)]
    return found


def _has_files_for(around: Path, folder: Path) -> bool:
    return any(name.split("/")[0] == folder.name for names in _read_journal(around) for name in names)


def _is_trusted(folder: Path) -> bool:
    """Whether the save in a folder was started by this user or the folder's owner."""
    try:
        return os.name != "posix" or os.stat(folder / STAGING).st_uid in (os.geteuid(), os.stat(folder).st_uid)
    except FileNotFoundError:  # completed by another process
        return True


def _has_journal(folder: Path) -> bool:
    """Whether a committed save is pending. Only a regular file in a real folder counts: hub caches hold links."""
    try:
        journal = os.lstat(folder / STAGING / JOURNAL)
        return _is_real_folder(folder / STAGING) and stat.S_ISREG(journal.st_mode)
    except OSError:
        return False


def _read_journal(folder: Path) -> tuple[list[str], list[str]]:
    """The files that a journal moves into place, and those that it removes, relative to the folder.

    Raises:
        CheckpointError: it is damaged, names something outside the folder, or was made elsewhere (an archive cannot
            predict the inode of its folder).
    """
    staging = folder / STAGING
    try:
        data, inode = _bytes_and_inode(staging)
        content = json.loads(data)
        files, remove = content["files"], content["remove"]
        if not isinstance(files, list) or not isinstance(remove, list):
            raise ValueError("not two lists of names")
        if content["inode"] != inode or not _is_trusted(folder):
            raise ValueError("it was not made here")
        if len(files) + len(remove) > _MOST_NAMES:
            raise ValueError(f"more than {_MOST_NAMES} names")
        for name in (*files, *remove):
            _check_name(folder, name)
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{staging / JOURNAL} cannot be trusted ({shown(str(error))}). Remove {staging}, and check or save again "
            f"the files in {folder}"
        ) from error
    return files, remove


def _bytes_and_inode(staging: Path) -> tuple[bytes, int]:
    """A journal and the inode of its own folder, even if that is being replaced."""
    if not HAS_LOCKS:
        return (staging / JOURNAL).read_bytes()[:_JOURNAL_BYTES], staging.stat().st_ino
    with contextlib.ExitStack() as held:
        place = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        held.callback(os.close, place)
        journal = os.open(JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        with os.fdopen(journal, "rb") as file:
            return file.read(_JOURNAL_BYTES), os.fstat(place).st_ino


def _check_name(folder: Path, name: object) -> None:
    steps = name.split("/") if isinstance(name, str) else [""]
    os.fsencode("/".join(steps))  # a ValueError for names that no system allows
    if len(steps) > 4 or any(not step or step[0] == "." or set(step) & set("\\\0:") for step in steps):
        raise ValueError(f"{shown(name)} is not the name of a file that a save writes")
    for place in (folder, folder / STAGING):
        if any(place.joinpath(*steps[:i]).is_symlink() for i in range(1, len(steps))):
            raise ValueError(f"{shown(name)} leads through a link")
        if place.joinpath(*steps).is_dir():
            raise ValueError(f"{shown(name)} is a folder")
    if (folder / STAGING).joinpath(*steps).is_symlink():
        raise ValueError(f"{shown(name)} is a link")


# --- locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folders: Iterable[Path], *, exclusive: bool) -> Iterator[None]:
    """Lock folders: exclusively to change them, or shared to read them."""
    end = deadline()
    with ExitStack() as held:
        for folder in folders:
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except OSError:  # missing or not readable: using it will say so
                continue
            held.callback(os.close, descriptor)
            lock(descriptor, folder, end, exclusive=exclusive)
        yield


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
