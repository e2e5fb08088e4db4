"""The rest of the documented surface of pipelines: what callbacks read, and methods that calls do not need."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from torch import Tensor

from ...memory.placement import OneAtATime, Resident
from ...nn.machine import as_device
from ...nn.noise import draw_noise
from .. import inputs
from ..components import Components
from ..images import ImageProcessor
from ..learned_tokens import concepts_of
from ..prompts import prepare
from ..request import read_pixart
from ..sampling import first_deviation, step_options
from .calls import Call, call_of, calling, remember


class CallFacts(Components):
    """The call in progress, in a callback; or the loop in progress of this thread; or the last call.

    On a pipeline that threads share, each reads and changes its own call.
    """

    #: The calls and loops in progress; the pipeline keeps nothing else about them.
    in_progress: list[Call]

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of the next step. In a callback, assign to ``pipe._guidance_scale`` to change it.

        A scale of 1 or less turns guidance off, and a later one above 1 turns it on again.
        """
        call = call_of(self)
        return None if call is None else call.guidance_scale

    @property
    def _guidance_scale(self) -> float | None:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        scale = inputs.guidance(value)
        own = [call for call in self._addressed() if call.thread == threading.get_ident()]
        for call in own:
            call.guidance_scale = scale
        if not own:
            remember(Call(self, scale))

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the scale is above 1; an interval or the scheduler may still leave steps without guidance."""
        return (self.guidance_scale or 0.0) > 1.0

    @property
    def num_timesteps(self) -> int | None:
        """The number of steps that are taken; None before the first call."""
        call = call_of(self)
        return None if call is None else call.steps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep of the step in progress; None outside of a loop."""
        call = call_of(self)
        return None if call is None else call.timestep

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        """The call's argument of this name; None for pipelines that take none."""
        call = call_of(self)
        return None if call is None else call.attention_kwargs

    _num_timesteps, _current_timestep, _attention_kwargs = num_timesteps, current_timestep, attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether the current call should end early; outside of calls, whether one in progress should, or the last did.

        Assign True in a callback to end its call after this step and decode the latents so far. Assigned elsewhere,
        such as in another thread, it ends every call and loop in progress.
        """
        last = call_of(self)
        calls = self._addressed() or ([] if last is None else [last])
        return any(call.interrupted for call in calls)

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        for call in self._addressed():
            call.interrupted = bool(value)

    _interrupt = interrupt

    def _addressed(self) -> list[Call]:
        call = calling.get()
        return list(self.in_progress) if call is None or call.pipe is not self else [call]


class PipelineMethods(CallFacts):
    """What all pipelines have."""

    #: The order in which a call uses the components.
    model_cpu_offload_seq: ClassVar[str | None] = None
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    #: The tensors that ``callback_on_step_end`` may ask for.
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    @property
    def parameters(self) -> dict[str, Any]:
        """Arguments of the constructor that are not components: none."""
        return {}

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """An array [B, H, W, C] or [H, W, C] in [0, 1] to PIL images."""
        return ImageProcessor.numpy_to_pil(images)

    # --- attention: it takes memory in proportion to the tokens already, never to their square ---

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Accepted without effect: attention is memory-efficient already, and slices would only make it slower."""

    def disable_attention_slicing(self) -> None:
        """Accepted without effect: attention is not sliced."""

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        """Accepted without effect: attention is memory-efficient already."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Accepted without effect: attention is memory-efficient already, without xFormers."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Accepted without effect: attention stays memory-efficient."""

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Accepted without effect: attention is memory-efficient already, without xFormers."""

    # --- offloading ---

    def remove_all_hooks(self) -> None:
        """End offloading: the components stay on the host. Hooks of accelerate on components are removed too."""
        if isinstance(self.placement, OneAtATime):
            self.placement, self.plan = Resident(), None
            self._weights_moved()
        for module in self._modules():
            if any(hasattr(child, "_hf_hook") for child in module.modules()):
                from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]

                remove_hook_from_module(module, recurse=True)

    def maybe_free_model_hooks(self) -> None:
        """Accepted without effect: offloaded components are back on the host when the use of them ends."""

    # --- the autoencoder ---

    def enable_vae_slicing(self) -> None:
        """Decode one image of a batch at a time."""
        self._require("vae").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode the whole batch at once."""
        self._require("vae").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode in tiles, in less memory. With our autoencoder the result is exact, without seams."""
        self._require("vae").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole images."""
        self._require("vae").disable_tiling()

    # --- stages of a call ---

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise [B, C, h, w], or the given latents, times the scheduler's ``init_noise_sigma``, on the device."""
        target, factor = as_device(device), cast(Any, self).vae_scale_factor
        if latents is None:
            shape = [batch_size, num_channels_latents, int(height) // factor, int(width) // factor]
            latents = draw_noise(shape, inputs.check_generator(generator, batch_size), target, dtype)
        scaled: Tensor = latents.to(target) * first_deviation(self._require("scheduler"))
        return scaled

    def _arguments(self, **given: Any) -> dict[str, Any]:
        """The arguments of a call: its defaults, and these."""
        parameters = inspect.signature(type(self).__call__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**defaults, "kwargs": {}, **given}


class PixArtMethods(PipelineMethods):
    """What PixArt's pipelines have."""

    model_cpu_offload_seq: ClassVar[str | None] = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ]
    #: Decoration in captions, which cleaning replaces by spaces.
    bad_punct_regex: ClassVar[re.Pattern[str]] = re.compile(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+")

    def check_inputs(
        self,
        prompt: Any,
        height: int,
        width: int,
        negative_prompt: Any,
        callback_steps: int,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> None:
        """Raise InputError for arguments that a call would refuse. Height and width are those of generation."""
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        arguments = self._arguments(**given, use_resolution_binning=False)
        read_pixart(self, self._callback_tensor_inputs[1:], arguments)

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Those of ``generator`` and ``eta`` that the scheduler's ``step`` takes."""
        return step_options(self._require("scheduler"), eta=eta, generator=generator)

    def _text_preprocessing(self, text: str | Sequence[str], clean_caption: bool = False) -> list[str]:
        concepts = concepts_of(self.components["tokenizer"])
        return [prepare(one, clean_caption, concepts) for one in ([text] if isinstance(text, str) else text)]

    def _clean_caption(self, caption: str) -> str:
        from ..cleaning import clean_caption

        return clean_caption(caption)


class GlmImageMethods(PipelineMethods):
    """What GLM-Image's pipeline has."""

    model_cpu_offload_seq: ClassVar[str | None] = "vision_language_encoder->text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def check_inputs(
        self,
        prompt: Any,
        height: int | None,
        width: int | None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prior_token_ids: Tensor | None = None,
        prior_token_image_ids: list[Tensor] | None = None,
        source_image_grid_thw: list[Tensor] | None = None,
        image: Any = None,
    ) -> None:
        """Raise InputError for arguments that a call would refuse."""
        from ..glm_image_inputs import read_glm_image

        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "read_glm_image")}
        given["callback_on_step_end_tensor_inputs"] = callback_on_step_end_tensor_inputs or ()
        read_glm_image(self, self._callback_tensor_inputs[1:], self._arguments(**given))

    def get_glyph_texts(self, prompt: str | Sequence[str]) -> list[list[str]]:
        """The quoted texts of each prompt."""
        from ..glyphs import quoted_texts

        return [quoted_texts(one) for one in ([prompt] if isinstance(prompt, str) else prompt)]
