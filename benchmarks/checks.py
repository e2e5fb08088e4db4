"""The cost of checking a checkpoint: CPU time in checks against the time to load XL/2 and T5-XXL.

    python benchmarks/checks.py [--folder FOLDER] [--dtype bfloat16] [--rounds 5]

Creates the full-size folder of ``memory.py`` (22 GB in float32) once, and loads its transformer and text encoder. Every
function that only checks is timed when loading calls it; nested checks count once.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import impasto
import measure
import memory
from impasto import folders
from impasto import registry as roles
from impasto.checkpoints import config, stored, values, weights
from impasto.checkpoints.foreign import configs, from_transformers, tokenizer_files
from impasto.models import base as module
from impasto.pipelines import loading

#: Functions that only check, or find what to check.
CHECKS: dict[Any, tuple[str, ...]] = {
    config: ("read_json",),
    values: ("check_arguments",),
    stored: ("find_weight_files", "describe"),
    weights: ("check_fit",),
    configs: ("read_model_config", "read_values"),
    from_transformers: ("check_model", "_check_tensors", "_expected_tensors", "check_vocabulary"),
    tokenizer_files: ("read_tokenizer_files",),
    roles: ("check_role", "component_entries"),
    folders: ("_places", "_has_journal", "_locked"),
}


class Clock:
    """CPU seconds in the outermost checks, by name."""

    def __init__(self) -> None:
        self.inside = False
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **options: Any) -> Any:
            if self.inside:
                return call(*args, **options)
            self.inside, start = True, time.process_time()
            try:
                return call(*args, **options)
            finally:
                self.inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        return wrapped


def watch(clock: Clock) -> None:
    """Time every check in all modules that have imported it."""
    modules = [m for name, m in sys.modules.items() if name.startswith("impasto")]
    for owner, names in CHECKS.items():
        for name in names:
            call = getattr(owner, name)
            for place in modules:
                if vars(place).get(name) is call:
                    setattr(place, name, clock.timed(name, call))
    for method in ("_check_lists", "checked_arguments"):
        call = getattr(module.Model, method).__func__
        setattr(module.Model, method, classmethod(clock.timed(method, call)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="created if missing, and kept; by default a temporary one")
    parser.add_argument("--dtype", default="bfloat16", help="to load in; the files hold float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder or Path("full-size-float32")
    if not (folder / "model_index.json").exists():
        memory.make_folder(folder, torch.float32)
    rounds = []
    try:
        clock = Clock()
        watch(clock)
        for _ in range(options.rounds + 1):  # the first one also imports
            clock.seconds.clear()
            start, begun = time.process_time(), time.perf_counter()
            pipe = impasto.PixArtSigmaPipeline.from_pretrained(folder, dtype=options.dtype, vae=None, scheduler=None)
            total, wall = time.process_time() - start, time.perf_counter() - begun
            del pipe
            rounds.append({"checks": sum(clock.seconds.values()), "loading": total, "wall": wall, **clock.seconds})
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    rounds = rounds[1:]
    shares = [r["checks"] / r["loading"] for r in rounds]
    result = {
        "what": f"CPU time of checks while XL/2 and T5-XXL are loaded in {options.dtype} from float32",
        "median": {name: round(statistics.median(r.get(name, 0.0) for r in rounds), 4) for name in rounds[0]},
        "percent": {"median": round(100 * statistics.median(shares), 2), "most": round(100 * max(shares), 2)},
    }
    measure.write("checks", result)
    assert loading  # imports every module with a check before it is watched


if __name__ == "__main__":
    main()
