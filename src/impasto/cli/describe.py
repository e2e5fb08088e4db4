"""What ``impasto info`` prints."""

from __future__ import annotations

from collections.abc import Iterator

from ..memory.inspection import DTYPES, Inspection, image_size

#: What plans are printed for.
BUDGETS = ("4GB", "6GB", "8GB", "12GB", "16GB", "24GB")
GLM_IMAGE = "GlmImagePipeline"


def describe(found: Inspection) -> Iterator[str]:
    """The lines of ``impasto info``."""
    yield f"{found.model}: {found.class_name}"
    by_name = found.components
    side = 0
    if "transformer" in by_name and "vae" in by_name:
        side, unit = image_size(by_name["transformer"].config, by_name["vae"].config)
        unit = 32 if found.class_name == GLM_IMAGE else unit  # of its prior
        yield f"images of {side} x {side} px; sides are multiples of {unit}"
    yield ""
    rows: list[tuple[str, ...]] = [("component", "class", "parameters", "stored as", "on disk")]
    for part in found.components.values():
        stored = "pickle" if part.pickled else ", ".join(part.dtypes) or "-"
        count = f"{part.parameters:,}" if part.tensors else "-"
        rows.append((part.name, part.class_name or "-", count, stored, _amount(part.disk_bytes)))
    total = sum(part.parameters for part in found.components.values())
    rows.append(("all", "", f"{total:,}", "", _amount(sum(part.disk_bytes for part in found.components.values()))))
    yield from _aligned(rows, left=2)
    yield ""
    if any(part.pickled for part in found.components.values()):
        yield "The pickled weights are not opened, and are missing from these numbers."
    memory: list[tuple[str, ...]] = [("memory", *DTYPES)]
    for part in found.components.values():
        if part.tensors:
            memory.append((part.name, *(_amount(part.memory(dtype)) for dtype in DTYPES)))
    from ..memory.estimate import peak_memory

    for title, single in (("peak, all resident", False), ("peak, one at a time", True)):
        peaks = (_amount(peak_memory(found, dtype, one_at_a_time=single)) for dtype in DTYPES)
        memory.append((title, *peaks))
    yield from _aligned(memory, left=1)
    if side:
        yield f"Peaks are estimates, and hold what one guided image of {side} x {side} px needs on top of the weights."
        if not any(part.pickled for part in found.components.values()):
            yield ""
            yield from _describe_plans(found)


def _describe_plans(found: Inspection) -> Iterator[str]:
    """How memory budgets would be kept on this machine."""
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
        first, *others = (f"{part.name}: {part.describe()}" for part in plan.components.values())
        rows.append((size, _amount(plan.peak), first))
        rows += [("", "", line) for line in others]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for a, b, c in rows:
        yield f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}"
    yield f"Budgets are for {device}, and are kept with --memory-budget."


def _aligned(rows: list[tuple[str, ...]], left: int) -> Iterator[str]:
    """Columns as wide as their widest cell; the first ``left`` are aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        yield "  ".join(cells).rstrip()


def _amount(size: int) -> str:
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 1e3:.1f} kB"
