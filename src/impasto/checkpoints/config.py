"""A module's constructor arguments <-> ``config.json``."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigurationError

logger = logging.getLogger("impasto")

P = ParamSpec("P")
T = TypeVar("T", bound="Configurable")


class Config(Mapping[str, Any]):
    """The constructor arguments of a module: read by attribute, by item, or with ``get``; never written."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__["_values"] = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_values" not in self.__dict__:  # copying and pickling probe before __init__
            raise AttributeError(name)
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}; it has: {', '.join(self._values)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigurationError(f"config.{name} is read-only; construct the module anew with {name}={value!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self._values!r})"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_values"] = state


def records_config(init: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """Decorate an ``__init__`` so that ``self.config`` holds all its arguments, defaults included."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in list(bound.arguments.items())[1:]
        }
        object.__setattr__(self, "config", Config(values))
        init(self, *args, **kwargs)

    return wrapper


class Configurable:
    """Anything that is built from a config: models and schedulers."""

    config_name: ClassVar[str] = "config.json"
    #: Keys that have no meaning: dropped without a word if no argument has that name, and only written where they
    #: differ from the argument's default.
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset()

    config: Config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a config: ours, a plain dict, or any mapping. Unknown keys are named in a warning.

        Raises:
            ConfigurationError: a value cannot be used, or an override is not an argument of the class.
        """
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        wrong = [name for name in overrides if name not in known]
        if wrong:
            raise ConfigurationError(f"{cls.__name__} has no argument {wrong[0]!r}; it takes: {', '.join(known)}")
        values = {name: value for name, value in config.items() if name in known}
        unknown = [
            name
            for name in config
            if name not in known and name not in cls.ignored_config_keys and not name.startswith("_")
        ]
        if unknown:
            logger.warning("%s: unknown config values are ignored: %s", cls.__name__, ", ".join(unknown))
        try:
            return cls(**{**values, **overrides})
        except ConfigurationError:
            raise
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ConfigurationError(
                f"{cls.__name__} cannot be built from this config: {error}. "
                f"Compare its values with those of a published checkpoint."
            ) from error

    @classmethod
    def load_config(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the config file in ``folder`` as a dict."""
        return read_json(Path(folder) / cls.config_name)

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Write the config file into ``folder``, readable by diffusers."""
        arguments = inspect.signature(type(self).__init__).parameters
        values = {
            name: value
            for name, value in self.config.items()
            if name not in self.ignored_config_keys or value != arguments[name].default
        }
        write_json(Path(folder) / self.config_name, {"_class_name": type(self).__name__, **values})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Like the published schedulers, it may hold ``-Infinity``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path} does not exist; is {path.parent} the folder you meant?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, and holds a {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
