"""Run the benchmarks, one after another, and print the table of the newest results.

    python benchmarks [NAME ...] [--avx2] [--table]

Names: startup, attention, floor, step, packed, kv_compression, text, decode, image, memory, lossy, edits, prior; all of
them if none is given, which takes about two hours on two cores and 25 GB of disk. gpu, which needs one, runs only if it
is named.
--avx2 runs the benchmarks for processors without 16-bit products (attention, floor, step, precision); processors with
AVX-512 imitate them. --table only prints stored results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS: dict[str, list[list[str]]] = {
    "startup": [[]],
    "attention": [[]],
    "floor": [[]],
    "step": [
        ["--pixels", "256", "--exact"],
        ["--pixels", "512", "--exact"],
        ["--pixels", "1024", "--rounds", "3"],
        ["--pixels", "2048", "--rounds", "1"],
        ["--pixels", "256", "--batch", "4"],
        ["--pixels", "256", "--dtype", "float32"],
        ["--pixels", "256", "--best"],
    ],
    "text": [[]],
    "decode": [[]],
    "image": [["--lossy", "cache interval 2", "cache interval 3", "cache interval 2, guidance 0.2-0.8"]],
    "memory": [[]],
    "lossy": [[]],
    "edits": [[]],
    "packed": [[]],
    "kv_compression": [[]],
    "prior": [["--tokens", "192"], ["--tokens", "192", "--batch", "4"]],
    "gpu": [[]],
}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
FLOAT32 = ["--dtype", "float32", "--layers", "7"]
RUNS_AVX2: dict[str, list[list[str]]] = {
    "attention": [["--dtype", "float32", "--tokens", "256", "1024"]],
    "floor": [["--pixels", "256", "512", *FLOAT32]],
    "step": [
        ["--pixels", "256", "--rounds", "15", *FLOAT32],
        ["--pixels", "512", "--rounds", "9", *FLOAT32],
    ],
    "precision": [["step", "--pixels", "256", "--exact"], ["step", "--pixels", "512"], ["text", "image"]],
}


def table() -> str:
    """The newest result of each kind as a Markdown table."""
    newest: dict[str, Path] = {}
    for path in sorted((HERE / "results").glob("*.json")):
        newest[path.stem.split("-", 3)[3]] = path
    lines = ["| | processor | Impasto | diffusers | ratio | least to most | date |", "|---|---|---|---|---|---|---|"]
    for name, path in newest.items():
        result = json.loads(path.read_text())
        median = result.get("median", {})
        if set(median) >= {"impasto", "diffusers"} and isinstance(result["ratio"], dict):
            ratios = result["ratios"]["diffusers"]
            machine = result["machine"]
            processor = machine.get("processor") or {"instruction_set": machine["capability"], "imitated": False}
            instructions = processor["instruction_set"] + ", imitated" * processor["imitated"]
            lines.append(
                f"| {result.get('what', name)} | {instructions} | {median['impasto']} s | {median['diffusers']} s "
                f"| {result['ratio']['diffusers']} | {min(ratios)} to {max(ratios)} | {result['date']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--avx2", action="store_true", help="benchmark as a processor without 16-bit products")
    parser.add_argument("--table", action="store_true", help="only print stored results")
    options = parser.parse_args()
    runs, environment = (RUNS_AVX2, os.environ | AVX2) if options.avx2 else (RUNS, os.environ)
    unknown = [name for name in options.names if name not in runs]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(runs)}")
    if not options.table:
        for name in options.names or [name for name in runs if name != "gpu"]:
            for arguments in runs[name]:
                subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], check=True, env=environment)
    print(table())


if __name__ == "__main__":
    main()
