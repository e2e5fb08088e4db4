"""The engine of one model: images join its steps when they come, and leave when they are done.

``tick`` is one turn: what was cancelled ends, images begin, one step is taken by those that the policy chooses, and
latents that wait are decoded for about as long as the step took. A driver of ``sampling.advance``, without threads.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...memory.allocator import return_freed_memory
from ...pipelines.sampling import advance
from ..job import Event, Failed, Finished, Job, Preview, Progress, RawImage, Reason
from . import policy
from .adapting import AdapterSwitch
from .costs import StepCosts
from .decoding import Decoder, Decoding
from .entries import Entry, Tally, reason_of
from .policy import Candidate
from .stages import Stages, preview_latents

logger = logging.getLogger("impasto")

#: Seconds after which freed memory is returned: blocks of many sizes leave gaps that few others fit.
KEEP_FREED = 5.0


class Engine:
    """Generates the images of one model.

    Args:
        pipe: a PixArt or GLM-Image pipeline for text to image, in place on its device.
        costs: what steps cost.
        most_running: images that have begun and are not done.
        need: bytes that a job takes while it runs.
        room: bytes for all running ones; an image that needs more fails, unless it is no larger than the model's own.
        most_tokens: of a shared forward pass.
        choose: the policy; another one to compare it with.
    """

    def __init__(
        self,
        pipe: Any,
        costs: StepCosts,
        *,
        most_running: int = 64,
        need: Callable[[Job], int] = lambda job: 0,
        room: int = 0,
        most_tokens: int = 1 << 16,
        choose: Callable[..., list[Candidate]] = policy.choose,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stages, self.adapters, self.costs = Stages(pipe), AdapterSwitch(pipe), costs
        self.most_running, self.need, self.room, self.most_tokens = most_running, need, room, most_tokens
        # By itself an image of the model's own size runs even if the estimate says that it does not fit.
        self.most_need = max(room, need(Job("", "", "")))
        self.choose, self.clock, self.device = choose, clock, pipe.device
        self.waiting: deque[Entry] = deque()
        self.active: dict[str, Entry] = {}
        self.decoder = Decoder(self.stages, self._decoded)
        self.entries: dict[str, Entry] = {}  # all of them, by the ids of their jobs
        self.events: list[Event] = []
        self.level = 0.0  # seconds of service with which new images join
        self.switching = 0.0  # seconds of the last change of adapters
        self.overtaken = 0
        self.tally = Tally()
        self.returned = self.clock()

    # --- what comes from outside ---

    def add(self, job: Job) -> None:
        """Accept a job; its events come from ``tick``."""
        tokens = self.stages.tokens_of(job)
        halves = 2 if job.guidance_scale > 1.0 else 1
        candidate = Candidate(job.id, job.adapters, (tokens,) * halves, shares=self.stages.shares)
        entry = Entry(job, candidate, self.clock(), self.need(job))
        self.entries[job.id] = entry
        self.waiting.append(entry)

    def cancel(self, id: str) -> None:
        """End a job at the next step."""
        if id in self.entries:
            self.entries[id].cancelled = True

    @property
    def idle(self) -> bool:
        return not self.entries

    # --- one turn ---

    @torch.no_grad()
    def tick(self) -> tuple[list[Event], Tally]:
        """One turn: at most one step of each image.

        Returns:
            what has happened, in order, and the counts of this turn.
        """
        self.events, self.tally = [], Tally()
        self._end_unwanted()
        self._admit()
        start = self.clock()
        chosen = self._choose()
        if chosen:
            self._step(chosen)
        self._decode(self.clock() - start if chosen else 0.0)
        if self.clock() > self.returned + KEEP_FREED:
            return_freed_memory()
            self.returned = self.clock()
        self.tally.running, self.tally.waiting = len(self.entries) - len(self.waiting), len(self.waiting)
        return self.events, self.tally

    def _end_unwanted(self) -> None:
        now = time.time()
        for entry in [*self.entries.values()]:
            if entry.cancelled:
                self._fail(entry, "cancelled", "the client has cancelled it")
            elif entry.job.deadline is not None and now > entry.job.deadline:
                self._fail(entry, "deadline", "the image was not done in time")
            elif entry.need > self.most_need:
                what = f"the image needs about {entry.need / 1e9:.1f} GB of memory, of {self.most_need / 1e9:.1f} GB"
                self._fail(entry, "resources", f"{what}; ask for a smaller one, or for smaller references")

    def _admit(self) -> None:
        free = self.most_running - len(self.active)
        if not self.waiting or free <= 0:
            return
        first = self.waiting[0]
        # An image that is alone is let in: one that is too large has been refused.
        used = sum(each.need for each in self.active.values()) + self.decoder.need
        room = max(self.room - used, 0 if self.active or self.decoder.need else first.need)
        found = [self.waiting[i] for i in policy.admit([each.need for each in self.waiting], self.overtaken, room)]
        begin = self._with_places(found)[:free]
        self.overtaken = 0 if first in found else self.overtaken + len(begin)
        for entry in begin:
            self.waiting.remove(entry)
            entry.candidate.served = self.level
            entry.started = self.clock()
            self.active[entry.job.id] = entry
            self.tally.seconds["wait"] = self.tally.seconds.get("wait", 0.0) + entry.started - entry.came

    def _with_places(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that may run. The largest images do not take all places: a quarter is kept for smaller ones."""
        most, begin = self.most_running - self.most_running // 4, list[Entry]()
        sizes = [entry.size for entry in self.active.values()]
        for entry in entries:
            if entry.size < max(sizes, default=0) or sum(size >= entry.size for size in sizes) < most:
                begin.append(entry)
                sizes.append(entry.size)
        return begin

    def _candidates(self) -> list[Candidate]:
        """Images that may take a step or begin. Where few begin at a time, others wait for those."""
        busy = sum(entry.beginning is not None for entry in self.active.values()) >= self.stages.at_once
        entries = self.active.values()
        return [entry.candidate for entry in entries if entry.begun or entry.beginning or not busy]

    def _choose(self) -> list[Entry]:
        """The images of the next step, ready for it; none if the turn went into the beginning of one."""
        candidates = self._candidates()
        while candidates:
            chosen = self.choose(
                candidates, self.costs.seconds, self.most_tokens, self.adapters.current, self.switching
            )
            entries = [self.active[each.id] for each in chosen]
            later = [entry for entry in entries if entry.begun is None][self.stages.at_once :]
            entries = [entry for entry in entries if entry not in later]
            if self._switch(entries):
                self._begin([entry for entry in entries if entry.begun is None and entry.beginning is None])
                for entry in entries:
                    if entry.beginning is not None:
                        self._go_on(entry)
            ready = [entry for entry in entries if entry.job.id in self.active and entry.begun is not None]
            if ready:
                self.level = max(self.level, ready[0].candidate.served)
            if ready or any(entry.beginning is not None for entry in entries):
                return ready
            candidates = self._candidates()
        return []

    def _switch(self, entries: Sequence[Entry]) -> bool:
        """Bring the adapters of these images in force; if that fails, so do they."""
        adapters, start = entries[0].job.adapters, self.clock()
        if adapters == self.adapters.current:
            return True
        try:
            self.adapters.use(adapters)
        except Exception as error:
            for entry in [each for each in self.active.values() if each.job.adapters == adapters]:
                self._fail_by(entry, error)
            return False
        self.switching = self.clock() - start
        return True

    def _begin(self, entries: Sequence[Entry]) -> None:
        """Encode the texts of images, which then begin."""
        if not entries:
            return
        start = self.clock()
        for entry in entries:  # one that was kept from beginning does not catch up
            entry.candidate.served = max(entry.candidate.served, self.level)
        texts = [text for entry in entries for text in self.stages.texts_of(entry.job)]
        try:
            encoded = self.stages.encode_texts(texts, self.adapters.current)
        except Exception as error:
            if len(entries) == 1:
                self._fail_by(entries[0], error)
            else:  # find the one
                for entry in entries:
                    self._begin([entry])
            return
        for entry in entries:
            entry.beginning = self.stages.begin(entry.job, encoded)
        spent = self.clock() - start
        self._count("text", spent)
        self._raise_level(spent)
        for entry in entries:
            entry.text = spent
            entry.candidate.served += spent / len(entries)

    def _go_on(self, entry: Entry) -> None:
        """Go on with the beginning of an image: to where it yields, and for about as long as a step of it takes."""
        assert entry.beginning is not None
        start, slice_ = self.clock(), self.costs.seconds(entry.candidate.tokens)
        try:
            while True:
                next(entry.beginning)
                if self.clock() - start >= slice_:
                    break
        except StopIteration as end:
            entry.beginning, entry.begun = None, end.value
            self._has_begun(entry)
        except Exception as error:
            self._fail_by(entry, error)
        self._synchronize()
        spent = self.clock() - start
        self._count(self.stages.beginning, spent)
        self._raise_level(spent)
        entry.text += spent
        entry.candidate.served += spent
        entry.candidate.shares = entry.begun is not None and self.stages.shares

    def _has_begun(self, entry: Entry) -> None:
        run = entry.begun_now.run
        steps, previews = run.end - run.start, entry.job.previews
        at = {round((i + 1) * steps / (previews + 1)) for i in range(previews)}
        entry.due = deque(sorted(step for step in at if 0 < step < steps))
        self._count_halves(entry)
        self.events.append(Progress(entry.job.id, 0, steps, self._seconds_left(entry)))

    def _step(self, entries: list[Entry]) -> None:
        start = self.clock()
        for entry in entries:
            run = entry.begun_now.run
            run.watched = bool(entry.due) and run.index - run.start + 1 == entry.due[0]
        self._advance(entries)
        entries = [entry for entry in entries if entry.job.id in self.active]
        spent = self.clock() - start
        self._count("denoise", spent)
        if not entries:
            return
        policy.charge([entry.candidate for entry in entries], spent)
        self._raise_level(spent)
        self.tally.batch_tokens = sum(sum(entry.candidate.tokens) for entry in entries)
        self.tally.image_steps = len(entries)
        for entry in entries:
            run = entry.begun_now.run
            step, steps = run.index - run.start, run.end - run.start
            self.events.append(Progress(entry.job.id, step, steps, self._seconds_left(entry)))
            if run.watched and run.estimate is not None:
                entry.due.popleft()
                self.decoder.waiting.append(Decoding(entry, preview_latents(run.estimate), entry.previews))
                entry.previews += 1
                run.watched, run.estimate = False, None
            if run.index >= run.end:
                entry.denoised = self.clock()
                del self.active[entry.job.id]
                self.decoder.waiting.append(Decoding(entry, run.latents, None))
                run.halves.clear()  # the rest of what it took
            else:
                self._count_halves(entry)

    def _count_halves(self, entry: Entry) -> None:
        """Whether the next step is guided: guidance may end before the last one."""
        entry.candidate.tokens = entry.candidate.tokens[:1] * (2 if entry.begun_now.run.guided else 1)

    def _raise_level(self, spent: float) -> None:
        """New images join at what the running ones have been served on average: others do not starve behind them."""
        self.level += spent / max(1, len(self.active))

    def _advance(self, entries: Sequence[Entry]) -> None:
        """One step of all; if that fails, of each by itself, so that only the ones that cannot go on fail.

        Images of as many tokens are next to each other: the transformer then works on them together throughout.
        """
        entries = sorted(entries, key=lambda entry: entry.begun_now.run.latents.shape[-2:].numel())
        runs = [entry.begun_now.run for entry in entries]
        before = [run.index for run in runs]
        try:
            advance(runs)
            self._synchronize()
        except Exception as error:
            if len(runs) == 1:
                self._fail_by(entries[0], error)
                return
            logger.warning("a shared step failed, and is taken one by one: %s", error)
            for entry, index in zip(entries, before):
                if entry.begun_now.run.index == index:
                    self._advance([entry])

    def _synchronize(self) -> None:
        """Wait for the device, so that its time is charged to those that it worked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- decoding ---

    def _decode(self, seconds: float) -> None:
        """Go on with decoding: by one layer at least, and until ``seconds`` are spent."""
        start = self.clock()
        while not self.decoder.idle:
            self.decoder.go_on()
            self._synchronize()
            if self.clock() - start >= seconds:
                break
        self._count("decode", self.clock() - start)

    def _decoded(self, done: Decoding, image: RawImage | Exception) -> None:
        entry, id = done.entry, done.entry.job.id
        if id not in self.entries:
            return
        if isinstance(image, Exception):
            if done.number is None:
                self._fail_by(entry, image)
            else:  # the image itself may still be good
                logger.warning("a preview of job %s cannot be decoded: %s", id, image)
        elif done.number is not None:
            self.events.append(Preview(id, done.number, image))
        else:
            self._forget(entry)
            self.events.append(Finished(id, image, entry.seconds(self.clock())))

    # --- ends ---

    def _fail_by(self, entry: Entry, error: Exception) -> None:
        reason, message = reason_of(error)
        if reason == "engine":
            logger.error("job %s failed", entry.job.id, exc_info=error)
        self._fail(entry, reason, message)

    def _fail(self, entry: Entry, reason: Reason, message: str) -> None:
        if entry.job.id in self.entries:
            self._forget(entry)
            self.events.append(Failed(entry.job.id, reason, message))

    def _forget(self, entry: Entry) -> None:
        self.entries.pop(entry.job.id, None)
        self.active.pop(entry.job.id, None)
        if entry.beginning is not None:
            entry.beginning.close()
            entry.beginning = None
        if entry in self.waiting:
            self.waiting.remove(entry)
        self.decoder.forget(entry)

    # --- estimates ---

    def _seconds_left(self, entry: Entry) -> float:
        """At the speed that it has gone at so far; before its first step, by the costs."""
        run = entry.begun_now.run
        halves = [2 if scale > 1.0 else 1 for scale in run.guidance]
        done, left = sum(halves[run.start : run.index]), sum(halves[run.index :])
        if done:
            return (self.clock() - entry.started) / done * left
        step = self.costs.seconds([t for each in self.active.values() for t in each.candidate.tokens])
        return step * left / halves[run.index]

    def _count(self, stage: str, seconds: float) -> None:
        self.tally.seconds[stage] = self.tally.seconds.get(stage, 0.0) + seconds
