"""What all benchmarks share: timing in turns, the machine's description, dated results, tables."""

from __future__ import annotations

import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import impasto
from impasto.nn.machine import describe_processor

RESULTS = Path(__file__).parent / "results"


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after another in every round, so that a slow minute of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: Mapping[str, list[float]], ours: str = "impasto") -> dict[str, Any]:
    """Medians, minima, maxima and, pair by pair, the ratios of the others to ours."""
    others = [name for name in seconds if name != ours]
    return {
        "seconds": {name: [round(x, 4) for x in values] for name, values in seconds.items()},
        "median": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "ratio": {
            name: round(statistics.median(seconds[name]) / statistics.median(seconds[ours]), 3) for name in others
        },
        "ratios": {
            name: [round(b / a, 3) for a, b in zip(seconds[ours], seconds[name], strict=True)] for name in others
        },
    }


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    versions = {m.__name__: m.__version__ for m in (impasto, diffusers, transformers, torch)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": os.cpu_count(),
        "processor": describe_processor()._asdict(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Store a dated result with a description of the machine, and print its path. Names of AVX2 results say so."""
    RESULTS.mkdir(exist_ok=True)
    if describe_processor().instruction_set == "AVX2":
        name += "-avx2"
    today = datetime.date.today().isoformat()
    target = RESULTS / f"{today}-{name}.json"
    target.write_text(json.dumps({"date": today, **result, "machine": machine()}, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"written to {target}")
    return target


def peak_gigabytes(script: str, *options: str) -> float:
    """The last number that a fresh process of ``script`` prints: its own peak memory, see ``own_peak``."""
    printed = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True).stdout
    return round(float(printed.split()[-1]), 2)


def own_peak() -> float:
    """Peak resident gigabytes of this process so far.

    On Linux, ``ru_maxrss`` includes the process that started this one; VmHWM is of this program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())
