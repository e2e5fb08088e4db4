"""A folder of images with captions, as a source."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from ...errors import ConfigurationError
from ...pipelines.image_files import open_image
from .images import ImageSource, Reading
from .listing import EXTENSIONS, list_folder, metadata_of, unlisted
from .sizes import measure


class FolderSource(ImageSource):
    """The images of a folder, with captions as ``listing.list_folder`` finds them.

    Args:
        folder: searched with all folders in it.
        reading: how images become samples.
        metadata: a ``.jsonl`` or ``.json`` file of captions, if it is not one of those found by themselves.
        mask_suffix: of loss masks, files next to the images: "_mask" for ``cat_mask.png`` of ``cat.jpg``.
        index: a file that keeps the sizes of the images, so that they are not measured each time.

    Attributes:
        unlisted: how many images of the folder its file of captions does not list.

    Raises:
        InputError: no images, captions that cannot be read, or too many images that cannot be used.
        OutputError: the index cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        reading: Reading | None = None,
        metadata: str | os.PathLike[str] | None = None,
        mask_suffix: str | None = None,
        index: str | os.PathLike[str] | None = None,
    ):
        if mask_suffix == "":
            raise ConfigurationError("mask_suffix is empty, so every image would be a mask; give one such as '_mask'")
        self.folder, self.mask_suffix = Path(folder), mask_suffix
        listed = metadata_of(self.folder) if metadata is None else Path(metadata)
        entries = list_folder(self.folder, listed, mask_suffix)
        self.unlisted = 0 if listed is None else len(unlisted(self.folder, entries, mask_suffix))
        sizes = measure(self.folder, [entry.name for entry in entries], None if index is None else Path(index))
        found = [(entry.name, entry.captions, entry.problem or size) for entry, size in zip(entries, sizes)]
        super().__init__(str(folder), reading or Reading(), found)

    def _open(self, index: int) -> Image.Image:
        return open_image(self.folder / self._names[index], self.reading.background)

    def _open_mask(self, index: int) -> Image.Image | None:
        if self.mask_suffix is None:
            return None
        image = self.folder / self._names[index]
        for extension in EXTENSIONS:
            path = image.with_name(f"{image.stem}{self.mask_suffix}{extension}")
            if path.is_file():
                return open_image(path, "black").convert("L")
        return None
