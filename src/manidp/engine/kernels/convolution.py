"""A convolution of whatever kernel: block by block of neighbouring positions, K kept outputs at a time.

The loop that takes the time is the *tile*, K outputs x V vectors of accumulators that stay in registers:

    for j in kept inputs:                  # li[j], so closed inputs cost nothing
        for each tap of the kernel:
            x[v] = V vectors of input channel li[j] at the tap's shift
            for k in K kept outputs:       # lo[k], so closed outputs cost nothing, either
                a[k][v] += weight[lo[k]][li[j]][tap] * x[v]

Weights are broadcast one by one from where they lie, so any set of channels can be skipped without packing anything.
What tiles make goes to a scratch area, and the epilogue makes outputs from it. A kernel (``direct``, ``winograd``) says
what the tiles multiply and how outputs come from their products.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import NULL, ZERO, Element, Function, Index, Offset, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.module import WORKSPACE, Module
from manidp.engine.steps import Channels, Epilogue, Layout, MapKey, MapStep, Step, Window, window_of
from manidp.engine.target import Isa
from manidp.engine.walk import BLOCK, Mask, Tile, bits_of, single, vectors_of
from manidp.graph import Conv

_X, _WEIGHTS, _BIAS, _LI, _LO = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%li"), Pointer("%lo")
_NI, _NO, _SCRATCH, _PRODUCTS = Index("%ni"), Index("%no"), Pointer("%scratch"), Pointer("%products")
_ROW, _STRIDE, _CHANNEL, _POINTS = Index("%row"), Index("%stride"), Index("%channel"), Index("%points")
_STEP, _TABLE = Index("%step"), Pointer("%table")
_TILE = [
    _X, _WEIGHTS, _LI, _NI, _LO, _NO, _PRODUCTS, BLOCK, _ROW, _STRIDE, _CHANNEL, _POINTS, _STEP, _TABLE,
]  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """Where the packed constants of a convolution lie: ``weights``, ``row`` elements an output, and ``bias``."""

    weights: int
    row: int
    bias: int


class Kernel(ABC):
    """A way to compute a convolution."""

    skips_inputs = True  # whether it leaves out closed channels of its input, rather than read zeros there
    computes_closed = False  # whether it computes closed channels of its output, though it does not write them

    @property
    def skips_outputs(self) -> bool:
        """Whether it can leave closed channels of its output as they are."""
        return True

    @abstractmethod
    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        """Whether it can compute this convolution of so many channels of such elements."""

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        """Vectors of multiply-adds for one output and input channel; height and width are those of the output."""
        return window_of(node).taps * -(-height * width // lanes)

    def held(self, node: Conv) -> int:
        """Numbers that it keeps of the weights of one output and input channel."""
        return window_of(node).taps

    def phases(self, node: Conv) -> tuple[int, int]:
        """In how many phases it reads the source and writes the output.

        Those of the stride, so that neighbouring outputs' inputs are neighbours, and one.
        """
        return window_of(node).stride, 1

    def pack(self, weight: NDArray[Any], element: Element, lanes: int) -> NDArray[Any]:
        """weight (outputs, inputs / groups, height, width) as it is read: (outputs, elements of a row)."""
        return weight.reshape(len(weight), -1)

    @abstractmethod
    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        """The step that does it."""

    @abstractmethod
    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Its arithmetic in NumPy: x (B, inputs, H, W), weight (outputs, inputs / groups, kernel), no bias."""


@dataclass(frozen=True, eq=False, repr=False)
class ConvolutionStep(MapStep):
    """A convolution and what follows it: of some channels of a map those of another."""

    node: Conv
    source: MapKey
    packed: Packed
    inputs: Channels
    outputs: Channels
    epilogue: Epilogue

    def walks(self) -> Conv:
        return self.node

    def layouts(self, module: Module) -> tuple[Layout, Layout]:
        """Of the source, and of what is made."""
        return module.plan.maps[self.source].layout, module.plan.maps[self.epilogue.frame].layout

    def reads(self, module: Module, f: Function) -> tuple[Pointer, Pointer, Pointer]:
        """Where source, weights and bias lie."""
        x, weights = module.map_at(f, self.source), module.constant_at(f, self.packed.weights)
        return x, weights, module.constant_at(f, self.packed.bias)


class TileKernel(Kernel):
    """One that multiplies in tiles of outputs and positions."""

    most_outputs: int  # that a tile works on
    packed = False  # whether tiles read inputs that ``transform`` has put one after the other

    @property
    def points(self) -> int:
        """Products that tiles make of each output and position of the frame."""
        return 1

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        return Convolve(node, source, packed, inputs, outputs, epilogue, self)

    @abstractmethod
    def taps(
        self, module: Module, group: Group, source: Layout, frame: Layout
    ) -> tuple[list[int], list[tuple[int, list[Mask]]]]:
        """What tiles multiply: offsets of the kernel's lines, and of its taps, with a mask for each vector."""

    @abstractmethod
    def outputs(self, g: Function, products: list[Vec]) -> list[Vec]:
        """The outputs of one vector, a phase each, from its products, a point each."""

    def transform(self, module: Module, group: Group, source: Layout, frame: Layout) -> str | None:
        """The function that prepares the kept inputs of a block, None if there is nothing to prepare."""
        return None


@dataclass(frozen=True)
class Group:
    """What the code for one group of a convolution depends on, layouts aside."""

    kernel: TileKernel
    inputs: int
    outputs: int
    row: int
    window: Window
    tile: Tile
    lanes: int

    @property
    def geometry(self) -> Group:
        """The same without what most functions are told when called: how many channels, how far apart their weights."""
        return replace(self, inputs=0, outputs=0, row=0)

    @property
    def block(self) -> int:
        """Positions in a block."""
        return self.tile.vectors * self.lanes

    @property
    def channel(self) -> int:
        """Elements of scratch for one channel of a block, what was transformed or what tiles made.

        An odd number of vectors, so that neighbouring channels do not fall into the same lines of the cache.
        """
        return (self.kernel.points * self.tile.vectors | 1) * self.lanes

    @property
    def transformed(self) -> int:
        """Elements of scratch for the transformed inputs."""
        return self.inputs * self.channel if self.kernel.packed else 0


def apart(rows: int, length: int, element: Element) -> NDArray[Any]:
    """Zeros, rows of an odd number of cache lines, so that those of a tile do not fall into the same lines."""
    line = 64 // element.size
    return np.zeros((rows, (-(-length // line) | 1) * line), f"f{element.size}")


def by_input(rows: NDArray[Any], ends: Sequence[int], element: Element) -> NDArray[Any]:
    """Rows from one end to the next, group after group: input by input what all rows of a group have for it."""
    made = np.empty(rows.shape, f"f{element.size}")
    for first, end in itertools.pairwise(ends):
        made[first:end].reshape(-1, end - first)[:] = rows[first:end].T
    return made


def tile_shape(positions: int, most_outputs: int, isa: Isa) -> Tile:
    """The tile that needs fewest cycles at two multiply-adds and two loads a cycle, padding of blocks counted."""
    best: tuple[float, Tile] | None = None
    needed = -(-positions // isa.lanes)
    for vectors in range(1, 9):
        outputs = min((isa.registers - 2 - vectors) // vectors, most_outputs)
        if outputs < 1:
            continue
        blocks = -(-needed // vectors)
        multiplied, loaded = outputs * vectors, outputs + vectors + 1
        cost = max(multiplied, loaded) / multiplied * blocks * vectors / needed + 0.5 / multiplied + 0.02 * vectors
        if best is None or cost < best[0]:
            best = cost, Tile(outputs, vectors, blocks)
    assert best is not None
    return best[1]


@dataclass(frozen=True, eq=False, repr=False)
class Convolve(ConvolutionStep):
    """A convolution in tiles, and what follows it."""

    kernel: TileKernel

    def emit(self, module: Module, f: Function) -> None:
        node = self.node
        source, frame = self.layouts(module)
        outputs = node.channels // node.groups
        group = Group(
            kernel=self.kernel,
            inputs=self.inputs.count // node.groups,
            outputs=outputs,
            row=self.packed.row,
            window=window_of(node),
            tile=tile_shape(frame.rows * frame.pitch, min(outputs, self.kernel.most_outputs), module.isa),
            lanes=module.lanes,
        )
        products = (outputs + group.tile.outputs) * group.channel
        module.reserve_scratch(group.transformed + products)
        operands = epilogues.operands_of(module, f, self.epilogue)
        extra = epilogues.parameters_of(operands)
        arguments = [_X, _WEIGHTS, _BIAS, _LI, _NI, _LO, _NO, _SCRATCH, *extra]
        key = (group, source, frame, self.epilogue.signature)
        blocks = _Blocks(module, group, source, frame, self.epilogue, extra)
        name = module.function(key, arguments, blocks.write)
        li, below_in, ni = module.lists(f, self.inputs)
        lo, below_out, no = module.lists(f, self.outputs)
        x, weights, bias = self.reads(module, f)
        rest = [f.at(WORKSPACE, module.plan.workspace), *operands]

        def one_group(index: Index) -> list[Index]:
            following = f.plus(index, 1)
            first_in = f.index(below_in, f.scaled(index, group.inputs))
            first_out = f.index(below_out, f.scaled(index, group.outputs))
            these_in = f.minus(f.index(below_in, f.scaled(following, group.inputs)), first_in)
            these_out = f.minus(f.index(below_out, f.scaled(following, group.outputs)), first_out)
            # the list counts inputs from the first group's first, a row of weights counts from its own group's first
            before = f.scaled(index, -group.inputs * (1 if self.kernel.packed else group.window.taps))
            own = f.make(Pointer, f"getelementptr {module.element.name}, ptr {weights}, i64 {before}")
            f.call(name, x, own, bias, f.at(li, first_in), these_in, f.at(lo, first_out), these_out, *rest)
            return []

        if node.groups > 1:
            f.loop(node.groups, one_group)
        else:
            f.call(name, x, weights, bias, li, ni, lo, no, *rest)


@dataclass(frozen=True)
class _Blocks:
    """The code for one group: block by block, and in each block the outputs in tiles of as even a size as can be."""

    module: Module
    group: Group
    source: Layout
    frame: Layout
    epilogue: Epilogue
    extra: list[Pointer]

    def write(self, g: Function) -> None:
        group, kernel = self.group, self.group.kernel
        tiles = g.divided(g.plus(_NO, group.tile.outputs - 1), group.tile.outputs)
        products = g.at(_SCRATCH, group.transformed)
        multiply, table = self._tiles()
        make_outputs = self._outputs()
        x, stride = (_SCRATCH, group.channel) if kernel.packed else (_X, self.source.channel)

        def one_block(block: Index) -> list[Index]:
            transform = kernel.transform(self.module, group, self.source, self.frame)
            if transform:
                g.call(transform, _X, _SCRATCH, _LI, _NI, block)

            def one_tile(index: Index) -> list[Index]:
                first = g.divided(g.scaled(index, _NO), tiles)
                end = g.divided(g.scaled(g.plus(index, 1), _NO), tiles)
                outputs = g.floats.at(_LO, first), g.minus(end, first)
                into = g.at(products, g.scaled(first, group.channel))
                g.call(
                    multiply, x, _WEIGHTS, _LI, _NI, *outputs, into, ZERO if kernel.packed else block, group.row,
                    stride, group.channel, kernel.points, group.inputs, table,
                )  # fmt: skip
                return []

            g.loop(tiles, one_tile)
            g.call(make_outputs, products, _BIAS, _LO, _NO, block, *self.extra)
            return []

        g.loop(group.tile.blocks, one_block)

    def _tiles(self) -> tuple[str, Pointer]:
        """The function that picks the tile for a number of outputs, and the table that it is to be called with.

        In the table lie the places of the kernel's lines and taps and the masks of the taps, where these are the same
        for all blocks: so layers that differ in nothing else share their tiles.
        """
        group, module = self.group, self.module
        tile, packed = group.tile, group.kernel.packed
        lines, taps = group.kernel.taps(module, group, self.source, self.frame)
        places = [*lines, *(offset for offset, _ in taps)]
        masks = [mask for _, these in taps for mask in these]
        words = [mask.word for mask in masks if mask.lanes]
        table = module.table("i64", [*places, *words]) if any(places) or words else NULL
        unknown = tuple((mask.lanes and "in the table") or mask.table for mask in masks)
        shape = len(lines), len(taps)
        key = ("tile", packed, tile.outputs, tile.vectors, shape, any(places), unknown)

        def write(g: Function) -> None:
            def of_outputs(n: int) -> None:
                one = multiply_tile(tile, n, shape, masks, apart=any(places), packed=packed)
                g.call(module.function((*key, n), _TILE, one), *_TILE)

            g.switch(_NO, range(tile.least, tile.outputs + 1), tile.least, of_outputs)

        return module.function(key, _TILE, write), table

    def _outputs(self) -> str:
        """The function that makes outputs of a block from what tiles made, and does what follows."""
        group, frame, lanes = self.group, self.frame, self.module.lanes
        one = single(frame, lanes)

        def write(g: Function) -> None:
            def one_output(k: Index) -> list[Index]:
                channel = g.index(_LO, k)
                bias = g.splat_float(_BIAS, channel)
                products = g.at(_PRODUCTS, g.scaled(k, group.channel))

                def one_vector(v: Index, block: Index) -> None:
                    start = g.scaled(block, lanes)
                    element = epilogues.Element(self.module, g, frame, self.epilogue, channel, start)
                    here = g.at(products, g.scaled(v, lanes))
                    made = [g.load(here, n * group.block) for n in range(group.kernel.points)]
                    for phase, value in enumerate(group.kernel.outputs(g, made)):
                        element.make(phase, block, g.arithmetic("fadd", value, bias))
                    element.pool()

                vectors_of(g, group.tile, one, one_vector)
                return []

            g.loop(_NO, one_output)

        key = ("outputs", group.geometry, frame, self.epilogue.signature)
        return self.module.function(key, [_PRODUCTS, _BIAS, _LO, _NO, BLOCK, *self.extra], write)


def multiply_tile(
    tile: Tile, outputs: int, shape: tuple[int, int], masks: list[Mask], *, apart: bool, packed: bool
) -> Callable[[Function], None]:
    """Writes the function that multiplies and adds: ``outputs`` of a block, from all kept inputs, at each point.

    ``shape``: lines, and taps of a line. ``masks`` are those of the first tap's vectors, then of the second's, ...
    ``apart``: taps lie at the places in %table, else all in one. ``packed``: kept inputs lie one after the other, as
    ``Kernel.transform`` leaves them, not where their numbers say.
    """
    vectors, (lines, taps) = tile.vectors, shape

    def write(g: Function) -> None:
        lanes = g.lanes

        def number(position: Offset) -> Index:
            address = g.make(Pointer, f"getelementptr i64, ptr {_TABLE}, i64 {position}")
            return g.make(Index, f"load i64, ptr {address}")

        rows = _rows_of_weights(g, tile, outputs)
        start = g.at(_X, g.scaled(BLOCK, vectors * lanes))
        offsets: list[Offset] = [number(lines + t) if apart else 0 for t in range(taps)]
        words = iter(range(lines + taps, lines + taps + len(masks)))
        shown = [bits_of(g, number(next(words)), "i64") if mask.lanes else mask.bits(g, BLOCK) for mask in masks]

        def one_point(point: Index) -> list[Index]:
            here, at_point = g.scaled(point, vectors * lanes), g.scaled(point, _STEP)

            def one_input(j: Index, *sums: Vec) -> list[Vec]:
                i = g.index(_LI, j)
                x = g.at(start, here, g.scaled(j if packed else i, _STRIDE))

                def one_line(u: Index, *sums: Vec) -> list[Vec]:
                    line = g.at(x, number(u)) if apart else x
                    first = g.plus(g.scaled(i, lines * taps), g.scaled(u, taps))
                    first = g.plus(at_point, first)
                    totals = list(sums)
                    for t, offset in enumerate(offsets):
                        tap = g.at(line, offset)
                        values = [
                            g.zero_unless(mask, g.load(tap, v * lanes))
                            for v, mask in enumerate(shown[t * vectors : (t + 1) * vectors])
                        ]
                        for k in range(outputs):
                            weight = g.splat(g.scalar(g.at(rows[k], first), t))
                            for v, value in enumerate(values):
                                totals[k * vectors + v] = g.fma(value, weight, totals[k * vectors + v])
                    return totals

                return g.loop(lines, one_line, *sums)

            zeros = [Vec("zeroinitializer")] * (outputs * vectors)
            for at, total in enumerate(g.loop(_NI, one_input, *zeros)):
                k, v = divmod(at, vectors)
                g.store(total, g.at(_PRODUCTS, g.scaled(_CHANNEL, k), here), v * lanes)
            return []

        g.loop(_POINTS, one_point)

    return write


def _rows_of_weights(g: Function, tile: Tile, outputs: int) -> list[Pointer]:
    """Pointers to the weights of the outputs of a tile; one that is not full does its last output again."""
    positions: list[Offset] = list(range(outputs))
    if outputs == tile.least:
        last = g.minus(_NO, 1)
        positions = [g.least(last, k) for k in positions]
    return [g.at(_WEIGHTS, g.scaled(g.index(_LO, position), _ROW)) for position in positions]
