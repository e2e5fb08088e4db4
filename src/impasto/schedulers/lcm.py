"""LCM: multistep sampling of latent consistency models (arXiv 2310.04378, algorithm 3)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Count, Offset, Scale, Share, Steps
from ..checks import finite, whole_number
from ..errors import InputError
from ..nn.noise import draw_noise
from ..nn.outputs import BaseOutput
from .base import CountingScheduler
from .config import Prediction, Spacing, records_arguments
from .noise_schedule import custom_timesteps
from .process import add_noise, alpha_sigma, boundary_scalings, limit, predicted_original, widened

logger = logging.getLogger("impasto")


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], the next, less noisy sample
    denoised: Tensor | None = None  # [B, C, H, W], the output of the consistency function


class LCMScheduler(CountingScheduler):
    """Predict the clean sample, add the noise of the next timestep, repeat.

    Args:
        num_train_timesteps: T, the number of timesteps the model was trained on.
        beta_start, beta_end, beta_schedule: the training noise schedule: linear, scaled_linear or squaredcos_cap_v2.
        trained_betas: [T], used instead of these.
        original_inference_steps: the length of the distillation schedule, from which timesteps are picked.
        clip_sample, clip_sample_range: clip the predicted x_0 to [-range, range]; not for latents.
        set_alpha_to_one, steps_offset, timestep_spacing: have no effect.
        prediction_type: what the model predicts: epsilon, sample or v_prediction.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding instead of clipping.
        timestep_scaling: how fast the boundary condition fades with the timestep.
        rescale_betas_zero_snr: make the last training timestep pure noise.

    Raises:
        ConfigurationError: a value that cannot be used.
    """

    sigma_data = 0.5  # the standard deviation of data that the boundary condition assumes

    @records_arguments
    def __init__(
        self,
        num_train_timesteps: Steps = 1000,
        beta_start: Share = 0.00085,
        beta_end: Share = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[Share] | np.ndarray[Any, Any] | None = None,
        original_inference_steps: Count = 50,
        clip_sample: bool = False,
        clip_sample_range: Scale = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: Offset = 0,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: Share = 0.995,
        sample_max_value: Scale = 1.0,
        timestep_spacing: Spacing = "leading",
        timestep_scaling: Scale = 10.0,
        rescale_betas_zero_snr: bool = False,
    ):
        self._make_tables("linear", "scaled_linear", "squaredcos_cap_v2")
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self._alpha_bars[0]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Pick ``num_inference_steps`` from the distillation schedule, or take the given ``timesteps``.

        Args:
            original_inference_steps: the length of the distillation schedule; the config's by default.
            strength: the fraction of the schedule to use, in (0, 1]; image to image uses less than 1.

        Raises:
            InputError: both or neither; more steps than the distillation schedule has; timesteps that do not descend.
        """
        self._one_of(num_inference_steps=num_inference_steps, timesteps=timesteps)
        given = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        original = whole_number("original_inference_steps", given, most=len(self))
        strength = finite("strength", strength, most=1, above=0)
        distilled = np.arange(1, int(original * strength) + 1) * (len(self) // original) - 1  # ascending
        if timesteps is not None:
            schedule = custom_timesteps(timesteps, len(self), whole=True)
            others = sorted(set(schedule.tolist()) - set(distilled.tolist()), reverse=True)
            if others:
                logger.warning("LCMScheduler: the model was not distilled at timesteps %s; expect artefacts", others)
            schedule = schedule[len(schedule) - int(len(schedule) * strength) :]
            if len(schedule) == 0:
                raise InputError(f"strength={strength} leaves none of {len(timesteps)} timesteps; raise it")
        else:
            steps = self._count_steps(num_inference_steps)
            if steps > len(distilled):
                raise InputError(
                    f"num_inference_steps={steps} is more than the {len(distilled)} steps of the distillation schedule "
                    f"(original_inference_steps={original} times strength={strength}); use fewer"
                )
            picked = np.linspace(0, len(distilled), num=steps, endpoint=False).astype(np.int64)
            schedule = distilled[::-1][picked]
        self._set_timesteps(schedule, device)
        self.custom_timesteps = timesteps is not None

    def get_scalings_for_boundary_condition_discrete(self, timestep: int | float) -> tuple[float, float]:
        """The weights of x_t and x_0 in the consistency function."""
        return boundary_scalings(timestep, self.config.timestep_scaling, self.sigma_data)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor | None, ...]:
        """x_t -> the sample at the next timestep; after the last step, the clean sample.

        Args:
            model_output: [B, C, H, W], the model's prediction at ``timestep``.
            timestep: one of ``timesteps``.
            sample: [B, C, H, W], x_t.
            generator: for the noise; a list has one per sample.
            return_dict: False returns a plain tuple.

        Raises:
            InputError: no schedule yet, all steps taken, a timestep out of range, shapes that differ.
        """
        index = self._this_step(timestep)
        output, x, dtype = widened(model_output, sample)
        t, _ = self._locate(timestep)
        bar = self._alpha_bar(t)
        original = limit(predicted_original(self.config.prediction_type, output, x, *alpha_sigma(bar)), self.config)

        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
        denoised = c_skip * x + c_out * original

        x = denoised
        if index + 1 < len(self._timestep_values):
            next_bar = self._alpha_bar(self._timestep_values[index + 1])
            noise = draw_noise(sample.shape, generator, sample.device, dtype)
            x = add_noise(denoised, noise, *alpha_sigma(next_bar))
        self._step_index = index + 1
        result = LCMSchedulerOutput(x.to(dtype), denoised.to(dtype))
        return result if return_dict else result.to_tuple()
