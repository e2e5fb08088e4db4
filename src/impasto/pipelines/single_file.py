"""Pipelines from single files with a transformer, and perhaps an autoencoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

from ..errors import CheckpointNotFoundError, InputError
from ..registry import accepted_classes, class_of

if TYPE_CHECKING:
    from ..checkpoints.original.files import Weights
    from .loading import DTypes

logger = logging.getLogger("impasto")

_ROLES = ("transformer", "vae")
_TEXT = ("text_encoders.", "cond_stage_model.", "conditioner.")


class SingleFilePipelines:
    """Loading of a pipeline from a single file."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: DTypes = None,
        dtype: DTypes = None,
        weights: Weights | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        disable_mmap: bool = False,
        **components: Any,
    ) -> Self:
        """Load a pipeline whose transformer, and perhaps autoencoder, are in a single file.

        Args:
            pretrained_model_link_or_path: as for the ``from_single_file`` of models.
            config: the folder or repository of a pipeline with the other components, and the configs of these; without
                one, all others are given as keywords.
            dtype, torch_dtype: as in ``from_pretrained``.
            weights: ``"raw"`` or ``"ema"``, of a training checkpoint with both.
            revision, cache_dir, local_files_only, token, force_download: options of the hub download; the revision is
                that of the file.
            components: components that are in neither, or that replace those; and, with ``config``, other keywords of
                ``from_pretrained``.

        Raises:
            CheckpointError: the file is damaged, or holds no transformer of this pipeline.
            InputError: components are missing; the message lists them.
        """
        from ..checkpoints.original.files import read_single_file

        names = cast(Any, cls).component_names()
        place = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
            "force_download": force_download,
        }
        requested = dtype if dtype is not None else torch_dtype
        file = read_single_file(pretrained_model_link_or_path, weights, revision=revision, **place)
        held = {part.kind.class_name for part in file.parts()}
        found = {}
        for role in _ROLES:
            class_name = accepted_classes(cls.__name__, role)[0]
            if role in components or (role != "transformer" and class_name not in held):
                continue
            of_role = requested.get(role, requested.get("default")) if isinstance(requested, Mapping) else requested
            options = {"torch_dtype": of_role, "disable_mmap": disable_mmap, **place}
            found[role] = _load(class_of(class_name), file, config, role, options)
        if any(name.startswith(_TEXT) for name in file.tensors):
            logger.warning(
                "%s: its text encoder is not read; that of config=... or text_encoder=... is used", file.path
            )
        if config is not None:
            more = {"torch_dtype": requested, "disable_mmap": disable_mmap, **place}
            pipe = cast(Any, cls).from_pretrained(config, **more, **found, **components)
        else:
            missing = [name for name in names if name not in found and name not in components]
            unknown = [name for name in components if name not in names]
            if unknown:
                raise InputError(
                    f"{cls.__name__} has no component {unknown[0]!r}; without config=..., keywords are components"
                )
            if missing:
                raise InputError(
                    f"{cls.__name__} needs {', '.join(missing)} in addition to {file.path.name}: give them as keywords "
                    f"or config=FOLDER of a pipeline"
                )
            pipe = cast(Any, cls)(**found, **components)
        return cast(Self, pipe)


def _load(cls: Any, file: Any, config: str | os.PathLike[str] | None, role: str, options: Mapping[str, Any]) -> Any:
    """A component of the file, by its config in the folder of the pipeline if that has one."""
    if config is not None:
        try:
            return cls.from_single_file(file, config=config, subfolder=role, **options)
        except CheckpointNotFoundError:
            logger.warning("%s has no config of a %s: its sizes are read from the tensors", config, role)
    return cls.from_single_file(file, **options)
