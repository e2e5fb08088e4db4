"""Models from single files: those of the original programs, of ComfyUI, of latent diffusion, or in our own names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from ..checks import shown
from ..errors import InputError
from ..family import ALIASES
from ..nn.machine import check_device
from ..nn.precision import adapt
from .dtypes import parse_dtype

if TYPE_CHECKING:
    from ..checkpoints.original.convert import Component
    from ..checkpoints.original.files import SingleFile, Weights

logger = logging.getLogger("impasto")

#: Where in a pipeline's folder the config of a class is.
_FOLDERS = {"AutoencoderKL": "vae"}


class SingleFiles:
    """Loading of a model from a single file."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        weights: Weights | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        disable_mmap: bool = False,
        original_config: Any = None,
        quantization_config: Any = None,
        **overrides: Any,
    ) -> Self:
        """Load a model in evaluation mode from a single file.

        Args:
            pretrained_model_link_or_path_or_dict: a ``.safetensors`` file, a pickle of tensors (``.pth``, ``.pt``,
                ``.ckpt``, ``.bin``), the address of one on the hub, or a state dict. Names are those of the original
                code, with any prefix (``model.diffusion_model.``, ``first_stage_model.``), or of diffusers.
            config: a folder or repository with the config, of the model or of a whole pipeline. Without one, weights
                that were saved with a config have that which is next to them; of others, sizes are read from the
                tensors, and a warning says what is not in them.
            subfolder: the folder of the config in it.
            dtype, torch_dtype: as in ``from_pretrained``.
            weights: ``"raw"`` or ``"ema"``, of a training checkpoint with both; by default those that the original
                program generates with: PixArt's the raw ones.
            revision, cache_dir, local_files_only, token, force_download: options of the hub download.
            original_config: not needed: give ``config``.
            overrides: values of the config, such as ``num_attention_heads`` or ``scaling_factor``.

        Raises:
            CheckpointError: the file is damaged, holds anything but tensors, or is not of this model.
            InputError: an unknown keyword, or a value that the file does not have and that has to be given.
        """
        from ..checkpoints import weights as loading
        from ..checkpoints.original.convert import component_of
        from ..checkpoints.original.files import read_single_file

        model_class = cast(Any, cls)
        if original_config is not None:
            raise InputError(f"original_config={shown(original_config)} is not read; give config=FOLDER, or values")
        values = model_class._settled(overrides)
        target = check_device(device)
        chosen = parse_dtype(dtype if dtype is not None else torch_dtype)
        place = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
            "force_download": force_download,
        }
        if config is not None:
            values = {**model_class._arguments(cls._config_of(config, subfolder, place), {}), **values}
        model_class.checked_arguments({}, **values)
        file = read_single_file(pretrained_model_link_or_path_or_dict, weights, **place)
        stored = cls.arguments_next_to(file) if config is None else {}
        component = component_of(file, cls._single_file_class(), {**stored, **values})
        for sentence in component.assumed if config is None and not stored else ():
            logger.warning("%s: %s; give it, or config=FOLDER, if it is another", file.path.name, sentence)
        model = cls.of_component(component, file.path)
        loading.fill(model, component.tensors.items(), dtype=chosen, device=target, copy=disable_mmap)
        if quantization_config is not None:
            from ..transforms.quantization_configs import quantize_as

            quantize_as(quantization_config, model)
        adapt(model)
        model.eval().register_to_config(_name_or_path=os.fspath(file.path))
        return cast(Self, model)

    @classmethod
    def arguments_next_to(cls, file: SingleFile) -> dict[str, Any]:
        """The arguments in the config of this model that was saved with a file of weights; none if there is no such."""
        from ..checkpoints.layout import WEIGHTS

        model_class = cast(Any, cls)
        path = file.path.with_name(model_class.config_name)
        if not WEIGHTS.fullmatch(file.path.name) or not path.is_file():
            return {}
        config = model_class.load_config(path)
        name = config.get("_class_name")
        if not isinstance(name, str) or ALIASES.get(name, name) != cls._single_file_class():
            return {}
        logger.info("%s: its config is %s", file.path.name, path)
        found: dict[str, Any] = model_class._arguments(config, {})
        return found

    @classmethod
    def of_component(cls, component: Component, path: Path) -> Any:
        """The model of a component on the meta device, which its tensors fit.

        Raises:
            CheckpointError, ConfigurationError: they do not, or the config cannot be used.
        """
        from ..checkpoints.config import naming
        from ..checkpoints.stored import StoredTensor
        from ..checkpoints.weights import check_fit

        model_class = cast(Any, cls)
        for name in list(component.tensors):
            component.tensors[model_class._rename_key(name)] = component.tensors.pop(name)
        with naming(path), torch.device("meta"):
            model_class._check_lists(
                model_class.checked_arguments(component.config), set(component.tensors), path.parent
            )
            model = model_class.from_config(component.config)
        stored = {
            name: StoredTensor(path, str(x.dtype).removeprefix("torch."), tuple(x.shape))
            for name, x in component.tensors.items()
        }
        check_fit(model, stored)
        return model

    @classmethod
    def _single_file_class(cls) -> str:
        from ..checkpoints.original.files import KINDS

        known = {kind.class_name for kind in KINDS}
        return next(base.__name__ for base in cls.__mro__ if base.__name__ in known)

    @classmethod
    def _config_of(
        cls, config: str | os.PathLike[str], subfolder: str | None, place: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The config in a folder or repository of the model or of a whole pipeline."""
        alone = os.path.isfile(config) or os.path.isfile(os.path.join(config, "config.json"))
        if subfolder is None and not alone:
            subfolder = _FOLDERS.get(cls._single_file_class(), "transformer")
        found: dict[str, Any] = cast(Any, cls).load_config(config, subfolder=subfolder, **place)
        return found
