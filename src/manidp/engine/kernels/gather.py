"""Inputs of a product of matrices, put one after the other: block by block of a map, tap after tap.

What stands before a 1x1 convolution is done on the way: operations on elements, or a depthwise convolution and these,
where its map would not stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from manidp.engine.ir import Function, Index, Pointer, Vec
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import Packed
from manidp.engine.kernels.depthwise import VECTORS, Columns, taps_of
from manidp.engine.module import Module
from manidp.engine.steps import Layout, Op, Window, simple
from manidp.engine.walk import single, tap
from manidp.graph import Conv

_X, _LIST, _INTO = Pointer("%x"), Pointer("%list"), Pointer("%into")
_N, _FIRST, _END, _SLOT = Index("%n"), Index("%first"), Index("%end"), Index("%slot")


@dataclass(frozen=True)
class Blocks:
    """A map's vectors in ``count`` blocks: the first ``wide`` ones have ``vectors``, the others one less."""

    vectors: int
    count: int
    wide: int

    def first(self, g: Function, block: Index) -> Index:
        """The number of a block's first vector."""
        if self.wide == self.count:
            return g.scaled(block, self.vectors)
        return g.plus(g.scaled(block, self.vectors - 1), g.least(block, self.wide))

    def ranges(self, g: Function, first: Index, end: Index) -> list[tuple[int, Index, Index]]:
        """The blocks from first to end: (vectors of a block, first, end) of the wide ones and of the others."""
        vectors, wide = self.vectors, self.wide
        if wide == self.count:
            return [(vectors, first, end)]
        begin, middle = g.least(first, wide), g.least(end, wide)
        return [(vectors, begin, middle), (vectors - 1, g.plus(first, g.minus(middle, begin)), end)]


def blocks_of(total: int, most: int) -> Blocks:
    """Blocks of at most so many vectors, as even as can be."""
    count = -(-total // most)
    vectors = -(-total // count)
    return Blocks(vectors, count, total - (vectors - 1) * count)


class Each(NamedTuple):
    """A depthwise convolution without stride, and where its constants lie."""

    node: Conv
    packed: Packed


@dataclass(frozen=True)
class Gather:
    """What is gathered of a map at the positions of ``frame``.

    before: done to it, where there is one tap; each: after this depthwise convolution. operands: what these take.
    """

    module: Module
    blocks: Blocks
    window: Window
    source: Layout
    frame: Layout
    before: tuple[Op, ...]
    each: Window | None
    operands: list[Pointer]

    @property
    def signature(self) -> object:
        """What its code depends on, besides layouts, window and blocks."""
        return tuple(op.signature for op in self.before), self.each

    def function(self) -> str:
        """The function that puts what the kept inputs hold at some blocks, under tap after tap, one after the other."""
        blocks, channel, window = self.blocks, self.source.channel, self.window
        one = single(self.frame, self.module.lanes)

        def write(g: Function) -> None:
            ranges = self.blocks.ranges(g, _FIRST, _END)
            taps = [
                tap(self.module, self.source, self.frame, one, down, right)
                for down in window.lines
                for right in window.columns
            ]

            def one_input(j: Index) -> list[Index]:
                i, pointers = g.index(_LIST, j), iter(self.operands)
                x = g.at(_X, g.scaled(i, channel))
                factors = [epilogues.factors_of(g, op, pointers, i) for op in self.before]
                if self.each:
                    self._convolve(g, ranges, i, j, factors, self.each, *pointers)
                    return []
                for vectors, low, high in ranges:

                    def one_block(b: Index, vectors: int = vectors, low: Index = low) -> list[Index]:
                        block = g.plus(low, b)
                        first = blocks.first(g, block)
                        here = g.at(x, g.scaled(first, g.lanes))
                        into = g.at(_INTO, g.scaled(g.minus(block, _FIRST), _SLOT))
                        into = g.at(into, g.scaled(j, window.taps * vectors * g.lanes))

                        def one_vector(v: Index) -> list[Index]:
                            at = g.scaled(v, g.lanes)
                            source, target = g.at(here, at), g.at(into, at)
                            for t, (offset, (mask,)) in enumerate(taps):
                                value = g.load(source, offset)
                                value = self._applied(g, factors, value)
                                value = g.zero_unless(mask.bits(g, g.plus(first, v)), value)
                                g.store(value, target, t * vectors * g.lanes)
                            return []

                        if window.taps > 1:  # a stem has 49 of them
                            g.loop(vectors, one_vector)
                        else:
                            for v in range(vectors):
                                one_vector(Index(v))
                        return []

                    g.loop(g.minus(high, low), one_block)
                return []

            g.loop(_N, one_input)

        walked = (window.taps > 1 or self.each) and (window, self.source, self.frame)
        key = ("gather", blocks, channel, walked, self.signature)
        return self.module.function(key, [_X, _LIST, _N, _INTO, _FIRST, _END, _SLOT, *self.operands], write)

    def _applied(self, g: Function, factors: Sequence[tuple[Vec, ...]], value: Vec) -> Vec:
        """What stands before the convolution, done to a vector of a channel."""
        for op, numbers in zip(self.before, factors, strict=True):
            value = epilogues.applied(g, op, numbers, value)
        return value

    def _convolve(
        self,
        g: Function,
        ranges: Sequence[tuple[int, Index, Index]],
        i: Index,
        j: Index,
        factors: Sequence[tuple[Vec, ...]],
        window: Window,
        weights: Pointer,
        bias: Pointer,
    ) -> None:
        """Put there what the depthwise convolution makes of input i, the j-th one."""
        x, taps = g.at(_X, g.scaled(i, self.source.channel)), taps_of(g, window, weights, i)
        columns = Columns(
            self.module, g, window, self.source, self.frame, taps, g.splat_float(bias, i), simple(self.before)
        )
        carry = columns.carry(g.at(x, g.scaled(self.blocks.first(g, _FIRST), g.lanes)))
        for vectors, low, high in ranges:

            def one_block(b: Index, *carry: Vec, vectors: int = vectors, low: Index = low) -> list[Vec]:
                block = g.plus(low, b)
                first = self.blocks.first(g, block)
                here, kept = g.at(x, g.scaled(first, g.lanes)), list(carry)
                into = g.at(_INTO, g.scaled(g.minus(block, _FIRST), _SLOT))
                into = g.at(into, g.scaled(j, vectors * g.lanes))
                for begin in range(0, vectors, VECTORS):
                    numbers = [g.plus(first, v) for v in range(begin, min(begin + VECTORS, vectors))]
                    totals, kept = columns.totals(g.at(here, begin * g.lanes), numbers, kept)
                    for v, total in enumerate(totals, begin):
                        g.store(self._applied(g, factors, total), into, v * g.lanes)
                return kept

            carry = g.loop(g.minus(high, low), one_block, *carry)
