"""Records through an engine in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from impasto.serving.batch.generate import by_engine
from impasto.serving.job import Event, Finished, Job, RawImage

from .test_outputs import records


class Slow:
    """An engine that is done with one image in every third turn."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.turns = self.most = 0

    room = 10

    def need(self, job: Job) -> int:
        return job.width * job.height or 64

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


def test_images_that_do_not_fit_the_memory_fail_alone() -> None:
    """Those of the model's size are tried in any case."""
    large = [replace(record, width=16) if record.index % 2 else record for record in records(6)]
    engine: Any = Slow()
    made = list(by_engine(engine, "m", "dpm++", 4)(large))
    errors = {each.record.index: each.error for each in made}
    message = "16 x 8 pixels do not fit the memory of this machine"
    assert errors == {0: None, 1: message, 2: None, 3: message, 4: None, 5: message}
    made = list(by_engine(engine, "m", "dpm++", 4, within_budget=True)(large))
    assert not any(each.error for each in made)
