"""From a graph and its weights to a plan: what to run, in which order, on which channels, and where everything lies.

Feature maps lie channel by channel in *phases*: with S phases, element (y, x) of a channel is found in phase
(y mod S, x mod S) at row y // S, column x // S. A strided convolution reads S = stride, a Winograd convolution reads
and writes S = side of its tiles of outputs, so that both load neighbouring outputs' inputs from neighbouring addresses.
Between the planes lie gaps of zeros, which serve as the padding above and below; nothing ever writes to them.

Convolutions and pools start a step; the pointwise nodes that follow are fused into it as far as each value has one
reader. Which channels a step may leave out comes from ``Graph.wanted_by`` and ``Graph.zeroed_by`` alone.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Element
from manidp.errors import UnsupportedError
from manidp.graph import (
    Activation,
    ActivationKind,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Node,
    Pool,
    PoolKind,
    Scatter,
    Select,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class MapKey:
    """A feature map: the node whose value it is, and the number of phases that it lies in."""

    node: str
    phases: int


@dataclass(frozen=True)
class Vector:
    """A vector in the workspace: what it holds, and of which node.

    A node's name comes from a file and may be any string. It never names a vector by itself, so no file can make one
    stand for another.
    """

    node: str
    part: Literal["value", "average", "max", "mean", "hidden", "saliency", "list"] = "value"


@dataclass(frozen=True)
class Winograd:
    """F(m x m, 3x3): output = at [(g weight g') * (bt input bt')] at' on tiles of m outputs and m + 2 inputs a side.

    The m + 2 points come in pairs x, -x first, 0 and infinity last: rows (columns of ``at``) of a pair differ only in
    signs, so that what belongs to a pair is made of one sum and one difference.
    """

    bt: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    at: tuple[tuple[float, ...], ...]

    @property
    def points(self) -> int:
        """Points a side, so that points^2 products make m^2 outputs."""
        return len(self.bt)


WINOGRAD = {
    2: Winograd(
        bt=((0, 1, 1, 0), (0, -1, 1, 0), (1, 0, -1, 0), (0, -1, 0, 1)),
        g=((1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (1, 0, 0), (0, 0, 1)),
        at=((1, 1, 1, 0), (1, -1, 0, 1)),
    ),
    4: Winograd(
        bt=(
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (4, 0, -5, 0, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        g=(
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (1 / 4, 0, 0),
            (0, 0, 1),
        ),
        at=((1, 1, 1, 1, 1, 0), (1, -1, 2, -2, 0, 0), (1, 1, 4, 4, 0, 0), (1, -1, 8, -8, 0, 1)),
    ),
}


@dataclass(frozen=True)
class Layout:
    """How one channel lies in memory: ``phases``^2 planes of ``rows`` x ``pitch``, a gap of zeros after each."""

    height: int
    width: int
    phases: int
    pitch: int
    plane: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.phases)

    @property
    def channel(self) -> int:
        return self.phases**2 * self.plane

    def valid(self, phase: int) -> tuple[int, int]:
        """Rows and columns of a phase that belong to the map."""
        row, column = divmod(phase, self.phases)
        return -(-(self.height - row) // self.phases), -(-(self.width - column) // self.phases)

    def reach(self, offset: int) -> tuple[int, int]:
        """Phase row (or column) and shift at which the element ``offset`` before or after a tile's first lies."""
        shift, phase = divmod(offset, self.phases)
        return phase, shift


@dataclass(frozen=True)
class Map:
    """A feature map in the workspace: ``at`` is the offset of its first element in floats."""

    at: int
    channels: int
    layout: Layout


@dataclass(frozen=True)
class Op:
    """One fused pointwise operation; ``operand``: an activation, limits, a vector, a constant's offset or a map."""

    kind: Literal["activate", "clip", "scale", "affine", "add", "multiply"]  # affine: scale and shift
    operand: ActivationKind | tuple[float, float] | Vector | int | MapKey


@dataclass(frozen=True)
class Finish:
    """What becomes of a value that was just computed: operations, where it is stored, which pooled sums it feeds."""

    frame: MapKey  # the map whose layout it has
    ops: tuple[Op, ...] = ()
    stored: bool = True
    first_channel: int = 0
    pooled: tuple[Vector, ...] = ()  # partial sums ('average') or maxima ('max')


@dataclass(frozen=True)
class Channels:
    """The channels that a loop visits: ``count`` in all, or those that a gate keeps (or closes)."""

    count: int
    gate: str | None = None
    closed: bool = False


@dataclass(frozen=True)
class Window:
    """What walks over a map: the kernel's side, the stride and the padding, the same in both directions."""

    kernel: int
    stride: int
    padding: int


def window_of(node: Conv | Pool) -> Window:
    """Raises UnsupportedError for one that is not square."""
    if node.square and isinstance(node.kernel, int) and isinstance(node.stride, int) and isinstance(node.padding, int):
        return Window(node.kernel, node.stride, node.padding)
    raise UnsupportedError(
        f"node '{node.name}': the engine runs square kernels with one stride, one padding and no dilation; it has "
        f"kernel {node.kernel}, stride {node.stride}, padding {node.padding}, dilation {node.spread}"
    )


@dataclass(frozen=True)
class LoadImage:
    """The image, normalised if it comes as bytes."""

    target: MapKey


@dataclass(frozen=True)
class Relayout:
    """Copy a map into another number of phases."""

    source: MapKey
    target: MapKey
    channels: Channels


@dataclass(frozen=True)
class Convolve:
    """A convolution and what follows it; ``weights`` and ``bias`` are offsets among the constants.

    The weights of one output are ``row`` elements behind those of the one before.
    ``winograd`` is the side of its tiles of outputs, 0 for a direct convolution.
    """

    node: Conv
    source: MapKey
    winograd: int
    weights: int
    row: int
    bias: int
    inputs: Channels
    outputs: Channels
    finish: Finish


@dataclass(frozen=True)
class Pointwise:
    """``source`` (None: zeros) through ``pool`` (None: as it is) and ``finish``."""

    source: MapKey | None
    pool: Pool | None
    channels: Channels
    finish: Finish


@dataclass(frozen=True)
class ResetPooled:
    """Pooled sums of some channels back to where they start."""

    pooled: Vector
    channels: Channels


@dataclass(frozen=True)
class Unpool:
    """Partial sums (or maxima) of a map to one number a channel."""

    pooled: Vector
    target: Vector
    channels: int
    factor: float


@dataclass(frozen=True)
class MatVec:
    """target = weights @ source + bias; the weights lie transposed, rows padded to whole vectors."""

    source: Vector
    target: Vector
    inputs: int
    outputs: int
    weights: int
    bias: int


@dataclass(frozen=True)
class VectorOp:
    """target = op(source, operand) on vectors; kind: an activation, 'clip', 'add', 'multiply', 'copy' at ``offset``."""

    kind: ActivationKind | Literal["clip", "add", "multiply", "copy"]
    source: Vector
    target: Vector
    size: int
    operand: Vector | None = None
    offset: int = 0
    limits: tuple[float, float] = (0.0, 0.0)  # of 'clip'


@dataclass(frozen=True)
class Decide:
    """Scores -> factors of a gate, and the lists of kept and closed channels; ``limit``: offset of what scores exceed.

    For a constant rule, the scores that are compared are the mask, and the limit is 0.
    """

    gate: Select
    scores: Vector
    channels: int
    limit: int
    mask: int | None = None


@dataclass(frozen=True)
class ScatterMap:
    """Channels of a map put among zeros; ``places``: offset of int32s, the source of each channel, -1 for zeros."""

    source: MapKey
    target: MapKey
    channels: int
    places: int


@dataclass(frozen=True)
class FlattenMap:
    """A map as a vector, channel by channel and row by row."""

    source: MapKey
    target: Vector


Step = (
    LoadImage | Relayout | Convolve | Pointwise | ResetPooled | Unpool | MatVec | VectorOp | Decide | ScatterMap
    | FlattenMap
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything the generator needs. Offsets are in floats (4 bytes), in the workspace or among the constants.

    Maps and the weights of convolutions are made of the elements that the plan was made for, all else of floats.
    """

    graph: Graph
    lanes: int
    steps: tuple[Step, ...]
    maps: Mapping[MapKey, Map]
    vectors: Mapping[Vector, int]  # vectors, partial sums, lists (int32: kept from the front, closed from the back)
    constants: NDArray[np.float32]
    everything: int  # offset among the constants of the int32 list 0, 1, 2, ...
    scale: int  # offsets of what byte images are multiplied by, channel by channel, and of what is then added
    shift: int
    workspace: int  # floats


@dataclass
class _Constants:
    """Arrays laid one after the other, each at a multiple of 16 floats."""

    parts: list[NDArray[np.float32]] = field(default_factory=list)
    size: int = 0

    def add(self, array: NDArray[Any], element: Element = FLOAT) -> int:
        flat = np.ascontiguousarray(array).reshape(-1)
        flat = flat if flat.dtype == np.int32 else flat.astype(f"f{element.size}")
        at = self.size
        self.parts.append(np.pad(flat, (0, -len(flat) % (64 // flat.itemsize))).view(np.float32))
        self.size += len(self.parts[-1])
        return at


@dataclass
class _Task:
    """A node that starts a step and the pointwise nodes fused into it."""

    start: Node
    gated: bool  # whether a gate scales one of its nodes
    fused: list[Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.nodes[-1].name

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.start, *self.fused)


_POINTWISE = (BatchNorm, Activation, Clip, Add, Multiply)
_KERNEL_LIMIT, _STRIDE_LIMIT, _WINDOW_LIMIT = 7, 8, 8
_FUSED_LIMIT = 16  # nodes that one step may go on with: each makes the code of its inner loop longer


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
        self.graph, self.weights, self.lanes, self.element, self.reuse = graph, weights, lanes, element, reuse
        self.steps: list[Step] = []
        self.constants = _Constants()
        self.vectors: dict[Vector, int] = {}  # sizes in floats
        self.phases: dict[str, int] = {}  # of each map as its step stores it
        self.copied: set[MapKey] = set()
        self.in_place: dict[MapKey, MapKey] = {}  # a map -> the one whose memory it takes, which has its own
        self.pooled: dict[Vector, Vector] = {}  # partial sums of a value -> the vector that holds them
        self.tasks = self._ordered(self._fused())
        self.last_read = {
            source: index for index, task in enumerate(self.tasks) for node in task.nodes for source in node.inputs
        }

    def plan(self, scale: Array, shift: Array) -> Plan:
        for index, task in enumerate(self.tasks):
            self._emit(index, task)
        maps, vectors, workspace = _place(
            self.graph, self.steps, self.vectors, self.in_place, self.lanes, self.element, self.reuse
        )
        most = max(shape[0] for shape in self.graph.shapes.values() if len(shape) == 3)
        return Plan(
            graph=self.graph,
            lanes=self.lanes,
            steps=tuple(self.steps),
            maps=maps,
            vectors=vectors,
            everything=self.constants.add(np.arange(most + 1, dtype=np.int32)),
            scale=self._constant("preprocessing", scale),
            shift=self._constant("preprocessing", shift),
            constants=np.concatenate(self.constants.parts),
            workspace=workspace,
        )

    # Which nodes make one step, and in which order the steps run

    def _fused(self) -> list[_Task]:
        tasks: dict[str, _Task] = {}  # by the value that ends them, in the order of the graph
        place: dict[str, int] = {}  # of every value in the graph
        for node in self.graph.nodes:
            place[node.name] = len(place)
            gated = self._gate_of(node) is not None
            value = self._fusible(node, tasks, place)
            if value is None:
                tasks[node.name] = _Task(node, gated)
            else:
                task = tasks[node.name] = tasks.pop(value)
                task.fused.append(node)
                task.gated |= gated
        return list(tasks.values())

    def _fusible(self, node: Node, tasks: Mapping[str, _Task], place: Mapping[str, int]) -> str | None:
        """The input of a pointwise node whose step may go on with it: a gated one if there is one, else the latest."""
        if not isinstance(node, _POINTWISE) or len(self.graph.shapes[node.name]) != 3:
            return None
        per_channel_factor = isinstance(node, Multiply) and len(self.graph.shapes[node.inputs[1]]) == 1
        found: list[tuple[bool, int, str]] = []
        for name in node.inputs[:1] if per_channel_factor else node.inputs:
            task = tasks.get(name)
            if (
                task is not None
                and node.inputs.count(name) == 1
                and len(self.graph.readers[name]) == 1
                and isinstance(task.start, (Conv, Pool, *_POINTWISE))
                and len(task.fused) < _FUSED_LIMIT
            ):
                found.append((task.gated, place[name], name))
        return max(found)[2] if found else None

    def _gate_of(self, node: Node) -> str | None:
        """The gate that a Multiply scales its input by."""
        return self.graph.select_of(node)

    def _ordered(self, tasks: list[_Task]) -> list[_Task]:
        """As given, but each after the steps and the gate that it needs."""
        makes = {node.name: index for index, task in enumerate(tasks) for node in task.nodes}
        readers: list[list[int]] = [[] for _ in tasks]
        missing: list[int] = []
        for index, task in enumerate(tasks):
            gate = self._wanted(task)
            sources = [source for node in task.nodes for source in node.inputs] + ([gate] if gate else [])
            needed = {makes[source] for source in sources} - {index}
            missing.append(len(needed))
            for other in needed:
                readers[other].append(index)
        ready = [index for index, number in enumerate(missing) if not number]
        ordered: list[_Task] = []
        while ready:
            first = heapq.heappop(ready)
            ordered.append(tasks[first])
            for index in readers[first]:
                missing[index] -= 1
                if not missing[index]:
                    heapq.heappush(ready, index)
        assert len(ordered) == len(tasks), "a gate depends on what it gates"
        return ordered

    def _wanted(self, task: _Task) -> str | None:
        """The gate whose closed channels the start of a step need not compute."""
        return self._gate_of(task.start) or self.graph.wanted_by.get(task.start.name)

    # One step after the other

    def _emit(self, index: int, task: _Task) -> None:
        node, shape = task.start, self.graph.shapes[task.start.name]
        match node:
            case Input():
                self.phases[node.name] = self._preferred(node)
                self.steps.append(LoadImage(MapKey(node.name, self.phases[node.name])))
                self._pool_stored(node.name)
            case Conv():
                self._convolve(index, task, node)
            case Pool():
                window = window_of(node)
                if max(window.kernel, window.stride) > _WINDOW_LIMIT:
                    limit = f"windows and strides up to {_WINDOW_LIMIT} can be pooled"
                    raise UnsupportedError(f"node '{node.name}': {limit}; it has {window.kernel} and {window.stride}")
                source = self._read(node.inputs[0], window.stride)
                self._finish(index, task, 1, lambda channels, finish: Pointwise(source, node, channels, finish))
            case Concat() if len(shape) == 3:
                self._concat(node)
            case Select():
                self._select(node)
            case Scatter() if len(shape) == 3:
                self._scatter(node)
            case GlobalPool():
                self._unpool(Vector(node.inputs[0], node.kind), Vector(node.name))
            case Linear():
                weight = self._weight(node, "weight")
                bias = self._weight(node, "bias") if node.bias else np.zeros(node.features)
                self._matvec(Vector(node.inputs[0]), Vector(node.name), weight, bias)
            case Flatten():
                target = self._vector(Vector(node.name), shape[0])
                if len(self.graph.shapes[node.inputs[0]]) == 1:
                    self.steps.append(VectorOp("copy", Vector(node.inputs[0]), target, shape[0]))
                else:
                    self.steps.append(FlattenMap(self._read(node.inputs[0], 1), target))
            case _ if len(shape) == 3:
                phases = self.phases[node.inputs[0]]
                source = self._read(node.inputs[0], phases)
                self._finish(index, task, phases, lambda channels, finish: Pointwise(source, None, channels, finish))
            case _:
                self._vector_op(node)

    def _convolve(self, index: int, task: _Task, node: Conv) -> None:
        window = window_of(node)
        if window.kernel > _KERNEL_LIMIT or window.stride > _STRIDE_LIMIT:
            raise UnsupportedError(
                f"node '{node.name}': kernels up to {_KERNEL_LIMIT}x{_KERNEL_LIMIT} and strides up to {_STRIDE_LIMIT} "
                f"can be run; it has kernel {window.kernel}, stride {window.stride}"
            )
        weight = self._weight(node, "weight").astype(np.float64)
        bias = self._weight(node, "bias").astype(np.float64) if node.bias else np.zeros(node.channels)
        if task.fused and isinstance(task.fused[0], BatchNorm):
            scale, shift = self._affine(task.fused[0])
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        winograd = self._winograd(node)
        if winograd:
            way = WINOGRAD[winograd]
            points = weight.reshape(*weight.shape[:2], 9) @ np.kron(way.g, way.g).T  # the same as g weight g'
            points = points.reshape(*weight.shape[:2], way.points, way.points)
            # of each output point by point, column first, so that a tile reads as many streams as it has outputs;
            # in an odd number of cache lines, so that the streams do not fall into the same lines of the cache
            weight = points.transpose(0, 3, 2, 1).reshape(node.channels, -1)
            line = 64 // self.element.size
            weight = np.pad(weight, ((0, 0), (0, (-(-weight.shape[1] // line) | 1) * line - weight.shape[1])))
        name = f"node '{node.name}'"
        packed = self._constant(name, weight, self.element), weight[0].size, self._constant(name, bias)
        inputs = Channels(self.graph.shapes[node.inputs[0]][0], self.graph.zeroed_by.get(node.inputs[0]))
        phases = winograd or 1
        source = self._read(node.inputs[0], winograd or window.stride)
        self._finish(
            index,
            task,
            phases,
            lambda channels, finish: Convolve(node, source, winograd, *packed, inputs, channels, finish),
        )

    def _winograd(self, node: Conv) -> int:
        """The side of a tile's outputs that needs the fewest vectors of products; 0 if it cannot be Winograd's."""
        if (node.kernel, node.stride, node.padding, node.groups) != (3, 1, 1, 1):
            return 0

        def vectors(side: int) -> int:
            height, width = (-(-length // side) for length in self.graph.shapes[node.name][1:])
            return int(WINOGRAD[side].points ** 2 * -(-height * width // self.lanes))

        # the larger the tile, the more it amplifies rounding: too much for float16
        return min(WINOGRAD if self.element == FLOAT else (2,), key=vectors)

    def _finish(self, index: int, task: _Task, phases: int, step: Callable[[Channels, Finish], Step]) -> None:
        """Emit the step, and the one that does the rest for channels whose gate is closed."""
        name, channels = task.name, self.graph.shapes[task.name][0]
        key, gate = MapKey(name, phases), self._wanted(task)
        self.phases[name] = phases
        ops = self._ops(task, phases)
        cut = next((i for i, (node, _) in enumerate(ops) if gate and self._gate_of(node) == gate), None)
        tail = [] if cut is None else ops[cut + 1 :]
        stored = not self.reuse or self._stored(name)
        residual = self._overwritten(index, task, ops)
        if residual:
            self.in_place[key] = self.in_place.get(residual, residual)
        untouched = residual is not None and self._changes_nothing(task, residual, tail)
        for kind in self._pooled_kinds(name):
            if residual and untouched:
                self.pooled[Vector(name, kind)] = self.pooled[Vector(residual.node, kind)]
            else:
                self._partial_sums(name, kind, channels)
            reset = Channels(channels, gate if untouched else None)
            self.steps.append(ResetPooled(self.pooled[Vector(name, kind)], reset))
        finish = Finish(key, tuple(op for _, op in ops), stored, pooled=self._pooled_sums(name))
        self.steps.append(step(Channels(channels, gate), finish))
        if cut is not None and not untouched and (tail or self._needs_zeros(name)):
            closed = Channels(channels, gate, closed=True)
            self.steps.append(Pointwise(None, None, closed, replace(finish, ops=tuple(op for _, op in tail))))

    def _ops(self, task: _Task, phases: int) -> list[tuple[Node, Op]]:
        ops: list[tuple[Node, Op]] = []
        nodes = task.fused if isinstance(task.start, (Conv, Pool)) else task.nodes
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
                    affine = self._constant(f"node '{node.name}'", np.stack(self._affine(node), axis=1))
                    ops.append((node, Op("affine", affine)))
            elif isinstance(node, Activation):
                ops.append((node, Op("activate", node.kind)))
            elif isinstance(node, Clip):
                ops.append((node, Op("clip", (node.low, node.high))))
            elif isinstance(node, Multiply) and len(self.graph.shapes[others[0]]) == 1:
                ops.append((node, Op("scale", Vector(others[0]))))
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
        return any(
            not isinstance(reader, Conv) and not (isinstance(reader, GlobalPool) and reader.kind == "average")
            for reader in self.graph.readers[name]
        )

    def _overwritten(self, index: int, task: _Task, ops: list[tuple[Node, Op]]) -> MapKey | None:
        """A map to add whose memory the result may take: nothing reads it later, and the step reads it only here."""
        if not self.reuse:
            return None
        read = [source for node in task.nodes for source in node.inputs]
        for node, op in ops:
            if isinstance(node, Add) and isinstance(op.operand, MapKey):
                value = op.operand.node
                if self.last_read[value] == index and read.count(value) == 1:
                    return op.operand
        return None

    def _changes_nothing(self, task: _Task, residual: MapKey, tail: list[tuple[Node, Op]]) -> bool:
        """Whether a closed channel of the result is what ``residual`` already holds, pooled sums included."""
        if not tail or tail[0][1] != Op("add", residual) or residual.phases != self.phases[residual.node]:
            return False
        rest = [op for _, op in tail[1:]]
        same = not rest or (rest == [Op("activate", "relu")] and residual.node in self.nonnegative)
        return same and all(Vector(residual.node, kind) in self.pooled for kind in self._pooled_kinds(task.name))

    @cached_property
    def nonnegative(self) -> Set[str]:
        """The values that cannot be negative."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if isinstance(node, Activation):
                never = node.kind in ("relu", "relu6", "sigmoid", "hardsigmoid")
            elif isinstance(node, (Add, Multiply, Concat, Pool, GlobalPool)):
                never = found.issuperset(node.inputs)
            else:  # an open channel of a Select has a factor above 0
                never = isinstance(node, Select) or (isinstance(node, Clip) and node.low >= 0)
            if never:
                found.add(node.name)
        return found

    def _concat(self, node: Concat) -> None:
        phases = self.phases[node.inputs[0]]
        self.phases[node.name] = phases
        for kind in self._pooled_kinds(node.name):
            channels = self.graph.shapes[node.name][0]
            self._partial_sums(node.name, kind, channels)
            self.steps.append(ResetPooled(self.pooled[Vector(node.name, kind)], Channels(channels)))
        first = 0
        for source in node.inputs:
            finish = Finish(MapKey(node.name, phases), first_channel=first, pooled=self._pooled_sums(node.name))
            channels = self.graph.shapes[source][0]
            self.steps.append(Pointwise(self._read(source, phases), None, Channels(channels), finish))
            first += channels

    def _scatter(self, node: Scatter) -> None:
        source = self._read(node.inputs[0], self.phases[node.inputs[0]])
        self.phases[node.name] = source.phases
        target = MapKey(node.name, source.phases)
        self.steps.append(ScatterMap(source, target, node.channels, self.constants.add(_places(node))))
        self._pool_stored(node.name)

    # Pooled sums, gates and vectors

    def _pooled_kinds(self, name: str) -> list[PoolKind]:
        return sorted({reader.kind for reader in self.graph.readers[name] if isinstance(reader, GlobalPool)})

    def _pooled_sums(self, name: str) -> tuple[Vector, ...]:
        return tuple(self.pooled[Vector(name, kind)] for kind in self._pooled_kinds(name))

    def _partial_sums(self, name: str, kind: PoolKind, channels: int) -> None:
        sums = Vector(name, kind)
        self.pooled[sums] = self._vector(sums, channels * self.lanes)

    def _pool_stored(self, name: str) -> None:
        """Pooled sums of a map that its own step could not make on the way."""
        channels = Channels(self.graph.shapes[name][0])
        for kind in self._pooled_kinds(name):
            self._partial_sums(name, kind, channels.count)
            self.steps.append(ResetPooled(self.pooled[Vector(name, kind)], channels))
        if self._pooled_kinds(name):
            key = MapKey(name, self.phases[name])
            finish = Finish(key, stored=False, pooled=self._pooled_sums(name))
            self.steps.append(Pointwise(key, None, channels, finish))

    def _unpool(self, sums: Vector, target: Vector) -> None:
        channels, *size = self.graph.shapes[sums.node]
        factor = 1 / math.prod(size) if sums.part == "average" else 1.0
        self.steps.append(Unpool(self.pooled[sums], self._vector(target, channels), channels, factor))

    def _select(self, node: Select) -> None:
        (channels,) = self.graph.shapes[node.name]
        self._vector(Vector(node.name), channels)
        self._vector(Vector(node.name, "list"), 2 * channels + 1)
        limit = self.constants.add(self._weight(node, "threshold") if node.rule == "threshold" else np.zeros(1))
        mask = None if node.rule == "threshold" else self.constants.add(self._weight(node, "mask"))
        self.steps.append(Decide(node, Vector(node.inputs[0]), channels, limit, mask))

    def _matvec(self, source: Vector, target: Vector, weight: Array, bias: Array) -> None:
        outputs, inputs = weight.shape
        padding = (0, -outputs % self.lanes)
        self._vector(target, outputs)
        transposed = self.constants.add(np.pad(weight.T, ((0, 0), padding)))
        self.steps.append(
            MatVec(source, target, inputs, outputs, transposed, self.constants.add(np.pad(bias, padding)))
        )

    def _vector_op(self, node: Node) -> None:
        (size,) = self.graph.shapes[node.name]
        target, first, *others = self._vector(Vector(node.name), size), *map(Vector, node.inputs)
        if isinstance(node, Activation):
            self.steps.append(VectorOp(node.kind, first, target, size))
        elif isinstance(node, Clip):
            self.steps.append(VectorOp("clip", first, target, size, limits=(node.low, node.high)))
        elif isinstance(node, Concat):
            offset = 0
            for source in (first, *others):
                (part,) = self.graph.shapes[source.node]
                self.steps.append(VectorOp("copy", source, target, part, offset=offset))
                offset += part
        elif isinstance(node, Scatter):  # as a product with a matrix of zeros and ones
            chosen = np.zeros((size, len(node.at)))
            chosen[node.at, range(len(node.at))] = 1
            self._matvec(first, target, chosen, np.zeros(size))
        elif isinstance(node, (Add, Multiply)):
            for other in others:
                self.steps.append(VectorOp("add" if isinstance(node, Add) else "multiply", first, target, size, other))
                first = target
        else:
            raise UnsupportedError(f"{node}: the engine does not run it on vectors")

    def _vector(self, vector: Vector, size: int) -> Vector:
        self.vectors[vector] = size
        return vector

    def _constant(self, owner: str, array: Array, element: Element = FLOAT) -> int:
        """Offset of an array among the constants. Raises UnsupportedError for numbers that ``element`` cannot hold."""
        most = np.finfo(f"f{element.size}").max
        if (np.abs(array) > most).any():
            raise UnsupportedError(f"{owner}: weights up to {most:.6g} can be run in this precision")
        return self.constants.add(array, element)

    def _weight(self, node: Node, name: str) -> Array:
        return np.asarray(self.weights[f"{node.name}.{name}"])

    def _affine(self, node: BatchNorm) -> tuple[Array, Array]:
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        gamma, beta, mean, variance = (self._weight(node, name).astype(np.float64) for name in names)
        scale = gamma / np.sqrt(variance + node.eps)
        return scale, beta - mean * scale

    # Phases

    def _preferred(self, node: Node) -> int:
        """The number of phases that the first reader of a map wants."""
        for reader in self.graph.readers[node.name]:
            if isinstance(reader, (Conv, Pool)):
                winograd = self._winograd(reader) if isinstance(reader, Conv) else 0
                return winograd or window_of(reader).stride
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
            self.steps.append(Relayout(source, key, Channels(self.graph.shapes[name][0], gate)))
            self.copied.add(key)
        return key


# Where everything lies


def _place(
    graph: Graph,
    steps: list[Step],
    vectors: Mapping[Vector, int],
    in_place: Mapping[MapKey, MapKey],
    lanes: int,
    element: Element,
    reuse: bool,
) -> tuple[dict[MapKey, Map], dict[Vector, int], int]:
    """Layout and place of every map, place of every vector, and how many floats that takes."""
    layouts = _layouts(graph, steps, lanes)
    slack = 16 * lanes  # blocks may read, never write, up to 9 vectors beyond a map and one before (docs/engine.md)
    size = slack

    def floats(elements: int) -> int:
        return _whole(-(-elements * element.size // FLOAT.size), 16)

    offsets: dict[Vector, int] = {}
    for vector, length in vectors.items():
        offsets[vector] = size
        size += _whole(length + lanes, 16)

    life: dict[MapKey, list[int]] = {}  # first and last step that touches the memory of a map
    for index, step in enumerate(steps):
        for key in _stored_keys(step):
            life.setdefault(in_place.get(key, key), [index, index])[1] = index
    free: dict[Layout, list[tuple[int, int]]] = {}  # (channels, offset), the fewest channels first
    places: dict[MapKey, int] = {}
    ends: list[tuple[int, int, int, Layout]] = []  # (last step, offset, channels, layout), the earliest on top
    for key, (first, last) in sorted(life.items(), key=lambda item: item[1]):
        while reuse and ends and ends[0][0] < first:
            _, at, channels, layout = heapq.heappop(ends)
            bisect.insort(free.setdefault(layout, []), (channels, at))
        layout, channels = layouts[key], graph.shapes[key.node][0]
        slots = free.get(layout, [])
        fitting = bisect.bisect_left(slots, (channels, 0))
        if fitting < len(slots):
            places[key] = slots.pop(fitting)[1]
        else:
            gap = layout.plane - layout.rows * layout.pitch
            places[key] = size + floats(gap)
            size = places[key] + floats(channels * layout.channel)
        heapq.heappush(ends, (last, places[key], channels, layout))
    maps = {
        key: Map(places.get(in_place.get(key, key), -1), graph.shapes[key.node][0], layout)
        for key, layout in layouts.items()
    }
    return maps, offsets, size + slack


def _places(node: Scatter) -> NDArray[np.int32]:
    """Of each channel that a Scatter makes, the channel that it comes from, -1 for a channel of zeros."""
    places = np.full(node.channels, -1, dtype=np.int32)
    places[list(node.at)] = range(len(node.at))
    return places


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _stored_keys(step: Step) -> list[MapKey]:
    """Maps that a step reads or writes."""
    keys: list[MapKey] = []
    if isinstance(step, (LoadImage, Relayout, ScatterMap)):
        keys.append(step.target)
    if isinstance(step, (Relayout, ScatterMap, FlattenMap, Convolve)) or (isinstance(step, Pointwise) and step.source):
        keys.append(step.source)  # type: ignore[arg-type]
    if isinstance(step, (Convolve, Pointwise)):
        keys += [op.operand for op in step.finish.ops if isinstance(op.operand, MapKey)]
        if step.finish.stored:
            keys.append(step.finish.frame)
    return keys


def _layouts(graph: Graph, steps: list[Step], lanes: int) -> dict[MapKey, Layout]:
    """Maps that one step walks together get one pitch; maps of one size and pitch get one layout."""
    parent: dict[MapKey, MapKey] = {}

    def find(key: MapKey) -> MapKey:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    windows: list[tuple[MapKey, MapKey, int, int]] = []  # source, frame, kernel, padding
    for step in steps:
        for key in _stored_keys(step):
            find(key)
        if isinstance(step, ScatterMap):
            parent[find(step.source)] = find(step.target)
        if isinstance(step, (Convolve, Pointwise)):
            frame = step.finish.frame
            walked = [op.operand for op in step.finish.ops if isinstance(op.operand, MapKey)]
            walked += [step.source] if step.source else []
            for key in walked:
                parent[find(key)] = find(frame)
            node = step.node if isinstance(step, Convolve) else step.pool
            if node and step.source:
                window = window_of(node)
                windows.append((step.source, frame, window.kernel, window.padding))
    size = {key: graph.shapes[key.node][1:] for key in parent}
    pitch: dict[MapKey, int] = {}
    for key in parent:
        pitch[find(key)] = max(pitch.get(find(key), 1), -(-size[key][1] // key.phases))

    def kind(key: MapKey) -> tuple[int, int, int, int]:
        height, width = size[key]
        return height, width, key.phases, pitch[find(key)]

    gaps: dict[tuple[int, int, int, int], int] = {}
    for source, frame, kernel, padding in windows:
        step_pitch = pitch[find(source)]
        rows_in, rows_out = -(-size[source][0] // source.phases), -(-size[frame][0] // frame.phases)
        last = (kernel + frame.phases - 2 - padding) // source.phases
        before = -(-padding // source.phases)
        below = max(0, rows_out - 1 + last - (rows_in - 1))
        gap = max(before, below) * step_pitch + max(before, last, 0)
        gaps[kind(source)] = max(gaps.get(kind(source), 0), gap)
    return {
        key: Layout(
            *kind(key), plane=_whole(-(-size[key][0] // key.phases) * kind(key)[3] + gaps.get(kind(key), 0), lanes)
        )
        for key in parent
    }
