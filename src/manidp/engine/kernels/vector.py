"""Operations on vectors, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manidp.engine.ir import FLOAT, NULL, Function, Index, Pointer
from manidp.engine.module import Module
from manidp.engine.steps import Step, VectorKey
from manidp.graph import ActivationKind


@dataclass(frozen=True)
class VectorOp(Step):
    """target = op(source, operand) on vectors; kind: an activation, 'clip', 'add', 'multiply', 'copy' at ``offset``."""

    kind: ActivationKind | Literal["clip", "add", "multiply", "copy"]
    source: VectorKey
    target: VectorKey
    size: int
    operand: VectorKey | None = None
    offset: int = 0
    limits: tuple[float, float] = (0.0, 0.0)  # of 'clip'

    def emit(self, module: Module, f: Function) -> None:
        x, other, into, n = Pointer("%x"), Pointer("%other"), Pointer("%into"), Index("%n")

        def write(g: Function) -> None:
            def one_vector(index: Index) -> list[Index]:
                here = g.scaled(index, module.lanes)
                y = g.load(x, here)
                if self.kind in ("add", "multiply"):
                    y = g.arithmetic("fadd" if self.kind == "add" else "fmul", y, g.load(other, here))
                elif self.kind == "clip":
                    y = g.clip(g.spoil(y), *self.limits)
                else:
                    y = g.activate(self.kind, g.spoil(y))
                g.store(y, into, here)
                return []

            g.loop(n, one_vector)

        source, target = module.vector(f, self.source), module.vector(f, self.target)
        if self.kind == "copy":
            f.copy(source, f.at(target, self.offset), self.size)
            return
        name = module.function(("vector", self.kind, self.limits), [x, other, into, n], write, FLOAT)
        operand = module.vector(f, self.operand) if self.operand else NULL
        f.call(name, source, operand, target, -(-self.size // module.lanes))
