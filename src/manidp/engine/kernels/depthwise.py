"""The depthwise convolution: each channel by itself, vector by vector, its weights in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import Element, Function, Index, Pointer
from manidp.engine.kernels import epilogue as epilogues
from manidp.engine.kernels.convolution import Kernel, Packed
from manidp.engine.kernels.direct import windows_of
from manidp.engine.module import Module
from manidp.engine.steps import Channels, Epilogue, MapKey, MapStep, Step, window_of
from manidp.engine.walk import single, tap
from manidp.graph import Conv

_X, _WEIGHTS, _BIAS, _LIST, _N = Pointer("%x"), Pointer("%weights"), Pointer("%bias"), Pointer("%list"), Index("%n")


@dataclass(frozen=True)
class Depthwise(Kernel):
    """Reads zeros where a gate has closed a channel of the source."""

    skips_inputs = False

    def supports(self, node: Conv, inputs: int, element: Element) -> bool:
        return node.groups == node.channels == inputs

    def step(
        self, node: Conv, source: MapKey, packed: Packed, inputs: Channels, outputs: Channels, epilogue: Epilogue
    ) -> Step:
        return ConvolveEach(node, source, packed, outputs, epilogue)

    def model(self, x: NDArray[np.float32], weight: NDArray[np.float64], node: Conv) -> NDArray[Any]:
        """Tap by tap; each product and sum rounded once."""
        kind = weight[:, 0].astype(x.dtype).astype(np.float64)
        windows = windows_of(x, node).astype(np.float64)
        total = np.zeros(windows.shape[:4], x.dtype)
        for u, v in np.ndindex(*kind.shape[1:]):
            total = (total + windows[..., u, v] * kind[:, u, v, None, None]).astype(x.dtype)
        return total


@dataclass(frozen=True, eq=False, repr=False)
class ConvolveEach(MapStep):
    """A depthwise convolution and what follows it."""

    node: Conv
    source: MapKey
    packed: Packed
    channels: Channels
    epilogue: Epilogue

    def walks(self) -> Conv:
        return self.node

    def emit(self, module: Module, f: Function) -> None:
        source, frame = module.plan.maps[self.source].layout, module.plan.maps[self.epilogue.frame].layout
        window, tile = window_of(self.node), single(frame, module.lanes)
        operands = epilogues.operands_of(module, f, self.epilogue)

        def write(g: Function) -> None:
            taps = [tap(module, source, frame, tile, down, right) for down in window.lines for right in window.columns]

            def one_channel(j: Index) -> list[Index]:
                channel = g.index(_LIST, j)
                x = g.at(_X, g.scaled(channel, source.channel))
                row = g.at(_WEIGHTS, g.scaled(channel, window.taps))
                bias = g.splat_float(_BIAS, channel)
                weights = [g.splat(g.scalar(row, n)) for n in range(window.taps)]

                def one_block(block: Index) -> list[Index]:
                    start = g.scaled(block, module.lanes)
                    element = epilogues.Element(module, g, frame, self.epilogue, channel, start)
                    here, total = g.at(x, start), g.constant(0)
                    for (offset, (mask,)), weight in zip(taps, weights, strict=True):
                        total = g.fma(g.zero_unless(mask.bits(g, block), g.load(here, offset)), weight, total)
                    element.make(0, block, g.arithmetic("fadd", total, bias))
                    element.pool()
                    return []

                g.loop(tile.blocks, one_block)
                return []

            g.loop(_N, one_channel)

        key = ("depthwise", window, source, frame, self.epilogue.signature)
        arguments = [_X, _WEIGHTS, _BIAS, _LIST, _N, *epilogues.parameters_of(operands)]
        name = module.function(key, arguments, write)
        list_, _, count = module.lists(f, self.channels)
        x, weights = module.map_at(f, self.source), module.constant_at(f, self.packed.weights)
        f.call(name, x, weights, module.constant_at(f, self.packed.bias), list_, count, *operands)
