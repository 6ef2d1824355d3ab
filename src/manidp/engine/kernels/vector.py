"""Operations on vectors, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manidp.engine.ir import FLOAT, NULL, Function, Index, Pointer
from manidp.engine.module import Module
from manidp.engine.steps import Applied, Step, VectorKey


@dataclass(frozen=True, eq=False, repr=False)
class VectorOp(Step):
    """target = op(source, operand) on vectors: 'apply' a ``function``, or 'copy' to ``offset``, or what kind says.

    operand: another vector, or the offset of one among the constants, with whole vectors of numbers.
    """

    kind: Literal["apply", "add", "multiply", "prelu", "copy"]
    source: VectorKey
    target: VectorKey
    size: int
    operand: VectorKey | int | None = None
    offset: int = 0
    function: Applied = ("", ())

    def emit(self, module: Module, f: Function) -> None:
        x, other, into, n = Pointer("%x"), Pointer("%other"), Pointer("%into"), Index("%n")

        def write(g: Function) -> None:
            def one_vector(index: Index) -> list[Index]:
                here = g.scaled(index, module.lanes)
                y = g.load(x, here)
                if self.kind in ("add", "multiply"):
                    y = g.arithmetic("fadd" if self.kind == "add" else "fmul", y, g.load(other, here))
                elif self.kind == "prelu":
                    y = g.prelu(y, g.load(other, here))
                else:
                    y = g.apply(*self.function, g.spoil(y))
                g.store(y, into, here)
                return []

            g.loop(n, one_vector)

        source, target = module.vector_at(f, self.source), module.vector_at(f, self.target)
        if self.kind == "copy":
            f.copy(source, f.at(target, self.offset), self.size)
            return
        name = module.function(("vector", self.kind, self.function), [x, other, into, n], write, FLOAT)
        match self.operand:
            case VectorKey() as key:
                operand = module.vector_at(f, key)
            case int(offset):
                operand = module.constant_at(f, offset)
            case None:
                operand = NULL
        f.call(name, source, operand, target, -(-self.size // module.lanes))
