"""What a server counts, for its metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

#: Upper bounds in seconds of the classes of latencies; there is one more class above them.
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
#: The stages of an image, in their order.
STAGES = ("wait", "text", "prior", "denoise", "decode")


@dataclass
class Histogram:
    """How many values were in each class, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    sum: float = 0.0  # seconds

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class Stats:
    """Counts since the start, and what is going on now (running, waiting, batch_tokens, models).

    Attributes:
        running: images that are being generated; waiting: accepted, and not begun.
        batch_tokens: of the last step, with both halves of guidance.
        models: the names of those that are loaded.
        steps: forward passes; image_steps: steps of images, several of which share a forward pass.
        images: finished; rejected, cancelled, failed: by the reasons "full", "size", "unavailable" for rejections.
        restarts: engines that died after they were ready.
        seconds: by stage, the time that engines spent in it; "wait" is the sum over images.
        latency: from acceptance to the image; first_step: from acceptance to the first step.
    """

    running: int = 0
    waiting: int = 0
    batch_tokens: int = 0
    models: tuple[str, ...] = ()
    steps: int = 0
    image_steps: int = 0
    accepted: int = 0
    images: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: {"full": 0, "size": 0, "unavailable": 0})
    cancelled: int = 0
    failed: int = 0
    restarts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    latency: Histogram = field(default_factory=Histogram)
    first_step: Histogram = field(default_factory=Histogram)
