"""The bench as one figure: accuracy against time, and what each image costs. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from manidp.errors import MissingExtraError
from manidp.files import replacing

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter
except ImportError as error:
    raise MissingExtraError("this needs matplotlib; install it with: pip install 'manidp[plots]'") from error

COLOURS = {"everything": "#4477aa", "all channels, times the gate": "#bbbbbb", "kept channels": "#cc3311"}
OTHER = "#228833"  # of networks between the dense and the gated one


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure of what `bench` returned; the suffix of ``path`` chooses PNG or SVG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    mode = found["modes"][0]
    others = list(dict.fromkeys(row["model"] for row in mode["rows"]))[1:-1]
    for row in mode["rows"]:
        if row["correct"] is None:
            continue
        accuracy = 100 * row["correct"] / row["total"]
        colour = OTHER if row["model"] in others else COLOURS[row["computes"]]
        left.plot(row["median"], accuracy, "o", color=colour)
        left.annotate(row["runtime"], (row["median"], accuracy), rotation=60, fontsize=7,
                      xytext=(1, 5), textcoords="offset points")  # fmt: skip
    for computes, colour in COLOURS.items():
        left.plot([], [], "o", color=colour, label=computes)
    if others:
        left.plot([], [], "o", color=OTHER, label="anything, of another network")
    left.set(xscale="log", xlabel="ms an image, one at a time on one thread", ylabel="right, %")
    left.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10]))
    left.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.margins(x=0.15, y=0.45)
    left.legend(fontsize=7, loc="lower right", title="computes", title_fontsize=7)
    for single in found["single_images"]:
        macs = np.array(single["macs"]) / 1e6
        right.plot(macs, single["microseconds"], ".", markersize=3, color=COLOURS["kept channels"])
        line = np.array([macs.min(), macs.max()])
        right.plot(line, single["fixed_microseconds"] + line * single["microseconds_per_million_macs"], "k-", lw=1,
                   label=f"{single['fixed_microseconds']:.0f} µs + {single['microseconds_per_million_macs']:.1f} µs "
                         f"a million, correlation {single['correlation']:.2f}")  # fmt: skip
        right.set(title=f"{single['model']}: {len(macs):,} test images")
        high = np.percentile(single["microseconds"], 99.5) * 1.1
        right.set_ylim(0, high)
        right.legend(fontsize=8)
    right.set(xlabel="multiply-adds spent on the image, millions", ylabel="µs")
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=110)
