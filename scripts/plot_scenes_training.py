"""Plot the curves of the bundled model's training run.

    python scripts/plot_scenes_training.py [--records docs/scenes/training] [--out docs/scenes/training/curves.png]

Needs matplotlib: `pip install impasto[train]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

Rows = list[dict[str, float]]

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "scenes" / "training"
BANDS = {"t0_250": "t < 250", "t250_500": "250 to 500", "t500_750": "500 to 750", "t750_1000": "t ≥ 750"}
ATTRIBUTES = ("background", "count", "colours", "shapes", "sizes", "relations", "whole")


def read(path: Path, name: str) -> Rows:
    """The rows of a log that have this value."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if name in row]


def curve(axes: Axes, rows: Rows, name: str, **style: object) -> None:
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], **style)
    axes.set_xlim(0, 1.03 * rows[-1]["step"])


def name_ends(axes: Axes, rows: Rows, names: dict[str, str], gap: float) -> None:
    """Write the name of each curve at its right end, at least `gap` of the axis apart."""
    axes.figure.canvas.draw()  # settles the limits
    to_share = axes.transData + axes.transAxes.inverted()
    ends = {name: to_share.transform((rows[-1]["step"], rows[-1][name]))[1] for name in names}
    lines = dict(zip(names, axes.get_lines(), strict=True))
    height = 1.0 + gap  # from the top down: there is more room below than above
    for name in sorted(ends, key=lambda name: -ends[name]):
        height = min(ends[name], height - gap)
        axes.text(
            1.01, height, names[name], color=lines[name].get_color(), transform=axes.transAxes, va="center", fontsize=9
        )


def draw_autoencoder(axes: Axes, rows: Rows) -> None:
    axes.set_title("Autoencoder")
    axes.set_ylabel("PSNR of validation images (dB)")
    curve(axes, rows, "psnr", color="C0", marker="o", markersize=3)
    last = rows[-1]
    axes.annotate(
        f"{last['psnr']:.1f} dB", (last["step"], last["psnr"]), (0, -18), textcoords="offset points", ha="center"
    )


def draw_loss(axes: Axes, rows: Rows) -> None:
    axes.set_title("Transformer: error of the velocity")
    axes.set_ylabel("mean over timesteps t (log scale)")
    axes.set_yscale("log")
    for number, name in enumerate(BANDS):
        curve(axes, rows, name, color=plt.get_cmap("viridis")(0.85 * number / (len(BANDS) - 1)), linewidth=1.3)
    name_ends(axes, rows, BANDS, gap=0.06)


def draw_judged(axes: Axes, rows: Rows) -> None:
    axes.set_title("Transformer: share right according to the judge")
    axes.set_ylabel("share right, 48 validation prompts")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for number, name in enumerate(ATTRIBUTES):
        whole = name == "whole"
        style = {"color": "black", "linewidth": 2.2} if whole else {"color": f"C{number}", "linewidth": 1.3}
        curve(axes, rows, name, marker="o", markersize=3, **style)
    name_ends(axes, rows, {name: "everything" if name == "whole" else name for name in ATTRIBUTES}, gap=0.06)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the logs")
    parser.add_argument("--out", type=Path, help="the image; default: curves.png in the folder of the logs")
    options = parser.parse_args()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axes in (left, middle, right):
        axes.set_xlabel("steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    draw_autoencoder(left, read(options.records / "autoencoder.jsonl", "psnr"))
    draw_loss(middle, read(options.records / "transformer.jsonl", "t0_250"))
    draw_judged(right, read(options.records / "transformer.jsonl", "whole"))
    out = options.out or options.records / "curves.png"
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
