"""Run the benchmarks, one after another, and print the table of the newest results.

    python benchmarks [NAME ...] [--table]

Names: startup, attention, floor, step, text, decode, picture, memory, lossy, prior; all of them if none is given, which
takes about an hour and a half on two cores and 25 GB of disk. gpu, which needs one, runs only if it is named. --table
prints only what is stored.
"""

from __future__ import annotations

import argparse
import json
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
    "picture": [["--lossy", "cache interval 2", "cache interval 3", "cache interval 2, guidance 0.2-0.8"]],
    "memory": [[]],
    "lossy": [[]],
    "prior": [["--tokens", "192"], ["--tokens", "192", "--batch", "4"]],
    "gpu": [[]],
}


def table() -> str:
    """The newest result of each kind as a Markdown table."""
    newest: dict[str, Path] = {}
    for path in sorted((HERE / "results").glob("*.json")):
        newest[path.stem.split("-", 3)[3]] = path
    lines = ["| | Impasto | diffusers | ratio | least to most | date |", "|---|---|---|---|---|---|"]
    for name, path in newest.items():
        result = json.loads(path.read_text())
        median = result.get("median", {})
        if set(median) >= {"impasto", "diffusers"} and isinstance(result["ratio"], dict):
            ratios = result["ratios"]["diffusers"]
            lines.append(
                f"| {result.get('what', name)} | {median['impasto']} s | {median['diffusers']} s "
                f"| {result['ratio']['diffusers']} | {min(ratios)} to {max(ratios)} | {result['date']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--table", action="store_true", help="print what is stored, and run nothing")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RUNS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if not options.table:
        for name in options.names or [name for name in RUNS if name != "gpu"]:
            for arguments in RUNS[name]:
                subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], check=True)
    print(table())


if __name__ == "__main__":
    main()
