"""The components of a pipeline: loaded, saved, shared, moved and offloaded together."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from ..checkpoints.keywords import KEYWORDS, settle
from ..checkpoints.upload import check_upload_options, check_writable, push_saved
from ..checks import parse_size, shown, whole_number
from ..errors import InputError
from ..memory.moving import check_on_host, device_of, is_settled, movable, move, read_target
from ..memory.placement import OneAtATime, PerComponent, Resident
from ..memory.placement import offload_device as choose_device
from ..models.dtypes import parse_dtype
from ..nn.changes import unwrapped
from ..nn.machine import as_device, check_device
from .compat.configs import DiffusionPipeline

if TYPE_CHECKING:
    from ..memory.device_map import DeviceMap
    from ..memory.plan import Budget, MemoryPlan
    from .loading import DTypes


class Components(DiffusionPipeline):
    """The components are the arguments of the constructor, and attributes of the same names.

    Any of them may be None, reassigned, or deleted (``del pipe.transformer``).
    """

    #: The class that ``model_index.json`` names for these components; this one if None.
    saved_as: ClassVar[str | None] = None
    #: Components that always move to the device whole, however the others move.
    never_in_blocks: ClassVar[tuple[str, ...]] = ()
    #: Those that ``from_pretrained`` may leave out; arguments of a subclass with a default value are only if listed.
    _optional_components: ClassVar[list[str]]

    placement: Resident
    #: How the components stay within the memory budget; None without a budget.
    plan: MemoryPlan | None

    def __init__(self, **components: Any):
        self.__dict__.update(components)
        self.placement = Resident()
        self.plan = None
        self._source: Path | None = None  # the folder that the components were loaded from
        self._name_or_path: str | None = None  # what ``from_pretrained`` was given

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of the components: the arguments of the constructor that have to be given."""
        parameters = [*inspect.signature(cls.__init__).parameters.values()][1:]
        return [p.name for p in parameters if p.default is p.empty or p.name in cls._optional_components]

    @classmethod
    def _settings(cls) -> list[str]:
        """The names of the other arguments, which a subclass may have."""
        return [name for name in [*inspect.signature(cls.__init__).parameters][1:] if name not in cls.component_names()]

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; None for missing ones. ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: vars(self).get(name) for name in self.component_names()}

    def _modules(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    def _require(self, name: str) -> Any:
        component = vars(self).get(name)
        if component is None:
            raise InputError(
                f"this needs the {name}, which the pipeline was loaded without or which was deleted; "
                f"assign one to pipe.{name}"
            )
        return component

    # --- loading, saving, sharing ---

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: DTypes = None,
        dtype: DTypes = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        memory_budget: int | str | Budget | None = None,
        quantization_config: Any = None,
        disable_mmap: bool = False,
        force_download: bool = False,
        **components: Any,
    ) -> Self:
        """Load a pipeline from a folder, the hub, or the package (``builtin:scenes``).

        Args:
            pretrained_model_name_or_path: a folder with ``model_index.json``, a hub id, or a bundled model's id.
            dtype, torch_dtype: the dtype of all weights: a ``torch.dtype``, its name, or ``"auto"`` (as stored);
                float32 by default. A dict maps names of components to dtypes, and ``"default"`` to that of the
                others. With a memory budget it may also specify quantized weights: ``"int8"`` or ``"nf4"``.
            variant: ``"fp16"`` loads the ``*.fp16.safetensors`` files of those components that have some.
            revision, cache_dir, local_files_only, token, force_download: options of the hub download.
            subfolder: the folder of the pipeline within the folder or repository.
            use_safetensors: True: only safetensors; False: only ``.bin``; None: whichever is found first.
            device_map: the device on which each component stays and computes: "auto" (fills one accelerator after
                the other), "balanced" (spreads the components over them), one device for all, or a dict of devices by
                name, "cpu" if not given. What fits on no accelerator stays on the CPU.
            max_memory: how much of each device "auto" and "balanced" may use, as in ``{0: "6GB"}``.
            memory_budget: bytes, or a string such as ``"8GB"``. Dtypes, placement and tiling are chosen so that
                generating one image of the default size stays within it; ``pipe.plan`` describes the choice. It
                limits the memory of the accelerator, or without one that of the process, not counting memory-mapped
                files. An ``impasto.Budget`` says what is generated: sizes, images at once, reference images.
            quantization_config: a ``PipelineQuantizationConfig``, or a dict of configs by component.
            disable_mmap: read the files into memory rather than mapping them.
            components: components that replace the stored ones. One that is given as None is left out. The stored
                files are not read or downloaded in either case. Keywords without effect are accepted too
                (``checkpoints.keywords``).

        Raises:
            CheckpointError: a component or a file is missing, damaged, or of an unknown class.
            HubError: the model has to be downloaded, and cannot be.
            InputError: an argument that the pipeline does not have.
            ResourceError: a device does not exist, or the budget is too small; the message has one that works.
        """
        if device_map is not None and memory_budget is not None:
            raise InputError("device_map and memory_budget both specify where components go; give one of them")
        if quantization_config is not None and memory_budget is not None:
            raise InputError("a memory_budget chooses what is quantized; give it or quantization_config")
        from .loading import Source, load_components

        source, names = Source.of(pretrained_model_name_or_path, locals()), cls.component_names()
        settings = {name: components.pop(name) for name in cls._settings() if name in components}
        others = {name: value for name, value in components.items() if name not in names}
        known = inspect.signature(Components.from_pretrained).parameters
        settle(cls.__name__, others, [*names, *known], f"; components: {', '.join(names)}")
        components = {name: value for name, value in components.items() if name in names}
        requested, name = dtype if dtype is not None else torch_dtype, cls.saved_as or cls.__name__
        loaded, plan, folder = load_components(
            source, name, names, components, requested, memory_budget, quantization_config
        )
        pipe = cls(**loaded, **settings)
        pipe._source, pipe._name_or_path = folder, os.fspath(pretrained_model_name_or_path)
        if disable_mmap:
            read = [part for part, value in loaded.items() if part not in components and isinstance(value, nn.Module)]
            for tensor in [x for part in read for x in (*loaded[part].parameters(), *loaded[part].buffers())]:
                tensor.data = tensor.data.clone()
        if plan is not None:
            from ..memory.plan import apply_plan

            apply_plan(plan, pipe)
        if device_map is not None:
            from ..memory.device_map import place

            pipe.placement = place(pipe.components, device_map, max_memory)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **upload: Any,
    ) -> None:
        """Write each component into its own folder, and ``model_index.json``; diffusers can read them.

        Args:
            save_directory: the folder; created if it does not exist.
            safe_serialization: only True: pickles are read but never written.
            variant: inserted into the names of the weight files, such as ``"fp16"``.
            max_shard_size: the largest size of a weight file, such as ``"5GB"``; 10 GB by default.
            push_to_hub: upload it too; ``upload`` holds arguments of ``push_to_hub``.

        Raises:
            ConfigurationError: an adapter wraps layers of a component.
            OutputError: the folder cannot be written.
        """
        check_writable(safe_serialization, use_flashpack)
        check_upload_options(upload)
        from ..files import plain_path
        from .loading import save_components

        shard_bytes = parse_size("10GB" if max_shard_size is None else max_shard_size)
        components = {name: unwrapped(component) for name, component in self.components.items()}
        name = self.saved_as or type(self).__name__
        written = save_components(components, plain_path(save_directory), name, variant, shard_bytes)
        if push_to_hub:
            push_saved(self, save_directory, written, upload)

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **components: Any,
    ) -> Self:
        """Create a pipeline of this class that shares the components of another one, without taking memory.

        Args:
            pipeline: a pipeline with at least the same components, from this package or from diffusers.
            dtype, torch_dtype: cast the components, also for the other pipeline; None leaves them unchanged.
            components: components that replace those of the other pipeline.
        """
        names = cls.component_names()
        for name in [name for name in components if name not in names]:
            if name not in KEYWORDS:
                raise InputError(f"{cls.__name__} has no component {name!r}; it has: {', '.join(names)}")
            settle(cls.__name__, {name: components[name]})
        shared: Mapping[str, Any] = pipeline.components
        new = cls(**{name: components.get(name, shared.get(name)) for name in names})
        if isinstance(pipeline, Components):
            new._share(pipeline)
        wanted = dtype if dtype is not None else torch_dtype
        return new if wanted is None else new.to(dtype=parse_dtype(wanted))

    def _share(self, other: Components) -> None:
        """Adopt placement, plan and source of a pipeline with the same components."""
        self.placement, self.plan, self._source = other.placement, other.plan, other._source
        self._name_or_path = other._name_or_path

    # --- device, dtype, placement ---

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        if self.placement.device is not None:
            return self.placement.device
        elsewhere: torch.device | None = None
        for module in self._modules():
            device = device_of(module)
            if device is not None and not is_settled(module):
                return device
            elsewhere = elsewhere or device  # another library has placed it
        return elsewhere or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer, or without one, of the first component that has a dtype."""
        modules = [vars(self).get("transformer"), *self._modules()]
        parameters = (p for module in modules if isinstance(module, nn.Module) for p in module.parameters())
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)

    def to(
        self,
        *args: torch.device | torch.dtype | str | int | None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move all components to a device, cast them to a dtype, or both, in place.

        ``pipe.to("cuda")``, ``pipe.to(torch.bfloat16)``, ``pipe.to("cuda", torch.bfloat16)``, or with ``device=``
        and ``dtype=`` (also called ``torch_dtype``). A move ends any offloading, device map or memory plan, and a cast
        ends a memory plan. In float16 a T5 encoder keeps in float32 those weights that would overflow. A component
        that another library has quantized, or placed by its own device map, is left unchanged.

        Args:
            silence_dtype_warnings: accepted without effect; there are no such warnings.

        Raises:
            ResourceError: the device does not exist, or does not compute in this dtype.
        """
        target, dtype = read_target(args, device, torch_dtype if dtype is None else dtype)
        for module in movable(self.components).values():
            move(module, target, dtype)
        if target is not None or self.plan is not None:
            self.placement, self.plan = Resident(), None
        self._weights_moved()
        return self

    def _weights_moved(self) -> None:
        """Called after weights have moved or changed their dtype."""

    # --- offloading, device maps ---

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the components on the host, and each on the device only while the pipeline uses it.

        Code that uses a component directly moves it there by ``with pipe.using("vae") as vae:``.

        Args:
            gpu_id: the index of the device; the default one if None.
            device: where to compute; if None, the accelerator of this machine, or the CPU without one.

        Raises:
            InputError: components are already on another device than the CPU.
            ResourceError: the device does not exist.
        """
        self._offload(OneAtATime(choose_device(gpu_id, device)))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the components on the host, and only one block at a time of the one in use on the device.

        This takes the least memory and the most time: all weights are moved at every step. Arguments and errors are as
        for ``enable_model_cpu_offload``.
        """
        from ..memory.streaming import Visit

        whole = dict.fromkeys(self._moved_whole(), Visit())
        self._offload(OneAtATime(choose_device(gpu_id, device), Visit(blocks=1), whole))

    def _moved_whole(self, names: Sequence[str] = ()) -> list[nn.Module]:
        """The components that always move whole, and others with these names."""
        found = [vars(self).get(name) for name in (*self.never_in_blocks, *names)]
        return [component for component in found if isinstance(component, nn.Module)]

    def enable_group_offload(
        self,
        onload_device: torch.device | str | None = None,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | os.PathLike[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Keep the components on the host, and one group of blocks of the one in use on the device.

        Args:
            onload_device: where to compute; if None, the accelerator of this machine, or the CPU without one.
            offload_device: only the CPU.
            offload_type: "block_level", or "leaf_level", which moves single blocks: the least that is moved here.
            num_blocks_per_group: how many blocks are moved at once; one if None.
            use_stream: copy the next group while one computes, so that two are on the device. The weights are pinned
                in host memory.
            low_cpu_mem_usage: do not pin them; the copies are then slower.
            offload_to_disk_path: a folder to write the weights to; they are memory-mapped from there.
            exclude_modules: names of components that are moved whole.
            non_blocking, record_stream: accepted without effect; copies do not block wherever that is safe.

        Raises:
            InputError: components are already on another device than the CPU, or an argument cannot be used.
        """
        from ..memory.streaming import WITHOUT_STREAMS, Visit, pin, to_disk

        if as_device(offload_device).type != "cpu":
            raise InputError(f"offload_device is {str(offload_device)!r}; weights are kept on the host: use 'cpu'")
        if getattr(offload_type, "value", offload_type) not in ("block_level", "leaf_level"):
            raise InputError(f"offload_type must be 'block_level' or 'leaf_level', not {shown(offload_type)}")
        blocks = 1 if num_blocks_per_group is None else whole_number("num_blocks_per_group", num_blocks_per_group)
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        for name in excluded:
            self._require(name)
        whole = dict.fromkeys(self._moved_whole(excluded), Visit())
        target = choose_device(None, onload_device)
        blocks = 1 if getattr(offload_type, "value", offload_type) == "leaf_level" else blocks
        self._offload(OneAtATime(target, Visit(blocks=blocks, ahead=use_stream), whole))
        for name, module in movable(self.components).items():
            if offload_to_disk_path is not None and name not in excluded:
                to_disk(module, offload_to_disk_path, name)
            elif use_stream and not low_cpu_mem_usage and target.type not in WITHOUT_STREAMS and module not in whole:
                pin(module)

    def _offload(self, placement: OneAtATime) -> None:
        if isinstance(self.placement, PerComponent):
            raise InputError("a device map is in force; call pipe.reset_device_map() before offloading")
        check_on_host(self.components)
        check_device(placement.device)
        self.placement, self.plan = placement, None
        self._weights_moved()

    @property
    def hf_device_map(self) -> dict[str, torch.device] | None:
        """The device of each component if ``device_map`` was given, or None."""
        if not isinstance(self.placement, PerComponent):
            return None
        devices = {name: device_of(module) for name, module in self.components.items() if isinstance(module, nn.Module)}
        return {name: device for name, device in devices.items() if device is not None}

    def reset_device_map(self) -> None:
        """End a device map: all components are moved to the CPU. Without a device map nothing happens."""
        if isinstance(self.placement, PerComponent):
            self.to("cpu")
