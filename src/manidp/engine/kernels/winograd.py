"""Winograd's convolution: on tiles of m x m outputs, (m + 2)^2 products in place of 9 m^2 (Lavin & Gray 2016).

``transform`` puts the points of the kept inputs of a block into scratch memory; the products of each point are a 1x1
convolution, done by the same tiles as a direct one; ``outputs`` transforms back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Element, Function, Index, Pointer, Vec
from manidp.engine.kernels.convolution import Group, TileKernel, apart
from manidp.engine.module import Module
from manidp.engine.steps import Layout
from manidp.engine.walk import BLOCK, Mask, neighbour, single, vectors_of
from manidp.graph import Conv, sides

# Cost of products and transforms over that of products alone. On maps of 4x4 and smaller the direct convolution is
# faster by measurement (AVX2); float16 was not measured.
_TRANSFORMS = 1.25
_GROUP = 16  # channels of a group, from which on it is taken to pay
_PACKED = 2**17  # numbers that ``pack`` makes at a time, about

_X, _INTO, _LI, _NI = Pointer("%x"), Pointer("%into"), Pointer("%li"), Index("%ni")


@dataclass(frozen=True)
class Matrices:
    """F(m x m, 3x3): output = at [(g weight g') * (bt input bt')] at' on tiles of m outputs and m + 2 inputs a side.

    The m + 2 points come in pairs x, -x first, 0 and infinity last: rows (columns of ``at``) of a pair differ only in
    signs, so that what belongs to a pair is made of one sum and one difference.
    """

    bt: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    at: tuple[tuple[float, ...], ...]


MATRICES = {
    2: Matrices(
        bt=((0, 1, 1, 0), (0, -1, 1, 0), (1, 0, -1, 0), (0, -1, 0, 1)),
        g=((1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (1, 0, 0), (0, 0, 1)),
        at=((1, 1, 1, 0), (1, -1, 0, 1)),
    ),
    4: Matrices(
        bt=(
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (4, 0, -5, 0, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        g=(
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (1 / 4, 0, 0),
            (0, 0, 1),
        ),
        at=((1, 1, 1, 1, 1, 0), (1, -1, 2, -2, 0, 0), (1, 1, 4, 4, 0, 0), (1, -1, 8, -8, 0, 1)),
    ),
}


def is_3x3(node: Conv) -> bool:
    """Whether a convolution's windows are those of F(m x m, 3x3)."""
    return (node.kernel, node.stride, node.dilation) == (3, 1, 1) and max(sides(node.padding)) < 3


@dataclass(frozen=True)
class Winograd(TileKernel):
    """``side``: of a tile's outputs, 2 or 4; source and output lie in as many phases."""

    side: int

    most_outputs = 10
    packed = True

    @cached_property
    def matrices(self) -> Matrices:
        return MATRICES[self.side]

    @property
    def span(self) -> int:
        """Points a side."""
        return self.side + 2

    @property
    def points(self) -> int:
        return self.span**2

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        # the larger the tile, the more it amplifies rounding: too much for float16
        wide = node.groups == 1 or min(inputs, node.channels) >= _GROUP * node.groups
        return is_3x3(node) and wide and (self.side == 2 or element == FLOAT)

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        tiles = -(-height // self.side) * -(-width // self.side)
        return (_TRANSFORMS if element == FLOAT else 1.0) * self.points * -(-tiles // lanes)

    def held(self, node: Conv) -> int:
        return self.points

    def phases(self, node: Conv) -> tuple[int, int]:
        return self.side, self.side

    def pack(self, weight: NDArray[Any], element: Element, lanes: int) -> NDArray[Any]:
        """Of each output point by point, column first, so that a tile reads as many streams as it has outputs.

        Some outputs at a time: points take many times the memory of weights, and are made in float64.
        """
        outputs, inputs = weight.shape[:2]
        length = self.points * inputs
        rows = apart(outputs, length, element)
        some = max(1, _PACKED // length)
        for first in range(0, outputs, some):
            points = self._points(weight[first : first + some])
            rows[first : first + some, :length] = points.reshape(-1, length)
        return rows

    @cached_property
    def _of_taps(self) -> NDArray[np.float64]:
        """What makes points of a kernel's taps: (points, column first; taps)."""
        g = np.array(self.matrices.g)
        return np.asarray(np.einsum("ax,by->baxy", g, g).reshape(-1, 9))

    def _points(self, weight: NDArray[Any]) -> NDArray[np.float64]:
        """g weight g' of each output and input: (outputs, columns, rows, inputs)."""
        taps = weight.reshape(*weight.shape[:2], 9).swapaxes(1, 2).astype(np.float64)
        points: NDArray[np.float64] = self._of_taps @ taps
        return points.reshape(len(weight), self.span, self.span, -1)

    def taps(
        self, module: Module, group: Group, source: Layout, frame: Layout
    ) -> tuple[list[int], list[tuple[int, list[Mask]]]]:
        return [0], [(0, [Mask()] * group.tile.vectors)]  # at each point a 1x1 convolution

    def transform(self, module: Module, group: Group, source: Layout, frame: Layout) -> str:
        """The function that makes bt d bt' of every kept input, d the inputs around a tile's outputs.

        It goes by pairs of columns, as many as the registers hold.
        """
        bt, size, lanes = self.matrices.bt, range(self.span), module.lanes
        top, left = group.window.lines[0], group.window.columns[0]

        def write(g: Function) -> None:
            def one_input(k: Index) -> list[Index]:
                map_ = g.at(_X, g.scaled(g.index(_LI, k), source.channel))
                channel = g.at(_INTO, g.scaled(k, group.channel))

                def one_vector(v: Index, block: Index) -> None:
                    x, into = g.at(map_, g.scaled(block, lanes)), g.at(channel, g.scaled(v, lanes))
                    for first in range(0, self.span, 2):
                        pair = bt[first : first + 2]
                        used = [j for j in size if any(row[j] for row in pair)]
                        of_pair = [[row[j] for j in used] for row in pair]
                        d = [
                            [neighbour(module, g, x, block, source, frame, top + i, left + j) for j in used]
                            for i in size
                        ]
                        columns = zip(*(g.multiply(of_pair, row) for row in d), strict=True)
                        for column, values in enumerate(columns, first):
                            for point, value in enumerate(g.multiply(bt, values)):
                                g.store(value, into, (column * self.span + point) * group.block)

                vectors_of(g, group.tile, single(frame, lanes), one_vector)
                return []

            g.loop(_NI, one_input)

        key = ("transform", group.geometry, source, frame)
        return module.function(key, [_X, _INTO, _LI, _NI, BLOCK], write)

    def outputs(self, g: Function, products: list[Vec]) -> list[Vec]:
        """At products at'."""
        at, size = self.matrices.at, self.span
        columns = [g.multiply(at, products[first : first + size]) for first in range(0, size**2, size)]
        return [value for row in zip(*columns, strict=True) for value in g.multiply(at, row)]

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Tile by tile; the products of a point are summed input by input, each product and sum rounded once."""
        side, span, kind = self.side, self.span, x.dtype
        bt, at = (np.array(matrix, kind) for matrix in (self.matrices.bt, self.matrices.at))
        batch, inputs = x.shape[:2]
        (height, width), (top, left, bottom, right) = node.positions(*x.shape[2:]), sides(node.padding)
        rows, columns = -(-height // side), -(-width // side)
        below, beside = rows * side - height, columns * side - width
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom + below), (left, right + beside)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (span, span), axis=(2, 3))
        tiles = windows[:, :, ::side, ::side]
        points = (bt @ tiles @ bt.T).astype(np.float64)
        weights = self._points(weight).astype(kind).astype(np.float64).transpose(0, 3, 2, 1)
        of_group = weights.reshape(1, node.groups, -1, inputs // node.groups, 1, 1, span, span)
        points = points.reshape(batch, node.groups, 1, -1, rows, columns, span, span)
        total = np.zeros((*points.shape[:2], of_group.shape[2], rows, columns, span, span), kind)
        for i in range(inputs // node.groups):
            total = (total + points[:, :, :, i] * of_group[:, :, :, i]).astype(kind)
        total = total.reshape(batch, len(weight), rows, columns, span, span)
        outputs = at @ total @ at.T
        whole = outputs.transpose(0, 1, 2, 4, 3, 5).reshape(batch, len(weight), rows * side, columns * side)
        return np.asarray(whole[:, :, :height, :width])
