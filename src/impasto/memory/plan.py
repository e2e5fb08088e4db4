"""The memory planner: how to generate images within a budget, decided from the headers of a checkpoint.

Each phase of a generation needs one component. A plan specifies the dtype that it is loaded in, the dtype that it
computes in, and how it gets to the device: the fastest way within the budget. None changes the image beyond rounding.
The prior cannot be moved block by block, since each of its tokens needs all blocks: if an accelerator is too small for
its weights, they are quantized to int8 or 4 bits there. Other components are quantized on request only.

On the CPU all components stay in memory. Weights that are used as they are stored stay in their memory-mapped file and
take none of the budget: the operating system reads them when they are used, and may drop them.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.stored import FLOATS
from ..checks import MAX_SIDE, parse_size, shown, whole_number
from ..errors import CheckpointError, InputError, ResourceError
from ..nn import machine
from ..nn.machine import default_device, free_memory
from ..nn.precision import compute_in_float32
from ..transforms.quantize import quantize
from ..transforms.quantized_linear import SCHEMES
from .estimate import PRIOR, QUANTIZED, Tiling, Workload, base_memory, stored_memory
from .inspection import DTYPES, Component, Inspection
from .moving import is_settled
from .placement import OneAtATime, Resident
from .streaming import Visit

logger = logging.getLogger("impasto")

RESIDENT, IN_TURN, BLOCKS = "resident", "in turn", "block by block"
#: What estimates may be short of, relative to what is planned.
SHARE = 0.05
#: The components, the one that computes for the longest time first.
LONGEST = ("transformer", PRIOR, "text_encoder", "vae")
#: Bytes of the strips of a tiled decoder, the fastest first.
STRIPS = (256 * 2**20, 64 * 2**20, 16 * 2**20)


class Budget(NamedTuple):
    """A memory budget, and what is to be generated within it: ``from_pretrained(..., memory_budget=Budget("8GB"))``.

    It limits the memory of the device; on the CPU that of the process, without what is backed by files.

    Attributes:
        size: bytes, or such as ``"8GB"``.
        device: None: the accelerator of this machine, or the CPU.
        height, width: of the images in pixels; None: those of the training images.
        images: how many are generated at once.
        references: heights and widths of GLM-Image's reference images for each image; None: one of the image's size.
    """

    size: int | str
    device: torch.device | str | None = None
    height: int | None = None
    width: int | None = None
    images: int = 1
    references: tuple[tuple[int, int], ...] | None = None


class BudgetTooSmallError(ResourceError):
    """A budget within which nothing can be generated.

    Attributes:
        smallest: the smallest budget that works, in bytes.
    """

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class ComponentPlan:
    """How a component is loaded, moved and computed."""

    name: str
    loaded: str  # dtype of its weights
    dtype: str  # that it computes in, or the format of quantized weights
    way: str  # RESIDENT, IN_TURN or BLOCKS
    weights: int  # bytes of the budget that its weights take while it is in use, and always if resident
    work: int  # bytes that its computation takes
    moved: int = 0  # bytes that are copied to the device each time it is used
    tiling: Tiling | None = None  # of the decoder; None: not tiled

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
    components: Mapping[str, ComponentPlan]
    height: int
    width: int
    images: int
    reason: str = ""

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of the phase of each component."""
        resident = sum(each.weights for each in self.components.values() if each.way == RESIDENT)
        taken = {n: each.work + each.weights * (each.way != RESIDENT) for n, each in self.components.items()}
        return {name: self.base + int((resident + size) * (1 + SHARE)) for name, size in taken.items()}

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=self.base)

    def lines(self) -> Iterator[str]:
        """What was chosen, and what it costs."""
        what = f"{self.images} x {self.width} x {self.height} px"
        yield f"{format_size(self.budget)} on {self.device}: peak {format_size(self.peak)} for {what}; {self.reason}"
        for name, each in self.components.items():
            yield f"{name}: {each.describe()}; peak {format_size(self.phases[name])}"


def plan_memory(
    found: Inspection, budget: Budget, dtypes: Mapping[str, str] | None = None, *, limited: bool = True
) -> MemoryPlan:
    """Choose dtypes, placement and tiling; no weights are read.

    Args:
        found: the checkpoint, or those of its components that will be loaded.
        budget: what to stay within, and what to generate.
        dtypes: the dtypes of some components: a name, "auto" for the stored one, or "int8" or "nf4" for quantized
            weights. Those of the others are chosen.
        limited: count only as much of the budget as is free on this machine.

    Raises:
        BudgetTooSmallError: the message has the smallest budget that works.
        ResourceError: less is free on this machine than the budget, and it is not enough.
        CheckpointError: weights whose headers cannot be read.
    """
    target = default_device() if budget.device is None else torch.device(budget.device)
    size = parse_size(budget.size)
    _check(budget)
    free = free_memory(target) if limited else size
    for component in found.components.values():
        if component.config and (component.pickled or not set(component.dtypes) <= set(FLOATS)):
            kind = "pickled" if component.pickled else f"quantized ({', '.join(component.dtypes)})"
            raise CheckpointError(
                f"the weights of {component.name} are {kind} and cannot be planned with; give the component to "
                f"from_pretrained ({component.name}=...), or load the pipeline without memory_budget"
            )
    side, _ = found.image_size
    load = Workload(found, target, budget.height or side, budget.width or side, budget.images, budget.references)
    blank = MemoryPlan(str(target), size, base_memory(target), {}, load.height, load.width, load.images)
    planner = _Planner(load, dtypes or {}, blank, min(size, free), fast_dtype(target))
    plans = []
    for plan in planner.candidates():
        plans.append(plan)
        if plan.peak <= planner.limit:
            return planner.enlarged(plan)
    closest = min(plans, key=lambda plan: plan.peak)
    what = f"images of {load.width} x {load.height} px"
    if size > free and closest.peak <= size:
        raise ResourceError(
            f"{format_size(free)} are free on {target}, and {found.model} needs {_up(closest.peak)} for {what}; "
            f"free some memory, or generate smaller images"
        )
    largest = closest.components[max(closest.phases, key=closest.phases.__getitem__)]
    raise BudgetTooSmallError(
        f"a budget of {format_size(size)} is too small for {found.model} on {target} with {what}: the smallest that "
        f"works is {_up(closest.peak)}. Give that, which the {largest.name} takes ({largest.dtype}, {largest.way}), or "
        f"generate smaller images.",
        closest.peak,
    )


def _check(budget: Budget) -> None:
    """Refuse a budget for images that there cannot be."""
    whole_number("images", budget.images)
    sizes = {"height": budget.height, "width": budget.width}
    for size in budget.references or ():
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise InputError(f"references are pairs of height and width, not {shown(size)}")
    for number, (height, width) in enumerate(budget.references or ()):
        sizes |= {f"the height of reference {number}": height, f"the width of reference {number}": width}
    for name, side in sizes.items():
        if side is not None:
            whole_number(name, side, most=MAX_SIDE)
    if budget.device is not None and torch.device(budget.device).type == "meta":
        raise InputError("device='meta' generates nothing; name the device that will")


@dataclass(frozen=True)
class _Planner:
    """The options for each component, and their combinations."""

    load: Workload
    dtypes: Mapping[str, str]
    blank: MemoryPlan  # without components
    limit: int  # bytes
    fast: str  # the dtype that the device computes in fastest

    def candidates(self) -> Iterator[MemoryPlan]:
        """The fastest first. None needs less than the last one, or on the CPU one of them."""
        components = {c.name: c for c in self.load.found.components.values() if c.config and c.tensors}
        everything = "all components stay in memory"
        if self.load.on_cpu:
            # If memory is short, the components that compute for the shortest time make do with less first.
            longest = sorted(components, key=LONGEST.index)
            kinds = [(everything, {name: self._resident(components[name]) for name in longest})]
        else:
            whole = {n: self._with_tilings(self._whole(c, self._dtype(c), RESIDENT)) for n, c in components.items()}
            kinds = [(everything, whole)]
            if "text_encoder" in whole and len(whole) > 1:
                others = {**whole, "text_encoder": self._moved(components["text_encoder"])}
                kinds.append(("all components but the text encoder stay in memory", others))
        for reason, options in kinds:
            for ways in itertools.product(*options.values()):
                yield self._made(reason, *ways)
        if not self.load.on_cpu:
            turns = [self._fitting(self._moved(component)) for component in components.values()]
            yield self._made("the components take turns", *turns)

    def _fitting(self, ways: list[ComponentPlan]) -> ComponentPlan:
        """The first way within the budget of a component that takes its turn, or the one that needs least."""
        smallest = min(ways, key=lambda way: way.weights + way.work)
        return next((way for way in ways if self._made("", way).peak <= self.limit), smallest)

    def _made(self, reason: str, *ways: ComponentPlan) -> MemoryPlan:
        order = list(self.load.found.components)
        components = {way.name: way for way in sorted(ways, key=lambda way: order.index(way.name))}
        return replace(self.blank, components=components, reason=reason)

    def enlarged(self, plan: MemoryPlan) -> MemoryPlan:
        """The same, with the rest of the budget given to a tiled decoder, which then computes less twice."""
        vae = plan.components.get("vae")
        if vae is None or vae.tiling is None:
            return plan
        left = int((self.limit - plan.phases["vae"]) / (1 + SHARE))
        vae = self._tiled(vae, vae.tiling.strip_bytes, vae.tiling.max_bytes + left)
        return replace(plan, components={**plan.components, "vae": vae})

    def _moved(self, component: Component) -> list[ComponentPlan]:
        """How a component may take its turn on an accelerator, the fastest first."""
        dtype, blocks = self._dtype(component), component.blocks()
        whole = self._whole(component, dtype, IN_TURN)
        if component.name == PRIOR:
            packed = () if component.name in self.dtypes else QUANTIZED
            return [whole, *(self._whole(component, kind, IN_TURN) for kind in packed)]
        if component.name == "vae" or len(blocks) == 1 or dtype in QUANTIZED:
            return self._with_tilings(whole)
        # One block computes while the next one is on its way.
        largest = max(component.memory(dtype, names) for prefix, names in blocks.items() if prefix)
        return [whole, replace(whole, way=BLOCKS, weights=component.memory(dtype, blocks[""]) + 2 * largest)]

    def _resident(self, component: Component) -> list[ComponentPlan]:
        """How a component may be loaded on the CPU, the fastest first: cast, or as it is stored."""
        stored, asked = component.dtypes[0], self._dtype(component) if component.name in self.dtypes else None
        dtypes = [asked or self.fast]
        if stored in DTYPES and asked in (None, "float32", self._computes(stored)):
            # Without fast 16-bit arithmetic, weights are widened as they are used: a cast gains nothing.
            dtypes = [stored] if asked is None and self.fast == "float32" else [*dtypes, stored]
        ways = (self._with_tilings(self._whole(component, dtype, RESIDENT)) for dtype in dict.fromkeys(dtypes))
        return list(itertools.chain.from_iterable(ways))

    def _whole(self, component: Component, dtype: str, way: str) -> ComponentPlan:
        loaded, packed = dtype, None
        if dtype in QUANTIZED:
            loaded, packed = component.dtypes[0] if self.load.on_cpu else self.fast, dtype
        computes = "float32" if self.dtypes.get(component.name) == "float32" else self._computes(loaded)
        weights = stored_memory(component, loaded, packed, self.load.device)
        work = self.load.work(component, loaded, computes)
        moved = weights if way == IN_TURN else 0
        return ComponentPlan(component.name, loaded, packed or computes, way, weights, work, moved)

    def _with_tilings(self, whole: ComponentPlan) -> list[ComponentPlan]:
        """The component, and if it is the autoencoder, the ways to tile it, the fastest first."""
        strips = STRIPS if whole.name == "vae" and self.load.pixels else ()
        return [whole, *(self._tiled(whole, strip) for strip in strips)]

    def _tiled(self, vae: ComponentPlan, strip_bytes: int, max_bytes: int | None = None) -> ComponentPlan:
        work, tiling = self.load.tiled(vae.loaded, vae.dtype, strip_bytes, max_bytes)
        return replace(vae, work=work, tiling=tiling)

    def _computes(self, loaded: str) -> str:
        """The dtype that weights of a dtype are multiplied in."""
        return loaded if not self.load.on_cpu or loaded == self.fast else "float32"

    def _dtype(self, component: Component) -> str:
        """The requested one, or the fastest that the device computes in."""
        # Some autoencoders overflow in float16.
        usual = "float32" if component.name == "vae" and self.fast == "float16" else self.fast
        asked = self.dtypes.get(component.name, usual)
        dtype = component.dtypes[0] if asked == "auto" else asked
        known = [*DTYPES, *(QUANTIZED if component.name != "vae" else ())]
        if dtype not in known:
            raise InputError(f"a memory budget can be planned with {', '.join(known)}, not with {dtype}")
        return dtype


def apply_plan(plan: MemoryPlan, pipe: Any) -> None:
    """Have a pipeline, loaded as ``load_dtypes`` says, follow the plan."""
    device = torch.device(plan.device)
    visits = {}
    for each in plan.components.values():
        module = pipe.components[each.name]
        if each.dtype in QUANTIZED:
            quantize(module, QUANTIZED[each.dtype][0], keep_originals=False)
        if each.dtype == "float32" != each.loaded:
            compute_in_float32(module)
        if each.tiling is not None:
            module.enable_tiling(each.tiling.max_bytes, each.tiling.strip_bytes)
        if each.name == "vae" and plan.images > 1:
            module.enable_slicing()
        if each.way == RESIDENT:
            module.to(device)
        visits[module] = Visit(blocks=1, ahead=True) if each.way == BLOCKS else Visit()
    given = [other for other in pipe.components.values() if isinstance(other, nn.Module) and other not in visits]
    resident = all(each.way == RESIDENT for each in plan.components.values()) and all(map(is_settled, given))
    pipe.placement = Resident() if resident else OneAtATime(device, visits=visits)
    pipe.plan = plan
    for line in plan.lines():
        logger.info("memory plan: %s", line)


def load_dtypes(plan: MemoryPlan) -> dict[str, torch.dtype]:
    """The dtype to load each component in."""
    return {each.name: getattr(torch, each.loaded) for each in plan.components.values()}


def check_libraries(plan: MemoryPlan) -> None:
    """Raise before the weights are loaded if a library for quantized weights is missing."""
    for each in plan.components.values():
        if each.dtype in QUANTIZED:
            SCHEMES[QUANTIZED[each.dtype][0]]().check(torch.device("cpu"), getattr(torch, each.loaded))


def fast_dtype(device: torch.device) -> str:
    """The name of the dtype that the device computes in fastest."""
    return str(machine.fast_dtype(device)).removeprefix("torch.")


def format_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _up(size: int) -> str:
    """A size that is no smaller, in the form that ``memory_budget`` takes."""
    return f"{math.ceil(size / 1e8) / 10:.1f}GB" if size >= 1e9 else f"{math.ceil(size / 1e6)}MB"
