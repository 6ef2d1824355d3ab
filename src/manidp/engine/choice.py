"""Which kernel computes a convolution: the cheapest, as long as packed weights take no more memory than they may."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from manidp.engine.ir import Element
from manidp.engine.kernels.convolution import Kernel
from manidp.engine.kernels.depthwise import Depthwise
from manidp.engine.kernels.direct import Direct
from manidp.engine.kernels.lanes import OutputLanes
from manidp.engine.kernels.matrix import Matrix, is_1x1
from manidp.engine.kernels.winograd import Winograd
from manidp.engine.steps import window_of
from manidp.graph import Conv, Graph, Node

KERNELS: tuple[Kernel, ...] = (
    Winograd(2), Winograd(4), Depthwise(), Matrix(False), Matrix(True), OutputLanes(), Direct(),
)  # fmt: skip
# bytes of a map that a second-level cache does not hold beside others, and channels that are few enough for a depthwise
# convolution to make many positions of each before the next one
_LARGE, _FEW = 2**20, 160
_STEP = 6  # instructions a vector of a map takes in a step that only applies functions, in multiply-adds
_OPEN = 0.5  # share of a gate's channels that is taken to be open
# what packed weights may take: so many times the network's, or so many bytes
TIMES, _FREE = 2.4, 2**25


class Choice:
    """The kernel of every convolution of a graph. Raises UnsupportedError for one that none supports."""

    def __init__(self, graph: Graph, lanes: int, element: Element) -> None:
        self.graph, self.lanes, self.element = graph, lanes, element
        convolutions = [node for node in graph.nodes if isinstance(node, Conv)]
        self._chosen = {node.name: self._cheapest(node, self._fitting(node)) for node in convolutions}
        self._fit(convolutions)

    def of(self, node: Conv) -> Kernel:
        """The kernel of a convolution."""
        return self._chosen[node.name]

    def does(self, node: Conv, before: Node) -> bool:
        """Whether a convolution is to do what stands before it, from this node on; zeros around a map stay zeros.

        Where another kernel would be so much cheaper that a step of its own for that pays, it is not. If it is, its
        kernel is from now on one that can.
        """
        return is_1x1(node) and (self._convolves(node, before) if isinstance(before, Conv) else self._applies(node))

    def _applies(self, node: Conv) -> bool:
        """Whether it is to do what is done element by element."""
        able = [kernel for kernel in self._fitting(node) if isinstance(kernel, Matrix)]
        if not able:
            return False
        kernel = self._cheapest(node, able)
        saved = _STEP * math.prod(self._size(node)) / self.lanes / node.channels
        if self._cost(kernel, node) > self._cost(self.of(node), node) + saved:
            return False
        self._chosen[node.name] = kernel
        return True

    def _convolves(self, node: Conv, before: Conv) -> bool:
        """Whether it is to do a depthwise convolution, whose map would not stay in the cache."""
        able = isinstance(self.of(node), Matrix) and isinstance(self.of(before), Depthwise)
        shape = self.graph.shapes[before.name]
        same = self.graph.shapes[before.inputs[0]] == shape and self._size(node) == shape[1:]
        pays = self.element.size * math.prod(shape) >= _LARGE and before.channels <= _FEW
        return able and same and window_of(before).stride == 1 and pays

    def _fit(self, convolutions: Sequence[Conv]) -> None:
        """Take slower kernels of fewer weights, most memory for least time first, until all have place."""
        pairs = [node.channels * self._inputs(node) // node.groups for node in convolutions]
        numbers = sum(math.prod(shape) for shape in self.graph.parameters.values())
        allowed = max(_FREE / self.element.size, TIMES * numbers)
        held = numbers + sum(
            count * (self.of(node).held(node) - window_of(node).taps)
            for count, node in zip(pairs, convolutions, strict=True)
        )
        if held <= allowed:
            return
        waiting = [way for at, node in enumerate(convolutions) for way in self._smaller(at, node)]
        heapq.heapify(waiting)
        while held > allowed and waiting:
            _, at, saved, kernel = heapq.heappop(waiting)
            node = convolutions[at]
            held -= pairs[at] * saved
            self._chosen[node.name] = KERNELS[kernel]
            for way in self._smaller(at, node):
                heapq.heappush(waiting, way)

    def _smaller(self, at: int, node: Conv) -> list[tuple[float, int, int, int]]:
        """The best way to fewer weights, if there is one: its price, of which node, numbers saved, which kernel."""
        now = self.of(node)
        ways = []
        for kernel in self._fitting(node):
            saved = now.held(node) - kernel.held(node)
            if saved > 0:
                price = (self._cost(kernel, node) - self._cost(now, node)) / saved
                ways.append((price, at, saved, KERNELS.index(kernel)))
        return sorted(ways)[:1]

    def _fitting(self, node: Conv) -> list[Kernel]:
        inputs, gated = self._inputs(node), node.name in self.graph.wanted
        window_of(node)  # which refuses windows that no kernel supports
        return [k for k in KERNELS if k.supports(node, inputs, self.element) and (k.skips_outputs or not gated)]

    def _cheapest(self, node: Conv, kernels: Sequence[Kernel]) -> Kernel:
        """The first one of several."""
        return min(kernels, key=lambda kernel: self._cost(kernel, node))

    def _cost(self, kernel: Kernel, node: Conv) -> float:
        open_ = _OPEN if node.name in self.graph.wanted and not kernel.computes_closed else 1.0
        return open_ * kernel.cost(node, *self._size(node), self.lanes, self.element)

    def _inputs(self, node: Conv) -> int:
        inputs, *_ = self.graph.shapes[node.inputs[0]]
        return inputs

    def _size(self, node: Conv) -> tuple[int, int]:
        _, height, width = self.graph.shapes[node.name]
        return height, width
