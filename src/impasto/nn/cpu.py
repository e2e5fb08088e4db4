"""What this machine's processor can do."""

from __future__ import annotations

import functools

import torch


@functools.cache
def processor_has(feature: str) -> bool:
    """Whether the processor has a feature, by the names of ``torch.cpu.get_capabilities``."""
    # Newer than the oldest torch that we take.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(feature, False))
