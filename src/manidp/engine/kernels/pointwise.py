"""Maps walked element by element, with or without a pooling window; pooled sums of whole maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, NULL, Function, Index, Pointer, Scalar
from manidp.engine.kernels.epilogue import START, Element, across, at_once, operands_of, parameters_of
from manidp.engine.kernels.pool import window_value
from manidp.engine.module import Module
from manidp.engine.steps import Channels, Epilogue, MapKey, MapStep, Step, VectorKey, window_of
from manidp.engine.walk import single
from manidp.graph import Pool

_X, _LIST, _N, _SUMS, _INTO = Pointer("%x"), Pointer("%list"), Index("%n"), Pointer("%sums"), Pointer("%into")


@dataclass(frozen=True, eq=False, repr=False)
class Pointwise(MapStep):
    """``source`` (None: zeros) through ``pool`` (None: as it is) and ``epilogue``."""

    source: MapKey | None
    pool: Pool | None
    channels: Channels
    epilogue: Epilogue

    def walks(self) -> Pool | None:
        return self.pool

    def emit(self, module: Module, f: Function) -> None:
        """Channel by channel, vector by vector."""
        frame, pool = module.plan.maps[self.epilogue.frame].layout, self.pool
        source = module.plan.maps[self.source].layout if self.source else None
        operands = operands_of(module, f, self.epilogue)
        tile = single(frame, module.lanes)

        def write(g: Function) -> None:
            def one_channel(j: Index) -> list[Index]:
                channel = g.index(_LIST, j)
                x = g.at(_X, g.scaled(channel, source.channel)) if source else NULL

                def one_block(block: Index) -> list[Index]:
                    start = g.scaled(block, module.lanes)
                    element = Element(module, g, frame, self.epilogue, channel, start)
                    for phase in range(frame.phases**2):
                        if source is None:
                            y = g.constant(0)
                        elif pool:
                            y = window_value(module, g, source, frame, tile, pool, g.at(x, start), block)
                        else:
                            y = g.load(g.at(x, start), phase * source.plane)
                        element.make(phase, block, y)
                    element.pool()
                    return []

                g.loop(tile.blocks, one_block)
                return []

            g.loop(_N, one_channel)

        window = pool and (pool.kind, pool.count_include_pad, window_of(pool))
        key = ("pointwise", source, window, frame, self.epilogue.signature)
        name = module.function(key, [_X, _LIST, _N, *parameters_of(operands)], write)
        list_, _, count = module.lists(f, self.channels)
        x = module.map_at(f, self.source) if self.source else NULL
        f.call(name, x, list_, count, *operands)


@dataclass(frozen=True, eq=False, repr=False)
class ResetPooled(Step):
    """Pooled sums of some channels of a map back to where they start.

    Where a channel is one vector, of ``left`` alone: those of the others are not added to what is there.
    """

    pooled: VectorKey
    frame: MapKey
    channels: Channels
    left: Channels | None

    def emit(self, module: Module, f: Function) -> None:
        start, once = START[self.pooled.part], at_once(module.plan.maps[self.frame].layout, module.lanes)
        channels = self.left if once else self.channels
        if channels is None:
            return

        def write(g: Function) -> None:
            def one_channel(j: Index) -> list[Index]:
                c = g.index(_LIST, j)
                if once:
                    g.put_scalar(FLOAT.literal(start), _SUMS, c)
                else:
                    g.store(g.constant(start), _SUMS, g.scaled(c, module.lanes))
                return []

            g.loop(_N, one_channel)

        name = module.function(("reset", start, once), [_SUMS, _LIST, _N], write, FLOAT)
        list_, _, count = module.lists(f, channels)
        f.call(name, module.vector_at(f, self.pooled), list_, count)


@dataclass(frozen=True, eq=False, repr=False)
class Reduce(Step):
    """Partial sums (or maxima) of a map to one number a channel, times ``factor``."""

    pooled: VectorKey
    frame: MapKey
    target: VectorKey
    channels: int
    factor: float

    def emit(self, module: Module, f: Function) -> None:
        factor, part = Scalar("%factor"), self.pooled.part
        once = at_once(module.plan.maps[self.frame].layout, module.lanes)

        def scaled(g: Function) -> None:
            def one_vector(v: Index) -> list[Index]:
                at = g.scaled(v, g.lanes)
                g.store(g.arithmetic("fmul", g.load(_SUMS, at), g.splat(factor)), _INTO, at)
                return []

            g.loop(g.divided(g.plus(_N, g.lanes - 1), g.lanes), one_vector)

        def summed(g: Function) -> None:
            def one_channel(c: Index) -> list[Index]:
                total = across(g, part, g.load(_SUMS, g.scaled(c, g.lanes)))
                g.put_scalar(g.make(Scalar, f"fmul float {total}, {factor}"), _INTO, c)
                return []

            g.loop(_N, one_channel)

        arguments = [_SUMS, _INTO, _N, factor]
        name = module.function(("reduce", part, once), arguments, scaled if once else summed, FLOAT)
        f.call(
            name, module.vector_at(f, self.pooled), module.vector_at(f, self.target), self.channels,
            FLOAT.literal(self.factor),
        )  # fmt: skip


def pooled_model(x: NDArray[np.float32], part: Literal["average", "max"], lanes: int) -> NDArray[Any]:
    """Maps (B, C, H, W) to (B, C): a partial sum (or maximum) for each lane, then all of them together."""
    flat = x.reshape(*x.shape[:2], -1)
    padded = np.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % lanes)), constant_values=START[part])
    partial = padded.reshape(*flat.shape[:2], -1, lanes)
    if part == "max":
        return np.asarray(partial.max((2, 3)))
    return np.asarray(partial.sum(2).sum(2) * np.float32(1 / flat.shape[2]))
