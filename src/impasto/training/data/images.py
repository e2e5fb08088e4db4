"""What sources of images with captions have in common: from a stored image to a sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageColor

from ...checks import finite, shown
from ...errors import ConfigurationError, InputError
from .captions import Captions
from .faults import Faults
from .sample import Sample
from .views import View, Views, fit, to_signed


@dataclass(frozen=True)
class Reading:
    """How images become samples.

    Attributes:
        views: how images are cropped, and whether they are mirrored.
        caption: of every image, instead of captions from files.
        needs_caption: whether an image without a caption is left out.
        real_prompt_ratio: the share of samples with a short caption, if an image has short and long ones.
        background: what transparent images are composited on: a color of Pillow's, such as "white" or "#808080".
        weight: of each sample's loss.
        max_broken: how many images may be left out: below 1 a share, else a number.

    Raises:
        ConfigurationError: a value out of its range.
    """

    views: Views = field(default_factory=Views)
    caption: str | None = None
    needs_caption: bool = True
    real_prompt_ratio: float = 0.5
    background: str = "white"
    weight: float = 1.0
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        finite("real_prompt_ratio", self.real_prompt_ratio, 0, 1, error=ConfigurationError)
        finite("weight", self.weight, 0, error=ConfigurationError)
        try:
            ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigurationError(
                f"background must be a color such as 'white' or '#808080', not {shown(self.background)}"
            ) from error


class ImageSource(ABC):
    """Stored images with captions, as a source.

    Args:
        what: the name of the source, for messages.
        found: name, captions, and height and width or the reason why there is none, of each image.

    Attributes:
        faults: what is left out from the beginning, by name.

    Raises:
        InputError: too many images cannot be used.
    """

    def __init__(self, what: str, reading: Reading, found: Iterable[tuple[str, Captions, tuple[int, int] | str]]):
        self.reading = reading
        found = list(found)
        self.faults = Faults(what, reading.max_broken, len(found))
        self._names: list[str] = []
        self._captions: list[Captions] = []
        self._sizes: list[tuple[int, int]] = []
        fixed = None if reading.caption is None else Captions((reading.caption,))
        for name, own, size in found:
            captions = fixed or own
            if isinstance(size, str):
                self.faults.add(name, size)
            elif reading.needs_caption and not captions:
                self.faults.add(name, "it has no caption")
            else:
                self._names.append(name)
                self._captions.append(captions)
                self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._names)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels, upright, from the header."""
        return self._sizes[index]

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self._names[index]

    def captions(self, index: int) -> Captions:
        """All captions of an image."""
        return self._captions[index]

    def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
        """The image, resized and cropped to ``target``, with one of its captions."""
        view = self.reading.views.choose(self._names[index], rng)
        caption = self._captions[index].choose(rng, self.reading.real_prompt_ratio)
        return self.read_view(index, target, view, caption)

    def read_view(self, index: int, target: tuple[int, int], view: View, caption: str | None) -> Sample:
        """A given view of the image, with a given caption.

        Raises:
            InputError: the image cannot be read; the message names it.
        """
        image = self._open(index)
        levels, crop = fit(image, target, view)
        mask = self._open_mask(index)
        if mask is not None and mask.size != image.size:
            raise InputError(
                f"the mask of {self._names[index]} has {mask.width} x {mask.height} pixels, and the image "
                f"{image.width} x {image.height}; make them equal"
            )
        return Sample(
            image=to_signed(levels),
            caption=caption,
            size=(image.height, image.width),
            crop=crop,
            loss_mask=None if mask is None else fit(mask, target, view)[0].float() / 255,
            weight=self.reading.weight,
        )

    @abstractmethod
    def _open(self, index: int) -> Image.Image:
        """The image as RGB, upright, transparency on the background."""

    @abstractmethod
    def _open_mask(self, index: int) -> Image.Image | None:
        """The loss mask in grey (mode L), upright, if the image has one."""
