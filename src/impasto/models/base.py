"""The base class of every model: config, loading, saving, dtype, device."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from ..checkpoints.config import Configurable, naming
from ..checks import shown
from ..errors import InputError, WeightsMismatchError
from ..nn.machine import check_device
from ..nn.precision import adapt
from .compat import ModelSurface

if TYPE_CHECKING:
    from ..checkpoints.stored import Stored


class Model(Configurable, ModelSurface):
    """A ``torch.nn.Module`` that knows its constructor arguments and its folder format."""

    #: Argument (a number, or a list) -> the list of blocks whose length it determines, by its path in tensor names.
    stored_lists: ClassVar[Mapping[str, str]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter; not one in which weights are only stored."""
        for parameter in self.parameters():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter.dtype
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The device of the parameters, or that on which they are computed with."""
        onload: torch.device | None = vars(self).get("_onload_device")
        return next(self.parameters()).device if onload is None else onload

    @classmethod
    def _rename_key(cls, name: str) -> str:
        """The name of a stored tensor -> its name in this class; for models with older layouts."""
        return name

    @classmethod
    def _fit_config(cls, config: dict[str, Any], stored_names: set[str]) -> dict[str, Any]:
        """Complete an old config from the names of the stored tensors."""
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str = "cpu",
        **overrides: Any,
    ) -> Self:
        """Load a model in evaluation mode from a folder or the hub.

        Args:
            pretrained_model_name_or_path: a folder, ``builtin:scenes``, or a hub id.
            subfolder: the folder of the model in it, for example ``"transformer"``.
            dtype, torch_dtype: of the weights: a ``torch.dtype``, its name, or ``"auto"`` for the stored one;
                float32 by default.
            variant: ``"fp16"`` loads ``diffusion_pytorch_model.fp16.safetensors``.
            use_safetensors: True: only safetensors; False: only ``.bin``; None: whichever is found first. A
                ``.bin`` may hold only tensors.
            overrides: values that replace those of the config.

        Raises:
            CheckpointError: the folder or a file is missing or damaged, or weights and config do not match.
            ConfigurationError: the config has values that cannot be used.
            ResourceError: ``device`` does not exist.
        """
        from ..checkpoints import hub, weights
        from ..folders import reading

        target = check_device(device)
        root = hub.resolve(
            pretrained_model_name_or_path,
            allow_patterns=[f"{subfolder}/*" if subfolder else "*"],
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        chosen = parse_dtype(dtype if dtype is not None else torch_dtype)
        with reading(hub.inside(root, subfolder)) as folder:
            model, stored = cls.skeleton(folder, variant=variant, use_safetensors=use_safetensors, **overrides)
            weights.load_into(model, stored, dtype=chosen, device=target, rename=cls._rename_key)
        adapt(model)
        return model.eval()

    @classmethod
    def skeleton(
        cls, folder: Path, *, variant: str | None = None, use_safetensors: bool | None = None, **overrides: Any
    ) -> tuple[Self, Stored]:
        """The model on the meta device, and the stored tensors, which match it: the checks of loading without its cost.

        Raises:
            CheckpointError, ConfigurationError: as ``from_pretrained``.
        """
        from ..checkpoints import stored as files
        from ..checkpoints.weights import check_fit

        cls.checked_arguments({}, **overrides)
        config = cls.load_config(folder)
        stored = files.describe(files.find_weight_files(folder, variant=variant, use_safetensors=use_safetensors))
        names = {cls._rename_key(name) for name in stored}
        config = cls._fit_config(config, names)
        with naming(folder / cls.config_name), torch.device("meta"):
            cls._check_lists(cls.checked_arguments(config, **overrides), names, folder)
            model = cls.from_config(config, **overrides)
        check_fit(model, stored, cls._rename_key)
        return model, stored

    @classmethod
    def _check_lists(cls, arguments: Mapping[str, Any], names: set[str], folder: Path) -> None:
        """Compare the config's numbers of blocks with those stored, before building a billion of them."""
        for argument, path in cls.stored_lists.items():
            indices = {name.removeprefix(f"{path}.").split(".", 1)[0] for name in names if name.startswith(f"{path}.")}
            value = arguments[argument]
            asked = len(value) if isinstance(value, list) else value
            if asked != len(indices):
                raise WeightsMismatchError(
                    f"{folder / cls.config_name}: {argument} asks for {asked} {path}, and the weights hold "
                    f"{len(indices)}. Weights and config.json do not belong together."
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and safetensors (sharded beyond ``max_shard_size``), readable by diffusers.

        Raises:
            OutputError: the folder cannot be written.
            InputError: ``safe_serialization=False``: pickles are read but never written.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False would write a pickle; only safetensors are written")
        from ..checkpoints.layout import superseded
        from ..checkpoints.weights import write_weights
        from ..folders import saving

        size = parse_size(max_shard_size)
        with saving(save_directory, superseded) as staging:
            write_weights(self.state_dict(), staging, variant=variant, max_shard_bytes=size)
            self._write_config(staging)


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype | None = torch.float32) -> torch.dtype | None:
    """The dtype for a ``torch.dtype`` or its name; None for ``"auto"`` (as stored); ``default`` for None."""
    if dtype is None:
        return default
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point type, such as torch.bfloat16, not {dtype}")
        return dtype
    if dtype == "auto":
        return None
    names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
    found = getattr(torch, names.get(str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {shown(dtype)} is unknown; use float32, bfloat16, float16 or auto")
    return found


def parse_size(size: int | str) -> int:
    """Bytes from a number, or a text such as ``"5GB"`` (powers of ten) or ``"5GiB"`` (powers of two)."""
    if isinstance(size, int):
        found = size
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
        if match is None:
            raise InputError(f"size {shown(size)} is not understood; write it like 5GB or 500MB")
        base = 1024 if match[3] else 1000
        found = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if found <= 0:
        raise InputError(f"size {shown(size)} must be more than zero")
    return found
