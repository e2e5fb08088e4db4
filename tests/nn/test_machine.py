"""What this machine can do: that it is asked rightly, with and without the variables that hide instructions."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from impasto.nn import machine
from impasto.nn.machine import describe_processor, fast_dtype, free_memory, is_native, process_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CAPS = (*AVX2, "DNNL_MAX_CPU_ISA")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks for instructions of x86")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A processor without any extension, that tests add to."""
    found: dict[str, object] = {"architecture": "x86_64", "avx2": True, "bf16": False, "fp16": False, "isa": "AVX512"}
    monkeypatch.setattr(machine, "_CAPABILITIES", found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found["isa"])
    for kind in ("bf16", "fp16"):
        name = f"_is_mkldnn_{kind}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda kind=kind: found[kind], raising=False)
    for name in CAPS:
        monkeypatch.delenv(name, raising=False)
    machine._multiplies.cache_clear()
    yield found
    machine._multiplies.cache_clear()


@pytest.mark.parametrize(
    ("has", "bfloat16", "float16"),
    [
        ({}, False, False),
        ({"bf16": True, "fp16": True}, False, False),  # oneDNN emulates them with AVX-512 alone
        ({"bf16": True, "avx512_bf16": True}, True, False),
        ({"bf16": True, "amx_bf16": True, "fp16": True, "amx_fp16": True}, True, True),
        ({"avx512_bf16": True, "isa": "AVX512"}, False, False),  # ONEDNN_MAX_CPU_ISA
        ({"bf16": True, "avx512_bf16": True, "isa": "AVX2"}, False, False),  # ATEN_CPU_CAPABILITY
        ({"architecture": "aarch64", "bf16": True, "isa": "SVE256"}, True, False),
        ({"architecture": "aarch64", "isa": "DEFAULT"}, False, False),
    ],
)
def test_which_16_bit_products_are_native(
    processor: dict[str, object], has: dict[str, object], bfloat16: bool, float16: bool
) -> None:
    processor |= has
    assert (is_native(torch.bfloat16), is_native(torch.float16)) == (bfloat16, float16)
    assert is_native(torch.float32)
    assert fast_dtype(CPU) == (torch.bfloat16 if bfloat16 else torch.float32)


def test_dtypes_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fast in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert fast_dtype(CUDA) == fast
        assert is_native(torch.float16, CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_dtype(CUDA) == torch.bfloat16  # of a plan for another machine
    assert fast_dtype(torch.device("mps")) == torch.float32


def test_the_processor_is_described(processor: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_processor()[1:] == ("AVX2", False)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert describe_processor()[1:] == ("AVX2", False)  # it has no more to hide
    processor |= {"avx512_f": True, "bf16": True, "avx512_bf16": True}
    machine._multiplies.cache_clear()
    assert describe_processor()[1:] == ("AVX-512 with bfloat16, AVX2 in part (ATen)", True)
    for name, value in AVX2.items():
        monkeypatch.setenv(name, value)
    processor |= {"bf16": False, "isa": "AVX2"}
    machine._multiplies.cache_clear()
    assert describe_processor()[1:] == ("AVX2", True)
    assert describe_processor().name


@pytest.mark.long
@x86
def test_a_desktop_is_imitated() -> None:
    code = (
        "import torch; from impasto.nn.machine import *; found = describe_processor();"
        "print(found.instruction_set, found.imitated, is_native(torch.bfloat16), is_native(torch.float16))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.split() == ["AVX2", str(machine.processor_has("avx512_f")), "False", "False"]


def test_memory_of_this_machine() -> None:
    if sys.platform == "linux":
        before, size = process_memory(), 40_000_000
        # Not from the allocator, which may have freed memory at hand.
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for _ in range(40):
                block.write(bytes(size // 40))
            assert 35e6 < process_memory() - before < 45e6
            assert free_memory(CPU) > process_memory() > size
    assert machine._bytes_of("/proc/missing", "RssAnon") is None


@pytest.mark.parametrize(("limit", "is_limit"), [("3000000000", True), ("max", False), (str(2**63 - 4096), False)])
def test_the_memory_of_a_container_is_a_bound(
    limit: str, is_limit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(f"{limit}\n")
    (tmp_path / "stat").write_text("anon 1000000000\nfile 1500000000\n")
    monkeypatch.setattr(
        machine, "_CONTAINER", (("/none", "/none", "rss"), *[(f"{tmp_path}/limit", f"{tmp_path}/stat", "anon")])
    )
    monkeypatch.setattr(machine, "process_memory", lambda: 500_000_000)
    monkeypatch.setattr(machine, "_bytes_of", lambda path, field: 60_000_000_000)
    assert free_memory(CPU) == (2_500_000_000 if is_limit else 60_500_000_000)
