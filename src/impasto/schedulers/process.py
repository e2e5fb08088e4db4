"""The diffusion process x_t = alpha x_0 + sigma noise: adding noise, prediction targets, and what a prediction implies.

This is the one parametrization that samplers and training losses share. alpha² + sigma² = 1 for models trained on
betas; alpha + sigma = 1 for flow matching.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.frozen import Config
from ..checks import finite, shown
from ..errors import InputError


def alpha_sigma(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of alphas_cumprod; in float32 at least, as 1 - alpha² vanishes in less."""
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to broadcast over ``like`` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(original: Tensor, noise: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """x_t of x_0 and noise."""
    return alpha * original + sigma * noise


def prediction_target(
    kind: str, original: Tensor, noise: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """What a model of prediction type ``kind`` is trained to return."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return original
    if kind == "v_prediction":
        return alpha * noise - sigma * original  # arXiv 2202.00512, appendix D
    assert kind == "flow_prediction"
    return noise - original  # dx/dsigma on the straight path, arXiv 2209.03003


def predicted_original(
    kind: str, prediction: Tensor, sample: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """x_0, given x_t and a prediction of type ``kind``."""
    if kind == "epsilon":
        return (sample - sigma * prediction) / alpha  # DDPM (arXiv 2006.11239) eq. 15
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return alpha * sample - sigma * prediction  # arXiv 2202.00512, appendix D
    assert kind == "flow_prediction"
    return sample - sigma * prediction


def predicted_noise(
    kind: str, prediction: Tensor, sample: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """The noise, given x_t and a prediction of type ``kind``."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (sample - alpha * prediction) / sigma
    assert kind == "v_prediction"
    return alpha * prediction + sigma * sample


def boundary_scalings(t: Any, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Any, Any]:
    """The weights of x_t and x_0 in a consistency function at timestep t, which make it the identity at t = 0
    (consistency models, arXiv 2303.01469, appendix C).

    Args:
        t: a number, or a tensor.
        timestep_scaling: how fast the boundary condition fades with the timestep.
        sigma_data: the standard deviation of data that is assumed.
    """
    scaled = t * timestep_scaling
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / total**0.5


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0), a normal distribution (DDPM, arXiv 2006.11239, eq. 7)."""

    on_original: Tensor  # the mean is on_original x_0 + on_sample x_t
    on_sample: Tensor
    variance: Tensor
    beta: Tensor  # of the step from t - 1 to t


def posterior(alpha_bar: Tensor, previous_alpha_bar: Tensor) -> Posterior:
    """The posterior between two values of alphas_cumprod, which need not be adjacent."""
    alpha = alpha_bar / previous_alpha_bar
    beta = 1 - alpha
    return Posterior(
        previous_alpha_bar.sqrt() * beta / (1 - alpha_bar),
        alpha.sqrt() * (1 - previous_alpha_bar) / (1 - alpha_bar),
        (1 - previous_alpha_bar) / (1 - alpha_bar) * beta,
        beta,
    )


def learned_log_variance(interpolation: Tensor, log_beta: Tensor, log_variance: Tensor) -> Tensor:
    """Between the posterior's (-1) and beta (1): the ``learned_range`` of improved DDPM (arXiv 2102.09672, eq. 15)."""
    fraction = (interpolation + 1) / 2
    return fraction * log_beta + (1 - fraction) * log_variance


def limit(original: Tensor, config: Config) -> Tensor:
    """Apply the scheduler's clipping or dynamic thresholding to x_0, if any. For pixels: latents have no range."""
    if config.thresholding:
        return thresholded(original, config)
    if config.get("clip_sample"):
        return original.clamp(-config.clip_sample_range, config.clip_sample_range)
    return original


def thresholded(original: Tensor, config: Config) -> Tensor:
    """Clip each sample to a quantile of its magnitudes, in [1, sample_max_value], and divide by it (Imagen, arXiv
    2205.11487, section 2.3)."""
    bound = torch.quantile(original.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)  # [B]
    bound = per_sample(bound.clamp(min=1.0, max=config.sample_max_value), original)
    return original.clamp(-bound, bound) / bound


def widened(prediction: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in at least float32, as differences of near-equal terms lose half precision's few digits, and the dtype of
    the step's result.

    Raises:
        InputError: other than two dense floating-point tensors of the same shape.
    """
    require_same_shape(prediction, sample)
    dtype = torch.promote_types(sample.dtype, prediction.dtype)
    working = torch.promote_types(dtype, torch.float32)
    return prediction.to(working), sample.to(working), dtype


def require_tensors(**given: object) -> None:
    """Raise InputError unless all arguments are tensors."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a tensor [B, ...], not {shown(value)}")


def require_timestep(timestep: int | float | Tensor) -> None:
    """Raise InputError if this cannot be a timestep, as far as can be seen without waiting for a device."""
    if not isinstance(timestep, Tensor):
        finite("timestep", timestep)
    elif timestep.numel() != 1:
        raise InputError(f"step takes one timestep for the whole batch, not shape {tuple(timestep.shape)}")
    elif timestep.is_meta or timestep.layout != torch.strided:
        raise InputError(f"timestep must be a number or a tensor that holds one, not {shown(timestep)}")


def require_same_shape(prediction: Tensor, sample: Tensor) -> None:
    """Raise InputError unless both are dense floating-point tensors of the same shape."""
    require_tensors(model_output=prediction, sample=sample)
    for name, tensor in (("model_output", prediction), ("sample", sample)):
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"{name} must be a dense floating-point tensor, not {tensor.dtype}")
    if prediction.shape != sample.shape:
        raise InputError(
            f"model_output has shape {tuple(prediction.shape)} and sample {tuple(sample.shape)}; they must be equal. "
            f"If the model also predicts a variance, pass the first half of the channels, or set variance_type."
        )
