"""A published folder loads as it is, and its card says what the checkpoint says."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import manidp
from manidp.checkpoint import Checkpoint, load_checkpoint
from manidp.errors import HubError
from manidp.graph import resnet, with_gates
from manidp.images import CIFAR10_CLASSES, CIFAR10_PREPROCESSING, load_sample
from manidp.macs import ungated_macs
from manidp.publish import card, measured, write_folder

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
