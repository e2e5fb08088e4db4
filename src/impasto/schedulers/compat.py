"""The rest of the documented surface of schedulers: what ports of diffusers code read and call.

The steps of solvers call none of these public names: overriding one does not change them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import shown
from ..errors import InputError
from . import noise_schedule as schedules
from . import process

#: Schedulers that take each other's configs.
COMPATIBLES = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
#: Arguments of schedulers of diffusers that are compatible with these, and that none of these has.
FOREIGN_KEYS = frozenset(
    "disable_corrector interpolation_type noise_sampler_seed predict_x0 rho shift_terminal sigma_data sigma_max "  # noqa: SIM905
    "sigma_min sigma_schedule skip_prk_steps solver_p timestep_type".split()
)


class SchedulerNames:
    """For all schedulers."""

    @property
    def compatibles(self) -> list[type]:
        """The classes of this package that are built from this scheduler's config without loss."""
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        package = import_module(__name__.split(".")[0])
        return [getattr(package, name) for name in COMPATIBLES] if cls.__name__ in COMPATIBLES else [cls]

    def previous_timestep(self: Any, timestep: int | Tensor) -> int | Tensor:
        """The timestep after this one in the schedule, a tensor with one number; -1 after the last.

        Without a schedule it is one less than the given one.

        Raises:
            InputError: the timestep is not in the schedule.
        """
        previous: int = self._previous(timestep)
        return previous if self.num_inference_steps is None else torch.tensor(previous)

    def _previous(self: Any, timestep: int | Tensor) -> int:
        value, index = self._locate(timestep)
        if self.num_inference_steps is None:
            return int(value) - 1
        if index is None:
            raise InputError(f"timestep {shown(value)} is not in the schedule: {self._timestep_values}")
        return int([*self._timestep_values, -1][index + 1])

    @classmethod
    def _is_expected(cls, name: str) -> bool:
        known = [cls._argument_names() for cls in cls._get_compatibles()]  # type: ignore[attr-defined]
        return cls.__name__ in COMPATIBLES and (name in FOREIGN_KEYS or any(name in names for names in known))

    def _threshold_sample(self: Any, sample: Tensor) -> Tensor:
        """Dynamic thresholding of x_0 as configured, whether or not it is switched on."""
        return process.thresholded(sample, self.config)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Values of the config are attributes, too, though ``scheduler.config`` is the place to read them."""
            if name.startswith("_") or name not in self.__dict__.get("_internal_dict", ()):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return self.config[name]


class CountingNames:
    """For schedulers that count steps."""

    def index_for_timestep(self: Any, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in the schedule or in another one; of several equal ones, the second.

        Raises:
            InputError: it is not in there.
        """
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        value = timestep.item() if isinstance(timestep, Tensor) else timestep
        found = [index for index, other in enumerate(schedule) if other == value]
        if not found:
            raise InputError(f"timestep {shown(value)} is not in the schedule: {shown(schedule)}")
        return found[:2][-1]


class SpacingNames(CountingNames):
    """For schedulers that space noise levels."""

    def _convert_to_karras(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        return schedules.karras_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps)

    def _convert_to_exponential(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        return schedules.exponential_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps)

    def _convert_to_beta(self, in_sigmas: Any, num_inference_steps: int, alpha: float = 0.6, beta: float = 0.6) -> Any:
        return schedules.beta_sigmas(float(in_sigmas[0]), float(in_sigmas[-1]), num_inference_steps, alpha, beta)


class DDIMNames:
    """For DDIM."""

    def _get_variance(self: Any, timestep: int, prev_timestep: int) -> Tensor:
        """The variance of the step between two timesteps, the second of which may be negative for the final one."""
        previous = self._alpha_bar(prev_timestep) if prev_timestep >= 0 else self.final_alpha_cumprod
        return process.posterior(self._alpha_bar(timestep), previous).variance


class DDPMNames:
    """For DDPM."""

    @property
    def one(self) -> Tensor:
        """alphas_cumprod after the last step: a tensor with 1."""
        return torch.tensor(1.0)

    def _get_variance(
        self: Any, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        """The variance of a step; the standard deviation for fixed_small_log, the logarithm for the other two of logs.

        Args:
            predicted_variance: what the model returned, for learned and learned_range.
            variance_type: the config's if not given.
        """
        q, kind = self._posterior(t), variance_type or self.variance_type
        small = q.variance.clamp(min=1e-20)
        if kind in ("learned", "learned_range"):
            if predicted_variance is None or kind == "learned":
                return predicted_variance
            return process.learned_log_variance(predicted_variance, q.beta.log(), small.log())
        fixed: dict[str, Tensor] = {
            "small": small,
            "small_log": small.sqrt(),
            "large": q.beta,
            "large_log": q.beta.log(),
        }
        return fixed[kind.removeprefix("fixed_")]


class FlowMatchNames(SpacingNames):
    """For flow matching."""

    def time_shift(self: Any, mu: float, sigma: float, t: Any) -> Any:
        """Times in (0, 1] shifted by ``mu`` (s / (s + (1 / t - 1)^sigma), s = e^mu or mu, as time_shift_type says)."""
        return getattr(self, f"_time_shift_{self.config.time_shift_type}")(mu, sigma, t)

    def _time_shift_exponential(self, mu: float, sigma: float, t: Any) -> Any:
        return self._time_shift_linear(np.exp(mu), sigma, t)

    def _time_shift_linear(self, mu: float, sigma: float, t: Any) -> Any:
        return mu / (mu + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self: Any, t: Any) -> Any:
        """Times stretched so that the last is shift_terminal.

        Raises:
            InputError: the config has no shift_terminal.
        """
        if self.config.shift_terminal is None:
            raise InputError("stretch_shift_to_terminal needs a scheduler with shift_terminal")
        return schedules.stretched(t, self.config.shift_terminal)

    def _sigma_to_t(self: Any, sigma: Any) -> Any:
        return sigma * self.config.num_train_timesteps


class DPMSolverNames(SpacingNames):
    """For DPM-Solver."""

    @property
    def model_outputs(self: Any) -> list[Tensor | None]:
        """The converted predictions of the last ``solver_order`` steps, the newest last; None where there is none."""
        outputs = [output for _, output in self._history]
        return [*[None] * (self.config.solver_order - len(outputs)), *outputs]

    @model_outputs.setter
    def model_outputs(self: Any, outputs: Sequence[Tensor | None]) -> None:
        present = [output for output in outputs if output is not None]
        if self._step_index is None:  # their levels are known with the first step
            self._history = [(math.nan, output) for output in present]
        else:
            self._history = self._outputs_before(present, self._step_index - 1, len(present))

    def _init_step_index(self: Any, timestep: int | float | Tensor) -> None:
        super()._init_step_index(timestep)  # type: ignore[misc]
        self.model_outputs = self.model_outputs  # of the steps before this one

    @property
    def lower_order_nums(self: Any) -> int:
        """How many of ``model_outputs`` there are."""
        return len(self._history)

    @lower_order_nums.setter
    def lower_order_nums(self: Any, count: int) -> None:
        self._history = self._history[max(len(self._history) - count, 0) :]

    def _outputs_before(self: Any, outputs: Sequence[Tensor], index: int, count: int) -> list[tuple[float, Tensor]]:
        """The last outputs, each with its lambda, if the newest belongs to this step; none is from before step 0."""
        return [(self._level(index - back)[2], outputs[-1 - back]) for back in reversed(range(min(count, index + 1)))]

    def index_for_timestep(self: Any, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in the schedule or in another one; of several equal ones, the second. The index of
        the last step if it is not in there."""
        try:
            return CountingNames.index_for_timestep(self, timestep, schedule_timesteps)
        except InputError:
            return len(self.timesteps) - 1

    def convert_model_output(
        self: Any, model_output: Tensor, *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x_0 or the noise, whichever the algorithm integrates, of the model's prediction at the current step.

        Args:
            sample: [B, C, H, W], that the prediction was made for.
            args, kwargs: a timestep and then the sample, as older code passes them; the timestep has no effect.
        """
        given = _given_sample(sample, args, 1, kwargs, "timestep")
        converted: Tensor = self._predict(model_output, given, self._step_index or 0)[0]
        return converted.to(model_output.dtype)

    def dpm_solver_first_order_update(
        self: Any,
        model_output: Tensor,
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One step of first order from the current one. It does not count the step.

        Args:
            model_output: the converted prediction.
            sample: [B, C, H, W].
            noise: for the SDE solvers.
            args, kwargs: two timesteps and then the sample, as older code passes them; timesteps have no effect.
        """
        given = _given_sample(sample, args, 2, kwargs, "timestep", "prev_timestep")
        return cast(Tensor, self._public_update([model_output], 1, given, noise))

    def multistep_dpm_solver_second_order_update(
        self: Any,
        model_output_list: Sequence[Tensor],
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One step of second order, from the last two converted predictions, the newest last; else as the first."""
        given = _given_sample(sample, args, 2, kwargs, "timestep_list", "prev_timestep")
        return cast(Tensor, self._public_update(model_output_list, 2, given, noise))

    def multistep_dpm_solver_third_order_update(
        self: Any,
        model_output_list: Sequence[Tensor],
        *args: Any,
        sample: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One step of third order, from the last three converted predictions, the newest last; else as the first."""
        given = _given_sample(sample, args, 2, kwargs, "timestep_list", "prev_timestep")
        return cast(Tensor, self._public_update(model_output_list, 3, given, noise))

    def _public_update(self: Any, outputs: Sequence[Tensor], order: int, x: Tensor, noise: Tensor | None) -> Tensor:
        if self._stochastic and noise is None:
            raise InputError(f"algorithm_type={self.config.algorithm_type!r} needs noise, a tensor like the sample")
        index = self._step_index or 0
        return cast(Tensor, self._update(x, index, self._outputs_before(outputs, index, order), noise))

    def _convert_to_lu(self, in_lambdas: Any, num_inference_steps: int) -> Any:
        return np.linspace(float(in_lambdas[0]), float(in_lambdas[-1]), num_inference_steps)

    def _sigma_to_t(self, sigma: Any, log_sigmas: Any) -> Any:
        """Fractional timesteps of noise levels, interpolated in a table of logarithms."""
        return schedules.sigmas_to_timesteps(sigma, np.exp(log_sigmas))


def _given_sample(
    sample: Tensor | None, args: tuple[Any, ...], place: int, kwargs: dict[str, Any], *unused: str
) -> Tensor:
    """The sample by keyword, or at its old place.

    Raises:
        InputError: it is not given, or an unknown keyword is.
    """
    wrong = [name for name in kwargs if name not in unused]
    if wrong:
        raise InputError(f"unknown argument {wrong[0]!r}; give sample and noise by name")
    found = args[place] if sample is None and len(args) > place else sample
    if not isinstance(found, Tensor):
        raise InputError(f"give sample, a tensor [B, C, H, W], by name; it was {shown(found)}")
    return found
