"""One file holds a model: there and back to the bit, fixed bytes, and hostile files are refused whole."""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from manidp.data.preprocessing import Preprocessing
from manidp.errors import CheckpointError
from manidp.formats.checkpoint import Checkpoint, OperatingPoint, checkpoint_path, load_checkpoint, save_checkpoint
from manidp.graph.macs import ungated_macs
from networks import small_gated

OLD = Path(__file__).parent / "data" / "version-1.safetensors"  # ``made()``, as version 1 saved it
CLASSES = ("cat", "dog", "Łódź")


def made(seed: int = 0) -> Checkpoint:
    graph = small_gated(width=2, classes=3)
    weights = {
        name: (np.arange(math.prod(shape)) % 7 / 4 + seed).astype(np.float32).reshape(shape)
        for name, shape in graph.parameters.items()
    }
    preprocessing = Preprocessing((0.5, 0.25, 0.125), (0.25, 0.5, 1.0), (8, 8))
    return Checkpoint(graph, weights, preprocessing, CLASSES, {"note": "é", "seed": seed, "nested": {"a": [1, 2.5]}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(made(), path)
    return path


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.graph == other.graph
    assert one.preprocessing == other.preprocessing
    assert one.classes == other.classes
    assert one.provenance == other.provenance
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        assert value.dtype == other.weights[name].dtype
        assert value.shape == other.weights[name].shape
        assert value.tobytes() == other.weights[name].tobytes(), name


def test_there_and_back(file: Path) -> None:
    assert_same(load_checkpoint(file), made())


def test_any_memory_layout_is_saved_as_the_same_values(tmp_path: Path) -> None:
    checkpoint = made()
    turned = {
        name: np.asfortranarray(value).reshape(value.shape, order="A") for name, value in checkpoint.weights.items()
    }
    save_checkpoint(replace(checkpoint, weights=turned), tmp_path / "x")
    assert_same(load_checkpoint(tmp_path / "x"), checkpoint)


def test_the_same_model_makes_the_same_bytes(file: Path) -> None:
    # Golden: a change of these bytes is a change of the format, which needs a new version.
    assert hashlib.sha256(file.read_bytes()).hexdigest() == GOLDEN


GOLDEN = "62078103bd869bbeae100a99372d7f500e3204db9234229d7d412f184fe21345"


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(made(), tmp_path / "no" / "such" / "folder")
    with pytest.raises(CheckpointError, match="plain JSON data"):
        save_checkpoint(replace(made(), provenance={"x": float("nan")}), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """The same file after ``change(weights, meta)``."""
    with safetensors.safe_open(file, "np") as opened:
        meta = json.loads(opened.metadata()["manidp"])
    weights = {name.removeprefix("weights/"): value for name, value in safetensors.numpy.load_file(file).items()}
    change(weights, meta)
    tensors = {f"weights/{name}": value for name, value in weights.items()}
    safetensors.numpy.save_file(tensors, file, {"manidp": json.dumps(meta)})


def node(meta: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in meta["graph"]["nodes"] if item["name"] == name)
    return found


THRESHOLD = "stage_1.0.mb1.threshold"
HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "is missing": lambda tensors, _: tensors.pop("bn_1.gamma"),
    f"'{THRESHOLD}' is missing": lambda tensors, _: tensors.pop(THRESHOLD),
    f"'{THRESHOLD}' holds NaN": lambda tensors, _: tensors.update({THRESHOLD: np.array(np.nan, np.float32)}),
    f"'{THRESHOLD}' must not be negative": lambda tensors, _: tensors.update({THRESHOLD: np.array(-1, np.float32)}),
    "holds NaN or infinity": lambda tensors, _: tensors["conv_1_3x3.weight"].fill(np.inf),
    "'bn_1.moving_variance' must not be negative": lambda tensors, _: tensors["bn_1.moving_variance"].fill(-1),
    r"asks for float32 \[2, 3, 3, 3\]; got float32 \[2, 27\]": lambda tensors, _: tensors.update(
        {"conv_1_3x3.weight": tensors["conv_1_3x3.weight"].reshape(2, 27)}
    ),
    "got float64": lambda tensors, _: tensors.update({"bn_1.beta": tensors["bn_1.beta"].astype(np.float64)}),
    "does not know: stowaway": lambda tensors, _: tensors.update(stowaway=np.zeros(3, np.float32)),
    "version 99; this manidp reads up to 2: pip install": lambda _, meta: meta.update(version=99),
    "version of at least 1; got '1'": lambda _, meta: meta.update(version="1"),
    "lacks graph": lambda _, meta: meta.pop("graph"),
    "unknown op 'Exec'": lambda _, meta: node(meta, "relu_1").update(op="Exec"),
    "reads 'nowhere'": lambda _, meta: node(meta, "relu_1").update(inputs=["nowhere"]),
    "3 outputs but there are 2 class names": lambda _, meta: meta["classes"].pop(),
    "classes must be a list of names": lambda _, meta: meta.update(classes=[1, 2, 3]),
    "provenance must be an object": lambda _, meta: meta.update(provenance=[]),
    "mean must be 3 numbers": lambda _, meta: meta["preprocessing"].update(mean=[0.5]),
    "positive stds": lambda _, meta: meta["preprocessing"].update(std=[1, 0, 1]),
    "preprocessing makes images of": lambda _, meta: meta["preprocessing"].update(size=[8, 9]),
    "size must be 2 numbers": lambda _, meta: meta["preprocessing"].update(size=[8.5, 8]),
    "40,001 nodes; the limit is 40,000": lambda _, meta: meta["graph"].update(nodes=[{}] * 40_001),
    "object with a list 'nodes'": lambda _, meta: meta.update(graph=[]),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_file_that_lies_is_refused_with_the_reason(file: Path, message: str) -> None:
    rewritten(file, HOSTILE[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"<html><body>404</body></html>",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 17 * 2**20) + b" " * 100,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10) + b"not a json",
        b"PK\x03\x04" + b"\x00" * 60,
    ],
)
def test_other_files_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        load_checkpoint(path)


def test_a_safetensors_file_of_someone_else_is_named_as_such(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not one of manidp"):
        load_checkpoint(tmp_path / "x")


def test_a_folder_or_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file, and no model of this name"):
        checkpoint_path("manidp-res21")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_or_damaged_file_never_loads_half_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_checkpoint(made(), path)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        return
    header = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(0, header - 1))  # a changed weight is a matter for a digest, not for the reader
    path.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return
    assert loaded.weights.keys() == loaded.graph.parameters.keys()


def pointed() -> Checkpoint:
    """A model with two more operating points: one of other thresholds, one of other batch statistics, too."""
    checkpoint = made()
    low = {name: np.array(0.25, np.float32) for name in checkpoint.graph.thresholds}
    high = {**{name: np.array(0, np.float32) for name in low}, "bn_1.moving_mean": np.array([3, 4], np.float32)}
    points = (OperatingPoint("low", low, 10_000.0, 0.5), OperatingPoint("high", high, 15_000.0))
    return replace(checkpoint, points=points)


def test_a_checkpoint_tells_in_a_line_what_it_is() -> None:
    model = load_checkpoint(checkpoint_path("manidp-res20"))
    assert repr(model) == "Checkpoint(3x32x32 to 10 classes, 197 nodes, 18 gates, 336,300 parameters)"
    points = (OperatingPoint("25%", {}), OperatingPoint("a\nb", {}))
    assert repr(replace(model, points=points)).endswith(r"parameters, points '25%', 'a\nb')")


def test_operating_points_there_and_back(tmp_path: Path) -> None:
    save_checkpoint(pointed(), tmp_path / "x")
    back = load_checkpoint(tmp_path / "x")
    assert_same(back, pointed())
    for one, other in zip(back.points, pointed().points, strict=True):
        assert (one.name, one.macs, one.accuracy) == (other.name, other.macs, other.accuracy)
        assert {name: value.tobytes() for name, value in one.values.items()} == {
            name: value.tobytes() for name, value in other.values.items()
        }


def test_a_budget_is_a_points_name_or_a_share_of_the_dense_multiply_adds() -> None:
    checkpoint = pointed()
    dense = ungated_macs(checkpoint.graph)
    assert checkpoint.at("default").weights.keys() == checkpoint.weights.keys()
    assert checkpoint.at("high").weights["bn_1.moving_mean"].tolist() == [3, 4]
    assert checkpoint.point(10_000 / dense).name == "low"
    assert checkpoint.point(14_000 / dense).name == "low"
    assert checkpoint.point(14_900 / dense).name == "high"  # a budget counts as met within 1 %
    assert checkpoint.point(1.0).name == "high"
    for unknown in ("none", 0.01, math.nan):
        with pytest.raises(CheckpointError, match=r"this model has 'default', 'low' \(\d.*of dense\), 'high'"):
            checkpoint.point(unknown)


POINTS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "different names": lambda c: replace(c, points=(OperatingPoint("a", {}), OperatingPoint("a", {}))),
    "other than 'default'": lambda c: replace(c, points=(OperatingPoint("default", {}),)),
    "sets bn_1.gamma": lambda c: replace(c, points=(OperatingPoint("a", {"bn_1.gamma": np.ones(2, np.float32)}),)),
    "asks for float32": lambda c: replace(c, points=(OperatingPoint("a", {THRESHOLD: np.ones(2, np.float32)}),)),
    "macs and accuracy are numbers": lambda c: replace(c, points=(OperatingPoint("a", {}, math.nan),)),
}


@pytest.mark.parametrize("message", POINTS)
def test_an_operating_point_that_cannot_be_is_refused(message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        POINTS[message](made())


@pytest.mark.parametrize("points", [None, 5, [5], [{}], [{"name": "a", "macs": "1", "accuracy": None}], [{}] * 101])
def test_points_in_a_file_that_are_none_are_refused(file: Path, points: object) -> None:
    rewritten(file, lambda _, meta: meta.update(points=points))
    with pytest.raises(CheckpointError, match="points must be a list"):
        load_checkpoint(file)


def test_version_1_is_read_and_its_gates_written_out() -> None:
    old = load_checkpoint(OLD)
    assert [type(node).__name__ for node in old.graph.nodes if node.name.startswith("stage_1.0.mb1")] == [
        "GlobalPool", "Linear", "Activation", "Linear", "Clip", "Select", "Multiply",
    ]  # fmt: skip
    assert_same(old, replace(made(), provenance=old.provenance))
