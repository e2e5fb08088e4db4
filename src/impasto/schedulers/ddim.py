"""DDIM: denoising diffusion implicit models (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Offset, Scale, Share, Steps
from ..checks import finite
from ..errors import InputError
from ..nn.noise import draw_noise
from ..nn.outputs import BaseOutput
from .base import Scheduler
from .compat import DDIMNames
from .config import Prediction, Spacing, records_arguments
from .noise_schedule import spaced_timesteps
from .process import alpha_sigma, limit, posterior, predicted_noise, predicted_original, widened


@dataclass
class DDIMSchedulerOutput(BaseOutput):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], x_{t-1}
    pred_original_sample: Tensor | None = None  # [B, C, H, W], the predicted x_0


class DDIMScheduler(DDIMNames, Scheduler):
    """A deterministic sampler (``eta=0``) that becomes DDPM at ``eta=1``. Steps can be taken in any order.

    Args:
        num_train_timesteps: T, the number of timesteps the model was trained on.
        beta_start, beta_end, beta_schedule: the training noise schedule: linear, scaled_linear or squaredcos_cap_v2.
        trained_betas: [T], used instead of these.
        clip_sample, clip_sample_range: clip the predicted x_0 to [-range, range]; not for latents.
        set_alpha_to_one: the last step ends at zero noise; if False, at the noise of timestep 0.
        steps_offset: added to ``leading`` timesteps.
        prediction_type: what the model predicts: epsilon, sample or v_prediction.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding instead of clipping.
        timestep_spacing: leading, trailing or linspace.
        rescale_betas_zero_snr: make the last training timestep pure noise.

    Raises:
        ConfigurationError: a value that cannot be used.
    """

    @records_arguments
    def __init__(
        self,
        num_train_timesteps: Steps = 1000,
        beta_start: Share = 0.0001,
        beta_end: Share = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[Share] | np.ndarray[Any, Any] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: Offset = 0,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: Share = 0.995,
        clip_sample_range: Scale = 1.0,
        sample_max_value: Scale = 1.0,
        timestep_spacing: Spacing = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        self._make_tables("linear", "scaled_linear", "squaredcos_cap_v2")
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self._alpha_bars[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Space ``num_inference_steps`` timesteps over the training schedule.

        Raises:
            InputError: fewer than 1 or more than num_train_timesteps.
        """
        steps, config = self._count_steps(num_inference_steps), self.config
        self._set_timesteps(spaced_timesteps(config.timestep_spacing, steps, len(self), config.steps_offset), device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator | Sequence[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor | None, ...]:
        """x_t -> x_{t-1}.

        Args:
            model_output: [B, C, H, W], the model's prediction at ``timestep``.
            timestep: one of ``timesteps``.
            sample: [B, C, H, W], x_t.
            eta: from 0 (deterministic) to 1 (as random as DDPM).
            use_clipped_model_output: derive the noise from the clipped x_0.
            generator: for the noise that eta adds; a list has one per sample.
            variance_noise: that noise itself, instead of a generator.
            return_dict: False returns a plain tuple.

        Raises:
            InputError: no schedule yet, a timestep or an eta out of range, shapes that differ.
        """
        steps = self._require_timesteps()
        output, x, dtype = widened(model_output, sample)
        eta = finite("eta", eta, 0, 1)
        if eta > 0 and variance_noise is not None and generator is not None:
            raise InputError("give either generator or variance_noise, not both: each determines the noise")
        t, _ = self._locate(timestep)
        previous = t - len(self) // steps
        bar = self._alpha_bar(t)
        previous_bar = self._alpha_bars[int(previous)] if previous >= 0 else self.final_alpha_cumprod
        alpha, sigma = alpha_sigma(bar)

        kind = self.config.prediction_type
        original = limit(predicted_original(kind, output, x, alpha, sigma), self.config)
        noise = predicted_noise(kind, output, x, alpha, sigma)
        if use_clipped_model_output:
            noise = (x - alpha * original) / sigma

        variance = posterior(bar, previous_bar).variance
        std = eta * variance.clamp(min=0).sqrt()  # eq. 16
        direction = (1 - previous_bar - std**2).clamp(min=0).sqrt() * noise
        x = previous_bar.sqrt() * original + direction  # eq. 12
        if eta > 0:
            if variance_noise is None:
                variance_noise = draw_noise(sample.shape, generator, sample.device, model_output.dtype)
            x = x + std * variance_noise
        result = DDIMSchedulerOutput(x.to(dtype), original.to(dtype))
        return result if return_dict else result.to_tuple()
