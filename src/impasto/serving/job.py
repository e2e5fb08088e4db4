"""What an interface asks an engine for, and what the engine answers: plain values, which cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..pipelines.adapters import ChosenAdapter


@dataclass(frozen=True)
class RawImage:
    """Pixels as they cross processes: RGB, 8 bits each, row by row."""

    width: int
    height: int
    pixels: bytes  # 3 * width * height


@dataclass(frozen=True)
class GivenImages:
    """Images to edit.

    Attributes:
        images: one for PixArt; for GLM-Image one or several references.
        mask: 255 where the image is repainted, 0 where it is kept: width * height bytes, or None for image to image.
        strength: how much may change, 0 to 1; at least one step is taken.
        padding: generate only what surrounds the mask, with so many pixels on each side, and paste it back; None: all.
    """

    images: tuple[RawImage, ...]
    mask: bytes | None = None
    strength: float = 0.8
    padding: int | None = None


@dataclass(frozen=True)
class Job:
    """One image to generate. An interface has checked every value; the engine trusts them.

    Attributes:
        id: unique in the server.
        model: the name of a served model.
        width, height: of the result, in pixels. With ``given.padding``, of what is generated around the mask; the
            result then has the size of the given image.
        seed: of the noise; the image depends on it, and not on what is generated at the same time.
        adapters: by their served names.
        scheduler: "dpm++", "ddim", "ddpm" or "lcm"; None: the model's.
        previews: how many images of intermediate steps are wanted, evenly spread.
        deadline: ``time.time()`` after which nobody waits any more.
        binning: whether PixArt generates at the nearest size that it was trained on, and resizes the result.
    """

    id: str
    model: str
    prompt: str
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 0
    scheduler: str | None = None
    adapters: tuple[ChosenAdapter, ...] = ()
    given: GivenImages | None = None
    previews: int = 0
    deadline: float | None = None
    binning: bool = True


# --- what an engine answers, in this order: Progress and Preview any number of times, then Finished or Failed ---


@dataclass(frozen=True)
class Progress:
    """A step is done; step 0 of an image that has left the queue."""

    id: str
    step: int
    steps: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class Preview:
    """What the image would be if it ended now."""

    id: str
    number: int  # from 0
    image: RawImage


@dataclass(frozen=True)
class Finished:
    """The image. ``seconds`` of its stages by name: wait, text (and prior), denoise, decode."""

    id: str
    image: RawImage
    seconds: dict[str, float] = field(default_factory=dict)


#: Why there is no image. "input": the job cannot be used, and says why; "cancelled": by the client; "deadline": it was
#: not done in time; "resources": it does not fit the memory; "shutdown": the server ends; "engine": a fault of the
#: server.
Reason: TypeAlias = Literal["input", "cancelled", "deadline", "resources", "shutdown", "engine"]


@dataclass(frozen=True)
class Failed:
    """There will be no image."""

    id: str
    reason: Reason
    message: str


Event: TypeAlias = Progress | Preview | Finished | Failed
