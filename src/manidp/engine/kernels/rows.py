"""The sums of a depthwise convolution, some rows of a channel at a time: what is loaded serves the taps of all of them.

    for some rows of outputs:
        for each vector of a row, the last one where the row ends:
            for each column of taps:
                for each line under a tap of these rows, loaded once:
                    s[row] += x[line][column] * weight     for the rows that have it under a tap
                a[row] += s[row], zeros in lanes whose tap leaves the map

Which lanes do not leave it is the same for all taps of a column, and known when the code is written. With stride 2 the
map is read as it lies, and every second element of two vectors makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from manidp.engine.ir import ZERO, Function, Index, Pointer, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Epilogue, Layout, Window
from manidp.engine.walk import Mask

# rows at a time, and products of a sum of them all that there is code for; with stride 2, which shares fewer of what it
# loads, less of it: by measurement on AMD's Zen 4
_ROWS, _PRODUCTS, _ROWS_OF_2, MOST_OF_2 = 7, 75, 2, 50
_BORDERS = 4  # vectors of a row, at most, some of whose lanes have taps outside the map


class _Strip(NamedTuple):
    """A vector of each row: where it begins, the lanes that a column of taps has in the map, and those that are new."""

    start: int
    masks: tuple[Mask, ...]
    fresh: Mask

    @property
    def whole(self) -> bool:
        """Whether all lanes are, of all columns, and are new."""
        return all(mask.lanes is None for mask in (*self.masks, self.fresh))


@dataclass(frozen=True)
class Rows:
    """The sums of a channel, some rows at a time: what is loaded serves the taps of all of them."""

    module: Module
    window: Window
    source: Layout
    frame: Layout

    @property
    def together(self) -> int:
        """Rows at a time."""
        rows, products = (_ROWS, _PRODUCTS) if self._step == 1 else (_ROWS_OF_2, MOST_OF_2)
        most = min(self.frame.height, rows, max(1, products // self.window.taps))
        groups = -(-self.frame.height // most)
        return -(-self.frame.height // groups)

    @property
    def _step(self) -> int:
        """How far the columns of neighbouring outputs lie from each other in a row of a phase."""
        return self.window.stride // self.source.phases

    @cached_property
    def _strips(self) -> list[_Strip]:
        lanes, width, step = self.module.lanes, self.frame.width, self._step
        inside = self.source.width if step > 1 else self.source.pitch  # between the two there are zeros

        def mask(start: int, right: int) -> Mask:
            shift = right if step > 1 else self.source.reach(right)[1]
            kept = tuple(
                0 <= step * column + shift < inside or column >= width for column in range(start, start + lanes)
            )
            return Mask(None if all(kept) else kept)

        def strip(first: int) -> _Strip:
            start = max(0, min(first, width - lanes))
            fresh = tuple(first <= column < width for column in range(start, start + lanes))
            masks = tuple(mask(start, right) for right in self.window.columns)
            return _Strip(start, masks, Mask(None if all(fresh) else fresh))

        return [strip(first) for first in range(0, width, lanes)]

    def pays(self, epilogue: Epilogue) -> bool:
        """Whether to go by rows: with stride 2 always; else where rows fill vectors, and few of these lie at a border.

        Lanes that a row leaves idle cost more where what follows takes long.
        """
        inner = sum(strip.whole for strip in self._strips)
        short = self.window.taps <= _PRODUCTS and (epilogue.simple or not self.module.isa.permutes)
        fills = 2 * self.frame.width > self.module.lanes and len(self._strips) - inner <= _BORDERS
        return self._step > 1 or (short and fills)

    def write(
        self, g: Function, x: Pointer, weights: Sequence[Sequence[Vec]], bias: Vec,
        put: Callable[[Index, list[Vec], Mask], None],
    ) -> None:  # fmt: skip
        """``put(where it begins, a vector of each of some rows, the lanes that are in the map and not yet made)``.

        Rows come one after the other where a row is less than a vector.
        """
        strips, most = self._strips, self.together
        low = next((n for n, strip in enumerate(strips) if strip.whole), len(strips))
        high = next((n for n in range(low, len(strips)) if not strips[n].whole), len(strips))

        def some_rows(y: Index, rows: int) -> list[Index]:
            line, begin = g.at(x, g.scaled(y, self._step * self.source.pitch)), g.scaled(y, self.frame.pitch)

            def one(start: Index, strip: _Strip) -> list[Index]:
                here = g.at(line, g.scaled(start, self._step))
                put(g.plus(begin, start), self._totals(g, here, range(rows), weights, bias, strip.masks), strip.fresh)
                return []

            for strip in strips[:low]:
                one(Index(strip.start), strip)
            if high > low:
                g.loop(high - low, lambda n: one(g.scaled(g.plus(n, low), g.lanes), strips[low]))
            for strip in strips[high:]:
                one(Index(strip.start), strip)
            return []

        groups, rest = divmod(self.frame.height, most)
        g.loop(groups, lambda n: some_rows(g.scaled(n, most), most))
        if rest:
            some_rows(Index(groups * most), rest)

    def _totals(
        self,
        g: Function,
        here: Pointer,
        rows: range,
        weights: Sequence[Sequence[Vec]],
        bias: Vec,
        masks: Sequence[Mask],
    ) -> list[Vec]:
        """A vector of each of the rows, counted from the one at ``here``."""
        totals, loaded = [bias] * len(rows), dict[tuple[int, int], tuple[Vec, Vec]]()
        for right, of_column, mask in zip(self.window.columns, weights, masks, strict=True):
            values, sums = dict[int, Vec](), [g.constant(0) for _ in rows]
            for down, weight in zip(self.window.lines, of_column, strict=True):
                for r in rows:
                    at = self._place(r, down)
                    if at not in values:
                        values[at] = self._value(g, here, at, right, loaded)
                    sums[r] = g.fma(values[at], weight, sums[r])
            for r in rows:
                made = sums[r] if self._step == 1 else g.shuffle(g.vector, sums[r], self._order)
                totals[r] = g.arithmetic("fadd", totals[r], g.zero_unless(mask.bits(g, ZERO), made))
        return totals

    def _place(self, r: int, down: int) -> int:
        """Where the line under a tap of row r lies."""
        phase, line = self.source.reach(down)
        return phase * self.source.phases * self.source.plane + (self._step * r + line) * self.source.pitch

    def _value(
        self, g: Function, here: Pointer, at: int, right: int, loaded: dict[tuple[int, int], tuple[Vec, Vec]]
    ) -> Vec:
        """What lies under a tap in a line; every second element of it in the order of ``_taken``."""
        if self._step == 1:
            phase, column = self.source.reach(right)
            return g.load(here, at + phase * self.source.plane + column)
        odd = (at, right - 1) in loaded
        if not odd:
            loaded[at, right] = g.load(here, at + right), g.load(here, at + right + g.lanes)
        low, high = loaded[at, right - odd]
        return g.shuffle(g.vector, low, [lane + odd for lane in self._taken], high)

    @cached_property
    def _taken(self) -> list[int]:
        """Every second element of each 16 bytes of two vectors, which is one instruction."""
        lanes, chunk = self.module.lanes, 16 // self.module.element.size
        halves = [first + n for first in range(0, lanes, chunk) for n in (0, lanes)]
        return [first + 2 * n for first in halves for n in range(chunk // 2)]

    @cached_property
    def _order(self) -> list[int]:
        """Where the lanes in question then lie, which is one more for a column."""
        return sorted(range(self.module.lanes), key=self._taken.__getitem__)
