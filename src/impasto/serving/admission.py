"""Which jobs are accepted: those that fit the memory and the queue."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from .accepted import FleetGeneration, ModelState, given_bytes
from .job import Job
from .service import QueueFullError, TooLargeError
from .stats import Stats

#: Seconds after which clients are asked to try again, at most: after longer ones they do not by themselves.
MOST_RETRY_AFTER = 120
#: Bytes of the images and masks that were given for jobs which have not ended: at most, and as a share of the free
#: memory, as they may be here and in an engine.
MOST_GIVEN, SHARE_GIVEN = 2_000_000_000, 0.05


class Admission:
    """The bounds of a queue.

    Args:
        served: the models, with the jobs of each.
        limit: how many jobs may be unfinished.
        stats: counts what is refused.
        free: bytes of memory that this machine has free.
    """

    def __init__(self, served: Mapping[str, ModelState], limit: int, stats: Stats, free: int):
        self.served, self.limit, self.stats = served, limit, stats
        self.most_given = min(MOST_GIVEN, int(SHARE_GIVEN * free))

    def check(self, jobs: Sequence[Job]) -> None:
        """Check that all of these jobs can be accepted.

        Raises:
            RefusedError: its subclass says why.
        """
        for job in jobs:
            served = self.served[job.model].inspected.served
            first = served if job.given is None else job.given.images[0]
            if (job.width or first.width) * (job.height or first.height) > served.most_pixels:
                self.stats.rejected["size"] += len(jobs)
                side = math.isqrt(served.most_pixels)
                raise TooLargeError(
                    f"an image of {job.width} x {job.height} pixels does not fit the memory of this server; "
                    f"at most {side} x {side} do"
                )
        given = sum(map(given_bytes, jobs))
        if len(jobs) > self.limit or given > self.most_given:
            self.stats.rejected["size"] += len(jobs)
            what = f"{len(jobs)} images" if len(jobs) > self.limit else f"{given:,} bytes of images to edit"
            raise TooLargeError(
                f"the request has {what}; this server accepts at most {self.limit} images, and {self.most_given:,} "
                "bytes of images to edit, one for each result; ask for fewer at once"
            )
        if given and self.given + given > self.most_given:
            self.stats.rejected["full"] += len(jobs)
            raise QueueFullError("too many images to edit are waiting; try again later", self.retry_after(len(jobs)))
        if self.unfinished + len(jobs) > self.limit:
            self.stats.rejected["full"] += len(jobs)
            raise QueueFullError(
                f"{self.unfinished} images are waiting or in work, and at most {self.limit} may be; try again later",
                self.retry_after(len(jobs)),
            )

    @property
    def unfinished(self) -> int:
        """Accepted jobs that have not ended."""
        return sum(len(served.pending) + len(served.sent) for served in self.served.values())

    @property
    def given(self) -> int:
        """Bytes of the images that were given for them."""
        return sum(given_bytes(generation.job) for _, generation in self._accepted())

    def retry_after(self, count: int) -> int:
        """Seconds until so many places of the queue are free: as long as as many usual jobs of it take."""
        seconds = [_seconds(served, generation.job) for served, generation in self._accepted()]
        mean = sum(seconds) / len(seconds) if seconds else 1.0
        return max(1, min(MOST_RETRY_AFTER, math.ceil(count * mean)))

    def _accepted(self) -> Iterator[tuple[ModelState, FleetGeneration]]:
        for served in self.served.values():
            for generation in (*served.pending, *served.sent.values()):
                yield served, generation


def _seconds(served: ModelState, job: Job) -> float:
    if served.costs is None:
        return 1.0
    halves = 2 if job.guidance_scale > 1.0 else 1
    return served.costs.job_seconds(served.inspected.tokens(job), halves, job.steps)
