"""Images in tar shards: readable by tarfile and by our own training source, whole after any end of the process."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from impasto.errors import InputError
from impasto.serving.batch.manifest import Manifest
from impasto.serving.batch.outputs import Shards
from impasto.serving.batch.records import Record
from impasto.serving.batch.run import Alone, Made, missing, run
from impasto.training.data.shards import ShardSource


def records(count: int) -> list[Record]:
    return [Record(i, f"r{i}", f"prompt {i}", "", 8, 8, 2, 1.0, i, None, (), (), None, 0.8) for i in range(count)]


def png(record: Record) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (record.index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def work(folder: Path, todo: list[Record], size: int = 3) -> None:
    manifest = Manifest(folder)
    output = Shards(folder, (1, 1), manifest.own(), size)
    left = missing(todo, manifest, "m")
    run(left, lambda each: (Made(record, png(record)) for record in each), output, manifest, "m")


def check(folder: Path, count: int, size: int = 3) -> None:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) <= 3 * size
            for name in names:
                member = tar.extractfile(name)
                assert member is not None
                assert name not in found
                found[name] = member.read()
    assert sorted(found) == sorted(f"r{i}.{kind}" for i in range(count) for kind in ("png", "txt", "json"))
    for i in range(count):
        assert Image.open(io.BytesIO(found[f"r{i}.png"])).getpixel((0, 0)) == (i, 0, 0)
        assert found[f"r{i}.txt"] == f"prompt {i}".encode()
        assert json.loads(found[f"r{i}.json"])["seed"] == i
    source = ShardSource(folder)
    assert len(source) == count
    for line in Manifest(folder).own():
        with (folder / line["shard"]).open("rb") as file:
            file.seek(line["offset"])
            assert file.read(100).startswith(f"{line['id']}.png".encode())


def test_shards_grow_over_several_runs(tmp_path: Path) -> None:
    todo = records(11)
    for count in (2, 3, 7, 11, 11):
        work(tmp_path, todo[:count])
        check(tmp_path, count)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [f"images-{i:06d}.tar" for i in range(4)]


def test_the_longest_ids_fit(tmp_path: Path) -> None:
    (record,) = records(1)
    output = Shards(tmp_path, (1, 1), [])
    output.add(replace(record, id="a" * 95), png(record))
    output.close()
    with tarfile.open(tmp_path / "images-000000.tar") as tar:
        assert tar.getnames() == ["a" * 95 + kind for kind in (".png", ".txt", ".json")]


def test_a_larger_shard_size_overwrites_nothing(tmp_path: Path) -> None:
    todo = records(12)
    for count, size in ((5, 3), (8, 5), (9, 2), (12, 4)):
        work(tmp_path, todo[:count], size)
        check(tmp_path, count, 5)


def test_what_a_killed_process_left_behind_its_last_line_is_cut_off(tmp_path: Path) -> None:
    todo = records(8)
    work(tmp_path, todo[:5])
    whole = (tmp_path / "images-000001.tar").read_bytes()
    for rest in (b"half a sample", bytes(5000)):
        (tmp_path / "images-000001.tar").write_bytes(whole[:-1024] + rest)
        work(tmp_path, todo[:5])
        assert (tmp_path / "images-000001.tar").read_bytes() == whole
    work(tmp_path, todo)
    check(tmp_path, 8)
    (tmp_path / "images-000002.tar").write_bytes(b"short")
    with pytest.raises(InputError, match="it was changed or lost"):
        work(tmp_path, records(9))


def test_a_part_is_worked_on_by_one_process(tmp_path: Path) -> None:
    with Alone(tmp_path, (1, 2)):
        with pytest.raises(InputError, match="another process works on"), Alone(tmp_path, (1, 2)):
            pass
        with Alone(tmp_path, (2, 2)):
            pass
    with Alone(tmp_path, (1, 2)):
        pass
