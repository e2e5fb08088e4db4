"""The memory planner: how to draw a picture within a budget, decided from the headers of a checkpoint.

Drawing has phases, each of which needs one part: the text encoder, the transformer, the autoencoder, and GLM-Image's
prior before them. A plan says of each part in which dtype it computes and how it gets there, the fastest way that the
budget allows. No way changes the picture beyond the rounding of the dtype, for what comes block by block needs no 8
bits. The prior alone cannot come so, since each of its tokens needs all blocks: what is too small for its weights gets
it in 8 bits, or in 4. Other parts are in few bits where that is asked for.

On the CPU the budget is for memory that is not backed by a file. Weights that are used as they are stored stay in
their memory-mapped file and take none of it: the operating system reads them when they are used, and may drop them.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.stored import FLOATS
from ..errors import CheckpointError, InputError, ResourceError
from ..models.autoencoder_memory import decode_memory, decoder_layers, make_plan
from ..nn.machine import multiplies_bfloat16
from ..nn.module import parse_size
from ..transforms.quantize import KEPT, Method, quantize
from ..transforms.quantized_linear import NF4_BLOCK, SCHEMES
from .glm_image_prior import PRIOR_PIXELS, tokens_to_generate
from .inspection import DTYPES, USUAL_VAE, Inspection, Part, picture_size
from .moving import Visit, is_settled
from .placement import OneAtATime, Resident

logger = logging.getLogger("impasto")

RESIDENT, IN_TURN, BLOCKS = "resident", "in turn", "block by block"
PRIOR = "vision_language_encoder"
#: Weights of few bits: by which method of ``quantize``, and bytes of each.
QUANTISED: dict[str, tuple[Method, float]] = {"int8": ("int8-weight-only", 1.0), "nf4": ("nf4", 0.5 + 4 / NF4_BLOCK)}
#: Weights of fewer values stay as they are in the estimate: they are no large linear layers.
SMALL_WEIGHT = 2**16
#: What a process holds on the CPU before it has any weights: the interpreter, torch, transformers, a tokenizer.
PROCESS = 400_000_000
#: What estimates may be short of, and what allocators keep: bytes, and a share of what is planned.
MARGIN, SHARE = 32_000_000, 0.05
#: Tokens of the longest prompt, and of the negative one beside it.
TEXT_TOKENS = 600
#: Bytes of the strips of a tiled decoder, the fastest first.
STRIPS = (256 * 2**20, 64 * 2**20, 16 * 2**20)
#: What a convolution on the CPU takes for itself: its input and its output in an order of its own.
REORDERED = 0.5
#: Bytes of a pixel while a picture is resized, scaled and handed out: three numbers in float32, three times.
PIXEL = 36


class Budget(NamedTuple):
    """A budget for other pictures than a single one of the usual size, or for another device than the default."""

    size: int | str  # bytes, or such as "8GB"
    device: torch.device | str | None = None
    height: int | None = None  # pixels
    width: int | None = None
    pictures: int = 1  # at once


class BudgetTooSmallError(ResourceError):
    """A budget within which nothing can be drawn.

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
    """How a part takes its turn."""

    name: str
    stored: str  # dtype
    dtype: str  # in which it computes
    way: str  # RESIDENT, IN_TURN or BLOCKS
    weights: int  # bytes of the budget that its weights take while it is in use, and if resident always
    work: int  # bytes that its computation takes
    moved: int  # bytes that are read from the file, cast or copied to the device each time it is used
    tiling: Tiling | None = None  # of the decoder; None: the picture at once

    def describe(self) -> str:
        what = f"{self.dtype}, {self.way}"
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
    """How a pipeline draws within a budget."""

    device: str
    budget: int  # bytes
    base: int  # bytes that are taken whatever is drawn
    parts: tuple[PartPlan, ...]
    height: int
    width: int
    pictures: int
    reason: str

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of the phase of each part."""
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
        found: the checkpoint, or those of its parts that will be loaded.
        size: the budget: bytes, or such as "8GB", of the device; on the CPU of the process, without what files back.
        device: where to compute; the accelerator of this machine if None, or the CPU where there is none.
        dtypes: of parts that are to compute in a certain one: a name, or "auto" for the stored one; or "int8" or
            "nf4", for weights of few bits.
        height, width: of the pictures, in pixels; those of the training by default.
        pictures: how many are drawn at once.
        limited: count only as much of the budget as is free on this machine.

    Raises:
        BudgetTooSmallError: the message has the smallest budget that works.
        ResourceError: this machine has not so much free.
        CheckpointError: weights that cannot be looked into.
    """
    chosen = default_device() if device is None else torch.device(device)
    asked = parse_size(size)
    free = free_memory(chosen) if limited else asked
    base = base_memory(chosen)
    parts = [part for part in found.parts if part.config and (part.tensors or part.pickled)]
    for part in parts:
        if part.pickled or not set(part.dtypes) <= set(FLOATS):
            kind = "pickled" if part.pickled else f"quantised ({', '.join(part.dtypes)})"
            raise CheckpointError(
                f"the weights of {part.name} are {kind} and cannot be planned with; give the part to from_pretrained "
                f"({part.name}=...), or load the pipeline without memory_budget"
            )
    limit = min(asked, free)
    side = _side(found)
    height, width = height or side, width or side
    scene = _Scene(found, chosen, height, width, pictures, dict(dtypes or {}))
    base += scene.widened(parts)

    def made(chosen_parts: Sequence[PartPlan], reason: str) -> MemoryPlan:
        return MemoryPlan(str(chosen), asked, base, tuple(chosen_parts), height, width, pictures, reason)

    def filled(plan: MemoryPlan) -> MemoryPlan:
        """The same, with what is left of the budget given to a tiled decoder, which then computes less twice."""
        left = int((limit - plan.phases.get("vae", limit)) / (1 + SHARE))
        more = [scene.roomier(part, left) if part.tiling is not None else part for part in plan.parts]
        return replace(plan, parts=tuple(more))

    for reason, candidate in scene.resident(parts):
        plan = made(candidate, reason)
        if plan.peak <= limit:
            return filled(plan)
    choices = {part.name: list(scene.ways(part)) for part in parts}
    # What may stay in memory, in each of its ways, and beside it the others in their turns.
    staying = {name: ways for name, ways in choices.items() if ways[-1].way == RESIDENT}
    closest: MemoryPlan | None = None
    for ways in itertools.product(*staying.values()):
        turns = dict(zip(staying, ways))
        held = [way for way in ways if way.way == RESIDENT]
        for name in choices.keys() - staying.keys():
            peaks = [made([*held, way], "").peak for way in choices[name]]
            fitting = next((i for i, peak in enumerate(peaks) if peak <= limit), peaks.index(min(peaks)))
            turns[name] = choices[name][fitting]
        plan = made([turns[part.name] for part in parts], "the parts take turns")
        if plan.peak <= limit:
            return filled(plan)
        closest = plan if closest is None or plan.peak < closest.peak else closest
    assert closest is not None
    needed = closest.peak
    largest = max(closest.parts, key=lambda part: closest.phases[part.name])
    if asked > free and needed <= asked:
        raise ResourceError(
            f"{format_size(free)} are free on {chosen}, and {found.model} needs {_up(needed)} for pictures of "
            f"{width} x {height} px; free some memory, or draw smaller pictures"
        )
    raise BudgetTooSmallError(
        f"a budget of {format_size(asked)} is too small for {found.model} on {chosen} with pictures of {width} x "
        f"{height} px: the smallest that works is {_up(needed)}. Give that, which the {largest.name} takes "
        f"({largest.dtype}, {largest.way}), or draw smaller pictures.",
        needed,
    )


@dataclass(frozen=True)
class _Scene:
    """What the ways of all parts depend on."""

    found: Inspection
    device: torch.device
    height: int
    width: int
    pictures: int
    dtypes: dict[str, str]

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def widened(self, parts: Sequence[Part]) -> int:
        """Bytes at home on the CPU that no file backs: weights stored in float16 that are loaded in float32."""
        if self.device.type != "cpu":
            return 0
        return sum(part.memory("float16") - 2 * part.parameters for part in parts if part.dtypes == ("float16",))

    def resident(self, parts: Sequence[Part]) -> Iterator[tuple[str, list[PartPlan]]]:
        """All parts in memory, or all but the text encoder, each with larger and then smaller tiles of the decoder."""
        whole = {part.name: self._whole(part, self._dtype(part), RESIDENT) for part in parts}
        firsts = [("all parts stay in memory", whole)]
        if "text_encoder" in whole and len(whole) > 1:
            for way in self.ways(self.found.by_name["text_encoder"]):
                firsts.append(("all parts but the text encoder stay in memory", {**whole, "text_encoder": way}))
        for reason, first in firsts:
            yield reason, list(first.values())
            for tiled in self._tiled(first["vae"]) if "vae" in first else ():
                yield reason, list({**first, "vae": tiled}.values())

    def ways(self, part: Part) -> Iterator[PartPlan]:
        """How a part may take its turn, the fastest first."""
        dtype = self._dtype(part)
        stored = part.dtypes[0]
        free = part.name in ("text_encoder", PRIOR) and part.name not in self.dtypes
        if free and self._is_mapped(part, stored) and self._computes(stored):  # nothing is cast for each prompt
            yield self._whole(part, stored, IN_TURN)
        whole = self._whole(part, dtype, IN_TURN)
        yield whole
        if part.name == "vae":
            yield from self._tiled(whole)
        elif part.name == PRIOR:
            if free:
                yield from (self._whole(part, few, IN_TURN) for few in QUANTISED)
        elif len(part.blocks()) > 1 and dtype not in QUANTISED:
            yield self._streamed(part, dtype)

    def _whole(self, part: Part, dtype: str, way: str) -> PartPlan:
        mapped = self._is_mapped(part, dtype)
        if dtype in QUANTISED and self.device.type == "cpu":
            way = RESIDENT  # where it is made
        # What is mapped takes nothing, but our own models may pack their weights anew for speed.
        size = self._memory(part, dtype)
        weights = 0 if mapped and part.name in ("text_encoder", PRIOR) else size
        moved = 0 if mapped or way == RESIDENT else size
        return PartPlan(part.name, part.dtypes[0], dtype, way, weights, self._work(part, dtype), moved)

    def _memory(self, part: Part, dtype: str) -> int:
        """Bytes of a part's weights, the large ones of its blocks in few bits if the dtype says so."""
        if dtype not in QUANTISED:
            return part.memory(dtype)
        rest = fast_dtype(self.device)
        few = [
            name
            for prefix, names in part.blocks().items()
            if prefix
            for name in names
            if name.endswith(".weight")
            and part.tensors[name][1] >= SMALL_WEIGHT
            and not any(f".{kept}." in f".{name}" for kept in KEPT)
        ]
        quantised = sum(part.tensors[name][1] for name in few)
        return part.memory(rest) - DTYPES[rest] * quantised + int(QUANTISED[dtype][1] * quantised)

    def _streamed(self, part: Part, dtype: str) -> PartPlan:
        blocks = part.blocks()
        largest = max(part.memory(dtype, names) for prefix, names in blocks.items() if prefix)
        present = 2 if self.device.type != "cpu" else 1  # one that computes and one that is on its way
        weights = part.memory(dtype, blocks[""]) + present * largest
        work = self._work(part, dtype)
        moved = 0 if self._is_mapped(part, dtype) else part.memory(dtype)
        return PartPlan(part.name, part.dtypes[0], dtype, BLOCKS, weights, work, moved)

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

    def _computes(self, dtype: str) -> bool:
        return dtype in ("float32", fast_dtype(self.device))

    def _is_mapped(self, part: Part, dtype: str) -> bool:
        return self.device.type == "cpu" and part.dtypes == (dtype,) and dtype in DTYPES

    def _work(self, part: Part, dtype: str) -> int:
        """Bytes of the computation, with everything at once."""
        if dtype in QUANTISED:
            dtype = fast_dtype(self.device)
        config, itemsize = part.config, DTYPES[dtype]
        if part.name == PRIOR:
            return self._prior_work(config, itemsize)
        if part.name == "vae":  # one picture after the other
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
        matrix = max((count for name, (_, count) in part.tensors.items() if _is_matrix(name)), default=0)
        # A matrix is reordered for the product; hidden states, and the two branches of the feed-forward.
        return (matrix + TEXT_TOKENS * (6 * width + 3 * inner)) * itemsize + 8 * scores

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


def _is_matrix(name: str) -> bool:
    return "shared" not in name and "embed" not in name


def apply_plan(plan: MemoryPlan, pipe: Any) -> None:
    """Have a pipeline, loaded as ``load_dtypes`` says, follow the plan."""
    device = torch.device(plan.device)
    visits = {}
    for part in plan.parts:
        module = pipe.components[part.name]
        if part.dtype in QUANTISED:
            quantize(module, QUANTISED[part.dtype][0], keep_originals=False)
            module.to(getattr(torch, fast_dtype(device)))  # what is not in few bits
        if part.tiling is not None:
            module.enable_tiling(part.tiling.max_bytes, part.tiling.strip_bytes)
        if part.name == "vae" and plan.pictures > 1:
            module.enable_slicing()
        if part.way == RESIDENT:
            module.to(device)
        streamed = part.way == BLOCKS
        dtype: torch.dtype | None = None if part.dtype in QUANTISED else getattr(torch, part.dtype)
        visits[module] = Visit(dtype, blocks=1 if streamed else None, ahead=streamed and device.type != "cpu")
    given = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part not in visits]
    resident = all(part.way == RESIDENT for part in plan.parts) and all(is_settled(part) for part in given)
    pipe.placement = Resident() if resident else OneAtATime(device, visits=visits)
    pipe.plan = plan
    for line in plan.lines():
        logger.info("memory plan: %s", line)


def load_dtypes(plan: MemoryPlan) -> dict[str, torch.dtype]:
    """In which dtype to load each part: what stays in memory is cast once, the others are left as stored."""
    stay = {part.name for part in plan.parts if part.way == RESIDENT and part.dtype not in QUANTISED}
    return {part.name: getattr(torch, part.dtype if part.name in stay else part.stored) for part in plan.parts}


def check_libraries(plan: MemoryPlan) -> None:
    """Raise now, and not after the weights are loaded, where a library for few bits is missing."""
    for part in plan.parts:
        if part.dtype in QUANTISED:
            SCHEMES[QUANTISED[part.dtype][0]]().check(torch.device("cpu"), getattr(torch, part.stored))


# --- the machine ---


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_dtype(device: torch.device) -> str:
    """bfloat16 where the device has it, float16 on older GPUs, and else float32."""
    if device.type == "cuda" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu":
        return "bfloat16" if multiplies_bfloat16() else "float32"
    return "float32" if device.type == "mps" else "bfloat16"


def base_memory(device: torch.device) -> int:
    """Bytes of the budget that are taken before any weights."""
    if device.type == "cpu":
        return max(process_memory(), PROCESS) + MARGIN
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" and torch.cuda.is_available() else 0
    return taken + 2 * MARGIN


def process_memory() -> int:
    """Bytes of this process that no file backs; 0 where the system does not tell."""
    return _kilobytes("/proc/self/status", "RssAnon") or 0


def free_memory(device: torch.device) -> int:
    """Bytes that this process can have on the device, with what it has already."""
    if device.type == "cpu":
        available = _kilobytes("/proc/meminfo", "MemAvailable")
        return 2**62 if available is None else available + process_memory()
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return 2**62


def _kilobytes(path: str, field: str) -> int | None:
    """The bytes of a line such as ``RssAnon:  123 kB``."""
    try:
        with open(path) as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration, ValueError):
        return None


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
