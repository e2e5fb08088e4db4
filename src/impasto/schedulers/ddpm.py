"""DDPM: denoising diffusion probabilistic models (arXiv 2006.11239), ancestral sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Offset, Scale, Share, Steps
from ..errors import InputError
from ..nn.noise import draw_noise
from ..nn.outputs import BaseOutput
from . import process
from .base import Scheduler
from .compat import DDPMNames
from .config import Prediction, Spacing, records_arguments
from .noise_schedule import custom_timesteps, spaced_timesteps

Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


@dataclass
class DDPMSchedulerOutput(BaseOutput):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], x_{t-1}
    pred_original_sample: Tensor | None = None  # [B, C, H, W], the predicted x_0


class DDPMScheduler(DDPMNames, Scheduler):
    """Ancestral sampling: every step adds new noise. Steps can be taken in any order.

    Args:
        num_train_timesteps: T, the number of timesteps the model was trained on.
        beta_start, beta_end, beta_schedule: the training noise schedule: linear, scaled_linear, squaredcos_cap_v2,
            sigmoid or laplace.
        trained_betas: [T], used instead of these.
        variance_type: of the added noise: fixed_small (the posterior's; also None), fixed_large (beta), either with
            ``_log`` and the same meaning, learned (the model's second half of channels is the variance),
            learned_range (it interpolates between the logarithms of both).
        clip_sample, clip_sample_range: clip the predicted x_0 to [-range, range]; not for latents.
        prediction_type: what the model predicts: epsilon, sample or v_prediction.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding instead of clipping.
        timestep_spacing: leading, trailing or linspace.
        steps_offset: added to ``leading`` timesteps.
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
        variance_type: Variance | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: Share = 0.995,
        clip_sample_range: Scale = 1.0,
        sample_max_value: Scale = 1.0,
        timestep_spacing: Spacing = "leading",
        steps_offset: Offset = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        self._make_tables("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
        self.variance_type = variance_type or "fixed_small"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Space ``num_inference_steps`` over the training schedule, or take the given ``timesteps``.

        Raises:
            InputError: both or neither; a number of steps out of range; timesteps that do not descend.
        """
        self._one_of(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is not None:
            schedule = custom_timesteps(timesteps, len(self), whole=True)
        else:
            steps, config = self._count_steps(num_inference_steps), self.config
            schedule = spaced_timesteps(config.timestep_spacing, steps, len(self), config.steps_offset)
        self._set_timesteps(schedule, device)
        self.custom_timesteps = timesteps is not None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor | None, ...]:
        """x_t -> x_{t-1}.

        Args:
            model_output: [B, C, H, W], the model's prediction at ``timestep``; [B, 2 C, H, W] with a learned variance.
            timestep: one of ``timesteps``; before ``set_timesteps``, any training timestep.
            sample: [B, C, H, W], x_t.
            generator: for the noise; a list has one per sample.
            return_dict: False returns a plain tuple.

        Raises:
            InputError: a timestep that is not in the schedule, shapes that do not fit.
        """
        process.require_tensors(model_output=model_output, sample=sample)
        learned = None
        doubled = min(sample.ndim, model_output.ndim) > 1 and model_output.shape[1] == 2 * sample.shape[1]
        if self.variance_type in ("learned", "learned_range") and doubled:
            model_output, learned = model_output.chunk(2, dim=1)
        output, x, dtype = process.widened(model_output, sample)
        t, _ = self._locate(timestep)
        q, levels = self._posterior(timestep), process.alpha_sigma(self._alpha_bar(t))
        original = process.predicted_original(self.config.prediction_type, output, x, *levels)
        original = process.limit(original, self.config)
        x = q.on_original * original + q.on_sample * x
        if t > 0:
            noise = draw_noise(sample.shape, generator, sample.device, model_output.dtype)
            x = x + self._std(q, learned) * noise
        result = DDPMSchedulerOutput(x.to(dtype), original.to(dtype))
        return result if return_dict else result.to_tuple()

    def _posterior(self, timestep: int | Tensor) -> process.Posterior:
        """That of the step from this timestep."""
        previous = self._previous(timestep)
        previous_bar = self._alpha_bars[previous] if previous >= 0 else torch.tensor(1.0)
        return process.posterior(self._alpha_bar(self._locate(timestep)[0]), previous_bar)

    def _std(self, q: process.Posterior, learned: Tensor | None) -> Tensor:
        """The standard deviation of the noise that a step adds (section 3.2)."""
        variance = q.variance.clamp(min=1e-20)  # it is 0 at t = 0, and its logarithm is needed
        if self.variance_type in ("fixed_small", "fixed_small_log"):
            return variance.sqrt()
        if self.variance_type in ("fixed_large", "fixed_large_log"):
            return q.beta.sqrt()
        if learned is None:
            raise InputError(
                f"variance_type={self.variance_type!r} needs a model_output with twice the sample's channels: the "
                f"prediction and then the variance; pass both, or build the scheduler with variance_type='fixed_small'"
            )
        learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
        if self.variance_type == "learned":
            return learned.sqrt()
        return torch.exp(0.5 * process.learned_log_variance(learned, q.beta.log(), variance.log()))
