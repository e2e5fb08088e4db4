"""The service of real models: a queue, and an engine in a process of its own for each model that is loaded.

All methods run in one event loop. Threads of the processes hand their messages to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..checks import nearest, parse_size, shown
from ..errors import InputError, ResourceError
from .accepted import FleetGeneration, ModelState, cancelled, deadline_of, has_room, too_late
from .admission import Admission
from .engine.costs import StepCosts
from .engine.messages import Broken, Cancel, Ready, Turn
from .engine.process import EngineProcess
from .engine.spec import EngineSpec
from .job import Failed, Finished, Job, Progress
from .served import Inspected, ServedModel, look_at
from .service import Generation, UnavailableError
from .stats import Stats

logger = logging.getLogger("impasto")
Value = TypeVar("Value")

#: How often a job is run if its engine dies.
ATTEMPTS = 2
#: How often an engine is started if it dies while it loads.
LOADS = 2
#: Seconds between looks at deadlines.
LOOK = 1.0
#: Seconds after which a default model that could not be loaded again is tried once more.
RELOAD = 60.0
#: Seconds after its deadline at which an engine must have ended a job; it ends such jobs at the next step.
GRACE = 120.0
#: Jobs that an engine has at once: those that may run, and some to go on with.
MOST_SENT = 80


class Fleet:
    """Engines for several models; a ``Service``.

    Args:
        models: paths by name: a folder, a hub id, or the id of a bundled model. The first one is the default.
        aliases: names of models by other names.
        adapters: files of adapters by name.
        device: "cpu", "cuda", ...; None: CUDA if this machine has it.
        dtype: "float32", "bfloat16" or "float16"; None: the fastest.
        memory_budget: bytes or such as "8GB" for all models that are loaded; None: what is free.
        waiting: how many jobs may be unfinished.
        costs: recorded costs of steps, by model; others are measured when an engine starts.
        process: what runs an engine.

    Raises:
        InputError: an alias of a model that there is not, or no model.
        CheckpointError: a model that cannot be served.
        ResourceError: the budget is too small for one of them.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        adapters: Mapping[str, str] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        memory_budget: int | str | None = None,
        waiting: int = 256,
        costs: Mapping[str, StepCosts] | None = None,
        process: Callable[[EngineSpec, Callable[[Any, Any], None]], EngineProcess] = EngineProcess,
    ):
        from ..nn.machine import CPU, free_memory
        from .engine.loading import SHARE_OF_FREE, device_of

        if not models:
            raise InputError("there is no model to serve; give one")
        self.device, self.dtype = device, dtype
        self.limited = memory_budget is not None
        where = device_of(EngineSpec("", "", "", device))
        budget = None if memory_budget is None else parse_size(memory_budget)
        inspected = {name: look_at(name, path, where, dtype, budget) for name, path in models.items()}
        if budget is None and len(inspected) > 1:  # they share what is free
            budget = int(SHARE_OF_FREE * free_memory(where))
        self.budget = budget
        shares = {name: self._share_of(each, len(inspected)) for name, each in inspected.items()}
        self.served = {name: ModelState(each, shares[name]) for name, each in inspected.items()}
        self.models: Mapping[str, ServedModel] = {name: each.served for name, each in inspected.items()}
        for alias, name in (aliases or {}).items():
            _of(self.models, name, f"model for the alias {shown(alias)}")
        self.aliases: Mapping[str, str] = dict(aliases or {})
        self.adapters: Mapping[str, str] = dict(adapters or {})
        self.recorded, self.run_process = dict(costs or {}), process
        self.stats = Stats()
        self.admission = Admission(self.served, waiting, self.stats, free_memory(CPU))
        self.draining = self.closed = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.watch: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()  # set when a job or an engine has changed its state

    def _share_of(self, model: Inspected, count: int) -> int | None:
        """The memory of one model's engine; a model of which nothing is known takes all."""
        return None if self.budget is None else min(self.budget, max(model.need or self.budget, self.budget // count))

    # --- the life of the service ---

    async def start(self) -> None:
        """Load the default model.

        Raises:
            ResourceError: it cannot be loaded; the message says why.
        """
        self.loop = asyncio.get_running_loop()
        self.watch = self.loop.create_task(self._watch())
        default = next(iter(self.served.values()))
        self._load(default)
        while default.costs is None and default.state == "loading":
            await self._change()
        if default.costs is None:  # once it was ready, it may already make room for another one
            raise ResourceError(f"{default.name} cannot be loaded: {default.error}")

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted and the default model is loaded, or is loaded again when it is asked for."""
        default = next(iter(self.served.values()))
        return not self.draining and default.costs is not None and default.error is None

    async def drain(self) -> None:
        """Accept nothing more, and return when all accepted jobs have ended."""
        self.draining = True
        while self.unfinished:
            await self._change()

    def give_up(self) -> None:
        """End all accepted jobs now, with Failed."""
        for served in self.served.values():
            for generation in [*served.pending, *served.sent.values()]:
                self._end(served, generation, Failed(generation.job.id, "shutdown", "the server ends; try again"))

    async def close(self) -> None:
        """End all engines now. Jobs that are not done end with Failed."""
        self.draining = self.closed = True
        self.give_up()
        for served in self.served.values():
            if served.process is not None:
                served.process.kill()
        while any(served.process is not None for served in self.served.values()):
            await self._change()
        if self.watch is not None:
            self.watch.cancel()

    async def _change(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    async def _watch(self) -> None:
        """End jobs that wait for an engine beyond their deadlines, and engines that do not end such jobs."""
        while True:
            await asyncio.sleep(LOOK)
            now = time.time()
            for served in self.served.values():
                late = [each for each in served.pending if now > deadline_of(each)]
                hung = [each for each in served.sent.values() if now > deadline_of(each) + GRACE]
                for generation in (*late, *hung):
                    self._end(served, generation, too_late(generation))
                if hung and served.process is not None:
                    logger.error("the engine of %s does not answer", served.name)
                    served.process.kill()  # what else it has is run again
            # A load balancer sends nothing to a server that is not ready, so that no request would load its model.
            default = next(iter(self.served.values()))
            is_lost = default.costs is not None and default.error is not None and default.state == "absent"
            rested = time.monotonic() > default.used + RELOAD
            if is_lost and rested and not self.draining and has_room(self.served.values(), default, self.budget):
                self._load(default)
            self._dispatch()

    # --- jobs ---

    @property
    def unfinished(self) -> int:
        """Accepted jobs that have not ended."""
        return self.admission.unfinished

    def submit(self, jobs: Sequence[Job]) -> list[Generation]:
        """Accept all jobs, or none.

        Raises:
            RefusedError: its subclass says why.
            InputError: a model or an adapter that there is not.
        """
        jobs = [self._resolved(job) for job in jobs]
        if self.loop is None or self.draining:
            self.stats.rejected["unavailable"] += len(jobs)
            what = "ends" if self.draining else "is starting"
            raise UnavailableError(f"the server {what}; try again in some seconds", 5)
        self.admission.check(jobs)
        generations = [FleetGeneration(job, self._cancel) for job in jobs]
        for generation in generations:
            self.served[generation.job.model].pending.append(generation)
        self.stats.accepted += len(jobs)
        self._dispatch()
        return [*generations]

    def _cancel(self, generation: FleetGeneration) -> None:
        served = self.served[generation.job.model]
        if generation in served.pending:
            self._end(served, generation, cancelled(generation))
            self._dispatch()
        elif served.process is not None:
            generation.cancelled = True
            served.process.send(Cancel(generation.job.id))

    def _end(self, served: ModelState, generation: FleetGeneration, event: Finished | Failed) -> None:
        """The last event of a job."""
        if generation in served.pending:
            served.pending.remove(generation)
        served.sent.pop(generation.job.id, None)
        if generation.ended:
            return
        generation.ended = True
        if isinstance(event, Finished):
            self.stats.images += 1
            self.stats.latency.add(time.perf_counter() - generation.accepted)
        elif event.reason == "cancelled":
            self.stats.cancelled += 1
        else:
            self.stats.failed += 1
        generation.queue.put_nowait(event)
        self._count()
        self.changed.set()

    # --- engines ---

    def _dispatch(self) -> None:
        """Send jobs to engines, and load those that have something to do."""
        if not any(served.state == "absent" and served.pending for served in self.served.values()):
            for served in self.served.values():
                served.yields = False  # nobody wants its room any more
        room = True  # until a model waits for it: those with newer jobs wait too, or it might never have enough
        for served in sorted((s for s in self.served.values() if s.pending), key=lambda s: s.oldest):
            if served.state == "ready" and not served.yields:
                self._send(served)
            elif served.state == "absent" and room:
                room = has_room(self.served.values(), served, self.budget)
                if room:
                    self._load(served)
        for served in self.served.values():
            if served.yields and served.state == "ready" and not served.sent:
                self._unload(served)
        self._count()

    def _send(self, served: ModelState) -> None:
        assert served.process is not None
        served.used = time.monotonic()
        while served.pending and len(served.sent) < MOST_SENT:
            again = served.pending[0].attempts > 0
            # What was in an engine that died is run one by one: what kills engines then takes nothing with it.
            if served.sent and (again or any(each.attempts > 1 for each in served.sent.values())):
                return
            generation = served.pending.popleft()
            generation.attempts += 1
            served.sent[generation.job.id] = generation
            served.process.send(generation.job)

    def _resolved(self, job: Job) -> Job:
        """With the name of the model for an alias, and the files of adapters for their names."""
        model = self.aliases.get(job.model, job.model)
        chosen = tuple(each._replace(source=_of(self.adapters, each.source, "adapter")) for each in job.adapters)
        _of(self.models, model, "model")
        return replace(job, model=model, adapters=chosen)

    def _load(self, served: ModelState) -> None:
        inspected = served.inspected
        spec = EngineSpec(
            name=served.name,
            path=inspected.path,
            class_name=inspected.class_name,
            device=self.device,
            dtype=self.dtype,
            budget=served.share,
            limited=self.limited,
            costs=served.costs or self.recorded.get(served.name),  # measured once
        )
        served.state, served.error, served.yields = "loading", None, False
        served.used = time.monotonic()
        served.loads += 1
        try:
            served.process = self.run_process(spec, self._receive)
        except Exception as error:  # no memory for a process, or too many
            logger.exception("no process can be started for %s", served.name)
            served.state, served.error = "absent", f"its process could not be started: {error}"
            self._cannot_be_loaded(served)

    def _cannot_be_loaded(self, served: ModelState) -> None:
        """End all jobs for it; later ones try again. Why is for the log."""
        logger.error("%s cannot be loaded: %s", served.name, served.error)
        served.loads = 0
        for generation in [*served.pending]:
            message = f"the model {served.name} cannot be loaded"
            self._end(served, generation, Failed(generation.job.id, "engine", message))
        self.changed.set()

    def _unload(self, served: ModelState) -> None:
        served.state = "closing"
        assert served.process is not None
        served.process.kill()

    def _receive(self, process: EngineProcess, message: Any) -> None:
        """In a thread of the process."""
        assert self.loop is not None
        try:
            self.loop.call_soon_threadsafe(self._received, process, message)
        except RuntimeError:  # the loop is closed
            process.kill()

    def _received(self, process: EngineProcess, message: Any) -> None:
        served = self.served[process.spec.name]
        if process is not served.process:
            return
        if isinstance(message, Ready):
            served.state, served.costs, served.loads = "ready", message.costs, 0
            self._dispatch()
        elif isinstance(message, Broken):
            served.error = message.message
        elif isinstance(message, Turn):
            self._take(served, message)
        elif message is None:
            self._ended(served)
        self.changed.set()

    def _take(self, served: ModelState, turn: Turn) -> None:
        tally, stats = turn.tally, self.stats
        if tally.batch_tokens:
            stats.batch_tokens = tally.batch_tokens
            stats.steps += 1
            stats.image_steps += tally.image_steps
        for stage, seconds in tally.seconds.items():
            stats.seconds[stage] += seconds
        for event in turn.events:
            generation = served.sent.get(event.id)
            if generation is None:
                continue
            if isinstance(event, Finished | Failed):
                self._end(served, generation, event)
                continue
            if isinstance(event, Progress) and event.step >= 1 > generation.step:
                stats.first_step.add(time.perf_counter() - generation.accepted)
            if generation.is_new(event):
                generation.queue.put_nowait(event)
        if any(isinstance(event, Finished | Failed) for event in turn.events):
            self._dispatch()
        self._count()

    def _ended(self, served: ModelState) -> None:
        """An engine's process has ended: as it should, or not."""
        expected, was_loading = served.state == "closing" or self.closed, served.state == "loading"
        served.process, served.state, served.yields = None, "absent", False
        lost = [*served.sent.values()]
        served.sent.clear()
        if not expected:
            self.stats.restarts += not was_loading
            logger.error("the engine of %s has ended; %d images were in work", served.name, len(lost))
        for generation in reversed(lost):
            if generation.cancelled:
                self._end(served, generation, cancelled(generation))
            elif generation.attempts >= ATTEMPTS:
                gone = Failed(generation.job.id, "engine", "the image could not be generated: its engine ended twice")
                self._end(served, generation, gone)
            else:
                served.pending.appendleft(generation)
        if was_loading and not self.closed:
            if served.error is None and served.loads < LOADS:
                self._load(served)
            else:
                served.error = served.error or "its process ended while it was loaded"
                self._cannot_be_loaded(served)
        if not self.closed:
            self._dispatch()

    def _count(self) -> None:
        stats = self.stats
        begun = sum(each.step >= 0 for served in self.served.values() for each in served.sent.values())
        stats.running, stats.waiting = begun, self.unfinished - begun
        stats.models = tuple(name for name, served in self.served.items() if served.state in ("ready", "closing"))


def _of(known: Mapping[str, Value], name: str, what: str) -> Value:
    """The entry of this name."""
    if name not in known:
        hint = nearest(name, known, f"there are: {', '.join(known) or 'none'}")
        raise InputError(f"there is no {what} {shown(name)}{hint}")
    return known[name]
