"""Freed memory is kept for the next tensors: each is tried in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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


def run(what: str, **variables: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, what]
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
