"""A convolution with neighbouring outputs in the lanes, a few positions at a time.

    for K vectors of outputs:
        for N kept inputs, or for all:
            for P positions:
                for j in these inputs:
                    for each tap of the kernel:
                        w[k] = K vectors of the weights of input channel li[j] at the tap
                        for p in positions whose tap lies in the map:
                            a[p][k] += x[li[j]][p at the tap] * w[k]

A map whose positions do not fill vectors leaves no lane idle so: 49 of them are three vectors of 16 and a lane. Of a
map of fewer positions than a vector has lanes, weights take longer to read than to multiply; they are read vector by
vector in the order in which they lie, long after they have been asked for, and taps outside the map are not computed at
all: of a 3x3 convolution of a 2x2 map that is more than half. All outputs are computed; those that a gate closes are
not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import ZERO, Element, Function, Index, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import ConvolutionStep, Kernel, Packed, by_input
from manidp.engine.kernels.direct import Direct
from manidp.engine.module import WORKSPACE, Module
from manidp.engine.steps import Channels, Epilogue, Layout, MapKey, Step, Window, lengthened, window_of
from manidp.engine.walk import single
from manidp.graph import Conv, sides

_MOST = 256  # taps of all positions: the code has K multiply-adds for each
# bytes of weights that are on their way into the second-level cache before they are needed; those of several taps are
# many in a row, which processors fetch ahead themselves unless gates close some
_AHEAD = 12 * 1024
# With few registers there are few products for what is read, and little time for anything beside them: so many inputs
# serve all positions before the next ones are taken, from the first-level cache, some between two jumps. With many
# registers only where the map is a few groups of positions, and much of the time goes to what is read for the first of
# them: an Intel Xeon then takes 0.88 to 0.95 of the time, AMD's Zen 4 1.00 to 1.02.
_FEW_REGISTERS, _FEW_GROUPS, _AT_ONCE, _TOGETHER = 16, 6, 64, 4

_X, _WEIGHTS, _BIAS, _LI, _NI = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%li"), Index("%ni")
_INPUTS, _SCRATCH, _FIRST, _COUNT = Index("%inputs"), Pointer("%scratch"), Index("%first"), Index("%count")
_LO, _BELOW, _STRIDE, _LAST = Pointer("%lo"), Pointer("%below"), Index("%stride"), Index("%last")
_BEGIN, _END = Index("%begin"), Index("%end")


def _vectors(lanes: int) -> int:
    """Of outputs at a time. Fewer positions fit beside three in AVX2's registers, and weights are read more often."""
    return 3 if lanes > 8 else 2


@dataclass(frozen=True)
class OutputLanes(Kernel):
    """Cheap enough on small maps to pay even where half of the outputs are not wanted."""

    computes_closed = True

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        return node.groups == 1

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        """Taps that lie in the map, for whole vectors of outputs, by measurement beside the other kernels.

        With more taps than one, weights are read again for every few positions, and the code has each tap of each
        position: it is for maps of less than a vector then.
        """
        window, (top, left, bottom, right) = window_of(node), sides(node.padding)
        taps = 1
        for size, lines, padding in ((height, window.lines, top + bottom), (width, window.columns, left + right)):
            extent = (size - 1) * window.stride + lines[-1] - lines[0] + 1 - padding
            taps *= sum(0 <= n * window.stride + line < extent for n in range(size) for line in lines)
        if taps > _MOST or (window.taps > 1 and height * width >= lanes):
            return np.inf
        share = 0.95 if window.taps > 1 else 0.81
        return share * taps / lanes * (-(-node.channels // lanes) * lanes / node.channels)

    def pack(self, weight: NDArray[Any], element: Element, lanes: int) -> NDArray[Any]:
        """Of K vectors of outputs after the other, input by input, tap by tap; outputs padded to whole vectors."""
        rows = lengthened(weight.reshape(len(weight), -1), lanes)
        return by_input(rows, [*range(0, len(rows), _vectors(lanes) * lanes), len(rows)], element)

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        return ConvolveInLanes(node, source, packed, inputs, outputs, epilogue)

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Input by input, as the direct convolution."""
        return Direct().model(x, weight, node)


class ConvolveInLanes(ConvolutionStep):
    """A convolution with outputs in the lanes, and what follows it."""

    def emit(self, module: Module, f: Function) -> None:
        source, frame = self.layouts(module)
        operands = epilogues.operands_of(module, f, self.epilogue)
        extra = epilogues.parameters_of(operands)
        window, whole = window_of(self.node), _vectors(module.lanes) * module.lanes
        module.reserve_scratch(single(frame, module.lanes).blocks * module.lanes * whole)
        tiles, rest = divmod(self.node.channels, whole)
        every = self.inputs.kept is None
        code = _Code(module, every, self.node.channels, window, source, frame, self.epilogue, extra)
        arguments = [_X, _WEIGHTS, _BIAS, _LI, _NI, _LO, _BELOW, _INPUTS, _SCRATCH, *extra]
        key = ("lanes", every, tiles, rest, window, source, frame, self.epilogue.signature)
        name = module.function(key, arguments, lambda g: code.write(g, tiles, rest))
        li, _, ni = module.lists(f, self.inputs)
        lo, below, _ = module.lists(f, self.outputs)
        scratch = f.at(WORKSPACE, module.plan.workspace)
        f.call(name, *self.reads(module, f), li, ni, lo, below, self.inputs.count, scratch, *operands)


class _Position(NamedTuple):
    """A position of a map: where it lies among those of a channel, and where its taps do, None outside the source."""

    slot: int
    taps: tuple[int | None, ...]


def _from_the_first(positions: Sequence[_Position]) -> tuple[int, int, tuple[_Position, ...]]:
    """The first slot and the first place of a tap, and the positions counted from there: so equal ones share code."""
    slot = positions[0].slot
    place = min((at for position in positions for at in position.taps if at is not None), default=0)
    moved = (
        _Position(position.slot - slot, tuple(None if at is None else at - place for at in position.taps))
        for position in positions
    )
    return slot, place, tuple(moved)


@dataclass(frozen=True)
class _Code:
    """The code for a layer of so many outputs. ``every``: no input is left out."""

    module: Module
    every: bool
    outputs: int
    window: Window
    source: Layout
    frame: Layout
    epilogue: Epilogue
    extra: list[Pointer]

    @property
    def positions(self) -> list[_Position]:
        """The positions of the frame, row by row."""
        w, source, frame = self.window, self.source, self.frame

        def place(y: int, x: int) -> int | None:
            if not (0 <= y < source.height and 0 <= x < source.width):
                return None
            (row_phase, row), (column_phase, column) = source.reach(y), source.reach(x)
            return (row_phase * source.phases + column_phase) * source.plane + row * source.pitch + column

        def position(y: int, x: int) -> _Position:
            taps = (place(y * w.stride + down, x * w.stride + right) for down in w.lines for right in w.columns)
            return _Position(y * frame.pitch + x, tuple(taps))

        return [position(y, x) for y in range(frame.height) for x in range(frame.width)]

    def write(self, g: Function, tiles: int, rest: int) -> None:
        """Some whole tiles of K vectors of outputs, and one of the outputs that are left."""
        vectors = _vectors(g.lanes)
        whole = vectors * g.lanes

        def one_tile(t: Index) -> list[Index]:
            self._tile(g, vectors, g.scaled(t, whole), whole)
            return []

        if tiles:
            g.loop(tiles, one_tile)
        if rest:
            self._tile(g, -(-rest // g.lanes), Index(tiles * whole), rest)

    def _tile(self, g: Function, vectors: int, first: Index, count: int) -> None:
        """So many outputs, from ``first`` on."""
        taps, outputs = self.window.taps, -(-self.outputs // g.lanes) * g.lanes
        weights = g.at(_WEIGHTS, g.scaled(g.scaled(first, _INPUTS), taps))
        left = g.scaled(g.scaled(g.minus(outputs, first), _INPUTS), taps)  # weights of this tile and all behind it
        last = g.minus(left, taps * vectors * g.lanes)
        positions = self.positions
        most = (self.module.isa.registers - 1 - vectors) // vectors
        groups = -(-len(positions) // most)
        blocks = groups > 1 and (self.module.isa.registers <= _FEW_REGISTERS or groups <= _FEW_GROUPS)

        def inputs(begin: Index, end: Index) -> None:
            """Add what some inputs make to the sums of all positions, or make the sums."""
            for index in range(groups):
                low, high = (n * len(positions) // groups for n in (index, index + 1))
                first_slot, first_place, these = _from_the_first(positions[low:high])
                into = g.at(_SCRATCH, first_slot * vectors * g.lanes)
                x, stride = g.at(_X, first_place), self.source.channel
                multiply = self._multiply(vectors, these, adds=blocks)
                g.call(multiply, x, stride, weights, last, _LI, _NI, begin, end, into)

        def one_block(n: Index) -> list[Index]:
            begin = g.scaled(n, _AT_ONCE)
            inputs(begin, g.least(g.plus(begin, _AT_ONCE), _NI))
            return []

        if blocks:
            g.clear(_SCRATCH, (positions[-1].slot + 1) * vectors * g.lanes * g.element.size)
            g.loop(g.divided(g.plus(_NI, _AT_ONCE - 1), _AT_ONCE), one_block)
        else:
            inputs(ZERO, _NI)
        before = g.index(_BELOW, first)
        kept = g.minus(g.index(_BELOW, g.plus(first, count)), before)
        g.call(self._outputs(vectors), _SCRATCH, _BIAS, g.floats.at(_LO, before), first, kept, *self.extra)

    def _multiply(self, vectors: int, positions: tuple[_Position, ...], *, adds: bool) -> str:
        """The function that multiplies and adds: some vectors of outputs at some positions, from some kept inputs.

        ``adds``: to what is there.
        """
        taps = self.window.taps
        length = taps * vectors * self.module.lanes  # weights of an input

        def write(g: Function) -> None:
            line = 64 // g.element.size
            further = max(1, _AHEAD // (length * g.element.size))

            def one_input(j: Index, sums: Sequence[Vec]) -> list[Vec]:
                i, totals = j if self.every else g.index(_LI, j), list(sums)
                x = g.at(_X, g.scaled(i, _STRIDE))
                row = g.at(_WEIGHTS, g.scaled(i, length))
                if taps == 1 or not self.every:
                    ahead = g.at(_WEIGHTS, self._further(g, g.plus(j, further), length))
                    for n in range(length // line):
                        g.prefetch(ahead, n * line, near=False)
                for t in range(taps):
                    inside = [(p, position.taps[t]) for p, position in enumerate(positions)]
                    if all(place is None for _, place in inside):
                        continue
                    weights = [g.load(row, (t * vectors + k) * g.lanes) for k in range(vectors)]
                    for p, place in inside:
                        if place is not None:
                            value = g.splat(g.scalar(x, place))
                            for k, weight in enumerate(weights, p * vectors):
                                totals[k] = g.fma(value, weight, totals[k])
                return totals

            def together(first: Index, count: int, sums: Sequence[Vec]) -> list[Vec]:
                totals = list(sums)
                for n in range(count):
                    totals = one_input(g.plus(first, n), totals)
                return totals

            def some_inputs(begin: Index, count: Index, size: int, sums: Sequence[Vec]) -> list[Vec]:
                """``count`` times ``size`` of them."""
                return g.loop(count, lambda n, *sums: together(g.plus(begin, g.scaled(n, size)), size, sums), *sums)

            places = [(position.slot * vectors + k) * g.lanes for position in positions for k in range(vectors)]
            first = [g.load(_SCRATCH, place) if adds else Vec("zeroinitializer") for place in places]
            size, count = _TOGETHER if adds else 1, g.minus(_END, _BEGIN)
            totals = some_inputs(_BEGIN, g.divided(count, size), size, first)
            if size > 1:
                rest = g.remainder(count, size)
                totals = some_inputs(g.minus(_END, rest), rest, 1, totals)
            for place, total in zip(places, totals, strict=True):
                g.store(total, _SCRATCH, place)

        key = ("lanes multiply", self.every, vectors, taps, positions, adds)
        return self.module.function(key, [_X, _STRIDE, _WEIGHTS, _LAST, _LI, _NI, _BEGIN, _END, _SCRATCH], write)

    def _further(self, g: Function, place: Index, length: int) -> Index:
        """Where the weights of an input lie that is yet to come, behind the last one those of the next tile."""
        if self.every:
            return g.least(g.scaled(place, length), _LAST)
        return g.scaled(g.index(_LI, g.least(place, g.minus(_NI, 1))), length)

    def _outputs(self, vectors: int) -> str:
        """The function that brings what a tile made into the planes of its outputs, and does what follows."""
        frame = self.frame

        def write(g: Function) -> None:
            def one_output(k: Index) -> list[Index]:
                channel = g.index(_LO, k)
                bias, products = g.splat_float(_BIAS, channel), g.at(_SCRATCH, g.minus(channel, _FIRST))

                def one_vector(v: Index) -> list[Index]:
                    start = g.scaled(v, g.lanes)
                    here, value = g.at(products, g.scaled(start, vectors * g.lanes)), Vec("zeroinitializer")
                    for lane in range(g.lanes):
                        value = g.insert(value, g.scalar(here, lane * vectors * g.lanes), lane)
                    element = epilogues.Element(self.module, g, frame, self.epilogue, channel, start)
                    element.make(0, v, g.arithmetic("fadd", value, bias))
                    element.pool()
                    return []

                g.loop(single(frame, g.lanes).blocks, one_vector)
                return []

            g.loop(_COUNT, one_output)

        key = ("lanes outputs", vectors, frame, self.epilogue.signature)
        return self.module.function(key, [_SCRATCH, _BIAS, _LO, _FIRST, _COUNT, *self.extra], write)
