"""Seconds until the package is ready, in fresh processes: ours against diffusers'.

    python benchmarks/startup.py [--rounds 5]

`import` excludes `import torch`; `load` imports the pipeline and loads the bundled checkpoint (as diffusers does);
`help` is the command line's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import measure

FOLDER = Path(__file__).resolve().parents[1] / "src" / "impasto" / "scenes" / "checkpoint"
IMPORT = "import torch, time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
CODES = {
    "import": {
        "impasto": IMPORT.format("import impasto"),
        "diffusers": IMPORT.format("import diffusers"),
    },
    "import pipeline": {
        "impasto": IMPORT.format("from impasto import PixArtSigmaPipeline"),
        "diffusers": IMPORT.format("from diffusers import PixArtSigmaPipeline"),
    },
    "load": {
        name: IMPORT.format(f"from {name} import PixArtSigmaPipeline as P; P.from_pretrained({str(FOLDER)!r})")
        for name in ("impasto", "diffusers")
    },
    "help": {
        "impasto": "import subprocess, sys, time; t = time.perf_counter(); subprocess.run([sys.executable, '-m', "
        "'impasto', '--help'], capture_output=True); print(time.perf_counter() - t)"
    },
}


def printed(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result: dict[str, object] = {"what": "seconds in fresh processes"}
    for what, codes in CODES.items():
        seconds = {name: [printed(code) for _ in range(options.rounds)] for name, code in codes.items()}
        result[what] = measure.compared(seconds)
    measure.write("startup", result)


if __name__ == "__main__":
    main()
