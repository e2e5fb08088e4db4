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


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16, and torch and oneDNN are allowed to use them.

    ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` takes them away. Without them a product in bfloat16 takes 7 to
    300 times as long as in float32.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if _capabilities().get("architecture") != "x86_64":
        return True  # oneDNN's word suffices: it knows the extension of ARM
    native = any(processor_has(feature) for feature in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))
    return native and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


@functools.cache
def multiplies_int8_exactly() -> bool:
    """Whether torch's products of int8 are exact on the CPU.

    Where the processor has instructions for them and ``ONEDNN_MAX_CPU_ISA`` hides these, pairs of products saturate.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, and float32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    else:
        native = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def has_bfloat16_epilogues() -> bool:
    """Whether oneDNN's products of bfloat16 take an activation along, and are switched on."""
    return bool(torch.backends.mkldnn.enabled) and multiplies_bfloat16()
