"""Which nodes make one step of the plan, and in which order the steps run.

Convolutions, pools and layer norms start a step; the pointwise nodes that follow are fused into it as far as each value
has one reader.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from manidp.graph import Add, BatchNorm, Conv, Elementwise, Graph, LayerNorm, Multiply, Node, Pool

POINTWISE = (BatchNorm, Elementwise, Add, Multiply)
_LIMIT = 16  # nodes that one step may go on with: each makes the code of its inner loop longer


@dataclass
class Task:
    """A node that starts a step and the pointwise nodes fused into it, those ``before`` it on what it reads."""

    start: Node
    gated: bool  # whether a gate scales one of its nodes
    fused: list[Node] = field(default_factory=list)
    before: tuple[Node, ...] = ()

    @property
    def name(self) -> str:
        return self.nodes[-1].name

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.start, *self.fused)

    @property
    def reads(self) -> list[str]:
        """The values that its nodes read, as often as they do."""
        return [source for node in (*self.before, *self.nodes) for source in node.inputs]


def tasks_of(graph: Graph) -> list[Task]:
    """The graph as tasks, each after those that it needs."""
    return _ordered(graph, _fused(graph))


def absorbed(graph: Graph, tasks: list[Task], does: Callable[[Conv, Node], bool]) -> list[Task]:
    """The tasks without those that a convolution does on what it reads: it alone reads what they make of one map.

    ``does``: whether a convolution is to do what begins with this node. No gate may have a part in them.
    """
    made: dict[str, Task] = {}
    for task in tasks:
        start = task.start
        before = made.get(start.inputs[0]) if isinstance(start, Conv) else None
        if before and isinstance(start, Conv) and _of_one_map(graph, before) and does(start, before.start):
            task.before = before.nodes
            del made[before.name]
        made[task.name] = task
    return list(made.values())


def _of_one_map(graph: Graph, task: Task) -> bool:
    """Whether a task makes elements of one map and factors of its channels, for one reader and no gate."""
    inside = {node.name for node in task.nodes}
    maps = [name for name in task.reads if name not in inside and len(graph.shapes[name]) == 3]
    free = not task.gated and gate_to_skip(graph, task) is None and task.start.name not in graph.wanted
    first, *rest = task.nodes
    pointwise = isinstance(first, (Conv, *POINTWISE)) and all(isinstance(node, POINTWISE) for node in rest)
    return pointwise and free and len(maps) == 1 and len(graph.readers[task.name]) == 1


def gate_to_skip(graph: Graph, task: Task) -> str | None:
    """The gate whose closed channels the start of a task need not compute."""
    return graph.select_of(task.start) or graph.wanted_by.get(task.start.name)


def _deciding(graph: Graph, task: Task) -> list[str]:
    """The gates that must have decided before the task starts."""
    gate, wanted = gate_to_skip(graph, task), graph.wanted.get(task.start.name)
    if gate is not None or wanted is None:
        return [gate] if gate is not None else []
    return [name for name, numbers in graph.gate_numbers.items() if np.isin(numbers, wanted).any()]


def _fused(graph: Graph) -> list[Task]:
    tasks: dict[str, Task] = {}  # by the value that ends them, in the order of the graph
    place: dict[str, int] = {}  # of every value in the graph
    for node in graph.nodes:
        place[node.name] = len(place)
        gated = graph.select_of(node) is not None
        value = _fusible(graph, node, tasks, place)
        if value is None:
            tasks[node.name] = Task(node, gated)
        else:
            task = tasks[node.name] = tasks.pop(value)
            task.fused.append(node)
            task.gated |= gated
    return list(tasks.values())


def _fusible(graph: Graph, node: Node, tasks: Mapping[str, Task], place: Mapping[str, int]) -> str | None:
    """The input of a pointwise node whose step may go on with it: a gated one if there is one, else the latest."""
    if not isinstance(node, POINTWISE) or len(graph.shapes[node.name]) != 3:
        return None
    per_channel_factor = isinstance(node, Multiply) and len(graph.shapes[node.inputs[1]]) == 1
    found: list[tuple[bool, int, str]] = []
    for name in node.inputs[:1] if per_channel_factor else node.inputs:
        task = tasks.get(name)
        if (
            task is not None
            and node.inputs.count(name) == 1
            and len(graph.readers[name]) == 1
            and isinstance(task.start, (Conv, Pool, LayerNorm, *POINTWISE))
            and len(task.fused) < _LIMIT
        ):
            found.append((task.gated, place[name], name))
    return max(found)[2] if found else None


def _ordered(graph: Graph, tasks: list[Task]) -> list[Task]:
    """As given, but each after the steps and the gate that it needs."""
    makes = {node.name: index for index, task in enumerate(tasks) for node in task.nodes}
    readers: list[list[int]] = [[] for _ in tasks]
    missing: list[int] = []
    for index, task in enumerate(tasks):
        sources = task.reads + _deciding(graph, task)
        needed = {makes[source] for source in sources} - {index}
        missing.append(len(needed))
        for other in needed:
            readers[other].append(index)
    ready = [index for index, number in enumerate(missing) if not number]
    ordered: list[Task] = []
    while ready:
        first = heapq.heappop(ready)
        ordered.append(tasks[first])
        for index in readers[first]:
            missing[index] -= 1
            if not missing[index]:
                heapq.heappush(ready, index)
    assert len(ordered) == len(tasks), "a gate depends on what it gates"
    return ordered
