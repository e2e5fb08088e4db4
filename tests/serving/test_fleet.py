"""The service of real models: with engines that a test controls, and once with a process that is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from impasto.errors import CheckpointError, InputError, ResourceError
from impasto.nn import machine
from impasto.pipelines.adapters import ChosenAdapter
from impasto.serving import admission
from impasto.serving import fleet as fleets
from impasto.serving.admission import Admission
from impasto.serving.engine.costs import StepCosts
from impasto.serving.engine.entries import Tally
from impasto.serving.engine.messages import Broken, Cancel, Ready, Turn
from impasto.serving.engine.spec import EngineSpec
from impasto.serving.fleet import Fleet
from impasto.serving.job import Event, Failed, Finished, GivenImages, Job, Preview, Progress, RawImage
from impasto.serving.served import Inspected, look_at
from impasto.serving.service import Generation, QueueFullError, TooLargeError, UnavailableError

from ..tiny import write_pipeline

#: A step costs a second, whatever its size.
COSTS = StepCosts(((1, 1.0), (1000, 1.0)), ((1, 1.0), (1000, 1.0)))
PIXEL = RawImage(1, 1, b"abc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pipeline(tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture(autouse=True)
def _looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "look_at", look_at_once)


@lru_cache
def look_at_once(*arguments: Any) -> Inspected:
    return look_at(*arguments)


class FakeEngine:
    """An engine that does what a test says."""

    made: list[FakeEngine]

    def __init__(self, spec: EngineSpec, receive: Callable[[Any, Any], None]):
        self.spec, self.receive, self.sent, self.killed = spec, receive, list[Any](), False
        FakeEngine.made.append(self)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        if not self.killed:
            self.killed = True
            self.say(None)

    def say(self, message: Any) -> None:
        self.receive(self, message)

    def turn(self, *events: Event) -> None:
        self.say(Turn([*events], Tally(batch_tokens=8, image_steps=len(events), seconds={"denoise": 0.5})))

    @property
    def jobs(self) -> list[str]:
        return [message.id for message in self.sent if isinstance(message, Job)]


def fleet_of(models: dict[str, str], **options: Any) -> Fleet:
    FakeEngine.made = []
    return Fleet(models, process=FakeEngine, **options)  # type: ignore[arg-type]


def job(id: str, model: str = "tiny", **fields: Any) -> Job:
    return Job(id, model, **{"prompt": "a cat", "width": 16, "height": 16, "steps": 4, **fields})


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def started(fleet: Fleet) -> FakeEngine:
    starting = asyncio.ensure_future(fleet.start())
    await settle()
    assert not fleet.ready
    FakeEngine.made[0].say(Ready(COSTS))
    await starting
    assert fleet.ready
    return FakeEngine.made[0]


async def follow(generation: Generation) -> list[Event]:
    return [event async for event in generation.events()]


def end_of(events: list[Event]) -> Event:
    return events[-1]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(model: str) -> None:
        asyncio.run(test(model))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_events_of_jobs_reach_those_who_asked(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    with pytest.raises(UnavailableError):
        fleet.submit([job("early")])
    engine = await started(fleet)
    one, two = (asyncio.ensure_future(follow(each)) for each in fleet.submit([job("1"), job("2")]))
    assert engine.jobs == ["1", "2"]
    assert fleet.stats.waiting == 2
    engine.turn(Progress("1", 0, 4), Progress("2", 0, 4))
    await settle()
    assert (fleet.stats.running, fleet.stats.waiting) == (2, 0)
    assert fleet.stats.first_step.count == 0  # they are begun; no step is done
    engine.turn(Progress("1", 1, 4), Progress("2", 1, 4))
    engine.turn(Progress("1", 2, 4), Finished("2", PIXEL), Failed("1", "input", "no"))
    assert [type(event).__name__ for event in await one] == ["Progress"] * 3 + ["Failed"]
    assert end_of(await two) == Finished("2", PIXEL)
    stats = fleet.stats
    assert (stats.accepted, stats.images, stats.failed, stats.steps, stats.image_steps) == (2, 1, 1, 3, 7)
    assert (stats.latency.count, stats.first_step.count) == (1, 2)
    assert stats.seconds["denoise"] == 1.5
    assert stats.rejected["unavailable"] == 1
    await fleet.close()


@in_loop
async def test_a_full_queue_says_when_to_come_back(model: str) -> None:
    fleet = fleet_of({"tiny": model}, waiting=3)
    await started(fleet)
    fleet.submit([job("1", steps=7), job("2", steps=7)])
    with pytest.raises(QueueFullError) as full:
        fleet.submit([job("3"), job("4")])
    assert full.value.retry_after == 14  # two places, at seven steps of a second each
    assert fleet.unfinished == 2  # all or none
    fleet.submit([job("3", steps=5000)])
    with pytest.raises(QueueFullError) as full:
        fleet.submit([job("4")])
    assert full.value.retry_after == 120
    assert fleet.stats.rejected["full"] == 3
    await fleet.close()


@in_loop
async def test_what_does_not_fit_the_memory_is_refused(model: str) -> None:
    fleet = fleet_of({"tiny": model}, memory_budget="600MB")
    await started(fleet)
    most = fleet.models["tiny"].most_pixels
    assert 16 * 16 < most < 4096 * 4096
    with pytest.raises(TooLargeError, match="does not fit"):
        fleet.submit([job("1", width=4096, height=4096)])
    await fleet.close()


@in_loop
async def test_cancelling(model: str) -> None:
    fleet = fleet_of({"tiny": model, "other": model})
    engine = await started(fleet)
    sent, pending = fleet.submit([job("1"), job("2", "other")])
    pending.cancel()
    assert end_of(await follow(pending)) == Failed("2", "cancelled", "the client has cancelled it")
    sent.cancel()
    assert engine.sent[-1] == Cancel("1")
    engine.turn(Failed("1", "cancelled", ""))
    await follow(sent)
    sent.cancel()  # nothing is left to cancel
    assert fleet.stats.cancelled == 2
    await fleet.close()


@in_loop
async def test_adapters_are_sent_by_their_files(model: str) -> None:
    adapters = {"style": "/files/style.safetensors"}
    fleet = fleet_of({"tiny": model}, aliases={"dall-e-3": "tiny"}, adapters=adapters)
    engine = await started(fleet)
    fleet.submit([job("1", "dall-e-3", adapters=(ChosenAdapter("style", 0.5),))])
    assert engine.sent[0].adapters == (ChosenAdapter("/files/style.safetensors", 0.5),)
    assert engine.sent[0].model == "tiny"
    with pytest.raises(InputError, match="did you mean 'style"):  # a client names no files
        fleet.submit([job("2", adapters=(ChosenAdapter("styles"),))])
    with pytest.raises(InputError, match="there are: tiny"):
        fleet.submit([job("2", "unknown")])
    await fleet.close()


@in_loop
async def test_jobs_of_an_engine_that_dies_are_run_once_more(model: str) -> None:
    """One by one, so that the one that kills engines takes no other with it."""
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    tasks = [asyncio.ensure_future(follow(each)) for each in fleet.submit([job("1"), job("2")])]
    engine.turn(Progress("1", 0, 4))
    engine.kill()
    await settle()
    second = FakeEngine.made[1]
    assert second.spec.costs == COSTS  # not measured again
    second.say(Ready(COSTS))
    await settle()
    assert second.jobs == ["1"]
    second.kill()  # by the first job
    await settle()
    third = FakeEngine.made[2]
    third.say(Ready(COSTS))
    await settle()
    assert third.jobs == ["2"]
    third.turn(Finished("2", PIXEL))
    first, last = [end_of(await task) for task in tasks]
    assert isinstance(first, Failed)
    assert first.reason == "engine"
    assert isinstance(last, Finished)
    assert fleet.stats.restarts == 2
    fleet.submit([job("3"), job("4")])
    assert third.jobs == ["2", "3", "4"]
    await fleet.close()


@in_loop
async def test_an_image_that_is_run_again_repeats_no_previews(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    task = asyncio.ensure_future(follow(fleet.submit([job("1")])[0]))
    engine.turn(Progress("1", 0, 4), Progress("1", 2, 4), Preview("1", 0, PIXEL))
    engine.kill()
    await settle()
    again = FakeEngine.made[1]
    again.say(Ready(COSTS))
    await settle()
    again.turn(Progress("1", 0, 4), Progress("1", 2, 4), Preview("1", 0, PIXEL), Progress("1", 3, 4))
    again.turn(Preview("1", 1, PIXEL), Finished("1", PIXEL))
    events = await task
    assert [event.step for event in events if isinstance(event, Progress)] == [0, 2, 2, 3]
    assert [event.number for event in events if isinstance(event, Preview)] == [0, 1]
    await fleet.close()


@in_loop
async def test_the_least_recently_used_model_makes_room(model: str) -> None:
    fleet = fleet_of({"tiny": model, "b": model, "c": model}, memory_budget="6GB")
    for served in fleet.served.values():
        served.share = 3_000_000_000
    engine = await started(fleet)
    working = fleet.submit([job("1")])[0]
    fleet.submit([job("2", "b")])
    b = FakeEngine.made[1]
    b.say(Ready(COSTS))
    await settle()
    waiting = fleet.submit([job("3", "c")])[0]
    assert len(FakeEngine.made) == 2  # both work, and there is no room for a third
    fleet.submit([job("4")])
    assert engine.jobs == ["1"]  # it is to make room: what comes later waits
    engine.turn(Finished("1", PIXEL))
    await follow(working)
    await settle()
    assert engine.killed
    assert not b.killed
    c = FakeEngine.made[2]
    assert c.spec.name == "c"
    c.say(Ready(COSTS))
    await settle()
    assert c.jobs == ["3"]
    c.turn(Finished("3", PIXEL))
    await follow(waiting)
    b.turn(Finished("2", PIXEL))
    await settle()
    assert b.killed  # for job 4 of the first model: it was used before c
    assert not c.killed
    assert FakeEngine.made[3].spec.name == "tiny"
    assert fleet.stats.restarts == 0
    await fleet.close()


@in_loop
async def test_a_model_makes_room_when_its_older_jobs_are_sent(model: str) -> None:
    """It would be loaded again at once, as its jobs have waited longer."""
    fleet = fleet_of({"tiny": model, "b": model}, memory_budget="3GB")
    for served in fleet.served.values():
        served.share = 3_000_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleets, "MOST_SENT", 1)
        engine = await started(fleet)
        fleet.submit([job("1"), job("2")])
        fleet.submit([job("3", "b")])
        fleet.submit([job("4")])
        engine.turn(Finished("1", PIXEL))
        await settle()
        assert engine.jobs == ["1", "2"]
        engine.turn(Finished("2", PIXEL))
        await settle()
        assert engine.jobs == ["1", "2"]  # the next one is newer than that of b
        assert engine.killed
        b = FakeEngine.made[1]
        b.say(Ready(COSTS))
        await settle()
        b.turn(Finished("3", PIXEL))
        await settle()
        assert [each.spec.name for each in FakeEngine.made] == ["tiny", "b", "tiny"]
        await fleet.close()


@in_loop
async def test_room_is_kept_for_the_model_that_waits_longest(model: str) -> None:
    fleet = fleet_of({"tiny": model, "b": model, "large": model, "late": model}, memory_budget="6GB")
    for served in fleet.served.values():
        served.share = 6_000_000_000 if served.name == "large" else 3_000_000_000
    engine = await started(fleet)
    fleet.submit([job("1"), job("2", "b")])
    b = FakeEngine.made[1]
    b.say(Ready(COSTS))
    await settle()
    fleet.submit([job("3", "large"), job("4", "late")])
    engine.turn(Finished("1", PIXEL))
    await settle()
    assert engine.killed
    assert len(FakeEngine.made) == 2  # half of what the large one needs is free
    b.turn(Finished("2", PIXEL))
    await settle()
    assert [each.spec.name for each in FakeEngine.made] == ["tiny", "b", "large"]
    await fleet.close()


@in_loop
async def test_a_model_that_cannot_be_loaded(model: str) -> None:
    fleet = fleet_of({"tiny": model, "bad": model})
    await started(fleet)
    generation = fleet.submit([job("1", "bad")])[0]
    FakeEngine.made[1].say(Broken("its weights are damaged"))
    FakeEngine.made[1].kill()
    end = end_of(await follow(generation))
    assert end == Failed("1", "engine", "the model bad cannot be loaded")  # the log says why
    assert len(FakeEngine.made) == 2  # it would break again
    assert fleet.stats.restarts == 0  # it never ran
    assert fleet.ready
    await fleet.close()
    broken = fleet_of({"bad": model})
    starting = asyncio.ensure_future(broken.start())
    await settle()
    FakeEngine.made[0].say(Broken("no"))
    FakeEngine.made[0].kill()
    with pytest.raises(ResourceError, match="bad cannot be loaded: no"):
        await starting


@in_loop
async def test_a_default_model_that_makes_room_at_once_was_loaded(model: str) -> None:
    fleet = fleet_of({"tiny": model, "b": model}, memory_budget="3GB")
    for served in fleet.served.values():
        served.share = 3_000_000_000
    starting = asyncio.ensure_future(fleet.start())
    await settle()
    fleet.submit([job("1", "b")])
    fleet.served["tiny"].yields = True
    FakeEngine.made[0].say(Ready(COSTS))
    await settle()
    assert FakeEngine.made[0].killed
    await starting
    assert fleet.ready
    await fleet.close()


@in_loop
async def test_a_default_model_that_is_lost_is_not_ready_until_it_is_loaded_again(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    engine.kill()
    await settle()
    assert fleet.ready  # the next request loads it
    assert fleet.stats.restarts == 1
    fleet.submit([job("1")])
    FakeEngine.made[1].say(Broken("its weights are gone"))
    FakeEngine.made[1].kill()
    await settle()
    assert not fleet.ready
    assert fleet.stats.restarts == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleets, "RELOAD", 0.0)
        while len(FakeEngine.made) < 3:
            await asyncio.sleep(0.05)
    FakeEngine.made[2].say(Ready(COSTS))
    await settle()
    assert fleet.ready
    await fleet.close()


@in_loop
async def test_an_engine_that_dies_while_it_loads_is_started_once_more(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    starting = asyncio.ensure_future(fleet.start())
    await settle()
    FakeEngine.made[0].kill()
    await settle()
    FakeEngine.made[1].say(Ready(COSTS))
    await starting
    one, two = (asyncio.ensure_future(follow(each)) for each in fleet.submit([job("1"), job("2")]))
    FakeEngine.made[1].kill()
    await settle()
    for i in (2, 3):
        assert len(FakeEngine.made) == i + 1
        FakeEngine.made[i].kill()
        await settle()
    gone = "the model tiny cannot be loaded"
    assert [end_of(await one), end_of(await two)] == [Failed(id, "engine", gone) for id in "12"]
    fleet.submit([job("3")])
    assert len(FakeEngine.made) == 5  # later jobs try again
    await fleet.close()


@in_loop
async def test_a_process_that_cannot_be_started_ends_the_jobs(model: str) -> None:
    fleet = fleet_of({"tiny": model, "b": model})
    await started(fleet)

    def no_process(*arguments: Any) -> Any:
        raise OSError("no memory")

    fleet.run_process = no_process
    generation = fleet.submit([job("1", "b")])[0]
    assert end_of(await follow(generation)) == Failed("1", "engine", "the model b cannot be loaded")
    fleet.run_process = FakeEngine  # type: ignore[assignment]
    fleet.submit([job("2", "b")])
    assert FakeEngine.made[-1].spec.name == "b"
    await fleet.close()


@in_loop
async def test_an_engine_that_hangs_is_killed_and_the_rest_is_run_again(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    late = time.time() - fleets.GRACE
    hung, other, recent = fleet.submit([job("1", deadline=late - 1), job("2"), job("3", deadline=late + 60)])
    end = end_of(await asyncio.wait_for(follow(hung), 10))
    assert isinstance(end, Failed)
    assert end.reason == "deadline"
    await settle()
    assert engine.killed
    again = FakeEngine.made[1]
    again.say(Ready(COSTS))
    await settle()
    assert again.jobs == ["2"]
    again.turn(Finished("2", PIXEL))
    assert isinstance(end_of(await follow(other)), Finished)
    recent.cancel()
    await fleet.close()


@in_loop
async def test_a_cancelled_job_is_not_run_again(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    generation = fleet.submit([job("1")])[0]
    generation.cancel()
    engine.kill()
    assert end_of(await follow(generation)) == Failed("1", "cancelled", "the client has cancelled it")
    assert len(FakeEngine.made) == 1
    await fleet.close()


@in_loop
async def test_an_engine_has_no_more_jobs_than_it_can_go_on_with(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    fleet.submit([job(str(i)) for i in range(fleets.MOST_SENT + 2)])
    assert len(engine.jobs) == fleets.MOST_SENT
    engine.turn(Finished("5", PIXEL))
    await settle()
    assert engine.jobs[fleets.MOST_SENT :] == [str(fleets.MOST_SENT)]
    await fleet.close()


@in_loop
async def test_images_to_edit_are_bounded(model: str) -> None:
    fleet = fleet_of({"tiny": model}, waiting=4)
    engine = await started(fleet)
    given = GivenImages((RawImage(16, 16, bytes(768)),), bytes(256))
    assert Admission({}, 4, fleet.stats, free=200 << 20).most_given == 10 << 20  # twice as much may be in memory
    assert fleet.admission.most_given <= admission.MOST_GIVEN
    fleet.admission.most_given = 2048
    fleet.submit([job("1", given=given), job("2", given=given), job("3")])
    with pytest.raises(QueueFullError, match="to edit"):
        fleet.submit([job("4", given=given)])
    engine.turn(Finished("1", PIXEL))
    await settle()
    fleet.submit([job("4", given=given)])
    with pytest.raises(TooLargeError, match="fewer"):  # it never fits
        fleet.submit([job(str(i), given=given) for i in range(5, 8)])
    with pytest.raises(TooLargeError, match="at most 4 images"):
        fleet.submit([job(str(i)) for i in range(5, 10)])
    await fleet.close()


@in_loop
async def test_models_share_what_is_free_without_a_budget(model: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "free_memory", lambda device: 4_000_000_000)
        fleet = fleet_of({"tiny": model, "b": model})
    assert {served.share for served in fleet.served.values()} == {1_600_000_000}
    engine = await started(fleet)
    assert not engine.spec.limited
    fleet.served["b"].share = 2_000_000_000
    working = fleet.submit([job("1")])[0]
    wanted = fleet.submit([job("2", "b")])[0]
    assert len(FakeEngine.made) == 1
    fleet.submit([job("3")])
    assert engine.jobs == ["1"]  # it makes room
    wanted.cancel()
    assert engine.jobs == ["1", "3"]  # which nobody wants any more
    fleet.submit([job("4", "b")])
    engine.turn(Finished("1", PIXEL), Finished("3", PIXEL))
    await follow(working)
    await settle()
    assert engine.killed
    assert FakeEngine.made[1].spec.name == "b"
    await fleet.close()


@in_loop
async def test_draining_finishes_what_was_accepted(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    generation = fleet.submit([job("1")])[0]
    draining = asyncio.ensure_future(fleet.drain())
    await settle()
    assert not fleet.ready
    with pytest.raises(UnavailableError) as refused:
        fleet.submit([job("2")])
    assert refused.value.retry_after == 5
    assert not draining.done()
    engine.turn(Finished("1", PIXEL))
    await draining
    assert isinstance(end_of(await follow(generation)), Finished)
    await fleet.close()


@in_loop
async def test_closing_leaves_no_job_without_an_end(model: str) -> None:
    fleet = fleet_of({"tiny": model})
    engine = await started(fleet)
    generation = fleet.submit([job("1")])[0]
    await fleet.close()
    assert end_of(await follow(generation)) == Failed("1", "shutdown", "the server ends; try again")
    assert engine.killed


@in_loop
async def test_jobs_that_wait_beyond_their_deadline_end(model: str) -> None:
    fleet = fleet_of({"tiny": model, "b": model})
    await started(fleet)
    generation = fleet.submit([job("1", "b", deadline=time.time() - 1)])[0]
    end = end_of(await asyncio.wait_for(follow(generation), 10))
    assert isinstance(end, Failed)
    assert end.reason == "deadline"
    await fleet.close()


def test_what_cannot_be_served_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tiny"):
        Fleet({"tiny": model}, aliases={"dall-e-3": "tinny"})
    with pytest.raises(InputError, match="no model"):
        Fleet({})
    with pytest.raises(CheckpointError):
        Fleet({"none": str(tmp_path)})
    with pytest.raises(ResourceError, match="too small"):
        Fleet({"tiny": model}, memory_budget="1MB")


@pytest.mark.long
def test_a_killed_engine_loses_no_image(model: str) -> None:
    """A real process: the image of a job whose engine was killed in the middle is that of one that was not."""

    async def generate() -> tuple[list[Event], list[Event], int]:
        fleet = Fleet({"tiny": model}, costs={"tiny": COSTS})
        await fleet.start()
        whole = await follow(fleet.submit([job("whole", seed=3)])[0])
        generation = fleet.submit([job("broken", seed=3, steps=4)])[0]
        events: list[Event] = []
        async for event in generation.events():
            if not events:
                process = fleet.served["tiny"].process
                assert process is not None
                process.kill()
            events.append(event)
        await fleet.drain()
        await fleet.close()
        return whole, events, fleet.stats.restarts

    whole, events, restarts = asyncio.run(generate())
    one, other = end_of(whole), end_of(events)
    assert isinstance(one, Finished)
    assert isinstance(other, Finished)
    assert one.image == other.image
    assert restarts <= 1  # it may have been done before it was killed
