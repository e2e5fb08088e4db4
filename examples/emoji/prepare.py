"""Download the emoji and make a data set of them: transparent images of 128 px, and captions.

    python examples/emoji/prepare.py runs/emoji/data

Two packages of the npm registry, both under the MIT licence: the images of `@lobehub/fluent-emoji-3d`, and their names
and tags in `emojibase-data`. `npm pack` downloads them; without npm, give the two files that you have. They are read
in memory, and their checksums are compared with those of the versions that this example was made with.

    runs/emoji/data/metadata.jsonl   {"file_name", "text": the label, "long_caption": label and tags, "emoji", "group"}
    runs/emoji/data/animals.jsonl    the lines of one group, for the LoRA
    runs/emoji/data/images/          the images by their code points
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from impasto.errors import ImpastoError, InputError
from impasto.files import make_folder, write_file

IMAGES, NAMES = "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0"
SHA256 = {
    IMAGES: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    NAMES: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
IMAGE_FILE = re.compile(r"package/assets/([0-9a-f]+(?:[-_][0-9a-f]+)*)\.webp")
DATA_FILES = ("package/en/data.json", "package/meta/groups.json")
ANIMALS = "animals-nature"
MOST_FILES, MOST_BYTES = 50_000, 32 << 20  # of an archive, and of one file in it


def download(package: str, folder: Path) -> Path:
    """The archive of a package, by npm.

    Raises:
        InputError: npm is not there or fails.
    """
    if shutil.which("npm") is None:
        raise InputError(
            f"npm is needed to download {package}; install it, or get the file from https://registry.npmjs.org and "
            f"give it with --images or --names"
        )
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    found = result.stdout.split()
    if result.returncode != 0 or not found:
        raise InputError(f"npm pack {package} failed: {result.stderr.strip()[-400:] or 'it named no file'}")
    return folder / Path(found[-1]).name


def check(archive: Path, package: str) -> None:
    """Compare an archive with the version that this example was made with.

    Raises:
        InputError: it is another file, or there is none.
    """
    try:
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{archive} cannot be read: {error.strerror}") from error
    if found != SHA256[package]:
        raise InputError(
            f"{archive} is not {package}: its SHA-256 is {found}, not {SHA256[package]}. Download it again, or accept "
            f"other versions with --any-version"
        )


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files of an archive that are images or data, in memory. Nothing is unpacked to the disk.

    Raises:
        InputError: it is damaged, or larger than such a package can be.
    """
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for number, member in enumerate(opened):
                if number >= MOST_FILES:
                    raise InputError(f"{archive} has more than {MOST_FILES} files")
                if not member.isreg() or not (member.name in DATA_FILES or IMAGE_FILE.fullmatch(member.name)):
                    continue
                if member.size > MOST_BYTES:
                    raise InputError(f"{archive}: {member.name} has more than {MOST_BYTES} bytes")
                content = opened.extractfile(member)
                assert content is not None
                yield member.name, content.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{archive} is no complete .tgz file: {error}") from error


def key_of(code: str) -> str:
    """Code points as names of files, without the variation selector: "2764-FE0F-200D-1F525" -> "2764-200d-1f525"."""
    return "-".join(part for part in re.split("[-_]", code.lower()) if part != "fe0f")


def read_images(archive: Path) -> dict[str, bytes]:
    """The image files by their code points."""
    found: dict[str, bytes] = {}
    for name, content in files(archive):
        match = IMAGE_FILE.fullmatch(name)
        if match is not None:
            found.setdefault(key_of(match[1]), content)
    return found


def read_names(archive: Path, skin_tones: bool) -> list[dict[str, Any]]:
    """The records of all emoji, in the order of the package."""
    content = {name: json.loads(data) for name, data in files(archive) if name in DATA_FILES}
    if len(content) < len(DATA_FILES):
        raise InputError(f"{archive} does not have {' and '.join(DATA_FILES)}; it is not {NAMES}")
    emoji, meta = (content[name] for name in DATA_FILES)
    records = []
    for entry in emoji:
        group = meta["groups"].get(str(entry.get("group")), "other")
        tags = entry.get("tags", [])
        for form in [entry, *(entry.get("skins", []) if skin_tones else [])]:
            long = f"{form['label']}: {', '.join(tags)}" if tags else form["label"]
            records.append(
                {
                    "file_name": f"images/{key_of(form['hexcode'])}.png",
                    "text": form["label"],
                    "long_caption": long,
                    "emoji": key_of(entry["hexcode"]),  # without its skin tone
                    "group": group,
                }
            )
    return records


def to_png(content: bytes, size: int) -> bytes:
    """An image of the package as a transparent PNG of ``size`` px."""
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
        small = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return stream.getvalue()


def prepare(images: Path, names: Path, out: Path, size: int, skin_tones: bool) -> int:
    """Write the data set, the lists last; returns the number of images."""
    pixels = read_images(images)
    records = [record for record in read_names(names, skin_tones) if Path(record["file_name"]).stem in pixels]
    if not records:
        raise InputError(f"no image of {images} has a name in {names}")
    make_folder(out / "images")
    for record in records:
        write_file(out / record["file_name"], to_png(pixels[Path(record["file_name"]).stem], size), durable=False)
    write_list(out / "animals.jsonl", [record for record in records if record["group"] == ANIMALS])
    write_list(out / "metadata.jsonl", records)
    return len(records)


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the data set")
    parser.add_argument("--images", type=Path, metavar="TGZ", help=f"{IMAGES}, if it is there already")
    parser.add_argument("--names", type=Path, metavar="TGZ", help=f"{NAMES}, if it is there already")
    parser.add_argument("--skin-tones", action="store_true", help="with the five skin tones of each: 3,372 images")
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--any-version", action="store_true", help="do not compare checksums")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        archives = [options.images or download(IMAGES, Path(folder)), options.names or download(NAMES, Path(folder))]
        for archive, package in zip(archives, (IMAGES, NAMES)) if not options.any_version else ():
            check(archive, package)
        count = prepare(*archives, options.out, options.size, options.skin_tones)
    print(f"{options.out} has {count} images with captions")


if __name__ == "__main__":
    try:
        main()
    except ImpastoError as error:
        sys.exit(f"error: {error}")
