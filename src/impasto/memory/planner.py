"""The memory planner: how to generate an image within a budget, decided from the headers of a checkpoint.

Generation has phases, each of which needs one component: the text encoder, the transformer, the autoencoder, and
GLM-Image's prior before them. A plan says in which dtype each is loaded and computes, and how it gets to the device:
the fastest way that the budget allows. None changes the image beyond the rounding of the dtype. The prior alone cannot
come block by block, since each of its tokens needs all blocks: if an accelerator is too small for its weights, they are
int8 or 4-bit there. Other components are quantized if that is asked for.

On the CPU all components stay where they are, and the budget is for memory that is not backed by a file. Weights that
are used as they are stored stay in their memory-mapped file and take none of it: the operating system reads them when
they are used, and may drop them. 16-bit ones that the processor does not multiply are widened as they are used.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.stored import FLOATS
from ..errors import CheckpointError, InputError, ResourceError
from ..family import PRIOR_PIXELS, tokens_to_generate
from ..models.autoencoder.memory import decode_memory, decoder_layers, make_plan
from ..models.base import parse_size
from ..nn import machine
from ..nn.machine import default_device, free_memory, process_memory
from ..nn.precision import compute_in_float32
from ..nn.widening import BLOCK
from ..transforms.quantize import KEPT, Method, quantize
from ..transforms.quantized_linear import NF4_BLOCK, SCHEMES
from .inspection import DTYPES, USUAL_VAE, Inspection, Part, picture_size
from .placement import OneAtATime, Resident
from .streaming import Visit, is_settled

logger = logging.getLogger("impasto")

RESIDENT, IN_TURN, BLOCKS = "resident", "in turn", "block by block"
PRIOR = "vision_language_encoder"
#: Quantized weights: by which method of ``quantize``, and bytes of each.
QUANTISED: dict[str, tuple[Method, float]] = {"int8": ("int8-weight-only", 1.0), "nf4": ("nf4", 0.5 + 4 / NF4_BLOCK)}
#: Weights of fewer values stay as they are in the estimate: they are no large linear layers.
SMALL_WEIGHT = 2**16
#: What a process holds on the CPU before it has any weights: the interpreter, torch, transformers, a tokenizer.
PROCESS = 400_000_000
#: What estimates may be short of, and what allocators keep: bytes, and a share of what is planned.
MARGIN, SHARE = 32_000_000, 0.05
#: The components, the one that computes for the longest time first.
LONGEST = ("transformer", PRIOR, "text_encoder", "vae")
#: Parts of names of tables that are looked up in and of layers of which a part is used: nothing multiplies all of them.
TABLES = ("shared", "embed", "lm_head")
#: Tokens of the longest prompt, and of the negative one beside it.
TEXT_TOKENS = 600
#: Bytes of the strips of a tiled decoder, the fastest first.
STRIPS = (256 * 2**20, 64 * 2**20, 16 * 2**20)
#: What a convolution on the CPU takes for itself: its input and its output in an order of its own.
REORDERED = 0.5
#: Bytes of a pixel while an image is resized, scaled and handed out: three numbers in float32, three times.
PIXEL = 36


class Budget(NamedTuple):
    """A budget for other images than a single one of the usual size, or for another device than the default."""

    size: int | str  # bytes, or such as "8GB"
    device: torch.device | str | None = None
    height: int | None = None  # pixels
    width: int | None = None
    pictures: int = 1  # at once


class BudgetTooSmallError(ResourceError):
    """A budget within which nothing can be generated.

    Attributes:
        smallest: the budget that works, in bytes.
    """

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


class Tiling(NamedTuple):
    """How the decoder is tiled."""

    max_bytes: int  # of its activations
    strip_bytes: int
    again: float  # multiplications that are done twice, as a share of all


@dataclass(frozen=True)
class PartPlan:
    """How a component takes its turn."""

    name: str
    loaded: str  # dtype of its weights
    dtype: str  # in which it computes, or the kind of quantized weights
    way: str  # RESIDENT, IN_TURN or BLOCKS
    weights: int  # bytes of the budget that its weights take while it is in use, and always if resident
    work: int  # bytes that its computation takes
    moved: int  # bytes that are copied to the device each time it is used
    tiling: Tiling | None = None  # of the decoder; None: the image at once

    def describe(self) -> str:
        widened = f" from {self.loaded}" if self.dtype == "float32" != self.loaded else ""
        what = f"{self.dtype}{widened}, {self.way}"
        if not self.weights:
            what += ", read from its file"
        if self.tiling is not None:
            what += f", tiled ({self.tiling.again:.0%} of the decoding is computed twice)"
        if self.moved:
            times = "at each step" if self.way == BLOCKS and self.name == "transformer" else "for each call"
            what += f", {format_size(self.moved)} moved {times}"
        return what


@dataclass(frozen=True)
class MemoryPlan:
    """How a pipeline generates within a budget."""

    device: str
    budget: int  # bytes
    base: int  # bytes that are taken whatever is generated
    parts: tuple[PartPlan, ...]
    height: int
    width: int
    pictures: int
    reason: str

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of the phase of each component."""
        held = sum(part.weights for part in self.parts if part.way == RESIDENT)
        found = {}
        for part in self.parts:
            moving = held + (0 if part.way == RESIDENT else part.weights) + part.work
            found[part.name] = self.base + int(moving * (1 + SHARE))
        return found

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=self.base)

    def lines(self) -> Iterator[str]:
        """What was chosen and what it costs."""
        what = f"{self.pictures} x {self.width} x {self.height} px"
        yield f"{format_size(self.budget)} on {self.device}: peak {format_size(self.peak)} for {what}; {self.reason}"
        for part in self.parts:
            yield f"{part.name}: {part.describe()}; peak {format_size(self.phases[part.name])}"


def plan_memory(
    found: Inspection,
    size: int | str,
    *,
    device: torch.device | str | None = None,
    dtypes: Mapping[str, str] | None = None,
    height: int | None = None,
    width: int | None = None,
    pictures: int = 1,
    limited: bool = True,
) -> MemoryPlan:
    """Choose dtypes, placement and tiling; no weights are read.

    Args:
        found: the checkpoint, or those of its components that will be loaded.
        size: the budget: bytes, or such as "8GB", of the device; on the CPU of the process, without what files back.
        device: where to compute; the accelerator of this machine if None, or the CPU.
        dtypes: of components whose dtype is given: a name, or "auto" for the stored one; or "int8" or "nf4", for
            quantized weights.
        height, width: of the images, in pixels; those of the training by default.
        pictures: how many images are generated at once.
        limited: count only as much of the budget as is free on this machine.

    Raises:
        BudgetTooSmallError: the message has the smallest budget that works.
        ResourceError: this machine has not so much free.
        CheckpointError: weights whose headers cannot be read.
    """
    chosen = default_device() if device is None else torch.device(device)
    asked = parse_size(size)
    free = free_memory(chosen) if limited else asked
    base = base_memory(chosen)
    parts = [part for part in found.parts if part.config and (part.tensors or part.pickled)]
    for part in parts:
        if part.pickled or not set(part.dtypes) <= set(FLOATS):
            kind = "pickled" if part.pickled else f"quantized ({', '.join(part.dtypes)})"
            raise CheckpointError(
                f"the weights of {part.name} are {kind} and cannot be planned with; give the component to "
                f"from_pretrained ({part.name}=...), or load the pipeline without memory_budget"
            )
    limit = min(asked, free)
    side = _side(found)
    height, width = height or side, width or side
    scene = _Scene(found, chosen, height, width, pictures, dict(dtypes or {}))

    def made(chosen_parts: Sequence[PartPlan], reason: str = "") -> MemoryPlan:
        return MemoryPlan(str(chosen), asked, base, tuple(chosen_parts), height, width, pictures, reason)

    def fits(chosen_parts: Sequence[PartPlan]) -> bool:
        return made(chosen_parts).peak <= limit

    def filled(plan: MemoryPlan) -> MemoryPlan:
        """The same, with what is left of the budget given to a tiled decoder, which then computes less twice."""
        left = int((limit - plan.phases.get("vae", limit)) / (1 + SHARE))
        more = [scene.roomier(part, left) if part.tiling is not None else part for part in plan.parts]
        return replace(plan, parts=tuple(more))

    plans = []
    for reason, candidate in scene.candidates(parts, fits):
        plans.append(made(candidate, reason))
        if fits(candidate):
            return filled(plans[-1])
    closest = min(plans, key=lambda plan: plan.peak)
    needed = closest.peak
    largest = max(closest.parts, key=lambda part: closest.phases[part.name])
    if asked > free and needed <= asked:
        raise ResourceError(
            f"{format_size(free)} are free on {chosen}, and {found.model} needs {_up(needed)} for images of "
            f"{width} x {height} px; free some memory, or generate smaller images"
        )
    raise BudgetTooSmallError(
        f"a budget of {format_size(asked)} is too small for {found.model} on {chosen} with images of {width} x "
        f"{height} px: the smallest that works is {_up(needed)}. Give that, which the {largest.name} takes "
        f"({largest.dtype}, {largest.way}), or generate smaller images.",
        needed,
    )


@dataclass(frozen=True)
class _Scene:
    """What the ways of all components depend on."""

    found: Inspection
    device: torch.device
    height: int
    width: int
    pictures: int
    dtypes: dict[str, str]

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def candidates(
        self, parts: Sequence[Part], fits: Callable[[Sequence[PartPlan]], bool]
    ) -> Iterator[tuple[str, list[PartPlan]]]:
        """What the components may do, and why, the fastest first. None needs less than the last one, or on the CPU one
        of them."""
        if self.device.type == "cpu":
            # Where memory is short, those that compute for the shortest time do without it first.
            ordered = sorted(parts, key=lambda part: LONGEST.index(part.name))
            for ways in itertools.product(*map(self._resident_ways, ordered)):
                chosen = {way.name: way for way in ways}
                yield "all components stay in memory", [chosen[part.name] for part in parts]
            return
        whole = {part.name: self._whole(part, self._dtype(part), RESIDENT) for part in parts}
        firsts = [("all components stay in memory", whole)]
        if "text_encoder" in whole and len(whole) > 1:
            for way in self._ways(self.found.by_name["text_encoder"]):
                firsts.append(("all components but the text encoder stay in memory", {**whole, "text_encoder": way}))
        for reason, first in firsts:
            yield reason, list(first.values())
            for tiled in self._tiled(first["vae"]) if "vae" in first else ():
                yield reason, list({**first, "vae": tiled}.values())
        turns = [list(self._ways(part)) for part in parts]
        smallest = [min(ways, key=lambda way: way.weights + way.work) for ways in turns]
        fitting = [next((way for way in ways if fits([way])), least) for ways, least in zip(turns, smallest)]
        yield "the components take turns", fitting

    def _ways(self, part: Part) -> Iterator[PartPlan]:
        """How a component may take its turn on an accelerator, the fastest first."""
        dtype = self._dtype(part)
        whole = self._whole(part, dtype, IN_TURN)
        yield whole
        if part.name == "vae":
            yield from self._tiled(whole)
        elif part.name == PRIOR:
            if part.name not in self.dtypes:
                yield from (self._whole(part, few, IN_TURN) for few in QUANTISED)
        elif len(part.blocks()) > 1 and dtype not in QUANTISED:
            yield self._streamed(part, dtype)

    def _resident_ways(self, part: Part) -> Iterator[PartPlan]:
        """How a component may be loaded on the CPU, the fastest first: cast, or as it is stored."""
        stored, fast = part.dtypes[0], fast_dtype(self.device)
        asked = self._dtype(part) if part.name in self.dtypes else None
        dtypes = [asked or fast]
        if stored in DTYPES and asked in (None, "float32", self._computes(stored)):
            dtypes.append(stored)
        if asked is None and len(dtypes) > 1 and fast == "float32":
            del dtypes[0]  # weights are widened as they are used: a cast gains nothing
        for dtype in dict.fromkeys(dtypes):
            whole = self._whole(part, dtype, RESIDENT, "float32" if asked == "float32" else None)
            yield whole
            if part.name == "vae":
                yield from self._tiled(whole)

    def _whole(self, part: Part, dtype: str, way: str, computes: str | None = None) -> PartPlan:
        loaded = dtype
        if dtype in QUANTISED:
            loaded = part.dtypes[0] if self.device.type == "cpu" else fast_dtype(self.device)
        computes = computes or self._computes(loaded)
        weights = self._weights(part, loaded, dtype)
        work = self._work(part, loaded, computes)
        shown = dtype if dtype in QUANTISED else computes
        return PartPlan(part.name, loaded, shown, way, weights, work, weights if way == IN_TURN else 0)

    def _computes(self, loaded: str) -> str:
        """The dtype that weights of a dtype are multiplied in."""
        native = self.device.type != "cpu" or loaded == fast_dtype(self.device)
        return loaded if native else "float32"

    def _weights(self, part: Part, loaded: str, dtype: str) -> int:
        """Bytes of a component's weights, the large ones of its blocks quantized if ``dtype`` says so; on the CPU
        without what stays in its file."""
        quantized = set()
        if dtype in QUANTISED:
            quantized = {
                name
                for prefix, names in part.blocks().items()
                if prefix
                for name in names
                if name.endswith(".weight")
                and part.tensors[name][1] >= SMALL_WEIGHT
                and not any(f".{kept}." in f".{name}" for kept in KEPT)
            }
        mapped = self.device.type == "cpu" and part.dtypes == (loaded,)
        rest = part.wide(loaded) if mapped else part.tensors.keys() - quantized
        few = sum(part.tensors[name][1] for name in quantized)
        return part.memory(loaded, rest) + int(few * (QUANTISED[dtype][1] if few else 0))

    def _streamed(self, part: Part, dtype: str) -> PartPlan:
        blocks = part.blocks()
        largest = max(part.memory(dtype, names) for prefix, names in blocks.items() if prefix)
        weights = part.memory(dtype, blocks[""]) + 2 * largest  # one that computes and one that is on its way
        work = self._work(part, dtype, dtype)
        return PartPlan(part.name, dtype, dtype, BLOCKS, weights, work, part.memory(dtype))

    def _tiled(self, whole: PartPlan) -> Iterator[PartPlan]:
        if self.pixels:
            yield from (self._in_strips(whole, strip_bytes) for strip_bytes in STRIPS)

    def roomier(self, tiled: PartPlan, left: int) -> PartPlan:
        """A tiled decoder with so many bytes more."""
        assert tiled.tiling is not None
        return self._in_strips(tiled, tiled.tiling.strip_bytes, tiled.tiling.max_bytes + left)

    def _in_strips(self, part: PartPlan, strip_bytes: int, max_bytes: int | None = None) -> PartPlan:
        itemsize = DTYPES[part.dtype]
        layers = decoder_layers(self.found.by_name["vae"].config, *self._latent_sides())
        plan = make_plan(layers, itemsize, max_bytes, strip_bytes)
        kernels = strip_bytes if self.device.type == "cpu" else 0
        work = plan.peak_bytes + kernels + PIXEL * self.pixels * self.pictures
        work += self._temporary(self.found.by_name["vae"], part.loaded, part.dtype)
        return replace(part, work=work, tiling=Tiling(plan.peak_bytes, strip_bytes, plan.recomputation))

    def _vae_config(self) -> Mapping[str, Any]:
        parts = self.found.by_name
        return parts["vae"].config if "vae" in parts else USUAL_VAE

    def _latent_sides(self) -> tuple[int, int]:
        factor = 2 ** (len(self.found.by_name["vae"].config["block_out_channels"]) - 1)
        return -(-self.height // factor), -(-self.width // factor)

    def _dtype(self, part: Part) -> str:
        """The one asked for, or the fastest that the device computes in."""
        asked = self.dtypes.get(part.name)
        if asked == "auto":
            asked = part.dtypes[0]
        dtype = asked or fast_dtype(self.device)
        if asked is None and part.name == "vae" and dtype == "float16":  # in which some overflow
            dtype = "float32"
        if dtype not in DTYPES and (dtype not in QUANTISED or part.name == "vae"):
            known = [*DTYPES, *(QUANTISED if part.name != "vae" else ())]
            raise InputError(f"a memory budget can be planned with {', '.join(known)}, not with {dtype}")
        return dtype

    def _temporary(self, part: Part, loaded: str, computes: str) -> int:
        """Bytes of a weight that a CPU widens, or brings into the order in which it is multiplied."""
        counts = [count for name, (_, count) in part.tensors.items() if not any(mark in name for mark in TABLES)]
        if self.device.type != "cpu" or loaded == "float32" or not counts:
            return 0
        if loaded == computes:
            return DTYPES[loaded] * max(counts)
        return 4 * (max(counts) if part.name == "vae" else min(max(counts), BLOCK))

    def _work(self, part: Part, loaded: str, dtype: str) -> int:
        """Bytes of the computation in ``dtype``, with everything at once."""
        return self._temporary(part, loaded, dtype) + self._activations(part, dtype)

    def _activations(self, part: Part, dtype: str) -> int:
        config, itemsize = part.config, DTYPES[dtype]
        if part.name == PRIOR:
            return self._prior_work(config, itemsize)
        if part.name == "vae":  # one image after the other
            if not self.pixels:
                return 0
            maps = decode_memory(config, *self._latent_sides(), getattr(torch, dtype), tiled=False)
            kernels = REORDERED if self.device.type == "cpu" else 0
            return int(maps * (1 + kernels)) + PIXEL * self.pixels * self.pictures
        if part.name == "transformer":
            work = self.found.working_memory(part.name, dtype, self.pixels, self.pictures)
            width = int(config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72))
            if (part.class_name or "").startswith("GlmImage"):  # each layer's K and V of an image that is referred to
                tokens = self.pixels * self.pictures // picture_size(config, self._vae_config())[1] ** 2
                work += 2 * int(config.get("num_layers", 30)) * width * tokens * itemsize
            elif self.device.type == "cpu":  # short texts are absorbed into the projections
                work += 2 * self.pictures * int(config.get("num_layers", 28)) * 2 * width**2 * itemsize
            return work
        width, inner = int(config.get("d_model", 4096)), int(config.get("d_ff", 10240))
        scores = int(config.get("num_heads", 64)) * 300 * TEXT_TOKENS  # float32, and the bias of positions beside them
        # Hidden states, and the two branches of the feed-forward.
        return TEXT_TOKENS * (6 * width + 3 * inner) * itemsize + 8 * scores

    def _prior_work(self, config: Mapping[str, Any], itemsize: int) -> int:
        """Keys and values of a sequence that refers to an image of the same size, and the widest hidden states."""
        text = config.get("text_config") or {}
        heads = int(text.get("num_attention_heads", 32))
        width = int(text.get("hidden_size", 4096))
        of_head = int(text.get("head_dim") or width // heads)
        kept = 2 * int(text.get("num_hidden_layers", 40)) * int(text.get("num_key_value_heads") or heads) * of_head
        units = [max(1, side // PRIOR_PIXELS) * PRIOR_PIXELS for side in (self.height, self.width)]
        prompt = TEXT_TOKENS + units[0] * units[1] // PRIOR_PIXELS**2
        length = prompt + tokens_to_generate(units[0], units[1], with_images=False)
        wide = prompt * (6 * width + 3 * int(text.get("intermediate_size", 13696)))
        return self.pictures * (length * kept + wide) * itemsize


def apply_plan(plan: MemoryPlan, pipe: Any) -> None:
    """Have a pipeline, loaded as ``load_dtypes`` says, follow the plan."""
    device = torch.device(plan.device)
    visits = {}
    for part in plan.parts:
        module = pipe.components[part.name]
        if part.dtype in QUANTISED:
            quantize(module, QUANTISED[part.dtype][0], keep_originals=False)
        if part.dtype == "float32" != part.loaded:
            compute_in_float32(module)
        if part.tiling is not None:
            module.enable_tiling(part.tiling.max_bytes, part.tiling.strip_bytes)
        if part.name == "vae" and plan.pictures > 1:
            module.enable_slicing()
        if part.way == RESIDENT:
            module.to(device)
        visits[module] = Visit(blocks=1, ahead=True) if part.way == BLOCKS else Visit()
    given = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part not in visits]
    resident = all(part.way == RESIDENT for part in plan.parts) and all(is_settled(part) for part in given)
    pipe.placement = Resident() if resident else OneAtATime(device, visits=visits)
    pipe.plan = plan
    for line in plan.lines():
        logger.info("memory plan: %s", line)


def load_dtypes(plan: MemoryPlan) -> dict[str, torch.dtype]:
    """In which dtype to load each component."""
    return {part.name: getattr(torch, part.loaded) for part in plan.parts}


def check_libraries(plan: MemoryPlan) -> None:
    """Raise now, and not after the weights are loaded, if a library for quantized weights is missing."""
    for part in plan.parts:
        if part.dtype in QUANTISED:
            SCHEMES[QUANTISED[part.dtype][0]]().check(torch.device("cpu"), getattr(torch, part.loaded))


# --- the machine ---


def fast_dtype(device: torch.device) -> str:
    """The name of the dtype that the device computes in fastest."""
    return str(machine.fast_dtype(device)).removeprefix("torch.")


def base_memory(device: torch.device) -> int:
    """Bytes of the budget that are taken before any weights."""
    if device.type == "cpu":
        return max(process_memory(), PROCESS) + MARGIN
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" and torch.cuda.is_available() else 0
    return taken + 2 * MARGIN


def _side(found: Inspection) -> int:
    parts = found.by_name
    if "transformer" not in parts:
        return 0
    return picture_size(parts["transformer"].config, parts["vae"].config if "vae" in parts else USUAL_VAE)[0]


def format_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _up(size: int) -> str:
    """A size that is no smaller, as ``memory_budget`` takes it."""
    return f"{math.ceil(size / 1e8) / 10:.1f}GB" if size >= 1e9 else f"{math.ceil(size / 1e6)}MB"
