"""What a plan is made of: maps and vectors in the workspace, channels that a loop visits, and steps.

Feature maps lie channel by channel in *phases*: with S phases, element (y, x) of a channel is found in phase
(y mod S, x mod S) at row y // S, column x // S. A strided convolution reads S = stride, a Winograd convolution reads
and writes S = side of its tiles of outputs, so that both load neighbouring outputs' inputs from neighbouring addresses.
Between the planes lie gaps of zeros, which serve as the padding above and below; only zeros are ever written to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FUNCTIONS, SIMPLE
from manidp.errors import UnsupportedError
from manidp.graph import ELU, Activation, Clip, Conv, Graph, LeakyReLU, Node, Pool, Squareplus, pair, sides

if TYPE_CHECKING:
    from manidp.engine.ir import Function
    from manidp.engine.module import Module


Number = TypeVar("Number", bound=np.generic)
KERNEL_LIMIT, STRIDE_LIMIT = 16, 8  # the code of a tile grows with the taps of a line


def lengthened(array: NDArray[Number], multiple: int) -> NDArray[Number]:
    """With zeros behind the first axis, up to a multiple; np.pad does it, too, at ten times the cost of a short one."""
    if not (missing := -len(array) % multiple):
        return array
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


@dataclass(frozen=True)
class MapKey:
    """A feature map: the node whose value it is, and the number of phases that it lies in."""

    node: str
    phases: int


@dataclass(frozen=True)
class VectorKey:
    """A vector in the workspace: what it holds, and of which node.

    A node's name comes from a file and may be any string. It never names a vector by itself, so no file can make one
    stand for another. 'list': of the channels that a gate keeps; 'read', 'made': of those that need be read of a value,
    or made of it, where that is another list.
    """

    node: str
    part: Literal["value", "average", "max", "list", "read", "made"] = "value"


@dataclass(frozen=True)
class Layout:
    """How one channel lies in memory: ``phases``^2 planes of ``rows`` x ``pitch``, a gap of zeros after each."""

    height: int
    width: int
    phases: int
    pitch: int
    plane: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.phases)

    @property
    def channel(self) -> int:
        return self.phases**2 * self.plane

    @property
    def dense(self) -> Layout:
        """The same map row after row, without gaps."""
        return Layout(self.height, self.width, 1, self.width, self.height * self.width)

    def valid(self, phase: int) -> tuple[int, int]:
        """Rows and columns of a phase that belong to the map."""
        row, column = divmod(phase, self.phases)
        return -(-(self.height - row) // self.phases), -(-(self.width - column) // self.phases)

    def reach(self, offset: int) -> tuple[int, int]:
        """Phase row (or column) and shift at which the element ``offset`` before or after a tile's first lies."""
        shift, phase = divmod(offset, self.phases)
        return phase, shift


@dataclass(frozen=True)
class Map:
    """A feature map in the workspace, ``at`` the offset of its first element in floats, ``gap`` zeros before it."""

    at: int
    channels: int
    layout: Layout
    gap: int


Applied = tuple[str, tuple[float, ...]]  # a function as ``ir.Function.apply`` knows it, and its settings


def applied(node: Node) -> Applied | None:
    """The function of an elementwise node, None for a node that the engine knows no function for."""
    match node:
        case Activation() if node.kind in FUNCTIONS:
            return node.kind, ()
        case Clip():
            return "clip", (node.low, node.high)
        case LeakyReLU():
            return "leaky_relu", (node.slope,)
        case ELU():
            return "elu", (node.alpha,)
        case Squareplus():
            return "squareplus", (node.b,)
    return None


@dataclass(frozen=True)
class Op:
    """One fused pointwise operation; ``operand``: a function, a vector, a constant's offset or a map."""

    kind: Literal["apply", "scale", "affine", "prelu", "add", "multiply"]  # affine: scale and shift
    operand: Applied | VectorKey | int | MapKey

    @property
    def signature(self) -> object:
        """What its code depends on, names and places aside."""
        return self.kind, self.operand if self.kind == "apply" else None


def simple(ops: Sequence[Op]) -> bool:
    """Whether operations need few registers; an exponential takes several, and its constants take more."""
    return all(op.operand[0] in SIMPLE for op in ops if isinstance(op.operand, tuple))


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a value that was just computed: operations, where it is stored, which pooled sums it feeds."""

    frame: MapKey  # the map whose layout it has
    ops: tuple[Op, ...] = ()
    stored: bool = True
    first_channel: int = 0
    pooled: tuple[VectorKey, ...] = ()  # partial sums ('average') or maxima ('max')

    @property
    def maps(self) -> list[MapKey]:
        """The maps that its operations read."""
        return [op.operand for op in self.ops if isinstance(op.operand, MapKey)]

    @property
    def simple(self) -> bool:
        """Whether it needs few registers."""
        return simple(self.ops)

    @property
    def signature(self) -> object:
        """What its code depends on, names and places aside."""
        return tuple(op.signature for op in self.ops), self.stored, tuple(sums.part for sums in self.pooled)


@dataclass(frozen=True)
class Channels:
    """The channels that a loop visits: ``count`` in all, or those that are kept (or closed) by the list ``kept``."""

    count: int
    kept: VectorKey | None = None
    closed: bool = False


@dataclass(frozen=True)
class Window:
    """What walks over a map: for each of its taps, how far down (lines) and to the right (columns) it lies.

    ``stride`` is the same in both directions.
    """

    lines: tuple[int, ...]
    columns: tuple[int, ...]
    stride: int

    @property
    def taps(self) -> int:
        return len(self.lines) * len(self.columns)


def window_of(node: Conv | Pool) -> Window:
    """Raises UnsupportedError for one that there is no code for."""
    (high, wide), (down, across), (top, left, _, _) = pair(node.kernel), pair(node.stride), sides(node.padding)
    if down != across or max(high, wide) > KERNEL_LIMIT or down > STRIDE_LIMIT:
        raise UnsupportedError(
            f"node '{node.name}': the engine runs kernels up to {KERNEL_LIMIT}x{KERNEL_LIMIT} with one stride, up to "
            f"{STRIDE_LIMIT}; it has kernel {high}x{wide}, stride {down}x{across}"
        )
    rows, columns = node.spread
    lines = tuple(u * rows - top for u in range(high))
    return Window(lines, tuple(v * columns - left for v in range(wide)), down)


class Step(ABC):
    """One thing to do for an image. Each kind of step stands with its code in ``manidp.engine.kernels``."""

    @abstractmethod
    def emit(self, module: Module, f: Function) -> None:
        """Write what does it at the end of ``f``, a part of the network."""

    def maps(self) -> list[MapKey]:
        """The maps that it reads or writes."""
        return []

    def together(self) -> list[MapKey]:
        """Maps that it walks position by position with one counter, so that they need one pitch."""
        return []

    def window(self) -> tuple[MapKey, MapKey, Window] | None:
        """The map over which a window walks, the map of its outputs, and the window."""
        return None


class MapStep(Step):
    """A step that makes a map from ``source``, if it reads one, and does what follows."""

    source: MapKey | None
    epilogue: Epilogue

    @abstractmethod
    def walks(self) -> Conv | Pool | None:
        """What walks over the source window by window, if anything does."""

    def _sources(self) -> list[MapKey]:
        return [self.source] if self.source else []

    def maps(self) -> list[MapKey]:
        stored = [self.epilogue.frame] if self.epilogue.stored else []
        return [*self._sources(), *self.epilogue.maps, *stored]

    def together(self) -> list[MapKey]:
        return [self.epilogue.frame, *self.epilogue.maps, *self._sources()]

    def window(self) -> tuple[MapKey, MapKey, Window] | None:
        node = self.walks()
        return (self.source, self.epilogue.frame, window_of(node)) if self.source and node else None


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Everything that code is made from. Offsets are in floats (4 bytes), in the workspace or among the constants.

    Maps and the weights of convolutions are made of the elements that the plan was made for, all else of floats.
    """

    graph: Graph
    lanes: int
    steps: Sequence[Step]
    maps: Mapping[MapKey, Map]
    vectors: Mapping[VectorKey, int]  # vectors, partial sums, lists (int32: kept from the front, closed from the back)
    constants: NDArray[np.float32]
    everything: int  # offset among the constants of the int32 list 0, 1, 2, ...
    scale: int  # offsets of what byte images are multiplied by, channel by channel, and of what is then added
    shift: int
    workspace: int  # floats
