"""What a load needs, computed from measured times: the tables of docs/sizing.md.

python scripts/sizing.py [--images 1000000] [--peak 2] [--busy 0.7] [--wait 30] [--write docs/sizing.md]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DAY = 86_400  # seconds
BEGIN, END = "<!-- scripts/sizing.py: begin -->", "<!-- scripts/sizing.py: end -->"
#: Bytes per pixel of a file, assumed.
FILES = {"PNG": 1.5, "WebP at quality 95": 0.4}


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        images: a day.
        peak: the busiest hour's load, divided by the day's mean.
        busy: the share of time in which a machine may work in that hour; the rest keeps waiting times short.
        wait: seconds that an image may wait in the queue.
    """

    images: float = 1e6
    peak: float = 2.0
    busy: float = 0.7
    wait: float = 30.0

    @property
    def per_second(self) -> float:
        """Images a second, in the busiest hour."""
        return self.images / DAY * self.peak


@dataclass(frozen=True)
class Way:
    """A way to generate an image, with what it was measured to take.

    Attributes:
        machine: what one machine is.
        seconds: for which an image occupies one machine.
        pixels: of a side.
        sum: how the seconds come about.
    """

    name: str
    machine: str
    seconds: float
    pixels: int
    sum: str
    source: str

    def machines(self, load: Load) -> int:
        """How many are needed, with one to spare."""
        return math.ceil(load.per_second * self.seconds / load.busy) + 1

    def queue(self, load: Load) -> int:
        """``--queue`` of one machine: the image that it generates, and what it begins in ``load.wait`` seconds."""
        return 1 + math.floor(load.wait / self.seconds)


def result(name: str) -> dict[str, Any]:
    """A stored result of the benchmarks."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def ways() -> list[Way]:
    """The ways that have been measured, the fastest last."""
    gpu, packed = result("2026-11-26-gpu-1024"), result("2026-11-26-packed-pixart-bfloat16-gpu")
    cpu, small = result("2026-11-21-picture-512-bfloat16-second"), result("2026-11-26-precision-image-avx2")
    steps, decode = gpu["median"]["impasto"], gpu["decode_seconds"]["impasto"]
    text, step = gpu["text_seconds"]["impasto"], packed["512 px"]["median"]["packed"]
    whole, bundled = cpu["median"]["impasto"], small["median"]["float32"]
    mixed = 20 * step / 2
    few = steps / 20 / 2 * 4
    return [
        Way(
            "XL/2, 512 px, 20 guided steps, bfloat16",
            "2 cores with AVX-512 and bfloat16",
            whole,
            512,
            f"a whole image: {whole:.1f} s",
            "2026-11-21-picture-512-bfloat16-second",
        ),
        Way(
            "XL/2, 1024 px, 20 guided steps, bfloat16",
            "1 H100",
            steps + decode + text,
            1024,
            f"steps {steps:.3f} s + decoding {decode:.3f} s + text {text:.3f} s",
            "2026-11-26-gpu-1024",
        ),
        Way(
            "XL/2, about 512 px, two images at a time",
            "1 H100",
            mixed + decode / 4 + text,
            512,
            f"20 packed forwards of {step:.4f} s for two guided images: {mixed:.3f} s + a quarter of the decoding "
            f"at 1024 px: {decode / 4:.3f} s + text {text:.3f} s",
            "2026-11-26-packed-pixart-bfloat16-gpu",
        ),
        Way(
            "the same at 1024 px, 4 steps without guidance",
            "1 H100",
            few + decode + text,
            1024,
            f"4 of the 40 halves of guided steps: {few:.3f} s + decoding {decode:.3f} s + text {text:.3f} s",
            "2026-11-26-gpu-1024",
        ),
        Way(
            "the bundled model's first edition, 64 px, 20 guided steps",
            "2 cores with AVX2 (imitated)",
            bundled,
            64,
            f"a whole image: {bundled:.3f} s",
            "2026-11-26-precision-image-avx2",
        ),
    ]


def tables(load: Load) -> str:
    """The computed part of the page."""
    mean = load.images / DAY
    lines = [
        f"{load.images:,.0f} images a day are {mean:.1f} a second on average, and {load.per_second:.1f} in the busiest "
        f"hour. Each machine may work {100 * load.busy:g} % of that hour, one machine is a spare, and an image may "
        f"wait {load.wait:g} s.",
        "",
        "| | a machine is | seconds per image | images a day at most | machines | `--queue` of each |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways():
        most = f"{DAY / way.seconds:,.0f}"
        entries = (way.name, way.machine, f"{way.seconds:.3g}", most, f"**{way.machines(load):,}**", way.queue(load))
        lines.append(f"| {' | '.join(map(str, entries))} |")
    lines += ["", "How the seconds come about:", ""]
    lines += [f"- {way.name}: {way.sum} (`{way.source}`)" for way in ways()]
    lines += [
        "",
        "| files of a day, TB | " + " | ".join(f"{side} px" for side in (512, 1024)) + " |",
        "|---|---|---|",
    ]
    for kind, size in FILES.items():
        sizes = [load.images * size * side**2 / 1e12 for side in (512, 1024)]
        lines.append(f"| {kind} | " + " | ".join(f"{one:.2f}" for one in sizes) + " |")
    return "\n".join(lines)


def replaced(page: str, computed: str) -> str:
    """The page with its computed part."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{computed}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=Load.images, help="a day")
    parser.add_argument("--peak", type=float, default=Load.peak, help="the busiest hour's load divided by the mean")
    parser.add_argument("--busy", type=float, default=Load.busy, help="the share of that hour in which a machine works")
    parser.add_argument("--wait", type=float, default=Load.wait, help="seconds that an image may wait")
    parser.add_argument("--write", type=Path, help="replace the computed part of this page")
    given = parser.parse_args(arguments)
    if not (given.images > 0 and given.peak >= 1 and 0 < given.busy <= 1 and given.wait > 0):
        parser.error("images and wait must be above 0, peak 1 or more, and busy above 0 and at most 1")
    computed = tables(Load(given.images, given.peak, given.busy, given.wait))
    if given.write is None:
        print(computed)
    else:
        given.write.write_text(replaced(given.write.read_text("utf-8"), computed), "utf-8")


if __name__ == "__main__":
    main()
