"""Generated code stays in its memory: every access in its region, nothing beyond the ends of what it is given.

What must hold of which access, and why it does, is written in docs/engine.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checked import Checked, run_checked
from engine_cases import Array, assert_same_result, plan_of, run_program
from manidp.engine import choice, memory
from manidp.engine.engine import Program
from manidp.engine.ir import FLOAT, Function, Index, Pointer
from manidp.engine.kernels import matrix, winograd
from manidp.engine.steps import Channels, MapKey, Plan, VectorKey
from manidp.engine.target import ISAS, available_isas, emulating_isas
from manidp.gating.manidp import head
from manidp.graph import Concat, Conv, GlobalPool, Graph, Input, Linear, Multiply, Node
from manidp.reference import run
from networks import classifier, images_for, random_weights, with_thresholds
from test_engine_random import networks

ISA = (*available_isas(), *available_isas("float16"), *emulating_isas("float16"))
EXAMPLES = int(os.environ.get("MANIDP_EXAMPLES", "8"))
GRAPH = Graph(
    (
        Input(name="image", dims=(3, 6, 6)),
        Conv(name="x", inputs=("image",), channels=6),
        *head("gate", "x", 16, 3),
        GlobalPool(name="mean", inputs=("x",)),
        Conv(name="second", inputs=("x",), channels=16, groups=2),
        Multiply(name="gated", inputs=("second", "gate")),
        Linear(name="side", inputs=("mean",), features=16),
        Conv(name="third", inputs=("gated",), channels=16, groups=4, stride=2),
        Conv(name="fourth", inputs=("third",), channels=16),
        Multiply(name="gated again", inputs=("fourth", "gate")),
        Conv(name="one", inputs=("gated again",), channels=16, kernel=1, padding=0),
        Multiply(name="gated once more", inputs=("one", "gate")),
        Conv(name="fifth", inputs=("gated once more",), channels=8),
        GlobalPool(name="last", inputs=("fifth",)),
        Concat(name="all", inputs=("last", "side")),
    ),
    "all",
)
IMAGES = np.random.default_rng(7).normal(size=(2, 3, 6, 6)).astype(np.float32)


def gated_weights(keep: float) -> dict[str, Array]:
    return with_thresholds(GRAPH, random_weights(GRAPH), IMAGES, {gate.name: keep for gate in GRAPH.gates})


@pytest.mark.parametrize("isa", ISA)
def test_every_access_of_random_networks_is_in_its_region(isa: str) -> None:
    @settings(max_examples=EXAMPLES // 2, deadline=None, derandomize="MANIDP_EXAMPLES" not in os.environ,
              database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(networks(), st.integers(0, 2**16), st.sampled_from((0.0, 0.1, 0.5, 1.0)), st.booleans(), st.booleans())
    def law(graph: Graph, seed: int, keep: float, bytes_: bool, shared: bool) -> None:
        rng = np.random.default_rng(seed)
        images = rng.normal(size=(2, *graph.input.dims)).astype(np.float32)
        weights = with_thresholds(graph, random_weights(graph, seed), images, {g.name: keep for g in graph.gates})
        if bytes_:
            images = rng.integers(0, 256, (2, *graph.input.dims[1:], graph.input.dims[0]), np.uint8)
        with (
            mock.patch.object(memory, "SMALL", 0 if shared else memory.SMALL),
            mock.patch.multiple(matrix, _WIDE=1, _INPUTS=1, _OUTPUTS=1),
            mock.patch.object(winograd, "_GROUP", 1),
            mock.patch.object(choice, "_LARGE", 0),
        ):
            plan = plan_of(graph, weights, isa)
        result, outside, accesses = run_checked(plan, isa, images)
        assert not outside
        assert accesses > 0
        if ISAS[isa].element == FLOAT and not bytes_:
            assert_same_result(result, run(graph, weights, images))

    law()


@pytest.mark.parametrize("isa", ISA)
def test_rows_of_a_depthwise_convolution_end_in_their_map(isa: str) -> None:
    """Rows of one number less than a vector, in a map with nothing behind it."""
    lanes = ISAS[isa].lanes
    graph = classifier(
        Conv(name="each", channels=3, groups=3, stride=2), Conv(name="last", channels=4, kernel=1, padding=0),
        image=Input(name="image", dims=(3, 2 * lanes, 2 * (lanes - 1))),
    )  # fmt: skip
    plan = plan_of(graph, random_weights(graph), isa)
    frame = plan.maps[MapKey("each", 1)].layout
    assert frame.plane == frame.height * frame.width
    _, outside, _ = run_checked(plan, isa, images_for(graph))
    assert not outside


@pytest.mark.parametrize("isa", ISA)
def test_gates_fed_anything_keep_their_lists_in_range(isa: str) -> None:
    """NaN, infinities and numbers of any size decide which channels are kept, never where they lie."""
    images = np.concatenate([*(np.full_like(IMAGES, value) for value in (np.nan, np.inf, -np.inf, 1e38, 0)), IMAGES])
    _, outside, _ = run_checked(plan_of(GRAPH, gated_weights(0.5), isa), isa, images)
    assert not outside


def with_a_list_that_a_file_writes(plan: Plan) -> Plan:
    """The numbers of the channels to keep are another vector, too, which is what comes of two vectors of one name.

    It has as many numbers as the gate has channels: the counts behind them stay, so that all loops end.
    """
    return replace(plan, vectors={**plan.vectors, VectorKey("gate", "list"): plan.vectors[VectorKey("side")]})


class OneChannelTooMany(Checked):
    def lists(self, f: Function, channels: Channels) -> tuple[Pointer, Pointer, Index]:
        kept, below, number = super().lists(f, channels)
        return kept, below, f.plus(number, 1)


@pytest.mark.parametrize(
    ("change", "module"),
    [(with_a_list_that_a_file_writes, Checked), (lambda plan: plan, OneChannelTooMany)],
    ids=["a list that a file writes", "one channel too many"],
)
def test_an_access_outside_its_region_is_reported_and_not_made(
    change: Callable[[Plan], Plan], module: type[Checked]
) -> None:
    plan = plan_of(GRAPH, gated_weights(0.5), ISA[0])
    assert not run_checked(plan, ISA[0], IMAGES)[1]
    _, outside, _ = run_checked(change(plan), ISA[0], IMAGES, module)
    assert "load" in outside or "store" in outside


def pyramid(blocks: int, *, dense: bool) -> Graph:
    """Stages that halve the map and double its channels; ``dense``: every convolution adds channels to all before."""
    nodes: list[Node] = []
    for stage in range(4):
        nodes.append(Conv(name=f"{stage}.down", channels=8 * 2**stage, stride=2))
        for block in range(blocks):
            last = nodes[-1].name
            nodes.append(Conv(name=f"{stage}.{block}.a", channels=8 * 2**stage, kernel=1 + 2 * (block % 2),
                              padding=block % 2))  # fmt: skip
            if dense:
                nodes.append(Concat(name=f"{stage}.{block}.all", inputs=(last, nodes[-1].name)))
    return classifier(*nodes, image=Input(name="image", dims=(3, 160, 128)))


@pytest.mark.parametrize(("blocks", "dense"), [(2, False), (12, False), (3, True), (10, True)])
def test_a_workspace_is_little_more_than_what_must_be_held_at_one_time(
    blocks: int, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALL", 0)
    graph = pyramid(blocks, dense=dense)
    plan = plan_of(graph, random_weights(graph), "avx2")
    assert 4 * plan.workspace < 2 * graph._live_bytes()
    monkeypatch.setattr(memory, "SMALL", 2**40)
    assert plan_of(graph, random_weights(graph), "avx2").workspace > 1.5 * plan.workspace


def test_memory_shared_by_layouts_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = pyramid(4, dense=True)
    weights = random_weights(graph)
    images = np.random.default_rng(3).normal(size=(2, *graph.input.dims)).astype(np.float32)
    made = []
    for small in (0, 2**40):
        monkeypatch.setattr(memory, "SMALL", small)
        plan = plan_of(graph, weights, ISA[0])
        made.append(run_program(Program(plan, ISAS[ISA[0]]), plan, images)[0].logits)
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize(("floats", "unit"), [(1, 64), (16, 64), (2**20 - 1, 64), (2**20, 2**21), (2**20 + 1, 2**21)])
def test_memory_begins_with_a_cache_line_or_a_huge_page_and_takes_whole_ones(floats: int, unit: int) -> None:
    array = memory.aligned(floats)
    assert array.shape == (floats,)
    assert not array.any()
    assert array.ctypes.data % unit == 0
    assert memory.held(array) % unit == 0
    assert 4 * floats + unit <= memory.held(array) < 4 * floats + 2 * unit


def guarded(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "guarded.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_nothing_beyond_the_ends_is_touched() -> None:
    done = guarded(",".join(ISA), EXAMPLES)
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode != -signal.SIGSEGV, f"memory was left, running: {last}"
    assert done.returncode == 0, f"{done.stderr}\nrunning: {last}"


def test_guard_pages_notice_a_workspace_that_is_too_short() -> None:
    assert guarded(ISA[0], 3, 2000).returncode == -signal.SIGSEGV
