"""The drawings of a report, and the overview: one wide figure for a page of its own. Costs matplotlib.

The same findings make the same bytes, whatever the user's matplotlib settings.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manidp.errors import ManiDPError, MissingExtraError
from manidp.files import replacing
from manidp.report.findings import Findings, macs_histogram, millions, named, percent

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch, FancyBboxPatch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtraError("reports need matplotlib; install it with: pip install 'manidp[plots]'") from error

HEAT_MAP_ROWS = 400

# Colours: light and dark page; drawings are made in the light ones, which SVG files on the page then exchange.
_COLOURS = {
    "paper": ("#fefefe", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "rule": ("#d1d9e0", "#3d444d"),
}
_PAPER, _INK, _MUTED, _RULE = (light for light, _ in _COLOURS.values())
# A pair told apart by every kind of colour vision, and dark or light enough for either page.
_BLUE, _ORANGE = "#2f81c7", "#d9700f"
VARIABLES = "".join(
    f"{rule}{{{''.join(f'--{name}:{pair[index]};' for name, pair in _COLOURS.items())}}}{end}"
    for index, (rule, end) in enumerate(((":root", ""), ("@media(prefers-color-scheme:dark){:root", "}")))
)
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "manidp",
}


@contextmanager
def drawing(**settings: object) -> Iterator[None]:
    """matplotlib with our settings and no one else's."""
    with style.context(["default", _STYLE | settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts for all scripts
        yield


def thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image in a square of ``side`` pixels at most: enlarged by a whole number, its pixels crisp, or reduced."""
    times = side // max(image.shape[:2])
    if times:
        return image.repeat(times, axis=0).repeat(times, axis=1)
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    return np.array(picture)


def _draw_histogram(axes: Axes, findings: Findings) -> None:
    counts, edges = macs_histogram(findings.macs)
    wrong = np.histogram(findings.macs[~findings.right], edges)[0]
    places, widths = edges[:-1] / 1e6, np.diff(edges) / 1e6
    for name, bars, below, colour in (("wrong", wrong, 0, _ORANGE), ("right", counts - wrong, wrong, _BLUE)):
        axes.bar(places, bars, widths, below, align="edge", color=colour, edgecolor=_PAPER, linewidth=0.6,
                 label=f"{name}: {bars.sum():,}")  # fmt: skip
    end = 1.02 * max(findings.dense_macs, edges[-1]) / 1e6
    axes.set(xlim=(0, end), ylim=(0, 1.45 * counts.max()))  # above the bars there is room for the words below
    axes.set(xlabel="million multiply-adds (M) spent on an image", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    mean, dense = float(findings.macs.mean()) / 1e6, findings.dense_macs / 1e6
    axes.axvline(mean, color=_INK, linewidth=1.2, linestyle="--")
    axes.axvline(dense, color=_INK, linewidth=1.2)
    words = (
        (mean, 0.92, f"mean: {millions(findings.macs.mean())}"),
        (dense, 0.8, f"dense network, every image: {millions(findings.dense_macs)}"),
    )
    for place, height, text in words:
        axes.annotate(text, (place, height), (-6, 0), ("data", "axes fraction"), "offset points",
                      ha="right", va="center")  # fmt: skip
    if findings.saved > 0.2:  # else the arrow is shorter than its words
        across = axes.get_xaxis_transform()
        axes.annotate("", (mean, 0.92), (dense, 0.92), across, arrowprops={"arrowstyle": "<->", "color": _MUTED})
        axes.text((mean + dense) / 2, 0.95, f"{percent(findings.saved)} fewer on average",
                  transform=across, ha="center", va="bottom")  # fmt: skip
    axes.legend(loc=(0.01, 0.7) if mean > 0.4 * end else (0.75, 0.4), frameon=False, reverse=True)


def histogram(findings: Findings) -> Figure:
    """How many images cost how many multiply-adds, right and wrong ones; mean and dense cost as lines."""
    figure = Figure((11, 3.6), layout="constrained")
    _draw_histogram(figure.add_subplot(), findings)
    return figure


def class_costs(findings: Findings) -> Figure:
    """One row a class: mean, quartiles and range of its images' multiply-adds."""
    labels = np.unique(findings.image_set.labels)
    figure = Figure((11, 0.9 + 0.3 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    counts = []
    for row, label in enumerate(labels):
        chosen = findings.image_set.labels == label
        least, lower, upper, most = np.quantile(findings.macs[chosen], (0, 0.25, 0.75, 1)) / 1e6
        mean = float(findings.macs[chosen].mean())
        axes.plot((least, most), (row, row), color=_RULE, linewidth=1.5, solid_capstyle="round")
        axes.plot((lower, upper), (row, row), color=_BLUE, linewidth=7, alpha=0.4, solid_capstyle="butt")
        axes.plot(mean / 1e6, row, "o", color=_BLUE, markersize=7)
        counts.append(f"{millions(mean)} · {findings.right[chosen].sum():,} of {chosen.sum():,} right")
    axes.axvline(float(findings.macs.mean()) / 1e6, color=_INK, linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(labels)), [named(findings, label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(labels)), counts)
    for side, spine in ((axes, "left"), (beside, "right")):
        side.tick_params(axis="y", length=0, labelcolor=_INK)
        side.spines[spine].set_visible(False)
    axes.set_xlabel("million multiply-adds (M) spent on an image")
    return figure


def heat_map(findings: Findings) -> Figure:
    """Rows: images sorted by class, then cost. Columns: each gate's channels, those kept most often first."""
    labels = findings.image_set.labels
    order = np.lexsort((findings.macs, labels))
    rows = order[np.linspace(0, len(order) - 1, min(len(order), HEAT_MAP_ROWS)).round().astype(int)]
    blocks, starts, end = [], [], 0
    for kept in findings.kept.values():
        channels = np.argsort(-kept.sum(axis=0), kind="stable")
        gap = np.zeros((len(rows), max(4, 14 - len(channels))), np.uint8)  # room for the gate's name
        blocks += [kept[rows][:, channels] + np.uint8(1), gap]
        starts.append(end)
        end += kept.shape[1] + gap.shape[1]
    present = np.unique(labels[rows])
    figure = Figure((max(11, 1.6 + end / 72), max(6.4, 1.3 + 0.17 * len(present))), layout="constrained")
    axes = figure.add_subplot()
    colours = ListedColormap(["none", "#80808029", _BLUE])  # gap, skipped, kept
    cells = np.concatenate(blocks, axis=1)
    axes.imshow(cells, colours, vmin=0, vmax=2, aspect="auto", interpolation="none", extent=(0, end, len(rows), 0))
    centres = [start + kept.shape[1] / 2 for start, kept in zip(starts, findings.kept.values(), strict=True)]
    axes.set_xticks(centres, list(findings.kept), rotation=90)
    axes.xaxis.tick_top()
    firsts = np.searchsorted(labels[rows], present)
    lasts = np.searchsorted(labels[rows], present, side="right")
    axes.set_yticks((firsts + lasts) / 2, [named(findings, label) for label in present])
    for first in firsts[1:]:
        axes.axhline(first, color=_PAPER, linewidth=2)
    axes.tick_params(length=0, labelcolor=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def svg(figure: Figure) -> str:
    """The drawing as a data URI; its colours and its font follow the reader's settings."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    for name, (light, _) in _COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return data_uri("svg+xml", text.replace("</style>", f"{VARIABLES}</style>", 1).encode())


def data_uri(kind: str, content: bytes) -> str:
    """A picture as the address that holds it; ``kind``: png or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def draw_overview(findings: Findings, path: str | Path) -> None:
    """Draw images from the cheapest to the most expensive, above the histogram of their cost, as a PNG or SVG file.

    The drawing has its own background, so it can be read on light and dark pages.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ManiDPError(f"{path}: the overview is drawn as .png or .svg; got {Path(path).suffix or 'no suffix'}")
    with drawing(**{"svg.fonttype": "path", "font.size": 11}):
        buffer = io.BytesIO()
        software = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        _overview(findings).savefig(buffer, format=kind, metadata=software)
    write_file(buffer.getvalue(), path)


def _overview(findings: Findings) -> Figure:
    """Images at the minimum, every tenth percentile and the maximum of the cost, tied to the histogram."""
    width, height, dpi = 1760, 960, 160  # pixels; a page shows it at about half of this
    left, right, side, bottom = 120, 1712, 128, 670  # of the row of images
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    card = FancyBboxPatch((0.002, 0.004), 0.996, 0.992, "round,pad=0,rounding_size=0.014")
    card.set(mutation_aspect=width / height, transform=figure.transFigure, facecolor=_PAPER, edgecolor=_RULE, zorder=-1)
    figure.add_artist(card)
    axes = figure.add_axes((left / width, 100 / height, (right - left) / width, 310 / height))
    _draw_histogram(axes, findings)

    def write(x: float, y: float, text: str, **settings: Any) -> None:
        figure.text(x / width, y / height, text, **settings)

    images = len(findings.image_set)
    dense_right = "" if findings.dense_right is None else f"{findings.dense_right.sum():,} at "
    headline = (f"{findings.right.sum():,} of {images:,} images right at {millions(findings.macs.mean())} "
                f"multiply-adds each (dense: {dense_right}{millions(findings.dense_macs)})")  # fmt: skip
    write(left, 890, headline, size=14.5, weight="bold")
    write(left, 840, "The network computes different channels for each image. From the cheapest image to the most "
          "expensive, every tenth percentile:", color=_MUTED)  # fmt: skip
    places = findings.by_cost[np.linspace(0, images - 1, 11).round().astype(int)]
    for column, place in enumerate(places):
        x = left + round(column * (right - left - side) / (len(places) - 1))
        figure.figimage(thumbnail(findings.image_set.images[place], side), x, bottom, origin="upper")
        middle, cost = x + side / 2, findings.macs[place] / 1e6
        centred = {"ha": "center", "va": "top"}
        write(middle, bottom - 12, millions(findings.macs[place]), weight="bold", **centred)
        write(middle, bottom - 46, named(findings, findings.image_set.labels[place], 12), size=9, **centred)
        if not findings.right[place]:
            said = f"said {named(findings, findings.predicted[place], 12)}"
            write(middle, bottom - 74, said, size=8, color=_ORANGE, **centred)
        colour = _BLUE if findings.right[place] else _ORANGE
        tie = ConnectionPatch((middle / width, (bottom - 106) / height), (cost, 1.12), figure.transFigure,
                              axes.get_xaxis_transform(), color=colour, linewidth=1)  # fmt: skip
        figure.add_artist(tie)
        axes.plot(cost, 1.1, "v", color=colour, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
    return figure


def write_file(content: bytes, path: str | Path) -> None:
    """Write a file whole or not at all. Raises ManiDPError."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ManiDPError(f"{path}: cannot be written: {error.strerror}") from error
