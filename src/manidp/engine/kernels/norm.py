"""Layer norm: mean and variance over the channels, and what is made with them, in three walks over the channels.

Whatever maps are made of, this is computed in floats. Deviations are squared, not values: a large mean costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Function, Index, Pointer, Vec
from manidp.engine.kernels.epilogue import Element, operands_of, parameters_of
from manidp.engine.module import Module
from manidp.engine.steps import Channels, Epilogue, MapKey, MapStep, Step, VectorKey
from manidp.engine.walk import Mask, single

_X, _INTO, _LIST, _N = Pointer("%x"), Pointer("%into"), Pointer("%list"), Index("%n")
_PAIRS, _GAMMA, _BETA = Pointer("%pairs"), Pointer("%gamma"), Pointer("%beta")
_AT_ONCE = 4  # vectors of positions: their sums do not wait for one another


@dataclass(frozen=True, eq=False, repr=False)
class NormaliseMap(MapStep):
    """``source`` normalised position by position, then ``epilogue``; both lie in one phase.

    All channels are read, ``channels`` are made. parameters: offset of gamma and beta, (C, 2), among the constants.
    """

    source: MapKey
    channels: Channels
    epilogue: Epilogue
    eps: float
    parameters: int

    def walks(self) -> None:
        return None

    def emit(self, module: Module, f: Function) -> None:
        """Some vectors of positions after the other."""
        count, lanes, source = self.channels.count, module.lanes, module.plan.maps[self.source].layout
        frame = module.plan.maps[self.epilogue.frame].layout
        operands = operands_of(module, f, self.epilogue)

        def write(g: Function) -> None:
            def some(first: Index, vectors: int) -> None:
                """So many vectors of positions, from the vector ``first`` on."""
                maps, start = g.of(module.element), g.scaled(first, lanes)

                def values(channel: Index) -> list[Vec]:
                    x = maps.at(_X, g.scaled(channel, source.channel), start)
                    return [maps.widen(maps.load(x, v * lanes)) for v in range(vectors)]

                def summed(channel: Index, *sums: Vec) -> list[Vec]:
                    return [g.arithmetic("fadd", total, x) for total, x in zip(sums, values(channel), strict=True)]

                def squared(channel: Index, *sums: Vec) -> list[Vec]:
                    apart = [g.arithmetic("fsub", x, mean) for x, mean in zip(values(channel), means, strict=True)]
                    return [g.fma(x, x, total) for x, total in zip(apart, sums, strict=True)]

                def one_channel(j: Index) -> list[Index]:
                    channel = g.index(_LIST, j)
                    element = Element(module, maps, frame, self.epilogue, channel, start)
                    pair = g.at(_PAIRS, g.scaled(channel, 2))
                    gamma, beta = g.splat_float(pair, 0), g.splat_float(pair, 1)
                    for v, x in enumerate(values(channel)):
                        y = _normal(g, x, means[v], factors[v], gamma, beta)
                        element.make(0, g.plus(first, v), g.convert(y, FLOAT, module.element, lanes), v * lanes)
                    element.pool()
                    return []

                zeros = [g.constant(0)] * vectors
                means = [_mean(g, total, count) for total in g.loop(count, summed, *zeros)]
                factors = [_factor(g, total, count, self.eps) for total in g.loop(count, squared, *zeros)]
                g.loop(_N, one_channel)

            def one_block(block: Index) -> list[Index]:
                some(g.scaled(block, _AT_ONCE), _AT_ONCE)
                return []

            whole, rest = divmod(single(frame, lanes).blocks, _AT_ONCE)
            if whole:
                g.loop(whole, one_block)
            if rest:
                some(Index(whole * _AT_ONCE), rest)

        key = ("layer norm", source, frame, count, self.eps, self.epilogue.signature)
        name = module.function(key, [_X, _PAIRS, _LIST, _N, *parameters_of(operands)], write, FLOAT)
        list_, _, n = module.lists(f, self.channels)
        x, pairs = module.map_at(f, self.source), module.constant_at(f, self.parameters)
        f.call(name, x, pairs, list_, n, *operands)


@dataclass(frozen=True, eq=False, repr=False)
class NormaliseVector(Step):
    """target = ``source`` normalised; gamma, beta: offsets among the constants, of whole vectors of numbers."""

    source: VectorKey
    target: VectorKey
    size: int
    eps: float
    gamma: int
    beta: int

    def emit(self, module: Module, f: Function) -> None:
        lanes, size = module.lanes, self.size

        def write(g: Function) -> None:
            whole, rest = divmod(size, lanes)

            def total(value: Callable[[Vec], Vec]) -> Vec:
                """The sum of ``value`` of each number, in every lane."""

                def one_vector(v: Index, sums: Vec) -> list[Vec]:
                    return [g.arithmetic("fadd", sums, value(g.load(_X, g.scaled(v, lanes))))]

                (sums,) = g.loop(whole, one_vector, g.constant(0)) if whole else [g.constant(0)]
                if rest:  # what lies behind the last number is anything
                    last = Mask(tuple(lane < rest for lane in range(lanes))).bits(g, 0)
                    sums = g.arithmetic("fadd", sums, g.zero_unless(last, value(g.load(_X, whole * lanes))))
                return g.splat(g.total(sums))

            def squared(x: Vec) -> Vec:
                apart = g.arithmetic("fsub", x, mean)
                return g.arithmetic("fmul", apart, apart)

            def one_vector(v: Index) -> list[Index]:
                at = g.scaled(v, lanes)
                x, gamma, beta = (g.load(part, at) for part in (_X, _GAMMA, _BETA))
                g.store(_normal(g, x, mean, factor, gamma, beta), _INTO, at)
                return []

            mean = _mean(g, total(lambda x: x), size)
            factor = _factor(g, total(squared), size, self.eps)
            g.loop(-(-size // lanes), one_vector)

        name = module.function(("layer norm", size, self.eps), [_X, _INTO, _GAMMA, _BETA], write, FLOAT)
        source, target = module.vector_at(f, self.source), module.vector_at(f, self.target)
        f.call(name, source, target, module.constant_at(f, self.gamma), module.constant_at(f, self.beta))


def _mean(g: Function, total: Vec, count: int) -> Vec:
    return g.arithmetic("fmul", total, g.constant(1 / count))


def _factor(g: Function, squares: Vec, count: int, eps: float) -> Vec:
    """1 / sqrt(variance + eps), given the sum of squared deviations; NaN where that has overflowed."""
    variance = g.fma(g.spoil(squares), g.constant(1 / count), g.constant(eps))
    return g.arithmetic("fdiv", g.constant(1), g.sqrt(variance))


def _normal(g: Function, x: Vec, mean: Vec, factor: Vec, gamma: Vec, beta: Vec) -> Vec:
    return g.fma(g.arithmetic("fmul", g.arithmetic("fsub", x, mean), factor), gamma, beta)


def model(x: NDArray[np.float32], gamma: NDArray[np.float32], beta: NDArray[np.float32], eps: float) -> NDArray[Any]:
    """The same of maps (B, C, H, W) in NumPy, channel by channel, each product and sum rounded once."""
    share = np.float32(1 / x.shape[1])

    def fma(a: NDArray[Any], b: Any, c: Any) -> NDArray[Any]:
        return np.asarray(a.astype(np.float64) * b + c, np.float32)

    mean = np.add.reduce(x, axis=1, keepdims=True) * share  # along an axis that is not the last, one after the other
    apart = x - mean
    squares = np.zeros_like(mean[:, 0])
    for channel in apart.swapaxes(0, 1):
        squares = fma(channel, channel, squares)
    factor = 1 / np.sqrt(fma(squares, share, np.float32(eps)))
    return fma(apart * factor[:, None], gamma[:, None, None], beta[:, None, None])
