"""The depthwise convolution: each channel by itself, some rows at a time (``rows.py``) or a few vectors at a time.

By vectors the map is walked as it lies, rows of less than half a vector, too; so are inputs of a product of matrices.
Taps of one column are added up first: which lanes do not wrap around is the same for all of them. Where two vectors
are put together in one instruction, all columns are added up over the same elements, each of which is loaded once for
each line, and the sums are shifted by their column; a vector's sums are kept for the next one's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import ZERO, Element, Function, Index, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import ConvolutionStep, Kernel, Packed
from manidp.engine.kernels.direct import windows_of
from manidp.engine.kernels.rows import MOST_OF_2, Rows
from manidp.engine.module import WORKSPACE, Module
from manidp.engine.steps import Channels, Epilogue, Layout, MapKey, Step, Window, window_of
from manidp.engine.walk import Mask, single, tap
from manidp.graph import Conv

VECTORS = 2  # at a time

_X, _WEIGHTS, _BIAS, _LIST = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%list")
_N, _SCRATCH = Index("%n"), Pointer("%scratch")


@dataclass(frozen=True)
class Depthwise(Kernel):
    """Reads zeros where a gate has closed a channel of the source."""

    skips_inputs = False

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        return node.groups == node.channels == inputs

    def phases(self, node: Conv) -> tuple[int, int]:
        window = window_of(node)
        as_it_lies = window.stride == 2 and window.taps <= MOST_OF_2
        return (1 if as_it_lies else window.stride), 1

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        kind = ConvolveEachSecond if window_of(node).stride > self.phases(node)[0] else ConvolveEach
        return kind(node, source, packed, inputs, outputs, epilogue)

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """The sum of each column tap by tap, then column by column; each product and sum rounded once."""
        kind = weight[:, 0].astype(x.dtype).astype(np.float64)
        windows = windows_of(x, node).astype(np.float64)
        total = np.zeros(windows.shape[:4], x.dtype)
        for v in range(kind.shape[2]):
            column = np.zeros_like(total)
            for u in range(kind.shape[1]):
                column = (column + windows[..., u, v] * kind[:, u, v, None, None]).astype(x.dtype)
            total = total + column
        return total


def taps_of(g: Function, window: Window, weights: Pointer, channel: Index) -> list[list[Vec]]:
    """The weights of a channel, column by column, each in all lanes."""
    row = g.at(weights, g.scaled(channel, window.taps))
    taps = [g.splat(g.scalar(row, n)) for n in range(window.taps)]
    return [taps[n :: len(window.columns)] for n in range(len(window.columns))]


@dataclass(frozen=True)
class Columns:
    """The sums of a channel without stride, vector after vector. ``simple``: what follows takes few registers."""

    module: Module
    g: Function
    window: Window
    source: Layout
    frame: Layout
    weights: Sequence[Sequence[Vec]]  # of each column
    bias: Vec
    simple: bool

    @property
    def _shifts(self) -> list[int]:
        """How far the columns lie from the first one."""
        return [right - self.window.columns[0] for right in self.window.columns]

    @property
    def carried(self) -> bool:
        """Whether all columns are added up over the same elements, and a vector's sums kept for the one before it."""
        lanes, short = self.g.lanes, self.simple and self._shifts[-1] <= self.g.lanes
        return self.module.isa.permutes and short and single(self.frame, lanes).blocks > 1

    def carry(self, x: Pointer) -> list[Vec]:
        """What the first vector, at x, needs to be kept."""
        return [column for (column,) in self._sums(x, 1)] if self.carried else []

    def totals(self, x: Pointer, blocks: Sequence[Index], carry: Sequence[Vec]) -> tuple[list[Vec], list[Vec]]:
        """The sums of some vectors from x on, ``blocks`` their numbers in the map; what to keep for the next ones."""
        g, carry = self.g, list(carry)
        columns = self._sums(g.at(x, g.lanes) if self.carried else x, len(blocks))
        if self.carried:
            whole = [[before, *sums] for before, sums in zip(carry, columns, strict=True)]
            carry = [sums[-1] for sums in whole]
            columns = [
                [g.ahead(low, high, shift) for low, high in itertools.pairwise(sums)]
                for shift, sums in zip(self._shifts, whole, strict=True)
            ]
        totals = [self.bias] * len(blocks)
        for taps, sums in zip(self._taps, columns, strict=True):
            (mask,) = taps[0][1]
            for v, block in enumerate(blocks):
                totals[v] = g.arithmetic("fadd", totals[v], g.zero_unless(mask.bits(g, block), sums[v]))
        return totals, carry

    @cached_property
    def _taps(self) -> list[list[tuple[int, list[Mask]]]]:
        window, tile = self.window, single(self.frame, self.g.lanes)
        return [
            [tap(self.module, self.source, self.frame, tile, down, right) for down in window.lines]
            for right in window.columns
        ]

    def _sums(self, x: Pointer, vectors: int) -> list[list[Vec]]:
        """What lies under the taps of each column, added up, vector by vector; where carried, under the first's."""
        g, made = self.g, []
        for taps, weights, shift in zip(self._taps, self.weights, self._shifts, strict=True):
            sums = [g.constant(0)] * vectors
            for (offset, _), weight in zip(taps, weights, strict=True):
                for v in range(vectors):
                    value = g.load(x, offset - (shift if self.carried else 0) + v * g.lanes)
                    sums[v] = g.fma(value, weight, sums[v])
            made.append(sums)
        return made


class ConvolveEach(ConvolutionStep):
    """A depthwise convolution and what follows it."""

    def emit(self, module: Module, f: Function) -> None:
        source, frame = self.layouts(module)
        window = window_of(self.node)
        operands = epilogues.operands_of(module, f, self.epilogue)

        def write(g: Function) -> None:
            def one_channel(j: Index) -> list[Index]:
                channel = g.index(_LIST, j)
                weights = taps_of(g, window, _WEIGHTS, channel)
                x, bias = g.at(_X, g.scaled(channel, source.channel)), g.splat_float(_BIAS, channel)
                self._channel(module, g, channel, x, weights, bias)
                return []

            g.loop(_N, one_channel)

        key = ("depthwise", window, source, frame, self.epilogue.signature)
        arguments = [_X, _WEIGHTS, _BIAS, _LIST, _N, _SCRATCH, *epilogues.parameters_of(operands)]
        name = module.function(key, arguments, write)
        list_, _, count = module.lists(f, self.outputs)
        scratch = f.at(WORKSPACE, module.plan.workspace)
        f.call(name, *self.reads(module, f), list_, count, scratch, *operands)

    def _channel(
        self, module: Module, g: Function, channel: Index, x: Pointer, weights: list[list[Vec]], bias: Vec
    ) -> None:
        """``weights`` of each column."""
        source, frame = self.layouts(module)
        rows = Rows(module, window_of(self.node), source, frame)
        if rows.pays(self.epilogue):
            self._by_rows(module, g, channel, rows, x, weights, bias)
        else:
            columns = Columns(module, g, rows.window, source, frame, weights, bias, self.epilogue.simple)
            self._by_vectors(module, g, channel, columns, x)

    def _by_rows(
        self, module: Module, g: Function, channel: Index, rows: Rows, x: Pointer, weights: list[list[Vec]], bias: Vec
    ) -> None:
        """Some rows at a time; into scratch memory, then as a map, where what lies behind a row is in the way."""
        frame, lanes = rows.frame, module.lanes
        part = frame.width < lanes  # so that a row's vector reaches into the next rows, which are made later
        last = (frame.height - 1) * frame.pitch
        fits = last + lanes <= frame.plane and frame.pitch == frame.width and not epilogues.at_once(frame, lanes)
        direct = not self.epilogue.maps and (fits or not part)
        blocks = single(frame, lanes).blocks

        def put(start: Index, totals: list[Vec], fresh: Mask) -> None:
            if not direct:
                for r, total in enumerate(totals):
                    g.store(total, g.at(_SCRATCH, start), r * frame.pitch)
                return
            element = epilogues.Element(module, g, frame, self.epilogue, channel, start)
            for r, total in enumerate(totals):
                keep = part and r * frame.pitch + lanes > len(totals) * frame.pitch
                element.put(r * frame.pitch, total, fresh.bits(g, ZERO), keep=keep)
            element.pool()

        def one_block(block: Index) -> list[Index]:
            start = g.scaled(block, lanes)
            element = epilogues.Element(module, g, frame, self.epilogue, channel, start)
            element.make(0, block, g.load(_SCRATCH, start))
            element.pool()
            return []

        rows.write(g, x, weights, bias, put)
        if not direct:
            module.reserve_scratch(max(blocks * lanes, last + max(frame.width, lanes)))
            g.loop(blocks, one_block)

    def _by_vectors(self, module: Module, g: Function, channel: Index, columns: Columns, x: Pointer) -> None:
        """Vector by vector, rows one after the other."""
        frame = columns.frame

        def some(first: Index, vectors: int, carry: Sequence[Vec]) -> list[Vec]:
            start = g.scaled(first, g.lanes)
            element = epilogues.Element(module, g, frame, self.epilogue, channel, start)
            blocks = [g.plus(first, v) for v in range(vectors)]
            totals, carry = columns.totals(g.at(x, start), blocks, carry)
            for v, block in enumerate(blocks):
                element.make(0, block, totals[v], v * g.lanes)
            element.pool()
            return carry

        def one_block(index: Index, *carry: Vec) -> list[Vec]:
            return some(g.scaled(index, VECTORS), VECTORS, carry)

        blocks, rest = divmod(single(frame, g.lanes).blocks, VECTORS)
        carry = columns.carry(x)
        if blocks:
            carry = g.loop(blocks, one_block, *carry)
        if rest:
            some(Index(blocks * VECTORS), rest, carry)


class ConvolveEachSecond(ConvolveEach):
    """The same with stride 2."""

    def together(self) -> list[MapKey]:
        return [self.epilogue.frame, *self.epilogue.maps]
