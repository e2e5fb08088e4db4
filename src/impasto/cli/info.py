"""``impasto info``: the components of a model, their sizes, and the memory that they need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated

import typer

from ..family import GLM_IMAGE, PRIOR_PIXELS, family_of
from ..memory.inspection import DTYPES, Inspection, image_size, inspect_model
from .entry import say

#: The memory budgets that plans are printed for.
BUDGETS = ("4GB", "6GB", "8GB", "12GB", "16GB", "24GB")


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or file, a hub id, or builtin:scenes.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read all weights; report NaN and infinite values.")] = False,
) -> None:
    """Print the components of MODEL with their sizes, dtypes and memory; or what the file of an adapter or of another
    program's checkpoint holds.
    """
    from .adapter_info import describe_adapter, find_adapter

    if (adapter := find_adapter(model)) is not None:
        for line in describe_adapter(adapter, model):
            say(line)
        return
    if os.path.isfile(model):
        from .info_file import describe_file

        for line in describe_file(model, deep):
            say(line)
        return
    for line in describe(inspect_model(model, deep=deep)):
        say(line)


def describe(found: Inspection) -> Iterator[str]:
    """The lines of ``impasto info``."""
    from ..memory.estimate import peak_memory

    yield f"{found.model}: {found.class_name}"
    by_name, components = found.components, found.components.values()
    side = 0
    if "transformer" in by_name and "vae" in by_name:
        side, unit = image_size(by_name["transformer"].config, by_name["vae"].config)
        unit = PRIOR_PIXELS if family_of(found.class_name) is GLM_IMAGE else unit
        yield f"images of {side} x {side} px; sides are multiples of {unit}"
    yield ""
    rows: list[tuple[str, ...]] = [("component", "class", "parameters", "stored as", "on disk")]
    for component in components:
        stored = "pickle" if component.pickled else ", ".join(component.dtypes) or "-"
        count = f"{component.parameters:,}" if component.tensors else "-"
        rows.append((component.name, component.class_name or "-", count, stored, _amount(component.disk_bytes)))
    total = sum(component.parameters for component in components)
    rows.append(("all", "", f"{total:,}", "", _amount(sum(component.disk_bytes for component in components))))
    yield from _aligned(rows, "<<>>>")
    yield ""
    if any(component.pickled for component in components):
        yield "Pickled weights are not opened, and these numbers do not include them."
    memory: list[tuple[str, ...]] = [("memory", *DTYPES)]
    for component in components:
        if component.tensors:
            memory.append((component.name, *(_amount(component.memory(dtype)) for dtype in DTYPES)))
    for title, single in (("peak, all resident", False), ("peak, one at a time", True)):
        peaks = (_amount(peak_memory(found, dtype, one_at_a_time=single)) for dtype in DTYPES)
        memory.append((title, *peaks))
    yield from _aligned(memory, "<" + ">" * len(DTYPES))
    if side:
        yield f"Peaks are estimates: the weights, and what generating one guided image of {side} x {side} px needs."
        if not any(component.pickled for component in components):
            yield ""
            yield from _describe_plans(found)


def _describe_plans(found: Inspection) -> Iterator[str]:
    """The plans for memory budgets on this machine."""
    from ..memory import plan as planner
    from ..nn.machine import default_device

    device = default_device()
    rows: list[tuple[str, ...]] = [("memory budget", "peak", "plan")]
    for size in BUDGETS:
        try:
            plan = planner.plan_memory(found, planner.Budget(size, device), limited=False)
        except planner.BudgetTooSmallError as error:
            rows.append((size, "-", f"too small; the least that works is {_amount(error.smallest)}"))
            continue
        first, *others = (f"{component.name}: {component.describe()}" for component in plan.components.values())
        rows.append((size, _amount(plan.peak), first))
        rows += [("", "", line) for line in others]
    yield from _aligned(rows, "<><")
    yield f"Budgets are for {device}; --memory-budget applies one."


def _aligned(rows: list[tuple[str, ...]], alignment: str) -> Iterator[str]:
    """Columns as wide as their widest cell, each aligned to the left (<) or to the right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths)).rstrip()


def _amount(size: int) -> str:
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 1e3:.1f} kB"
