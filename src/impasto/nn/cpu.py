"""What this machine's processor can do."""

from __future__ import annotations

import functools

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def processor_has(feature: str) -> bool:
    """Whether the processor has a feature, by the names of ``torch.cpu.get_capabilities``."""
    return bool(_capabilities().get(feature, False))


@functools.cache
def _capabilities() -> dict[str, object]:
    # Newer than the oldest torch that we take.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def has_bfloat16_epilogues() -> bool:
    """Whether oneDNN's products of bfloat16 take an activation along, and are switched on."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and processor_has("avx512_bf16")
