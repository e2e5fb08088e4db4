"""Writing files and folders completely or not at all: order, permissions, locks, journals, hostile journals."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto import files, folders
from impasto.errors import CheckpointError, OutputError
from impasto.files import write_file
from impasto.folders import JOURNAL, STAGING, reading, saving


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def save(folder: Path, contents: dict[str, str], remove: tuple[str, ...] = ()) -> None:
    with saving(folder, lambda present, written: [name for name in present if name in remove]) as staging:
        for name, text in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "folder", {"a": "old", "deep/b": "old", "c": "old"})
    (tmp_path / "folder" / "mine").write_text("mine")
    return tmp_path / "folder"


OLD = {"a": "old", "deep/b": "old", "c": "old", "mine": "mine"}
NEW = {"a": "new", "deep/b": "new", "deep/d": "new", "mine": "mine"}


def save_new(folder: Path) -> None:
    save(folder, {"a": "new", "deep/b": "new", "deep/d": "new"}, remove=("c",))


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose save was committed and not carried out, as by a kill."""
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_apply", lambda folder: None)
        save_new(folder)
    assert (folder / STAGING / JOURNAL).is_file()


# --- order ---


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that make a write last, with the names of what they are on, in order."""
    calls: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}

    def opened(path: Any, *args: Any, **options: Any) -> int:
        descriptor: int = real["open"](path, *args, **options)
        names[descriptor] = Path(path).name
        return descriptor

    def on_descriptor(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            calls.append((name, names[descriptor]))
            return real[name](descriptor, *args)

        return call

    def replaced(source: Any, target: Any) -> None:
        calls.append(("rename", Path(target).name))
        real["replace"](source, target)

    def removed(path: Any, *args: Any, **options: Any) -> None:
        calls.append(("remove", Path(path).name))
        real["unlink"](path, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", removed)
    for name in ("write", "fsync"):
        monkeypatch.setattr(os, name, on_descriptor(name))
    return calls


def test_a_file_is_written_forced_renamed_forced(tmp_path: Path, recorded: list[tuple[str, str]]) -> None:
    write_file(tmp_path / "x", "text")
    (_, temporary), *_ = recorded
    assert temporary.startswith(".impasto-")
    assert recorded == [("write", temporary), ("fsync", temporary), ("rename", "x"), ("fsync", tmp_path.name)]
    recorded.clear()
    write_file(tmp_path / "x", "text", durable=False)
    assert recorded == [("write", temporary), ("rename", "x")]


def test_a_folder_is_forced_committed_moved_forced(folder: Path, recorded: list[tuple[str, str]]) -> None:
    recorded.clear()
    save_new(folder)
    order = [call for call in recorded if call[0] != "write"]
    committed = order.index(("rename", JOURNAL))
    staged, carried_out = order[:committed], order[committed + 1 :]
    for name in ("a", "b", "d", STAGING, "deep", f"{JOURNAL}.tmp"):
        assert ("fsync", name) in staged, f"{name} must be on the disk before the journal says so"
    assert not [call for call in staged if call[0] == "rename"]
    assert carried_out[0] == ("fsync", STAGING), "the journal is on the disk before anything moves"
    moved = [i for i, call in enumerate(carried_out) if call in (("rename", "a"), ("rename", "b"), ("remove", "c"))]
    forced = [i for i, call in enumerate(carried_out) if call in (("fsync", "folder"), ("fsync", "deep"))]
    done = carried_out.index(("remove", JOURNAL))
    assert len(moved) == 3
    assert max(moved) < min(forced) < max(forced) < done


def test_nothing_else_in_the_package_renames_files() -> None:
    """So every file that lasts is written by these two."""
    source = Path(files.__file__).parent
    calls = ("os.replace(", "os.rename(", "shutil.move(", ".rename(")
    found = {path.name for path in source.rglob("*.py") if any(call in path.read_text() for call in calls)}
    assert found == {"files.py", "folders.py"}


# --- files ---


@pytest.mark.parametrize("content", [b"bytes", "text ü", lambda path: path.write_text("by itself")])
def test_contents(tmp_path: Path, content: Any) -> None:
    write_file(tmp_path / "x", content)
    expected = {bytes: b"bytes", str: "text ü".encode()}.get(type(content), b"by itself")
    assert (tmp_path / "x").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "x", "text")
        with saving(tmp_path / "folder") as staging:
            (staging / "y").touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder" / "y").stat().st_mode) == 0o640


def test_a_function_may_rename_a_file_of_its_own(tmp_path: Path, recorded: list[tuple[str, str]]) -> None:
    def write(path: Path) -> None:
        save_file({"a": torch.ones(2)}, path)  # renames one that only the owner can read
        files.remove_abandoned(tmp_path)  # as another process does

    before = os.umask(0o027)
    try:
        write_file(tmp_path / "x", write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert load_file(tmp_path / "x")["a"].sum() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (_, created), renamed, *_ = [call for call in recorded if call[0] != "remove"]
    assert renamed == ("rename", "x")
    assert ("fsync", created) in recorded


def test_a_file_left_by_a_killed_process_is_removed_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit(0))
        child = os.fork()
        if child == 0:
            write_file(tmp_path / "x", "a long text of the process that was killed")
        os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    with left.open("rb") as used:  # by a process that lives
        files.lock(used.fileno(), left, None)
        write_file(tmp_path / "y", "another")
        assert left.exists()
    write_file(tmp_path / "y", "another")
    assert tree(tmp_path) == {"y": "another"}


def test_what_a_killed_function_created_is_removed_too(tmp_path: Path) -> None:
    for ending in ("tmp", "new"):
        (tmp_path / f".impasto-0.{ending}").touch()
    write_file(tmp_path / "y", "another")
    assert tree(tmp_path) == {"y": "another"}


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(20):
            write_file(tmp_path / "x", text * 1000, durable=False)

    threads = [threading.Thread(target=write, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "x").read_text())) == 1
    assert list(tree(tmp_path)) == ["x"]


class Full:
    """What a disk without space does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str):
        real = getattr(os, call)

        def fail(*args: Any, **options: Any) -> Any:
            if self.after == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.after -= 1
            return real(*args, **options)

        self.after = -1
        monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_file(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        Full(patch, call).after = 0
        with pytest.raises(OutputError, match=r"x cannot be written: No space left on device; choose another place"):
            write_file(tmp_path / "x", "new")
    assert tree(tmp_path) == {"x": "old"}


@pytest.mark.parametrize(
    ("name", "why"),
    [("n" * 300, "File name too long"), ("no/such/folder/x", "No such file"), ("nul\0", "not a valid file name")],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(OutputError, match=why):
        write_file(tmp_path / name, "text")
    if "such" not in name:
        with pytest.raises(OutputError, match=why), saving(tmp_path / name):
            pass


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OutputError, match="it is not a regular file"):
        write_file(path, "text")
    assert not path.is_file()


def test_half_a_line_is_an_error_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "log", os.write
    files.append_line(path, "one")
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:-3]))
    with pytest.raises(OutputError, match="No space left"):
        files.append_line(path, "two, which is longer")
    monkeypatch.undo()
    assert path.read_text() == "one\n"
    path.write_text("one\n" + "h" * 100_000)  # what a power failure left
    files.append_line(path, "three")
    assert path.read_text() == "one\nthree\n"
    path.write_text("half")
    files.append_line(path, "four")
    assert path.read_text() == "four\n"


# --- folders ---


def test_files_replace_others_and_the_rest_stays(folder: Path) -> None:
    assert tree(folder) == OLD
    save_new(folder)
    assert tree(folder) == NEW


def test_nothing_happens_if_the_block_raises(folder: Path) -> None:
    def stopped() -> None:
        with saving(folder) as staging:
            (staging / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert tree(folder) == OLD
    assert not (folder / STAGING).exists()


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("call", ["fsync", "chmod", "mkdir", "replace"])
def test_a_full_disk_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    """Or, once it is committed, the new one: the next process finishes it."""
    with monkeypatch.context() as patch:
        Full(patch, call).after = after
        try:
            save_new(folder)
        except OutputError as error:
            assert "No space left" in str(error)  # noqa: PT017
    with reading(folder) as found:
        assert tree(found) in (OLD, NEW)
    save_new(folder)
    assert tree(folder) == NEW


def test_a_committed_save_is_finished_by_who_reads_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, monkeypatch)
    assert {**tree(folder), **OLD} == tree(folder), "nothing has moved"
    with reading(folder) as found:
        assert found == folder
        assert tree(folder) == NEW
    assert not (folder / STAGING).exists()


def test_one_that_reads_a_folder_within_finishes_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, monkeypatch)
    with reading(folder / "deep"):
        assert tree(folder) == NEW


def test_one_that_reads_the_folder_around_finishes_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_apply", lambda folder: None)
        save(folder / "deep", {"b": "newer"})
    with reading(folder):
        assert tree(folder) == {**OLD, "deep/b": "newer"}


def test_the_next_save_finishes_a_committed_one_and_discards_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, monkeypatch)
    save(folder, {"e": "newest"})
    assert tree(folder) == {**NEW, "e": "newest"}
    (folder / STAGING / "deep").mkdir(parents=True)
    (folder / STAGING / "deep" / "half").write_text("never committed")
    save(folder, {"e": "again"})
    assert tree(folder) == {**NEW, "e": "again"}


@pytest.mark.parametrize("done", range(5))
def test_a_save_that_was_stopped_while_it_was_carried_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    interrupted(folder, monkeypatch)
    with monkeypatch.context() as patch:
        calls: Iterator[int] = iter(range(done))
        for name in ("replace", "unlink"):
            real = getattr(os, name)

            def some(*args: Any, real: Callable[..., Any] = real, **options: Any) -> None:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                real(*args, **options)

            patch.setattr(os, name, some)
        with pytest.raises(KeyboardInterrupt), reading(folder):
            pass
    with reading(folder):
        assert tree(folder) == NEW


def test_where_it_may_not_be_finished_the_new_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, monkeypatch)

    def forbidden(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", forbidden)
    with reading(folder) as view:
        assert view != folder
        assert tree(view) == NEW
        assert view.name == folder.name
    assert not view.exists()
    with reading(folder / "deep") as view:
        assert tree(view) == {"b": "new", "d": "new"}


def test_where_this_user_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with real permissions, in a process that is not root's."""
    for parent in (tmp_path, *(above for above in tmp_path.parents if "pytest-" in str(above))):
        parent.chmod(0o755)
    folder = tmp_path / "folder"
    save(folder, {"a": "old", "deep/b": "old", "c": "old"})
    interrupted(folder, monkeypatch)
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            with reading(folder) as view:
                os.write(write, json.dumps(tree(view)).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 10_000)) == {name: text for name, text in NEW.items() if name != "mine"}
    assert tree(folder)["a"] == "old"
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)


def test_of_two_savers_one_waits(folder: Path) -> None:
    begun, order = threading.Event(), list[str]()

    def first() -> None:
        with saving(folder) as staging:
            begun.set()
            time.sleep(0.2)
            (staging / "a").write_text("first")
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    save(folder, {"a": "second"})
    order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert tree(folder)["a"] == "second"


def test_one_that_waits_too_long_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.1)
    with saving(folder), pytest.raises(OutputError, match=r"another process keeps saving to .*folder; wait for it"):
        save(folder, {"a": "second"})
    with reading(folder), pytest.raises(OutputError, match="another process holds"):
        save(folder, {"a": "third"})
    assert tree(folder) == OLD


def test_readers_see_no_half_of_a_save(folder: Path) -> None:
    """Several save and several read, all at once: each reads the files of one save."""
    found, stop = list[set[str]](), threading.Event()

    def save_often(text: str) -> None:
        saves, end = 0, time.monotonic() + 60
        while saves < 15 or (len(found) <= 5 and time.monotonic() < end):  # readers may be slow to come
            save(folder, {"a": text, "deep/b": text})
            saves += 1

    def read_often() -> None:
        while not stop.is_set():
            with reading(folder):
                first = (folder / "a").read_text()
                time.sleep(0.001)
                found.append({first, (folder / "deep" / "b").read_text()})
            time.sleep(0.02)  # for the savers, who wait until nobody reads

    savers = [threading.Thread(target=save_often, args=(text,)) for text in ("one", "two")]
    readers = [threading.Thread(target=read_often) for _ in range(2)]
    for thread in (*savers, *readers):
        thread.start()
    for thread in savers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert len(found) > 5
    assert all(len(texts) == 1 for texts in found)


def test_a_folder_within_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "deep").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="deep is a link"):
        save(folder, {"a": "new", "deep/b": "new"})
    assert not list(elsewhere.iterdir())
    assert not (folder / "a").exists()


def test_a_folder_that_is_a_link_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    save_new(tmp_path / "link")
    assert tree(folder) == NEW
    assert (tmp_path / "link").is_symlink()


# --- journals of strangers ---


def name_outside(tmp_path: Path) -> str:
    return str(tmp_path / "outside")


JOURNALS: dict[str, Any] = {
    "not JSON": "{",
    "a list": [],
    "no files": {"remove": []},
    "files are no list": {"files": "a", "remove": []},
    "a number as a name": {"files": [1], "remove": []},
    "out of the folder": {"files": ["../outside"], "remove": []},
    "out and in again": {"files": ["deep/../../outside"], "remove": []},
    "an absolute name": {"files": [], "remove": ["/tmp/outside"]},
    "removal outside": {"files": [], "remove": ["../outside"]},
    "an empty name": {"files": [""], "remove": []},
    "a null byte": {"files": ["a\0b"], "remove": []},
    "half a character": {"files": ["\ud800"], "remove": []},
    "a drive": {"files": ["C:x"], "remove": []},
    "a backslash": {"files": ["..\\outside"], "remove": []},
    "the journal itself": {"files": [f"{STAGING}/x"], "remove": []},
    "through a link": {"files": ["link/outside"], "remove": []},
    "a folder in place of a file": {"files": ["deep"], "remove": []},
    "removal of a folder": {"files": [], "remove": ["deep"]},
    "deep nesting": "[" * 100_000,
    "unpacked from an archive": {"files": [], "remove": ["a"], "inode": 1},
    "without its inode": {"files": [], "remove": ["a"], "inode": None},
}


def journal_of(folder: Path, journal: Any) -> None:
    (folder / STAGING).mkdir()
    if isinstance(journal, dict):
        journal = {"inode": (folder / STAGING).stat().st_ino, **journal}
    (folder / STAGING / JOURNAL).write_text(journal if isinstance(journal, str) else json.dumps(journal))


@pytest.mark.parametrize("name", list(JOURNALS))
def test_journals_of_strangers(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("safe")
    (folder / "link").symlink_to(tmp_path)
    journal_of(folder, JOURNALS[name])
    (folder / STAGING / "outside").write_text("theirs")
    with pytest.raises(CheckpointError, match=rf"{JOURNAL} cannot be trusted.*Remove .*{STAGING}"), reading(folder):
        pass
    with pytest.raises(CheckpointError, match=rf"{JOURNAL} cannot be trusted"):
        save(folder, {"a": "new"})
    assert outside.read_text() == "safe"
    assert (folder / "a").read_text() == "old"


def test_a_copy_of_an_interrupted_folder_is_not_taken_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, monkeypatch)
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="it was not made here"), reading(tmp_path / "copy"):
        pass
    with reading(folder):
        assert tree(folder) == NEW


def test_a_journal_in_the_folder_around_counts_only_if_it_is_for_this_one(folder: Path) -> None:
    (folder / "thesis").write_text("mine")
    journal_of(folder, {"files": [], "remove": ["thesis"]})
    with reading(folder / "deep"):
        assert (folder / "thesis").read_text() == "mine"


def test_a_journal_of_another_user_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder around, such as /tmp, it is as if it were not there; in the folder itself it is refused."""
    journal_of(folder, {"files": [], "remove": ["deep/b"]})
    monkeypatch.setattr(folders, "_is_trusted", lambda folder: False)
    with reading(folder / "deep") as found:
        assert (found / "b").read_text() == "old"
    with pytest.raises(CheckpointError, match="cannot be trusted"), reading(folder):
        pass


def test_whom_a_save_is_trusted_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / STAGING).mkdir()
    assert folders._is_trusted(folder)
    owner = folder.stat().st_uid
    if os.geteuid() == 0:
        os.chown(folder / STAGING, 65534, -1)
        assert not folders._is_trusted(folder)
        os.chown(folder, 65534, -1)
        assert folders._is_trusted(folder)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        assert folders._is_trusted(folder)


@pytest.mark.parametrize("kind", ["link", "pipe", "file", "dangling link"])
def test_a_folder_of_saves_that_is_none(folder: Path, tmp_path: Path, kind: str) -> None:
    """What a link leads to is neither emptied nor written to, nor is a pipe waited for."""
    precious = tmp_path / "precious"
    save(precious, {"thesis": "mine"})
    staging = folder / STAGING
    if kind == "pipe":
        os.mkfifo(staging)
    elif kind == "file":
        staging.write_text("text")
    else:
        staging.symlink_to(precious if kind == "link" else tmp_path / "nowhere")
    with reading(folder):
        assert (folder / "a").read_text() == "old"
    save_new(folder)
    assert tree(folder) == NEW
    assert tree(precious) == {"thesis": "mine"}
    assert not (tmp_path / "nowhere").exists()


def test_a_save_takes_nothing_from_behind_a_link(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "secret", {"key": "mine"})
    for name, link in (("sub/key", "sub"), ("key", "key")):
        journal_of(folder, {"files": [name], "remove": []})
        target = tmp_path / "secret" if link == "sub" else tmp_path / "secret" / "key"
        (folder / STAGING / link).symlink_to(target)
        with pytest.raises(CheckpointError, match="link"), reading(folder):
            pass
        assert (tmp_path / "secret" / "key").read_text() == "mine"
        shutil.rmtree(folder / STAGING)


def test_too_many_names(folder: Path) -> None:
    journal_of(folder, {"files": [f"x{i}" for i in range(20_000)], "remove": []})
    with pytest.raises(CheckpointError, match="more than 10000 names"), reading(folder):
        pass


def test_a_folder_within_is_found_behind_links(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, monkeypatch)
    (tmp_path / "link").symlink_to(folder / "deep")
    with reading(tmp_path / "link") as found:
        assert tree(found) == {"b": "new", "d": "new"}


@pytest.mark.parametrize("place", ["deep", "./deep/../deep/", "../folder/deep"])
def test_a_folder_within_by_a_relative_name_where_it_may_only_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    interrupted(folder, monkeypatch)
    monkeypatch.chdir(folder)

    def forbidden(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", forbidden)
    with reading(place) as view:
        assert tree(view) == {"b": "new", "d": "new"}


def test_a_folder_within_that_may_not_be_written_is_noticed_before_the_save_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "deep")
    with pytest.raises(OutputError, match="cannot be written"):
        save_new(folder)
    assert tree(folder) == OLD


def test_a_file_in_the_place_of_a_folder_is_noticed_before_the_save_counts(folder: Path) -> None:
    (folder / "d").mkdir()
    with pytest.raises(OutputError, match="d is a folder"):
        save(folder, {"a": "new", "d": "new"})
    assert tree(folder) == OLD


def test_another_name_of_a_file_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (opened.append(Path(source)), real(source, target)))
    write_file(tmp_path / "x", "old")
    (tmp_path / "other").write_text("mine")
    os.link(tmp_path / "other", opened[0])
    write_file(tmp_path / "x", "new")
    assert ((tmp_path / "other").read_text(), (tmp_path / "x").read_text()) == ("mine", "new")


def test_a_journal_that_is_a_link_is_none(folder: Path, tmp_path: Path) -> None:
    """As in the cache of a hub, whose files are links."""
    (tmp_path / "blob").write_text(json.dumps({"files": [], "remove": ["a"]}))
    (folder / STAGING).mkdir()
    (folder / STAGING / JOURNAL).symlink_to(tmp_path / "blob")
    with reading(folder):
        assert tree(folder)["a"] == "old"


def test_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that has none, and on a system that has none."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", none)
        save_new(folder)
    assert tree(folder) == NEW
    with monkeypatch.context() as patch:
        patch.setattr(files, "fcntl", None)
        save(folder, {"a": "newer"})
        with reading(folder):
            assert tree(folder)["a"] == "newer"


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with reading(tmp_path / "missing") as found:
        assert found == tmp_path / "missing"
    assert not builtins.any(tmp_path.iterdir())
