"""A scheduler's config: its record of which arguments were given, loading and saving."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, Self, TypeVar, cast

import numpy as np
from torch import Tensor

from ..checkpoints import hub
from ..checkpoints.config import Config, Configurable, naming, records_config
from ..checks import shown
from ..errors import ConfigurationError
from ..folders import reading

P = ParamSpec("P")
Prediction = Literal["epsilon", "sample", "v_prediction"]
Spacing = Literal["linspace", "leading", "trailing"]
S = TypeVar("S", bound="SchedulerConfig")

#: The arguments that were left at their defaults: part of the config, but not of the file.
DEFAULTED = "_use_default_values"


def records_arguments(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """``records_config`` that also records which arguments were left at their defaults.

    When a scheduler is built from another's config, its own defaults replace those of the other.
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


class SchedulerConfig(Configurable):
    """The part of a scheduler that reads and writes its config."""

    config_name: ClassVar[str] = "scheduler_config.json"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a config: ours, a dict, or that of another scheduler, including those of diffusers.

        Ignored are values this class has no argument for, and those that the other scheduler had by default.

        Raises:
            ConfigurationError: not a config, or a value that cannot be used.
        """
        given = cls._arguments(config, {})
        defaulted = config.get(DEFAULTED)
        ignored = [name for name in defaulted if isinstance(name, str)] if isinstance(defaulted, list) else []
        return super().from_config({name: x for name, x in given.items() if name not in ignored}, **overrides)

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
            CheckpointError: the file is missing or damaged.
            ConfigurationError: the file holds values that cannot be used.
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
