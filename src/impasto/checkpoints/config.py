"""A module's constructor arguments <-> ``config.json``."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar, cast

from ..checks import printable, shown
from ..errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from .upload import Uploads
from .values import check_arguments

logger = logging.getLogger("impasto")

#: The largest JSON file that is read; indexes of the largest models have about a megabyte.
MOST_BYTES = 10_000_000

P = ParamSpec("P")
T = TypeVar("T", bound="Configurable")


class Config(Mapping[str, Any]):
    """The constructor arguments of a module, read-only: by attribute, by item, or with ``get``."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__["_values"] = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_values" not in self.__dict__:  # copying and pickling probe before __init__
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(f"the config has no {name!r}; it has: {', '.join(self._values)}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigurationError(f"config.{name} is read-only; construct a new module with {name}={value!r}")

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
    """Decorate an ``__init__`` to check its arguments against their types (``values.py``), and to record them.

    ``self.config`` holds all of them, including defaults.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = check_arguments(type(self).__name__, dict(list(bound.arguments.items())[1:]), init)
        object.__setattr__(self, "config", Config(values))
        cast(Any, init)(self, **values)

    return wrapper


class Configurable(Uploads):
    """Anything that is built from a config: models and schedulers."""

    config_name: ClassVar[str] = "config.json"
    #: Keys without effect: ignored silently if no argument has that name, and only written if they differ from the
    #: default.
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset()

    config: Config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from a config, ours or any other mapping. A warning names unknown keys.

        Raises:
            ConfigurationError: a value cannot be used, or an override is not an argument of the class.
        """
        values = cls._arguments(config, overrides)
        unknown = [
            str(name)
            for name in config
            if name not in values and name not in cls.ignored_config_keys and not str(name).startswith("_")
        ]
        if unknown:
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            listed = ", ".join(printable(name[:80]) for name in unknown[:10])
            logger.warning("%s: unknown config values are ignored: %s%s", cls.__name__, listed, more)
        try:
            return cls(**values)
        except ConfigurationError:
            raise
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise ConfigurationError(
                f"{cls.__name__} cannot be built from this config: {printable(str(error))[:300]}. "
                f"Compare its values with those of a published checkpoint."
            ) from error

    @classmethod
    def checked_arguments(cls, config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
        """The arguments that ``from_config`` would pass to the constructor, including defaults, each checked by itself.

        Raises:
            ConfigurationError: a value does not fit the constructor's signature, or an override is not an argument.
        """
        init = inspect.unwrap(cls.__init__)
        bound = inspect.signature(init).bind(None, **cls._arguments(config, overrides))
        bound.apply_defaults()
        return check_arguments(cls.__name__, dict(list(bound.arguments.items())[1:]), init)

    @classmethod
    def _arguments(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a config that are arguments, with overrides applied."""
        if not isinstance(config, Mapping):
            raise ConfigurationError(f"from_config takes a config, such as scheduler.config, not {shown(config)}")
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        wrong = [name for name in overrides if name not in known]
        if wrong:
            raise ConfigurationError(f"{cls.__name__} has no argument {wrong[0]!r}; it takes: {', '.join(known)}")
        return {**{name: value for name, value in config.items() if name in known}, **overrides}

    @classmethod
    def load_config(cls, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the config file in ``folder`` as a dict."""
        return read_json(Path(folder) / cls.config_name)

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Write the config file into ``folder``, readable by diffusers.

        Raises:
            OutputError: the folder cannot be written.
        """
        from ..folders import saving

        with saving(folder) as staging:
            self._write_config(staging)

    def _write_config(self, folder: Path) -> None:
        write_json(folder / self.config_name, {"_class_name": type(self).__name__, **self._stored_config()})

    def _stored_config(self) -> dict[str, Any]:
        """The contents of the config file."""
        arguments = inspect.signature(type(self).__init__).parameters
        return {
            name: value
            for name, value in self.config.items()
            if name not in self.ignored_config_keys or value != arguments[name].default
        }


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path of the config file to errors about its values."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def read_json(path: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON object, which may contain ``-Infinity``, as configs of published schedulers do.

    Raises:
        CheckpointNotFoundError: the file does not exist.
        CheckpointError: it is not JSON, or not a JSON object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise ValueError("not a regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"{status.st_size} bytes, more than the limit of {most_bytes}")
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path} does not exist; is {path.parent} the folder you meant?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON. Objects must not have duplicate names, which readers treat differently.

    Raises:
        ValueError, RecursionError: not JSON, an integer of thousands of digits, or nested too deeply.
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {shown(name)} twice")
        content[name] = value
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, completely or not at all.

    Raises:
        OutputError: the file or its folder cannot be written.
    """
    from ..files import make_folder, write_file

    text = json.dumps(content, indent=2) + "\n"
    make_folder(path.parent)
    write_file(path, text)
