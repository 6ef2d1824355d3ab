"""The direct convolution: every tap of the kernel is multiplied where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from manidp.engine.ir import Element, Function, Vec
from manidp.engine.kernels.convolution import Group, Kernel
from manidp.engine.module import Module
from manidp.engine.steps import Layout, window_of
from manidp.engine.walk import Mask, tap
from manidp.graph import Conv


@dataclass(frozen=True)
class Direct(Kernel):
    """Reads the source in as many phases as the stride, so that neighbouring outputs' inputs are neighbours."""

    most_outputs = 6

    def supports(self, node: Conv, element: Element) -> bool:
        return True

    def cost(self, node: Conv, height: int, width: int, lanes: int, element: Element) -> float:
        return window_of(node).kernel ** 2 * -(-height * width // lanes)

    def phases(self, node: Conv) -> tuple[int, int]:
        return window_of(node).stride, 1

    def pack(self, weight: NDArray[np.float64], element: Element) -> NDArray[np.float64]:
        return weight.reshape(len(weight), -1)

    def taps(
        self, module: Module, group: Group, source: Layout, frame: Layout
    ) -> tuple[list[int], list[tuple[int, list[Mask]]]]:
        side, padding = group.window.kernel, group.window.padding
        lines = [tap(module, source, frame, group.tile, u - padding, 0)[0] for u in range(side)]
        return lines, [tap(module, source, frame, group.tile, 0, v - padding) for v in range(side)]

    def outputs(self, g: Function, products: list[Vec]) -> list[Vec]:
        return products

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Input by input, line by line, tap by tap; each product and sum rounded once."""
        w = window_of(node)
        kind = weight.astype(x.dtype).astype(np.float64)
        padded = np.pad(x, ((0, 0), (0, 0), *[(w.padding, w.padding)] * 2))
        windows = sliding_window_view(padded, (w.kernel, w.kernel), axis=(2, 3))[:, :, :: w.stride, :: w.stride]
        made = []
        for group in range(node.groups):
            of_group = kind.reshape(node.groups, -1, *kind.shape[1:])[group]
            total = np.zeros((len(x), len(of_group), *windows.shape[2:4]), x.dtype)
            for i in range(of_group.shape[1]):
                taps = windows[:, group * of_group.shape[1] + i].astype(np.float64)
                for u, v in np.ndindex(w.kernel, w.kernel):
                    product = taps[:, None, :, :, u, v] * of_group[:, i, u, v, None, None]
                    total = (total + product).astype(x.dtype)
            made.append(total)
        return np.concatenate(made, axis=1)
