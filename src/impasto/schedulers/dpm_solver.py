"""DPM-Solver and DPM-Solver++, multistep, for the diffusion ODE and SDE (arXiv 2206.00927 and 2211.01095).

With lambda = log(alpha / sigma) and h = lambda_t - lambda_s, both families integrate a Taylor polynomial of the
model's prediction m(lambda) = D0 + D1 (u / h) + D2 (u / h)², u = lambda - lambda_s, against an exponential:

    x_t = a x_s - c [ (e^z - 1) D0 + b1 D1 + b2 D2 ] + s noise

                       m       z     a                       c           s
    dpmsolver++        x_0     -h    sigma_t/sigma_s         alpha_t     0                        (2211.01095 eq. 8)
    sde-dpmsolver++    x_0     -2h   sigma_t/sigma_s e^-h    alpha_t     sigma_t sqrt(1 - e^-2h)  (its section 6)
    dpmsolver          noise    h    alpha_t/alpha_s         sigma_t     0                        (2206.00927 eq. 3.4)
    sde-dpmsolver      noise    h    alpha_t/alpha_s         2 sigma_t   sigma_t sqrt(e^2h - 1)

    b1 = (e^z - 1) / z - 1 exactly ("heun"), or (e^z - 1) / 2 to the same order ("midpoint")
    b2 = (e^z - 1 - z) / z² - 1/2

D1 and D2 come from the predictions of the steps before.

Below the timestep ``refine_below`` the steps refine instead: each adds new noise to a moving average y of the
predictions of x_0, over about ``refine_span`` timesteps. From timestep s to t,

    y <- y + (1 - e^(-(s - t) / span)) (x_0 - y),    x_t = alpha_t y + sigma_t noise.

A solver keeps what a prediction makes of the noise in its input, such as waves along an edge. The average does not, as
every prediction sees other noise. This is the update of score distillation (DreamFusion, arXiv 2209.14988), with
falling t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ..checkpoints.values import Bounds, Offset, Scale, Share, Shift, Steps
from ..checks import finite, shown
from ..errors import ConfigurationError, InputError
from ..nn.noise import draw_noise
from . import noise_schedule as schedules
from .base import CountingScheduler, SchedulerOutput
from .compat import DPMSolverNames
from .config import Spacing, records_arguments
from .process import limit, per_sample, predicted_noise, predicted_original, require_tensors, widened


class DPMSolverMultistepScheduler(DPMSolverNames, CountingScheduler):
    """A fast high-order solver: good images in 15 to 25 steps of one model call each.

    Args:
        num_train_timesteps: T, the number of timesteps the model was trained on.
        beta_start, beta_end, beta_schedule: the training noise schedule: linear, scaled_linear or squaredcos_cap_v2.
        trained_betas: [T], used instead of these.
        solver_order: 1, 2 (for guided sampling) or 3; the first steps and some of the last are of lower order.
        prediction_type: what the model predicts: epsilon, sample, v_prediction or flow_prediction.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x_0; not for latents.
        algorithm_type: dpmsolver++ or sde-dpmsolver++ (integrate x_0), dpmsolver or sde-dpmsolver (the noise).
        solver_type: the second-order method, midpoint or heun. From configs of related schedulers, ``deis`` stands for
            dpmsolver++, and logrho, bh1 and bh2 for midpoint.
        lower_order_final: with fewer than 15 steps, lower the order of the last ones.
        euler_at_final: make the last step first-order in any case.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas, use_flow_sigmas: at most one way
            to space noise levels instead of timesteps.
        flow_shift: shifts flow sigmas towards noise.
        final_sigmas_type: the last step ends at "zero" noise, or at that of timestep 0 ("sigma_min").
        lambda_min_clipped: timesteps with a lower log(alpha / sigma) are not used.
        variance_type: learned or learned_range if the model also predicts a variance, which is ignored.
        timestep_spacing: linspace, leading or trailing.
        steps_offset: added to ``leading`` timesteps.
        rescale_betas_zero_snr: let the last training timestep be (almost) pure noise.
        use_dynamic_shifting, time_shift_type: let ``set_timesteps`` take ``mu``; flow_shift is then e^mu.
        refine_below: the steps at timesteps below it refine (see above); 0: none. diffusers ignores this argument and
            the next two.
        refine_span: over how many timesteps their predictions are averaged.
        guide_above: pipelines guide only the steps at timesteps above it; -1: all. Edits that begin below pure noise
            are guided throughout, and ``guide_between`` overrides it.

    Attributes:
        sigmas: [N + 1], sigma / alpha (with flow sigmas: sigma) of each step and of the final sample; on the CPU.

    Raises:
        ConfigurationError: a value, or a combination of values, that cannot be used.
    """

    ignored_config_keys = frozenset({"refine_below", "refine_span", "guide_above"})

    @records_arguments
    def __init__(
        self,
        num_train_timesteps: Steps = 1000,
        beta_start: Share = 0.0001,
        beta_end: Share = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[Share] | np.ndarray[Any, Any] | None = None,
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: Share = 0.995,
        sample_max_value: Scale = 1.0,
        algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"] = "dpmsolver++",
        solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: Scale = 1.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        lambda_min_clipped: Shift = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: Spacing = "linspace",
        steps_offset: Offset = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential"] = "exponential",
        refine_below: Offset = 0,
        refine_span: Scale = 175.0,
        guide_above: Annotated[int, Bounds(-1, 100_000)] = -1,
    ):
        if solver_order not in (1, 2, 3):
            raise ConfigurationError(f"solver_order must be one of 1, 2, 3, not {solver_order}")
        self._over_original = algorithm_type in ("dpmsolver++", "sde-dpmsolver++", "deis")
        self._stochastic = algorithm_type in ("sde-dpmsolver++", "sde-dpmsolver")
        faults = {
            "cannot end at zero noise; set final_sigmas_type='sigma_min', or use": final_sigmas_type == "zero",
            "does not take flow_prediction; use": prediction_type == "flow_prediction",
            "has no solver_order=3; use 1 or 2, or": self._stochastic and solver_order == 3,
            "cannot refine; set refine_below=0, or use": refine_below > 0,
        }
        for fault, found in faults.items():
            if found and not self._over_original:
                raise ConfigurationError(f"algorithm_type={algorithm_type!r} {fault} dpmsolver++ or sde-dpmsolver++")
        self._spacing = schedules.chosen_spacing(self.config, "use_lu_lambdas", "use_flow_sigmas")
        self._flow = use_flow_sigmas
        self._refine_below, self._refine_span, self._guide_above = refine_below, refine_span, guide_above

        self._make_tables("linear", "scaled_linear", "squaredcos_cap_v2")
        if self.alphas_cumprod[-1] == 0:
            self.alphas_cumprod[-1] = 2**-24  # the first noise level must be finite
        self.alpha_t, self.sigma_t = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        # lambda falls with t, so those above the clip come first.
        self._usable = len(self) - int(torch.searchsorted(self.lambda_t.flip(0), lambda_min_clipped))
        if self._usable < 2:
            raise ConfigurationError(f"lambda_min_clipped={lambda_min_clipped!r} leaves no timesteps; lower it")
        self.timesteps = self.timesteps.float()
        self._table = schedules.noise_levels(self.alphas_cumprod)
        self.sigmas = torch.from_numpy(self._table.copy())
        self._history: list[tuple[float, Tensor]] = []  # (lambda, prediction) of the last steps
        self._average: Tensor | None = None  # of the predictions of the steps that refine

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Space ``num_inference_steps`` steps as configured, or take the given ``timesteps`` or ``sigmas``.

        Args:
            mu: with use_dynamic_shifting, flow_shift = e^mu.
            timesteps: descending; fractional ones are interpolated.
            sigmas: noise levels sigma / alpha (with use_flow_sigmas: sigma in (0, 1]), descending. The last step ends
                at a final 0, or as final_sigmas_type says. The timesteps are the nearest whole ones.

        Raises:
            InputError: not exactly one of the three; a number of steps out of range; custom values that do not
                descend or are out of range; timesteps where the config spaces noise levels; mu without
                use_dynamic_shifting.
        """
        self._one_of(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if mu is not None:
            if not self.config.use_dynamic_shifting:
                raise InputError("mu needs a scheduler with use_dynamic_shifting=True")
            finite("mu", mu, -20, 20)
        final = float(self._table[0]) if self.config.final_sigmas_type == "sigma_min" else 0.0
        if timesteps is not None:
            if self._spacing not in (None, "use_flow_sigmas"):
                raise InputError(f"timesteps cannot be given with {self._spacing}=True; give sigmas, or unset it")
            points = schedules.custom_timesteps(timesteps, len(self), whole=False)
            levels = points / len(self) if self._flow else schedules.timesteps_to_sigmas(points, self._table)
        elif sigmas is not None:
            levels, final = self._custom_sigmas(sigmas, final)
            points = self._timesteps_of(levels)
        else:
            steps = self._count_steps(num_inference_steps)
            points, levels = self._spaced(steps, self.config.flow_shift if mu is None else math.exp(mu))
        self._set_timesteps(points, device)
        self.sigmas = torch.from_numpy(np.append(levels, final).astype(np.float32))
        self._history, self._average = [], None

    def guides(self, index: int) -> bool:
        """Whether pipelines guide the step with this index."""
        return self._timestep_values[index] > self._guide_above

    def _spaced(self, steps: int, flow_shift: float) -> tuple[schedules.Array, schedules.Array]:
        """Timesteps and noise levels as configured."""
        if self._spacing is None:
            spacing, offset = self.config.timestep_spacing, self.config.steps_offset
            points = schedules.spaced_timesteps(spacing, steps, len(self), offset, last=self._usable, skip_lowest=True)
            return points, schedules.timesteps_to_sigmas(points, self._table)
        if self._spacing == "use_flow_sigmas":
            levels = schedules.flow_sigmas(steps, len(self), flow_shift)
        elif self._spacing == "use_lu_lambdas":
            levels = schedules.lu_sigmas(self._table, steps)
        else:
            levels = schedules.SPACINGS[self._spacing](float(self._table[-1]), float(self._table[0]), steps)
        return self._timesteps_of(levels), levels

    def _timesteps_of(self, levels: schedules.Array) -> schedules.Array:
        """Whole timesteps of noise levels, rounded or truncated as in the reference."""
        if self._flow:
            return (levels * len(self)).astype(np.int64)
        points = schedules.sigmas_to_timesteps(levels, self._table)
        rounds = self._spacing not in ("use_exponential_sigmas", "use_beta_sigmas")
        if rounds and self.config.beta_schedule != "squaredcos_cap_v2":
            points = points.round()
        return points.astype(np.int64)

    def _custom_sigmas(self, sigmas: Sequence[float], final: float) -> tuple[schedules.Array, float]:
        """Check a caller's noise levels; split off a last 0."""
        levels = schedules.numbers("sigmas", sigmas)
        if levels[-1] == 0:
            if not self._over_original:
                raise InputError(
                    f"sigmas cannot end in 0 with algorithm_type={self.config.algorithm_type!r}; leave it out"
                )
            levels, final = levels[:-1], 0.0
        if not len(levels) or not np.isfinite(levels).all() or (levels <= 0).any():
            raise InputError(f"sigmas must be one or more numbers above 0 (the last may be 0), not {shown(sigmas)}")
        if (np.diff(levels) >= 0).any():
            raise InputError(f"sigmas must be in descending order; these are {shown(levels.tolist())}")
        highest = 1.0 if self._over_original else np.nextafter(1.0, 0.0)
        if self._flow and levels[0] > highest:
            raise InputError(f"with use_flow_sigmas, sigmas lie between 0 and 1; these begin with {levels[0]}")
        return levels, final

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at this step's noise level -> at the next one.

        Args:
            model_output: [B, C, H, W], the model's prediction; more channels with a learned variance.
            timestep: one of ``timesteps``. The first call determines the step; later calls take the following ones.
            sample: [B, C, H, W].
            generator: for the noise of the SDE solvers and of steps that refine; a list has one per sample.
            variance_noise: that noise itself, instead of a generator.
            return_dict: False returns a plain tuple.

        Raises:
            InputError: no schedule yet, all steps taken, shapes that do not fit.
        """
        index = self._this_step(timestep)
        prediction, x, dtype = self._predict(model_output, sample, index)
        refines = self._timestep_values[index] < self._refine_below
        if (self._stochastic or refines) and variance_noise is None:
            variance_noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
        if refines:
            assert variance_noise is not None
            x = self._refine(prediction, index, variance_noise)
        else:
            level = self._level(index)[2]
            if self._history and self._history[-1][0] == level:  # slopes need distinct levels
                self._history.pop()
            self._history = [*self._history, (level, prediction)][-self.config.solver_order :]
            x = self._update(x, index, self._history[-self._order_at(index) :], variance_noise)
        self._step_index = index + 1
        return SchedulerOutput(x.to(dtype)) if return_dict else (x.to(dtype),)

    def _predict(self, output: Tensor, sample: Tensor, index: int) -> tuple[Tensor, Tensor, torch.dtype]:
        """m, x_0 or the noise, of the model's prediction; the sample in the same dtype; the dtype of the result."""
        require_tensors(model_output=output, sample=sample)
        if self.config.variance_type in ("learned", "learned_range") and min(sample.ndim, output.ndim) > 1:
            output = output[:, : sample.shape[1]]
        output, x, dtype = widened(output, sample)
        kind, (alpha, sigma, _) = self.config.prediction_type, self._level(index)
        if kind == "flow_prediction":
            sigma = float(self.sigmas[index])  # differs only without flow sigmas, where the reference does the same
        if not self._over_original and not self.config.thresholding:
            return predicted_noise(kind, output, x, alpha, sigma), x, dtype
        original = limit(predicted_original(kind, output, x, alpha, sigma), self.config)
        return (original if self._over_original else (x - alpha * original) / sigma), x, dtype

    def _order_at(self, index: int) -> int:
        """The order of this step: it grows with the history, and may fall towards the end."""
        order, left = len(self._history), len(self._timestep_values) - index
        falls = self.config.lower_order_final and len(self._timestep_values) < 15
        if left == 1 and (falls or self.config.euler_at_final or self.sigmas[-1] == 0):
            return 1
        return min(order, 2) if left == 2 and falls else order

    def _update(self, x: Tensor, index: int, history: list[tuple[float, Tensor]], noise: Tensor | None) -> Tensor:
        """One step, as in the table at the top, of the order of the length of ``history``."""
        alpha_t, sigma_t, lambda_t = self._level(index + 1)
        alpha_s, sigma_s, lambda_s = self._level(index)
        h = lambda_t - lambda_s
        if h == 0:  # the same noise level twice
            return x
        twice = 2 if self._stochastic else 1
        if self._over_original:
            z, a, c = -twice * h, sigma_t / sigma_s, alpha_t
            if self._stochastic:
                a *= math.exp(-h)
        else:
            z, a, c = h, alpha_t / alpha_s, twice * sigma_t

        (_, m0), order = history[-1], len(history)
        total = math.expm1(z) * m0
        if order > 1:
            lambda_1, m1 = history[-2]
            h0 = lambda_s - lambda_1
            slope0 = (h / h0) * (m0 - m1)
        if order == 2:
            b1 = math.expm1(z) / z - 1 if self.config.solver_type == "heun" else math.expm1(z) / 2
            total = total + b1 * slope0
        elif order == 3:
            lambda_2, m2 = history[-3]
            h1 = lambda_1 - lambda_2
            slope1 = (h / h1) * (m1 - m2)
            d1 = slope0 + h0 / (h0 + h1) * (slope0 - slope1)
            d2 = h / (h0 + h1) * (slope0 - slope1)
            # The derivation has -1/2 in both cases. The reference has +1/2 for the SDE, and we match its numbers.
            half = 0.5 if self._stochastic else -0.5
            b1, b2 = math.expm1(z) / z - 1, (math.expm1(z) - z) / z**2 + half
            total = total + b1 * d1 + b2 * d2
        x = a * x - c * total
        if not self._stochastic or noise is None:
            return x
        variance = -math.expm1(-2 * h) if self._over_original else math.expm1(2 * h)
        return x + sigma_t * math.sqrt(variance) * noise.to(x.device, torch.float32)

    def averaged(self, original: Tensor, index: int) -> Tensor:
        """What a step makes of its prediction of x_0: if it refines, the moving average with it."""
        t, following = [*self._timestep_values, 0][index : index + 2]
        if t >= self._refine_below or self._average is None:
            return original
        return torch.lerp(self._average.to(original), original, -math.expm1((following - t) / self._refine_span))

    def _refine(self, original: Tensor, index: int, noise: Tensor) -> Tensor:
        """The average of the predictions, with new noise of the next step."""
        self._average = self.averaged(original, index)
        alpha, sigma, _ = self._level(index + 1)
        return alpha * self._average + sigma * noise.to(original.device, torch.float32)

    def _level(self, index: int) -> tuple[float, float, float]:
        """alpha, sigma and lambda of a step, in float32, because published results include its rounding."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[index])
        return float(alpha), float(sigma), float(torch.log(alpha) - torch.log(sigma))  # lambda may be infinite

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Noise level -> (alpha, sigma): alpha² + sigma² = 1, or alpha + sigma = 1 on the straight line of flows."""
        if self._flow:
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    def _alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """For ``add_noise``: the level of the current step, else of the schedule, else of training."""
        timesteps = timesteps.to(like.device).reshape(-1)
        sigmas = self.sigmas.to(like.device)
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            levels = sigmas[index].expand(len(timesteps))
        else:
            levels = timesteps.float() / len(self)
            if not self._flow:
                table = torch.from_numpy(self._table).to(like.device)
                low = timesteps.long().clamp(0, len(table) - 2)
                levels = torch.lerp(table[low], table[low + 1], (timesteps - low).float().clamp(0, 1))
            if self.num_inference_steps is not None:
                matches = timesteps[:, None] == self.timesteps.to(like.device)[None]  # [B, N]
                levels = torch.where(matches.any(1), sigmas[matches.int().argmax(1)], levels)
        return self._sigma_to_alpha_sigma_t(per_sample(levels, like))
