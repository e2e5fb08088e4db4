"""A scheduler's config: its record of which arguments were given, loading and saving."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, Self, TypeVar, cast, overload

import numpy as np
from torch import Tensor

from ..checkpoints.config import DOWNLOAD, PLACE, Configurable, naming, records_config
from ..checkpoints.frozen import given_values
from ..checkpoints.keywords import settle
from ..checkpoints.upload import Uploads
from ..checks import shown
from ..errors import ConfigurationError

P = ParamSpec("P")
Prediction = Literal["epsilon", "sample", "v_prediction"]
Spacing = Literal["linspace", "leading", "trailing"]
S = TypeVar("S", bound="SchedulerConfig")


def records_arguments(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """``records_config`` for schedulers, which also take arrays and tensors of numbers."""
    recorded = records_config(init)
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        plain = [_plain(name, value) for name, value in zip(chain(names, repeat("an argument")), args, strict=False)]
        cast(Any, recorded)(self, *plain, **{name: _plain(name, value) for name, value in kwargs.items()})

    return wrapper


def _plain(name: str, value: Any) -> Any:
    """The value, or a list for an array or a tensor."""
    try:
        return value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{name} cannot be read as numbers: {shown(value)}") from error


class SchedulerConfig(Configurable, Uploads):
    """The part of a scheduler that reads and writes its config."""

    config_name: ClassVar[str] = "scheduler_config.json"
    has_compatibles: ClassVar[bool] = True
    #: Attributes of a schedule, which end with it.
    _of_schedule: ClassVar[tuple[str, ...]] = ("num_inference_steps", "custom_timesteps", "_step_index", "_begin_index")

    def register_to_config(self, /, **values: Any) -> None:
        """Add values to the record. Those of arguments rebuild the scheduler, which then needs ``set_timesteps``.

        Raises:
            ConfigurationError: the value of an argument cannot be used; the scheduler stays as it was.
        """
        names = self._argument_names()
        changed = {name: values.pop(name) for name in names if name in values}
        if changed:
            own = given_values(self.config)
            arguments = {name: value for name, value in own.items() if name in names}
            built = type(self)(**{**arguments, **changed})
            others = {name: value for name, value in own.items() if name not in names}
            for name in self._of_schedule:
                vars(self).pop(name, None)
            vars(self).update(vars(built))
            values = {**others, **values}
        super().register_to_config(**values)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        return_unused_kwargs: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load ``scheduler_config.json`` from a folder or the hub.

        Args:
            pretrained_model_name_or_path, subfolder: a folder or a hub id, and the folder of the scheduler in it.
            return_unused_kwargs: also return the values and keywords that are not arguments.
            kwargs: the options of ``load_config``, ``output_loading_info``, which has no effect, and values that
                replace those of the file.

        Raises:
            CheckpointError: the file is missing or damaged.
            ConfigurationError: a value cannot be used.
            InputError: an unknown keyword, or one that cannot be acted on.
        """
        names = cls._argument_names()
        place = {name: kwargs.pop(name) for name in PLACE if name in kwargs}
        others = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        checked = [name for name in others if name in DOWNLOAD or not return_unused_kwargs]
        given = {name: others.pop(name) for name in checked}
        settle(cls.__name__, {**given, "output_loading_info": None}, [*names, *PLACE])
        cls.checked_arguments({}, **kwargs)
        path = cls._config_path(pretrained_model_name_or_path, subfolder, **place)
        with naming(path):
            built, unused = cls.from_config(cls._read_config(path), True, **kwargs)
        return (built, {**others, **unused}) if return_unused_kwargs else built

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """``save_config``: write ``scheduler_config.json`` into the folder, readable by diffusers.

        ``variant``, which names files of weights, has no effect.
        """
        kwargs.pop("variant", None)
        self.save_config(save_directory, push_to_hub, **kwargs)
