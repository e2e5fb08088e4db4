"""Pipeline: parts that are loaded, saved, moved and shared together."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ..nn.devices import as_device, check_device, require_device
from ..nn.module import parse_dtype, parse_size
from ..nn.onednn import check_kept_weights
from ..nn.outputs import keyed
from . import inspection, loading, planner, saving
from .compiling import Compiled
from .embedding_cache import EmbeddingCache
from .moving import WITHOUT_STREAMS, Visit, device_of, is_settled, pin, size_of, stays_float32
from .moving import unwrapped as unwrapped
from .placement import (
    OneAtATime,
    PerPart,
    Placement,
    Resident,
    check_dtype,
    spread,
)
from .placement import offload_device as _offload_device

logger = logging.getLogger("impasto")

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


@keyed
class ImagePipelineOutput(NamedTuple):
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor  # by output_type; tensors and latents [B, C, H, W]


class Pipeline:
    """A pipeline's parts are the arguments of its constructor, and attributes under the same names.

    Any of them may be None, assigned anew, or deleted (``del pipe.transformer``).
    """

    #: Parts that come to the device whole, however the others come.
    never_in_blocks: ClassVar[tuple[str, ...]] = ()

    placement: Placement
    #: How the parts keep to the memory budget; None where there is none.
    plan: planner.MemoryPlan | None
    #: Embeddings of prompts on disk; None where they are not kept.
    prompt_cache: EmbeddingCache | None
    #: The handle of ``compile``; None where nothing is compiled.
    compiled: Compiled | None

    def __init__(self, **parts: Any):
        self.__dict__.update(parts)
        self.placement = Resident()
        self.plan = None
        self.prompt_cache = None
        self.compiled = None
        self._source: Path | None = None  # the folder that the parts are from
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
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        memory_budget: int | str | planner.Budget | None = None,
        **components: Any,
    ) -> Self:
        """Load a pipeline from a folder, the hub, or the package (``builtin:scenes``).

        Args:
            pretrained_model_name_or_path: a folder with ``model_index.json``, a hub id, or a bundled model's id.
            dtype, torch_dtype: of the weights of all parts: a ``torch.dtype``, its name, or ``"auto"`` (as
                stored); float32 by default. A dict gives each part its own, by name, and the others that of
                ``"default"``; with a memory budget it may also say ``"int8"`` or ``"nf4"``, for weights of few bits.
            variant: ``"fp16"`` loads the ``*.fp16.safetensors`` files.
            revision, cache_dir, local_files_only, token: of the hub.
            subfolder: where in the folder or repository the pipeline lies.
            use_safetensors: True: only safetensors; False: only ``.bin``; None: the first that is there.
            device_map: a device for each part, where it stays and computes: "auto" (one accelerator is filled after
                the other), "balanced" (the parts are spread over them), a device for all, or a dict of names, in which
                "cpu" is left out. What fits on no accelerator stays on the CPU.
            max_memory: what "auto" and "balanced" may take of each device, as in ``{0: "6GB"}``.
            memory_budget: bytes, or such as ``"8GB"``: dtypes, placement and tiling are then chosen so that drawing
                one picture of the usual size keeps to it; ``pipe.plan`` says what was chosen. It is the memory of the
                accelerator, or on a machine without one that of the process, without what files back. A
                ``planner.Budget`` is for other sizes and numbers of pictures.
            components: parts that take the place of the stored ones. A part given as None is left out. The files
                of neither are read or downloaded.

        Raises:
            CheckpointError: a part or a file is missing, damaged, or of a class that is not known here.
            HubError: the model has to be downloaded, and cannot be.
            InputError: an argument that the pipeline does not have.
            ResourceError: a device that is not there, or a budget that is too small; the message has one that works.
        """
        names = cls.part_names()
        if device_map is not None and memory_budget is not None:
            raise InputError("device_map and memory_budget both say where the parts go; give one of them")
        for name in components:
            if name not in names:
                raise InputError(f"{cls.__name__}.from_pretrained has no argument {name!r}; parts: {', '.join(names)}")
        asked = dtype if dtype is not None else torch_dtype
        asked, few = _without_quantised(asked, names, memory_budget is not None)
        dtypes = loading.dtype_of_each(names, asked)
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
                found = inspection.inspect_parts(folder, cls.__name__, {name: index[name] for name in wanted}, variant)
                named = {} if asked is None else {name: _dtype_name(dtypes[name]) for name in wanted}
                named |= few
                budget = memory_budget if isinstance(memory_budget, planner.Budget) else planner.Budget(memory_budget)
                if budget.device is not None:
                    check_device(budget.device)
                plan = planner.plan_memory(found, dtypes=named, **budget._asdict())
                planner.check_libraries(plan)
                dtypes |= planner.load_dtypes(plan)
            loaded = {
                name: loading.load_part(index[name], folder / name, dtypes[name], variant, use_safetensors)
                for name in wanted
                if index[name][1] is not None
            }
            loading.check_vocabularies(loaded)
            pipe = cls(**{**dict.fromkeys(names), **loaded, **components})
            # Not the temporary view of a folder that may only be read.
            pipe._source = folder if opened is source else Path(source.model, source.subfolder or "")
        if plan is not None:
            planner.apply_plan(plan, pipe)
        if device_map is not None:
            pipe._place_parts(device_map, max_memory)
        return pipe

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
        saving.save_components(parts, plain_path(save_directory), type(self).__name__, variant, shard_bytes)

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
        modules = sorted(self._modules(), key=is_settled)  # what another library has placed says least
        devices = (device_of(module) for module in modules)
        return next((device for device in devices if device is not None), torch.device("cpu"))

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
        and ``dtype=``. A move ends any offloading, device map or memory plan, and a cast ends a memory plan. In float16
        a T5 encoder keeps those of its weights in float32 that would overflow. A part that another library has
        quantised, or placed by a device map of its own, stays as and where it is.

        Args:
            silence_dtype_warnings: accepted; there are none.

        Raises:
            ResourceError: a device that is not there, or a dtype in which it does not compute.
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
        """The part of this name, on the device of the computation.

        Raises:
            InputError: the part is missing.
        """
        part = self._require(name)
        with self.placement.using(part):
            yield part

    @contextmanager
    def using_vae(self) -> Iterator[tuple[Any, torch.dtype]]:
        """The autoencoder, and in which dtype it computes.

        Where its weights are known to overflow in float16, they are float32 for as long as they work.
        """
        with self.using("vae") as vae:
            dtype = next(vae.parameters()).dtype
            if dtype != torch.float16 or not vae.config.get("force_upcast"):
                yield vae, dtype
                return
            vae.to(torch.float32)
            try:
                yield vae, torch.float32
            finally:
                vae.to(dtype)

    def computing_dtype(self, name: str) -> torch.dtype:
        """In which the part of this name computes: the placement may cast it for that."""
        part = self._require(name)
        visit = self.placement.visit_of(part).dtype if isinstance(self.placement, OneAtATime) else None
        dtype: torch.dtype = part.dtype
        return visit or dtype

    def _require(self, name: str) -> Any:
        part = vars(self).get(name)
        if part is None:
            raise InputError(
                f"this needs the {name}, which the pipeline was loaded without or which was deleted; "
                f"assign one to pipe.{name}"
            )
        return part

    def _check_output(self, name: str, output: Tensor) -> None:
        """Blame the component of this name for NaN and infinite values, if its weights hold some.

        Raises:
            CheckpointError: they do; the message names the first such tensor.
        """
        if not bool(output.isfinite().all()):
            broken = non_finite_parameter(unwrapped(self._require(name)))
            if broken is not None:
                raise CheckpointError(
                    f"the {name} computes NaN or infinite values, because its tensor {broken} holds some; "
                    f"download or save it again"
                )

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the parts in the memory of the CPU, and each on the device only while the pipeline uses it.

        Code that uses a part by itself brings it there by ``with pipe.using("vae") as vae:``.

        Args:
            gpu_id: the number of the device; its default one if None.
            device: where to compute; the accelerator of this machine if None, or the CPU where there is none.

        Raises:
            InputError: parts are on another device than the CPU already.
            ResourceError: a device that is not there.
        """
        self._offload(OneAtATime(_offload_device(gpu_id, device)))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the parts in the memory of the CPU, and of the part in use only one block at a time on the device.

        This takes the least memory, and the most time: all weights are moved at every step. Arguments and errors as
        for ``enable_model_cpu_offload``.
        """
        whole = self._visits_of_whole_parts()
        self._offload(OneAtATime(_offload_device(gpu_id, device), Visit(blocks=1), whole))

    def _visits_of_whole_parts(self, names: Sequence[str] = ()) -> dict[nn.Module, Visit]:
        """How those parts come that never come in blocks, and others of these names."""
        there = [vars(self).get(name) for name in (*self.never_in_blocks, *names)]
        return {part: Visit() for part in there if isinstance(part, nn.Module)}

    def enable_group_offload(
        self,
        onload_device: torch.device | str | None = None,
        offload_device: torch.device | str = "cpu",
        num_blocks_per_group: int = 1,
        use_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        exclude_modules: str | Sequence[str] = (),
    ) -> None:
        """Keep the parts in the memory of the CPU, and of the part in use a group of blocks on the device.

        Args:
            onload_device: where to compute; the accelerator of this machine if None, or the CPU where there is none.
            offload_device: only the CPU.
            num_blocks_per_group: how many blocks come at once.
            use_stream: copy the next group while one computes: two are then on the device. The weights are pinned in
                the memory of the CPU.
            low_cpu_mem_usage: do not pin them; the copies are then slower.
            exclude_modules: names of parts that come whole.

        Raises:
            InputError: parts are on another device than the CPU already, or an argument that cannot be used.
        """
        if as_device(offload_device).type != "cpu":
            raise InputError(f"offload_device is {str(offload_device)!r}; weights wait in the memory of the CPU: 'cpu'")
        blocks = whole_number("num_blocks_per_group", num_blocks_per_group)
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules)
        for name in excluded:
            self._require(name)
        whole = self._visits_of_whole_parts(excluded)
        target = _offload_device(None, onload_device)
        self._offload(OneAtATime(target, Visit(blocks=blocks, ahead=use_stream), whole))
        if use_stream and not low_cpu_mem_usage and target.type not in WITHOUT_STREAMS:
            for module in self._modules():
                if module not in whole and not is_settled(module):
                    pin(module)

    def _offload(self, placement: OneAtATime) -> None:
        if isinstance(self.placement, PerPart):
            raise InputError("a device map is in force; call pipe.reset_device_map() before an offload")
        for name, part in self.components.items():
            device = device_of(part) if isinstance(part, nn.Module) and not is_settled(part) else None
            if device is not None and device.type != "cpu":
                raise InputError(
                    f"the {name} is on {device} already, and offloading keeps weights in the memory of the CPU until "
                    f"they are used: call it right after loading in place of pipe.to({str(device)!r}), or call "
                    f"pipe.to('cpu') first"
                )
        assert placement.device is not None
        check_device(placement.device)
        self.placement, self.plan = placement, None
        if self.compiled is not None:
            self.compiled.renew()

    @property
    def hf_device_map(self) -> dict[str, torch.device] | None:
        """The device of each part, where ``device_map`` was given."""
        if not isinstance(self.placement, PerPart):
            return None
        devices = {n: device_of(part) for n, part in self.components.items() if isinstance(part, nn.Module)}
        return {name: device for name, device in devices.items() if device is not None}

    def reset_device_map(self) -> None:
        """End a device map: all parts go to the CPU."""
        self.to("cpu")

    def _place_parts(self, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None) -> None:
        parts = {n: part for n, part in self.components.items() if isinstance(part, nn.Module) and not is_settled(part)}
        if isinstance(device_map, Mapping):
            unknown = [name for name in device_map if name not in self.part_names()]
            if unknown:
                names = ", ".join(self.part_names())
                raise InputError(f"device_map names a part {unknown[0]!r} that there is not; parts: {names}")
            devices = {name: require_device(device_map.get(name, "cpu")) for name in parts}
        elif device_map in ("auto", "balanced"):
            devices = spread({name: size_of(part) for name, part in parts.items()}, str(device_map), max_memory)
        else:
            devices = dict.fromkeys(parts, require_device(device_map))
        for name, part in parts.items():
            _move(part, devices[name], None)
        given = next(iter(self._modules()), None)
        fallback = torch.device("cpu") if given is None else device_of(given) or torch.device("cpu")
        default = devices.get("transformer", next(iter(devices.values()), fallback))
        self.placement, self.plan = PerPart(default), None

    # --- compilation ---

    def compile(self, *, vae: bool = False, record: bool | None = None, **options: Any) -> Compiled:
        """Make a transformer that stays faster: compiled blocks and replayed steps on a GPU, packed weights on a CPU.

        On a CUDA device the blocks are compiled, which are alike, so that one graph serves all, and whole steps are
        replayed as CUDA graphs. The first picture of a size takes longer. Steps are recorded only of a transformer
        that stays on its device, not of one that is offloaded. On a CPU that multiplies bfloat16, compiled blocks gain
        nothing (docs/performance.md), and ``pack_weights`` does: the same picture, to the bit, for as much memory as
        the transformer's weights take. Options of ``torch.compile``, where given, are obeyed there too. A transformer
        that is assigned later has to be compiled anew: ``pipe.compiled.remove()`` first.

        Args:
            vae: compile the autoencoder's decoder too.
            record: replay steps; None means wherever the transformer is on a CUDA device, False never.
            options: of ``torch.compile``, such as ``mode="max-autotune-no-cudagraphs"``. ``fullgraph=True`` is the
                default except on the CPU.

        Returns:
            a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

        Raises:
            ConfigurationError: something is compiled already, or a mode that records single blocks.
            InputError: there is no transformer, or no autoencoder where ``vae`` asks for it.
            ResourceError: ``record=True`` elsewhere than on a CUDA device.
        """
        if self.compiled is not None:
            raise ConfigurationError("this pipeline is compiled already; pipe.compiled.remove() undoes it")
        decoder = self._require("vae") if vae else None
        self.compiled = Compiled(self, self._require("transformer"), decoder, record, **options)
        return self.compiled

    def _replaying(self, model: Any) -> Any:
        """What to call in place of a model, in a loop: a replay of its recorded call, or the model."""
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
        """Keep the embeddings of prompts in a folder: a repeated prompt then needs no text encoder.

        A pipeline that was loaded with ``text_encoder=None`` finds what the encoder that this model was last used
        with has made. Where gradients are recorded, the encoder runs.

        Args:
            folder: made if it does not exist; pipelines and processes may share it.
            max_bytes: or such as ``"1GB"``: what was not used for longest is removed beyond it; no limit if None.

        Raises:
            OutputError: the folder cannot be made.
        """
        limit = None if max_bytes is None else parse_size(max_bytes)
        self.prompt_cache = EmbeddingCache(plain_path(folder), limit, self._source)

    def disable_prompt_cache(self) -> None:
        """Encode every prompt anew. What is in the folder stays there."""
        self.prompt_cache = None

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


def _without_quantised(
    dtype: loading.DTypes, names: Sequence[str], planned: bool
) -> tuple[loading.DTypes, dict[str, str]]:
    """The dtypes, and apart from them the parts that are to have few bits.

    Raises:
        InputError: few bits without a plan, or of what is no part.
    """
    told = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    few = {name: str(value) for name, value in told.items() if value in planner.QUANTISED}
    unknown = [name for name in few if name not in names]
    if unknown:
        raise InputError(
            f"dtype={few[unknown[0]]!r} is for parts, by name, as in dtype={{'transformer': {few[unknown[0]]!r}}}; "
            f"{unknown[0]!r} is none of {', '.join(names)}"
        )
    if not isinstance(dtype, Mapping):
        return dtype, {}
    if few and not planned:
        name, value = next(iter(few.items()))
        raise InputError(
            f"dtype={value!r} of the {name} needs a memory_budget; without one, load it and call "
            f"quantize(pipe.{name}, {planner.QUANTISED[value][0]!r})"
        )
    return {name: value for name, value in dtype.items() if name not in few} or None, few


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _once(name: str, first: Any, second: Any) -> Any:
    raise InputError(f"to was given two values for {name}: {first} and {second}")


def _move(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """``module.to``, except for what stays float32: some parameters, and tables that no file holds."""
    kept = {name: p.data.float() for name, p in module.named_parameters() if stays_float32(module, name, dtype)}
    tables = [
        (part, name, table)
        for part in module.modules()
        for name in part._non_persistent_buffers_set
        if (table := getattr(part, name, None)) is not None and table.is_floating_point()
    ]
    module.to(device=device, dtype=dtype)
    for part, name, table in tables:  # such as rotary frequencies, which rounding would shift
        setattr(part, name, table.to(getattr(part, name).device))
    for name, parameter in module.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)
