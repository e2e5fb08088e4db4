"""Pipeline: its components, and what the calls of all pipelines share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import parse_size
from ..errors import CheckpointError, ConfigurationError, InputError
from ..memory.moving import device_of
from ..memory.placement import OneAtATime, Resident
from ..models.autoencoder.model import AutoencoderKL
from ..nn.changes import is_ours, unwrapped
from ..nn.noise import draw_noise
from ..nn.outputs import BaseOutput
from ..nn.precision import adapt, computed, in_float32, without_autocast
from .compat.adapters import LoraMethods
from .compat.calls import Call, calling
from .compat.methods import PipelineMethods
from .components import Components
from .images import ImageProcessor
from .latents import unscaled
from .request import Request
from .resolution import resize_and_crop
from .sampling import first_deviation
from .single_file import SingleFilePipelines

if TYPE_CHECKING:
    from ..transforms.guidance_interval import GuidanceInterval
    from ..transforms.step_cache import StepCache
    from .compiling import Compiled
    from .prompt_cache import PromptCache


@dataclass
class ImagePipelineOutput(BaseOutput):
    """What a pipeline returns."""

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor  # by output_type; tensors and latents [B, C, H, W]


class Pipeline(SingleFilePipelines, LoraMethods, PipelineMethods):
    """Components, and what is in force on the calls that use them. A subclass adds the calls."""

    image_processor: ImageProcessor
    vae_scale_factor: Any  # pixels per latent along a side
    scheduler: Any
    prepare_latents: Any
    #: Prompt embeddings on disk; None unless ``enable_prompt_cache`` was called.
    prompt_cache: PromptCache | None
    #: The handles of ``compile``, ``cache_steps`` and ``guide_between``; None unless they were called.
    compiled: Compiled | None
    step_cache: StepCache | None
    guidance_interval: GuidanceInterval | None

    def __init__(self, **components: Any):
        super().__init__(**components)
        self.prompt_cache = None
        self.compiled = self.step_cache = self.guidance_interval = None
        self.in_progress = []
        self._progress_bar_config: dict[str, Any] = {}

    def _share(self, other: Components) -> None:
        super()._share(other)
        if isinstance(other, Pipeline):
            self.prompt_cache, self._progress_bar_config = other.prompt_cache, dict(other._progress_bar_config)

    def _weights_moved(self) -> None:
        if self.compiled is not None:
            self.compiled.renew()

    # --- what calls use ---

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
        with self.using("vae") as vae:
            weight = next(vae.parameters())
            overflows = weight.dtype == torch.float16 and vae.config.get("force_upcast")
            # Not ``self.device``: it looks at every component, which takes as long as some layers of the decoder.
            device = self.placement.device or device_of(vae) or weight.device
            with without_autocast(device), in_float32() if overflows else nullcontext():
                yield vae, torch.float32 if overflows else weight.dtype

    def _noise(self, request: Request, dtype: torch.dtype) -> Tensor:
        """Noise [B, C, h, w] of variance 1: given, generated, or of a ``prepare_latents`` that others have replaced."""
        if not is_ours(self.prepare_latents):
            batch, channels, *sides = request.shape
            height, width = (side * self.vae_scale_factor for side in sides)
            scaled = self.prepare_latents(
                batch, channels, height, width, dtype, self.device, request.generators, request.latents
            )
            return cast(Tensor, scaled / first_deviation(self.scheduler))
        if request.latents is not None:
            return request.latents
        return draw_noise(request.shape, request.generators, self.device, dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], as the loop yields them, to images [B, 3, H, W] in about [-1, 1]."""
        with self.using_vae() as (vae, dtype):
            z = unscaled(latents.to(self.device, dtype), self._latent_statistics(vae))
            return cast(Tensor, vae.decode(z, return_dict=False)[0])

    @torch.no_grad()
    def decode_by_layer(self, latents: Tensor) -> Generator[None, None, Tensor]:
        """The same, for those who do something else in between: yields after each layer.

        It does not yield where layers cannot be called one by one: of an autoencoder that is not ours, takes turns on
        the device with other components, divides images, is compiled or has hooks.
        """
        with self.using_vae() as (vae, dtype):
            layers = vae.decoder_layers() if isinstance(vae, AutoencoderKL) else None
            x = unscaled(latents.to(self.device, dtype), self._latent_statistics(vae))
        if layers is None or type(self.placement) is not Resident:
            return self.decode(latents)
        for layer in layers:
            with self.using_vae():
                x = computed(vae, layer, x)
            yield
        return x.to(dtype)

    def _latent_statistics(self, vae: Any) -> Mapping[str, Any]:
        """What ``scaled`` reads of the configuration of an autoencoder."""
        return cast(Mapping[str, Any], vae.config)

    def _finish(self, latents: Tensor, request: Request) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        """The images of the last latents, in the requested form and size."""
        if request.output_type == "latent":
            self._check_output("transformer", latents)
            return latents
        images = self._decode_checked(latents)  # [B, 3, H, W]
        if request.final_size is not None:
            images = resize_and_crop(images, *request.final_size)
        return self.image_processor.postprocess(images, output_type=request.output_type)

    def _decode_checked(self, latents: Tensor) -> Tensor:
        self._check_output("transformer", latents)
        images = self.decode(latents)
        self._check_output("vae", images)
        return images

    def _check_output(self, name: str, output: Tensor) -> None:
        """Raise CheckpointError for NaN and infinite values that are due to weights of the component of this name."""
        if not bool(output.isfinite().all()):
            from ..checkpoints.stored import non_finite_parameter

            broken = non_finite_parameter(unwrapped(self._require(name)))
            if broken is not None:
                raise CheckpointError(
                    f"the {name} computes NaN or infinite values, because its tensor {broken} contains some; "
                    f"download or save it again"
                )

    @contextmanager
    def _calling(
        self, guidance_scale: float = 1.0, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Iterator[Call]:
        """A call. If components take turns on a device, it waits for the calls of other threads."""
        call = Call(self, guidance_scale, attention_kwargs)
        with self.placement.calling(), call.registered():
            token = calling.set(call)
            try:
                yield call
            finally:
                calling.reset(token)

    # --- compilation ---

    def compile(self, *, vae: bool = False, cuda_graphs: bool | None = None, **options: Any) -> Compiled:
        """Make the transformer faster: compile its blocks and, on a CUDA device, capture steps as CUDA graphs.

        The blocks are alike, so one compiled graph serves all. On a CUDA device whole steps are captured and replayed;
        the first image of a size takes longer. Steps of an offloaded transformer are not captured. On a CPU that
        multiplies bfloat16 natively, compiled blocks are no faster (docs/performance.md). To compile a transformer that
        is assigned later, call ``pipe.compiled.remove()`` first.

        Args:
            vae: compile the autoencoder's decoder too.
            cuda_graphs: capture and replay steps; None: if the transformer is on a CUDA device; False: never.
            options: for ``torch.compile``, such as ``mode="max-autotune-no-cudagraphs"``. ``fullgraph=True`` is the
                default except on the CPU.

        Returns:
            a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

        Raises:
            ConfigurationError: the pipeline is compiled already, or the mode captures single blocks.
            InputError: there is no transformer, or no autoencoder with ``vae=True``.
            ResourceError: ``cuda_graphs=True`` without a CUDA device.
        """
        if self.compiled is not None:
            raise ConfigurationError("this pipeline is compiled already; pipe.compiled.remove() undoes it")
        from .compiling import Compiled

        decoder = self._require("vae") if vae else None
        self.compiled = Compiled(self, self._require("transformer"), decoder, cuda_graphs, **options)
        return self.compiled

    def _replaying(self, model: Any) -> Any:
        """What a loop calls in place of the model: a replay of its captured CUDA graph, or the model."""
        if self.compiled is None or self.compiled.steps is None or isinstance(self.placement, OneAtATime):
            return model
        return self.compiled.steps.begin(model)

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
        from ..files import plain_path
        from .prompt_cache import PromptCache

        limit = None if max_bytes is None else parse_size(max_bytes)
        self.prompt_cache = PromptCache(plain_path(folder), limit, self._source)

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
