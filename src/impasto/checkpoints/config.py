"""A module's constructor arguments <-> ``config.json``."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, Self, TypeAlias, TypeVar, cast, overload

from ..checks import nearest, printable, shown
from ..errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError
from . import hub
from .frozen import DEFAULTED, FORMAT_VERSION, given_values, is_json
from .frozen import Config as Config
from .keywords import settle
from .upload import check_upload_options, push_saved
from .values import check_arguments

logger = logging.getLogger("impasto")

#: The largest JSON file that is read; indexes of the largest models have about a megabyte.
MOST_BYTES = 10_000_000

P = ParamSpec("P")
T = TypeVar("T", bound="Configurable")
_Path: TypeAlias = "str | os.PathLike[str]"


#: Keywords that say where a config is.
PLACE = ("subfolder", *hub.OPTIONS)
#: Further keywords of a download.
DOWNLOAD = ("mirror", "proxies", "resume_download", "user_agent", "local_dir", "local_dir_use_symlinks")


def records_config(init: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """Decorate an ``__init__`` to check its arguments against their types (``values.py``), and to record them.

    ``self.config`` holds all of them, including defaults, except for keys without effect that are not given. Private
    keywords, such as those of another config, are recorded and have no other effect.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        private = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        values = check_arguments(type(self).__name__, dict(list(bound.arguments.items())[1:]), init)
        public = {name: x for name, x in values.items() if name in given or name not in self.ignored_config_keys}
        defaulted = [name for name in public if name not in given]
        self.config = Config({**private, **public, **({DEFAULTED: defaulted} if defaulted else {})})
        cast(Any, init)(self, **values)

    return wrapper


class Configurable:
    """Anything that is built from a config: models and schedulers."""

    config_name: ClassVar[str] = "config.json"
    #: Keys that other programs lack or that have no effect: ignored silently if no argument has that name, recorded if
    #: they are given, and written if they differ from the default.
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset()
    #: Arguments that are not recorded: none.
    ignore_for_config: ClassVar[list[str]] = []
    #: Whether configs of other classes are taken, too.
    has_compatibles: ClassVar[bool] = False

    _internal_dict: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The arguments that this was built from."""
        values = self._internal_dict
        return values if isinstance(values, Config) else Config(values)  # old code assigns a dict of its own

    @config.setter
    def config(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_internal_dict", Config(values))

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | _Path, return_unused_kwargs: Literal[False] = False, **overrides: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | _Path, return_unused_kwargs: Literal[True], **overrides: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | _Path, return_unused_kwargs: bool = False, **overrides: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build from a config: ours, a dict, or that of another class, including those of diffusers.

        Values that were defaults of the other class do not replace those of this one. Values that are not arguments of
        this class are kept in the new config, so that the other class finds them there; a warning names those that no
        compatible class has.

        Args:
            config: any mapping; or the path of a folder, as for ``load_config``, with its options among ``overrides``.
            return_unused_kwargs: also return the values and overrides that are not arguments.
            overrides: values that replace those of the config.

        Raises:
            ConfigurationError: not a config, a value that cannot be used, or an override that is not an argument
                (unless ``return_unused_kwargs``).
        """
        if isinstance(config, str | os.PathLike) and os.path.exists(config):
            config, overrides = cls.load_config(config, True, **overrides)
        values, unused, kept = cls.extract_init_dict(cast(Mapping[str, Any], config), **overrides)
        if not return_unused_kwargs:
            cls._arguments({}, overrides)
        unknown = [name for name in unused if name not in overrides]
        if unknown:
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            listed = ", ".join(printable(name[:80]) for name in unknown[:10])
            logger.warning("%s: unknown config values are ignored: %s%s", cls.__name__, listed, more)
        try:
            built = cls(**values)
        except ConfigurationError:
            raise
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise ConfigurationError(
                f"{cls.__name__} cannot be built from this config: {printable(str(error))[:300]}. "
                f"Compare its values with those of a published checkpoint."
            ) from error
        if "_class_name" in kept:
            kept["_class_name"] = cls.__name__
        built.register_to_config(**kept)
        return (built, {**unused, **kept}) if return_unused_kwargs else built

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
        known = cls._argument_names()
        wrong = [name for name in overrides if name not in known]
        if wrong:
            hint = nearest(wrong[0], known, f"it takes: {', '.join(known)}")
            raise ConfigurationError(f"{cls.__name__} has no argument {wrong[0]!r}{hint}")
        return {**{name: value for name, value in given_values(config).items() if name in known}, **overrides}

    @classmethod
    def _argument_names(cls) -> list[str]:
        return list(inspect.signature(cls.__init__).parameters)[1:]

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **overrides: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Divide a config as ``from_config`` does.

        Returns:
            The arguments of the constructor; the values that no compatible class expects, and the overrides that are
            not arguments; the values of the config that are kept in the new one.
        """
        names = cls._argument_names()
        values = cls._arguments(config_dict, {name: value for name, value in overrides.items() if name in names})
        kept = {name: x for name, x in given_values(config_dict).items() if name not in values and is_json(name, x)}
        foreign = cls.has_compatibles and config_dict.get("_class_name", cls.__name__) != cls.__name__
        unknown = [name for name in kept if not (foreign or name.startswith("_") or cls._is_expected(name))]
        unused = {name: kept[name] for name in unknown}
        return values, {**unused, **{name: x for name, x in overrides.items() if name not in names}}, kept

    @classmethod
    def _is_expected(cls, name: str) -> bool:
        """Whether a key that is no argument is one of a compatible class, or known to have no effect."""
        return name in cls.ignored_config_keys

    def register_to_config(self, /, **values: Any) -> None:
        """Add values to the record, or replace them there. The object itself stays as it was built."""
        self.config = Config({**self.config, **values})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Has no effect: classes are found by name, and loading never runs the code of a checkpoint.

        Raises:
            InputError: not ``"AutoModel"``.
        """
        if auto_class != "AutoModel":
            raise InputError(f"auto_class must be 'AutoModel', not {shown(auto_class)}")

    # --- files ---

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **options: Any,
    ) -> Any:
        """Read the config file of a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: a folder, a hub id, or the file itself.
            return_unused_kwargs: also return the options that are not among the following.
            return_commit_hash: also return the commit of a file from the hub; None for other files.
            options: ``subfolder``; for the hub ``revision``, ``cache_dir``, ``local_files_only``, ``token`` and
                ``force_download``; and those without effect (``checkpoints.keywords``).

        Returns:
            The content as a dict, or a tuple if more is asked for.

        Raises:
            CheckpointError: the file is missing or damaged.
            InputError: an option that cannot be acted on, or, unless ``return_unused_kwargs``, an unknown one.
        """
        place = {name: options.pop(name) for name in PLACE if name in options}
        checked = DOWNLOAD if return_unused_kwargs else tuple(options)
        settle("load_config", {name: options.pop(name) for name in checked if name in options}, PLACE)
        found = cls._config_path(pretrained_model_name_or_path, **place)
        content = cls._read_config(found)
        commit = re.search(r"snapshots/([0-9a-f]{40})/", found.as_posix())
        more = [options] if return_unused_kwargs else []
        if return_commit_hash:
            more.append(commit and commit[1])  # type: ignore[arg-type]
        return (content, *more) if more else content

    @classmethod
    def _settled(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those keywords of ``from_pretrained`` that are arguments of the constructor; the others are checked."""
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        others = {name: value for name, value in given.items() if name not in known}
        settle(cls.__name__, others, [*known, *inspect.signature(cast(Any, cls).from_pretrained).parameters])
        return {name: value for name, value in given.items() if name in known}

    @classmethod
    def _config_path(cls, model: str | os.PathLike[str], subfolder: str | None = None, **place: Any) -> Path:
        """The path of the config file, downloaded if need be."""
        if isinstance(model, str | os.PathLike) and os.path.isfile(model):
            return Path(model)
        file = f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name
        return hub.inside(hub.resolve(model, allow_patterns=[file], **place), subfolder or None) / cls.config_name

    @classmethod
    def _read_config(cls, path: Path) -> dict[str, Any]:
        from ..folders import reading

        with reading(path.parent) as folder:
            return read_json(folder / path.name)

    get_config_dict = load_config

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the config file into a folder, readable by diffusers.

        Args:
            push_to_hub: also upload it; ``kwargs`` are those of ``push_to_hub``, and ``repo_id`` is the folder's name
                if it is not given.

        Raises:
            OutputError: the folder cannot be written.
        """
        from ..folders import saving

        check_upload_options(kwargs)
        with saving(save_directory) as staging:
            self._write_config(staging)
        if push_to_hub:
            push_saved(self, save_directory, [self.config_name], kwargs)

    def _write_config(self, folder: Path) -> None:
        write_json(folder / self.config_name, self._file_content())

    def to_json_string(self) -> str:
        """The content of the config file, with sorted keys."""
        return json.dumps(self._file_content(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the config into this file.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(Path(json_file_path), json.loads(self.to_json_string()))

    def _file_content(self) -> dict[str, Any]:
        return {
            "_class_name": type(self).__name__,
            "_diffusers_version": FORMAT_VERSION,
            **{name: value for name, value in self._stored_config().items() if not name.startswith("_")},
        }

    def _stored_config(self) -> dict[str, Any]:
        """The values for the config file."""
        arguments = inspect.signature(type(self).__init__).parameters
        return {
            name: value
            for name, value in self.config.items()
            if name not in self.ignored_config_keys or name not in arguments or value != arguments[name].default
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
