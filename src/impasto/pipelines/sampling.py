"""The only denoising loop: a run holds the state of one generation, and ``advance`` takes runs one step further.

Progress bars, callbacks, previews and cancellation drive the loop. Images to edit, guidance intervals, step caches,
captured graphs and one-step models are its inputs.

Shapes: B images, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..nn.changes import of, unwrapped
from ..nn.precision import adapt
from .compat.calls import Call, call_back, calling
from .inputs import check_tensor
from .request import Request

if TYPE_CHECKING:
    from ..transforms.step_cache import Memory


class Half(NamedTuple):
    """What the transformer is called with in addition to the latents and the timestep."""

    copies: int  # of the latents: 2 if it holds both the negative and the positive prompts
    arguments: Mapping[str, Any]


@dataclass
class DenoisingStep:
    """One step that was taken. The caller of the loop may assign other latents or other embeddings."""

    index: int  # among the steps that are taken
    count: int  # of the steps that are taken
    timestep: Tensor  # a single number
    latents: Tensor  # [B, C, h, w], after the step
    embeds: Any  # as encode_prompt returns them, for B images


class Edit(NamedTuple):
    """An image to start from, in place of noise alone."""

    latents: Tensor  # [B, C, h, w]
    strength: float = 1.0  # the fraction of the schedule that is run, its end: above 0, at most 1
    mask: Tensor | None = None  # [B or 1, 1, h, w] in [0, 1]: 1 where the image is repainted; None: everywhere


class Known(NamedTuple):
    """What a run keeps of an image: inpainting."""

    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    mask: Tensor  # [B or 1, 1, h, w]: 0 keeps the image, 1 keeps what the run generates

    def blend(self, scheduler: Any, latents: Tensor, index: int) -> Tensor:
        """The run's latents and the image's, both at the noise level of step ``index``; after the last step, at 0."""
        last = index >= len(scheduler.timesteps)
        kept = self.latents if last else noised(scheduler, self.latents, self.noise, index)
        return torch.lerp(kept, latents, self.mask)


@dataclass(eq=False)
class Run:
    """One generation. Runs share the components of a pipeline and nothing else, so they can take turns."""

    pipe: Any
    transformer: Any
    call: Callable[..., Any]  # the transformer, or what replays its captured graph
    scheduler: Any  # a copy, with its timesteps set
    latents: Tensor  # [B, C, h, w]
    embeds: Any
    guidance_scale: float
    encode: Callable[[Any, bool], list[Half]]  # embeddings -> the negative (if requested) and the positive half
    modulation: Any  # of all steps
    options: Mapping[str, Any]  # of the scheduler's step
    takes_original: bool = False  # the scheduler's x_0 instead of its next sample
    start: int = 0  # the steps before it are left out (image to image)
    known: Known | None = None
    watched: bool = False  # whether the next step also estimates the image that it leads to

    def __post_init__(self) -> None:
        self.index, self.end = self.start, len(self.scheduler.timesteps)
        self.estimate: Tensor | None = None  # of the last step that was watched: latents [B, C, h, w] without noise
        own = getattr(unwrapped(self.transformer), "step_cache", None)  # enabled on the transformer itself
        self.interval, self.cache = self.pipe.guidance_interval, self.pipe.step_cache or own
        self.guide(self.guidance_scale)
        self.halves: dict[bool, list[Half]] = {}  # by whether the negative one is among them
        self.memories: dict[tuple[bool, int], Memory] = {}  # of the step cache, for each half

    def guide(self, scale: float) -> None:
        """Use this guidance scale from the next step on; without negative embeddings there is no guidance."""
        self.guidance_scale = scale
        scale = scale if self.embeds.negative_prompt_embeds is not None else 1.0
        #: The scale of each step; with 1 or less the negative half is left out.
        self.guidance = [scale] * self.end
        if self.interval is not None:
            self.guidance = self.interval.scales(self.scheduler, scale)
        elif self.start == 0 and hasattr(self.scheduler, "guides"):  # an edit needs guidance wherever it begins
            self.guidance = [scale if self.scheduler.guides(i) else 1.0 for i in range(self.end)]

    def use(self, embeds: Any) -> None:
        """Go on with other embeddings; there is guidance as long as there are negative ones."""
        self.embeds = embeds
        self.guide(self.guidance_scale)
        self.halves.clear()
        self.memories.clear()

    @property
    def can_share(self) -> bool:
        """Whether the next step may share a forward pass: without a step cache, and not of a captured graph."""
        return self.cache is None and self.call is self.transformer is unwrapped(self.transformer)

    @property
    def divides(self) -> bool:
        """Whether processes divide the rows of a call, so that both halves of guidance are to be in one."""
        return self.can_share and any(change.change == "parallel" for change in of(self.transformer))

    @property
    def guided(self) -> bool:
        """Whether the next step needs the negative half, too."""
        return self.guidance[self.index] > 1.0

    def inputs(self) -> tuple[Tensor, list[Half]]:
        """Of the next step: what the transformer sees of the latents [B, C, h, w], and its other arguments."""
        if self.guided not in self.halves:
            self.halves[self.guided] = self.encode(self.embeds, self.guided)
        scale_model_input = getattr(self.scheduler, "scale_model_input", None)
        t = self.scheduler.timesteps[self.index]
        x = self.latents if scale_model_input is None else scale_model_input(self.latents, t)
        return x.to(self.transformer.dtype), self.halves[self.guided]

    def caching(self, half: int) -> AbstractContextManager[None]:
        """The context for a call of the transformer, in which a step cache may skip blocks."""
        if self.cache is None:
            return nullcontext()
        if (self.guided, half) not in self.memories:
            if half == 0:
                self.memories.clear()  # guidance begins or ends
            self.memories[self.guided, half] = self.cache.memory(self.end - self.start)
        return self.memories[self.guided, half].current(self.index - self.start)


@torch.no_grad()
def advance(runs: Sequence[Run]) -> None:
    """Take each run one step further. Those of one transformer share a forward pass, whatever their sizes and steps."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(id(run.transformer) if run.can_share else id(run), []).append(run)
    for group in groups.values():
        with group[0].pipe.placement.using(group[0].transformer):
            alone = len(group) == 1 and not group[0].divides
            predictions = [predict(group[0])] if alone else predict_together(group)
        for run, predicted in zip(group, predictions, strict=True):
            take_step(run, predicted)


def take_step(run: Run, predicted: Tensor) -> None:
    """One step of the solver from predictions [B, C, h, w], after those with the negative prompts if guided."""
    t, scale = run.scheduler.timesteps[run.index], run.guidance[run.index]
    if scale > 1.0:
        negative, positive = predicted.chunk(2)
        predicted = negative + scale * (positive - negative)  # classifier-free guidance (2207.12598)
    if run.watched:
        run.estimate = estimated(run, predicted)
    result = run.scheduler.step(predicted, t, run.latents, **run.options, return_dict=False)
    run.latents = result[1 if run.takes_original and len(result) > 1 else 0]
    run.index += 1
    if run.known is not None:
        run.latents = run.known.blend(run.scheduler, run.latents, run.index)


def estimated(run: Run, predicted: Tensor) -> Tensor:
    """The latents [B, C, h, w] of the image that a prediction of the next step implies."""
    from ..schedulers.process import predicted_original  # needed for previews only

    config = getattr(run.scheduler, "config", {})
    one, zero = (
        value(run.latents[:1, :1, :1, :1], dtype=torch.float32) for value in (torch.ones_like, torch.zeros_like)
    )
    alpha, sigma = (noised(run.scheduler, x, noise, run.index) for x, noise in ((one, zero), (zero, one)))
    x, kind = run.latents.float(), config.get("prediction_type", "flow_prediction")
    original = predicted_original(kind, predicted.float(), x, alpha, sigma)
    if hasattr(run.scheduler, "averaged"):
        original = run.scheduler.averaged(original, run.index)
    original = original.to(run.latents.dtype)
    return original if run.known is None else torch.lerp(run.known.latents, original, run.known.mask)


def predict(run: Run) -> Tensor:
    """The transformer's predictions [B, C, h, w], after those with the negative prompts if guided."""
    x, halves = run.inputs()
    timestep = run.modulation.select(slice(run.index, run.index + 1))
    predictions = []
    for i, half in enumerate(halves):
        with run.caching(i):
            rows = torch.cat([x] * half.copies)
            predictions.append(run.call(rows, timestep=timestep, return_dict=False, **half.arguments)[0])
    if run.transformer is not unwrapped(run.transformer):  # the next call of a compiled model may overwrite its output
        predictions = [prediction.clone() for prediction in predictions]
    # Channels beyond those of the latents are a learned variance.
    return torch.cat(predictions)[:, : x.shape[1]].to(run.latents.dtype)


def predict_together(runs: Sequence[Run]) -> list[Tensor]:
    """The same for several runs of one transformer, in one forward pass."""
    images: list[Tensor] = []
    contexts, modulations, references, counts = [], [], [], []
    for run in runs:
        x, halves = run.inputs()
        for half in halves:
            count = half.copies * len(x)
            images += [*x] * half.copies
            contexts.append(half.arguments["encoder_hidden_states"])
            references.append((half.arguments.get("kv_caches"), count))
            modulations.append(run.modulation.select([run.index] * count))
        counts.append(sum(half.copies for half in halves) * len(x))
    some = next((seen for seen, _ in references if seen is not None), None)
    joined = {} if some is None else {"kv_caches": type(some).of_images(references)}
    context, timestep = type(contexts[0]).concat(contexts), type(modulations[0]).concat(modulations)
    outputs = iter(runs[0].transformer(images, context, timestep=timestep, return_dict=False, **joined)[0])
    found = [torch.stack([next(outputs) for _ in range(count)]) for count in counts]
    return [one[:, : run.latents.shape[1]].to(run.latents.dtype) for one, run in zip(found, runs, strict=True)]


@torch.no_grad()
def denoising_steps(pipe: Any, begin: Callable[[], Run]) -> Generator[DenoisingStep, None, None]:
    """The generator of steps. Other loops and calls may run between them.

    Args:
        begin: called once the transformer is in place.
    """
    call, transformer, scheduler = calling.get(), pipe._require("transformer"), pipe.scheduler
    if call is None or call.pipe is not pipe or call.steps is not None:
        call = Call(pipe)  # the loop is driven by the caller
    with call.registered(), pipe.placement.keeping(transformer):
        adapt(transformer)
        with pipe.placement.using(transformer):
            run = begin()
        call.guidance_scale, call.steps = run.guidance_scale, run.end - run.start
        try:
            while run.index < run.end and not call.interrupted:
                if call.guidance_scale != run.guidance_scale:
                    run.guide(call.guidance_scale)
                index, call.timestep = run.index, run.scheduler.timesteps[run.index]
                advance([run])
                step = DenoisingStep(index - run.start, call.steps, call.timestep, run.latents, run.embeds)
                yield step
                run.latents = step.latents
                if step.embeds is not run.embeds:
                    run.use(step.embeds)
            show_schedule(run.scheduler, scheduler)  # a loop that is left may be collected anywhere
        finally:
            call.timestep = None


def drive(pipe: Any, loop: Generator[DenoisingStep, None, None], latents: Tensor, request: Request) -> Tensor:
    """Run a loop to its end or to an interruption, with a progress bar and the callbacks of a request.

    Returns:
        the last latents [B, C, h, w]; the given ones if there was no step.
    """
    order = getattr(pipe.scheduler, "order", 1)
    steps = request.schedule.taken
    with pipe.progress_bar(total=steps) as progress, closing(loop):
        for step in loop:
            if request.on_step_end is not None:
                call_back(pipe, step, request.on_step_end, request.on_step_end_names)
            latents = step.latents
            done = step.index + 1
            warm_up = max(step.count - steps * order, 0)  # calls before the first step (PNDM has some)
            if done == step.count or (done > warm_up and done % order == 0):
                progress.update()
                if request.callback is not None and step.index % request.callback_steps == 0:
                    request.callback(step.index // order, step.timestep, latents)
    return latents


#: Held while a pipeline's scheduler is copied or its schedule shown: a dictionary may not grow while it is copied.
SHOWING = threading.Lock()


def own_scheduler(scheduler: Any, device: torch.device, start: int = 0, **arguments: Any) -> Any:
    """A copy of a scheduler for one run, with its timesteps set.

    Args:
        start: the index of the first timestep that is used.
        arguments: for ``set_timesteps``.
    """
    with SHOWING:
        # A function that someone has assigned in place of a method is about this very object: then the run uses it.
        is_changed = any(callable(getattr(type(scheduler), name, None)) for name in vars(scheduler))
        own = scheduler if is_changed else copy.deepcopy(scheduler)
    own.set_timesteps(device=device, **arguments)
    if hasattr(own, "set_begin_index"):  # otherwise the first step is looked up: ambiguous if timesteps repeat
        own.set_begin_index(start)
    show_schedule(own, scheduler)
    return own


def noised(scheduler: Any, latents: Tensor, noise: Tensor, index: int) -> Tensor:
    """Latents [B, C, h, w] of an image with the noise of step ``index``."""
    t = scheduler.timesteps[index : index + 1]
    if hasattr(scheduler, "add_noise"):
        result: Tensor = scheduler.add_noise(latents, noise, t)
    else:  # flow matching of other libraries
        result = scheduler.scale_noise(latents, t, noise)
    return result.to(latents.dtype)


def first_deviation(scheduler: Any) -> Any:
    """The standard deviation of the first sample; flow matching of other libraries does not state its 1."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def first_latents(scheduler: Any, noise: Tensor, edit: Edit | None, start: int) -> tuple[Tensor, Known | None]:
    """What a run starts from, and what it keeps.

    Args:
        noise: [B, C, h, w] of variance 1.
        start: the index of the first step.
    """
    if edit is None:
        return noise * first_deviation(scheduler), None
    if start >= len(scheduler.timesteps):
        raise InputError(f"strength={edit.strength} leaves no step of this schedule; give a larger one")
    check_tensor("edit.latents", edit.latents, noise.shape)
    if edit.mask is not None:
        rows = 1 if len(edit.mask) == 1 else len(noise)
        check_tensor("edit.mask", edit.mask, (rows, 1, *noise.shape[2:]))
    image = edit.latents.to(noise)
    known = None if edit.mask is None else Known(image, noise, edit.mask.to(noise))
    if known is not None and edit.strength == 1.0:  # what is repainted owes nothing to the image
        return noise * first_deviation(scheduler), known
    return noised(scheduler, image, noise, start), known


def show_schedule(own: Any, scheduler: Any) -> None:
    """Show the schedule of the last run on the pipeline's scheduler. No run reads what is written here."""
    with SHOWING:
        for name in ("timesteps", "sigmas", "num_inference_steps"):
            if hasattr(own, name):
                setattr(scheduler, name, copy.deepcopy(getattr(own, name)))


def step_options(scheduler: Any, **options: Any) -> dict[str, Any]:
    """The options that the scheduler's ``step`` takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in accepted}
