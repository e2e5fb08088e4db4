"""What a model predicted -> the picture or the noise it implies, for x_t = alpha x_0 + sigma noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import shown
from ..errors import InputError


def predicted_original(
    kind: str, prediction: Tensor, sample: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """x_0 from a prediction of the noise, of x_0, of v = alpha noise - sigma x_0, or of the flow noise - x_0."""
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
    """The noise, from a prediction of itself, of x_0, or of v."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (sample - alpha * prediction) / sigma
    assert kind == "v_prediction"
    return alpha * prediction + sigma * sample


def dynamic_threshold(original: Tensor, ratio: float, largest: float) -> Tensor:
    """Clip each sample to the ``ratio`` quantile of its magnitudes, in [1, largest], and divide by it.

    Saturated values move inwards (Imagen, arXiv 2205.11487, section 2.3). For pictures; latents have no range.
    """
    limit = torch.quantile(original.abs().flatten(1), ratio, dim=1).clamp(min=1.0, max=largest)  # [B]
    limit = limit.reshape(-1, *[1] * (original.ndim - 1))  # [B, 1, ...]
    return original.clamp(-limit, limit) / limit


def common_dtypes(sample: Tensor, prediction: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a step's result, and that of its arithmetic: float32 at least, as differences of
    near-equal terms lose half-precision's few digits."""
    result = torch.promote_types(sample.dtype, prediction.dtype)
    return result, torch.promote_types(result, torch.float32)


def require_tensors(**given: object) -> None:
    """Refuse what is not a tensor [B, ...]."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a tensor [B, ...], not {shown(value)}")


def require_same_shape(prediction: Tensor, sample: Tensor) -> None:
    require_tensors(model_output=prediction, sample=sample)
    for name, tensor in (("model_output", prediction), ("sample", sample)):
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor of floating-point numbers, not {tensor.dtype}")
    if prediction.shape != sample.shape:
        raise InputError(
            f"model_output has shape {tuple(prediction.shape)} and sample {tuple(sample.shape)}; they must be equal. "
            f"Of a model that also predicts a variance, pass the first half of the channels, or set variance_type."
        )
