"""The engine: what it computes, what it leaves out, what it refuses, and that its tests would notice."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from engine_cases import Array, assert_close, assert_same_result, check, plan_of, run_program
from manidp.engine.choice import KERNELS, TIMES, Choice
from manidp.engine.engine import Engine, Program
from manidp.engine.ir import FLOAT, HALF
from manidp.engine.kernels.convolution import Convolve, Kernel
from manidp.engine.kernels.direct import Direct
from manidp.engine.kernels.lanes import ConvolveInLanes, OutputLanes
from manidp.engine.kernels.matrix import Matrix, MultiplyMatrices
from manidp.engine.kernels.winograd import MATRICES, Winograd
from manidp.engine.module import Module
from manidp.engine.planner import make_plan
from manidp.engine.steps import Plan, VectorKey
from manidp.engine.target import ISAS, available_isas, emulating_isas
from manidp.errors import ManiDPError, UnsupportedError
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.graph import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    GlobalPool,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Pool,
)
from manidp.graph.macs import macs_per_image
from manidp.models import resnet
from manidp.reference import run
from networks import ZOO, checkpoint_of, images_for, random_weights, some_open, with_thresholds
from test_reference import GOLDEN, read_ckpt

ISA = available_isas()
HALF_ISA = available_isas("float16") + emulating_isas("float16")
GRAPH = with_gates(resnet(14, image=(3, 16, 16)))


@pytest.fixture(scope="module")
def images() -> Array:
    return np.random.default_rng(7).normal(size=(4, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(images: Array) -> dict[str, Array]:
    return with_thresholds(GRAPH, random_weights(GRAPH), images, {gate.name: 0.58 for gate in GRAPH.gates})


@pytest.fixture(scope="module")
def engine(weights: dict[str, Array]) -> Engine:
    return Engine(checkpoint_of(GRAPH, weights))


@pytest.mark.parametrize(
    ("isa", "share"), [(isa, 0.58) for isa in ISA + HALF_ISA] + [(ISA[0], share) for share in (0.0, 0.01, 1.0)]
)
def test_a_gated_resnet_with_all_one_most_or_no_channels_closed(isa: str, share: float, images: Array) -> None:
    weights = with_thresholds(GRAPH, random_weights(GRAPH), images, {gate.name: share for gate in GRAPH.gates})
    check(GRAPH, weights, images, isa)


@pytest.mark.parametrize("isa", ISA + HALF_ISA)
def test_networks_of_other_kinds(isa: str) -> None:
    """Depthwise and grouped convolutions, bottlenecks, squeeze and excite, concatenation, pools, all activations."""
    nodes = (
        Input(name="image", dims=(3, 21, 30)),
        Conv(name="stem", inputs=("image",), channels=12, kernel=7, stride=2, padding=3, bias=True),
        BatchNorm(name="stem_bn", inputs=("stem",)),
        Activation(name="stem_act", inputs=("stem_bn",), kind="hardswish"),
        Pool(name="pool", inputs=("stem_act",), kind="max", kernel=3, stride=2, padding=1),
        Conv(name="expand", inputs=("pool",), channels=24, kernel=1, padding=0),
        Activation(name="expand_act", inputs=("expand",), kind="silu"),
        Conv(name="depthwise", inputs=("expand_act",), channels=24, kernel=5, padding=2, groups=24),
        BatchNorm(name="depthwise_bn", inputs=("depthwise",)),
        GlobalPool(name="squeeze", inputs=("depthwise_bn",)),
        Linear(name="fc1", inputs=("squeeze",), features=6),
        Activation(name="fc1_act", inputs=("fc1",), kind="relu"),
        Linear(name="fc2", inputs=("fc1_act",), features=24),
        Activation(name="fc2_act", inputs=("fc2",), kind="sigmoid"),
        Multiply(name="excite", inputs=("depthwise_bn", "fc2_act")),
        Conv(name="project", inputs=("excite",), channels=12, kernel=1, padding=0),
        Add(name="sum", inputs=("project", "pool")),
        Conv(name="grouped", inputs=("sum",), channels=18, kernel=3, groups=3),
        Activation(name="grouped_act", inputs=("grouped",), kind="relu6"),
        Pool(name="average", inputs=("sum",), kind="average", kernel=2, stride=1, padding=1),
        Conv(name="valid", inputs=("average",), channels=5, kernel=2, padding=0),
        Activation(name="valid_act", inputs=("valid",), kind="hardsigmoid"),
        Concat(name="both", inputs=("grouped_act", "valid_act", "sum")),
        Conv(name="last", inputs=("both",), channels=33, kernel=3, stride=2),
        GlobalPool(name="high", inputs=("last",), kind="max"),
        Linear(name="logits", inputs=("high",), features=7),
    )
    graph = with_gates(Graph(nodes, "logits"), ["expand", "depthwise", "grouped", "last"])
    images = np.random.default_rng(3).normal(size=(2, 3, 21, 30)).astype(np.float32)
    weights = with_thresholds(graph, random_weights(graph), images, {gate.name: 0.6 for gate in graph.gates})
    check(graph, weights, images, isa)


def network_with_a_vector_called(name: str) -> Graph:
    """A gate 'g', a map 'x' whose average and maximum are read, and a vector beside them."""
    nodes = (
        Input(name="image", dims=(3, 9, 9)),
        Conv(name="x", inputs=("image",), channels=8),
        *head("g", "x", 8, 4),
        GlobalPool(name="average", inputs=("x",)),
        GlobalPool(name="max", inputs=("x",), kind="max"),
        Add(name="both", inputs=("average", "max")),
        Linear(name=name, inputs=("both",), features=17),
        Conv(name="second", inputs=("x",), channels=8),
        Multiply(name="gated", inputs=("second", "g")),
        Conv(name="third", inputs=("gated",), channels=8),
        GlobalPool(name="last", inputs=("third",)),
        Concat(name="all", inputs=("last", name)),
        Linear(name="logits", inputs=("all",), features=3),
    )
    return Graph(nodes, "logits")


def test_names_in_a_file_never_mean_a_vector_of_our_own() -> None:
    """A vector called as one might call those that the engine makes of a gate or a map: the code stays the same."""
    isa = ISA[0]
    images = np.random.default_rng(1).normal(size=(2, 3, 9, 9)).astype(np.float32)
    graph = network_with_a_vector_called("harmless")
    weights = with_thresholds(graph, random_weights(graph), images, {"g": 0.5})
    wanted = plan_of(graph, weights, isa)
    code = Module(wanted, ISAS[isa])
    assert_same_result(run_program(Program(wanted, ISAS[isa]), wanted, images)[0], run(graph, weights, images))
    for owner in ("g", "x"):
        for part in ("list", "mean", "hidden", "average", "max", "value", "1", "4"):
            for name in (f"{owner} {part}", f"{owner}.{part}", f"('{owner}', '{part}')"):
                graph = network_with_a_vector_called(name)
                plan = plan_of(graph, {k.replace("harmless", name): v for k, v in weights.items()}, isa)
                np.testing.assert_array_equal(plan.constants.view(np.int32), wanted.constants.view(np.int32))
                assert Module(plan, ISAS[isa]).text == code.text, name


@pytest.mark.parametrize("side", MATRICES)
def test_winograds_products_make_a_convolution(side: int) -> None:
    """at [(g w g') * (bt d bt')] at' is d convolved with w, whatever the numbers."""
    rng, way = np.random.default_rng(side), MATRICES[side]
    d, w = rng.normal(size=(side + 2, side + 2)), rng.normal(size=(3, 3))
    bt, g, at = (np.array(matrix) for matrix in (way.bt, way.g, way.at))
    wanted = np.tensordot(sliding_window_view(d, (3, 3)), w, axes=2)
    np.testing.assert_allclose(at @ ((g @ w @ g.T) * (bt @ d @ bt.T)) @ at.T, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "lanes", "single", "half"),
    [
        (32, 16, Winograd(4), Winograd(2)),
        (8, 16, Winograd(2), Winograd(2)),
        (8, 4, Winograd(4), Winograd(2)),
        (4, 8, Direct(), Winograd(2)),
        (2, 4, Direct(), Direct()),
    ],
)
def test_the_cheapest_kernel_is_taken(size: int, lanes: int, single: Kernel, half: Kernel) -> None:
    nodes = (
        Input(name="image", dims=(3, size, size)),
        Conv(name="conv", inputs=("image",), channels=4),
        GlobalPool(name="pool", inputs=("conv",)),
    )
    graph = Graph(nodes, "pool")
    for element, wanted in ((FLOAT, single), (HALF, half)):
        plan = make_plan(graph, random_weights(graph), lanes=lanes, element=element, scale=np.ones(3), shift=np.ones(3))
        (step,) = [step for step in plan.steps if isinstance(step, Convolve)]
        assert step.kernel == wanted


@pytest.mark.parametrize(
    ("channels", "size", "lanes", "wanted"),
    [
        (1024, 7, 16, OutputLanes()),  # 49 positions fill three vectors of four
        (1024, 7, 8, OutputLanes()),
        (1024, 14, 16, OutputLanes()),
        (1024, 14, 8, OutputLanes()),
        (1024, 16, 8, Matrix(rows=False)),
        (1024, 16, 16, Matrix(rows=False)),
        # one or two vectors of positions are too few sums to hide how long an addition takes
        (1024, 4, 8, OutputLanes()),
        (1024, 4, 16, OutputLanes()),
        (20, 7, 16, Matrix(rows=False)),  # 20 outputs do not fill two vectors
        (1024, 2, 16, OutputLanes()),
    ],
)
def test_outputs_lie_in_the_lanes_where_positions_would_not_fill_them(
    channels: int, size: int, lanes: int, wanted: Kernel
) -> None:
    conv = Conv(name="conv", inputs=("image",), channels=channels, kernel=1, padding=0)
    image, pool = Input(name="image", dims=(64, size, size)), GlobalPool(name="mean", inputs=("conv",))
    assert Choice(Graph((image, conv, pool), "mean"), lanes, FLOAT).of(conv) == wanted
    gates = *head("gate", "image", channels, 2, 3.0), Multiply(name="gated", inputs=("conv", "gate"))
    gated = Graph((image, conv, *gates, GlobalPool(name="mean", inputs=("gated",))), "mean")
    # with a gate all outputs are computed only where positions would leave most lanes idle
    assert Choice(gated, lanes, FLOAT).of(conv) == (OutputLanes() if size == 2 else Matrix(rows=True))


def test_packed_weights_take_no_more_memory_than_they_may() -> None:
    """Winograd's 36 points for 9 taps, of as many layers as have place; the others take what is next."""
    layers = [Conv(name=f"n{n}", inputs=(f"n{n - 1}" if n else "image",), channels=512) for n in range(6)]
    nodes = (Input(name="image", dims=(512, 28, 28)), *layers, GlobalPool(name="mean", inputs=("n5",)))
    graph = Graph(nodes, "mean")
    chosen = [Choice(graph, 8, FLOAT).of(layer) for layer in layers]
    assert set(chosen) == {Winograd(2), Winograd(4)}
    held = sum(kernel.held(layer) / 9 for kernel, layer in zip(chosen, layers, strict=True)) / len(layers)
    assert TIMES - 20 / 9 / len(layers) < held <= TIMES
    narrow = Graph((nodes[0], replace(layers[0], channels=32), GlobalPool(name="mean", inputs=("n0",))), "mean")
    assert Choice(narrow, 8, FLOAT).of(layers[0]) == Winograd(4)  # 2.3 MB: anything has place


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation", "wanted"),
    [
        (3, 1, 1, Winograd),  # the fewest multiply-adds; fewer weights are its own, of smaller tiles
        (3, 0, 1, Winograd),
        (3, 2, 2, Matrix),
        (5, 2, 1, Matrix),
        ((1, 7), (0, 3), 1, Matrix),
        (1, 0, 1, Matrix),
    ],
)
def test_winograd_or_else_a_product_of_matrices_does_a_window(
    kernel: int | tuple[int, int], padding: int | tuple[int, int], dilation: int, wanted: type[Kernel]
) -> None:
    conv = Conv(name="conv", inputs=("image",), channels=64, kernel=kernel, padding=padding, dilation=dilation)
    assert {type(kernel) for kernel in KERNELS if kernel.supports(conv, 64, FLOAT)} - {Direct, OutputLanes} == {wanted}


@pytest.mark.parametrize(("channels", "size", "absorbed"), [(32, 14, True), (512, 14, False), (32, 7, False)])
def test_a_convolution_does_what_stands_before_it_where_that_saves_more_than_another_kernel(
    channels: int, size: int, absorbed: bool
) -> None:
    nodes = (
        Input(name="image", dims=(64, size, size)),
        Conv(name="one", inputs=("image",), channels=16),
        Conv(name="another", inputs=("one",), channels=16),
        Concat(name="both", inputs=("one", "another")),
        BatchNorm(name="norm", inputs=("both",)),
        Activation(name="relu", inputs=("norm",)),
        Conv(name="conv", inputs=("relu",), channels=channels, kernel=1, padding=0),
        GlobalPool(name="mean", inputs=("conv",)),
    )
    graph = Graph(nodes, "mean")
    plan = make_plan(graph, random_weights(graph), lanes=16, scale=np.ones(64), shift=np.ones(64))
    step = next(step for step in plan.steps if getattr(step, "node", None) == graph.by_name["conv"])
    assert isinstance(step, MultiplyMatrices if absorbed else ConvolveInLanes)
    assert bool(getattr(step, "before", ())) == absorbed


@pytest.mark.parametrize("isa", ISA)
def test_closed_channels_are_zeros_to_a_layer_norm_whatever_an_image_before_left_there(isa: str) -> None:
    plain = (
        Input(name="image", dims=(12, 7, 5)),
        Conv(name="depthwise", inputs=("image",), channels=12, groups=12, bias=True),
        LayerNorm(name="norm", inputs=("depthwise",)),
        GlobalPool(name="mean", inputs=("norm",)),
    )
    graph = with_gates(Graph(plain, "mean"), ["depthwise"])
    (gate,) = graph.gates
    weights = random_weights(graph) | {
        f"{gate.name}.fc1.weight": np.ones(graph.parameters[f"{gate.name}.fc1.weight"], np.float32),
        f"{gate.name}.fc2.weight": np.ones(graph.parameters[f"{gate.name}.fc2.weight"], np.float32),
        f"{gate.name}.fc2.bias": np.linspace(0, 1, 12, dtype=np.float32),
        f"{gate.name}.threshold": np.array(0.5, np.float32),
    }
    images = np.random.default_rng(0).uniform(size=(2, 12, 7, 5)).astype(np.float32)
    images[1] = -images[1]
    kept = run(graph, weights, images).kept[gate.name]
    assert kept[0].all() and 0 < kept[1].sum() < 12
    check(graph, weights, images, isa)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden set at {GOLDEN}")
@pytest.mark.parametrize("isa", ISA)
def test_the_original_network_says_the_same(isa: str) -> None:
    graph = with_gates(resnet(20))
    weights = read_ckpt((GOLDEN / "resnet20.ckpt").read_bytes())
    thresholds = np.load(GOLDEN / "thres.npy").astype(np.float32)
    weights |= {f"{gate.name}.threshold": t for gate, t in zip(graph.gates, thresholds, strict=True)}
    result = Engine(checkpoint_of(graph, weights), isa=isa).run(np.load(GOLDEN / "input.npy"))
    golden = np.load(GOLDEN / "gates.npz")
    # float32 itself is off by 3e-5 here, whoever computes it: the network is random and amplifies rounding
    assert_close(result.logits, np.load(GOLDEN / "logits.npy"), "logits", 3e-4)
    for i, gate in enumerate(graph.gates):
        mask = golden[f"mask_{i:02d}"].reshape(16, -1)
        np.testing.assert_array_equal(result.kept[gate.name], mask > 0)
        assert_close(result.gates[gate.name], mask, gate.name, 3e-4)


@pytest.mark.parametrize("isa", ISA)
def test_a_saliency_exactly_on_the_threshold_is_closed(isa: str) -> None:
    graph = Graph(
        (
            Input(name="image", dims=(3, 4, 4)),
            *head("gate", "image", 5, 2, 3.0),
            Conv(name="conv", inputs=("image",), channels=5),
            Multiply(name="gated", inputs=("conv", "gate")),
            GlobalPool(name="pool", inputs=("gated",)),
            Linear(name="out", inputs=("pool",), features=2),
        ),
        "out",
    )
    weights = random_weights(graph) | {
        "gate.fc1.weight": np.eye(2, 3), "gate.fc2.bias": np.zeros(5), "gate.threshold": np.array(0.5),
        "gate.fc2.weight": np.array([[1.0, 0], [0, 1.0], [1.0, 1.0], [-1.0, 0], [9.0, 0]]),
    }  # fmt: skip
    images = np.full((1, 3, 4, 4), 0.5, dtype=np.float32)
    images[:, 1] += np.float32(2**-16)
    result = Engine(checkpoint_of(graph, weights), isa=isa).run(images)
    assert result.kept["gate"].tolist() == [[False, True, True, False, True]]
    np.testing.assert_array_equal(result.gates["gate"][0], [0, images[0, 1, 0, 0], 0.5 + images[0, 1, 0, 0], 0, 3.0])


@pytest.mark.parametrize(
    "graph", [GRAPH, ZOO["Inception, gated"], ZOO["ShuffleNetV2, gated"], ZOO["ShuffleNetV1, gated"]]
)
@pytest.mark.parametrize("isa", ISA)  # which weights are read does not depend on their type
def test_weights_of_closed_channels_are_never_read(isa: str, graph: Graph) -> None:
    """Put NaN into every weight that the first image's gates make superfluous: nothing changes."""
    weights, one = some_open(graph), images_for(graph)[:1]
    plan = plan_of(graph, weights, isa)
    result, _ = run_program(Program(plan, ISAS[isa]), plan, one)
    opened = np.concatenate([*(result.kept[gate][0] for gate in graph.gate_channels), [True]])
    poisoned = dict(weights)
    count = 0
    for node in graph.nodes:
        if isinstance(node, Conv) and node.groups == 1:
            weight = weights[f"{node.name}.weight"].copy()
            made, read = graph.wanted.get(node.name), graph.zeroed.get(node.inputs[0])
            if made is not None:
                weight[~opened[made]] = np.nan
            if read is not None:
                weight[:, ~opened[read]] = np.nan
            poisoned[f"{node.name}.weight"] = weight
            count += np.isnan(weight).sum()
    assert count > (20_000 if graph is GRAPH else 10)
    plan = plan_of(graph, poisoned, isa)
    again, _ = run_program(Program(plan, ISAS[isa]), plan, one)
    np.testing.assert_array_equal(again.logits, result.logits)


class SkipsOneTooMany(Module):
    def lists(self, f, channels):  # type: ignore[no-untyped-def]
        kept, below, number = super().lists(f, channels)
        if channels.kept == VectorKey("stage_2.1.mb1", "list") and not channels.closed:
            number = f.minus(number, 1)
        return kept, below, number


class ClosesLate(Module):
    def __init__(self, plan, isa):  # type: ignore[no-untyped-def]
        super().__init__(plan, isa)
        changed = self.text.replace("fcmp ugt", "fcmp uge")
        assert changed != self.text
        self.text = changed


def without_residual(plan: Plan) -> Plan:
    steps = list(plan.steps)
    index, step = next(
        (i, step)
        for i, step in enumerate(steps)
        if isinstance(step, Convolve) and any(op.kind == "add" for op in step.epilogue.ops)
    )
    ops = tuple(op for op in step.epilogue.ops if op.kind != "add")
    steps[index] = replace(step, epilogue=replace(step.epilogue, ops=ops))
    return replace(plan, steps=tuple(steps))


def with_a_weight_changed(plan: Plan) -> Plan:
    constants = plan.constants.copy()
    used = next(step for step in plan.steps if isinstance(step, Convolve) and step.outputs.kept is None)
    constants[used.packed.weights + 1] += 0.1
    return replace(plan, constants=constants)


@pytest.mark.parametrize(
    ("change", "module"),
    [
        (lambda plan: plan, SkipsOneTooMany),
        (without_residual, Module),
        (with_a_weight_changed, Module),
    ],
    ids=["one channel too many skipped", "a residual left out", "one weight changed"],
)
def test_the_comparison_notices(
    change: Callable[[Plan], Plan],
    module: type[Module],
    weights: dict[str, Array],
    images: Array,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(GRAPH, weights, ISA[0])
    wanted = run(GRAPH, weights, images)
    assert_same_result(run_program(Program(plan, ISAS[ISA[0]]), plan, images)[0], wanted)
    monkeypatch.setattr("manidp.engine.engine.Module", module)
    broken = change(plan)
    with pytest.raises(AssertionError):
        assert_same_result(run_program(Program(broken, ISAS[ISA[0]]), broken, images)[0], wanted)


def test_the_threshold_test_notices_at_least_in_place_of_more_than(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manidp.engine.engine.Module", ClosesLate)
    with pytest.raises(AssertionError):
        test_a_saliency_exactly_on_the_threshold_is_closed(ISA[0])


def test_bytes_are_normalised_as_the_checkpoint_says(engine: Engine) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pictures[0, 0, 0], pictures[0, 0, 1] = 0, 255
    floats = engine.checkpoint.preprocessing.apply(pictures)
    assert_close(engine.run(pictures).logits, engine.run(floats).logits, "logits", 1e-5)


def test_pictures_are_read_from_their_paths(engine: Engine, tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    np.testing.assert_array_equal(engine.run(paths).logits, engine.run(pictures).logits)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_batch_on_any_number_of_threads_is_the_images_one_by_one(
    threads: int, engine: Engine, weights: dict[str, Array]
) -> None:
    batch = np.random.default_rng(2).normal(size=(37, 3, 16, 16)).astype(np.float32)
    several = Engine(checkpoint_of(GRAPH, weights), threads=threads)
    memory = several.memory
    result = several.run(batch)
    for i in range(len(batch)):
        one = engine.run(batch[i : i + 1])
        np.testing.assert_array_equal(one.logits[0], result.logits[i])
        np.testing.assert_array_equal(one.gate_values[0], result.gate_values[i])
        assert one.macs[0] == result.macs[i]
    assert several.run(batch[:0]).logits.shape == (0, 10)
    assert several.run(batch.astype(np.float64)[::-1]).logits.tolist() == result.logits[::-1].tolist()
    assert several.memory == memory


def test_many_threads_may_call_one_engine(weights: dict[str, Array]) -> None:
    engine = Engine(checkpoint_of(GRAPH, weights), threads=2)
    batches = [np.random.default_rng(i).normal(size=(1 + i % 5, 3, 16, 16)).astype(np.float32) for i in range(40)]
    alone = [engine.run(batch).logits for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        together = [result.logits for result in pool.map(engine.run, batches)]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_numbers_that_are_not_finite_stay_in_their_own_image(engine: Engine, images: Array) -> None:
    wanted = engine.run(images).logits
    for bad in (np.nan, np.inf, -np.inf):
        batch = images.copy()
        batch[1, 2, 3, 4] = bad
        with pytest.raises(ManiDPError, match=r"images \[1\] hold numbers that are not finite"):
            engine.run(batch)
        plan = plan_of(GRAPH, engine.checkpoint.weights, ISA[0])
        result, _ = run_program(Program(plan, ISAS[ISA[0]]), plan, batch)
        others = [0, 2, 3]
        np.testing.assert_array_equal(result.logits[others], wanted[others])
    huge = images.copy()
    huge[2] *= np.float32(1e37)
    with pytest.raises(ManiDPError, match=r"logits of images \[2\] are not finite"):
        engine.run(huge)
    np.testing.assert_array_equal(engine.run(images).logits, wanted)


def test_macs_are_those_of_the_channels_kept(engine: Engine, images: Array) -> None:
    result = engine.run(images)
    np.testing.assert_array_equal(result.macs, macs_per_image(GRAPH, result.kept))
    assert len(set(result.macs.tolist())) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 16, 16), dtype=np.uint8), r"uint8 \(B, 16, 16, 3\) or .*; got uint8 \(2, 16, 16\)"),
        (np.zeros((2, 3, 16, 16), dtype=np.int64), r"got int64 \(2, 3, 16, 16\)"),
        (np.zeros((2, 3, 16, 17), dtype=np.float32), r"got float32 \(2, 3, 16, 17\)"),
    ],
)
def test_other_arrays_are_refused(given: Array, message: str, engine: Engine) -> None:
    with pytest.raises(ManiDPError, match=message):
        engine.run(given)


def test_what_cannot_be_run_is_named(weights: dict[str, Array]) -> None:
    nodes = (
        Input(name="image", dims=(1, 20, 20)),
        Conv(name="too_large", inputs=("image",), channels=2, kernel=17, padding=8),
        GlobalPool(name="pool", inputs=("too_large",)),
    )
    graph = Graph(nodes, "pool")
    with pytest.raises(UnsupportedError, match=r"'too_large'.*kernel 17x17"):
        plan_of(graph, random_weights(graph), ISA[0])
    for source in ("image", "pool"):  # of a map and of a vector
        unknown = Activation(name="odd", inputs=(source,), kind="softsign")  # type: ignore[arg-type]
        pool = GlobalPool(name="pool", inputs=("image" if source == "pool" else "odd",))
        graph = Graph((Input(name="image", dims=(1, 4, 4)), unknown, pool), "pool" if source == "image" else "odd")
        with pytest.raises(UnsupportedError, match=r"'odd' .Activation.: the engine does not run it"):
            plan_of(graph, {}, ISA[0])
    with pytest.raises(UnsupportedError, match="'mmx'"):
        Engine(checkpoint_of(GRAPH, weights), isa="mmx")
    with pytest.raises(ManiDPError, match="from 1 to 1,024; got 0"):
        Engine(checkpoint_of(GRAPH, weights), threads=0)


def row_of(width: int) -> Graph:
    nodes = (
        Input(name="image", dims=(3, 1, width)),
        Conv(name="first", inputs=("image",), channels=2),
        Conv(name="wide", inputs=("first",), channels=2, kernel=5, padding=2),
        Conv(name="apart", inputs=("wide",), channels=2, stride=2),
        Pool(name="pool", inputs=("apart",), kind="max", kernel=3, stride=3, padding=1),
        GlobalPool(name="last", inputs=("pool",)),
    )
    return Graph(nodes, "last")


@pytest.mark.parametrize("isa", ISAS)
def test_code_does_not_grow_with_a_map(isa: str) -> None:
    """Only the masks of its vectors do: a byte or two for each, as text."""
    instructions = []
    for width in (500, 32_000):
        graph = row_of(width)
        module = Module(plan_of(graph, random_weights(graph), isa), ISAS[isa])
        instructions.append(sum(function.count("\n") for function in module.functions))
    assert instructions[1] < 1.2 * instructions[0]


@pytest.mark.parametrize("channels", [1, 4, 5, 40])
def test_bytes_of_any_number_of_channels_and_any_width_are_normalised(channels: int) -> None:
    graph = Graph(
        (
            Input(name="image", dims=(channels, 5, 143)),
            Conv(name="conv", inputs=("image",), channels=3),
            Conv(name="apart", inputs=("image",), channels=3, stride=2),
            GlobalPool(name="pool", inputs=("conv",)),
            GlobalPool(name="other", inputs=("apart",)),
            Concat(name="all", inputs=("pool", "other")),
        ),
        "all",
    )
    weights, bytes_ = random_weights(graph), np.random.default_rng(2).integers(0, 256, (2, 5, 143, channels), np.uint8)
    wanted = run(graph, weights, bytes_.transpose(0, 3, 1, 2) / 255)
    for isa in ISA:
        plan = plan_of(graph, weights, isa)
        assert_same_result(run_program(Program(plan, ISAS[isa]), plan, bytes_)[0], wanted)


def deep(blocks: int) -> Graph:
    """Blocks of a convolution, a chain of pointwise nodes, a gate and a residual."""
    nodes: list[Node] = [Input(name="image", dims=(3, 4, 4)), Conv(name="x", inputs=("image",), channels=2)]
    for i in range(blocks):
        x = nodes[-1].name
        nodes += [
            *head(f"gate{i}", x, 2, 1),
            Conv(name=f"conv{i}", inputs=(x,), channels=2),
            Multiply(name=f"gated{i}", inputs=(f"conv{i}", f"gate{i}")),
            Add(name=f"sum{i}", inputs=(f"gated{i}", x)),
            Activation(name=f"act{i}", inputs=(f"sum{i}",)),
        ]
    nodes.append(GlobalPool(name="pool", inputs=(nodes[-1].name,)))
    return Graph(tuple(nodes), "pool")


def test_the_time_to_plan_grows_no_faster_than_the_network() -> None:
    """5,000 nodes, each value read twice: about a second, where a square would take minutes and 2^n would not end."""
    nodes: list[Node] = [Input(name="image", dims=(1, 2, 2)), Conv(name="n0", inputs=("image",), channels=1)]
    for i in range(1, 5000, 2):
        nodes.append(Pool(name=f"n{i}", inputs=(f"n{i - 1}",), kind="average", kernel=1, stride=1))
        nodes.append(Add(name=f"n{i + 1}", inputs=(f"n{i}", f"n{i - 1}")))
    graph = Graph((*nodes, GlobalPool(name="last", inputs=(nodes[-1].name,))), "last")
    weights = random_weights(graph)
    start = time.process_time()
    Module(plan_of(graph, weights, ISA[0]), ISAS[ISA[0]])
    assert time.process_time() - start < 10


@pytest.mark.parametrize("gated", [16, 17, 18])
def test_a_long_chain_of_pointwise_nodes_is_cut_into_steps(gated: int) -> None:
    """With a gate before, in and behind the place of the cut."""
    nodes: list[Node] = [
        Input(name="image", dims=(3, 5, 5)),
        *head("gate", "image", 4, 2),
        Conv(name="n0", inputs=("image",), channels=4),
    ]
    for i in range(1, 40):
        name, last = f"n{i}", nodes[-1].name
        if i == gated:
            nodes.append(Multiply(name=name, inputs=(last, "gate")))
        else:
            nodes.append(Activation(name=name, inputs=(last,)) if i % 2 else BatchNorm(name=name, inputs=(last,)))
    graph = Graph((*nodes, GlobalPool(name="pool", inputs=("n39",))), "pool")
    images = np.random.default_rng(gated).normal(size=(2, 3, 5, 5)).astype(np.float32)
    check(graph, with_thresholds(graph, random_weights(graph), images, {"gate": 0.5}), images, ISA[0])


def test_code_and_workspace_are_bounded_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = deep(3)
    plan = plan_of(graph, random_weights(graph), ISA[0])
    module = Module(plan, ISAS[ISA[0]])
    assert 0.9 * len(module.text) < module.size < len(module.text)
    monkeypatch.setenv("MANIDP_MAX_CODE", "20000")
    with pytest.raises(UnsupportedError, match=r"takes \d\d,\d\d\d characters of generated code; .* MANIDP_MAX_CODE"):
        Module(plan, ISAS[ISA[0]])
    monkeypatch.undo()
    monkeypatch.setenv("MANIDP_MAX_WORKSPACE_BYTES", "1000")
    with pytest.raises(UnsupportedError, match=rf"needs {4 * module.workspace:,} bytes .* MANIDP_MAX_WORKSPACE_B"):
        Module(plan, ISAS[ISA[0]])


@pytest.mark.parametrize(
    ("isa", "triple", "instruction"),
    [
        ("avx512", "x86_64-unknown-linux-gnu", r"vfmadd231ps .*%zmm"),
        ("avx2", "x86_64-unknown-linux-gnu", r"vfmadd231ps .*%ymm"),
        ("sse", "x86_64-unknown-linux-gnu", r"mulps .*%xmm"),
        ("neon", "aarch64-unknown-linux-gnu", r"fmla .*\.4s"),
        ("avx512fp16", "x86_64-unknown-linux-gnu", r"vfmadd231ph .*%zmm"),
        ("neonfp16", "aarch64-unknown-linux-gnu", r"fmla .*\.8h"),
    ],
)
def test_code_for_every_cpu_can_be_made_on_any(
    isa: str, triple: str, instruction: str, weights: dict[str, Array]
) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = ",".join(f"+{feature}" for feature in ISAS[isa].features)
    target = llvm.Target.from_triple(triple).create_target_machine(features=features)
    text = Module(plan_of(GRAPH, weights, isa), ISAS[isa]).text
    assembly = target.emit_assembly(llvm.parse_assembly(text))
    assert len(re.findall(instruction, assembly.replace("\t", " "))) > 100
    assert "%zmm" not in assembly or isa.startswith("avx512")
