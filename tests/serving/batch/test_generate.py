"""Records through an engine in this process."""

from __future__ import annotations

from typing import Any

from impasto.serving.batch.generate import by_engine
from impasto.serving.job import Event, Finished, Job, RawImage

from .test_outputs import records


class Slow:
    """An engine that is done with one image in every third turn."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.turns = self.most = 0

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def tick(self) -> tuple[list[Event], None]:
        self.turns += 1
        if self.turns % 3:
            return [], None
        return [Finished(self.jobs.pop(0).id, RawImage(8, 8, bytes(8 * 8 * 3)), {"denoise": 1.0})], None


def test_no_more_images_are_in_work_than_asked_for() -> None:
    engine: Any = Slow()
    made = list(by_engine(engine, "m", "dpm++", 4)(records(20)))
    assert [each.record.index for each in made] == list(range(20))
    assert engine.most == 4
