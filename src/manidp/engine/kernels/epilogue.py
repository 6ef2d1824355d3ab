"""The epilogue: what becomes of a value that was just computed. Operations, store, pooled sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from manidp.engine.ir import Bits, Function, Index, Pointer, Scalar, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Epilogue, Layout, MapKey, Op, VectorKey
from manidp.engine.walk import mask_of, single

START = {"average": 0.0, "max": -np.inf}  # of pooled sums and maxima


def at_once(frame: Layout, lanes: int) -> bool:
    """Whether a channel is one vector: its pooled sum is then made at once and one number, else one for each lane."""
    return single(frame, lanes).blocks == 1


def across(g: Function, part: str, sums: Vec) -> Scalar:
    """Pooled sums, or maxima, of all lanes together."""
    return g.largest(sums) if part == "max" else g.total(sums)


def operands_of(module: Module, f: Function, epilogue: Epilogue) -> list[Pointer]:
    """What a function with this epilogue takes: pointers of the operations, of the stored map, of pooled sums."""
    pointers = pointers_of(module, f, epilogue.ops)
    if epilogue.stored:
        frame = module.plan.maps[epilogue.frame].layout
        first = epilogue.first_channel * frame.channel
        pointers.append(f.at(module.map_at(f, epilogue.frame), first, element=module.element))
    for sums in epilogue.pooled:
        wide = 1 if at_once(module.plan.maps[epilogue.frame].layout, module.lanes) else module.lanes
        pointers.append(f.at(module.vector_at(f, sums), epilogue.first_channel * wide))
    return pointers


def pointers_of(module: Module, f: Function, ops: Sequence[Op]) -> list[Pointer]:
    """The operands of operations that have one in memory."""
    pointers = []
    for op in ops:
        match op.operand:
            case MapKey() as key:
                pointers.append(module.map_at(f, key))
            case VectorKey() as key:
                pointers.append(module.vector_at(f, key))
            case int(offset):
                pointers.append(module.constant_at(f, offset))
    return pointers


def parameters_of(operands: list[Pointer], name: str = "p") -> list[Pointer]:
    """The names under which such a function has its operands."""
    return [Pointer(f"%{name}{i}") for i in range(len(operands))]


def factors_of(g: Function, op: Op, pointers: Iterator[Pointer], channel: Index) -> tuple[Vec, ...]:
    """A factor, or a scale and a shift, of a channel: what an operation needs that takes no map."""
    if op.kind in ("scale", "prelu"):
        return (g.splat_float(next(pointers), channel),)
    if op.kind == "affine":
        pair = g.floats.at(next(pointers), g.scaled(channel, 2))
        return g.splat_float(pair, 0), g.splat_float(pair, 1)
    return ()


def applied(g: Function, op: Op, factors: tuple[Vec, ...], y: Vec) -> Vec:
    """An operation that takes no map, done to a vector of a channel."""
    if isinstance(op.operand, tuple):
        return g.apply(*op.operand, g.spoil(y))
    if op.kind == "prelu":
        return g.prelu(y, factors[0])
    if op.kind == "scale":
        return g.arithmetic("fmul", y, factors[0])
    return g.fma(y, factors[0], factors[1])


class Element:
    """What becomes of the values of one channel and vector."""

    def __init__(
        self, module: Module, g: Function, frame: Layout, epilogue: Epilogue, channel: Index, start: Index
    ) -> None:
        self.module, self.g, self.frame, self.epilogue = module, g, frame, epilogue
        in_map = g.plus(g.scaled(channel, frame.channel), start)
        pointers = iter([Pointer(f"%p{i}") for i in range(len(epilogue.ops) + 1 + len(epilogue.pooled))])
        self.maps: list[Pointer] = []  # of each operation: the map beside the value,
        self.factors: list[tuple[Vec, ...]] = []  # or a factor, or a scale and a shift
        for op in epilogue.ops:
            takes_map = op.kind in ("add", "multiply")
            self.maps.append(g.at(next(pointers), in_map) if takes_map else Pointer())
            self.factors.append(factors_of(g, op, pointers, channel))
        self.into = g.at(next(pointers), in_map) if epilogue.stored else None
        self.at_once = at_once(frame, g.lanes)
        sums = g.scaled(channel, 1 if self.at_once else g.lanes)
        self.sums = [(pooled.part, g.floats.at(next(pointers), sums)) for pooled in epilogue.pooled]
        self.totals: dict[str, Vec] = {}

    def make(self, phase: int, block: Index, y: Vec, beyond: int = 0) -> None:
        """Do it for one vector of a phase, ``beyond`` elements behind the start; ``block``: its number in the map."""
        mask = mask_of(self.module, self.frame, phase, single(self.frame, self.g.lanes), 0).bits(self.g, block)
        offset = phase * self.frame.plane + beyond
        y = self._done(offset, y)
        if self.into:
            self.g.store(self.g.zero_unless(mask, y), self.into, offset)  # gaps are zeros anyway
        self._count(y, mask)

    def put(self, offset: int, y: Vec, fresh: Bits | None, *, keep: bool) -> None:
        """Do it for one vector ``offset`` elements behind the start, of which these lanes are new ones of the map.

        ``keep``: the others stay as they are; otherwise they may be overwritten.
        """
        g = self.g
        y = self._done(offset, y)
        if self.into:
            new = y if fresh is None or not keep else g.select(fresh, y, g.load(self.into, offset))
            g.store(new, self.into, offset)
        self._count(y, fresh)

    def _done(self, offset: int, y: Vec) -> Vec:
        """What the operations make of a vector."""
        g = self.g
        for op, place, factors in zip(self.epilogue.ops, self.maps, self.factors, strict=True):
            if op.kind in ("add", "multiply"):
                y = g.arithmetic("fadd" if op.kind == "add" else "fmul", y, g.load(place, offset))
            else:
                y = applied(g, op, factors, y)
        return y

    def _count(self, y: Vec, mask: Bits | None) -> None:
        """Take these lanes into the pooled sums."""
        g = self.g
        for part, _ in self.sums:
            counted = g.widen(g.spoil(y) if part == "max" else y)
            if mask is not None:
                counted = g.floats.select(mask, counted, g.floats.constant(START[part]))
            self.totals[part] = self._pooled(part, self.totals[part], counted) if part in self.totals else counted

    def pool(self) -> None:
        """Add what was made to the pooled sums."""
        floats = self.g.floats
        for part, pointer in self.sums:
            made = self.totals[part]
            if self.at_once:
                floats.put_scalar(across(floats, part, made), pointer)
            else:
                floats.store(self._pooled(part, floats.load(pointer), made), pointer)

    def _pooled(self, part: str, a: Vec, b: Vec) -> Vec:
        floats = self.g.floats
        return floats.maximum(a, b) if part == "max" else floats.arithmetic("fadd", a, b)
