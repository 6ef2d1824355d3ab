"""How code walks over a map: in blocks of vectors, with lanes masked where a vector leaves the map.

Positions of a phase are counted row after row, ``pitch`` to a row; a vector holds as many neighbouring ones as the
instruction set has lanes, a block is some neighbouring vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from manidp.engine.ir import Bits, Function, Index, Offset, Piece, Pointer, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Layout

BLOCK = Index("%block")


class Span(NamedTuple):
    """Positions p with 0 <= factor * p + shift < size."""

    shift: int
    size: int
    factor: int = 1


ALL = Span(0, 2**62)


@dataclass(frozen=True)
class Tile:
    """At most ``outputs`` x ``vectors`` sums; the map is walked in ``blocks`` blocks of that many vectors."""

    outputs: int
    vectors: int
    blocks: int

    @property
    def least(self) -> int:
        """Outputs of the smallest tile there is code for; more than one tile's are split evenly, so few need less."""
        return (self.outputs + 1) // 2


def single(frame: Layout, lanes: int) -> Tile:
    """A map walked vector by vector."""
    return Tile(1, 1, -(-frame.rows * frame.pitch // lanes))


@dataclass(frozen=True)
class Mask:
    """Lanes of a block's vector: ``lanes`` if they are the same in all blocks (None: all lanes), else a table."""

    lanes: tuple[bool, ...] | None = None
    table: Pointer | None = None

    @property
    def word(self) -> int:
        """A bit a lane, the first lane lowest."""
        return sum(lane << place for place, lane in enumerate(self.lanes or ()))

    def bits(self, f: Function, block: Offset) -> Bits | None:
        """The mask as a value, None for all lanes."""
        if self.table:
            integer = f"i{max(8, f.lanes)}"
            address = f.make(Pointer, f"getelementptr {integer}, ptr {self.table}, i64 {block}")
            return bits_of(f, f.make(Piece, f"load {integer}, ptr {address}"), integer)
        return None if self.lanes is None else Bits(f"<{', '.join(f'i1 {int(lane)}' for lane in self.lanes)}>")


def bits_of(f: Function, word: Piece | Index, integer: str) -> Bits:
    """The lanes whose bits are set in an integer of this type."""
    if integer != f"i{f.lanes}":
        word = f.make(Piece, f"trunc {integer} {word} to i{f.lanes}")
    return f.make(Bits, f"bitcast i{f.lanes} {word} to <{f.lanes} x i1>")


def mask_of(
    module: Module, frame: Layout, phase: int, tile: Tile, vector: int, rows: Span = ALL, columns: Span = ALL
) -> Mask:
    """The lanes of a block's vector whose row and column lie in a span; those outside the map do not matter.

    With no span given, those that are inside the map.
    """
    lanes = module.lanes
    found = _lanes(lanes, frame.valid(phase), frame.pitch, tile.blocks, tile.vectors, vector, rows, columns)
    return Mask(table=module.table(f"i{max(8, lanes)}", found)) if isinstance(found, list) else Mask(found)


@lru_cache(256)
def _lanes(
    lanes: int, size: tuple[int, int], pitch: int, blocks: int, vectors: int, vector: int, rows: Span, columns: Span
) -> tuple[bool, ...] | list[int] | None:
    """As ``Mask.lanes`` if they are the same in all blocks, else a word of bits for each block."""
    first = np.arange(blocks)[:, None] * vectors + vector
    row, column = np.divmod(first * lanes + np.arange(lanes), pitch)
    inside = (row < size[0]) & (column < size[1])
    holds = inside
    for at, span in ((row, rows), (column, columns)):
        if span != ALL:
            there = span.factor * at + span.shift
            holds = holds & (there >= 0) & (there < span.size)
    cleared = ~holds if (rows, columns) == (ALL, ALL) else inside & ~holds
    ever_set, ever_cleared = np.any(holds, axis=0), np.any(cleared, axis=0)
    if not ever_cleared.any():
        return None
    if not (ever_set & ever_cleared).any():
        return tuple(not lane for lane in ever_cleared.tolist())
    words: list[int] = (~cleared @ (1 << np.arange(lanes))).tolist()
    return words


def tap(module: Module, source: Layout, frame: Layout, tile: Tile, down: int, right: int) -> tuple[int, list[Mask]]:
    """Where the elements ``down`` and ``right`` of the block's own lie, and the lanes that do not wrap around."""
    (row_phase, rows), (column_phase, columns) = source.reach(down), source.reach(right)
    same_row = Span(columns, source.pitch)
    masks = [mask_of(module, frame, 0, tile, v, columns=same_row) for v in range(tile.vectors)]
    phase = row_phase * source.phases + column_phase
    return phase * source.plane + rows * source.pitch + columns, masks


def neighbour(
    module: Module, g: Function, x: Pointer, block: Index, source: Layout, frame: Layout, down: int, right: int
) -> Vec:
    """The elements ``down`` and ``right`` of those of a block of one vector, zeros outside the map."""
    lanes = module.lanes
    tile = single(frame, lanes)
    offset, (same_row,) = tap(module, source, frame, tile, down, right)
    (_, rows), (_, columns) = source.reach(down), source.reach(right)
    mask = mask_of(module, frame, 0, tile, 0, Span(rows, source.rows), Span(columns, source.pitch))
    if mask.table:
        mask = same_row  # what lies above and below the map is zero anyway
    before, shift = divmod(offset, lanes)
    if not shift or not module.isa.permutes or mask.table:
        return g.zero_unless(mask.bits(g, block), g.load(x, offset))
    # loads that cross cache lines are slow: put the lanes together from aligned vectors
    kept = mask.lanes or (True,) * lanes
    chosen = [shift + lane if kept[lane] else None for lane in range(lanes)]
    sides = [any(lane is not None and (lane >= lanes) == side for lane in chosen) for side in (False, True)]
    low, high = (g.load(x, (before + side) * lanes) if sides[side] else Vec("poison") for side in range(2))
    return g.zero_unless(mask.bits(g, block), g.shuffle(g.vector, low, chosen, high))


def vectors_of(g: Function, tile: Tile, one: Tile, write: Callable[[Index, Index], None]) -> None:
    """``write(v, its number in the map)`` for the vectors of %block that lie in the map."""
    first = g.scaled(BLOCK, tile.vectors)
    count: Offset = tile.vectors
    if one.blocks % tile.vectors:
        count = g.least(count, g.minus(one.blocks, first))

    def one_vector(v: Index) -> list[Index]:
        write(v, g.plus(first, v))
        return []

    g.loop(count, one_vector)


def pieces_of(g: Function, layout: Layout, lanes: int, write: Callable[[Index, int], None]) -> None:
    """``write(first column of the phases, number of elements of the map)`` for a row, ``lanes`` columns at a time."""
    whole, rest = divmod(layout.width, lanes * layout.phases)

    def one_piece(index: Index) -> list[Index]:
        write(g.scaled(index, lanes), lanes * layout.phases)
        return []

    if whole:
        g.loop(whole, one_piece)
    if rest:
        write(Index(whole * lanes), rest)


def lines_of(g: Function, layout: Layout, write: Callable[[Index, Index, Index], None]) -> None:
    """``write(line of the map, its phase row, its row there)`` for every line."""

    def one_line(y: Index) -> list[Index]:
        write(y, g.remainder(y, layout.phases), g.divided(y, layout.phases))
        return []

    g.loop(layout.height, one_line)
