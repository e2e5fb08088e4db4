"""What this machine can do: its processor, its accelerators, their memory. No other file queries the hardware."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import parse_size, shown
from ..errors import InputError, ResourceError

#: The instructions that multiply a dtype, by the names of ``torch.cpu.get_capabilities``.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
#: The environment variables that limit ATen, oneDNN and MKL to AVX2 or less.
_CAPS = {
    "ATen": ("ATEN_CPU_CAPABILITY",),
    "oneDNN": ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    "MKL": ("MKL_ENABLE_INSTRUCTIONS",),
}
CPU = torch.device("cpu")

# --- devices ---


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU if it has none."""
    return torch.accelerator.current_accelerator(check_available=True) or CPU


def as_device(device: torch.device | str | int) -> torch.device:
    """The device of this name or number, whether this machine has it or not.

    Raises:
        InputError: not the name of a device.
        ResourceError: no device has this number.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as problem:
        error = ResourceError if isinstance(device, int) else InputError
        raise error(f"there is no device {shown(device)}; this machine has {', '.join(_devices())}") from problem


def require_device(device: torch.device | str | int) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: not the name of a device.
        ResourceError: it does not; the message lists those that it has.
    """
    chosen = as_device(device)
    if chosen.type not in ("cpu", "meta") and f"{chosen.type}:{chosen.index or 0}" not in _devices():
        raise ResourceError(f"the device {chosen} is not available; this machine has {', '.join(_devices())}")
    return chosen


def check_device(device: torch.device | str | int) -> torch.device:
    """As ``require_device``, but devices that other libraries provide are accepted unchecked."""
    chosen = as_device(device)
    return require_device(chosen) if chosen.type in ("cuda", "mps", "xpu") else chosen


def device_of_map(device_map: Any, max_memory: Mapping[int | str, int | str] | None, size: int) -> torch.device:
    """The device on which a device map puts a whole model of so many bytes.

    Raises:
        InputError: a map of several devices.
        ResourceError: the device does not exist.
    """
    if isinstance(device_map, Mapping):
        places = {str(place): place for place in device_map.values()}
        if len(places) != 1:
            raise InputError(
                f"device_map puts one model on {len(places)} devices; load it without, and distribute it: "
                f"accelerate.dispatch_model(model, device_map)"
            )
        return check_device(next(iter(places.values())))
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return check_device(device_map)
    chosen = default_device()
    key = chosen.index or 0
    given = None if max_memory is None else max_memory.get(key, max_memory.get(f"{chosen.type}:{key}", 1))
    return chosen if size <= (free_memory(chosen) if given is None else parse_size(given)) else CPU


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is enabled for the type of this device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def check_dtype(dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Refuse a dtype that plain layers cannot compute in.

    Raises:
        ResourceError: the message names a dtype that works.
    """
    if dtype is None:
        return
    if dtype.itemsize == 1:
        raise ResourceError(
            f"layers cannot compute in {dtype}, a storage format; use bfloat16 or float16, or quantize the component"
        )
    if dtype == torch.float64 and device is not None and device.type == "mps":
        raise ResourceError("mps has no float64; use float32, bfloat16 or float16 there, or the CPU")


def is_native(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Whether the device multiplies numbers of this dtype without converting them first.

    If the CPU does not, a product in 16 bits takes 7 to 300 times as long as in float32.
    """
    if dtype not in _PRODUCTS:
        return True
    if device.type == "cuda":
        if dtype == torch.float16 or not torch.cuda.is_available():  # planning for another machine
            return True
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    return device.type != "cpu" or _multiplies(dtype)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device multiplies it, float16 on older CUDA devices, else float32."""
    if device.type == "mps" or not is_native(torch.bfloat16, device):
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.bfloat16


# --- the processor ---


# The oldest torch that is supported lacks the function. It is called here because compiled code reads the result, and
# ``torch.compiler.assume_constant_result`` would import the compiler, which takes 2 s.
_CAPABILITIES: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())


def processor_has(feature: str) -> bool:
    """Whether the processor has a feature, by the names of ``torch.cpu.get_capabilities``."""
    return bool(_CAPABILITIES.get(feature, False))


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has products of a 16-bit dtype, and torch and oneDNN are allowed to use them."""
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    if not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")():
        return False
    if _CAPABILITIES.get("architecture") != "x86_64":
        return True  # oneDNN knows the extensions of ARM
    above = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return above and any(processor_has(feature) for feature in _PRODUCTS[dtype])


@functools.cache
def multiplies_int8_exactly() -> bool:
    """Whether torch's products of int8 are exact on the CPU.

    They are not if ``ONEDNN_MAX_CPU_ISA`` hides the instructions for them: pairs of products then saturate.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())


def has_onednn_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layers of this dtype are enabled, and faster than torch's own."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.float32:  # not measured elsewhere
        return _CAPABILITIES.get("architecture") == "x86_64"
    return dtype == torch.bfloat16 and is_native(dtype)


def has_epilogues(dtype: torch.dtype) -> bool:
    """Whether GELU is faster in the epilogue of oneDNN's product than after it: not in float32 with AVX2."""
    above = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return has_onednn_products(dtype) and (above or dtype != torch.float32)


class Processor(NamedTuple):
    """The processor and the instructions in use."""

    name: str
    instruction_set: str  # in use, such as "AVX-512 with bfloat16" or "AVX2"
    imitated: bool  # environment variables hide some of the processor's instructions


def describe_processor() -> Processor:
    """The processor's name and instructions; "in part" lists the libraries that a variable limits to AVX2."""
    capped = []
    if _CAPABILITIES.get("architecture") != "x86_64":
        found = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    elif not processor_has("avx512_f"):
        found = "AVX2" if processor_has("avx2") else "x86_64 without AVX2"
    else:
        capped = [library for library, variables in _CAPS.items() if _caps(variables)]
        found = "AVX2" if len(capped) == len(_CAPS) else "AVX-512"
    native = [str(dtype).removeprefix("torch.") for dtype in _PRODUCTS if _multiplies(dtype)]
    if native:
        found += f" with {' and '.join(native)}"
    if 0 < len(capped) < len(_CAPS):
        found += f", AVX2 in part ({', '.join(capped)})"
    return Processor(_processor_name(), found, bool(capped))


def _caps(variables: tuple[str, ...]) -> bool:
    value = next((os.environ[name] for name in variables if name in os.environ), "")
    return value.upper() in ("DEFAULT", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX", "SSE41", "SSE4_2")


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- memory ---


def process_memory() -> int:
    """Bytes of this process that are not memory-mapped files; 0 if the system does not report them."""
    return _bytes_of("/proc/self/status", "RssAnon") or 0


def free_memory(device: torch.device) -> int:
    """Bytes that this process can use on the device, including those that it uses already."""
    if device.type == "cpu":
        available = _bytes_of("/proc/meminfo", "MemAvailable")
        return min(2**62 if available is None else available + process_memory(), _container_memory())
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return 2**62


#: The limit of a container and what it uses, of which the page cache can be dropped: control groups, version 2 and 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "rss"),
)


def _container_memory() -> int:
    """Bytes that this process can use in its container, including those that it uses already; very many in none."""
    for limit, usage, field in _CONTAINER:
        try:
            most = int(Path(limit).read_text())  # "max" where there is none
            used = dict(line.split() for line in Path(usage).read_text().splitlines())
            return max(0, most - int(used[field])) + process_memory()
        except (OSError, ValueError, KeyError):
            continue
    return 2**62


def _bytes_of(path: str, field: str) -> int | None:
    """The bytes of a line such as ``RssAnon:  123 kB``."""
    try:
        with open(path) as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration, ValueError):
        return None
