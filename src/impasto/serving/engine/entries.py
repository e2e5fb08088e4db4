"""What an engine keeps of the images on their way, and why one failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from ...errors import InputError, ResourceError, WeightsMismatchError
from ..job import Job, Reason
from .policy import Candidate
from .stages import Begun


@dataclass
class Tally:
    """What one turn did, for ``Stats``."""

    running: int = 0
    waiting: int = 0
    batch_tokens: int = 0  # of the step; 0: none was taken
    image_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage


@dataclass(eq=False)
class Entry:
    """An image on its way."""

    job: Job
    candidate: Candidate
    came: float  # by the engine's clock
    need: int  # bytes
    beginning: Generator[None, None, Begun] | None = None
    begun: Begun | None = None
    started: float = 0.0  # when it left the queue
    denoised: float = 0.0  # when its last step was done
    text: float = 0.0  # seconds of its own beginning: text and prior
    cancelled: bool = False
    due: deque[int] = field(default_factory=deque)  # the steps after which previews are made
    previews: int = 0  # that were put in the queue of the decoder

    @property
    def size(self) -> int:
        """Tokens of a step."""
        return sum(self.candidate.tokens)

    @property
    def begun_now(self) -> Begun:
        assert self.begun is not None
        return self.begun

    def seconds(self, now: float) -> dict[str, float]:
        """What a finished image took, by stage."""
        return {
            "wait": self.started - self.came,
            "text": self.text,
            "denoise": self.denoised - self.started - self.text,
            "decode": now - self.denoised,
        }


def reason_of(error: Exception) -> tuple[Reason, str]:
    """Why a job failed, for its client. What went wrong inside is for the log."""
    if isinstance(error, InputError):
        return "input", str(error)
    if isinstance(error, WeightsMismatchError):
        return "input", "an adapter does not fit this model; ask for one that was made for it, or for another model"
    if isinstance(error, ResourceError | MemoryError | torch.OutOfMemoryError):
        return "resources", "the image did not fit the memory; try a smaller one, or try again later"
    return "engine", "the image could not be generated because of a fault of the server"
