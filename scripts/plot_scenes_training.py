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
#: The transformer's stages in their order, with the size of a batch. Later stages weigh timesteps.
STAGES = {
    "128": 64, "128-continued": 64, "256": 32, "multiaspect": 64, "multiaspect-continued": 64, "multiaspect-gpu": 512,
    "agreement": 24,
}  # fmt: skip
BANDS = {"t0_250": "t < 250", "t250_500": "250 to 500", "t500_750": "500 to 750", "t750_1000": "t ≥ 750"}
ATTRIBUTES = ("background", "count", "colours", "shapes", "sizes", "relations", "whole")


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_stages(records: Path) -> tuple[Rows, list[float]]:
    """The rows of the transformer's stages and where each stage ends, with "images" in thousands from the first on."""
    rows: Rows = []
    ends = [0.0]
    for name, batch in STAGES.items():
        stage = read(records / f"{name}.jsonl")
        rows += [{**row, "images": ends[-1] + row["step"] * batch / 1000} for row in stage]
        ends.append(rows[-1]["images"])
    return rows, ends[1:]


def curve(axes: Axes, rows: Rows, name: str, along: str, **style: object) -> None:
    rows = [row for row in rows if name in row]
    axes.plot([row[along] for row in rows], [row[name] for row in rows], **style)
    axes.set_xlim(0, 1.03 * rows[-1][along])


def name_ends(axes: Axes, names: list[str], gap: float) -> None:
    """Write the name of each curve at its right end, at least `gap` of the axis apart."""
    axes.figure.canvas.draw()  # settles the limits
    to_share = axes.transData + axes.transAxes.inverted()
    lines = axes.get_lines()[: len(names)]
    ends = {name: to_share.transform(line.get_xydata()[-1])[1] for name, line in zip(names, lines, strict=True)}
    colors = {name: line.get_color() for name, line in zip(names, lines, strict=True)}
    height = 1.0 + gap  # from the top down: there is more room below than above
    for name in sorted(ends, key=lambda name: -ends[name]):
        height = min(ends[name], height - gap)
        axes.text(1.01, height, name, color=colors[name], transform=axes.transAxes, va="center", fontsize=9)


def mark_stages(axes: Axes, ends: list[float]) -> None:
    for end in ends[:-1]:
        axes.axvline(end, color="gray", linewidth=0.8, linestyle=":")


def draw_autoencoder(axes: Axes, rows: Rows) -> None:
    axes.set_title("Autoencoder")
    axes.set_xlabel("steps")
    axes.set_ylabel("PSNR of validation images (dB)")
    curve(axes, rows, "psnr", "step", color="C0", marker="o", markersize=3)


def draw_loss(axes: Axes, rows: Rows, ends: list[float]) -> None:
    axes.set_title("Transformer: error of the velocity")
    axes.set_ylabel("mean over timesteps t (log scale)")
    axes.set_yscale("log")
    for number, name in enumerate(BANDS):
        color = plt.get_cmap("viridis")(0.85 * number / (len(BANDS) - 1))
        curve(axes, rows, name, "images", color=color, linewidth=1.3)
    name_ends(axes, list(BANDS.values()), gap=0.06)
    mark_stages(axes, ends)


def draw_judged(axes: Axes, rows: Rows, ends: list[float]) -> None:
    axes.set_title("Transformer: share right according to the judge")
    axes.set_ylabel("share right, validation prompts")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for number, name in enumerate(ATTRIBUTES):
        whole = name == "whole"
        style = {"color": "black", "linewidth": 2.2} if whole else {"color": f"C{number}", "linewidth": 1.3}
        curve(axes, rows, f"scenes {name}", "images", marker="o", markersize=3, **style)
    name_ends(axes, ["everything" if name == "whole" else name for name in ATTRIBUTES], gap=0.06)
    mark_stages(axes, ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the logs")
    parser.add_argument("--out", type=Path, help="the image; default: curves.png in the folder of the logs")
    options = parser.parse_args()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axes in (left, middle, right):
        axes.set_xlabel("images seen (thousands); dotted lines: the next stage")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rows, ends = read_stages(options.records)
    draw_autoencoder(left, read(options.records / "autoencoder.jsonl"))
    draw_loss(middle, rows, ends)
    draw_judged(right, rows, ends)
    out = options.out or options.records / "curves.png"
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
