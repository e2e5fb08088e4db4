"""``model_index.json`` and the folders beside it <-> the parts of a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..checkpoints import hub
from ..checkpoints.config import read_json, write_json
from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InputError,
    MissingDependencyError,
    OutputError,
    WeightsMismatchError,
)
from ..models.autoencoder_kl import AutoencoderKL
from ..models.glm_image import GlmImageTransformer2DModel
from ..models.pixart import PixArtTransformer2DModel
from ..nn.module import Model, parse_dtype
from ..schedulers.base import Scheduler
from ..schedulers.ddim import DDIMScheduler
from ..schedulers.ddpm import DDPMScheduler
from ..schedulers.dpm_solver import DPMSolverMultistepScheduler
from ..schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from ..schedulers.lcm import LCMScheduler

logger = logging.getLogger("impasto")

INDEX_NAME = "model_index.json"
#: The version of diffusers whose format is written.
FORMAT_VERSION = "0.42.1"

#: Class names in ``model_index.json`` -> our classes. Early PixArt repositories have the name of a base class.
OURS: dict[str, type[Model] | type[Scheduler]] = {
    "PixArtTransformer2DModel": PixArtTransformer2DModel,
    "Transformer2DModel": PixArtTransformer2DModel,
    "GlmImageTransformer2DModel": GlmImageTransformer2DModel,
    "AutoencoderKL": AutoencoderKL,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "DDIMScheduler": DDIMScheduler,
    "DDPMScheduler": DDPMScheduler,
    "LCMScheduler": LCMScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
}
#: Classes of transformers that are loaded with it.
LANGUAGE_MODELS = ("T5EncoderModel", "GlmImageForConditionalGeneration")
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
#: Those that need no vocabulary, or bring their own.
PROCESSORS = ("ByT5Tokenizer", "GlmImageProcessor")

DType = torch.dtype | str | None
DTypes = DType | Mapping[str, DType]


def dtype_of_each(names: Sequence[str], dtype: DTypes) -> dict[str, torch.dtype | None]:
    """The dtype of each part (None: as stored), from one for all or a dict with ``"default"``."""
    if not isinstance(dtype, Mapping):
        return dict.fromkeys(names, parse_dtype(dtype))
    unknown = [name for name in dtype if name not in (*names, "default")]
    if unknown:
        raise InputError(f"dtype names a part {unknown[0]!r} that there is not; use default, {', '.join(names)}")
    return {name: parse_dtype(dtype.get(name, dtype.get("default"))) for name in names}


@dataclass(frozen=True)
class Source:
    """A folder or repository, and which of its files are wanted."""

    model: str | os.PathLike[str]
    subfolder: str | None
    variant: str | None
    use_safetensors: bool | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    token: str | bool | None

    def _resolve(self, patterns: list[str]) -> Path:
        root = hub.resolve(
            self.model,
            allow_patterns=[f"{self.subfolder}/{pattern}" if self.subfolder else pattern for pattern in patterns],
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            token=self.token,
        )
        return root / self.subfolder if self.subfolder else root

    def read_index(self, pipeline: str) -> dict[str, list[str | None]]:
        """Part name -> library and class name.

        Raises:
            CheckpointNotFoundError: there is no ``model_index.json``; the message says how to use what there is.
        """
        path = self._resolve([INDEX_NAME]) / INDEX_NAME
        if not path.is_file():
            transformer = "GlmImageTransformer2DModel" if pipeline.startswith("Glm") else "PixArtTransformer2DModel"
            raise CheckpointNotFoundError(
                f"{self.model} has no {INDEX_NAME}: it is no whole pipeline. If it holds a transformer alone, "
                f"load that, and the other parts from a whole pipeline: {pipeline}.from_pretrained(WHOLE_PIPELINE, "
                f"transformer={transformer}.from_pretrained({os.fspath(self.model)!r}, "
                f"subfolder='transformer'))"
            )
        content = read_json(path)
        stored = content.get("_class_name")
        if stored != pipeline:
            logger.warning("%s was saved by %s and is loaded as %s", self.model, stored, pipeline)
        index = {}
        for name, value in content.items():
            if name.startswith("_") or not isinstance(value, list):  # options of other pipelines are no parts
                continue
            if len(value) != 2 or not all(isinstance(x, str | None) for x in value):
                raise CheckpointError(f"{path}: {name} should be [library, class], and is {value!r}; download it again")
            index[name] = value
        return index

    def fetch(self, index: Mapping[str, list[str | None]], names: list[str], pipeline: str) -> Path:
        """The folder that holds the parts ``names``, downloaded where that is needed.

        Raises:
            CheckpointNotFoundError: parts are missing; the message names them.
        """
        stored = [name for name in names if index.get(name, [None, None])[1] is not None]
        folder = self._fetch_files(stored, safetensors=self.use_safetensors is not False)
        without_weights = [name for name in stored if not _has_safetensors(folder / name)]
        if without_weights and self.use_safetensors is None:
            folder = self._fetch_files(without_weights, safetensors=False)
        # A part that the index lists as null is meant to be absent.
        lacking = [n for n in names if n not in index or (n in stored and not (folder / n).is_dir())]
        if lacking:
            given = ", ".join(f"{name}=base.{name}" for name in lacking)
            raise CheckpointNotFoundError(
                f"{self.model} lacks parts of a pipeline: {', '.join(lacking)}. Take them from a whole pipeline: "
                f"base = {pipeline}.from_pretrained(WHOLE_PIPELINE), then "
                f"{pipeline}.from_pretrained({os.fspath(self.model)!r}, {given}). Or leave parts out, as in "
                f"{lacking[0]}=None."
            )
        return folder

    def _fetch_files(self, names: list[str], safetensors: bool) -> Path:
        return self._resolve([INDEX_NAME, *(file for name in names for file in self._files(name, safetensors))])

    def _files(self, name: str, safetensors: bool) -> list[str]:
        """Names of a part's files in a repository, which may hold its weights in several forms."""
        suffix = "safetensors" if safetensors else "bin"
        middle = f".{self.variant}" if self.variant else ""
        weights = [
            f"{stem}{middle}{ending}.{suffix}"
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
            for ending in ("", "-*-of-*")
        ]
        return [f"{name}/{file}" for file in ("*.json", "*.jinja", "*.model", "*.txt", *weights)]


def _has_safetensors(folder: Path) -> bool:
    """Whether the weights of a model are there; tokenizers and schedulers (without config.json) have none."""
    return not (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def load_part(
    library_and_class: Sequence[str | None],
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
) -> Any:
    """Load one part from its folder.

    Raises:
        CheckpointError: a class that is not known here, or files that are missing or damaged.
        MissingDependencyError: the installed transformers lacks a class.
    """
    library, name = library_and_class
    if library == "transformers" and name in LANGUAGE_MODELS:
        return _load_language_model(name, folder, dtype, variant, use_safetensors)
    if library == "transformers" and name in TOKENIZERS:
        return _load_tokenizer(folder)
    if library == "transformers" and name in PROCESSORS:
        return _load_processor(name, folder)
    found = OURS.get(name or "")
    if found is None or library == "transformers":
        known = [*OURS, *LANGUAGE_MODELS, *TOKENIZERS, *PROCESSORS]
        raise CheckpointError(
            f"{folder.name} is a {name} of {library}, and no such class is known here; known: {', '.join(known)}. "
            f"Load it with its own library and pass it: from_pretrained(..., {folder.name}={name}"
            f".from_pretrained({str(folder.parent)!r}, subfolder={folder.name!r}))"
        )
    if issubclass(found, Scheduler):
        return found.from_pretrained(folder)
    return found.from_pretrained(folder, dtype=dtype or "auto", variant=variant, use_safetensors=use_safetensors)


def _class_of_transformers(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise MissingDependencyError(
            f"transformers {transformers.__version__} has no {name}; update it: pip install -U transformers"
        )
    return found


def _load_processor(name: str, folder: Path) -> Any:
    try:
        return _class_of_transformers(name).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the {name} in {folder} cannot be loaded: {error}. Download or save it again."
        ) from error


def _load_language_model(
    name: str, folder: Path, dtype: torch.dtype | None, variant: str | None, use_safetensors: bool | None
) -> nn.Module:
    from safetensors import SafetensorError

    cls = _class_of_transformers(name)
    what = "text encoder" if name == "T5EncoderModel" else name
    try:
        # Only loading with a dtype, and not a cast afterwards, keeps T5's sensitive weights in float32 in float16.
        loaded: Any = cls.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            variant=variant,
            use_safetensors=use_safetensors,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the {what} in {folder} cannot be loaded: {error}. Download or save it again."
        ) from error
    encoder, report = loaded
    problems = [*report["missing_keys"], *report["mismatched_keys"]]
    if problems:
        names = ", ".join(str(problem) for problem in problems[:5])
        raise WeightsMismatchError(
            f"the weights in {folder} do not fit the {what}'s config: missing or misshapen are {names}. "
            f"Weights and config.json do not belong together."
        )
    return cast(nn.Module, encoder.eval())


def _load_tokenizer(folder: Path) -> Any:
    from transformers import T5Tokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # it would be made without a vocabulary
        raise CheckpointNotFoundError(
            f"{folder} holds no tokenizer: expected {' or '.join(TOKENIZER_FILES)}. Download or save it again."
        )
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {error}. Download or save it again."
        ) from error


def library_and_class(part: Any) -> list[str]:
    """What ``model_index.json`` says of a part; ours have the names of their namesakes in diffusers."""
    cls = type(part)
    library = "diffusers" if isinstance(part, Model | Scheduler) else cls.__module__.split(".")[0]
    return [library, cls.__name__]


def save_parts(parts: Mapping[str, Any], root: Path, pipeline: str, variant: str | None, max_shard_bytes: int) -> None:
    """Write every part into its folder, and then the index: an interrupted save is not taken for a pipeline.

    Raises:
        OutputError: the folder cannot be written.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": FORMAT_VERSION}
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            index[name] = [None, None] if part is None else library_and_class(part)
            if part is not None:
                # Models of transformers and diffusers have these options too; what else there is has no weights.
                sizes = {"variant": variant, "max_shard_size": max_shard_bytes} if isinstance(part, nn.Module) else {}
                part.save_pretrained(root / name, **sizes)
        write_json(root / INDEX_NAME, index)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{root} cannot be written: {error}; choose another place") from error
