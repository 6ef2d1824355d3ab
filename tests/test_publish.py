"""A published folder loads as it is, and its card says what the checkpoint says."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import manidp
from manidp.data.images import load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.errors import HubError
from manidp.formats.checkpoint import Checkpoint, load_checkpoint
from manidp.gating.place import with_gates
from manidp.graph.macs import ungated_macs
from manidp.hub.bundle import pack
from manidp.hub.publish import card, measured, write_folder
from manidp.models import resnet

MEASURED = {
    "data": "CIFAR-10 test images", "correct": 9_123, "total": 10_000, "mean_macs": 321_987.0, "dense_macs": 873_856,
    "macs_percentiles": {"0": 200_000.0, "100": 800_000.0, "50": 330_000.0},
}  # fmt: skip


def made() -> Checkpoint:
    graph = with_gates(resnet(8, width=4))
    weights = {name: np.full(shape, 0.1, np.float32) for name, shape in graph.parameters.items()}
    provenance = {"measured": MEASURED, "recipe": {"epochs": 7, "keep_rate": None}, "data": {"images": 50_000}}
    return Checkpoint(graph, weights, CIFAR10_PREPROCESSING, CIFAR10_CLASSES, provenance)


def test_the_folder_loads_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(made(), tmp_path / "out", "small")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]
    assert load_checkpoint(tmp_path / "out" / "model.safetensors").provenance == made().provenance
    assert manidp.load(tmp_path / "out").run(load_sample().images[:2]).logits.shape == (2, 10)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(HubError, match="new folder or an empty one"):
        write_folder(made(), tmp_path / "out", "small")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_every_figure_on_the_card_is_in_the_checkpoint() -> None:
    text = card(made(), "small")
    for figure in (
        "9,123 of 10,000",
        "91.23%",
        "0.322 M",
        "0 %: 0.20 M, 50 %: 0.33 M, 100 %: 0.80 M",
        "epochs 7",
        "images 50000",
        f"{ungated_macs(made().graph):,}",
    ):
        assert figure in text, figure
    assert "keep_rate" not in text
    changed = {**MEASURED, "correct": 9_124}
    assert "9,124 of 10,000" in card(replace(made(), provenance={"measured": changed}), "small")


def test_what_is_not_on_record_is_not_said() -> None:
    text = card(replace(made(), provenance={}), "small")
    assert "not on record" in text
    assert "Not on record" in text
    assert not re.search(r"\d %|\d+ right|%\)", text)


@pytest.mark.parametrize(
    "record",
    [None, [], {}, {"correct": 1}, {**MEASURED, "total": 0},
     *({**MEASURED, "correct": correct} for correct in ("all", -1, 10_001))],
)  # fmt: skip
def test_a_record_that_cannot_be_is_none(record: object) -> None:
    checkpoint = replace(made(), provenance={"measured": record})
    assert measured(checkpoint) is None
    assert "not on record" in card(checkpoint, "small")


@pytest.mark.parametrize("percentiles", [None, [], {"half": 1.0}, {"50": "x"}])
def test_percentiles_that_cannot_be_are_left_out(percentiles: object) -> None:
    figures = measured(replace(made(), provenance={"measured": {**MEASURED, "macs_percentiles": percentiles}}))
    assert figures is not None
    assert figures.percentiles == {}


@pytest.mark.parametrize(
    "name", ["/", "a\0b", "\ud800", "x" * 5000, "a/" * 3000, "/dev/null", "/dev/null/x", ".", ".."]
)
def test_what_is_no_new_folder_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    checkpoint = made()
    for write in (lambda: write_folder(checkpoint, name, "small"), lambda: pack(checkpoint, name, "small")):
        with pytest.raises(
            HubError, match=r"is no name of a new folder|a new folder or an empty one is needed"
        ) as caught:
            write()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    "figures",
    [
        {"mean_macs": float("nan")}, {"mean_macs": float("inf")}, {"mean_macs": -1.0}, {"correct": -1},
        {"macs_percentiles": {"50": float("nan"), "1": 10**400, "9" * 5000: 1.0, "x": 1.0, "-1": 1.0, "2": -1}},
        {"macs_percentiles": [1]}, {"total": 10**400}, {"correct": 10**400, "total": 10**400},
        {"data": "\x1b[31m\n---\n# x:"},
    ],
)  # fmt: skip
def test_figures_that_cannot_be_are_not_on_the_card(figures: dict[str, object], tmp_path: Path) -> None:
    checkpoint = replace(made(), provenance={"measured": {**MEASURED, **figures}})
    text = card(checkpoint, "small")
    assert " nan" not in text and " inf" not in text and text.count("\n---") == 1 and "\x1b" not in text
    found = measured(checkpoint)
    if "macs_percentiles" in figures:
        assert found is not None and not found.percentiles
    elif "mean_macs" in figures or figures.get("correct") == -1:
        assert found is None


def test_what_a_checkpoint_says_makes_no_lines_of_the_card(tmp_path: Path) -> None:
    """Provenance and class names are a stranger's: whatever they hold, the card has the lines it always has."""
    said = "\ud800\x1b[31m\n---\n# heading:\n```\n\u202e"
    classes = tuple(f"{said[1:]} {n}" for n in range(10))  # half of a surrogate pair is refused
    plain = card(replace(made(), provenance={"data": {"images": "x"}}), "small")
    text = card(replace(made(), provenance={"data": {said: said}, "recipe": {}}, classes=classes), "small")
    assert len(text.splitlines()) == len(plain.splitlines()) and len(text) < 5000
    with pytest.raises(HubError, match="a name of printable characters"):
        write_folder(made(), tmp_path / "out", "\udcff")
    write_folder(replace(made(), provenance={"data": {"x": "\u202e" * 10**6}}), tmp_path / "out", "small")
    assert len((tmp_path / "out" / "README.md").read_bytes()) < 20_000
