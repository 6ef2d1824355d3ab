"""The original's two files and our one checkpoint: the same network, to the byte and to the logit."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from manidp.data.preprocessing import CIFAR10_CLASSES, Preprocessing
from manidp.errors import CheckpointError, CkptError
from manidp.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manidp.formats.ckpt import BFLOAT16, read_ckpt, write_ckpt
from manidp.formats.conversion import (
    from_ckpt,
    prefix_of,
    read_thresholds,
    resnet_of_ckpt,
    to_ckpt,
    write_thresholds,
)
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.models import resnet
from manidp.reference import run

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mindspore"
MINDSPORE = Preprocessing((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), (32, 32))
SMALL = with_gates(resnet(8, width=3))


def random_checkpoint(graph: Graph) -> Checkpoint:
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in graph.parameters.items()}
    return Checkpoint(graph, weights, MINDSPORE, CIFAR10_CLASSES)


def assert_same(got: Checkpoint, expected: Checkpoint) -> None:
    assert got.graph == expected.graph and got.preprocessing == expected.preprocessing
    assert list(got.weights) == list(expected.graph.parameters)
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(got.weights[name], weight, strict=True)


@pytest.mark.parametrize("graph", [SMALL, resnet(8, width=3), with_gates(resnet(14, width=2), ["stage_2.0.conv_b"])])
def test_there_and_back_gives_the_same_checkpoint(graph: Graph, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(graph)
    values, thresholds = to_ckpt(checkpoint)
    write_ckpt(values, tmp_path / "x.ckpt")
    write_thresholds(thresholds, tmp_path / "x.npy")
    assert thresholds.dtype == np.float64 and thresholds.shape == (len(graph.gates),)
    read = read_ckpt(tmp_path / "x.ckpt"), read_thresholds(tmp_path / "x.npy")
    back, ignored = from_ckpt(*read, graph, MINDSPORE, CIFAR10_CLASSES)
    assert ignored == ()
    assert_same(back, checkpoint)


def test_a_ckpt_has_the_originals_names_in_its_order() -> None:
    values, _ = to_ckpt(random_checkpoint(with_gates(resnet(20, width=2))))
    bn = ("moving_mean", "moving_variance", "gamma", "beta")
    expected = ["conv_1_3x3.weight", *(f"bn_1.{name}" for name in bn)]
    for block in (f"stage_{stage}.{n}" for stage in (1, 2, 3) for n in range(3)):
        expected += [f"{block}.conv_a.weight", *(f"{block}.bn_a.{name}" for name in bn)]
        expected += [f"{block}.conv_b.weight", *(f"{block}.bn_b.{name}" for name in bn)]
        expected += [f"{block}.downsample.0.weight"] * (block in ("stage_2.0", "stage_3.0"))
        expected += [f"{block}.{gate}.{name}" for gate in ("mb1", "mb2")
                     for name in ("fc1.weight", "fc2.weight", "fc2.bias")]  # fmt: skip
    assert list(values) == [*expected, "classifier.weight", "classifier.bias"] and len(values) == 153


def test_what_is_no_parameter_is_ignored_and_listed() -> None:
    checkpoint = random_checkpoint(SMALL)
    values, thresholds = to_ckpt(checkpoint)
    more: dict[str, NDArray[Any]] = {"moments.conv_1_3x3.weight": np.zeros(3), "epoch_num": np.array(3)}
    back, ignored = from_ckpt({**more, **values}, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)
    assert ignored == ("moments.conv_1_3x3.weight", "epoch_num")
    assert_same(back, checkpoint)


@pytest.mark.parametrize("prefix", ["network.", "_backbone.", "train.network."])
def test_a_prefix_of_all_names_is_left_off(prefix: str) -> None:
    checkpoint = random_checkpoint(SMALL)
    values, thresholds = to_ckpt(checkpoint)
    named = {f"{prefix}{name}": value for name, value in values.items()}
    more = {f"moments.{prefix}{name}": value + 1 for name, value in values.items()}
    assert prefix_of({**more, **named}) == prefix and prefix_of(values) == prefix_of({}) == ""
    assert resnet_of_ckpt({**more, **named}) == SMALL
    back, ignored = from_ckpt({**more, **named}, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)
    assert ignored == tuple(more)
    assert_same(back, checkpoint)
    del named[f"{prefix}classifier.bias"]
    with pytest.raises(CkptError, match=f"lacks 1 of the network's .* {prefix}classifier.bias"):
        from_ckpt({**more, **named}, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)


def test_a_ckpt_of_endless_classes_is_refused_before_their_names_are_made() -> None:
    values, _ = to_ckpt(random_checkpoint(SMALL))
    with pytest.raises(CkptError, match=r"1,099,511,627,776 channels or features; .* MANIDP_MAX_CHANNELS"):
        resnet_of_ckpt({**values, "classifier.weight": np.empty((2**40, 0), np.float32)})


def test_other_precisions_are_widened_exactly() -> None:
    checkpoint = random_checkpoint(SMALL)
    values, thresholds = to_ckpt(checkpoint)
    name = "classifier.bias"
    for dtype in ("<f2", "<f8", ">f4"):
        other = {**values, name: values[name].astype(dtype)}
        back, _ = from_ckpt(other, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)
        np.testing.assert_array_equal(back.weights[name], values[name].astype(dtype).astype(np.float32), strict=True)
    bits = (values[name].view(np.uint32) >> 16).astype("<u2").view(BFLOAT16)
    back, _ = from_ckpt({**values, name: bits}, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)
    np.testing.assert_array_equal(back.weights[name].view(np.uint32), values[name].view(np.uint32) & 0xFFFF0000)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"classifier.bias": None}, CkptError, "lacks 1 of the network's .* classifier.bias"),
        ({"classifier.bias": np.zeros(9, np.float32)}, CkptError, r"'classifier.bias' has the shape \(9,\)"),
        ({"classifier.bias": np.zeros((10, 1), np.float32)}, CkptError, r"shape \(10, 1\); the network asks for \(10,"),
        ({"classifier.bias": np.zeros(10, np.int32)}, CkptError, "'classifier.bias' is of type int32"),
        ({"classifier.bias": np.full(10, np.nan, np.float32)}, CheckpointError, "classifier.bias"),
        ({"classifier.bias": np.full(10, 1e300)}, CheckpointError, "classifier.bias"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], text: str) -> None:
    values, thresholds = to_ckpt(random_checkpoint(SMALL))
    changed = {name: value for name, value in {**values, **change}.items() if value is not None}
    with pytest.raises(error, match=text):
        from_ckpt(changed, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)


@pytest.mark.parametrize("thresholds", [(), (0.1,) * 5, (0.1,) * 7, np.zeros((6, 1))])
def test_every_gate_needs_a_threshold(thresholds: Any) -> None:
    values, _ = to_ckpt(random_checkpoint(SMALL))
    with pytest.raises(CkptError, match="has 6 gates and needs a threshold for each"):
        from_ckpt(values, thresholds, SMALL, MINDSPORE, CIFAR10_CLASSES)


def _npy(descr: str = "'<f8'", shape: str = "(2,)", data: bytes = bytes(16), version: int = 1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must be a .npy"),
        (b"<html>", "must be a .npy"),
        (_npy(data=bytes(15)), "holds 15 bytes; 2 thresholds take 16"),
        (_npy(data=bytes(17)), "holds 17 bytes"),
        (_npy(shape="(999999,)"), "holds 16 bytes"),
        (_npy(shape="(4611686018427387904,)"), "must be a .npy"),
        (_npy(shape="(-2,)"), "must be a .npy"),
        (_npy(shape="(2, 1)"), "must be a .npy"),
        (_npy(shape="()", data=bytes(8)), "must be a .npy"),
        (_npy("'<i8'"), "must be a .npy"),
        (_npy("'|O'"), "must be a .npy"),
        (_npy("__import__('os').system('true')"), "must be a .npy"),
        (_npy(version=9), "must be a .npy"),
        (_npy(shape="(131073,)", data=bytes(8 * 131073)), "must be a .npy"),
    ],
)
def test_a_file_that_holds_no_thresholds_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(CkptError, match=f"x.npy' {text}"):
        read_thresholds(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
def test_thresholds_of_any_precision_are_read(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([0.5, 0.25], dtype))
    np.testing.assert_array_equal(read_thresholds(tmp_path / "x.npy"), np.array([0.5, 0.25]), strict=True)
    (tmp_path / "x.npy").write_bytes(_npy(version=2))
    np.testing.assert_array_equal(read_thresholds(tmp_path / "x.npy"), np.zeros(2), strict=True)
    with pytest.raises(CkptError, match="No such file"):
        read_thresholds(tmp_path / "absent.npy")
    with pytest.raises(CkptError, match="cannot write"):
        write_thresholds(np.zeros(2), tmp_path / "absent" / "x.npy")


@given(st.binary(max_size=200), st.integers(0, 80))
@settings(max_examples=80, deadline=None)
def test_damaged_thresholds_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, new: bytes, at: int) -> None:
    content = _npy()
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    try:
        assert read_thresholds(path).ndim == 1
    except CkptError:
        return


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden MindSpore network is not beside the project")
def test_the_golden_network_of_mindspore_gives_its_logits_and_its_bytes(tmp_path: Path) -> None:
    graph = with_gates(resnet(20))
    thresholds = read_thresholds(GOLDEN / "thres.npy")
    checkpoint, ignored = from_ckpt(read_ckpt(GOLDEN / "resnet20.ckpt"), thresholds, graph, MINDSPORE, CIFAR10_CLASSES)
    assert not ignored
    save_checkpoint(checkpoint, tmp_path / "x.safetensors")
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    images = np.load(GOLDEN / "input.npy")
    pixels = np.load(GOLDEN / "images_u8.npy")
    np.testing.assert_allclose(checkpoint.preprocessing.apply(pixels), images, rtol=0, atol=5e-7)
    result = run(checkpoint.graph, checkpoint.weights, images)
    np.testing.assert_allclose(result.logits, np.load(GOLDEN / "logits.npy"), rtol=1e-5, atol=1e-5)
    with np.load(GOLDEN / "gates.npz") as gates:
        for index, gate in enumerate(graph.gates):
            expected = gates[f"mask_{index:02}"].reshape(len(images), -1)
            np.testing.assert_array_equal(result.kept[gate.name], expected > 0)
            np.testing.assert_allclose(result.gates[gate.name], expected, rtol=1e-5, atol=1e-5)
    values, again = to_ckpt(checkpoint)
    write_ckpt(values, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_bytes() == (GOLDEN / "resnet20.ckpt").read_bytes()
    np.testing.assert_array_equal(again, thresholds.astype(np.float32).astype(np.float64), strict=True)
