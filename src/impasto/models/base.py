"""The base class of every model: config, loading, saving, dtype, device."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch

from ..checkpoints.config import Configurable, naming
from ..checkpoints.upload import Uploads, check_upload_options, check_writable, files_in, push_saved
from ..checks import parse_size, text
from ..errors import CheckpointError, ConfigurationError, WeightsMismatchError
from ..nn.changes import refuse_unsaveable
from ..nn.machine import check_device, device_of_map
from ..nn.precision import adapt
from .compat.adapters import AdapterMethods
from .compat.surface import ModelSurface
from .dtypes import parse_dtype
from .single_file import SingleFiles

if TYPE_CHECKING:
    from ..checkpoints.stored import Stored

logger = logging.getLogger("impasto")


class Model(SingleFiles, AdapterMethods, Configurable, Uploads, ModelSurface):
    """A ``torch.nn.Module`` that knows its constructor arguments and its folder format."""

    #: Arguments that diffusers' class lacks, and that change what the model computes.
    not_in_diffusers: ClassVar[frozenset[str]] = frozenset()
    #: Argument (a number, or a list) -> the list of blocks whose length it determines, by its path in tensor names.
    stored_lists: ClassVar[Mapping[str, str]] = {}

    def _apply(self, *args: Any, **options: Any) -> Self:
        """What every cast is: a loaded model that gets 16-bit weights uses them as if it had been loaded with them."""
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        if "_name_or_path" in self.config:
            adapt(self)
        return self

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
        force_download: bool = False,
        device: torch.device | str = "cpu",
        device_map: Any = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        disable_mmap: bool = False,
        quantization_config: Any = None,
        output_loading_info: bool = False,
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
            revision, cache_dir, local_files_only, token, force_download: options of the hub download.
            device, device_map: where to load it: a device, or "auto" for the accelerator, if the model fits there.
            max_memory: how much of each device "auto" may use, as in ``{0: "6GB"}``.
            disable_mmap: read the files into memory rather than mapping them.
            quantization_config: a config of diffusers or transformers, such as ``BitsAndBytesConfig``, for
                ``quantize`` (``transforms.quantization_configs``).
            output_loading_info: also return what did not fit, by kind; loading is strict, so that is never anything.
            overrides: values that replace those of the config, and keywords without effect (``checkpoints.keywords``).

        Raises:
            CheckpointError: the folder or a file is missing or damaged, or weights and config do not match.
            ConfigurationError: the config has values that cannot be used.
            InputError: an unknown keyword, or one that cannot be acted on.
            ResourceError: ``device`` does not exist.
        """
        from ..checkpoints import hub, weights
        from ..folders import reading

        overrides = cls._settled(overrides)
        target = check_device(device)
        root, _ = hub.fetch(
            pretrained_model_name_or_path,
            [text("subfolder", subfolder or "", 255)],
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        chosen = parse_dtype(dtype if dtype is not None else torch_dtype)
        with reading(hub.inside(root, subfolder)) as folder:
            model, stored = cls.skeleton(folder, variant=variant, use_safetensors=use_safetensors, **overrides)
            if device_map is not None:
                size = sum(math.prod(t.shape) * (chosen or getattr(torch, t.dtype)).itemsize for t in stored.values())
                target = device_of_map(device_map, max_memory, size)
            weights.load_into(model, stored, dtype=chosen, device=target, rename=cls._rename_key, copy=disable_mmap)
        if quantization_config is not None:
            from ..transforms.quantization_configs import quantize_as

            quantize_as(quantization_config, model)
        adapt(model)
        model.eval().register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        if not output_loading_info:
            return model
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return cast(Self, (model, {kind: [] for kind in kinds}))

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
        if config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{folder / cls.config_name}: these weights are quantized by another library. Load the original "
                f"weights, with the same quantization_config if they are to be quantized."
            )
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
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **upload: Any,
    ) -> None:
        """Write config.json and safetensors (sharded beyond ``max_shard_size``), readable by diffusers.

        Args:
            is_main_process: False writes nothing: another process does.
            save_function: accepted without effect.
            push_to_hub: upload it too; ``upload`` holds arguments of ``push_to_hub``.

        Raises:
            OutputError: the folder cannot be written.
            InputError: ``safe_serialization=False``: pickles are read but never written.
            ConfigurationError: an adapter wraps layers, or the module has tensors or dtypes that would not load.
        """
        check_writable(safe_serialization, use_flashpack)
        check_upload_options(upload)
        from ..checkpoints.layout import superseded
        from ..checkpoints.weights import write_weights
        from ..folders import saving

        size = parse_size(max_shard_size)
        self.check_saveable()
        if changed := self.changed_arguments():
            logger.warning(
                "%s: diffusers has no %s, and would ignore it in what is saved here; load it with Impasto",
                type(self).__name__,
                ", ".join(changed),
            )
        if not is_main_process:
            return
        with saving(save_directory, superseded) as staging:
            write_weights(self.state_dict(), staging, variant=variant, max_shard_bytes=size)
            self._write_config(staging)
            written = files_in(staging)
        if push_to_hub:
            push_saved(self, save_directory, written, upload)

    def changed_arguments(self) -> list[str]:
        """Those arguments that diffusers lacks and that have other values than the default."""
        return sorted(self.not_in_diffusers & self._stored_config().keys())

    def check_saveable(self, name: str = "") -> None:
        """Refuse to save what could not be loaded: other tensors than those of a module that is built from the config,
        or in dtypes that no checkpoint has.

        Raises:
            ConfigurationError: the message says what to do.
        """
        from ..checkpoints.stored import FLOATS

        name = name or type(self).__name__
        refuse_unsaveable(name, self)
        with torch.device("meta"):
            expected = type(self)(**self.checked_arguments(self.config)).state_dict()
        present = self.state_dict()
        strange = [key for key in present if key not in expected]
        missing = [key for key in expected if key not in present]
        if strange or missing:
            raise ConfigurationError(
                f"the {name} was not saved, since it could not be loaded again: its config does not describe it "
                f"({len(strange)} tensors are strange, {len(missing)} missing, such as {(strange + missing)[0]}). "
                f"Undo what changed its layers first."
            )
        for key, tensor in present.items():
            if tensor.is_floating_point() and str(tensor.dtype).removeprefix("torch.") not in FLOATS:
                raise ConfigurationError(
                    f"the {name} was not saved, since it could not be loaded again: {key} is {tensor.dtype}, not one "
                    f"of {', '.join(FLOATS)}. Cast it first, as in model.to(torch.bfloat16)."
                )
