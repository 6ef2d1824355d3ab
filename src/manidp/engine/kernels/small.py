"""The convolution of a small map: neighbouring outputs in the lanes, a few positions at a time.

    for K vectors of outputs:
        for P positions:
            for j in kept inputs:
                for each tap of the kernel:
                    w[k] = K vectors of the weights of input channel li[j] at the tap
                    for p in positions whose tap lies in the map:
                        a[p][k] += x[li[j]][p at the tap] * w[k]

A map of fewer positions than a vector has lanes leaves none of them idle so, and the weights, which take longer to read
than to multiply where they serve few positions, are read vector by vector in the order in which they lie. Taps outside
the map are not computed at all: of a 3x3 convolution of a 2x2 map that is more than half. All outputs are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import Element, Function, Index, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import Kernel, Packed, by_input
from manidp.engine.kernels.direct import Direct
from manidp.engine.module import WORKSPACE, Module
from manidp.engine.steps import Channels, Epilogue, Layout, MapKey, MapStep, Step, Window, lengthened, window_of
from manidp.engine.walk import single
from manidp.graph import Conv, sides

VECTORS = 3  # of outputs at a time
_MOST = 256  # taps of all positions: the code has K multiply-adds for each

_X, _WEIGHTS, _BIAS, _LI, _NI = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%li"), Index("%ni")
_INPUTS, _SCRATCH, _FIRST, _COUNT = Index("%inputs"), Pointer("%scratch"), Index("%first"), Index("%count")


@dataclass(frozen=True)
class Small(Kernel):
    """Where no gate closes outputs."""

    @property
    def skips_outputs(self) -> bool:
        return False

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        return node.groups == 1

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        """Taps that lie in the map; on larger maps it loses, since weights are read again for every few positions."""
        window, (top, left, bottom, right) = window_of(node), sides(node.padding)
        taps = 1
        for size, lines, padding in ((height, window.lines, top + bottom), (width, window.columns, left + right)):
            extent = (size - 1) * window.stride + lines[-1] - lines[0] + 1 - padding
            taps *= sum(0 <= n * window.stride + line < extent for n in range(size) for line in lines)
        return 0.95 * taps / lanes if height * width < lanes and taps <= _MOST else np.inf

    def pack(self, weight: NDArray[Any], element: Element, lanes: int) -> NDArray[Any]:
        """Of K vectors of outputs after the other, input by input, tap by tap; outputs padded to whole vectors."""
        rows = lengthened(weight.reshape(len(weight), -1), lanes)
        return by_input(rows, [*range(0, len(rows), VECTORS * lanes), len(rows)], element)

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        return ConvolveSmall(node, source, packed, inputs, epilogue)

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Input by input, as the direct convolution."""
        return Direct().model(x, weight, node)


@dataclass(frozen=True)
class ConvolveSmall(MapStep):
    """A convolution of a small map and what follows it."""

    node: Conv
    source: MapKey
    packed: Packed
    inputs: Channels
    epilogue: Epilogue

    def walks(self) -> Conv:
        return self.node

    def emit(self, module: Module, f: Function) -> None:
        source, frame = module.plan.maps[self.source].layout, module.plan.maps[self.epilogue.frame].layout
        operands = epilogues.operands_of(module, f, self.epilogue)
        extra = epilogues.parameters_of(operands)
        window, whole = window_of(self.node), VECTORS * module.lanes
        module.reserve_scratch(frame.height * frame.width * whole)
        tiles, rest = divmod(self.node.channels, whole)
        code = _Code(module, window, source, frame, self.epilogue, extra)
        arguments = [_X, _WEIGHTS, _BIAS, _LI, _NI, _INPUTS, _SCRATCH, *extra]
        key = ("small", tiles, rest, window, source, frame, self.epilogue.signature)
        name = module.function(key, arguments, lambda g: code.write(g, tiles, rest))
        li, _, ni = module.lists(f, self.inputs)
        f.call(
            name, module.map_at(f, self.source), module.constant_at(f, self.packed.weights),
            module.constant_at(f, self.packed.bias), li, ni, self.inputs.count,
            f.at(WORKSPACE, module.plan.workspace), *operands,
        )  # fmt: skip


@dataclass(frozen=True)
class _Code:
    """The code for a layer."""

    module: Module
    window: Window
    source: Layout
    frame: Layout
    epilogue: Epilogue
    extra: list[Pointer]

    @property
    def places(self) -> list[list[int | None]]:
        """Of each position of the frame: where its taps lie in a channel of the source, None outside the map."""
        w, source = self.window, self.source

        def place(y: int, x: int) -> int | None:
            if not (0 <= y < source.height and 0 <= x < source.width):
                return None
            (row_phase, row), (column_phase, column) = source.reach(y), source.reach(x)
            return (row_phase * source.phases + column_phase) * source.plane + row * source.pitch + column

        return [
            [place(row * w.stride + down, column * w.stride + right) for down in w.lines for right in w.columns]
            for row in range(self.frame.height)
            for column in range(self.frame.width)
        ]

    def write(self, g: Function, tiles: int, rest: int) -> None:
        """Some whole tiles of K vectors of outputs, and one of the outputs that are left."""
        whole = VECTORS * g.lanes

        def one_tile(t: Index) -> list[Index]:
            self._tile(g, VECTORS, g.scaled(t, whole), whole)
            return []

        if tiles:
            g.loop(tiles, one_tile)
        if rest:
            self._tile(g, -(-rest // g.lanes), Index(tiles * whole), rest)

    def _tile(self, g: Function, vectors: int, first: Index, count: int) -> None:
        """So many outputs, from ``first`` on."""
        weights = g.at(_WEIGHTS, g.scaled(g.scaled(first, _INPUTS), self.window.taps))
        places = self.places
        most = (self.module.isa.registers - 1 - vectors) // vectors
        groups = -(-len(places) // most)
        for index in range(groups):
            begin, end = (n * len(places) // groups for n in (index, index + 1))
            into = g.at(_SCRATCH, begin * vectors * g.lanes)
            g.call(self._multiply(vectors, places[begin:end]), _X, weights, _LI, _NI, into)
        g.call(self._outputs(vectors), _SCRATCH, _BIAS, first, count, *self.extra)

    def _multiply(self, vectors: int, places: Sequence[Sequence[int | None]]) -> str:
        """The function that multiplies and adds: some vectors of outputs at some positions, from all kept inputs."""
        channel, taps = self.source.channel, self.window.taps

        def write(g: Function) -> None:
            def one_input(j: Index, *sums: Vec) -> list[Vec]:
                i, totals = g.index(_LI, j), list(sums)
                x = g.at(_X, g.scaled(i, channel))
                row = g.at(_WEIGHTS, g.scaled(i, taps * vectors * g.lanes))
                for t in range(taps):
                    inside = [(p, place[t]) for p, place in enumerate(places)]
                    if all(at is None for _, at in inside):
                        continue
                    weights = [g.load(row, (t * vectors + k) * g.lanes) for k in range(vectors)]
                    for p, at in inside:
                        if at is not None:
                            value = g.splat(g.scalar(x, at))
                            for k, weight in enumerate(weights, p * vectors):
                                totals[k] = g.fma(value, weight, totals[k])
                return totals

            zeros = [Vec("zeroinitializer")] * (vectors * len(places))
            for at, total in enumerate(g.loop(_NI, one_input, *zeros)):
                g.store(total, _SCRATCH, at * g.lanes)

        key = ("small multiply", vectors, channel, tuple(map(tuple, places)))
        return self.module.function(key, [_X, _WEIGHTS, _LI, _NI, _SCRATCH], write)

    def _outputs(self, vectors: int) -> str:
        """The function that brings what a tile made into the planes of its outputs, and does what follows."""
        frame = self.frame

        def write(g: Function) -> None:
            def one_output(k: Index) -> list[Index]:
                channel, products = g.plus(_FIRST, k), g.at(_SCRATCH, k)
                bias = g.splat_float(_BIAS, channel)
                element = epilogues.Element(self.module, g, frame, self.epilogue, channel, Index("0"))
                for v in range(single(frame, g.lanes).blocks):
                    value = Vec("zeroinitializer")
                    for lane in range(g.lanes):
                        row, column = divmod(v * g.lanes + lane, frame.pitch)
                        if row < frame.height and column < frame.width:
                            at = (row * frame.width + column) * vectors * g.lanes
                            value = g.insert(value, g.scalar(products, at), lane)
                    element.make(0, Index(v), g.arithmetic("fadd", value, bias), v * g.lanes)
                element.pool()
                return []

            g.loop(_COUNT, one_output)

        key = ("small outputs", vectors, frame, self.epilogue.signature)
        return self.module.function(key, [_SCRATCH, _BIAS, _FIRST, _COUNT, *self.extra], write)
