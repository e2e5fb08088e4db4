"""The base of every scheduler: config, load, save, noise, and which step a timestep belongs to."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import hub
from ..checkpoints.config import Config, Configurable, naming, records_config
from ..checks import finite, shown, whole_number
from ..errors import ConfigurationError, InputError
from ..folders import reading
from ..nn.machine import check_device
from ..nn.outputs import keyed
from .noise_schedule import BETA_SCHEDULES, rescale_zero_terminal_snr
from .predictions import require_tensors

P = ParamSpec("P")
S = TypeVar("S", bound="Scheduler")

#: Names of the arguments that were left at their defaults: in the config, not in the file.
DEFAULTED = "_use_default_values"


@keyed
class SchedulerOutput(NamedTuple):
    """The result of one step."""

    prev_sample: Tensor  # [B, C, H, W], the next, less noisy sample


def records_arguments(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """``records_config`` that also notes which arguments were not given.

    One scheduler's config is the usual way to build another, whose own defaults must then hold.
    """
    recorded = records_config(init)
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        given = {
            name: _listed(name, value) if isinstance(value, np.ndarray | Tensor) else value
            for name, value in list(signature.bind(self, *args, **kwargs).arguments.items())[1:]
        }
        cast(Any, recorded)(self, **given)
        self.config = Config({**self.config, DEFAULTED: [name for name in self.config if name not in given]})

    return wrapper


def _listed(name: str, value: np.ndarray[Any, Any] | Tensor) -> Any:
    try:
        return value.tolist()
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{name} cannot be read as numbers: {shown(value)}") from error


class Scheduler(Configurable):
    """What all solvers share. A subclass adds ``set_timesteps`` and ``step``.

    Attributes:
        timesteps: [N], descending, on the device given to ``set_timesteps``.
        num_inference_steps: N, None before ``set_timesteps``.
        betas, alphas, alphas_cumprod: [num_train_timesteps], float32.
        init_noise_sigma: the standard deviation of the first sample.
        order: how many model calls a step takes.
    """

    config_name: ClassVar[str] = "scheduler_config.json"
    order: ClassVar[int] = 1
    init_noise_sigma: float = 1.0
    num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a config: ours, a dict, or another scheduler's, of ours or not.

        Values that mean nothing here are left out, and so are those the other scheduler had only by default.

        Raises:
            ConfigurationError: not a config, or a value that cannot be used.
        """
        given = cls._arguments(config, {})
        defaulted = config.get(DEFAULTED)
        left_out = [name for name in defaulted if isinstance(name, str)] if isinstance(defaulted, list) else []
        return super().from_config({name: x for name, x in given.items() if name not in left_out}, **overrides)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Load ``scheduler_config.json`` from a folder or the hub; ``overrides`` replace its values.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
            ConfigurationError: it holds values that cannot be used.
        """
        root = hub.resolve(
            pretrained_model_name_or_path,
            allow_patterns=[f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name],
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        cls.checked_arguments({}, **overrides)
        with reading(hub.inside(root, subfolder)) as folder, naming(folder / cls.config_name):
            return cls.from_config(cls.load_config(folder), **overrides)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``scheduler_config.json`` into the folder, readable by diffusers."""
        self.save_config(save_directory)

    def _stored_config(self) -> dict[str, Any]:
        return {name: value for name, value in self.config.items() if name != DEFAULTED}

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _require(self, name: str, value: object, allowed: Sequence[object]) -> None:
        if value not in allowed:
            raise ConfigurationError(
                f"{type(self).__name__}: {name} must be one of {', '.join(map(repr, allowed))}, not {shown(value)}"
            )

    def _make_tables(
        self,
        allowed: Sequence[str],
        schedule: str,
        count: int,
        start: float,
        end: float,
        trained: Sequence[float] | np.ndarray[Any, Any] | None,
        zero_snr: bool,
    ) -> None:
        """Set betas, alphas and alphas_cumprod, and every training timestep as the schedule."""
        if trained is not None:
            betas = torch.as_tensor(trained, dtype=torch.float32, device="cpu").clone()
            if betas.shape != (count,):
                raise ConfigurationError(
                    f"trained_betas must hold num_train_timesteps={count} numbers; its shape is {tuple(betas.shape)}"
                )
        else:
            self._require("beta_schedule", schedule, allowed)
            betas = BETA_SCHEDULES[schedule](count, start, end)
        if not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ConfigurationError(
                f"every beta must be between 0 and 1; beta_start={start!r} and beta_end={end!r}, or trained_betas, "
                f"give others"
            )
        if not 1.0 - betas[0] < 1 or not torch.prod(1.0 - betas[:-1]) > 0:
            raise ConfigurationError(
                f"beta_start={start!r}, beta_end={end!r}, num_train_timesteps={count}, or trained_betas, give a "
                f"schedule without noise at its beginning, or without anything else long before its end"
            )
        self.betas = rescale_zero_terminal_snr(betas) if zero_snr else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._alpha_bars = self.alphas_cumprod.clone()  # stays on the CPU: reading it never waits for a device
        self.timesteps = torch.arange(count - 1, -1, -1, device="cpu")

    # --- the schedule ---

    @property
    def timesteps(self) -> Tensor:
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value.contiguous()
        self._timestep_values: list[int | float] = value.tolist()

    def _count_steps(self, num_inference_steps: int) -> int:
        return whole_number("num_inference_steps", num_inference_steps, 1, len(self))

    def _check_device(self, device: torch.device | str | None) -> torch.device | None:
        return None if device is None else check_device(device)

    def _one_of(self, **given: object) -> None:
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise InputError(
                f"give set_timesteps exactly one of {', '.join(given)}; it was given {' and '.join(named) or 'none'}"
            )

    def _locate(self, timestep: int | float | Tensor) -> tuple[int | float, int | None]:
        """The timestep as a number, and its place in ``timesteps`` (None: it is not there).

        A loop over ``timesteps`` yields views of it: their offsets tell them apart, even equal ones, without
        waiting for the device.
        """
        _check_timestep(timestep)
        if isinstance(timestep, Tensor):
            table = self._timesteps
            if timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr():
                place = int(timestep.storage_offset()) - int(table.storage_offset())
                if 0 <= place < len(self._timestep_values):
                    return self._timestep_values[place], place
            timestep = timestep.item()
            finite("timestep", timestep)
        values = self._timestep_values
        return timestep, values.index(timestep) if timestep in values else None

    def _alpha_bar(self, timestep: int | float) -> Tensor:
        """alphas_cumprod at a timestep, a scalar in float32: its rounding is part of published results."""
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
        """The sample as the model wants it: unchanged, for all solvers of this package."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise.

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B], one for each sample.
        """
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t noise - sigma_t x_0: the target of v-prediction (arXiv 2202.00512). Shapes as in ``add_noise``."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def _alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, [B, 1, ...] in float32: 1 - alpha² vanishes in less."""
        require_tensors(samples=like, timesteps=timesteps)
        if timesteps.is_floating_point():
            raise InputError(f"timesteps must be whole numbers (torch.long), not {timesteps.dtype}")
        if timesteps.device.type == "cpu" and not bool(((timesteps >= 0) & (timesteps < len(self))).all()):
            raise InputError(f"timesteps must lie between 0 and {len(self) - 1}; these are {timesteps.tolist()}")
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)  # stays there for the next call
        squared = self.alphas_cumprod[timesteps.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))
        return squared.sqrt(), (1 - squared).sqrt()


class CountingScheduler(Scheduler):
    """A scheduler that looks its first timestep up and counts steps from there."""

    _step_index: int | None = None
    _begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The step to be taken next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step to begin with, where ``set_begin_index`` has set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this step, whatever the first timestep is (image to image)."""
        self._begin_index = whole_number("begin_index", begin_index, 0)

    def _restart(self) -> None:
        self._step_index = self._begin_index = None

    def _this_step(self, timestep: int | float | Tensor) -> int:
        """The index of the step being taken."""
        steps = len(self._timestep_values)
        self._require_timesteps()
        _check_timestep(timestep)
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._first_step(timestep)
        if not 0 <= self._step_index < steps:
            raise InputError(f"all {steps} steps have been taken; call set_timesteps before beginning anew")
        return self._step_index

    def _first_step(self, timestep: int | float | Tensor) -> int:
        value, place = self._locate(timestep)
        if place is None:
            distances = [abs(value - other) for other in self._timestep_values]
            place = distances.index(min(distances))
            if not distances[place] < 1:
                raise InputError(f"timestep {shown(value)} is not in the schedule: {self._timestep_values}")
        return place


def _check_timestep(timestep: int | float | Tensor) -> None:
    """Refuse what is no timestep, as far as that is known without waiting for a device."""
    if not isinstance(timestep, Tensor):
        finite("timestep", timestep)
    elif timestep.numel() != 1:
        raise InputError(f"step takes one timestep for the whole batch, not shape {tuple(timestep.shape)}")
    elif timestep.is_meta or timestep.layout != torch.strided:
        raise InputError(f"timestep must be a number, or a tensor that holds one, not {shown(timestep)}")
