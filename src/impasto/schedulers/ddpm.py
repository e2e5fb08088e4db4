"""DDPM: denoising diffusion probabilistic models (arXiv 2006.11239), ancestral sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Offset, Scale, Share, Steps
from ..checks import shown
from ..errors import InputError
from ..nn.noise import draw_noise
from ..nn.outputs import keyed
from .base import Scheduler, records_arguments
from .noise_schedule import custom_timesteps, spaced_timesteps
from .predictions import common_dtypes, dynamic_threshold, predicted_original, require_same_shape, require_tensors

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@keyed
class DDPMSchedulerOutput(NamedTuple):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], x_{t-1}
    pred_original_sample: Tensor | None = None  # [B, C, H, W], the x_0 that the model implies


class DDPMScheduler(Scheduler):
    """The sampler of the diffusion process itself: every step adds noise anew. A step depends only on its arguments.

    Args:
        num_train_timesteps: of the model's training.
        beta_start, beta_end, beta_schedule: the training noise: linear, scaled_linear, squaredcos_cap_v2,
            sigmoid or laplace.
        trained_betas: given instead, [num_train_timesteps].
        variance_type: of the noise a step adds: fixed_small (the posterior's; also None), fixed_large (beta), each
            also as ``_log`` with the same meaning, learned (the model's second half of channels is the variance),
            learned_range (it interpolates between the logarithms of both).
        clip_sample, clip_sample_range: whether and where predicted originals are clipped; not for latents.
        prediction_type: what the model predicts: epsilon, sample or v_prediction.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding instead of clipping.
        timestep_spacing: leading, trailing or linspace.
        steps_offset: added to ``leading`` timesteps.
        rescale_betas_zero_snr: let the last training timestep be pure noise.

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
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: Share = 0.995,
        clip_sample_range: Scale = 1.0,
        sample_max_value: Scale = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: Offset = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        self._require("variance_type", variance_type, (*VARIANCES, None))
        self._require("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        self._require("timestep_spacing", timestep_spacing, ("linspace", "leading", "trailing"))
        self._make_tables(
            ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
            beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas, rescale_betas_zero_snr,
        )  # fmt: skip
        self.variance_type = variance_type or "fixed_small"
        self.custom_timesteps = False

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
        device = self._check_device(device)
        self._one_of(num_inference_steps=num_inference_steps, timesteps=timesteps)
        config = self.config
        if timesteps is not None:
            schedule = custom_timesteps(timesteps, len(self), whole=True)
        else:
            assert num_inference_steps is not None
            steps = self._count_steps(num_inference_steps)
            schedule = spaced_timesteps(config.timestep_spacing, steps, len(self), config.steps_offset)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(schedule)
        self.timesteps = torch.from_numpy(schedule).to(device)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep after this one in the schedule; -1 after the last.

        Raises:
            InputError: the timestep is not in the schedule.
        """
        value, place = self._locate(timestep)
        if self.num_inference_steps is None:
            return int(value) - 1
        if place is None:
            raise InputError(f"timestep {shown(value)} is not in the schedule: {self._timestep_values}")
        return int(self._timestep_values[place + 1]) if place + 1 < len(self._timestep_values) else -1

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
            timestep: one, of ``timesteps``; without a schedule, any of training.
            sample: [B, C, H, W], x_t.
            generator: of the noise; a list has one for each sample.
            return_dict: whether to name the results; False gives a plain tuple of the same.

        Raises:
            InputError: a timestep that is not in the schedule, shapes that do not fit.
        """
        require_tensors(model_output=model_output, sample=sample)
        learned = None
        doubled = min(sample.ndim, model_output.ndim) > 1 and model_output.shape[1] == 2 * sample.shape[1]
        if self.variance_type in ("learned", "learned_range") and doubled:
            model_output, learned = model_output.chunk(2, dim=1)
        require_same_shape(model_output, sample)
        t, _ = self._locate(timestep)
        previous = self.previous_timestep(timestep)
        bar = self._alpha_bar(t)
        previous_bar = self._alpha_bars[previous] if previous >= 0 else torch.tensor(1.0)
        alpha = bar / previous_bar
        beta = 1 - alpha

        dtype, working = common_dtypes(sample, model_output)
        x, output = sample.to(working), model_output.to(working)
        config = self.config
        original = predicted_original(config.prediction_type, output, x, bar.sqrt(), (1 - bar).sqrt())
        if config.thresholding:
            original = dynamic_threshold(original, config.dynamic_thresholding_ratio, config.sample_max_value)
        elif config.clip_sample:
            original = original.clamp(-config.clip_sample_range, config.clip_sample_range)

        x_weight = alpha.sqrt() * (1 - previous_bar) / (1 - bar)
        x = previous_bar.sqrt() * beta / (1 - bar) * original + x_weight * x  # eq. 7, the posterior's mean
        if t > 0:
            posterior = ((1 - previous_bar) / (1 - bar) * beta).clamp(min=1e-20)  # eq. 7; its logarithm is taken below
            noise = draw_noise(sample.shape, generator, sample.device, model_output.dtype)
            x = x + self._std(beta, posterior, learned) * noise
        output_tuple = DDPMSchedulerOutput(x.to(dtype), original.to(dtype))
        return output_tuple if return_dict else tuple(output_tuple)

    def _std(self, beta: Tensor, posterior: Tensor, learned: Tensor | None) -> Tensor:
        """The standard deviation of the noise that a step adds (section 3.2)."""
        if self.variance_type in ("fixed_small", "fixed_small_log"):
            return posterior.sqrt()
        if self.variance_type in ("fixed_large", "fixed_large_log"):
            return beta.sqrt()
        if learned is None:
            raise InputError(
                f"variance_type={self.variance_type!r} needs a model_output with twice the sample's channels: the "
                f"prediction and then the variance; pass both, or build the scheduler with variance_type='fixed_small'"
            )
        learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
        if self.variance_type == "learned":
            return learned.sqrt()
        fraction = (learned + 1) / 2  # improved DDPM (arXiv 2102.09672), eq. 15
        return torch.exp(0.5 * (fraction * beta.log() + (1 - fraction) * posterior.log()))
