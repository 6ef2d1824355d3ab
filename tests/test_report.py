"""The report: what is counted adds up, what is drawn says it, and the page needs nothing but itself."""

from __future__ import annotations

import base64
import importlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from manidp import reference
from manidp.data.images import ImageSet
from manidp.data.preprocessing import Preprocessing
from manidp.errors import ManiDPError, MissingExtraError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph
from manidp.graph.macs import dense_macs
from manidp.models import resnet
from manidp.report.charts import draw_overview
from manidp.report.findings import Findings, class_keep_rates, collect, macs_histogram
from manidp.report.page import write_report
from manidp.result import Result
from networks import small_gated

# Names as folders may have them: markup, mathematics, another script, what XML forbids, what is longer than its place.
CLASSES = ("<b>bold</b> & co", "$x_{$", "日本", "bell\x07\ufffe", "a name longer than there is room for it", "unseen")
NAMES_SHOWN = ("<b>bold</b> & co", "$x_{$", "日本", "bell\ufffd\ufffd", "a name longer than there is roo…")
DENSE = resnet(8, width=4, num_classes=len(CLASSES), image=(3, 8, 8))
GATED = small_gated(width=4, classes=len(CLASSES))


class Reference:
    """A checkpoint as something that runs on pictures."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def run(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Result:
        planes = self.checkpoint.preprocessing.apply(images)
        return reference.run(self.checkpoint.graph, self.checkpoint.weights, planes)


def random_checkpoint(graph: Graph) -> Checkpoint:
    generator = np.random.default_rng(5)
    scales = {"gamma": (1, 0.1), "moving_variance": (2, 0.1), "fc2.weight": (0, 0.1), "fc2.bias": (1, 0.2),
              "threshold": (1, 0), "classifier.weight": (0, 2)}  # fmt: skip
    weights = {}
    for name, shape in graph.parameters.items():
        mean, deviation = next((scales[end] for end in scales if name.endswith(end)), (0, 0.3))
        weights[name] = generator.normal(mean, deviation, shape).astype(np.float32)
    checkpoint = Checkpoint(graph, weights, Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (8, 8)), CLASSES)
    logits = Reference(checkpoint).run(random_images(33).images).logits
    centred = (weights["classifier.bias"] - logits.mean(axis=0)).astype(
        np.float32
    )  # or all are said to be of one class
    return replace(checkpoint, weights=weights | {"classifier.bias": centred})


def random_images(count: int) -> ImageSet:
    generator = np.random.default_rng(6)
    images = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return ImageSet(images, np.arange(count, dtype=np.int64) % 5, CLASSES)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(GATED)


@pytest.fixture(scope="module")
def findings(checkpoint: Checkpoint) -> Findings:
    return collect(Reference(checkpoint), random_images(33), Reference(random_checkpoint(DENSE)))


@pytest.fixture(scope="module")
def page(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "out.html"
    write_report(findings, path, title="A <title> & more")
    return Page(path)


class Page(HTMLParser):
    """An HTML file taken apart: balanced, or an assertion fails."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.bytes = path.read_bytes()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.bytes.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]

    def drawings(self) -> Iterator[str]:
        for image in self.images:
            kind, _, content = (image["src"] or "").partition(";base64,")
            if kind == "data:image/svg+xml":
                yield base64.b64decode(content).decode()


def assert_refers_to_itself_alone(svg: str) -> None:
    for element in ElementTree.fromstring(svg).iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/"))
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", svg))
    assert "@import" not in svg


def counted(count: int, dense: bool = True) -> Findings:
    """Findings without a network: every number is drawn."""
    generator = np.random.default_rng(count)
    labels, predicted, other = generator.integers(0, 5, (3, count))
    kept = {"first": generator.random((count, 7)) < 0.5, "second": generator.random((count, 3)) < 0.9}
    image_set = replace(random_images(count), labels=labels)
    macs = generator.integers(900_000, 2_100_000, count)
    return Findings(image_set, predicted, generator.random(count), kept, macs, 3_000_000, other if dense else None)


def test_findings_are_what_the_network_says_whatever_the_batches(
    checkpoint: Checkpoint, findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Reference(checkpoint).run(findings.image_set.images)
    monkeypatch.setattr("manidp.report.findings.BATCH", 7)
    steps: list[tuple[int, int | None]] = []
    for found in (findings, collect(Reference(checkpoint), findings.image_set, None,
                                    lambda done, total: steps.append((done, total)))):  # fmt: skip
        np.testing.assert_array_equal(found.predicted, whole.logits.argmax(axis=1))
        np.testing.assert_array_equal(found.macs, whole.macs)
        softmax = np.exp(whole.logits) / np.exp(whole.logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.probability, softmax.max(axis=1), rtol=1e-12)
        assert list(found.kept) == [gate.name for gate in GATED.gates]
        for name, kept in found.kept.items():
            np.testing.assert_array_equal(kept, whole.kept[name])
    assert steps == [(7, 33), (14, 33), (21, 33), (28, 33), (33, 33)]
    assert len(np.unique(whole.macs)) > 10  # or what is said of one image would do for another
    assert len(np.unique(findings.predicted)) > 2


def test_dense_cost_is_that_of_the_network_without_gates(checkpoint: Checkpoint, findings: Findings) -> None:
    alone = collect(Reference(checkpoint), findings.image_set)
    assert alone.dense_macs == findings.dense_macs == dense_macs(DENSE)
    assert alone.saved == pytest.approx(1 - findings.macs.sum() / (33 * dense_macs(DENSE)))
    assert alone.agreement is None


def test_classes_are_matched_by_name_whatever_their_order(checkpoint: Checkpoint, findings: Findings) -> None:
    def turned(model: Checkpoint) -> Checkpoint:
        """The same model with its classes in the opposite order."""
        weights = {name: value[::-1].copy() if name.startswith("classifier.") else value
                   for name, value in model.weights.items()}  # fmt: skip
        return replace(model, weights=weights, classes=model.classes[::-1])

    images, dense = findings.image_set, random_checkpoint(DENSE)
    for own, other in ((turned(checkpoint), dense), (checkpoint, turned(dense)), (turned(checkpoint), turned(dense))):
        found = collect(Reference(own), images, Reference(other))
        assert found.agreement == findings.agreement
        np.testing.assert_array_equal(found.right, findings.right)


def test_agreement_counts_every_image_once() -> None:
    for count in (1, 10, 500):
        findings = counted(count)
        dense, labels = findings.dense_predicted, findings.image_set.labels
        assert dense is not None
        cells = [(bool(d == y), bool(g == y)) for d, g, y in zip(dense, findings.predicted, labels, strict=True)]
        same = sum(d == g for d, g in zip(dense, findings.predicted, strict=True))
        expected = [cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        assert findings.agreement == (*expected, same)
        assert sum(findings.agreement[:4]) == count


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=200))
def test_histogram_holds_every_image_in_a_few_round_bins(macs: list[int]) -> None:
    counts, edges = macs_histogram(np.array(macs, np.int64))
    assert counts.sum() == len(macs)
    assert len(counts) <= 70
    (width,) = np.unique(np.diff(edges))
    assert re.fullmatch("[125]0*", str(width))
    assert (edges % width == 0).all()
    assert edges[0] <= min(macs) < edges[0] + width
    assert edges[-1] - width <= max(macs) < edges[-1]


def test_keep_rates_of_classes_add_up_to_those_of_all() -> None:
    findings = counted(200)
    rates = class_keep_rates(findings)
    assert rates.shape == (6, 2)
    assert np.isnan(rates[5]).all()
    sizes = np.bincount(findings.image_set.labels, minlength=6)
    overall = [kept.mean() for kept in findings.kept.values()]
    np.testing.assert_allclose(sizes[:5] @ rates[:5] / 200, overall, rtol=1e-12)


def test_page_needs_nothing_but_itself(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "poster", "data", "action", "background"):
                assert value is not None
                assert value.startswith(("data:image/", "#"))
            assert "url(" not in (value or "")
    style = " ".join(page.words)
    assert "url(" not in style
    assert "@import" not in style
    drawings = list(page.drawings())
    assert len(drawings) == 3
    for drawing in drawings:
        assert_refers_to_itself_alone(drawing)


def test_page_says_what_was_counted(page: Page, findings: Findings) -> None:
    agreement = findings.agreement
    assert agreement is not None
    right, mean = int(findings.right.sum()), findings.macs.mean()
    dense_right = agreement.both_right + agreement.only_dense
    assert f"Gated {right} of 33 ({right / 0.33:.2f} %) {mean / 1e6:.2f} M {100 * findings.saved:.1f} %" in page.text
    assert f"Dense {dense_right} of 33 ({dense_right / 0.33:.2f} %) {dense_macs(DENSE) / 1e6:.2f} M" in page.text
    assert f"dense right {agreement.both_right} {agreement.only_dense}" in page.text
    assert f"dense wrong {agreement.only_gated} {agreement.both_wrong}" in page.text
    assert f"same class for {agreement.same_prediction} of 33" in page.text
    sizes = " ".join(map(str, GATED.gate_channels.values()))
    assert f"channels {sizes}" in page.text


def test_page_shows_the_cheapest_and_the_most_expensive_pixel_by_pixel(page: Page, findings: Findings) -> None:
    order = sorted(range(33), key=lambda place: int(findings.macs[place]))
    shown = [image for image in page.images if str(image["src"]).startswith("data:image/png")]
    assert len(shown) == 24
    for image, place in ((shown[0], order[0]), (shown[11], order[11]), (shown[12], order[-1])):
        assert image["alt"] == NAMES_SHOWN[findings.image_set.labels[place]]
        picture = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
        assert picture.size == (128, 128)
        np.testing.assert_array_equal(np.asarray(picture)[8::16, 8::16], findings.image_set.images[place])


def test_names_are_shown_as_they_are_and_never_become_markup(page: Page) -> None:
    assert "A <title> & more" in page.text
    assert not [tag for tag, _ in page.tags if tag == "b"]
    drawings = [" ".join(ElementTree.fromstring(svg).itertext()) for svg in page.drawings()]
    for name in NAMES_SHOWN:
        assert name in page.text
        assert sum(name in drawing for drawing in drawings) == 2  # costs of classes, heat map
    assert not any("unseen" in drawing for drawing in drawings)
    assert "nan" not in page.text  # nor is a class without images a row of the table
    assert all(image["alt"] for image in page.images)


def test_heat_map_has_a_cell_for_each_channel_kept(page: Page, findings: Findings) -> None:
    *_, heat_map = page.drawings()
    (content,) = re.findall(r'"data:image/png;base64,([^"]+)"', heat_map)
    cells = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA")).astype(int)
    assert len(cells) == 33
    solid, faint = (cells[..., 3] == 255).sum(), ((cells[..., 3] > 0) & (cells[..., 3] < 255)).sum()
    assert solid == sum(kept.sum() for kept in findings.kept.values())
    assert faint == sum((~kept).sum() for kept in findings.kept.values())


def test_same_findings_make_the_same_bytes_whatever_the_settings(
    page: Page, findings: Findings, tmp_path: Path
) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "xtick.direction": "in"}):
        write_report(findings, tmp_path / "out.html", title="A <title> & more")
        draw_overview(findings, tmp_path / "a.png")
    draw_overview(findings, tmp_path / "b.png")
    assert (tmp_path / "out.html").read_bytes() == page.bytes
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_a_dense_network_its_part_is_left_out(tmp_path: Path) -> None:
    write_report(counted(40, dense=False), tmp_path / "out.html")
    text = Page(tmp_path / "out.html").text
    assert "Dense not run 3.00 M" in text
    assert "Agreement" not in text


def test_one_image_is_enough(tmp_path: Path) -> None:
    write_report(counted(1), tmp_path / "out.html")
    assert "of 1 (" in Page(tmp_path / "out.html").text


def test_overview_holds_the_cheapest_and_the_most_expensive_image_crisp(findings: Findings, tmp_path: Path) -> None:
    draw_overview(findings, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size < 300_000
    pixels = np.asarray(Image.open(tmp_path / "overview.png").convert("RGB"))
    order = findings.by_cost
    for place in (order[0], order[-1]):
        picture = findings.image_set.images[place].repeat(16, axis=0).repeat(16, axis=1)
        corners = np.argwhere((pixels[:-127, :-127] == picture[0, 0]).all(axis=2))
        found = [(y, x) for y, x in corners if np.array_equal(pixels[y : y + 128, x : x + 128], picture)]
        assert len(found) == 1


def test_overview_as_svg_needs_nothing_but_itself(findings: Findings, tmp_path: Path) -> None:
    draw_overview(findings, tmp_path / "overview.svg")
    assert_refers_to_itself_alone((tmp_path / "overview.svg").read_text())


@pytest.mark.parametrize("name", ["overview.gif", "overview", "missing/overview.png"])
def test_what_cannot_be_drawn_or_written_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ManiDPError, match=re.escape(name)):
        draw_overview(counted(3), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_images_and_networks_that_do_not_fit_are_refused(checkpoint: Checkpoint) -> None:
    images, network = random_images(3), Reference(checkpoint)
    dense = random_checkpoint(DENSE)
    empty = images.take(np.array([], np.int64))
    for arguments, complaint in (
        ((network, empty), "empty"),
        ((network, replace(images, classes=("another", *CLASSES[1:]))), "by name: .* got 'another'$"),
        ((Reference(dense), images), "none; give"),
        ((network, images, network), "no gates"),
        ((network, images, Reference(replace(dense, classes=("another", *CLASSES[1:])))), "classes"),
    ):
        with pytest.raises(ManiDPError, match=complaint):
            collect(*arguments)


def test_logits_that_overflow_are_refused(checkpoint: Checkpoint) -> None:
    class Overflowing(Reference):
        def run(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Result:
            result = super().run(images)
            result.logits[1, 0] = np.nan
            return result

    with pytest.raises(ManiDPError, match="finite"):
        collect(Overflowing(checkpoint), random_images(3))


def test_missing_matplotlib_names_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "manidp.report.charts")
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'manidp[plots]'")):
        importlib.import_module("manidp.report.charts")
