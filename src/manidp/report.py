"""What a gated network computed for whom: as one HTML page that opens offline, and as one wide figure.

``collect`` runs a network over labelled images and gathers plain arrays; ``write_report`` and ``draw_overview`` only
draw them. The same findings make the same bytes, whatever the user's matplotlib settings.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manidp.data.images import ImageSet
from manidp.errors import ManiDPError, MissingExtraError
from manidp.files import replacing
from manidp.formats.checkpoint import Checkpoint
from manidp.graph.macs import ungated_macs
from manidp.predict import probabilities
from manidp.progress import Progress
from manidp.result import Result

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import ConnectionPatch, FancyBboxPatch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise MissingExtraError("reports need matplotlib; install it with: pip install 'manidp[plots]'") from error

BATCH = 100  # images a call
GALLERY = 12  # cheapest and dearest images shown
HEAT_MAP_ROWS = 400


class Network(Protocol):
    """Whatever runs on pictures: an engine, or another way to compute its ``checkpoint``."""

    checkpoint: Checkpoint

    def run(self, images: NDArray[np.uint8]) -> Result:
        """What the network makes of uint8 (B, H, W, 3)."""
        ...


class Agreement(NamedTuple):
    """How many images the dense and the gated network name rightly; the first four add up to all images."""

    both_right: int
    only_dense: int
    only_gated: int
    both_wrong: int
    same_prediction: int


@dataclass(frozen=True)
class Findings:
    """What a gated network did with N labelled images.

    ``predicted`` int64 (N,) and its ``probability`` float (N,); ``kept``: gate name -> bool (N, C), in the order in
    which the gates are computed; ``macs`` int64 (N,), gates included. ``dense_macs``: of any image in the dense
    network, or where none ran in this one without gates; ``dense_predicted`` int64 (N,), if a dense network ran.
    """

    image_set: ImageSet
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    kept: Mapping[str, NDArray[np.bool_]]
    macs: NDArray[np.int64]
    dense_macs: int
    dense_predicted: NDArray[np.int64] | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,) whether the gated network names the class."""
        return np.equal(self.predicted, self.image_set.labels)

    @property
    def dense_right(self) -> NDArray[np.bool_] | None:
        """(N,) whether the dense network names the class, if one ran."""
        return None if self.dense_predicted is None else np.equal(self.dense_predicted, self.image_set.labels)

    @property
    def saved(self) -> float:
        """Share of the dense network's multiply-adds that an image saves on average."""
        return 1 - float(self.macs.mean()) / self.dense_macs

    @property
    def by_cost(self) -> NDArray[np.int64]:
        """Places of the images, cheapest first; equal costs stay in order."""
        return np.argsort(self.macs, kind="stable").astype(np.int64)

    @property
    def agreement(self) -> Agreement | None:
        """Counts of images; None where no dense network ran."""
        gated, dense, same = self.right, self.dense_right, self.predicted == self.dense_predicted
        if dense is None:
            return None
        counts = (dense & gated, dense & ~gated, ~dense & gated, ~dense & ~gated, same)
        return Agreement(*(int(count.sum()) for count in counts))


def collect(
    network: Network,
    image_set: ImageSet,
    dense: Network | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Run ``network``, and if given the ``dense`` one, over all images; classes are matched by name.

    Raises ManiDPError for no images, images of a class that the network does not know, a network without gates (there
    is nothing to report on), a dense one that has gates or other classes, and logits that are not finite.
    """
    checkpoint = network.checkpoint
    if not len(image_set):
        raise ManiDPError("a report needs labelled images; the image set is empty")
    image_set = image_set.relabelled(checkpoint.classes, "the network")
    if not checkpoint.graph.gates:
        raise ManiDPError("a report shows what gates keep, and this network has none; give one that has")
    if dense is not None:
        if dense.checkpoint.graph.gates:
            raise ManiDPError("the dense network must have no gates")
        if sorted(dense.checkpoint.classes) != sorted(checkpoint.classes):
            expected, came = list(checkpoint.classes), list(dense.checkpoint.classes)
            raise ManiDPError(f"the dense network must know the classes of the gated one, {expected}; got {came}")
    total = len(image_set) * (1 if dense is None else 2)
    results = list(_results(network, image_set, progress, 0, total))
    logits = np.concatenate([result.logits for result in results]).astype(np.float64)
    dense_predicted = None
    dense_macs = ungated_macs(checkpoint.graph)
    if dense is not None:
        dense_results = list(_results(dense, image_set, progress, len(image_set), total))
        dense_macs = int(dense_results[0].macs[0])
        places = np.array([checkpoint.classes.index(name) for name in dense.checkpoint.classes], np.int64)
        dense_predicted = places[np.concatenate([result.logits for result in dense_results]).argmax(axis=1)]
    return Findings(
        image_set=image_set,
        predicted=logits.argmax(axis=1).astype(np.int64),
        probability=probabilities(logits).max(axis=1),
        kept={gate.name: np.concatenate([r.kept[gate.name] for r in results]) for gate in checkpoint.graph.gates},
        macs=np.concatenate([result.macs for result in results]).astype(np.int64),
        dense_macs=dense_macs,
        dense_predicted=dense_predicted,
    )


def _results(
    network: Network, image_set: ImageSet, progress: Progress | None, before: int, total: int
) -> Iterator[Result]:
    for start in range(0, len(image_set), BATCH):
        images = image_set.images[start : start + BATCH]
        result = network.run(images)
        if not np.isfinite(result.logits).all():
            raise ManiDPError(f"the network overflows: logits of images {start} to {start + len(images)} not finite")
        yield result
        if progress is not None:
            progress(before + start + len(images), total)


def macs_histogram(macs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts (K,) and edges (K + 1,) of at most some 60 bins, their width 1, 2 or 5 times a power of ten."""
    low, high = int(macs.min()), int(macs.max())
    rough = max((high - low) / 40, high / 100, 1)  # narrower than a hundredth of the axis cannot be seen
    power = 10 ** math.floor(math.log10(rough))
    width = min((power * step for step in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    edges = np.arange(low // width, high // width + 2, dtype=np.int64) * width
    return np.histogram(macs, edges)[0].astype(np.int64), edges


def class_keep_rates(findings: Findings) -> NDArray[np.float64]:
    """(classes, gates): share of the gate's channels kept, on average over the class's images; NaN without images."""
    rates = np.stack([kept.mean(axis=1) for kept in findings.kept.values()], axis=1)
    labels = findings.image_set.labels
    return np.stack([
        rates[labels == label].mean(axis=0) if (labels == label).any() else np.full(rates.shape[1], np.nan)
        for label in range(len(findings.image_set.classes))
    ])  # fmt: skip


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
_VARIABLES = "".join(
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
def _drawing(**settings: object) -> Iterator[None]:
    with style.context(["default", _STYLE | settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts for all scripts
        yield


def _millions(macs: float) -> str:
    return f"{macs / 1e6:,.2f}\N{NO-BREAK SPACE}M"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _rate(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({100 * count / total:.2f}\N{NO-BREAK SPACE}%)"


def _named(findings: Findings, label: int, length: int = 32) -> str:
    """A class name fit to be shown: no longer than ``length``, no character that XML or UTF-8 forbids."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in findings.image_set.classes[label])
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
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
        (mean, 0.92, f"mean: {_millions(findings.macs.mean())}"),
        (dense, 0.8, f"dense network, every image: {_millions(findings.dense_macs)}"),
    )
    for place, height, text in words:
        axes.annotate(text, (place, height), (-6, 0), ("data", "axes fraction"), "offset points",
                      ha="right", va="center")  # fmt: skip
    if findings.saved > 0.2:  # else the arrow is shorter than its words
        across = axes.get_xaxis_transform()
        axes.annotate("", (mean, 0.92), (dense, 0.92), across, arrowprops={"arrowstyle": "<->", "color": _MUTED})
        axes.text((mean + dense) / 2, 0.95, f"{_percent(findings.saved)} fewer on average",
                  transform=across, ha="center", va="bottom")  # fmt: skip
    axes.legend(loc=(0.01, 0.7) if mean > 0.4 * end else (0.75, 0.4), frameon=False, reverse=True)


def _histogram(findings: Findings) -> Figure:
    figure = Figure((11, 3.6), layout="constrained")
    _draw_histogram(figure.add_subplot(), findings)
    return figure


def _class_costs(findings: Findings) -> Figure:
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
        counts.append(f"{_millions(mean)} · {findings.right[chosen].sum():,} of {chosen.sum():,} right")
    axes.axvline(float(findings.macs.mean()) / 1e6, color=_INK, linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(labels)), [_named(findings, label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(labels)), counts)
    for side, spine in ((axes, "left"), (beside, "right")):
        side.tick_params(axis="y", length=0, labelcolor=_INK)
        side.spines[spine].set_visible(False)
    axes.set_xlabel("million multiply-adds (M) spent on an image")
    return figure


def _heat_map(findings: Findings) -> Figure:
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
    axes.set_yticks((firsts + lasts) / 2, [_named(findings, label) for label in present])
    for first in firsts[1:]:
        axes.axhline(first, color=_PAPER, linewidth=2)
    axes.tick_params(length=0, labelcolor=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _svg(figure: Figure) -> str:
    """The drawing as a data URI; its colours and its font follow the reader's settings."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    for name, (light, _) in _COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return _data_uri("svg+xml", text.replace("</style>", f"{_VARIABLES}</style>", 1).encode())


def _png(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return _data_uri("png", buffer.getvalue())


def write_report(findings: Findings, path: str | Path, title: str = "What was computed for whom") -> None:
    """Write the page, whole or not at all: one HTML file without scripts that loads nothing from anywhere."""
    with _drawing():
        page = _page(findings, title)
    _write(page.encode("utf-8", "replace"), path)


def _write(content: bytes, path: str | Path) -> None:
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ManiDPError(f"{path}: cannot be written: {error.strerror}") from error


_CSS = """
:root{color-scheme:light dark;--blue:47 129 199;--orange:217 112 15}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:2rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:3rem 0 .25rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{max-width:46rem;margin:.25rem 0 1rem}
header p,.note,figcaption,caption,footer{color:var(--muted)}
img{max-width:100%}
.wide{overflow-x:auto}
.wide img{max-width:none}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;caption-side:bottom;padding-top:.5rem;max-width:46rem}
th,td{padding:.35rem .9rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:500;vertical-align:bottom}
tbody th{font-weight:500}
.rates th,.rates td{padding:.3rem .5rem}
.rates thead th:not(:first-child) span{writing-mode:vertical-rl;transform:rotate(180deg)}
.rates tfoot tr:first-child>*{border-top:2px solid var(--muted)}
.rates tfoot th{font-weight:500}
.rates td{min-width:1.9rem;text-align:center}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:1.25rem 1rem;margin:0;padding:0}
.gallery li{list-style:none}
.gallery img{display:block;width:128px;height:128px;object-fit:contain;object-position:left;image-rendering:pixelated}
.gallery figure{margin:0;font-size:.875rem;line-height:1.4}
.gallery strong{display:block;color:var(--ink);margin-top:.35rem}
.wrong{color:rgb(var(--orange));font-weight:600}
footer{margin-top:3rem;font-size:.875rem}
"""


def _page(findings: Findings, title: str) -> str:
    images = len(findings.image_set)
    cheapest, dearest = findings.by_cost[:GALLERY], findings.by_cost[::-1][:GALLERY]
    sections = [
        f"<header><h1>{escape(title)}</h1><p>Labelled images: {images:,}. Gates: {len(findings.kept)}, "
        "their own multiply-adds counted in.</p></header>",
        _totals(findings),
        "<h2>Multiply-adds an image</h2>",
        f"<p>Every image pays for what its gates keep: from {_millions(findings.macs.min())} to "
        f"{_millions(findings.macs.max())}.</p>",
        _drawn(_histogram(findings), _histogram_alt(findings)),
        "<h2>Classes</h2><p>Mean (dot), middle half (bar) and range (line) of the multiply-adds spent on the images "
        "of each class; the dashed line is the mean over all images.</p>",
        _drawn(_class_costs(findings), _class_costs_alt(findings)),
        "<h2>Cheapest and dearest images</h2><h3>Cheapest</h3>",
        _gallery(findings, cheapest),
        "<h3>Dearest</h3>",
        _gallery(findings, dearest),
        "<h2>What was kept for whom</h2>",
        _heat_map_section(findings),
        _rates_table(findings),
        _agreement_section(findings),
        "<footer>Made by <code>manidp report</code>.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_VARIABLES}{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _drawn(figure: Figure, alt: str) -> str:
    return f'<div class="wide"><img src="{_svg(figure)}" alt="{escape(alt)}"></div>'


def _row(head: str, cells: Iterable[str], scope: str = "row") -> str:
    return f'<tr><th scope="{scope}">{head}</th>{"".join(cells)}</tr>'


def _cells(values: Iterable[object]) -> list[str]:
    return [f"<td>{value}</td>" for value in values]


def _heads(names: Iterable[str]) -> list[str]:
    return [f'<th scope="col">{name}</th>' for name in names]


def _totals(findings: Findings) -> str:
    images = len(findings.image_set)
    dense_right = "not run" if findings.dense_right is None else _rate(int(findings.dense_right.sum()), images)
    low, high = _interval(int(findings.right.sum()), images)
    rows = [
        _row("Gated", _cells((_rate(int(findings.right.sum()), images), _millions(float(findings.macs.mean())),
                              _percent(findings.saved)))),
        _row("Dense", _cells((dense_right, _millions(findings.dense_macs), "&ndash;"))),
    ]  # fmt: skip
    head = _row("Network", _heads(("Right", "Multiply-adds an image, mean", "Fewer than dense")), "col")
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody><caption>95 % confidence '
        f"interval of the gated network's accuracy, from so many images: {_percent(low)} to {_percent(high)} (Wilson)."
        "</caption></table></div>"
    )


def _interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a rate. Source: Wilson 1927."""
    z, rate = 1.959964, count / total
    middle = rate + z * z / (2 * total)
    reach = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total**2))
    return (middle - reach) / (1 + z * z / total), (middle + reach) / (1 + z * z / total)


def _histogram_alt(findings: Findings) -> str:
    counts, edges = macs_histogram(findings.macs)
    top = int(counts.argmax())
    return (
        f"Histogram of multiply-adds over {len(findings.image_set):,} images: mean "
        f"{_millions(float(findings.macs.mean()))}, most images ({counts[top]:,}) between {_millions(edges[top])} and "
        f"{_millions(edges[top + 1])}; the dense network spends {_millions(findings.dense_macs)} on every image."
    )


def _class_costs_alt(findings: Findings) -> str:
    labels = findings.image_set.labels
    means = {label: float(findings.macs[labels == label].mean()) for label in np.unique(labels)}
    low, high = (f"{_named(findings, label)} ({_millions(means[label])})"
                 for label in (min(means, key=means.__getitem__), max(means, key=means.__getitem__)))  # fmt: skip
    return f"Mean multiply-adds by class, from {low} to {high}."


def _gallery(findings: Findings, places: NDArray[np.int64]) -> str:
    figures = []
    for place in places:
        true = escape(_named(findings, findings.image_set.labels[place]))
        said = escape(_named(findings, findings.predicted[place]))
        verdict = f"{said}, right" if findings.right[place] else f'<span class="wrong">{said}, wrong</span>: {true}'
        figures.append(
            f'<li><figure><img src="{_png(_thumbnail(findings.image_set.images[place], 128))}" alt="{true}">'
            f"<figcaption><strong>{_millions(findings.macs[place])}</strong>"
            f"{verdict}<br>{_percent(findings.probability[place])} sure</figcaption></figure></li>"
        )
    return f'<ul class="gallery">{"".join(figures)}</ul>'


def _heat_map_section(findings: Findings) -> str:
    images = len(findings.image_set)
    drawn = min(images, HEAT_MAP_ROWS)
    kept = float(np.mean([kept.mean() for kept in findings.kept.values()]))
    return (
        "<p>One row an image, sorted by class and within a class from cheap to dear; one column a channel, grouped by "
        "gate, those kept most often first. Blue was kept, grey was not computed. Columns blue throughout are channels "
        "for every image, those that change with the rows channels for some.</p>"
        + _drawn(_heat_map(findings), f"Heat map of kept channels; gates keep {_percent(kept)} on average.")
        + f'<p class="note">Images shown, evenly spaced in this order: {drawn} of {images:,}.</p>'
    )


def _rates_table(findings: Findings) -> str:
    """Keep rate of each class at each gate, shaded by how far it is from the gate's mean."""
    rates = class_keep_rates(findings)
    overall = [float(kept.mean()) for kept in findings.kept.values()]
    often = [kept.mean(axis=0) for kept in findings.kept.values()]
    rows = []
    for label, of_class in enumerate(rates):
        if not np.isnan(of_class).any():
            shaded = (_shaded(rate, mean) for rate, mean in zip(of_class, overall, strict=True))
            rows.append(_row(escape(_named(findings, label)), shaded))
    whole = [
        _row("all images", _cells(f"{100 * mean:.0f}" for mean in overall)),
        _row("channels", _cells(len(share) for share in often)),
        _row("kept for every image", _cells((share == 1).sum() for share in often)),
        _row("for some", _cells(((share > 0) & (share < 1)).sum() for share in often)),
        _row("for none", _cells((share == 0).sum() for share in often)),
    ]
    head = _row("Class", _heads(f"<span>{escape(name)}</span>" for name in findings.kept), "col")
    return (
        f'<h3>Keep rate by class and gate</h3><div class="wide"><table class="rates"><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{''.join(whole)}</tfoot><caption>Percent of the gate's channels that "
        "were kept, on average over the images of a class. Blue: more than for all images; orange: fewer; full colour "
        "at 20 points. Below, how many of the gate's channels were kept for every image, for some, for none."
        "</caption></table></div>"
    )


def _shaded(rate: float, mean: float) -> str:
    depth = 0.75 * min(abs(rate - mean) / 0.2, 1)
    colour = "blue" if rate > mean else "orange"
    return f'<td style="background:rgb(var(--{colour})/{depth:.2f})">{100 * rate:.0f}</td>'


def _agreement_section(findings: Findings) -> str:
    agreement = findings.agreement
    if agreement is None:
        return ""
    rows = (
        _row("dense right", _cells((f"{agreement.both_right:,}", f"{agreement.only_dense:,}"))),
        _row("dense wrong", _cells((f"{agreement.only_gated:,}", f"{agreement.both_wrong:,}"))),
    )
    head = _row("Images", _heads(("gated right", "gated wrong")), "col")
    return (
        "<h2>Agreement with the dense network</h2>"
        f"<p>Both name the same class for {_rate(agreement.same_prediction, len(findings.image_set))} images.</p>"
        f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def draw_overview(findings: Findings, path: str | Path) -> None:
    """Draw images from the cheapest to the dearest above the histogram of what they cost, as a PNG or SVG file.

    The drawing has a page of its own, so that it reads on light and dark sites alike.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ManiDPError(f"{path}: the overview is drawn as .png or .svg; got {Path(path).suffix or 'no suffix'}")
    with _drawing(**{"svg.fonttype": "path", "font.size": 11}):
        buffer = io.BytesIO()
        software = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        _overview(findings).savefig(buffer, format=kind, metadata=software)
    _write(buffer.getvalue(), path)


def _overview(findings: Findings) -> Figure:
    """Images at every tenth of the way from the cheapest to the dearest, each tied to its place in the histogram."""
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
    headline = (f"{findings.right.sum():,} of {images:,} images right at {_millions(findings.macs.mean())} "
                f"multiply-adds each (dense: {dense_right}{_millions(findings.dense_macs)})")  # fmt: skip
    write(left, 890, headline, size=14.5, weight="bold")
    write(left, 840, "Each image is computed with the channels that it needs; here from the cheapest to the dearest, "
          "every tenth of the way:", color=_MUTED)  # fmt: skip
    places = findings.by_cost[np.linspace(0, images - 1, 11).round().astype(int)]
    for column, place in enumerate(places):
        x = left + round(column * (right - left - side) / (len(places) - 1))
        figure.figimage(_thumbnail(findings.image_set.images[place], side), x, bottom, origin="upper")
        middle, cost = x + side / 2, findings.macs[place] / 1e6
        centred = {"ha": "center", "va": "top"}
        write(middle, bottom - 12, _millions(findings.macs[place]), weight="bold", **centred)
        write(middle, bottom - 46, _named(findings, findings.image_set.labels[place], 12), size=9, **centred)
        if not findings.right[place]:
            said = f"said {_named(findings, findings.predicted[place], 12)}"
            write(middle, bottom - 74, said, size=8, color=_ORANGE, **centred)
        colour = _BLUE if findings.right[place] else _ORANGE
        tie = ConnectionPatch((middle / width, (bottom - 106) / height), (cost, 1.12), figure.transFigure,
                              axes.get_xaxis_transform(), color=colour, linewidth=1)  # fmt: skip
        figure.add_artist(tie)
        axes.plot(cost, 1.1, "v", color=colour, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
    return figure
