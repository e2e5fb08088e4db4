"""Callbacks for ``callback_on_step_end``, with the interface of those of diffusers, which work too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from .checkpoints.config import Configurable, records_config
from .checkpoints.values import Bounds, Share
from .errors import ConfigurationError, InputError

StepIndex = Annotated[int, Bounds(0, 2**31 - 1)]
Tensors = dict[str, Any]


class PipelineCallback(Configurable):
    """A callback that acts at one step. A subclass has ``tensor_inputs`` and ``callback_fn``.

    Args:
        cutoff_step_ratio: the step, as a fraction of all steps.
        cutoff_step_index: the step itself; give either this or the fraction, and None for the other.
    """

    #: The names of the tensors that the callback takes.
    tensor_inputs: ClassVar[list[str]]

    @records_config
    def __init__(self, cutoff_step_ratio: Share | None = 1.0, cutoff_step_index: StepIndex | None = None):
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ConfigurationError("give either cutoff_step_ratio or cutoff_step_index, and None for the other")

    def cutoff_step(self, pipeline: Any) -> int:
        """The index of the step at which the callback acts."""
        index, ratio = self.config.cutoff_step_index, self.config.cutoff_step_ratio
        return int(pipeline.num_timesteps * ratio) if index is None else int(index)

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Tensors) -> Tensors:
        """What to do after a step; returns the tensors that replace those of the run."""
        raise NotImplementedError(f"{type(self).__name__} needs a method callback_fn")

    def __call__(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors) -> Tensors:
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)


class MultiPipelineCallbacks:
    """Several callbacks, one after the other; each gets what those before it returned, or else the run's."""

    def __init__(self, callbacks: Sequence[Any]):
        for callback in callbacks:
            if not callable(callback) or not hasattr(callback, "tensor_inputs"):
                raise InputError(f"a {type(callback).__name__} is no callback with tensor_inputs; see PipelineCallback")
        self.callbacks = list(callbacks)

    @property
    def tensor_inputs(self) -> list[str]:
        """The names of the tensors that the callbacks take."""
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors) -> Tensors:
        for callback in self.callbacks:
            callback_kwargs = {**callback_kwargs, **(callback(pipeline, step_index, timestep, callback_kwargs) or {})}
        return callback_kwargs


class SDCFGCutoffCallback(PipelineCallback):
    """Turns guidance off at a step; the steps after it take half the time."""

    tensor_inputs: ClassVar[list[str]] = ["prompt_embeds"]

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Tensors) -> Tensors:
        if step_index != self.cutoff_step(pipeline):
            return callback_kwargs
        embeds = callback_kwargs["prompt_embeds"]
        positive = embeds.chunk(2)[1] if pipeline.do_classifier_free_guidance else embeds
        pipeline._guidance_scale = 0.0
        return {**callback_kwargs, "prompt_embeds": positive}
