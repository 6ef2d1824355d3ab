"""A linear layer: a matrix times one vector.

Outputs lie in the lanes, four vectors of them at a time. Of those that fill no four vectors and have many inputs, to
read the weights takes longer than to multiply by them: there the inputs lie in the lanes, so that no zeros are read for
lanes without an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Function, Index, Pointer, Scalar, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Step, VectorKey, lengthened

_AT_ONCE = 4  # vectors of outputs, or outputs
_MANY = 128  # inputs


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
        lanes, along = module.lanes, _along(self.inputs, module.lanes)
        x, into, weights, bias = Pointer("%x"), Pointer("%into"), Pointer("%weights"), Pointer("%bias")
        inputs, outputs = Index("%inputs"), Index("%outputs")

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

            def rows(index: Index) -> list[Index]:
                """Some outputs with inputs in the lanes."""
                first = g.plus(g.scaled(whole, lanes), g.scaled(index, _AT_ONCE))
                here = g.at(weights, g.scaled(first, inputs))

                def one_vector(v: Index, *sums: Vec) -> list[Vec]:
                    at = g.scaled(v, lanes)
                    line, values = g.at(here, g.scaled(at, _AT_ONCE)), g.load(x, at)
                    return [g.fma(g.load(line, k * lanes), values, total) for k, total in enumerate(sums)]

                zeros = [Vec("zeroinitializer")] * _AT_ONCE
                for k, total in enumerate(g.loop(g.divided(inputs, lanes), one_vector, *zeros)):
                    one = g.plus(first, k)
                    made = g.make(Scalar, f"fadd float {g.total(total)}, {g.scalar(bias, one)}")
                    g.put_scalar(made, into, one)
                return []

            fours = g.divided(g.plus(outputs, lanes - 1), _AT_ONCE * lanes)
            whole = g.scaled(fours, _AT_ONCE)
            g.loop(fours, four)
            left = g.minus(outputs, g.least(outputs, g.scaled(whole, lanes)))
            at_once = _AT_ONCE if along else lanes
            g.loop(g.divided(g.plus(left, at_once - 1), at_once), rows if along else rest)

        name = module.function(("matvec", along), [x, into, weights, bias, inputs, outputs], write, FLOAT)
        source, target = module.vector_at(f, self.source), module.vector_at(f, self.target)
        matrix, shift = module.constant_at(f, self.weights), module.constant_at(f, self.bias)
        f.call(name, source, target, matrix, shift, self.inputs, self.outputs)


def _along(inputs: int, lanes: int) -> bool:
    """Whether inputs lie in the lanes where outputs fill no four vectors."""
    return inputs >= _MANY and inputs % lanes == 0


def pack(weight: NDArray[np.floating], bias: NDArray[np.floating], lanes: int) -> tuple[NDArray[np.floating], ...]:
    """weight (outputs, inputs): of some vectors of outputs after the other, input by input; bias (outputs,).

    Outputs are padded to whole vectors, those with their inputs in the lanes to whole fours.
    """
    inputs = weight.shape[1]
    vectors = -(-len(weight) // lanes)
    whole = vectors // _AT_ONCE * _AT_ONCE * lanes
    some, rest = lengthened(weight[:whole], lanes).reshape(-1, _AT_ONCE * lanes, inputs), weight[whole:]
    at_once, length = (_AT_ONCE, lanes) if _along(inputs, lanes) else (lanes, 1)
    left = lengthened(rest, at_once).reshape(-1, at_once, inputs // length, length)
    parts = some.transpose(0, 2, 1), left.swapaxes(1, 2)
    return np.concatenate([part.reshape(-1) for part in parts]), lengthened(bias, lanes)


def model(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], lanes: int
) -> NDArray[np.float32]:
    """Vectors (B, inputs) to (B, outputs), input by input, each product and sum rounded once.

    Where inputs lie in the lanes, so in every lane, and then all of them together.
    """
    outputs, inputs = weight.shape

    def summed(total: NDArray[np.float32], which: slice) -> NDArray[np.float32]:
        for values, column in zip(x.T[which], weight.T[which], strict=True):
            total = (values[:, None].astype(np.float64) * column + total).astype(np.float32)
        return total

    made = summed(np.broadcast_to(bias, (len(x), outputs)).astype(np.float32), slice(None))
    if _along(inputs, lanes):
        zeros = np.zeros_like(made)
        partial = np.sum([summed(zeros, slice(lane, None, lanes)) for lane in range(lanes)], axis=0, dtype=np.float32)
        whole = -(-outputs // lanes) // _AT_ONCE * _AT_ONCE * lanes
        made[:, whole:] = (partial + bias)[:, whole:]
    return made
