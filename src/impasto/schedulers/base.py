"""The base of every scheduler: noise, the schedule, and which step a timestep belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checks import finite, shown, whole_number
from ..errors import InputError
from ..nn.machine import check_device
from ..nn.outputs import BaseOutput
from . import process
from .betas import training_betas
from .compat import CountingNames, SchedulerNames
from .config import SchedulerConfig
from .noise_schedule import Array


@dataclass
class SchedulerOutput(BaseOutput):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], the next, less noisy sample


class Scheduler(SchedulerNames, SchedulerConfig):
    """What all solvers share. A subclass adds ``set_timesteps`` and ``step``.

    Attributes:
        timesteps: [N], descending, on the device given to ``set_timesteps``.
        num_inference_steps: N, None before ``set_timesteps``.
        betas, alphas, alphas_cumprod: [num_train_timesteps], float32.
        init_noise_sigma: the standard deviation of the first sample.
        order: model calls per step.
        custom_timesteps: whether the caller gave the timesteps, for DDPM and LCM.
    """

    order: ClassVar[int] = 1
    init_noise_sigma: float = 1.0
    num_inference_steps: int | None = None
    custom_timesteps: bool = False

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _make_tables(self, *allowed: str) -> None:
        """Set betas, alphas and alphas_cumprod, and every training timestep as the schedule."""
        self.betas = training_betas(self.config, *allowed)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._alpha_bars = self.alphas_cumprod.clone()  # stays on the CPU: reading it never waits for a device
        self.timesteps = torch.arange(len(self) - 1, -1, -1, device="cpu")

    # --- the schedule ---

    @property
    def timesteps(self) -> Tensor:
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value.contiguous()
        self._timestep_values: list[int | float] = value.tolist()

    def _count_steps(self, num_inference_steps: int | None) -> int:
        return whole_number("num_inference_steps", num_inference_steps, 1, len(self))

    def _set_timesteps(self, schedule: Array, device: torch.device | str | None) -> None:
        self.timesteps = torch.from_numpy(np.ascontiguousarray(schedule)).to(
            None if device is None else check_device(device)
        )
        self.num_inference_steps = len(schedule)

    def _one_of(self, **given: object) -> None:
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise InputError(
                f"give set_timesteps exactly one of {', '.join(given)}; it was given {' and '.join(named) or 'none'}"
            )

    def _locate(self, timestep: int | float | Tensor) -> tuple[int | float, int | None]:
        """The timestep as a number, and its index in ``timesteps`` or None.

        A loop over ``timesteps`` yields views of it. Their offsets give the index without waiting for the device,
        and distinguish equal timesteps.
        """
        process.require_timestep(timestep)
        if isinstance(timestep, Tensor):
            table = self._timesteps
            if timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr():
                index = int(timestep.storage_offset()) - int(table.storage_offset())
                if 0 <= index < len(self._timestep_values):
                    return self._timestep_values[index], index
            timestep = timestep.item()
            finite("timestep", timestep)
        values = self._timestep_values
        return timestep, values.index(timestep) if timestep in values else None

    def _alpha_bar(self, timestep: int | float) -> Tensor:
        """alphas_cumprod at a timestep, a scalar in float32, because published results include its rounding."""
        if timestep != int(timestep) or not 0 <= timestep < len(self._alpha_bars):
            raise InputError(
                f"timestep must be a whole number from 0 to {len(self._alpha_bars) - 1}, not {shown(timestep)}; "
                f"iterate over scheduler.timesteps"
            )
        return self._alpha_bars[int(timestep)]

    def _require_timesteps(self) -> int:
        if self.num_inference_steps is None:
            raise InputError("there is no schedule yet; call set_timesteps(num_inference_steps) before step")
        return self.num_inference_steps

    # --- samples ---

    def scale_model_input(self, sample: Tensor, timestep: int | float | Tensor | None = None) -> Tensor:
        """The sample unchanged: no scheduler of this package scales the model's input."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise.

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B], one per sample.
        """
        levels = self._alpha_sigma(timesteps, original_samples)
        return process.add_noise(original_samples, noise, *levels).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction. Shapes as in ``add_noise``."""
        levels = self._alpha_sigma(timesteps, sample)
        return process.prediction_target("v_prediction", sample, noise, *levels).to(sample.dtype)

    def _alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, [B, 1, ...] in float32."""
        process.require_tensors(samples=like, timesteps=timesteps)
        if timesteps.is_floating_point():
            raise InputError(f"timesteps must be whole numbers (torch.long), not {timesteps.dtype}")
        if timesteps.device.type == "cpu" and not bool(((timesteps >= 0) & (timesteps < len(self))).all()):
            raise InputError(f"timesteps must lie between 0 and {len(self) - 1}; these are {timesteps.tolist()}")
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)  # stays there for the next call
        return process.alpha_sigma(process.per_sample(self.alphas_cumprod[timesteps.to(like.device)], like))


class CountingScheduler(CountingNames, Scheduler):
    """A scheduler that looks up its first timestep and counts steps from there."""

    _step_index: int | None = None
    _begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step, if ``set_begin_index`` has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this step, whatever the first timestep is (image to image)."""
        self._begin_index = whole_number("begin_index", begin_index, 0)

    def _set_timesteps(self, schedule: Array, device: torch.device | str | None) -> None:
        super()._set_timesteps(schedule, device)
        self._step_index = self._begin_index = None

    def _this_step(self, timestep: int | float | Tensor) -> int:
        """The index of the current step."""
        steps = self._require_timesteps()
        process.require_timestep(timestep)
        if self._step_index is None:
            self._init_step_index(timestep)
        index: int = self._step_index  # type: ignore[assignment]
        if index >= steps:
            raise InputError(f"all {steps} steps have been taken; call set_timesteps before starting again")
        return index

    def _init_step_index(self, timestep: int | float | Tensor) -> None:
        self._step_index = self._first_step(timestep) if self._begin_index is None else self._begin_index

    def _first_step(self, timestep: int | float | Tensor) -> int:
        value, index = self._locate(timestep)
        if index is None:
            distances = [abs(value - other) for other in self._timestep_values]
            index = distances.index(min(distances))
            if not distances[index] < 1:
                raise InputError(f"timestep {shown(value)} is not in the schedule: {self._timestep_values}")
        return index
