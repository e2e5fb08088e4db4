"""Sampling schedules as pure functions: timesteps, noise levels, and conversions between them.

A *noise level* ("sigma" in the arrays of this file) is the ratio sigma_t / alpha_t (Karras et al., arXiv 2206.00364).
Tables are float32, as they were in the training of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.frozen import Config
from ..checks import shown
from ..errors import ConfigurationError, InputError

Array = NDArray[Any]
Levels = TypeVar("Levels", Array, Tensor)
#: The longest list of timesteps or noise levels that is accepted.
MOST_NUMBERS = 100_000


def spaced_timesteps(
    spacing: str, steps: int, train_steps: int, offset: int = 0, *, last: int | None = None, skip_lowest: bool = False
) -> Array:
    """Descending whole timesteps, [steps] (arXiv 2305.08891, table 2).

    Args:
        spacing: ``linspace``, ``leading`` or ``trailing``.
        offset: added to ``leading`` timesteps.
        last: one more than the highest timestep to use; ``train_steps`` by default.
        skip_lowest: space one more step and drop the lowest, for solvers whose final step goes beyond it.
    """
    last = train_steps if last is None else last
    count = steps + skip_lowest
    if spacing == "linspace":
        timesteps: Array = np.linspace(0, last - 1, count).round()[::-1][:steps]
    elif spacing == "leading":
        if last < count:
            raise InputError(
                f"num_inference_steps={steps} is too many for timestep_spacing='leading' with {last} timesteps; "
                f"use at most {last - skip_lowest}, or another spacing"
            )
        timesteps = (np.arange(count) * (last // count))[::-1][:steps] + offset
    else:
        assert spacing == "trailing"
        # For some numbers of steps (61, 103, ...), rounding makes arange one too long.
        timesteps = np.arange(last, 0, -train_steps / steps).round()[:steps] - 1
    if timesteps[0] >= train_steps:
        raise InputError(
            f"steps_offset={offset} moves the first of {steps} steps to timestep {int(timesteps[0])}, beyond the "
            f"last one trained, {train_steps - 1}; use fewer steps, or another timestep_spacing"
        )
    return timesteps.astype(np.int64)


def custom_timesteps(timesteps: Sequence[float] | Tensor | Array, train_steps: int, *, whole: bool) -> Array:
    """Check a caller's timesteps: finite, in [0, train_steps), descending; with ``whole``, strictly and in integers."""
    values = numbers("timesteps", timesteps)
    listed = shown(values.tolist())
    if not np.isfinite(values).all() or values.min() < 0 or values.max() >= train_steps:
        raise InputError(f"timesteps must lie between 0 and {train_steps - 1}; these are {listed}")
    steps = np.diff(values)
    if (steps > 0).any() or (whole and (steps == 0).any()):
        raise InputError(f"timesteps must be in descending order; these are {listed}")
    is_whole = bool((values == values.round()).all())
    if whole and not is_whole:
        raise InputError(f"timesteps must be whole numbers; these are {listed}")
    return values.astype(np.int64) if is_whole else values


def numbers(name: str, values: Sequence[float] | Tensor | Array) -> Array:
    """A caller's list of one or more numbers, possibly NaN or infinite, as [N] in float64."""
    try:
        listed = list(values.tolist() if isinstance(values, Tensor | np.ndarray) else values)
        if 0 < len(listed) <= MOST_NUMBERS and not any(isinstance(value, str | bytes | bool) for value in listed):
            return np.array([float(value) for value in listed], dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise InputError(f"{name} must be a list of one or more numbers, not {shown(values)}")


def descending(name: str, given: Sequence[float] | Tensor | Array, largest: float) -> Array:
    """Check a caller's numbers: strictly descending from ``largest`` or less to above 0; [N] in float32."""
    values = numbers(name, given).astype(np.float32)
    if not np.isfinite(values).all() or values.min() <= 0 or values.max() > largest or (np.diff(values) >= 0).any():
        raise InputError(f"{name} must descend from {largest:g} or less to above 0; these are {shown(values.tolist())}")
    return values


def noise_levels(alphas_cumprod: Tensor) -> Array:
    """sigma_t / alpha_t of every training timestep, ascending, [T]."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def timesteps_to_sigmas(timesteps: Array, table: Array) -> Array:
    """Noise levels at timesteps; linear interpolation between whole ones."""
    return np.interp(timesteps, np.arange(len(table)), table)


def sigmas_to_timesteps(sigmas: Array, table: Array) -> Array:
    """Fractional timesteps of noise levels, interpolated in log sigma and clipped to the table."""
    log_table = np.log(table)
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    # The last level that is not above; with rescale_betas_zero_snr the table may fall at its end.
    ascending = np.minimum.accumulate(log_table[::-1])[::-1]
    low = np.clip(np.searchsorted(ascending, log_sigmas, side="right") - 1, 0, len(table) - 2)
    weight = np.clip((log_table[low] - log_sigmas) / (log_table[low] - log_table[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))


def karras_sigmas(largest: float, smallest: float, steps: int, rho: float = 7.0) -> Array:
    """Equally spaced in sigma^(1/rho) (arXiv 2206.00364, eq. 5)."""
    high, low = math.pow(largest, 1 / rho), math.pow(smallest, 1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


def exponential_sigmas(largest: float, smallest: float, steps: int) -> Array:
    """Equally spaced in log sigma."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def lu_sigmas(table: Array, steps: int) -> Array:
    """Equally spaced in lambda = -log sigma, from the float32 table of logarithms (arXiv 2206.00927, section 3.4)."""
    log_table = np.log(table)
    return np.exp(karras_sigmas(float(log_table[-1]), float(log_table[0]), steps, rho=1.0))


def beta_sigmas(largest: float, smallest: float, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Spaced by the quantiles of a Beta distribution, by default denser at both ends (arXiv 2407.12173)."""
    quantiles = beta_quantiles(1 - np.linspace(0, 1, steps), alpha, beta)
    return smallest + quantiles * (largest - smallest)


def beta_quantiles(probabilities: Array, alpha: float, beta: float) -> Array:
    """The inverse of the distribution function of Beta(alpha, beta), to float64 rounding, without SciPy."""
    middle = _beta_probability(np.array([0.5]), alpha, beta)[0]
    upper = 1 - _lower_beta_quantiles(np.minimum(1 - probabilities, 1 - middle), beta, alpha)
    return np.where(probabilities <= middle, _lower_beta_quantiles(probabilities, alpha, beta), upper)


def _lower_beta_quantiles(probabilities: Array, a: float, b: float) -> Array:
    """Those up to 1/2, by bisection."""
    below, above = np.zeros_like(probabilities), np.full_like(probabilities, 0.5)
    for _ in range(60):
        x = (below + above) / 2
        too_low = _beta_probability(x, a, b) < probabilities
        below, above = np.where(too_low, x, below), np.where(too_low, above, x)
    return np.where(probabilities == 0, 0.0, (below + above) / 2)


def _beta_probability(x: Array, a: float, b: float) -> Array:
    """The distribution function of Beta(a, b) at x <= 1/2, where its series converges like 2^-n."""
    # I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) · sum_n prod_{k<n} (a + b + k) / (a + 1 + k) x^n
    order = np.arange(200)
    factors = np.concatenate([[1.0], np.cumprod((a + b + order) / (a + 1 + order))])
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a))
    series = (factors * x[:, None] ** np.arange(201)).sum(axis=1)
    return np.asarray(scale * x**a * (1 - x) ** b * series)


#: A config's option -> the levels from the largest to the smallest; at most one may be set.
SPACINGS: dict[str, Callable[[float, float, int], Array]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def chosen_spacing(config: Config, *others: str) -> str | None:
    """The option of ``SPACINGS``, or of ``others``, that a config sets.

    Raises:
        ConfigurationError: it sets several.
    """
    chosen = [name for name in (*SPACINGS, *others) if config[name]]
    if len(chosen) > 1:
        raise ConfigurationError(f"{' and '.join(chosen)} contradict each other; set at most one of them")
    return chosen[0] if chosen else None


def shifted(sigmas: Levels, shift: float) -> Levels:
    """Sigmas in [0, 1] of a straight path, shifted towards noise (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(levels: Any, terminal: float) -> Any:
    """Levels of a straight path, stretched so that the last is ``terminal``."""
    return 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])


def flow_levels(sigmas: Array, shift: float, terminal: float | None, spacing: str | None) -> Array:
    """Sigmas of a straight path after shift, stretching to a terminal value and respacing, in float32."""
    levels = shifted(sigmas, shift)
    if terminal:
        if levels[-1] >= 1:
            raise InputError("shift_terminal needs a last level below 1; use two steps or more")
        levels = stretched(levels, terminal)
    if spacing is not None:
        levels = SPACINGS[spacing](float(levels[0]), float(levels[-1]), len(levels))
    return levels.astype(np.float32)


def flow_sigmas(steps: int, train_steps: int, shift: float) -> Array:
    """Sigmas in (0, 1), linear in time and then shifted, [steps]."""
    return np.flip(shifted(1.0 - np.linspace(1, 1 / train_steps, steps + 1), shift))[:-1].copy()
