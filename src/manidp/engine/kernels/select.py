"""Select: scores to a factor for each channel, and the lists of kept and closed channels that steer all later loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, NULL, Bits, Bool, Function, Index, Piece, Pointer
from manidp.engine.module import GATES, Module
from manidp.engine.steps import Step, VectorKey
from manidp.graph import Select

_ABOVE = "ugt"  # NaN passes, to be seen in the logits


@dataclass(frozen=True, eq=False, repr=False)
class Decide(Step):
    """Scores -> factors of a gate, and the lists of kept and closed channels; ``limit``: offset of what scores exceed.

    For a constant rule, the scores that are compared are the mask, and the limit is 0.
    """

    gate: Select
    scores: VectorKey
    channels: int
    limit: int
    mask: int | None = None

    def emit(self, module: Module, f: Function) -> None:
        """factor = score (or 1) where the channel is open, else 0."""
        scored, masked, lanes = self.gate.gain == "score", self.mask is not None, module.lanes
        scores, limit_at, mask = Pointer("%scores"), Pointer("%limit"), Pointer("%mask")
        gate, list_, below, values = Pointer("%gate"), Pointer("%list"), Pointer("%below"), Pointer("%values")
        n, last = Index("%n"), Index("%last")

        def write(g: Function) -> None:
            limit, zero = g.splat(g.scalar(limit_at)), g.constant(0)

            def one_vector(index: Index) -> list[Index]:
                here = g.scaled(index, lanes)
                score = g.load(scores, here)
                factor = g.select(g.compare(_ABOVE, score, limit), score if scored else g.constant(1), zero)
                if masked:
                    open_: Bits = g.compare("ogt", g.load(mask, here), zero)
                    factor = g.select(open_, factor if scored else g.constant(1), zero)
                g.store(factor, gate, here)
                return []

            g.loop(g.divided(g.plus(n, lanes - 1), lanes), one_vector)
            _write_lists(g, list_, below, n, last, lambda c: _open(g, gate, c))
            g.copy(gate, values, n)

        arguments = [scores, limit_at, mask, gate, list_, below, values, n, last]
        name = module.function(("select", scored, masked), arguments, write, FLOAT)
        channels = module.vector_at(f, VectorKey(self.gate.name, "list"))
        factors = f.at(GATES, module.gates[self.gate.name])
        mask_at = NULL if self.mask is None else module.constant_at(f, self.mask)
        f.call(
            name, module.vector_at(f, self.scores), module.constant_at(f, self.limit), mask_at,
            module.vector_at(f, VectorKey(self.gate.name)), channels, f.at(channels, self.channels), factors,
            self.channels, self.channels - 1,
        )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class ListChannels(Step):
    """The lists of a value whose channels are governed one by one, by whichever gates, once these have decided.

    ``places``: offset of int32s, of each channel the number of the gate's channel that closes it, -1 if none does.
    """

    target: VectorKey
    channels: int
    places: int

    def emit(self, module: Module, f: Function) -> None:
        places, factors = Pointer("%places"), Pointer("%factors")
        list_, below, n, last = Pointer("%list"), Pointer("%below"), Index("%n"), Index("%last")

        def write(g: Function) -> None:
            def is_open(c: Index) -> Bool:
                number = g.make(Piece, f"load i32, ptr {g.at(places, c)}, align 4")
                free = g.make(Bool, f"icmp slt i32 {number}, 0")
                place = g.make(Index, f"sext i32 {number} to i64")
                opened = _open(g, factors, g.make(Index, f"select i1 {free}, i64 0, i64 {place}"))
                return g.make(Bool, f"or i1 {free}, {opened}")

            _write_lists(g, list_, below, n, last, is_open)

        name = module.function("list", [places, factors, list_, below, n, last], write, FLOAT)
        channels = module.vector_at(f, self.target)
        f.call(
            name, module.constant_at(f, self.places), GATES, channels, f.at(channels, self.channels), self.channels,
            self.channels - 1,
        )  # fmt: skip


def _open(g: Function, factors: Pointer, place: Index) -> Bool:
    return g.make(Bool, f"fcmp {_ABOVE} float {g.scalar(factors, place)}, 0.0")


def _write_lists(
    g: Function, list_: Pointer, below: Pointer, n: Index, last: Index, is_open: Callable[[Index], Bool]
) -> None:
    """Numbers of the open channels from the front, of the closed ones from the back; how many open ones are below."""

    def one_channel(c: Index, kept: Index) -> list[Index]:
        number = g.make(Piece, f"trunc i64 {kept} to i32")
        g.do(f"store i32 {number}, ptr {g.at(below, c)}, align 4")
        open_ = is_open(c)
        closed = g.minus(c, kept)
        place = g.make(Index, f"select i1 {open_}, i64 {kept}, i64 {g.minus(last, closed)}")
        number = g.make(Piece, f"trunc i64 {c} to i32")
        g.do(f"store i32 {number}, ptr {g.at(list_, place)}, align 4")
        return [g.plus(kept, g.make(Index, f"zext i1 {open_} to i64"))]

    (kept,) = g.loop(n, one_channel, Index("0"))
    number = g.make(Piece, f"trunc i64 {kept} to i32")
    g.do(f"store i32 {number}, ptr {g.at(below, n)}, align 4")


def model(
    scores: NDArray[np.float32], threshold: float, mask: NDArray[np.float32] | None, gain: str
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Of one image's scores (C,): factors (C,); kept channels from the front and closed from the back (C,); counts.

    counts (C + 1,): how many kept channels lie below each channel, and how many there are.
    """
    open_ = ~(scores <= np.float32(threshold if mask is None else 0))
    if mask is not None:
        open_ = (mask > 0) & (open_ | (gain == "one"))
    factors = np.where(open_, scores if gain == "score" else np.float32(1), np.float32(0))
    kept = ~(factors <= 0)
    numbers = np.arange(len(scores), dtype=np.int32)
    below = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    return factors, np.concatenate([numbers[kept], numbers[~kept][::-1]]), below
