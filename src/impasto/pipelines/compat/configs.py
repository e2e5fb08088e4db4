"""DiffusionPipeline, the base of all pipelines: their config, and loading any of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from ...checkpoints import hub
from ...checkpoints.config import DOWNLOAD, Config, write_json
from ...checkpoints.frozen import FORMAT_VERSION
from ...checkpoints.keywords import settle
from ...checkpoints.layout import INDEX_NAME
from ...checkpoints.upload import Uploads, check_upload_options
from ...checks import nearest
from ...errors import CheckpointNotFoundError, InputError

#: The arguments of ``from_pretrained`` that say where and how to look for files.
_OF_DOWNLOAD = ("subfolder", "variant", "use_safetensors", *hub.OPTIONS)


class DiffusionPipeline(Uploads):
    """Any pipeline: ``DiffusionPipeline.from_pretrained`` returns one of the class that ``model_index.json`` names.

    The config of a pipeline is what ``model_index.json`` holds: the library and class of each component.
    """

    config_name: ClassVar[str] = INDEX_NAME
    has_compatibles: ClassVar[bool] = False
    #: No argument is left out of the config.
    ignore_for_config: ClassVar[list[str]] = []

    _name_or_path: str | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a pipeline of the class that its ``model_index.json`` names; ``options`` are those of that class.

        Raises:
            CheckpointError: there is no such file, or it names a class that this package does not have.
        """
        from ...registry import pipeline_class

        stored = stored_class(pretrained_model_name_or_path, options)
        found = pipeline_class(stored)
        return found.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """A pipeline of ours, of the same class, that shares the components of another one, ours or of diffusers."""
        from ...registry import pipeline_class

        return pipeline_class(type(pipeline).__name__).from_pipe(pipeline, **options)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **options: Any) -> Path:
        """Download the files that ``from_pretrained`` would load, and return their folder.

        Args:
            options: ``variant``, ``revision`` and the other options of the download; components that are given, as in
                ``text_encoder=None``, are left out. Keywords without effect are accepted (``checkpoints.keywords``).

        Raises:
            InputError: an unknown option, or one that cannot be acted on.
        """
        from ...registry import pipeline_class

        source = _source(pretrained_model_name, options)
        with source.opened() as opened:
            stored = opened.read_content()[1].get("_class_name")
            kind = cast(Any, pipeline_class(stored) if cls is DiffusionPipeline else cls)
            others = {
                key: value for key, value in options.items() if key not in (*_OF_DOWNLOAD, *kind.component_names())
            }
            settle("download", others, [*_OF_DOWNLOAD, *kind.component_names()])
            name = kind.saved_as or kind.__name__
            index = opened.read_index(name)
            wanted = [part for part in kind.component_names() if part not in options]
            found: Path = opened.fetch(index, wanted, name)
        return found if opened is source else Path(source.model, source.subfolder or "")

    # --- the config ---

    @property
    def config(self) -> Config:
        """The library and class of each component, and what ``register_to_config`` has added; read-only.

        That of a loaded pipeline also says what was loaded: ``_class_name``, ``_diffusers_version``, ``_name_or_path``.
        """
        from ..loading import index_entry

        pipe = cast(Any, self)
        values = {} if self._name_or_path is None else {**self._format(), "_name_or_path": self._name_or_path}
        components = {name: tuple(index_entry(component)) for name, component in pipe.components.items()}
        return Config({**values, **components, **vars(self).get("_registered", {})})

    @property
    def name_or_path(self) -> str | None:
        """What ``from_pretrained`` was given; None for a pipeline that was not loaded."""
        return self._name_or_path

    def register_to_config(self, /, **values: Any) -> None:
        """Add values to ``config``. They have no effect on the pipeline. JSON has a device and the like as text."""
        self.__dict__["_registered"] = {**vars(self).get("_registered", {}), **values}

    def register_modules(self, **components: Any) -> None:
        """Assign components: ``register_modules(vae=vae)`` is ``pipe.vae = vae``."""
        self._check_names(components)
        for name, component in components.items():
            setattr(self, name, component)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **components: Any) -> Any:
        """A pipeline of the given components; a config only names their classes, so others are None."""
        return cls(**{**dict.fromkeys(cls._check_names(components)), **components})

    @classmethod
    def _check_names(cls, given: Mapping[str, Any]) -> list[str]:
        """The names of the components, if all that are given are among them."""
        names: list[str] = cast(Any, cls).component_names()
        for name in given:
            if name not in names:
                has = f"it has {', '.join(names)}{nearest(name, names)}"
                raise InputError(f"{cls.__name__} has no component {name!r}; {has}")
        return names

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **options: Any,
    ) -> Any:
        """The contents of ``model_index.json``; ``options`` are those of the download.

        Args:
            return_unused_kwargs: return the other options, too.
            return_commit_hash: return None in addition, as no commit is recorded.

        Raises:
            InputError: an option that cannot be acted on, or, unless ``return_unused_kwargs``, an unknown one.
        """
        unused = {name: value for name, value in options.items() if name not in _OF_DOWNLOAD}
        checked = DOWNLOAD if return_unused_kwargs else tuple(unused)
        settle("load_config", {name: unused.pop(name) for name in checked if name in unused}, _OF_DOWNLOAD)
        path, content = _source(pretrained_model_name_or_path, options).read_content()
        if not content:
            raise CheckpointNotFoundError(f"{path} does not exist; {pretrained_model_name_or_path} is not a pipeline")
        found = [content, *([unused] if return_unused_kwargs else []), *([None] if return_commit_hash else [])]
        return content if len(found) == 1 else tuple(found)

    get_config_dict = load_config

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The entries of components, replaced by those given; what else is given or public; the other entries."""
        names = cast(Any, cls).component_names()
        chosen = {name: given.get(name, config_dict.get(name)) for name in names if {name} & {*given, *config_dict}}
        others = {name: value for name, value in config_dict.items() if name not in names}
        unused = {name: value for name, value in {**others, **given}.items() if name not in names and name[0] != "_"}
        return chosen, unused, others

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **upload: Any) -> None:
        """Write ``model_index.json`` alone. ``push_to_hub`` uploads the whole pipeline."""
        from ...folders import saving

        check_upload_options(upload)
        with saving(save_directory) as staging:
            write_json(staging / INDEX_NAME, self._stored_config())
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **upload})

    def to_json_string(self) -> str:
        """The config as JSON."""
        return json.dumps(self._stored_config(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the config as JSON."""
        write_json(Path(json_file_path), self._stored_config())

    def _stored_config(self) -> dict[str, Any]:
        values = {**self._format(), **{n: value for n, value in self.config.items() if n != "_name_or_path"}}
        stored: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return stored

    def _format(self) -> dict[str, Any]:
        name = cast(Any, self).saved_as or type(self).__name__
        return {"_class_name": name, "_diffusers_version": FORMAT_VERSION}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Has no effect, as for models: code is neither saved with weights nor loaded with them."""


def stored_class(model: str | os.PathLike[str], options: Mapping[str, Any]) -> str:
    """The name of the class in a pipeline's ``model_index.json``.

    Args:
        options: of ``from_pretrained``; only those of the download are read.
    """
    path, content = _source(model, options).read_content()
    if not content:
        raise CheckpointNotFoundError(f"{path} does not exist; a model alone is loaded by its own class or AutoModel")
    return str(content.get("_class_name"))


def _source(model: str | os.PathLike[str], options: Mapping[str, Any]) -> Any:
    from ..loading import Source

    return Source.of(model, options)
