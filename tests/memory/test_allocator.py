"""Freed memory, and kernels that are kept: each is tried in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from impasto.memory.allocator import limit_kernel_caches

pytestmark = pytest.mark.long

SCRIPT = """
import resource, sys
import torch
from impasto import PixArtTransformer2DModel
from impasto.memory.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
torch.manual_seed(0)
size = {"num_attention_heads": 8, "attention_head_dim": 32, "cross_attention_dim": 256, "num_layers": 2}
model = PixArtTransformer2DModel(caption_channels=32, sample_size=32, use_additional_conditions=False, **size).eval()
latents, text, faults = torch.randn(8, 4, 32, 32), torch.randn(8, 5, 32), []
with torch.no_grad():
    for _ in range(8):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        model(latents, text, timestep=torch.tensor([500.0]))
print(faults[-1] - faults[3])
"""

SHAPES = """
import sys
import torch
from impasto.memory.allocator import limit_kernel_caches, return_freed_memory
from impasto.nn.backends.onednn import linear_gelu

if sys.argv[1] == "limit":
    limit_kernel_caches()


def resident():
    return_freed_memory()
    return int(open("/proc/self/statm").read().split()[1]) * 4096


layer, memory = torch.nn.Linear(64, 64), []
with torch.no_grad():
    for rows in range(8, 1608, 8):
        linear_gelu(layer, torch.randn(rows, 64), "tanh")
        memory.append(resident())
print((memory[-1] - memory[79]) >> 20)
"""


def run(what: str, script: str = SCRIPT, **variables: str) -> list[str]:
    command = [sys.executable, "-c", script, what]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they do")
def test_freed_memory_is_kept() -> None:
    (without,) = run("leave")
    done, kept = run("keep")
    assert done == "True"
    assert 4 * int(kept) < int(without)


def test_environment_variables_are_respected() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads what Linux knows of the process")
def test_kernels_of_few_shapes_are_kept() -> None:
    """120 shapes after the first 80: their kernels replace those."""
    (grown,) = run("limit", SHAPES)
    assert int(grown) <= 8, f"{grown} MB"


def test_as_many_kernels_are_kept_as_the_user_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is restored
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    limit_kernel_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "64")
