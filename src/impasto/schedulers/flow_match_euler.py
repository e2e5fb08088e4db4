"""Euler steps along the straight paths x = (1 - σ) x_0 + σ noise of flow matching (2210.02747, 2209.03003)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Exponent, Scale, Share, Steps, Tokens
from ..checks import MAX_STEPS, finite, whole_number
from ..errors import ConfigurationError, InputError
from ..nn.noise import draw_noise
from . import noise_schedule as schedules
from .base import CountingScheduler, SchedulerOutput
from .compat import FlowMatchNames
from .config import records_arguments
from .noise_schedule import Array
from .process import add_noise, per_sample, predicted_original, prediction_target, require_same_shape


class FlowMatchEulerDiscreteScheduler(FlowMatchNames, CountingScheduler):
    """Steps of equal length in time, shifted towards noise, where large images need more of them.

    Args:
        num_train_timesteps: T, the timestep of pure noise.
        shift: s; σ becomes s σ / (1 + (s - 1) σ) (SD3, 2403.03206, eq. 23). 1 changes nothing.
        use_dynamic_shifting: shift by the ``mu`` given to ``set_timesteps`` instead, which depends on the image size.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: pipelines compute ``mu`` from these.
        invert_sigmas: go from the image to the noise.
        shift_terminal: stretch the schedule so that its last σ above 0 has this value.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: at most one way to space the levels in between.
        time_shift_type: with mu, s is e^mu ("exponential") or mu ("linear").
        stochastic_sampling: add new noise to the predicted image at each step instead of following the path.

    Raises:
        ConfigurationError: a value that cannot be used.
    """

    @records_arguments
    def __init__(
        self,
        num_train_timesteps: Steps = 1000,
        shift: Scale = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: Exponent | None = 0.5,
        max_shift: Exponent | None = 1.15,
        base_image_seq_len: Tokens = 256,
        max_image_seq_len: Tokens = 4096,
        invert_sigmas: bool = False,
        shift_terminal: Share | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
    ):
        if shift_terminal == 1:
            raise ConfigurationError("shift_terminal must be at least 0 and below 1, not 1")
        self._spacing = schedules.chosen_spacing(self.config)
        self._shift = float(shift)
        levels = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1] / num_train_timesteps
        if not use_dynamic_shifting:
            levels = schedules.shifted(levels, self._shift)
        self.sigma_min, self.sigma_max = float(levels[-1]), float(levels[0])
        self._set(levels, levels * num_train_timesteps, None)
        self.num_inference_steps = None

    @property
    def shift(self) -> float:
        """The shift in use unless shifting is dynamic."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Use another shift from the next ``set_timesteps`` on."""
        self._shift = finite("shift", shift, most=1e6, above=0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the steps of sampling.

        Args:
            num_inference_steps: may be omitted if sigmas or timesteps are given.
            sigmas: descending from at most 1, before the shift.
            mu: the shift for this image size; no effect without ``use_dynamic_shifting``.
            timesteps: what the model receives. Without sigmas, σ is timestep / T before the shift.

        Raises:
            InputError: no number of steps or contradictory ones, values out of range, or mu missing.
        """
        if self.config.use_dynamic_shifting and mu is None:
            raise InputError("this scheduler shifts by the size of the image (use_dynamic_shifting); give mu")
        total = self.config.num_train_timesteps
        points = None if timesteps is None else schedules.descending("timesteps", timesteps, total)
        levels = None if sigmas is None else schedules.descending("sigmas", sigmas, 1)
        lengths = {len(given) for given in (levels, points) if given is not None}
        if num_inference_steps is not None:
            lengths.add(whole_number("num_inference_steps", num_inference_steps, 1, MAX_STEPS))
        if len(lengths) != 1:
            counts = " and ".join(map(str, sorted(lengths))) or "no"
            raise InputError(f"set_timesteps was given {counts} steps; give num_inference_steps, sigmas or timesteps")
        steps = lengths.pop()
        if levels is None:
            spaced = np.linspace(self.sigma_max * total, self.sigma_min * total, steps) / total
            levels = spaced if points is None else points / np.float32(total)
        shift = self._shift
        if mu is not None and self.config.use_dynamic_shifting:
            linear = self.config.time_shift_type == "linear"
            shift = finite("mu", mu, 1e-6, 1e6) if linear else math.exp(finite("mu", mu, -20, 20))
        levels = schedules.flow_levels(levels, shift, self.config.shift_terminal, self._spacing)
        if self.config.invert_sigmas:
            levels, points = 1 - levels, None
        points = levels * np.float32(total) if points is None else points
        self._set(np.append(levels, np.float32(self.config.invert_sigmas)), points, device)

    def _set(self, levels: Array, timesteps: Array, device: torch.device | str | None) -> None:
        self._set_timesteps(timesteps.astype(np.float32), device)
        self.sigmas = torch.from_numpy(levels.astype(np.float32))  # stays on the CPU

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - σ) sample + σ noise.

        Args:
            sample, noise: [B, ...].
            timestep: one of ``timesteps``, or [B], one per sample.
        """
        times = torch.as_tensor(timestep).reshape(-1).tolist()
        if self._begin_index is None:
            steps = [self._first_step(time) for time in times]
        else:
            steps = [self._begin_index if self._step_index is None else self._step_index] * len(times)
        sigma = per_sample(sample.new_tensor([float(self.sigmas[step]) for step in steps]), sample)
        return add_noise(sample, noise, 1.0 - sigma, sigma)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``scale_noise`` for samples [B, ...] at timesteps [B] of the schedule."""
        return self.scale_noise(original_samples, timesteps, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """noise - x_0, the model's target at all timesteps."""
        require_same_shape(noise, sample)
        return prediction_target("flow_prediction", sample, noise, 0.0, 1.0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generator | Sequence[Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at this step's noise level -> at the next one.

        Args:
            model_output: the velocity dx/dσ = noise - x_0, in the sample's shape.
            timestep: one of ``timesteps``. The first call determines the step; later calls take the following ones.
            sample: [B, C, H, W], or [B, N, C] with ``per_token_timesteps``.
            s_churn, s_tmin, s_tmax, s_noise: have no effect.
            generator: for the noise of stochastic sampling; a list has one per sample.
            per_token_timesteps: [B, N], each token's own timestep; each moves to the next lower level of the schedule.
            return_dict: False returns a plain tuple.

        Raises:
            InputError: no schedule yet, all steps taken, shapes that do not fit.
        """
        index = self._this_step(timestep)
        require_same_shape(model_output, sample)
        x = sample.float()  # lower precision would lose small steps
        sigma: float | Tensor = float(self.sigmas[index])
        following: float | Tensor = float(self.sigmas[index + 1])
        if per_token_timesteps is not None:
            sigma = own = (per_token_timesteps / self.config.num_train_timesteps)[..., None]  # [B, N, 1]
            table = self.sigmas.to(own.device)
            following = torch.where(table < own - 1e-6, table, 0.0).amax(-1, keepdim=True)  # [B, N, 1]
        if self.config.stochastic_sampling:
            original = predicted_original("flow_prediction", model_output, x, 1.0 - sigma, sigma)
            noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
            x = add_noise(original, noise, 1.0 - following, following)
        else:
            x = x + (following - sigma) * model_output
        self._step_index = index + 1
        x = x if per_token_timesteps is not None else x.to(model_output.dtype)
        return SchedulerOutput(x) if return_dict else (x,)
