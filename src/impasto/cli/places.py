"""Where the images of a command go."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, OutputError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def plan_files(output: str, count: int) -> list[Path]:
    """Where the images go.

    Raises:
        InputError: several images into one file.
        OutputError: a file that is not one of an image, or a file in the place of a folder.
    """
    path = Path(output)
    is_folder = path.is_dir() or output.endswith("/")
    if not is_folder and path.suffix.lower() in IMAGE_EXTENSIONS:
        if count > 1:
            raise InputError(f"{count} images do not fit into the one file {path}; give a folder, as in --output out")
        return [path]
    if not is_folder and path.suffix[1:].isalpha():
        known = ", ".join(IMAGE_EXTENSIONS)
        raise OutputError(f"{path} has none of the extensions of an image ({known}); or, for a folder, end it with /")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, and should be a folder or end in .png; choose another name")
    return [path / f"{i:04d}.png" for i in range(count)]
