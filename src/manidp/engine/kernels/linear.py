"""A linear layer: a matrix times one vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Function, Index, Pointer, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Step, VectorKey, lengthened

_AT_ONCE = 4  # vectors of outputs


@dataclass(frozen=True, eq=False, repr=False)
class MatVec(Step):
    """target = weights @ source + bias; the weights lie in the order in which they are read."""

    source: VectorKey
    target: VectorKey
    inputs: int
    outputs: int
    weights: int
    bias: int

    def emit(self, module: Module, f: Function) -> None:
        lanes = module.lanes
        x, into, weights, bias = Pointer("%x"), Pointer("%into"), Pointer("%weights"), Pointer("%bias")
        inputs, row = Index("%inputs"), Index("%row")

        def write(g: Function) -> None:
            def some(vectors: int, first: Index) -> None:
                """``vectors`` vectors of outputs from ``first`` on."""
                here = g.scaled(first, lanes)
                columns = g.at(weights, g.scaled(here, inputs))

                def one_input(i: Index, *sums: Vec) -> list[Vec]:
                    line, factor = g.at(columns, g.scaled(i, vectors * lanes)), g.splat(g.scalar(x, i))
                    return [g.fma(g.load(line, v * lanes), factor, total) for v, total in enumerate(sums)]

                starts = [g.load(g.at(bias, here), v * lanes) for v in range(vectors)]
                for v, total in enumerate(g.loop(inputs, one_input, *starts)):
                    g.store(total, g.at(into, here), v * lanes)

            def four(index: Index) -> list[Index]:
                some(_AT_ONCE, g.scaled(index, _AT_ONCE))
                return []

            def rest(index: Index) -> list[Index]:
                some(1, g.plus(index, whole))
                return []

            vectors = g.divided(row, lanes)
            fours = g.divided(vectors, _AT_ONCE)
            whole = g.scaled(fours, _AT_ONCE)
            g.loop(fours, four)
            g.loop(g.minus(vectors, whole), rest)

        name = module.function("matvec", [x, into, weights, bias, inputs, row], write, FLOAT)
        source, target = module.vector_at(f, self.source), module.vector_at(f, self.target)
        matrix, shift = module.constant_at(f, self.weights), module.constant_at(f, self.bias)
        f.call(name, source, target, matrix, shift, self.inputs, -(-self.outputs // lanes) * lanes)


def pack(weight: NDArray[np.floating], bias: NDArray[np.floating], lanes: int) -> tuple[NDArray[np.floating], ...]:
    """weight (outputs, inputs): of some vectors of outputs after the other, input by input; bias (outputs,).

    Outputs are padded to whole vectors.
    """
    rows = lengthened(weight, lanes)
    whole = len(rows) // (_AT_ONCE * lanes) * _AT_ONCE * lanes
    some, rest = (
        rows[:whole].reshape(-1, _AT_ONCE * lanes, rows.shape[1]),
        rows[whole:].reshape(-1, lanes, rows.shape[1]),
    )
    return np.concatenate([part.transpose(0, 2, 1).reshape(-1) for part in (some, rest)]), lengthened(bias, lanes)


def model(x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (B, inputs) to (B, outputs), input by input, each product and sum rounded once."""
    total = np.broadcast_to(bias, (len(x), len(bias))).astype(np.float32)
    for i in range(weight.shape[1]):
        total = (x[:, i, None].astype(np.float64) * weight[:, i] + total).astype(np.float32)
    return total
