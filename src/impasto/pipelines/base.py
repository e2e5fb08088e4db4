"""Pipeline: parts that are loaded, saved, moved and shared together."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from ..nn.module import Model, parse_dtype, parse_size
from ..nn.outputs import keyed
from . import loading
from .placement import OneAtATime, Placement, Resident, offload_device

logger = logging.getLogger("impasto")


@keyed
class ImagePipelineOutput(NamedTuple):
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor  # by output_type; tensors and latents [B, C, H, W]


def unwrapped(part: Any) -> Any:
    """The module that ``torch.compile`` has wrapped, or the part itself."""
    return getattr(part, "_orig_mod", part)


class Pipeline:
    """A pipeline's parts are the arguments of its constructor, and attributes under the same names.

    Any of them may be None, assigned anew, or deleted (``del pipe.transformer``).
    """

    placement: Placement

    def __init__(self, **parts: Any):
        self.__dict__.update(parts)
        self.placement = Resident()
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def part_names(cls) -> list[str]:
        """The names of the parts."""
        return list(inspect.signature(cls.__init__).parameters)[1:]

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; None for what is missing. ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: vars(self).get(name) for name in self.part_names()}

    def _modules(self) -> list[nn.Module]:
        return [part for part in self.components.values() if isinstance(part, nn.Module)]

    # --- loading, saving, sharing ---

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: loading.DTypes = None,
        dtype: loading.DTypes = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **components: Any,
    ) -> Self:
        """Load a pipeline from a folder, the hub, or the package (``builtin:scenes``).

        Args:
            pretrained_model_name_or_path: a folder with ``model_index.json``, a hub id, or a bundled model's id.
            dtype, torch_dtype: of the weights of all parts: a ``torch.dtype``, its name, or ``"auto"`` (as
                stored); float32 by default. A dict gives each part its own, by name, and the others that of
                ``"default"``.
            variant: ``"fp16"`` loads the ``*.fp16.safetensors`` files.
            revision, cache_dir, local_files_only, token: of the hub.
            subfolder: where in the folder or repository the pipeline lies.
            use_safetensors: True: only safetensors; False: only ``.bin``; None: the first that is there.
            components: parts that take the place of the stored ones. A part given as None is left out. The files
                of neither are read or downloaded.

        Raises:
            CheckpointError: a part or a file is missing, damaged, or of a class that is not known here.
            HubError: the model has to be downloaded, and cannot be.
            InputError: an argument that the pipeline does not have.
        """
        names = cls.part_names()
        for name in components:
            if name not in names:
                raise InputError(f"{cls.__name__}.from_pretrained has no argument {name!r}; parts: {', '.join(names)}")
        dtypes = loading.dtype_of_each(names, dtype if dtype is not None else torch_dtype)
        source = loading.Source(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        index = source.read_index(cls.__name__)
        wanted = [name for name in names if name not in components]
        folder = source.fetch(index, wanted, cls.__name__)
        loaded = {
            name: loading.load_part(index[name], folder / name, dtypes[name], variant, use_safetensors)
            for name in wanted
            if index[name][1] is not None
        }
        return cls(**{**dict.fromkeys(names), **loaded, **components})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write every part into a folder of its own, and ``model_index.json``; diffusers reads them too.

        Args:
            save_directory: the folder; made if it does not exist.
            safe_serialization: only True: pickles are read but never written.
            variant: part of the names of the weight files, such as ``"fp16"``.
            max_shard_size: of a weight file, such as ``"5GB"``; larger weights are split. 10 GB by default.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False would write pickles; only safetensors are written")
        shard_bytes = parse_size("10GB" if max_shard_size is None else max_shard_size)
        parts = {name: unwrapped(part) for name, part in self.components.items()}
        loading.save_parts(parts, Path(save_directory), type(self).__name__, variant, shard_bytes)

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **components: Any,
    ) -> Self:
        """A pipeline of this class that shares the parts of another one, which takes no memory.

        Args:
            pipeline: a pipeline with the same parts or more: one of this package, or of diffusers.
            dtype, torch_dtype: cast the parts, also for the other pipeline; None leaves them as they are.
            components: parts that take the place of the other pipeline's.
        """
        names = cls.part_names()
        for name in components:
            if name not in names:
                raise InputError(f"{cls.__name__} has no part {name!r}; it has: {', '.join(names)}")
        shared: Mapping[str, Any] = pipeline.components
        new = cls(**{name: components.get(name, shared.get(name)) for name in names})
        if isinstance(pipeline, Pipeline):
            new.placement = pipeline.placement
            new._progress_bar_config = dict(pipeline._progress_bar_config)
        wanted = dtype if dtype is not None else torch_dtype
        return new if wanted is None else new.to(dtype=parse_dtype(wanted))

    # --- device, dtype, placement ---

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        if self.placement.device is not None:
            return self.placement.device
        return next((p.device for module in self._modules() for p in module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer, or without it of the first part that has one."""
        modules = [vars(self).get("transformer"), *self._modules()]
        parameters = (p for module in modules if isinstance(module, nn.Module) for p in module.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def to(
        self,
        *args: torch.device | torch.dtype | str | int | None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move all parts to a device, cast them to a dtype, or both, in place.

        ``pipe.to("cuda")``, ``pipe.to(torch.bfloat16)``, ``pipe.to("cuda", torch.bfloat16)``, or with ``device=``
        and ``dtype=``. A move ends any offloading. In float16 a T5 encoder keeps those of its weights in float32
        that would overflow.

        Args:
            silence_dtype_warnings: accepted; there are none.
        """
        given = [arg for arg in args if arg is not None]
        if len(args) > 2 or sum(isinstance(arg, torch.dtype) for arg in given) > 1:
            raise InputError(f"to takes a device, a dtype, or a device and then a dtype, not {args}")
        for arg in given:
            if isinstance(arg, torch.dtype):
                dtype = arg if dtype is None else _once("dtype", arg, dtype)
            else:
                device = arg if device is None else _once("device", arg, device)
        if dtype is not None:
            dtype = parse_dtype(dtype)
        target = None if device is None else torch.device(device)
        for module in self._modules():
            _move(module, target, dtype)
        if target is not None:
            self.placement = Resident()
        return self

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The part of this name, on the device of the computation.

        Raises:
            InputError: the part is missing.
        """
        part = self._require(name)
        with self.placement.using(part):
            yield part

    def _require(self, name: str) -> Any:
        part = vars(self).get(name)
        if part is None:
            raise InputError(
                f"this needs the {name}, which the pipeline was loaded without or which was deleted; "
                f"assign one to pipe.{name}"
            )
        return part

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the parts in the memory of the CPU, and each on the device only while the pipeline uses it.

        Code that uses a part by itself brings it there by ``with pipe.using("vae") as vae:``.

        Args:
            gpu_id: the number of the device; its default one if None.
            device: where to compute; the accelerator of this machine if None, or the CPU where there is none.
        """
        target = offload_device(gpu_id, device)
        for module in self._modules():
            module.to("cpu")
        self.placement = OneAtATime(target)

    # --- progress ---

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over ``iterable``, or one with ``total`` steps to ``update()``."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        if iterable is None and total is None:
            raise InputError("progress_bar needs an iterable or a total")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of tqdm for every progress bar, such as ``disable=True`` or ``desc="drawing"``."""
        self._progress_bar_config = kwargs


def _once(name: str, first: Any, second: Any) -> Any:
    raise InputError(f"to was given two values for {name}: {first} and {second}")


def _move(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """``module.to``, except for the parameters that are float32 in any dtype, or in this one."""
    kept = {name: p.data.float() for name, p in module.named_parameters() if _stays_float32(module, name, dtype)}
    module.to(device=device, dtype=dtype)
    for name, parameter in module.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)


def _stays_float32(module: nn.Module, name: str, dtype: torch.dtype | None) -> bool:
    if dtype is None:
        return False
    module = unwrapped(module)
    if isinstance(module, Model):
        return any(part in name for part in module.keep_in_float32)
    # transformers' models say which of their layers overflow in float16: in T5 the last of each feed-forward.
    sensitive = getattr(module, "_keep_in_fp32_modules", None) or ()
    return dtype == torch.float16 and any(layer in name.split(".") for layer in sensitive)
