"""Training schedules: betas, the variance of the noise that each training step adds, and tables made from them.

They are float32, as they were in the training of the published checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoints.frozen import Config
from ..checks import shown
from ..errors import ConfigurationError


def linear_betas(count: int, start: float, end: float) -> Tensor:
    """Equally spaced betas (DDPM, arXiv 2006.11239, section 4)."""
    return torch.linspace(start, end, count, dtype=torch.float32, device="cpu")


def scaled_linear_betas(count: int, start: float, end: float) -> Tensor:
    """Betas whose square roots are equally spaced (latent diffusion)."""
    return linear_betas(count, start**0.5, end**0.5) ** 2


def sigmoid_betas(count: int, start: float, end: float) -> Tensor:
    """Betas that rise from start to end along a sigmoid over [-6, 6]."""
    return torch.sigmoid(linear_betas(count, -6, 6)) * (end - start) + start


def betas_from_alpha_bar(count: int, alpha_bar: Callable[[float], float]) -> Tensor:
    """Discretize alphas_cumprod = alpha_bar(t), t in [0, 1], with betas of at most 0.999 (arXiv 2102.09672, 3.2)."""
    levels = [alpha_bar(step / count) for step in range(count + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(levels)]
    return torch.tensor(betas, dtype=torch.float32, device="cpu")


def cosine_betas(count: int, start: float, end: float) -> Tensor:
    """The cosine schedule (arXiv 2102.09672, eq. 17). start and end have no effect."""
    return betas_from_alpha_bar(count, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def laplace_betas(count: int, start: float, end: float) -> Tensor:
    """log-SNR by the quantiles of a Laplace distribution (arXiv 2407.03297). start and end have no effect."""

    def alpha_bar(t: float) -> float:
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    return betas_from_alpha_bar(count, alpha_bar)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": sigmoid_betas,
    "laplace": laplace_betas,
}


def training_betas(config: Config, *allowed: str) -> Tensor:
    """The betas of a scheduler's config, [num_train_timesteps].

    Args:
        allowed: the beta_schedules that the scheduler documents.

    Raises:
        ConfigurationError: another beta_schedule, betas outside [0, 1], or a schedule that adds no noise or leaves no
            signal.
    """
    count, trained = config.num_train_timesteps, config.trained_betas
    source = f"beta_start={config.beta_start!r}, beta_end={config.beta_end!r}" if trained is None else "trained_betas"
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float32, device="cpu")
        if betas.shape != (count,):
            raise ConfigurationError(
                f"trained_betas must hold num_train_timesteps={count} numbers; its shape is {tuple(betas.shape)}"
            )
    elif config.beta_schedule in allowed:
        betas = BETA_SCHEDULES[config.beta_schedule](count, config.beta_start, config.beta_end)
    else:
        options = ", ".join(map(repr, allowed))
        raise ConfigurationError(f"beta_schedule must be one of {options}, not {shown(config.beta_schedule)}")
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ConfigurationError(f"every beta must lie between 0 and 1; {source} gives others")
    if not 1.0 - betas[0] < 1 or not torch.prod(1.0 - betas[:-1]) > 0:
        raise ConfigurationError(
            f"{source} and num_train_timesteps={count} give a schedule whose first step adds no noise, or that leaves "
            f"no signal long before its end"
        )
    return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first stays (arXiv 2305.08891, alg. 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
