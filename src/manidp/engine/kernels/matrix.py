"""A convolution as a product of matrices: outputs x (inputs x taps) times (inputs x taps) x positions.

    for positions that fit the cache, some blocks of V vectors:
        x = what the kept inputs hold there under each tap, one after the other in scratch memory
        for K outputs:
            for each block:
                for j in kept inputs and taps:
                    a[k][v] += weight[k][j] * x[block][j][v]

So weights are read once for many positions, and what is read over and over lies close together, however far apart the
map's channels are. Where all outputs are computed, weights lie in the order in which they are read; where a gate closes
some, they lie in rows, an output each. For 1x1, for strided convolutions of many channels or of the image, and for
windows that Winograd's convolution does not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import Element, Function, Index, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import ConvolutionStep, Kernel, Packed, apart, by_input
from manidp.engine.kernels.direct import Direct
from manidp.engine.kernels.gather import Blocks, Each, Gather, blocks_of
from manidp.engine.kernels.winograd import is_3x3
from manidp.engine.module import WORKSPACE, Module
from manidp.engine.steps import Channels, Epilogue, MapKey, Op, Step, window_of
from manidp.engine.walk import single
from manidp.graph import Conv, sides

OUTPUTS = 4  # at a time
# what is under taps pays to be gathered for so many outputs: from so many inputs on, more of strided ones, still more
# where outputs are left out, or up to few
_INPUTS, _WIDE, _WIDE_ROWS, _FEW, _OUTPUTS = 16, 32, 64, 4, 16
_TAPS = 49  # and up to so many taps
_BEGUN = 8  # cache lines of a row of weights that are fetched ahead
_TOGETHER = 4  # taps between two jumps, where all inputs are read
# of a tile of so few products a sum, what follows them is done in registers; with more it takes too little time to be
# worth code of each layer's own
_SHORT = 64
# bytes of inputs that all outputs are made of before the next ones are taken; a map of so many is taken as a whole
_CACHE, _WHOLE = 128 * 1024, 300 * 1024
_CONVOLVED = 256 * 1024  # the same where a depthwise convolution makes them, which begins anew in every channel

_X, _WEIGHTS, _BIAS, _LI, _LO = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%li"), Pointer("%lo")
_NI, _NO, _SCRATCH, _PRODUCTS = Index("%ni"), Index("%no"), Pointer("%scratch"), Pointer("%products")
_ROW, _SLOT, _SWEEP, _FIRST, _END = Index("%row"), Index("%slot"), Index("%sweep"), Index("%first"), Index("%end")


def is_1x1(node: Conv) -> bool:
    """Whether each output is made of one position."""
    return window_of(node).taps == 1 and not any(sides(node.padding))


@dataclass(frozen=True)
class Matrix(Kernel):
    """``rows``: of an output each, so that any outputs can be left out."""

    rows: bool

    @property
    def skips_outputs(self) -> bool:
        return self.rows

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        window = window_of(node)
        least = _INPUTS if window.stride == 1 else _WIDE_ROWS if self.rows else _WIDE
        pays = node.channels >= _OUTPUTS and (inputs >= least or inputs <= _FEW)
        return node.groups == 1 and (is_1x1(node) or (pays and window.taps <= _TAPS and not is_3x3(node)))

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        """A direct convolution takes 1.2 to 1.5 times as long by measurement (AVX2); less on maps of two vectors.

        These have few sums for the outputs at a time, and additions wait for one another.
        """
        few = height * width <= 2 * lanes and (window_of(node).taps > 1 or not self.rows)
        share = 1.2 if few else 0.9 if self.rows else 0.8
        return share * super().cost(node, height, width, lanes, element)

    def pack(self, weight: NDArray[Any], element: Element, lanes: int) -> NDArray[Any]:
        """Rows in an odd number of cache lines, or K outputs after the other, of each input after input K weights."""
        flat = weight.reshape(len(weight), -1)
        outputs, length = flat.shape
        if self.rows:
            rows = apart(outputs, length, element)
            rows[:, :length] = flat
            return rows
        tiles = -(-outputs // OUTPUTS)
        return by_input(flat, [t * outputs // tiles for t in range(tiles + 1)], element)

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        return MultiplyMatrices(node, source, packed, inputs, outputs, epilogue, self.rows)

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Input by input, as the direct convolution."""
        return Direct().model(x, weight, node)


@dataclass(frozen=True, eq=False, repr=False)
class MultiplyMatrices(ConvolutionStep):
    """A convolution as a product of matrices, and what follows it."""

    rows: bool
    before: tuple[Op, ...] = ()  # done to what it reads, where it has one tap,
    each: Each | None = None  # after this depthwise convolution of it

    def walks(self) -> Conv:
        return self.each.node if self.each else self.node

    def emit(self, module: Module, f: Function) -> None:
        source, frame = self.layouts(module)
        lanes, size = module.lanes, module.element.size
        blocks = blocks_of(single(frame, lanes).blocks, (module.isa.registers - 1) // (OUTPUTS + 1))
        window, every = window_of(self.node), self.inputs.kept is None
        slot = self.inputs.count * window.taps * blocks.vectors * lanes + 64 // size
        cache = _CONVOLVED if self.each else _CACHE
        most = blocks.count if blocks.count * slot * size <= _WHOLE else max(1, cache // (slot * size))
        sweep = -(-blocks.count // -(-blocks.count // most))
        module.reserve_scratch(sweep * slot + OUTPUTS * blocks.vectors * lanes)
        operands = epilogues.operands_of(module, f, self.epilogue)
        sizes = range(1, OUTPUTS + 1)
        if self.outputs.kept is None:
            tiles = -(-self.outputs.count // OUTPUTS)
            sizes = range(self.outputs.count // tiles, -(-self.outputs.count // tiles) + 1)
        extra = epilogues.parameters_of(operands)
        factors = epilogues.pointers_of(module, f, self.before)
        if self.each:
            packed = self.each.packed
            factors += [module.constant_at(f, packed.weights), module.constant_at(f, packed.bias)]
        at_once = self.inputs.count * window.taps <= _SHORT and self.epilogue.simple
        gather = Gather(
            module, blocks, window, source, frame, self.before, self.each and window_of(self.each.node),
            epilogues.parameters_of(factors, "q"),
        )  # fmt: skip
        code = _Code(module, self.rows, every, at_once, sizes, gather, self.epilogue, extra)
        arguments = [
            _X, _WEIGHTS, _BIAS, _LI, _NI, _LO, _NO, _ROW, _SCRATCH, _SLOT, _SWEEP, *extra, *gather.operands,
        ]  # fmt: skip
        key = (
            "matrices", self.rows, every, at_once, window, blocks, sizes, source, frame, self.epilogue.signature,
            gather.signature,
        )  # fmt: skip
        name = module.function(key, arguments, code.write)
        li, _, ni = module.lists(f, self.inputs)
        lo, _, no = module.lists(f, self.outputs)
        scratch = f.at(WORKSPACE, module.plan.workspace)
        f.call(name, *self.reads(module, f), li, ni, lo, no, self.packed.row, scratch, slot, sweep, *operands, *factors)


@dataclass(frozen=True)
class _Code:
    """The code for a layer. ``sizes``: numbers of outputs that its tiles may have."""

    module: Module
    rows: bool
    every: bool  # no input is left out
    at_once: bool  # what follows the products is done before they leave the registers
    sizes: range
    gather: Gather
    epilogue: Epilogue
    extra: list[Pointer]

    @property
    def blocks(self) -> Blocks:
        """The blocks of the map."""
        return self.gather.blocks

    def write(self, g: Function) -> None:
        """Sweep by sweep: as many blocks as fit the cache, tile by tile of outputs, block by block."""
        count = self.blocks.count
        tiles = g.divided(g.plus(_NO, OUTPUTS - 1), OUTPUTS)

        def one_sweep(s: Index) -> list[Index]:
            first = g.scaled(s, _SWEEP)
            end = g.least(count, g.plus(first, _SWEEP))
            g.call(self.gather.function(), _X, _LI, _NI, _SCRATCH, first, end, _SLOT, *self.gather.operands)

            def one_tile(t: Index) -> list[Index]:
                begin = g.divided(g.scaled(t, _NO), tiles)
                number = g.minus(g.divided(g.scaled(g.plus(t, 1), _NO), tiles), begin)
                if self.rows:
                    g.call(self._prefetch(), _WEIGHTS, _LO, _NO, _ROW, g.plus(begin, number))
                g.switch(number, self.sizes, self.sizes[-1], lambda n: self._tile(g, n, begin, first, end))
                return []

            g.loop(tiles, one_tile)
            return []

        g.loop(g.divided(g.plus(_SWEEP, count - 1), _SWEEP), one_sweep)

    def _tile(self, g: Function, outputs: int, begin: Index, first: Index, end: Index) -> None:
        """So many outputs, from ``begin`` on, of the blocks from first to end."""
        lo, products = g.floats.at(_LO, begin), g.at(_SCRATCH, g.scaled(_SLOT, _SWEEP))
        weights = _WEIGHTS if self.rows else g.at(_WEIGHTS, g.scaled(begin, _ROW))
        for vectors, low, high in self.blocks.ranges(g, first, end):

            def one_block(b: Index, vectors: int = vectors, low: Index = low) -> list[Index]:
                block = g.plus(low, b)
                x = g.at(_SCRATCH, g.scaled(g.minus(block, first), _SLOT))
                factors = x, weights, _LI, _NI, lo, _ROW
                finished = _BIAS, self.blocks.first(g, block), *self.extra
                if self._finishes(outputs):
                    g.call(self._multiply(outputs, vectors), *factors, *finished)
                else:
                    g.call(self._multiply(outputs, vectors), *factors, products)
                    g.call(self._outputs(vectors), products, lo, outputs, *finished)
                return []

            g.loop(g.minus(high, low), one_block)

    def _finishes(self, outputs: int) -> bool:
        """Whether a tile of so many outputs makes them at once: small ones are rare, and have code of their own."""
        return self.at_once and outputs > OUTPUTS // 2

    def _prefetch(self) -> str:
        """The function that fetches where the rows of the next tile begin.

        They lie anywhere, so no processor sees them coming; how they go on it sees.
        """

        def write(g: Function) -> None:
            line = 64 // g.element.size
            outputs = [g.index(_LO, g.least(g.plus(_FIRST, k), g.minus(_NO, 1))) for k in range(OUTPUTS)]
            rows = [g.at(_WEIGHTS, g.scaled(output, _ROW)) for output in outputs]

            def one_line(n: Index) -> list[Index]:
                for row in rows:
                    g.prefetch(row, g.scaled(n, line))
                return []

            g.loop(g.least(g.divided(_ROW, line), _BEGUN), one_line)

        return self.module.function("prefetch", [_WEIGHTS, _LO, _NO, _ROW, _FIRST], write)

    def _multiply(self, outputs: int, vectors: int) -> str:
        """The function that multiplies and adds: some outputs of a block, from all kept inputs.

        It stores the products, or makes outputs of them at once.
        """

        taps = self.gather.window.taps

        def write(g: Function) -> None:
            rows = [g.at(_WEIGHTS, g.scaled(g.index(_LO, k), _ROW)) for k in range(outputs)] if self.rows else []

            def some(place: Index, number: Index, count: int, sums: Sequence[Vec]) -> list[Vec]:
                """``count`` neighbouring taps: from this one on of what was gathered, and of a row of weights."""
                x, column = g.at(_X, g.scaled(place, vectors * g.lanes)), g.at(_WEIGHTS, g.scaled(number, outputs))
                starts, totals = [g.at(row, number) for row in rows], list(sums)
                for n in range(count):
                    values = [g.load(x, (n * vectors + v) * g.lanes) for v in range(vectors)]
                    for k in range(outputs):
                        weight = g.scalar(starts[k], n) if self.rows else g.scalar(column, n * outputs + k)
                        factor = g.splat(weight)
                        for v, value in enumerate(values):
                            totals[k * vectors + v] = g.fma(value, factor, totals[k * vectors + v])
                return totals

            def one_input(j: Index, *sums: Vec) -> list[Vec]:
                i = g.index(_LI, j)

                def one_tap(t: Index, *sums: Vec) -> list[Vec]:
                    place, number = (g.plus(g.scaled(n, taps), t) if taps > 1 else n for n in (j, i))
                    return some(place, number, 1, sums)

                return g.loop(taps, one_tap, *sums)

            def all_inputs(sums: list[Vec]) -> list[Vec]:
                def one_group(n: Index, *sums: Vec) -> list[Vec]:
                    first = g.scaled(n, _TOGETHER)
                    return some(first, first, _TOGETHER, sums)

                def one_more(n: Index, *sums: Vec) -> list[Vec]:
                    last = g.plus(whole, n)
                    return some(last, last, 1, sums)

                count = g.scaled(_NI, taps)
                groups = g.divided(count, _TOGETHER)
                whole = g.scaled(groups, _TOGETHER)
                return g.loop(g.minus(count, whole), one_more, *g.loop(groups, one_group, *sums))

            zeros = [Vec("zeroinitializer")] * (outputs * vectors)
            totals = all_inputs(zeros) if self.every else g.loop(_NI, one_input, *zeros)
            for k in range(outputs):
                these = totals[k * vectors : (k + 1) * vectors]
                if self._finishes(outputs):
                    self._output(g, g.index(_LO, k), these)
                else:
                    for v, total in enumerate(these):
                        g.store(total, _PRODUCTS, (k * vectors + v) * g.lanes)

        key = ("multiply", self.rows, self.every, taps, outputs, vectors)
        factors = [_X, _WEIGHTS, _LI, _NI, _LO, _ROW]
        if self._finishes(outputs):
            of_layer = (*key, self.gather.frame, self.epilogue.signature)
            return self.module.function(of_layer, [*factors, _BIAS, _FIRST, *self.extra], write)
        return self.module.function(key, [*factors, _PRODUCTS], write)

    def _output(self, g: Function, channel: Index, products: Sequence[Vec]) -> None:
        """Make one output of some vectors, from %first on, of what a tile made of it."""
        bias = g.splat_float(_BIAS, channel)
        element = epilogues.Element(
            self.module, g, self.gather.frame, self.epilogue, channel, g.scaled(_FIRST, g.lanes)
        )
        for v, value in enumerate(products):
            element.make(0, g.plus(_FIRST, v), g.arithmetic("fadd", value, bias), v * g.lanes)
        element.pool()

    def _outputs(self, vectors: int) -> str:
        """The function that makes outputs of a block from what a tile made, and does what follows."""

        def write(g: Function) -> None:
            def one_output(k: Index) -> list[Index]:
                products = g.at(_PRODUCTS, g.scaled(k, vectors * g.lanes))
                self._output(g, g.index(_LO, k), [g.load(products, v * g.lanes) for v in range(vectors)])
                return []

            g.loop(_NO, one_output)

        key = ("matrix outputs", vectors, self.gather.frame, self.epilogue.signature)
        return self.module.function(key, [_PRODUCTS, _LO, _NO, _BIAS, _FIRST, *self.extra], write)
