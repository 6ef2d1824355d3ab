"""A report as one HTML page that opens offline: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from manidp.report.charts import (
    HEAT_MAP_ROWS,
    VARIABLES,
    class_costs,
    data_uri,
    drawing,
    heat_map,
    histogram,
    svg,
    thumbnail,
    write_file,
)
from manidp.report.findings import (
    Findings,
    class_keep_rates,
    confidence_interval,
    macs_histogram,
    millions,
    named,
    percent,
    rate,
)

if TYPE_CHECKING:
    from manidp.training.diagnosis import Diagnosis

GALLERY = 12  # images shown at each end


def _png(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return data_uri("png", buffer.getvalue())


def write_report(findings: Findings, path: str | Path, title: str = "Channels computed for each image") -> None:
    """Write the page, whole or not at all: one HTML file without scripts that loads nothing from anywhere."""
    with drawing():
        page = _page(findings, title)
    write_file(page.encode("utf-8", "replace"), path)


def write_diagnosis(diagnosis: Diagnosis, path: str | Path, title: str = "What the gates' decisions are worth") -> None:
    """Write the page, whole or not at all: one HTML file without scripts that loads nothing from anywhere."""
    write_file(_document(title, _diagnosis(diagnosis, title)).encode("utf-8", "replace"), path)


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
    cheapest, most_expensive = findings.by_cost[:GALLERY], findings.by_cost[::-1][:GALLERY]
    sections = [
        f"<header><h1>{escape(title)}</h1><p>Labelled images: {images:,}. Gates: {len(findings.kept)}; "
        "the multiply-adds of the gates themselves are counted.</p></header>",
        _totals(findings),
        "<h2>Multiply-adds an image</h2>",
        f"<p>The cost of an image depends on the channels that its gates keep: from {millions(findings.macs.min())} to "
        f"{millions(findings.macs.max())}.</p>",
        _drawn(histogram(findings), _histogram_alt(findings)),
        "<h2>Classes</h2><p>Mean (dot), middle half (bar) and range (line) of the multiply-adds spent on the images "
        "of each class; the dashed line is the mean over all images.</p>",
        _drawn(class_costs(findings), _class_costs_alt(findings)),
        "<h2>Cheapest and most expensive images</h2><h3>Cheapest</h3>",
        _gallery(findings, cheapest),
        "<h3>Most expensive</h3>",
        _gallery(findings, most_expensive),
        "<h2>Channels kept</h2>",
        _heat_map_section(findings),
        _rates_table(findings),
        _agreement_section(findings),
        "<footer>Made by <code>manidp report</code>.</footer>",
    ]
    return _document(title, sections)


def _document(title: str, sections: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{VARIABLES}{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _diagnosis(found: Diagnosis, title: str) -> list[str]:
    variants = [
        _row(escape(one.name), _cells((rate(one.correct, found.total), millions(one.mean_macs))))
        for one in found.variants
    ]
    head = _row("Gates", _heads(("Right", "Multiply-adds an image, mean")), "col")
    stages = [_row(escape(name), _cells((percent(share),))) for name, share in found.differing_by_stage.items()]
    return [
        f"<header><h1>{escape(title)}</h1><p>Labelled images: {found.total:,}. Right: "
        f"{rate(found.correct, found.total)}. Multiply-adds an image: {millions(found.mean_macs)} on average, "
        f"{millions(found.macs_5)} to {millions(found.macs_95)} from the 5th to the 95th percentile; "
        f"{millions(found.dense_macs)} without gates.</p></header>",
        "<h2>Decisions changed</h2><p>The same weights with other gates. Where frozen decisions are as good, a network "
        "without gates would do; where the gates of another image are, they read nothing that matters.</p>",
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(variants)}</tbody><caption>Batch statistics '
        f"estimated anew for each row, on {found.estimated_on:,} other images.</caption></table></div>",
        "<h2>Decisions that differ</h2><p>Share of decisions, over images and channels, that differ from what the "
        "channel's decision is for most images.</p>",
        f"<table><thead>{_row('Stage', _heads(('Differ',)), 'col')}</thead><tbody>{''.join(stages)}</tbody></table>",
        "<footer>Made by <code>manidp diagnose</code>.</footer>",
    ]


def _drawn(figure: Figure, alt: str) -> str:
    return f'<div class="wide"><img src="{svg(figure)}" alt="{escape(alt)}"></div>'


def _row(head: str, cells: Iterable[str], scope: str = "row") -> str:
    return f'<tr><th scope="{scope}">{head}</th>{"".join(cells)}</tr>'


def _cells(values: Iterable[object]) -> list[str]:
    return [f"<td>{value}</td>" for value in values]


def _heads(names: Iterable[str]) -> list[str]:
    return [f'<th scope="col">{name}</th>' for name in names]


def _totals(findings: Findings) -> str:
    images = len(findings.image_set)
    dense_right = "not run" if findings.dense_right is None else rate(int(findings.dense_right.sum()), images)
    low, high = confidence_interval(int(findings.right.sum()), images)
    rows = [
        _row("Gated", _cells((rate(int(findings.right.sum()), images), millions(float(findings.macs.mean())),
                              percent(findings.saved)))),
        _row("Dense", _cells((dense_right, millions(findings.dense_macs), "&ndash;"))),
    ]  # fmt: skip
    head = _row("Network", _heads(("Right", "Multiply-adds an image, mean", "Fewer than dense")), "col")
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody><caption>95 % confidence '
        f"interval of the gated network's accuracy, from so many images: {percent(low)} to {percent(high)} (Wilson)."
        "</caption></table></div>"
    )


def _histogram_alt(findings: Findings) -> str:
    counts, edges = macs_histogram(findings.macs)
    top = int(counts.argmax())
    return (
        f"Histogram of multiply-adds over {len(findings.image_set):,} images: mean "
        f"{millions(float(findings.macs.mean()))}, most images ({counts[top]:,}) between {millions(edges[top])} and "
        f"{millions(edges[top + 1])}; the dense network spends {millions(findings.dense_macs)} on every image."
    )


def _class_costs_alt(findings: Findings) -> str:
    labels = findings.image_set.labels
    means = {label: float(findings.macs[labels == label].mean()) for label in np.unique(labels)}
    low, high = (f"{named(findings, label)} ({millions(means[label])})"
                 for label in (min(means, key=means.__getitem__), max(means, key=means.__getitem__)))  # fmt: skip
    return f"Mean multiply-adds by class, from {low} to {high}."


def _gallery(findings: Findings, places: NDArray[np.int64]) -> str:
    figures = []
    for place in places:
        true = escape(named(findings, findings.image_set.labels[place]))
        said = escape(named(findings, findings.predicted[place]))
        verdict = f"{said}, right" if findings.right[place] else f'<span class="wrong">{said}, wrong</span>: {true}'
        figures.append(
            f'<li><figure><img src="{_png(thumbnail(findings.image_set.images[place], 128))}" alt="{true}">'
            f"<figcaption><strong>{millions(findings.macs[place])}</strong>"
            f"{verdict}<br>probability {percent(findings.probability[place])}</figcaption></figure></li>"
        )
    return f'<ul class="gallery">{"".join(figures)}</ul>'


def _heat_map_section(findings: Findings) -> str:
    images = len(findings.image_set)
    drawn = min(images, HEAT_MAP_ROWS)
    kept = float(np.mean([kept.mean() for kept in findings.kept.values()]))
    return (
        "<p>One row an image, sorted by class and within a class by cost, cheapest first. One column a channel, "
        "grouped by gate, those kept most often first. Blue: computed; grey: skipped. A column that is blue from top "
        "to bottom is a channel that every image needs.</p>"
        + _drawn(heat_map(findings), f"Heat map of kept channels; gates keep {percent(kept)} on average.")
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
            rows.append(_row(escape(named(findings, label)), shaded))
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
        f"<p>Both name the same class for {rate(agreement.same_prediction, len(findings.image_set))} images.</p>"
        f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    )
