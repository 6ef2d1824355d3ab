"""``manidp.from_onnx``: files of exporters and by hand, what cannot be imported, what a hostile file can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import manidp
from manidp import cli, reference
from manidp.data.preprocessing import Preprocessing
from manidp.engine.engine import Engine
from manidp.errors import FrontendError
from manidp.formats.checkpoint import load_checkpoint
from manidp.gating.place import gate
from manidp.graph import GlobalPool, Pool
from manidp.torch.userfile import imported as imported_from

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'manidp[onnx]'")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'manidp[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from zoo import EXAMPLE, fresh, imported  # noqa: E402

import manidp.torch.onnx  # noqa: E402
from manidp.onnx import write_onnx  # noqa: E402

CHANCE = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return CHANCE.normal(size=shape).astype(np.float32)


def written(
    path: Path, nodes: Sequence[Any], arrays: dict[str, Any], dims: Sequence[Any] = (1, 3, 12, 10), **more: Any
) -> Path:
    """A file whose input is "image" and whose output is "logits"."""
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, **more)
    path.write_bytes(model.SerializeToString())
    return path


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


BODY = [
    node("Conv", "image a.b.weight a.b.bias", "c", name="named", auto_pad="SAME_UPPER", strides=[2, 2]),
    node("BatchNormalization", "c scale shift mean var", "n", epsilon=1e-3),
    node("HardSigmoid", "n", "h", alpha=0.3), node("Clip", "h low high", "r"),
    node("Split", "r halves", "s t", axis=1), node("Concat", "t s", "u", axis=1),
    node("Mul", "u factor", "v"), node("AveragePool", "v", "p", kernel_shape=[2, 2], strides=[1, 1]),
    node("Pad", "p pads", "q"), node("Conv", "q deep", "d", group=8, name="training"),
    node("MaxPool", "d", "m", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    node("Shape", "m", "shape"), node("Gather", "shape zero", "batch"), node("Unsqueeze", "batch axes", "first"),
    node("Concat", "first rest", "sizes", axis=0), node("Reshape", "m sizes", "flat"),
    node("Transpose", "matrix", "turned", perm=[1, 0]), node("MatMul", "flat turned", "product"),
    node("Add", "product term", "sum"), node("Relu", "sum", "z"), node("Reshape", "z one", "again"),
    node("Gemm", "again last bias", "logits", alpha=0.5, beta=2.0),
]  # fmt: skip
ARRAYS = {
    "a.b.weight": array(8, 3, 3, 3), "a.b.bias": array(8), "scale": array(8), "shift": array(8), "mean": array(8),
    "var": np.abs(array(8)), "low": np.float32(0.1), "high": np.float32(0.9), "halves": np.array([3, 5]),
    "factor": array(8, 1, 1), "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "deep": array(8, 1, 2, 2),
    "zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "matrix": array(16, 48), "term": array(16),
    "one": np.array([1, 16]), "last": array(16, 5), "bias": array(5), "half": np.float32(0.5), "unit": np.float32(1),
    "root": np.float32(2**0.5), "part": np.float32(0.5**0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ["shufflenet-v2", "convnext"])
def test_what_is_exported_can_be_imported(name: str, tmp_path: Path) -> None:
    network = imported(name)
    write_onnx(network, tmp_path / "x.onnx")
    again = manidp.from_onnx(tmp_path / "x.onnx", classes=network.classes)
    images = CHANCE.normal(size=(2, 3, 32, 32))
    wanted = reference.run(network.graph, network.weights, images).logits
    came = reference.run(again.graph, again.weights, images).logits
    np.testing.assert_allclose(came, wanted, atol=1e-6 * np.abs(wanted).max())
    assert gate(again.graph).gates, "an imported network can be gated"


def test_every_op_is_what_onnx_runtime_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written for a batch of 1, with sizes taken from shapes; the import itself compares, and passes no fault."""
    path = written(tmp_path / "x.onnx", BODY, ARRAYS)
    checkpoint = manidp.from_onnx(path, classes=list("abcde"))
    assert checkpoint.graph.input.dims == (3, 12, 10) and checkpoint.classes == tuple("abcde")
    assert "a.b" in checkpoint.graph.by_name, "nodes are called after their weights"
    assert set(checkpoint.provenance["imported"]) == {"onnx"}
    monkeypatch.setitem(manidp.torch.onnx._OPS, "Relu", lambda op, x: F.leaky_relu(x, 0.5))
    with pytest.raises(FrontendError, match="differs from what ONNX Runtime makes of the file"):
        manidp.from_onnx(path)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Div", "c root", "e"), node("Mul", "c a", "m"), node("Mul", "m half", "g")],
        [node("Mul", "part c", "e"), node("Mul", "c half", "m"), node("Mul", "m a", "g")],
        [node("Div", "c root", "e"), node("Mul", "half a", "m"), node("Mul", "c m", "g")],
    ],
)  # fmt: skip
def test_a_gelu_that_is_written_out_is_one(nodes: Any, tmp_path: Path) -> None:
    whole = [
        node("Conv", "image a.b.weight", "c"), nodes[0], node("Erf", "e", "f"), node("Add", "unit f", "a"), *nodes[1:],
        node("GlobalMaxPool", "g", "p"), node("Flatten", "p", "logits"),
    ]  # fmt: skip
    checkpoint = manidp.from_onnx(written(tmp_path / "x.onnx", whole, ARRAYS))
    assert [type(one).__name__ for one in checkpoint.graph.nodes] == ["Input", "Conv", "Activation", "GlobalPool"]


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax"])
def test_what_no_op_is_like_is_made_of_several_and_a_softmax_at_the_end_is_left_out(
    ending: str, tmp_path: Path
) -> None:
    nodes = [
        node("Conv", "image a.b.weight", "c"), node("Abs", "c", "a"), node("Selu", "c", "s"),
        node("Celu", "c", "e", alpha=0.7), node("Max", "a s half", "m"), node("Min", "m e", "n"),
        node("ReduceSum", "n first", "r"), node("Sigmoid", "r", "g"), node("Mul", "c g", "y"),
        node("GlobalAveragePool", "y", "p"), node("Flatten", "p", "f"), node(ending, "f", "logits", axis=-1),
    ]  # fmt: skip
    arrays = {name: ARRAYS[name] for name in ("a.b.weight", "half")} | {"first": np.array([1])}
    checkpoint = manidp.from_onnx(written(tmp_path / "x.onnx", nodes, arrays))
    assert checkpoint.graph.output == checkpoint.graph.nodes[-1].name
    assert isinstance(checkpoint.graph.nodes[-1], GlobalPool)


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(
    "window",
    [
        {"strides": [1, 1], "pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "pads": [0, 0, 1, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 1], "ceil_mode": 1},
    ],
)
def test_averages_count_the_padding_in_or_not(window: Any, counted: int, tmp_path: Path) -> None:
    pool = node("AveragePool", "c", "z", kernel_shape=[3, 3], count_include_pad=counted, **window)
    checkpoint = manidp.from_onnx(written(tmp_path / "x.onnx", between(pool), ARRAYS))
    (made,) = [one for one in checkpoint.graph.nodes if isinstance(one, Pool)]
    assert made.count_include_pad == bool(counted) or "ceil_mode" in window


def test_an_average_that_leaves_out_more_than_torch_can_is_refused(tmp_path: Path) -> None:
    pool = node("AveragePool", "c", "z", kernel_shape=[3, 3], pads=[0, 0, 2, 2])
    with pytest.raises(FrontendError, match=r"leaves out a padding of \(0, 0, 2, 2\)"):
        manidp.from_onnx(written(tmp_path / "x.onnx", between(pool), ARRAYS))


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.parametrize("name", ["shufflenet-v2", "regnet-y", "convnext"])
def test_a_network_that_torch_exported_is_the_module(name: str, tmp_path: Path) -> None:
    """For one image, so that the batch is written down in reshapes and expansions."""
    module = fresh(name).eval()
    torch.onnx.export(module, (EXAMPLE,), str(tmp_path / "x.onnx"), input_names=["image"], dynamo=False)
    checkpoint = manidp.from_onnx(tmp_path / "x.onnx")
    images = torch.from_numpy(array(2, 3, 32, 32))
    with torch.no_grad():
        meant = module(images).numpy()
    came = reference.run(checkpoint.graph, checkpoint.weights, images.numpy()).logits
    assert np.abs(came - meant).max() <= 1e-4 * np.abs(meant).max()


def between(*nodes: Any) -> list[Any]:
    """A convolution "c" of 8 channels, the nodes, which make "z", and a pooling."""
    return [node("Conv", "image a.b.weight", "c"), *nodes, node("GlobalMaxPool", "z", "p"), node("Flatten", "p",
            "logits")]  # fmt: skip


@pytest.mark.parametrize(
    ("places", "axis", "made"),
    [
        ([0, 4, 1, 5, 2, 6, 3, 7], 1, ["Shuffle"]),
        ([1, 3, -3, -1], -3, ["Shuffle", "Slice"]),
        ([6, 7, 2, 2], 1, ["Slice", "Slice", "Slice", "Concat"]),
        ([[5]], 1, ["Slice"]),
        (5, 1, ["Slice"]),
    ],
)  # fmt: skip
def test_channels_are_picked_in_any_order(places: Any, axis: int, made: list[str], tmp_path: Path) -> None:
    """The import compares with ONNX Runtime; here that it finds ranges and shuffles, and that the engine runs them."""
    kept = np.array([0, np.size(places), 10, 8])
    nodes = between(node("Gather", "c places", "y", axis=axis), node("Reshape", "y kept", "z"))
    arrays = {**ARRAYS, "places": np.array(places), "kept": kept}
    checkpoint = manidp.from_onnx(written(tmp_path / "x.onnx", nodes, arrays))
    assert [type(one).__name__ for one in checkpoint.graph.nodes] == ["Input", "Conv", *made, "GlobalPool"]
    images = array(2, 3, 12, 10)
    wanted = reference.run(checkpoint.graph, checkpoint.weights, images).logits
    np.testing.assert_allclose(Engine(checkpoint).run(images).logits, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("places", "options", "message"),
    [
        ([0, 8], {"axis": 1}, "c2: Gather: it picks place 8 of 8"),
        ([-9], {"axis": 1}, "c2: Gather: it picks place -9 of 8"),
        (np.zeros(0, np.int64), {"axis": 1}, "c2: Gather: it picks nothing"),
        ([0], {"axis": 4}, "c2: Gather: axis 4 of a tensor that has 4"),
        ([0.5], {"axis": 1}, "c2: Gather: places that are no constant whole numbers"),
        ([2, 1, 0], {"axis": 2}, "a part of a tensor that is not channels of it"),
        ([0], {}, "the module's output is its logits"),
        (
            [0, 3] * 33,
            {"axis": 1},
            "channels in an order of 66 ranges one behind the other; at most 64 are put together",
        ),
    ],
)
def test_what_else_is_picked_is_refused(places: Any, options: dict[str, int], message: str, tmp_path: Path) -> None:
    nodes = between(node("Gather", "c places", "c2", **options), node("Relu", "c2", "z"))
    with pytest.raises(FrontendError, match=message):
        manidp.from_onnx(written(tmp_path / "x.onnx", nodes, {**ARRAYS, "places": np.array(places)}))


def test_sizes_written_down_for_the_files_batch_and_older_forms(tmp_path: Path) -> None:
    """The import compares with ONNX Runtime: each form stands for what it makes of it."""
    nodes = between(
        node("Reshape", "c odd_even", "y1"), node("Transpose", "y1", "y2", perm=[1, 0, 2]),
        node("Reshape", "y2 parts", "y3"), node("Gather", "y3 zero", "y4", axis=0),
        node("Concat", "y4 zeros", "y5", axis=1), node("Split", "y5", "y6 y7", axis=1), node("Sum", "y6 y7", "y8"),
        node("Max", "least y8", "y9"), node("Min", "y9 most", "y10"), node("Pow", "y10 two", "y11"),
        node("Slice", "y11 last first axes back", "y12"), node("GlobalAveragePool", "y12", "y13"),
        node("Expand", "y13 whole", "y14"), node("Mul", "y12 y14", "z"),
    )  # fmt: skip
    arrays = {
        **ARRAYS, "odd_even": np.array([12, 2, -1]), "parts": np.array([2, 3, 4, 10, 8]), "least": np.float32(-0.1),
        "zeros": np.zeros((3, 4, 10, 8), np.float32), "most": np.float32(2), "two": np.float32(2),
        "last": np.array([-1]), "first": np.array([-9]), "axes": np.array([1]), "back": np.array([-1]),
        "whole": np.array([3, 4, 10, 8]),
    }  # fmt: skip
    manidp.from_onnx(written(tmp_path / "x.onnx", nodes, arrays, (3, 3, 12, 10)))


def test_all_that_cannot_be_imported_is_listed(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "image a.b.weight", "c"), node("Einsum", "c", "e", name="first", equation="bchw->bc"),
        node("Conv", "image a.b.weight", "k"), node("LRN", "k", "l", size=3), node("Softsign", "l", "m"),
        node("GlobalAveragePool", "m", "g"), node("Flatten", "g", "f"), node("Add", "e f", "logits"),
    ]  # fmt: skip
    with pytest.raises(FrontendError, match="3 nodes of this file cannot be imported") as caught:
        manidp.from_onnx(written(tmp_path / "x.onnx", nodes, ARRAYS))
    assert [line.partition(": no op")[0] for line in caught.value.refused] == ["first: Einsum", "l: LRN", "m: Softsign"]


def pooled(*nodes: Any) -> list[Any]:
    return [*nodes, node("GlobalAveragePool", "image", "g"), node("Flatten", "g", "f"), node("Gemm", "f w", "y"),
            node("Add", "y huge", "logits")]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "arrays", "options", "message"),
    [
        (pooled(node("ConstantOfShape", "n", "huge")), {"n": np.array([2**40])}, {}, "more than 134,217,728 numbers"),
        (pooled(node("Expand", "a.b.bias n", "huge")), {"n": np.array([2**30, 8])}, {}, "more than 134,217,728"),
        (pooled(node("Add", "a c", "huge")), {"a": np.zeros((2**15, 1)), "c": np.zeros((1, 2**15))}, {}, "more than"),
        (pooled(node("Reshape", "a.b.bias n", "huge")), {"n": np.array([7])}, {}, "cannot be computed: ValueError"),
        (pooled(node("Loop", "n", "huge")), {"n": np.array([7])}, {}, "huge: Loop: of constants alone"),
        (BODY[:1], {}, {}, "no node makes the output 'logits'"),
        (BODY, {}, {"dims": (1, 3, "h", "w")}, "leaves height and width of the image open; give size="),
        (BODY, {}, {"dims": (1, 1, 12, 10)}, r"batch of RGB images \(B, 3, H, W\); this file's is \(1, 1, 12, 10\)"),
        (
            [node("Relu", "x", "y"), node("Relu", "y", "x"), node("Add", "x image", "logits")],
            {},
            {},
            "y: Relu: it reads 'x', which nothing before it makes",
        ),
        (pooled(node("Softmax", "y", "huge")), {}, {}, "huge: Softmax: a softmax that is not the network's end"),
        (
            pooled(node("Transpose", "image", "huge", perm=[0])),
            {},
            {},
            "huge: Transpose: it cannot be computed: RuntimeError",
        ),
        (BODY, {}, {"dims": (10**6, 3, 12, 10)}, "for 1,000,000 images of 12x10 at a time, which is too much"),
    ],
)
def test_a_bad_file_is_one_line(
    nodes: Any, arrays: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "x.onnx", nodes, {"w": array(3, 2), **ARRAYS, **arrays}, **options)
    with pytest.raises(FrontendError, match=message):
        manidp.from_onnx(path)


def test_other_files_are_neither_read_nor_believed(tmp_path: Path) -> None:
    path = written(tmp_path / "x.onnx", BODY, ARRAYS)
    model = onnx.load_model_from_string(path.read_bytes())
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FrontendError, match="weights lie in another file, which is not read"):
        manidp.from_onnx(path)
    for content in (b"", b"no", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(FrontendError, match="not an ONNX file"):
            manidp.from_onnx(path)
    with pytest.raises(FrontendError, match="cannot be read"):
        manidp.from_onnx(tmp_path)


def test_the_command_line_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.onnx", BODY, ARRAYS)
    out = tmp_path / "y.safetensors"
    monkeypatch.setattr("sys.argv", ["manidp", "convert", str(path), "-o", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = imported_from(str(path), None, Preprocessing((0.5,) * 3, (0.5,) * 3, (12, 10)), tuple("abcde"))
    assert found.checkpoint.classes == tuple("abcde") and found.checkpoint.preprocessing.mean == (0.5,) * 3
    weights = load_checkpoint(out).weights
    assert all(np.array_equal(value, weights[name]) for name, value in found.checkpoint.weights.items())
    with pytest.raises(FrontendError, match="has its weights in itself"):
        imported_from(str(path), tmp_path, found.checkpoint.preprocessing, tuple("abcde"))
