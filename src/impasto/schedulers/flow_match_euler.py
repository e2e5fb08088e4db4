"""Euler steps along the straight paths of flow matching (2210.02747; rectified flow, 2209.03003; SD3, 2403.03206).

A sample is x = (1 - σ) x_0 + σ noise, and the model predicts the velocity dx/dσ = noise - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Exponent, Scale, Share, Steps, Tokens
from ..checks import finite, shown
from ..errors import ConfigurationError, InputError
from ..nn.noise import draw_noise
from . import noise_schedule as schedules
from .base import CountingScheduler, SchedulerOutput, records_arguments
from .predictions import require_same_shape

_SPACINGS = {
    "use_karras_sigmas": schedules.karras_sigmas,
    "use_exponential_sigmas": schedules.exponential_sigmas,
    "use_beta_sigmas": schedules.beta_sigmas,
}


class FlowMatchEulerDiscreteScheduler(CountingScheduler):
    """Equal steps in time, of which a shift spends more where there is much noise: large pictures need that.

    Args:
        num_train_timesteps: T, the timestep of pure noise.
        shift: of all pictures, s: σ becomes s σ / (1 + (s - 1) σ) (2403.03206, eq. 23). 1 changes nothing.
        use_dynamic_shifting: shift by the ``mu`` that is given to ``set_timesteps`` for a size, instead.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: from which pipelines compute that ``mu``.
        invert_sigmas: count from the picture to the noise.
        shift_terminal: stretch the schedule so that its last σ above 0 is this one.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: space the levels of noise that way between the
            first and the last; one of them at most.
        time_shift_type: with mu, s is e^mu ("exponential") or mu itself ("linear").
        stochastic_sampling: draw new noise at each step around the predicted picture, instead of following the path.

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
            raise ConfigurationError("shift_terminal must be from 0 to below 1, not 1")
        chosen = [name for name in _SPACINGS if self.config[name]]
        if len(chosen) > 1:
            raise ConfigurationError(f"{' and '.join(chosen)} exclude each other: leave one")
        self._spacing = _SPACINGS[chosen[0]] if chosen else None
        self._shift = float(shift)
        levels = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1] / num_train_timesteps
        if not use_dynamic_shifting:
            levels = _shifted(levels, self._shift)
        self.sigma_min, self.sigma_max = float(levels[-1]), float(levels[0])
        self._set(levels, levels * num_train_timesteps, None, None)

    @property
    def shift(self) -> float:
        """That of all pictures, in use where shifting is not dynamic."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Use another shift from the next ``set_timesteps`` on."""
        self._shift = finite("shift", shift, most=1e6, above=0)

    # --- the schedule ---

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
            num_inference_steps: how many; may be left out where sigmas or timesteps tell.
            device: of ``timesteps``.
            sigmas: levels of noise from 1 down, before they are shifted.
            mu: of this picture's size, with ``use_dynamic_shifting``; without it, it has no effect.
            timesteps: what the model is told; with sigmas, or without: then σ is timestep / T, before the shift.

        Raises:
            InputError: nothing to choose by, lists of different lengths or of other numbers, or mu missing.
        """
        device = self._check_device(device)
        if self.config.use_dynamic_shifting and mu is None:
            raise InputError("this scheduler shifts by the size of a picture (use_dynamic_shifting): give mu")
        total = self.config.num_train_timesteps
        told = None if timesteps is None else _checked("timesteps", timesteps, total)
        chosen = None if sigmas is None else _checked("sigmas", sigmas, 1)
        lengths = {len(given) for given in (chosen, told) if given is not None}
        if num_inference_steps is not None:
            lengths.add(self._count_steps(num_inference_steps))
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"set_timesteps was told of {' and '.join(map(str, sorted(lengths))) or 'no'} steps; give "
                f"num_inference_steps, or sigmas, or timesteps, and as many of each"
            )
        steps = lengths.pop()
        if chosen is not None:
            levels = chosen
        elif told is not None:
            levels = told / np.float32(total)
        else:
            levels = np.linspace(self.sigma_max * total, self.sigma_min * total, steps) / total

        if mu is not None and self.config.use_dynamic_shifting:
            exponential = self.config.time_shift_type == "exponential"
            mu = finite("mu", mu, -20, 20) if exponential else finite("mu", mu, 1e-6, 1e6)
            levels = self.time_shift(mu, 1.0, levels)
        else:
            levels = _shifted(levels, self._shift)
        if self.config.shift_terminal:
            if levels[-1] >= 1:
                raise InputError("shift_terminal needs a last level below 1: give two steps or more")
            levels = self.stretch_shift_to_terminal(levels)
        if self._spacing is not None:
            levels = self._spacing(float(levels[0]), float(levels[-1]), steps)
        levels = levels.astype(np.float32)
        if self.config.invert_sigmas:
            levels, told = 1 - levels, None
        self._set(levels, levels * np.float32(total) if told is None else told, steps, device)

    def _set(
        self, levels: schedules.Array, timesteps: schedules.Array, steps: int | None, device: str | torch.device | None
    ) -> None:
        last = [] if steps is None else [1.0 if self.config.invert_sigmas else 0.0]
        self.sigmas = torch.from_numpy(np.append(levels, last).astype(np.float32))  # stays where reading is free
        self._levels: list[float] = self.sigmas.tolist()
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.float32)).to(device)
        self.num_inference_steps = steps
        self._restart()

    def time_shift(self, mu: float, sigma: float, t: schedules.Array) -> schedules.Array:
        """Levels of noise t shifted by mu: s / (s + (1 / t - 1)^sigma) with s of ``time_shift_type``."""
        s = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        shifted: schedules.Array = s / (s + (1 / t - 1) ** sigma)
        return shifted

    def stretch_shift_to_terminal(self, t: schedules.Array) -> schedules.Array:
        """Levels of noise stretched away from 1 so that the last is ``shift_terminal``."""
        stretched: schedules.Array = 1 - (1 - t) * (1 - self.config.shift_terminal) / (1 - t[-1])
        return stretched

    # --- samples ---

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - σ) sample + σ noise.

        Args:
            sample, noise: [B, ...].
            timestep: of ``timesteps``: one, or [B], one for each sample.
        """
        times = torch.as_tensor(timestep).reshape(-1).tolist()
        if self._begin_index is None:
            places = [self._first_step(time) for time in times]
        else:
            places = [self._begin_index if self._step_index is None else self._step_index] * len(times)
        levels = torch.tensor([self._levels[place] for place in places], dtype=sample.dtype, device=sample.device)
        sigma = levels.reshape(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As ``scale_noise``; of samples [B, ...] at timesteps [B] of the schedule."""
        return self.scale_noise(original_samples, timesteps, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """noise - x_0, the same at all timesteps: what the model predicts."""
        require_same_shape(noise, sample)
        return noise - sample

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
        """The sample at this step's level of noise -> at the next one.

        Args:
            model_output: the velocity, of the sample's shape.
            timestep: of ``timesteps``; only the first one decides which step is taken, further ones follow it.
            sample: [B, C, H, W], or [B, N, C] with ``per_token_timesteps``.
            s_churn, s_tmin, s_tmax, s_noise: have no effect.
            generator: of stochastic sampling's noise; a list has one for each sample.
            per_token_timesteps: [B, N], where each token is on its path; each goes on to the schedule's next level.
            return_dict: whether to name the result; False gives a plain tuple of the same.

        Raises:
            InputError: no schedule yet, all steps taken, shapes that do not fit.
        """
        index = self._this_step(timestep)
        require_same_shape(model_output, sample)
        x = sample.float()  # small steps are lost in less
        sigma: float | Tensor = self._levels[index]
        following: float | Tensor = self._levels[index + 1]
        change: float | Tensor = self._levels[index + 1] - self._levels[index]
        if per_token_timesteps is not None:
            own = (per_token_timesteps / self.config.num_train_timesteps)[..., None]  # [B, N, 1]
            table = self.sigmas.to(own.device)
            lower = torch.where(table < own - 1e-6, table, 0.0).amax(-1, keepdim=True)  # [B, N, 1]
            sigma, following, change = own, lower, lower - own
        if self.config.stochastic_sampling:
            original = x - sigma * model_output
            noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
            x = (1.0 - following) * original + following * noise
        else:
            x = x + change * model_output
        self._step_index = index + 1
        if per_token_timesteps is None:
            x = x.to(model_output.dtype)
        return SchedulerOutput(x) if return_dict else (x,)


def _shifted(levels: schedules.Array, shift: float) -> schedules.Array:
    shifted: schedules.Array = shift * levels / (1 + (shift - 1) * levels)
    return shifted


def _checked(name: str, given: Sequence[float], largest: float) -> schedules.Array:
    values = schedules.numbers(name, given).astype(np.float32)
    if not np.isfinite(values).all() or values.min() <= 0 or values.max() > largest or (np.diff(values) >= 0).any():
        raise InputError(f"{name} must descend from {largest:g} or less to above 0; these are {shown(values.tolist())}")
    return values
