"""What the tests of the engine share: a program run between sentinels, comparisons."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.engine import Program
from manidp.engine.ir import FLOAT, HALF, Element
from manidp.engine.planner import make_plan
from manidp.engine.steps import Plan
from manidp.engine.target import ISAS
from manidp.graph import Graph
from manidp.reference import node_values, run
from manidp.result import Result

Array = NDArray[Any]
SENTINEL = np.float32(-7.25e33)
# Error against float64, relative to the largest number of the same map of the same image, or to LEAST if that is more:
# a lone logit may be small because larger numbers cancel, so logits are never measured against less than LEAST_LOGIT
TOLERANCES, LEAST, LEAST_LOGIT = {FLOAT: 2e-4, HALF: 2e-2}, {FLOAT: 1e-3, HALF: 0.5}, 5e-2


def plan_of(graph: Graph, weights: Mapping[str, Array], isa: str, *, reuse: bool = True) -> Plan:
    channels = graph.input.dims[0]
    return make_plan(
        graph,
        weights,
        lanes=ISAS[isa].lanes,
        element=ISAS[isa].element,
        scale=np.full(channels, 1 / 255),
        shift=np.zeros(channels),
        reuse=reuse,
    )


def run_program(program: Program, plan: Plan, images: Array) -> tuple[Result, Array]:
    """Results and workspace of a program; everything around what it may write still holds sentinels afterwards."""
    margin, count = 256, len(images)
    constants = _between_sentinels(margin, len(plan.constants))
    workspace = _between_sentinels(margin, program.workspace)
    results = _between_sentinels(margin, count * program.result_size)
    constants[margin:-margin], workspace[margin:-margin] = plan.constants, 0
    images, state = np.ascontiguousarray(images), (ctypes.c_int64 * 2)()
    addresses = [array[margin:].ctypes.data for array in (results, workspace, constants)]
    call_program(program, images, images.ctypes.data, ctypes.addressof(state), *addresses)
    for array, name in ((workspace, "workspace"), (results, "results"), (constants, "constants")):
        assert (array[:margin] == SENTINEL).all(), f"written before the {name}"
        assert (array[-margin:] == SENTINEL).all(), f"written behind the {name}"
    np.testing.assert_array_equal(constants[margin:-margin].view(np.int32), plan.constants.view(np.int32))
    made = results[margin:-margin].reshape(count, -1)
    classes = plan.graph.num_classes
    return Result(plan.graph, made[:, :classes], made[:, classes:]), workspace[margin:-margin]


def call_program(
    program: Program, images: Array, at: int, state: int, results: int, workspace: int, constants: int
) -> None:
    """Run a program on images that lie ``at`` an address."""
    program.run(at, images.dtype == np.uint8, results, state, len(images), constants, workspace)


def _between_sentinels(margin: int, size: int) -> Array:
    """An array whose element ``margin`` lies at a multiple of 64 bytes, full of sentinels."""
    whole = np.full(size + 2 * margin + 16, SENTINEL, dtype=np.float32)
    start = -whole.ctypes.data % 64 // 4
    return whole[start : start + size + 2 * margin]


def assert_close(
    engine: Array, reference: Array, what: str, tolerance: float | None = None, element: Element = FLOAT,
    least: float = 0.0,
) -> None:  # fmt: skip
    """|engine - reference| <= tolerance * the largest |reference| of the same image; both (B, ...)."""
    tolerance, least = tolerance or TOLERANCES[element], max(least, LEAST[element])
    assert engine.shape == reference.shape, what
    for image, (got, wanted) in enumerate(zip(engine, reference, strict=True)):
        if wanted.size:
            error = np.abs(got - wanted).max()
            assert error <= tolerance * max(np.abs(wanted).max(), least), f"{what}, image {image}: off by {error}"


def assert_same_result(result: Result, wanted: Result, element: Element = FLOAT) -> None:
    """Every gate's kept channels one by one, gates and logits within the tolerance."""
    assert list(result.kept) == list(wanted.kept)
    for name in wanted.kept:
        np.testing.assert_array_equal(result.kept[name], wanted.kept[name], err_msg=f"kept channels of {name}")
        assert_close(result.gates[name], wanted.gates[name], f"gate {name}", element=element)
    np.testing.assert_array_equal(result.macs, wanted.macs)
    assert_close(result.logits, wanted.logits, "logits", element=element, least=LEAST_LOGIT)


def close_calls(result: Result, wanted: Result, weights: Mapping[str, Array]) -> NDArray[np.bool_]:
    """(B,) images that keep other channels than the reference, which may be so only near the threshold.

    At the first gate that differs, the saliency that one of the two keeps exceeds the threshold by at most the
    tolerance of float16, relative to the gate's largest saliency. What follows such a gate is another computation.
    """
    differ = np.zeros(len(wanted.logits), dtype=bool)
    for name, kept in wanted.kept.items():
        saliency = np.maximum(result.gates[name], wanted.gates[name])
        bound = max(
            float(weights.get(f"{name}.threshold", 0.0)), 0.0
        )  # a gate of 0 keeps nothing, however low its threshold
        beyond = (saliency - bound) / saliency.max(axis=1, keepdims=True, initial=LEAST[HALF])
        here = result.kept[name] != kept
        wrong = here & (beyond > TOLERANCES[HALF])
        assert not wrong[~differ].any(), f"kept channels of {name}: off by {beyond[~differ][here[~differ]].max()}"
        differ |= here.any(axis=1)
    return differ


def some_images(result: Result, which: NDArray[np.bool_]) -> Result:
    return Result(result.graph, result.logits[which], result.gate_values[which])


def assert_layers(
    plan: Plan, workspace: Array, graph: Graph, weights: Mapping[str, Array], image: Array, element: Element = FLOAT
) -> None:
    """Every stored map of the last image against the reference, in the channels that were wanted.

    What lies between the planes, the padding of all convolutions, must still be zero.
    """
    values = node_values(graph, weights, image[None])
    opened = np.concatenate([*(values[gate][0] > 0 for gate in graph.gate_channels), [True]])
    for key, map_ in plan.maps.items():
        if map_.at < 0:
            continue
        name, layout = key.node, map_.layout
        computed = np.ones(map_.channels, dtype=bool)
        for numbers in (graph.wanted.get(name), graph.zeroed.get(name)):
            if numbers is not None:
                computed &= opened[numbers]
        elements = workspace[map_.at :].view(f"f{element.size}")
        channels = elements[: map_.channels * layout.channel].reshape(map_.channels, layout.channel)
        made = np.empty((map_.channels, layout.height, layout.width), dtype=np.float32)
        outside = np.ones(layout.channel, dtype=bool)
        for phase in range(layout.phases**2):
            row, column = divmod(phase, layout.phases)
            rows, columns = layout.valid(phase)
            at = phase * layout.plane + np.arange(rows)[:, None] * layout.pitch + np.arange(columns)
            made[:, row :: layout.phases, column :: layout.phases] = channels[:, at]
            outside[at] = False
        assert (channels[:, outside] == 0).all(), f"padding of {key} was written"
        assert_close(made[None, computed], values[name][:, computed], f"map {key}", element=element)


def check(graph: Graph, weights: Mapping[str, Array], images: Array, isa: str) -> None:
    """The engine's code against the float64 reference: as it runs, and with every layer kept and compared."""
    wanted, element = run(graph, weights, images), ISAS[isa].element
    for reuse in (True, False):
        plan = plan_of(graph, weights, isa, reuse=reuse)
        program = Program(plan, ISAS[isa])
        result, workspace = run_program(program, plan, images.astype(np.float32))
        differ = np.zeros(len(images), dtype=bool)
        if element == HALF:
            differ = close_calls(result, wanted, weights)
        assert_same_result(some_images(result, ~differ), some_images(wanted, ~differ), element)
        if not reuse and not differ[-1]:
            assert_layers(plan, workspace, graph, weights, images[-1], element)
