"""Pipeline: components that are loaded, saved, moved and shared together."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.stored import non_finite_parameter
from ..checks import shown, whole_number
from ..errors import CheckpointError, ConfigurationError, InputError
from ..files import plain_path
from ..memory import estimate, inspection
from ..memory import plan as planner
from ..memory.placement import OneAtATime, PerComponent, Resident, check_dtype, spread
from ..memory.placement import offload_device as _offload_device
from ..memory.streaming import WITHOUT_STREAMS, Visit, device_of, is_settled, pin, size_of, stays_float32, unwrapped
from ..models.base import parse_dtype, parse_size
from ..nn.backends.onednn import check_kept_weights
from ..nn.devices import as_device, check_device, require_device
from ..nn.noise import draw_noise
from ..nn.outputs import keyed
from ..nn.precision import adapt, in_float32, without_autocast
from ..transforms.guidance_interval import GuidanceInterval
from ..transforms.step_cache import StepCache
from . import loading, saving
from .compiling import Compiled
from .embedding_cache import EmbeddingCache
from .image import ImageProcessor
from .request import Request
from .resolution import resize_and_crop
from .sampling import Stop, calling

logger = logging.getLogger("impasto")

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


@keyed
class ImagePipelineOutput(NamedTuple):
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor  # by output_type; tensors and latents [B, C, H, W]


class Pipeline:
    """A pipeline's components are the arguments of its constructor, and attributes of the same names.

    Any of them may be None, reassigned, or deleted (``del pipe.transformer``).
    """

    #: Components that always move to the device whole, however the others move.
    never_in_blocks: ClassVar[tuple[str, ...]] = ()

    image_processor: ImageProcessor
    placement: Resident
    #: How the components stay within the memory budget; None without a budget.
    plan: planner.MemoryPlan | None
    #: Prompt embeddings on disk; None unless ``enable_prompt_cache`` was called.
    prompt_cache: EmbeddingCache | None
    #: The handles of ``compile``, ``cache_steps`` and ``guide_between``; None unless they were called.
    compiled: Compiled | None
    step_cache: StepCache | None
    guidance_interval: GuidanceInterval | None
    #: A flag for each call and loop in progress; the pipeline keeps nothing else about them.
    in_progress: list[Stop]

    def __init__(self, **components: Any):
        self.__dict__.update(components)
        self.placement = Resident()
        self.plan = None
        self.prompt_cache = None
        self.compiled = self.step_cache = self.guidance_interval = None
        self.in_progress = []
        self._source: Path | None = None  # the folder that the components were loaded from
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def part_names(cls) -> list[str]:
        """The names of the components."""
        return list(inspect.signature(cls.__init__).parameters)[1:]

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; None for missing ones. ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: vars(self).get(name) for name in self.part_names()}

    def _modules(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

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
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        memory_budget: int | str | planner.Budget | None = None,
        **components: Any,
    ) -> Self:
        """Load a pipeline from a folder, the hub, or the package (``builtin:scenes``).

        Args:
            pretrained_model_name_or_path: a folder with ``model_index.json``, a hub id, or a bundled model's id.
            dtype, torch_dtype: the dtype of all weights: a ``torch.dtype``, its name, or ``"auto"`` (as stored);
                float32 by default. A dict maps names of components to dtypes, and ``"default"`` to that of the
                others. With a memory budget it may also specify quantized weights: ``"int8"`` or ``"nf4"``.
            variant: ``"fp16"`` loads the ``*.fp16.safetensors`` files.
            revision, cache_dir, local_files_only, token: options of the hub download.
            subfolder: the folder of the pipeline within the folder or repository.
            use_safetensors: True: only safetensors; False: only ``.bin``; None: whichever is found first.
            device_map: the device on which each component stays and computes: "auto" (fills one accelerator after
                the other), "balanced" (spreads the components over them), one device for all, or a dict of devices by
                name, "cpu" if not given. What fits on no accelerator stays on the CPU.
            max_memory: how much of each device "auto" and "balanced" may use, as in ``{0: "6GB"}``.
            memory_budget: bytes, or a string such as ``"8GB"``. Dtypes, placement and tiling are chosen so that
                generating one image of the default size stays within it; ``pipe.plan`` describes the choice. It
                limits the memory of the accelerator, or without one that of the process, not counting memory-mapped
                files. Use a ``planner.Budget`` for other sizes and numbers of images.
            components: components that replace the stored ones. One that is given as None is left out. The stored
                files are not read or downloaded in either case.

        Raises:
            CheckpointError: a component or a file is missing, damaged, or of an unknown class.
            HubError: the model has to be downloaded, and cannot be.
            InputError: an argument that the pipeline does not have.
            ResourceError: a device does not exist, or the budget is too small; the message has one that works.
        """
        names = cls.part_names()
        if device_map is not None and memory_budget is not None:
            raise InputError("device_map and memory_budget both specify where components go; give one of them")
        for name in components:
            if name not in names:
                raise InputError(f"{cls.__name__} has no argument {name!r}; components: {', '.join(names)}")
        requested = dtype if dtype is not None else torch_dtype
        requested, quantized = _without_quantized(requested, names, memory_budget is not None)
        dtypes = loading.dtype_of_each(names, requested)
        for each in dtypes.values():
            check_dtype(each, None)
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
        plan = None
        with source.opened() as opened:
            index = opened.read_index(cls.__name__)
            wanted = [name for name in names if name not in components]
            folder = opened.fetch(index, wanted, cls.__name__)
            if memory_budget is not None:
                entries = {name: index[name] for name in wanted}
                found = inspection.inspect_components(folder, cls.__name__, entries, variant)
                named = {} if requested is None else {name: _dtype_name(dtypes[name]) for name in wanted}
                named |= quantized
                budget = memory_budget if isinstance(memory_budget, planner.Budget) else planner.Budget(memory_budget)
                if budget.device is not None:
                    check_device(budget.device)
                plan = planner.plan_memory(found, budget, named)
                planner.check_libraries(plan)
                dtypes |= planner.load_dtypes(plan)
            loaded = {
                name: loading.load_component(index[name], folder / name, dtypes[name], variant, use_safetensors)
                for name in wanted
                if index[name][1] is not None
            }
            loading.check_vocabularies(loaded)
            pipe = cls(**{**dict.fromkeys(names), **loaded, **components})
            # The original folder, not the temporary view of a read-only one.
            pipe._source = folder if opened is source else Path(source.model, source.subfolder or "")
        if plan is not None:
            planner.apply_plan(plan, pipe)
        if device_map is not None:
            pipe._place_components(device_map, max_memory)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write each component into its own folder, and ``model_index.json``; diffusers can read them.

        Args:
            save_directory: the folder; created if it does not exist.
            safe_serialization: only True: pickles are read but never written.
            variant: inserted into the names of the weight files, such as ``"fp16"``.
            max_shard_size: the largest size of a weight file, such as ``"5GB"``; 10 GB by default.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not safe_serialization:
            raise InputError("safe_serialization=False would write pickles; only safetensors are written")
        shard_bytes = parse_size("10GB" if max_shard_size is None else max_shard_size)
        components = {name: unwrapped(component) for name, component in self.components.items()}
        saving.save_components(components, plain_path(save_directory), type(self).__name__, variant, shard_bytes)

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
        names = cls.part_names()
        for name in components:
            if name not in names:
                raise InputError(f"{cls.__name__} has no component {name!r}; it has: {', '.join(names)}")
        shared: Mapping[str, Any] = pipeline.components
        new = cls(**{name: components.get(name, shared.get(name)) for name in names})
        if isinstance(pipeline, Pipeline):
            new.placement, new.plan = pipeline.placement, pipeline.plan
            new.prompt_cache, new._source = pipeline.prompt_cache, pipeline._source
            new._progress_bar_config = dict(pipeline._progress_bar_config)
        wanted = dtype if dtype is not None else torch_dtype
        return new if wanted is None else new.to(dtype=parse_dtype(wanted))

    # --- device, dtype, placement ---

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        if self.placement.device is not None:
            return self.placement.device
        modules = sorted(self._modules(), key=is_settled)  # those that another library has placed come last
        devices = (device_of(module) for module in modules)
        return next((device for device in devices if device is not None), torch.device("cpu"))

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
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move all components to a device, cast them to a dtype, or both, in place.

        ``pipe.to("cuda")``, ``pipe.to(torch.bfloat16)``, ``pipe.to("cuda", torch.bfloat16)``, or with ``device=``
        and ``dtype=``. A move ends any offloading, device map or memory plan, and a cast ends a memory plan. In float16
        a T5 encoder keeps in float32 those weights that would overflow. A component that another library has
        quantized, or placed by its own device map, is left unchanged.

        Args:
            silence_dtype_warnings: accepted without effect; there are no such warnings.

        Raises:
            ResourceError: the device does not exist, or does not compute in this dtype.
        """
        given = [arg for arg in args if arg is not None]
        if len(args) > 2 or sum(isinstance(arg, torch.dtype) for arg in given) > 1:
            raise InputError(f"to takes a device, a dtype, or a device and then a dtype, not {shown(args)}")
        for arg in given:
            if isinstance(arg, torch.dtype):
                dtype = arg if dtype is None else _once("dtype", arg, dtype)
            else:
                device = arg if device is None else _once("device", arg, device)
        if dtype is not None:
            dtype = parse_dtype(dtype)
        target = None if device is None else as_device(device)
        check_dtype(dtype, target)
        if target is not None:
            check_device(target)
        for module in self._modules():
            if not is_settled(module):
                _move(module, target, dtype)
        if target is not None or self.plan is not None:
            self.placement, self.plan = Resident(), None
        if self.compiled is not None:
            self.compiled.renew()
        return self

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The component of this name, on the device of the computation.

        Raises:
            InputError: the component is missing.
        """
        component = self._require(name)
        adapt(component)
        with self.placement.using(component):
            yield component

    @contextmanager
    def using_vae(self) -> Iterator[tuple[Any, torch.dtype]]:
        """The autoencoder, and the dtype that it takes.

        It computes in the dtype of its weights, regardless of any autocast around it. Float16 weights that are known
        to overflow are used as float32, without being changed.
        """
        with self.using("vae") as vae, without_autocast(self.device):
            dtype = next(vae.parameters()).dtype
            overflows = dtype == torch.float16 and vae.config.get("force_upcast")
            with in_float32() if overflows else nullcontext():
                yield vae, torch.float32 if overflows else dtype

    def _require(self, name: str) -> Any:
        component = vars(self).get(name)
        if component is None:
            raise InputError(
                f"this needs the {name}, which the pipeline was loaded without or which was deleted; "
                f"assign one to pipe.{name}"
            )
        return component

    def _noise(self, request: Request, dtype: torch.dtype) -> Tensor:
        """Noise [B, C, h, w], given or generated."""
        if request.latents is not None:
            return request.latents
        return draw_noise(request.shape, request.generators, self.device, dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], as the loop yields them, to images [B, 3, H, W] in about [-1, 1]."""
        raise NotImplementedError

    def _finish(self, latents: Tensor, request: Request) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        """The images of the last latents, in the requested form and size."""
        self._check_output("transformer", latents)
        if request.output_type == "latent":
            return latents
        images = self.decode(latents)  # [B, 3, H, W]
        self._check_output("vae", images)
        if request.final_size is not None:
            images = resize_and_crop(images, *request.final_size)
        return self.image_processor.postprocess(images, output_type=request.output_type)

    def _check_output(self, name: str, output: Tensor) -> None:
        """Attribute NaN and infinite values to the component of this name if its weights contain some.

        Raises:
            CheckpointError: its weights contain some; the message names the first such tensor.
        """
        if not bool(output.isfinite().all()):
            broken = non_finite_parameter(unwrapped(self._require(name)))
            if broken is not None:
                raise CheckpointError(
                    f"the {name} computes NaN or infinite values, because its tensor {broken} contains some; "
                    f"download or save it again"
                )

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
        self._offload(OneAtATime(_offload_device(gpu_id, device)))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the components on the host, and only one block at a time of the one in use on the device.

        This takes the least memory and the most time: all weights are moved at every step. Arguments and errors are as
        for ``enable_model_cpu_offload``.
        """
        whole = self._visits_of_whole_components()
        self._offload(OneAtATime(_offload_device(gpu_id, device), Visit(blocks=1), whole))

    def _visits_of_whole_components(self, names: Sequence[str] = ()) -> dict[nn.Module, Visit]:
        """The visits of components that always move whole, and of others with these names."""
        there = [vars(self).get(name) for name in (*self.never_in_blocks, *names)]
        return {component: Visit() for component in there if isinstance(component, nn.Module)}

    def enable_group_offload(
        self,
        onload_device: torch.device | str | None = None,
        offload_device: torch.device | str = "cpu",
        num_blocks_per_group: int = 1,
        use_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        exclude_modules: str | Sequence[str] = (),
    ) -> None:
        """Keep the components on the host, and one group of blocks of the one in use on the device.

        Args:
            onload_device: where to compute; if None, the accelerator of this machine, or the CPU without one.
            offload_device: only the CPU.
            num_blocks_per_group: how many blocks are moved at once.
            use_stream: copy the next group while one computes, so that two are on the device. The weights are pinned
                in host memory.
            low_cpu_mem_usage: do not pin them; the copies are then slower.
            exclude_modules: names of components that are moved whole.

        Raises:
            InputError: components are already on another device than the CPU, or an argument cannot be used.
        """
        if as_device(offload_device).type != "cpu":
            raise InputError(f"offload_device is {str(offload_device)!r}; weights are kept on the host: use 'cpu'")
        blocks = whole_number("num_blocks_per_group", num_blocks_per_group)
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules)
        for name in excluded:
            self._require(name)
        whole = self._visits_of_whole_components(excluded)
        target = _offload_device(None, onload_device)
        self._offload(OneAtATime(target, Visit(blocks=blocks, ahead=use_stream), whole))
        if use_stream and not low_cpu_mem_usage and target.type not in WITHOUT_STREAMS:
            for module in self._modules():
                if module not in whole and not is_settled(module):
                    pin(module)

    def _offload(self, placement: OneAtATime) -> None:
        if isinstance(self.placement, PerComponent):
            raise InputError("a device map is in force; call pipe.reset_device_map() before offloading")
        for name, module in self.components.items():
            device = device_of(module) if isinstance(module, nn.Module) and not is_settled(module) else None
            if device is not None and device.type != "cpu":
                raise InputError(
                    f"the {name} is already on {device}, and offloading keeps weights on the host until they are used: "
                    f"call it right after loading instead of pipe.to({str(device)!r}), or call pipe.to('cpu') first"
                )
        check_device(placement.device)
        self.placement, self.plan = placement, None
        if self.compiled is not None:
            self.compiled.renew()

    @property
    def hf_device_map(self) -> dict[str, torch.device] | None:
        """The device of each component if ``device_map`` was given, or None."""
        if not isinstance(self.placement, PerComponent):
            return None
        devices = {name: device_of(module) for name, module in self.components.items() if isinstance(module, nn.Module)}
        return {name: device for name, device in devices.items() if device is not None}

    def reset_device_map(self) -> None:
        """End a device map: all components are moved to the CPU."""
        self.to("cpu")

    def _place_components(self, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None) -> None:
        modules = {n: m for n, m in self.components.items() if isinstance(m, nn.Module) and not is_settled(m)}
        if isinstance(device_map, Mapping):
            unknown = [name for name in device_map if name not in self.part_names()]
            if unknown:
                names = ", ".join(self.part_names())
                raise InputError(f"device_map names an unknown component {unknown[0]!r}; components: {names}")
            devices = {name: require_device(device_map.get(name, "cpu")) for name in modules}
        elif device_map in ("auto", "balanced"):
            devices = spread({name: size_of(module) for name, module in modules.items()}, str(device_map), max_memory)
        else:
            devices = dict.fromkeys(modules, require_device(device_map))
        for name, module in modules.items():
            _move(module, devices[name], None)
        given = next(iter(self._modules()), None)
        fallback = torch.device("cpu") if given is None else device_of(given) or torch.device("cpu")
        default = devices.get("transformer", next(iter(devices.values()), fallback))
        self.placement, self.plan = PerComponent(default), None

    # --- interruption ---

    @property
    def interrupt(self) -> bool:
        """Whether the current call should end early; outside of a call, whether any call in progress should.

        Assign True in a callback to end its call after this step and decode the latents so far. Assigned elsewhere,
        such as in another thread, it ends every call and loop in progress.
        """
        return any(stop.requested for stop in self._addressed())

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        for stop in self._addressed():
            stop.requested = bool(value)

    _interrupt = interrupt

    def _addressed(self) -> list[Stop]:
        stop = calling.get()
        return list(self.in_progress) if stop is None or stop.pipe is not self else [stop]

    @contextmanager
    def _calling(self) -> Iterator[Stop]:
        """A call. If components take turns on a device, it waits for the calls of other threads."""
        stop = Stop(self)
        with self.placement.calling():
            token = calling.set(stop)
            self.in_progress.append(stop)
            try:
                yield stop
            finally:
                self.in_progress.remove(stop)
                calling.reset(token)

    # --- compilation ---

    def compile(self, *, vae: bool = False, record: bool | None = None, **options: Any) -> Compiled:
        """Make the transformer faster: compiled blocks and captured CUDA graphs on a GPU, packed weights on a CPU.

        On a CUDA device the blocks are compiled; they are alike, so one graph serves all. Whole steps are captured and
        replayed as CUDA graphs. The first image of a size takes longer. Steps of an offloaded transformer are not
        captured. On a CPU that multiplies bfloat16, compiled blocks gain nothing (docs/performance.md), but
        ``pack_weights`` does: it gives bit-identical images and needs as much memory again as the transformer's
        weights. Options of ``torch.compile``, if given, apply on the CPU too. To compile a transformer that is
        assigned later, call ``pipe.compiled.remove()`` first.

        Args:
            vae: compile the autoencoder's decoder too.
            record: capture and replay steps; None: if the transformer is on a CUDA device; False: never.
            options: for ``torch.compile``, such as ``mode="max-autotune-no-cudagraphs"``. ``fullgraph=True`` is the
                default except on the CPU.

        Returns:
            a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

        Raises:
            ConfigurationError: the pipeline is compiled already, or the mode captures single blocks.
            InputError: there is no transformer, or no autoencoder with ``vae=True``.
            ResourceError: ``record=True`` without a CUDA device.
        """
        if self.compiled is not None:
            raise ConfigurationError("this pipeline is compiled already; pipe.compiled.remove() undoes it")
        decoder = self._require("vae") if vae else None
        self.compiled = Compiled(self, self._require("transformer"), decoder, record, **options)
        return self.compiled

    def _replaying(self, model: Any) -> Any:
        """What a loop calls in place of the model: a replay of its captured CUDA graph, or the model."""
        self._check_packed_weights()
        if self.compiled is None or self.compiled.steps is None or isinstance(self.placement, OneAtATime):
            return model
        return self.compiled.steps.begin(model)

    def _check_packed_weights(self) -> None:
        transformer = vars(self).get("transformer")
        if isinstance(transformer, nn.Module):
            check_kept_weights(transformer)

    # --- prompts on disk ---

    def enable_prompt_cache(self, folder: str | os.PathLike[str], max_bytes: int | str | None = None) -> None:
        """Keep the embeddings of prompts in a folder, so that a repeated prompt needs no text encoder.

        A pipeline that was loaded with ``text_encoder=None`` finds the embeddings of the encoder that this model was
        last used with. While gradients are recorded, the encoder always runs.

        Args:
            folder: created if it does not exist; pipelines and processes may share it.
            max_bytes: bytes, or such as ``"1GB"``; beyond it the least recently used are removed. None: no limit.

        Raises:
            OutputError: the folder cannot be created.
        """
        limit = None if max_bytes is None else parse_size(max_bytes)
        self.prompt_cache = EmbeddingCache(plain_path(folder), limit, self._source)

    def disable_prompt_cache(self) -> None:
        """Encode every prompt again. The files in the folder are kept."""
        self.prompt_cache = None

    # --- progress ---

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over ``iterable``, or one with ``total`` steps to ``update()``."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        if iterable is None and total is None:
            raise InputError("progress_bar needs an iterable or a total")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Set options of tqdm for all progress bars, such as ``disable=True`` or ``desc="generating"``."""
        self._progress_bar_config = kwargs


def _without_quantized(
    dtype: loading.DTypes, names: Sequence[str], planned: bool
) -> tuple[loading.DTypes, dict[str, str]]:
    """The dtypes without the components to be quantized, and the format of each of those.

    Raises:
        InputError: quantization without a plan, or of an unknown component.
    """
    dtypes = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    quantized = {name: str(value) for name, value in dtypes.items() if value in estimate.QUANTIZED}
    unknown = [name for name in quantized if name not in names]
    if unknown:
        value = quantized[unknown[0]]
        raise InputError(
            f"dtype={value!r} must be given by component name, as in dtype={{'transformer': {value!r}}}; "
            f"{unknown[0]!r} is none of {', '.join(names)}"
        )
    if not isinstance(dtype, Mapping):
        return dtype, {}
    if quantized and not planned:
        name, value = next(iter(quantized.items()))
        raise InputError(
            f"dtype={value!r} of the {name} needs a memory_budget; without one, load it and call "
            f"quantize(pipe.{name}, {estimate.QUANTIZED[value][0]!r})"
        )
    return {name: value for name, value in dtype.items() if name not in quantized} or None, quantized


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _once(name: str, first: Any, second: Any) -> Any:
    raise InputError(f"to was given two values for {name}: {first} and {second}")


def _move(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """``module.to``, except for what stays float32: some parameters, and tables that are not in any file."""
    kept = {name: p.data.float() for name, p in module.named_parameters() if stays_float32(module, name, dtype)}
    tables = [
        (child, name, table)
        for child in module.modules()
        for name in child._non_persistent_buffers_set
        if (table := getattr(child, name, None)) is not None and table.is_floating_point()
    ]
    module.to(device=device, dtype=dtype)
    for child, name, table in tables:  # such as rotary frequencies, which rounding would shift
        setattr(child, name, table.to(getattr(child, name).device))
    for name, parameter in module.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)
