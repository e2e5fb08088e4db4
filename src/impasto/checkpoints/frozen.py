"""The record of what an object was built from: a dict that cannot be changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ConfigurationError

#: The format of the files that are written: that of this version of diffusers.
FORMAT_VERSION = "0.42.1"
#: The key of a config that names the arguments that were left at their defaults. It is not written.
DEFAULTED = "_use_default_values"


class Config(dict[str, Any]):
    """Constructor arguments, as a dict that cannot be changed. Keys are also attributes.

    Private keys are those of diffusers: ``_use_default_values`` names the arguments left at their defaults, and after
    loading ``_class_name``, ``_diffusers_version`` and, for models, ``_name_or_path`` say what was loaded.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling probe
            raise AttributeError(name)
        if name not in self:
            public = ", ".join(key for key in self if not key.startswith("_"))
            raise AttributeError(f"the config has no {name!r}; it has: {public}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigurationError(
            f"config.{name} is read-only; construct a new module with {name}={value!r}, for example with "
            f"from_config(config, {name}={value!r})"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigurationError(
            "a config is read-only; construct a new module with from_config(config, name=value), or change a copy, "
            "dict(config)"
        )

    __setitem__ = __delitem__ = __ior__ = __delattr__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __or__(self, other: Any) -> Any:
        return Config({**self, **other}) if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return Config({**other, **self}) if isinstance(other, dict) else NotImplemented

    def __repr__(self) -> str:
        return f"Config({super().__repr__()})"

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def given_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of any config, without those that were left at the defaults of its class."""
    named = config.get(DEFAULTED)
    defaulted = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return {name: value for name, value in config.items() if name not in defaulted and name != DEFAULTED}


def is_json(name: object, value: Any) -> bool:
    """Whether a file can hold this key and value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(name, str)
