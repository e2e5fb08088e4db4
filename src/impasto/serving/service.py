"""Between the interfaces and the engines: which models there are, and one stream of events for each accepted job."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from ..errors import ImpastoError
from .job import Event, Job
from .served import ServedModel
from .stats import Stats


class RefusedError(ImpastoError):
    """A job is not accepted.

    Attributes:
        status: the HTTP status.
        retry_after: seconds after which the client should try again; None: it should not.
    """

    status = 503

    def __init__(self, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(RefusedError):
    """Too many jobs wait."""

    status = 429


class UnavailableError(RefusedError):
    """The server is starting, or ends."""

    status = 503


class TooLargeError(RefusedError):
    """The job does not fit the memory of the server, whatever it does."""

    status = 400


class Generation(Protocol):
    """An accepted job."""

    job: Job

    def events(self) -> AsyncGenerator[Event, None]:
        """Its events; the last one is Finished or Failed. To be called once."""
        ...

    def cancel(self) -> None:
        """End it at the next step. Its events then end with Failed, "cancelled"."""
        ...


class Service(Protocol):
    """What interfaces use. All methods are called in the event loop, and none of them blocks."""

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """By name, in the order in which they were given; the first one is the default."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of models, such as dall-e-3."""
        ...

    @property
    def adapters(self) -> Mapping[str, str]:
        """The files of adapters that requests may name, by name. Clients never name files."""
        ...

    @property
    def stats(self) -> Stats:
        """What it counts, for metrics."""
        ...

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted and the default model is loaded."""
        ...

    def submit(self, jobs: Sequence[Job]) -> list[Generation]:
        """Accept all jobs, or none.

        Raises:
            RefusedError: its subclass says why.
        """
        ...

    async def drain(self) -> None:
        """Accept nothing more, and return when all accepted jobs have ended."""
        ...

    def give_up(self) -> None:
        """End all accepted jobs now, with Failed, "shutdown"."""
        ...
