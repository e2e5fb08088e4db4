"""Guidance in an interval only (Kynkäänniemi et al. 2024, 2404.07724): outside of it, half of the batch is skipped."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigurationError, InputError
from ..nn.changes import Handle

By = Literal["step", "noise"]


def guide_between(pipe: Any, start: float, end: float, by: By = "step") -> GuidanceInterval:
    """Let a pipeline use guidance only in an interval; elsewhere only the conditional half is computed.

    At high noise levels guidance makes the images of a prompt alike, and at low ones it has almost no effect; the paper
    finds better images without it at both ends. A step without guidance is half the work.

    Args:
        pipe: a pipeline.
        start, end: by "step", as fractions of the schedule: the steps i of n with start <= i / n < end are guided,
            so that (0, 1) is every step and (0.2, 0.8) leaves out the first and the last fifth. By "noise", as in
            the paper, noise levels σ, the standard deviation of the noise over that of the signal's factor,
            sqrt((1 - ᾱ) / ᾱ): the steps with start < σ <= end are guided, whatever their number; ``math.inf`` is
            allowed.
        by: the unit of start and end.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: not a valid interval, or not a pipeline with guidance.
        ConfigurationError: the pipeline already has an interval; or, when it generates, ``by="noise"`` is used with a
            scheduler that has no ᾱ (``alphas_cumprod``).
    """
    if by not in get_args(By):
        raise InputError(f"guide_between: by must be one of {', '.join(get_args(By))}, not {by!r}")
    highest = 1.0 if by == "step" else float("inf")
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, int | float) or not 0.0 <= value <= highest:
            raise InputError(f"guide_between: {name} must be a number from 0 to {highest:g}, not {value!r}")
    if start > end:
        raise InputError(f"guide_between: start {start:g} is above end {end:g}")
    if not hasattr(pipe, "guidance_interval"):
        raise InputError(f"guide_between takes a pipeline with guidance, not {type(pipe).__name__}")
    if pipe.guidance_interval is not None:
        raise ConfigurationError("this pipeline already has a guidance interval; remove() that one first")
    interval = pipe.guidance_interval = GuidanceInterval(pipe, start, end, by)
    return interval


class GuidanceInterval(Handle):
    """The handle of ``guide_between``."""

    def __init__(self, pipe: Any, start: float, end: float, by: By):
        self.start, self.end, self.by = start, end, by
        self._pipe = pipe

    def remove(self) -> None:
        """Guide the steps that the scheduler guides again: all, unless its config says otherwise."""
        if self._pipe.guidance_interval is self:
            self._pipe.guidance_interval = None

    def scales(self, scheduler: Any, scale: float) -> list[float]:
        """The guidance scale of each step, for a scheduler whose timesteps are set."""
        count = len(scheduler.timesteps)
        if self.by == "step":
            return [scale if self.start <= i / count < self.end else 1.0 for i in range(count)]
        sigmas = noise_levels(scheduler, scheduler.timesteps)
        return [scale if self.start < sigma <= self.end else 1.0 for sigma in sigmas]


def noise_levels(scheduler: Any, timesteps: Tensor) -> list[float]:
    """σ = sqrt((1 - ᾱ) / ᾱ) at timesteps; between whole timesteps log σ is linearly interpolated.

    Raises:
        ConfigurationError: the scheduler has no ᾱ.
    """
    alpha_bars = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alpha_bars, Tensor):
        raise ConfigurationError(
            f"{type(scheduler).__name__} has no alphas_cumprod to compute noise levels from; give the interval by steps"
        )
    if scheduler.config.get("use_flow_sigmas"):
        raise ConfigurationError(
            "this scheduler uses flow sigmas, whose noise levels are not those of ᾱ; give the interval by steps"
        )
    alpha_bars = alpha_bars.detach().to("cpu", torch.float64)
    logs = ((1 - alpha_bars) / alpha_bars).log() / 2  # inf if nothing is left of the signal
    t = timesteps.detach().to("cpu", torch.float64).clamp(0, len(logs) - 1)
    levels = torch.lerp(logs[t.floor().long()], logs[t.ceil().long()], t - t.floor())
    return [float(sigma) for sigma in torch.nan_to_num(levels, nan=torch.inf, posinf=torch.inf).exp()]  # inf - inf
