"""The direct convolution: every tap of the kernel is multiplied where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from manidp.engine.ir import Element, Function, Vec
from manidp.engine.kernels.convolution import Group, TileKernel
from manidp.engine.module import Module
from manidp.engine.steps import Layout
from manidp.engine.walk import Mask, tap
from manidp.graph import Conv, pair, sides


@dataclass(frozen=True)
class Direct(TileKernel):
    """Any convolution."""

    most_outputs = 6

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        return True

    def taps(
        self, module: Module, group: Group, source: Layout, frame: Layout
    ) -> tuple[list[int], list[tuple[int, list[Mask]]]]:
        lines = [tap(module, source, frame, group.tile, down, 0)[0] for down in group.window.lines]
        return lines, [tap(module, source, frame, group.tile, 0, right) for right in group.window.columns]

    def outputs(self, g: Function, products: list[Vec]) -> list[Vec]:
        return products

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Input by input, line by line, tap by tap; each product and sum rounded once."""
        kind = weight.astype(x.dtype).astype(np.float64)
        windows = windows_of(x, node)
        made = []
        for group in range(node.groups):
            of_group = kind.reshape(node.groups, -1, *kind.shape[1:])[group]
            total = np.zeros((len(x), len(of_group), *windows.shape[2:4]), x.dtype)
            for i in range(of_group.shape[1]):
                taps = windows[:, group * of_group.shape[1] + i].astype(np.float64)
                for u, v in np.ndindex(*kind.shape[2:]):
                    product = taps[:, None, :, :, u, v] * of_group[:, i, u, v, None, None]
                    total = (total + product).astype(x.dtype)
            made.append(total)
        return np.concatenate(made, axis=1)


def windows_of(x: NDArray[np.float32], node: Conv) -> NDArray[np.float32]:
    """What lies under each tap: x (B, C, H, W) to (B, C, rows, columns, kernel height, kernel width)."""
    top, left, bottom, right = sides(node.padding)
    (high, wide), (down, across), (rows, columns) = pair(node.kernel), pair(node.stride), node.spread
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    span = rows * (high - 1) + 1, columns * (wide - 1) + 1
    return sliding_window_view(padded, span, axis=(2, 3))[:, :, ::down, ::across, ::rows, ::columns]
