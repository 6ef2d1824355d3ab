"""From a graph and its weights to a plan: what to run, in which order, on which channels, and where everything lies.

Which channels a step may leave out comes from ``Graph.wanted`` and ``Graph.zeroed`` alone, which kernel computes a
convolution from ``manidp.engine.choice``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np

from manidp.engine import vectors
from manidp.engine.choice import Choice
from manidp.engine.draft import Array, Draft
from manidp.engine.fusion import POINTWISE, Task, absorbed, gate_to_skip, tasks_of
from manidp.engine.ir import FLOAT, Element
from manidp.engine.kernels.convolution import Packed
from manidp.engine.kernels.copies import ClearGaps, FlattenMap, LoadImage, MoveChannels, Relayout
from manidp.engine.kernels.gather import Each
from manidp.engine.kernels.matrix import MultiplyMatrices
from manidp.engine.kernels.norm import NormaliseMap
from manidp.engine.kernels.pointwise import Pointwise
from manidp.engine.kernels.vector import VectorOp
from manidp.engine.memory import place
from manidp.engine.steps import Channels, Epilogue, MapKey, Op, Plan, Step, VectorKey, applied, window_of
from manidp.errors import UnsupportedError
from manidp.graph import (
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Pool,
    PReLU,
    Scatter,
    Select,
    Shuffle,
    Slice,
)


def make_plan(
    graph: Graph,
    weights: Mapping[str, Array],
    *,
    lanes: int,
    element: Element = FLOAT,
    scale: Array,
    shift: Array,
    reuse: bool = True,
) -> Plan:
    """The plan for vectors of ``lanes`` elements.

    Byte images are normalised by ``scale`` * byte + ``shift``, both (C,).
    ``reuse=False`` stores every map and gives each its own memory, for comparing layer by layer.
    Raises UnsupportedError naming the node that cannot be run.
    """
    return _Planner(graph, weights, lanes, element, reuse).plan(scale, shift)


class _Planner:
    def __init__(self, graph: Graph, weights: Mapping[str, Array], lanes: int, element: Element, reuse: bool) -> None:
        self.graph, self.lanes, self.element, self.reuse = graph, lanes, element, reuse
        self.draft = Draft(graph, weights, lanes)
        self.phases: dict[str, int] = {}  # of each map as its step stores it
        self.copied: set[MapKey] = set()
        self.in_place: dict[MapKey, MapKey] = {}  # a map -> the one whose memory it takes, which has its own
        self.within: dict[MapKey, tuple[MapKey, int]] = {}  # a map that is channels of another, from this one on
        self.taken: set[MapKey] = set()  # maps whose memory another one takes in place
        self.wholes: set[MapKey] = set()  # maps of which others are channels
        self.choice = Choice(graph, lanes, element)
        self.tasks = tasks_of(graph)
        if reuse:
            self.tasks = absorbed(graph, self.tasks, self.choice.does)
        self.last_read = {source: index for index, task in enumerate(self.tasks) for source in task.reads}

    def plan(self, scale: Array, shift: Array) -> Plan:
        for index, task in enumerate(self.tasks):
            self._lower(index, task)
        maps, places, workspace, cleared = place(
            self.graph, self.draft.steps, self.draft.vectors, self.in_place, self.within, self.lanes, self.element,
            self.reuse,
        )  # fmt: skip
        for index, key in sorted(cleared, key=lambda item: item[0], reverse=True):
            self.draft.steps.insert(index, ClearGaps(key))
        most = max(shape[0] for shape in self.graph.shapes.values() if len(shape) == 3)
        return Plan(
            graph=self.graph,
            lanes=self.lanes,
            steps=tuple(self.draft.steps),
            maps=maps,
            vectors=places,
            everything=self.draft.constants.add(np.arange(most + 1, dtype=np.int32)),
            scale=self.draft.constants.add(scale, owner="preprocessing"),
            shift=self.draft.constants.add(shift, owner="preprocessing"),
            constants=self.draft.constants.joined(),
            workspace=workspace,
        )

    # One step after the other

    def _lower(self, index: int, task: Task) -> None:
        node, shape = task.start, self.graph.shapes[task.start.name]
        match node:
            case Input():
                self.phases[node.name] = self._preferred(node)
                self.draft.steps.append(LoadImage(MapKey(node.name, self.phases[node.name])))
                self._pool_stored(node.name)
            case Conv():
                self._convolve(index, task, node)
            case Pool():
                source = self._read(node.inputs[0], window_of(node).stride)
                self._finish(index, task, 1, lambda channels, epilogue: Pointwise(source, node, channels, epilogue))
            case LayerNorm() if len(shape) == 3:
                source = self._read(node.inputs[0], 1)
                gamma, beta = (self.draft.weight(node, part) for part in ("gamma", "beta"))
                pairs = self.draft.parameter(node, np.stack([gamma, beta], axis=1))
                self._finish(
                    index, task, 1,
                    lambda channels, epilogue: NormaliseMap(source, channels, epilogue, node.eps, pairs),
                )  # fmt: skip
            case Concat() if len(shape) == 3:
                self._concat(node)
            case Select():
                vectors.select(self.draft, node)
            case Slice() | Shuffle() | Scatter() if len(shape) == 3:
                self._move(node)
            case GlobalPool():
                frame = MapKey(node.inputs[0], self.phases[node.inputs[0]])
                vectors.reduce_pooled(self.draft, frame, node.kind, VectorKey(node.name))
            case Linear():
                bias = self.draft.weight(node, "bias") if node.bias else np.zeros(node.features)
                vectors.multiply(self.draft, node, self.draft.weight(node, "weight"), bias)
            case Flatten():
                target = self.draft.vector(VectorKey(node.name), shape[0])
                if len(self.graph.shapes[node.inputs[0]]) == 1:
                    self.draft.steps.append(VectorOp("copy", VectorKey(node.inputs[0]), target, shape[0]))
                else:
                    self.draft.steps.append(FlattenMap(self._read(node.inputs[0], 1), target))
            case _ if len(shape) == 3:
                phases = self.phases[node.inputs[0]]
                source = self._read(node.inputs[0], phases)
                self._finish(
                    index, task, phases, lambda channels, epilogue: Pointwise(source, None, channels, epilogue)
                )
            case _:
                vectors.elementwise(self.draft, node)

    def _convolve(self, index: int, task: Task, node: Conv) -> None:
        kernel = self.choice.of(node)
        packed = self._packed(task, node)
        inputs = self.draft.channels(node.inputs[0], "read")
        phases_in, phases_out = kernel.phases(node)
        first = Task(task.before[0], False, list(task.before[1:])) if task.before else None
        source = self._read(first.start.inputs[0] if first else node.inputs[0], phases_in)
        each = Each(first.start, self._packed(first, first.start)) if first and isinstance(first.start, Conv) else None

        def step(channels: Channels, epilogue: Epilogue) -> Step:
            made = kernel.step(node, source, packed, inputs, channels, epilogue)
            if first and isinstance(made, MultiplyMatrices):
                return replace(made, before=tuple(op for _, op in self._ops(first, phases_in)), each=each)
            return made

        self._finish(index, task, phases_out, step)

    def _packed(self, task: Task, node: Conv) -> Packed:
        """The constants of a convolution, a batch norm behind it folded in."""
        kernel, owner = self.choice.of(node), f"node '{node.name}'"
        weight = self.draft.weight(node, "weight")
        bias = self.draft.weight(node, "bias").astype(np.float64) if node.bias else np.zeros(node.channels)
        if task.fused and isinstance(task.fused[0], BatchNorm):
            scale, shift = self.draft.affine(task.fused[0])
            weight, bias = np.multiply(weight, scale[:, None, None, None], dtype=np.float64), bias * scale + shift
        with np.errstate(over="ignore"):  # ``Constants`` refuses what is too large, and says whose
            rows = kernel.pack(weight, self.element, self.lanes)
        at = self.draft.constants.add(rows, self.element, owner)
        return Packed(at, rows.shape[1], self.draft.constants.add(bias, owner=owner))

    def _finish(self, index: int, task: Task, phases: int, step: Callable[[Channels, Epilogue], Step]) -> None:
        """Emit the step, and the one that does the rest for channels whose gate is closed."""
        name, channels = task.name, self.graph.shapes[task.name][0]
        key, gate = MapKey(name, phases), gate_to_skip(self.graph, task)
        self.phases[name] = phases
        ops = self._ops(task, phases)
        cut = next((i for i, (node, _) in enumerate(ops) if gate and self.graph.select_of(node) == gate), None)
        tail = [] if cut is None else ops[cut + 1 :]
        stored = not self.reuse or self._stored(name)
        residual = self._overwritten(index, task, ops)
        if residual:
            self.in_place[key] = self.in_place.get(residual, residual)
            self.taken.add(self.in_place[key])
        untouched = residual is not None and self._changes_nothing(task, residual, tail)
        made = Channels(channels, VectorKey(gate, "list")) if gate else self.draft.channels(task.start.name, "made")
        closed = replace(made, closed=True)
        completed = cut is not None and not untouched and (tail or self._needs_zeros(name))
        left = None if untouched or completed or made.kept is None else closed
        for kind in self.draft.pooled_kinds(name):
            if residual and untouched:
                self.draft.pooled[VectorKey(name, kind)] = self.draft.pooled[VectorKey(residual.node, kind)]
            else:
                self.draft.partial_sums(name, kind)
            self.draft.reset_sums(key, kind, made if untouched else Channels(channels), left)
        epilogue = Epilogue(key, tuple(op for _, op in ops), stored, pooled=self.draft.pooled_sums(name))
        self.draft.steps.append(step(made, epilogue))
        if completed:
            self.draft.steps.append(Pointwise(None, None, closed, replace(epilogue, ops=tuple(op for _, op in tail))))

    def _ops(self, task: Task, phases: int) -> list[tuple[Node, Op]]:
        ops: list[tuple[Node, Op]] = []
        nodes = task.nodes if isinstance(task.start, POINTWISE) else task.fused
        folded = isinstance(task.start, Conv) and nodes and isinstance(nodes[0], BatchNorm)
        done = {task.start.name} if nodes is task.fused else set()
        first = None if done else task.start.inputs[0]
        for node in nodes:
            others = [source for source in node.inputs if source not in done]
            if first is not None:  # the step starts by loading this one
                others.remove(first)
                first = None
            done.add(node.name)
            if isinstance(node, BatchNorm):
                if not (folded and node is nodes[0]):
                    pairs = np.stack(self.draft.affine(node), axis=1)
                    ops.append((node, Op("affine", self.draft.parameter(node, pairs))))
            elif isinstance(node, PReLU):
                ops.append((node, Op("prelu", self.draft.parameter(node, self.draft.weight(node, "slope")))))
            elif (function := applied(node)) is not None:
                ops.append((node, Op("apply", function)))
            elif isinstance(node, Multiply) and len(self.graph.shapes[others[0]]) == 1:
                ops.append((node, Op("scale", VectorKey(others[0]))))
            elif isinstance(node, (Add, Multiply)):
                kind: Literal["add", "multiply"] = "add" if isinstance(node, Add) else "multiply"
                ops += [(node, Op(kind, self._read(other, phases))) for other in others]
            else:
                raise UnsupportedError(f"{node}: the engine does not run it on maps")
        return ops

    def _stored(self, name: str) -> bool:
        """Whether anything reads a map itself rather than its pooled sums."""
        return any(not isinstance(reader, GlobalPool) for reader in self.graph.readers[name])

    def _needs_zeros(self, name: str) -> bool:
        """Whether a reader of a gated map looks at closed channels, too."""
        return any(self._reads_closed(reader, name) for reader in self.graph.readers[name])

    def _reads_closed(self, reader: Node, name: str) -> bool:
        if isinstance(reader, Conv) and not self.choice.of(reader).skips_inputs:
            return self.graph.wanted_by.get(reader.name) != self.graph.zeroed_by.get(name)
        return not isinstance(reader, Conv) and not (isinstance(reader, GlobalPool) and reader.kind == "average")

    def _overwritten(self, index: int, task: Task, ops: list[tuple[Node, Op]]) -> MapKey | None:
        """A map to add whose memory the result may take: nothing reads it later, and the step reads it only here."""
        if not self.reuse:
            return None
        for node, op in ops:
            if isinstance(node, Add) and isinstance(op.operand, MapKey):
                value = op.operand.node
                shared = op.operand in self.within or op.operand in self.wholes
                if self.last_read[value] == index and task.reads.count(value) == 1 and not shared:
                    return op.operand
        return None

    def _changes_nothing(self, task: Task, residual: MapKey, tail: list[tuple[Node, Op]]) -> bool:
        """Whether a closed channel of the result is what ``residual`` already holds, pooled sums included."""
        if not tail or tail[0][1] != Op("add", residual) or residual.phases != self.phases[residual.node]:
            return False
        rest = [op for _, op in tail[1:]]
        same = not rest or (rest == [Op("apply", ("relu", ()))] and residual.node in self.nonnegative)
        return same and all(
            VectorKey(residual.node, kind) in self.draft.pooled for kind in self.draft.pooled_kinds(task.name)
        )

    @cached_property
    def nonnegative(self) -> Set[str]:
        """The values that cannot be negative."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if node.nonnegative(*(source in found for source in node.inputs)):
                found.add(node.name)
        return found

    def _concat(self, node: Concat) -> None:
        phases = self.phases[node.inputs[0]]
        self.phases[node.name] = phases
        whole, first = MapKey(node.name, phases), 0
        self.draft.pool_anew(whole)
        for source in node.inputs:
            part, channels = self._read(source, phases), self.graph.shapes[source][0]
            if self._can_lie_within(part, node):
                self.within[part] = whole, first
                self.wholes.add(whole)
            else:
                epilogue = Epilogue(whole, first_channel=first, pooled=self.draft.pooled_sums(node.name))
                self.draft.steps.append(Pointwise(part, None, Channels(channels), epilogue))
            first += channels

    def _can_lie_within(self, part: MapKey, node: Concat) -> bool:
        """Whether a map may lie where it is to be put, so that nothing is copied: its memory is not another's already.

        Where all pooled sums of the concatenation are made on the way, it is copied.
        """
        another = part in self.within or part in self.in_place or part in self.taken
        return self.reuse and not another and not self.draft.pooled_kinds(node.name)

    def _move(self, node: Node) -> None:
        source = self._read(node.inputs[0], self.phases[node.inputs[0]])
        self.phases[node.name] = source.phases
        places = node.origin(*self.graph.input_shapes(node)).astype(np.int32)
        self.draft.steps.append(
            MoveChannels(source, MapKey(node.name, source.phases), len(places), self.draft.constants.add(places))
        )
        self._pool_stored(node.name)

    def _pool_stored(self, name: str) -> None:
        """Pooled sums of a map that its own step could not make on the way."""
        key, channels = MapKey(name, self.phases[name]), Channels(self.graph.shapes[name][0])
        self.draft.pool_anew(key)
        if self.draft.pooled_kinds(name):
            epilogue = Epilogue(key, stored=False, pooled=self.draft.pooled_sums(name))
            self.draft.steps.append(Pointwise(key, None, channels, epilogue))

    # Phases

    def _preferred(self, node: Node) -> int:
        """The number of phases that the first reader of a map wants."""
        for reader in self.graph.readers[node.name]:
            if isinstance(reader, Conv):
                return self.choice.of(reader).phases(reader)[0]
            if isinstance(reader, Pool):
                return window_of(reader).stride
        return 1

    def _read(self, name: str, phases: int) -> MapKey:
        """The map in as many phases, copied into them if it is stored in others."""
        stored = self.phases[name]
        key = MapKey(name, phases)
        if stored != phases and key not in self.copied:
            divides = max(stored, phases) % min(stored, phases) == 0
            source = MapKey(name, stored) if divides else self._read(name, 1)
            gate = self.graph.wanted_by.get(name)
            if gate is None and not self._needs_zeros(name):
                gate = self.graph.zeroed_by.get(name)
            kept = None if gate is None else VectorKey(gate, "list")
            self.draft.steps.append(Relayout(source, key, Channels(self.graph.shapes[name][0], kept)))
            self.copied.add(key)
        return key
