"""The estimate of the memory that generation takes, from what ``inspection`` reads.

Activations were counted: the largest sum of tensors that are alive at once. Attention keeps no scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..family import GLM_IMAGE, PRIOR_PIXELS, SIGMA, family_of, pixels_per_latent, tokens_to_generate
from ..models.autoencoder.memory import Layer, make_plan, trace, untiled_peak
from ..models.autoencoder.model import AutoencoderKL
from ..nn.machine import process_memory
from ..nn.widening import BLOCK
from ..transforms.quantize import KEPT, Method
from ..transforms.quantized_linear import NF4_BLOCK
from .inspection import DTYPES, Component, Inspection

PRIOR = "vision_language_encoder"
#: Quantized weights: the method of ``quantize``, and the bytes of a weight.
QUANTIZED: dict[str, tuple[Method, float]] = {"int8": ("int8-weight-only", 1.0), "nf4": ("nf4", 0.5 + 4 / NF4_BLOCK)}
#: Smaller tensors are not quantized in the estimate: they are no large linear layers.
SMALL_WEIGHT = 2**16
#: What a process takes on the CPU before it has any weights: the interpreter, torch, transformers, a tokenizer.
PROCESS = 400_000_000
#: For what estimates leave out and what allocators keep, in bytes.
MARGIN = 32_000_000
#: Substrings of the names of lookup tables, and of layers that are used in slices, never as a whole.
TABLES = ("shared", "embed", "lm_head")
#: Tokens of the longest prompt and of its negative prompt.
TEXT_TOKENS = 2 * SIGMA.text_tokens
#: Tensors of the size of the hidden states that are alive at once in a layer: the feed-forward is four times as wide.
TRANSFORMER_MAPS = 12
#: What a convolution on the CPU takes for its input and output in a layout of its own, relative to them.
REORDERED = 0.5
#: Bytes of a pixel while an image is resized, scaled and converted: three float32 numbers, three times.
PIXEL = 36


class Tiling(NamedTuple):
    """How the decoder is tiled."""

    max_bytes: int  # of its activations
    strip_bytes: int
    again: float  # multiplications that are computed twice, relative to all


def base_memory(device: torch.device) -> int:
    """Bytes of a budget that are taken before any weights."""
    if device.type == "cpu":
        return max(process_memory(), PROCESS) + MARGIN
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" and torch.cuda.is_available() else 0
    return taken + 2 * MARGIN


def stored_memory(component: Component, loaded: str, quantized: str | None, device: torch.device) -> int:
    """Bytes of the weights, without those that stay in a memory-mapped file on the CPU.

    Args:
        loaded: their dtype.
        quantized: the format of the large ones in the repeated blocks, one of ``QUANTIZED``.
    """
    packed: dict[str, float] = {}  # bytes
    if quantized is not None:
        unrepeated = set(component.blocks()[""])
        packed = {
            name: count * QUANTIZED[quantized][1]
            for name, (_, count) in component.tensors.items()
            if name not in unrepeated
            and name.endswith(".weight")
            and count >= SMALL_WEIGHT
            and not any(f".{kept}." in f".{name}" for kept in KEPT)
        }
    mapped = device.type == "cpu" and component.dtypes == (loaded,)
    others = component.wide(loaded) if mapped else component.tensors.keys() - packed.keys()
    return component.memory(loaded, others) + int(sum(packed.values()))


@dataclass(frozen=True)
class Workload:
    """What is generated, from which checkpoint, and where."""

    found: Inspection
    device: torch.device
    height: int  # pixels
    width: int
    images: int = 1  # at once
    #: Heights and widths of GLM-Image's reference images for each image; None: one of the image's size.
    references: tuple[tuple[int, int], ...] | None = None

    @property
    def pixels(self) -> int:
        return self.height * self.width * self.images

    @property
    def is_glm_image(self) -> bool:
        return family_of(self.found.class_name) is GLM_IMAGE

    @property
    def seen(self) -> tuple[tuple[int, int], ...]:
        """The sizes of the reference images."""
        if not self.is_glm_image:
            return ()
        return ((self.height, self.width),) if self.references is None else self.references

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def decoder_layers(self) -> list[Layer]:
        """The layers of the autoencoder's decoder for the largest image; encoding a reference takes no more."""
        config = self.found.components["vae"].config
        with torch.device("meta"):
            decoder = AutoencoderKL(**AutoencoderKL.checked_arguments(config)).decoder
        factor = pixels_per_latent(config)
        height, width = max([(self.height, self.width), *self.seen], key=math.prod)
        return trace(decoder, -(-height // factor), -(-width // factor))

    def work(self, component: Component, loaded: str, computes: str) -> int:
        """Bytes that computing takes in addition to the weights, untiled, in dtypes of the weights and activations."""
        return self._converted_weight(component, loaded, computes) + self._activations(component, computes)

    def tiled(self, loaded: str, computes: str, strip_bytes: int, max_bytes: int | None = None) -> tuple[int, Tiling]:
        """The same of a tiled decoder, and how it is tiled."""
        vae = self.found.components["vae"]
        plan = make_plan(self.decoder_layers, _decoder_itemsize(vae, computes), max_bytes, strip_bytes)
        work = plan.peak_bytes + (strip_bytes if self.on_cpu else 0) + PIXEL * self.pixels
        work += self._converted_weight(vae, loaded, computes)
        return work, Tiling(plan.peak_bytes, strip_bytes, plan.recomputation)

    def _converted_weight(self, component: Component, loaded: str, computes: str) -> int:
        """Bytes of a weight that a CPU widens, or brings into the layout in which it is multiplied."""
        counts = [count for name, (_, count) in component.tensors.items() if not any(mark in name for mark in TABLES)]
        if not self.on_cpu or loaded == "float32" or not counts:
            return 0
        if loaded == computes:
            return DTYPES[loaded] * max(counts)
        return 4 * (max(counts) if component.name == "vae" else min(max(counts), BLOCK))

    def _activations(self, component: Component, dtype: str) -> int:
        config, itemsize = component.config, DTYPES[dtype]
        match component.name:
            case "vae" if self.pixels:  # one image after the other
                maps = untiled_peak(self.decoder_layers, _decoder_itemsize(component, dtype))
                return int(maps * (1 + (REORDERED if self.on_cpu else 0))) + PIXEL * self.pixels
            case "transformer":  # twice the tokens, because of guidance, and each layer's k and v of the text
                width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
                unit = self.found.image_size[1] ** 2
                tokens, references = self.pixels // unit, [math.prod(size) // unit for size in self.seen]
                alive = max([2 * tokens, *references])  # references are encoded one by one
                work = width * (TRANSFORMER_MAPS * alive + 2 * TEXT_TOKENS * layers * self.images)
                if self.is_glm_image:  # each layer's k and v of the references
                    work += 2 * layers * width * sum(references) * self.images
                elif self.on_cpu:  # short texts are absorbed into the projections
                    work += 2 * self.images * layers * 2 * width**2
                return int(work) * itemsize
            case "vision_language_encoder":
                return self._prior(config.get("text_config") or {}) * itemsize
            case "text_encoder":  # hidden states and two branches of the feed-forward; float32 scores and their bias
                width, inner = int(config.get("d_model", 4096)), int(config.get("d_ff", 10240))
                scores = int(config.get("num_heads", 64)) * TEXT_TOKENS**2 // 2
                return TEXT_TOKENS * (6 * width + 3 * inner) * itemsize + 8 * scores
        return 0

    def _prior(self, config: Mapping[str, Any]) -> int:
        """Elements of the k and v of a sequence with the reference images, and of the hidden states."""
        heads, channels = int(config.get("num_attention_heads", 32)), int(config.get("hidden_size", 4096))
        kv_heads, layers = int(config.get("num_key_value_heads") or heads), int(config.get("num_hidden_layers", 40))
        kept = 2 * layers * kv_heads * int(config.get("head_dim") or channels // heads)
        height, width = (max(1, side // PRIOR_PIXELS) * PRIOR_PIXELS for side in (self.height, self.width))
        prompt = TEXT_TOKENS + sum(math.prod(size) for size in self.seen) // PRIOR_PIXELS**2
        length = prompt + tokens_to_generate(height, width, with_images=False)
        wide = prompt * (6 * channels + 3 * int(config.get("intermediate_size", 13696)))
        return self.images * (length * kept + wide)


def _decoder_itemsize(vae: Component, dtype: str) -> int:
    overflows = dtype == "float16" and vae.config["force_upcast"]  # and is computed in float32
    return 4 if overflows else DTYPES[dtype]


def peak_memory(found: Inspection, dtype: str, *, one_at_a_time: bool) -> int:
    """About how many bytes an accelerator needs for one image, with all components on it or one at a time."""
    side, _ = found.image_size
    load = Workload(found, torch.device("meta"), side, side)
    needs = [
        (component.memory(dtype), load.work(component, dtype, dtype) if component.config else 0)
        for component in found.components.values()
    ]
    if one_at_a_time:
        return max(map(sum, needs), default=0)
    return sum(weights for weights, _ in needs) + max((work for _, work in needs), default=0)
