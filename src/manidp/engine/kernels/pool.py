"""Pooling windows: maximum or average of the elements under a window, at a vector of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from manidp.engine.ir import Function, Index, Pointer, Vec
from manidp.engine.module import Module
from manidp.engine.steps import Layout, window_of
from manidp.engine.walk import Span, Tile, mask_of, tap
from manidp.graph import Pool, pair, sides


def window_value(
    module: Module, g: Function, source: Layout, frame: Layout, tile: Tile, pool: Pool, x: Pointer, block: Index
) -> Vec:
    """What the windows at a vector of positions give; what lies outside the map is 0 in averages that count it.

    x: where the block begins in the source.
    """
    total: Vec | None = None
    inside: Vec | None = None  # how many elements of the window are
    w, most = window_of(pool), pool.kind == "max"
    for down in w.lines:
        for right in w.columns:
            offset, (mask,) = tap(module, source, frame, tile, down, right)
            value = g.load(x, offset)
            if most or not pool.count_include_pad:
                rows, columns = Span(down, source.height, w.stride), Span(right, source.width, w.stride)
                mask = mask_of(module, frame, 0, tile, 0, rows, columns)
            value = g.spoil(value) if most else value
            lanes = mask.bits(g, block)
            if lanes is not None:
                value = g.select(lanes, value, g.constant(-np.inf if most else 0))
            if total is not None:
                value = g.maximum(total, value) if most else g.arithmetic("fadd", total, value)
            total = value
            if not pool.count_include_pad:
                one = g.zero_unless(lanes, g.constant(1))
                inside = one if inside is None else g.arithmetic("fadd", inside, one)
    assert total is not None
    if inside is not None:
        return g.arithmetic("fdiv", total, inside)
    return total if most else g.arithmetic("fmul", total, g.constant(1 / w.taps))


def model(x: NDArray[np.float32], pool: Pool) -> NDArray[Any]:
    """The same of maps (B, C, H, W) in NumPy, element by element in the order of the code."""
    top, left, bottom, right = sides(pool.padding)
    outside = -np.inf if pool.kind == "max" else 0
    down, across = pair(pool.stride)

    def taps_of(x: NDArray[np.float32]) -> NDArray[np.float32]:
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=outside)
        taps = sliding_window_view(padded, pair(pool.kernel), axis=(2, 3))[:, :, ::down, ::across]
        return taps.reshape(*taps.shape[:4], -1)

    taps = taps_of(x)
    if pool.kind == "max":
        return np.asarray(taps.max(-1))
    total = taps[..., 0]
    for n in range(1, taps.shape[-1]):
        total = total + taps[..., n]
    if not pool.count_include_pad:
        return np.asarray(total / taps_of(np.ones_like(x)).sum(-1))
    return np.asarray(total * x.dtype.type(1 / taps.shape[-1]))
