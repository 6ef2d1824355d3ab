"""How a torch tensor lies in a graph's value: views, permutations and reshapes as bookkeeping, without an op.

A graph's value is (B, C, H, W) or (B, C). Torch code sees the same numbers under other shapes: flattened, channels
last, channels in two factors. Each axis of the value is cut into factors, and each dimension of the tensor is a row of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from manidp.graph import Shape

BATCH, CHANNELS, HEIGHT, WIDTH = range(4)
Factor = tuple[int, int]  # (axis, place among the factors of this axis)


@dataclass(frozen=True)
class Value:
    """A tensor that is the value of ``node``, rearranged.

    axes: sizes of the factors of each axis of the node's value, batch first; factors of size 1 are left out.
    dims: the factors that each dimension of the tensor is made of, the slowest first.
    pad: zeros (or ``pad_value``) around the map that are still to be put there: (top, left, bottom, right).
    expanded: a vector that was repeated over a map; only a multiplication takes it.
    """

    node: str
    axes: tuple[tuple[int, ...], ...]
    dims: tuple[tuple[Factor, ...], ...]
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    pad_value: float = 0.0
    expanded: bool = False

    @classmethod
    def natural(cls, node: str, shape: Shape, batch: int) -> Value:
        """The value of a node as it is; ``shape`` is (C, H, W) or (C,)."""
        axes = tuple((size,) if size > 1 else () for size in (batch, *shape))
        return cls(node, axes, tuple(tuple((axis, 0) for _ in sizes) for axis, sizes in enumerate(axes)))

    @property
    def is_map(self) -> bool:
        """Whether the node's value is a feature map."""
        return len(self.axes) == 4

    @property
    def shape(self) -> Shape:
        """Sizes of the tensor's dimensions; those of a pending padding and of an expansion left out."""
        return tuple(math.prod(self.size(factor) for factor in dim) for dim in self.dims)

    def size(self, factor: Factor) -> int:
        """Size of one factor."""
        return self.axes[factor[0]][factor[1]]

    def axis(self, axis: int) -> tuple[Factor, ...]:
        """All factors of an axis of the node's value, in their order there; none where there is no such axis."""
        return tuple((axis, place) for place in range(len(self.axes[axis]))) if axis < len(self.axes) else ()

    def split(self, factor: Factor, first: int) -> Value:
        """The same tensor with one factor cut in two, the slower of size ``first``."""
        axis, place = factor
        sizes = self.axes[axis]
        sizes = (*sizes[:place], first, sizes[place] // first, *sizes[place + 1 :])
        dims = []
        for dim in self.dims:
            new: list[Factor] = []
            for a, p in dim:
                if (a, p) == factor:
                    new += [(a, p), (a, p + 1)]
                else:
                    new.append((a, p + 1) if a == axis and p > place else (a, p))
            dims.append(tuple(new))
        return replace(self, axes=(*self.axes[:axis], sizes, *self.axes[axis + 1 :]), dims=tuple(dims))

    def merged(self) -> Value:
        """The same tensor in as few factors as possible, so that equal layouts are equal."""
        for axis, sizes in enumerate(self.axes):
            for place in range(len(sizes) - 1):
                pair = ((axis, place), (axis, place + 1))
                if any(pair in pairwise(dim) for dim in self.dims):
                    joined = (*sizes[:place], sizes[place] * sizes[place + 1], *sizes[place + 2 :])
                    dims = tuple(
                        tuple((a, p - 1) if a == axis and p > place else (a, p) for a, p in dim if (a, p) != pair[1])
                        for dim in self.dims
                    )
                    return replace(self, axes=(*self.axes[:axis], joined, *self.axes[axis + 1 :]), dims=dims).merged()
        return self

    def reshape(self, sizes: Sequence[int]) -> Value | None:
        """Under another shape (without -1), or None where a new dimension would begin within a factor."""
        value = self
        left = [factor for dim in self.dims for factor in dim]
        dims: list[list[Factor]] = []
        for size in sizes:
            dims.append([])
            while size > 1:
                if not left:
                    return None
                factor = left.pop(0)
                whole = value.size(factor)
                if size % whole:
                    if whole % size:
                        return None
                    value = value.split(factor, size)
                    shifted = [(a, p + 1) if a == factor[0] and p > factor[1] else (a, p) for a, p in left]
                    left = [(factor[0], factor[1] + 1), *shifted]
                    dims = [
                        [(a, p + 1) if a == factor[0] and p > factor[1] else (a, p) for a, p in dim] for dim in dims
                    ]
                    whole = size
                dims[-1].append(factor)
                size //= whole
        return None if left else replace(value, dims=tuple(map(tuple, dims))).merged()

    def permute(self, order: Sequence[int]) -> Value:
        """Dimensions in another order."""
        return replace(self, dims=tuple(self.dims[place] for place in order)).merged()

    def is_vector(self) -> bool:
        """Whether the tensor is (B, C), or (B, C, 1, 1), channels in any order."""
        return (
            len(self.dims) >= 2
            and self.dims[0] == self.axis(BATCH)
            and {axis for axis, _ in self.dims[1]} <= {CHANNELS}
            and not any(self.dims[2:])
        )

    def is_feature_map(self) -> bool:
        """Whether the tensor is (B, C, H, W), channels in any order."""
        return (
            self.is_map
            and len(self.dims) == 4
            and self.dims[0] == self.axis(BATCH)
            and sorted(self.dims[1]) == list(self.axis(CHANNELS))
            and self.dims[2:] == (self.axis(HEIGHT), self.axis(WIDTH))
        )

    def is_blocks(self) -> bool:
        """Whether the tensor is (B, C * h * w, H / h, W / w), blocks of h x w pixels as channels in any order."""
        if not self.is_map or len(self.dims) != 4 or self.dims[0] != self.axis(BATCH):
            return False
        inner = [sorted(factor for factor in self.dims[1] if factor[0] == axis) for axis in (CHANNELS, HEIGHT, WIDTH)]
        whole = [(*self.dims[2], *inner[1]), (*self.dims[3], *inner[2])]
        return tuple(inner[0]) == self.axis(CHANNELS) and whole == [self.axis(HEIGHT), self.axis(WIDTH)]

    def rotation(self, order: Sequence[Factor]) -> int | None:
        """``groups`` of the Shuffle that puts channels in this order of factors: 1 if as they are, None if no one does.

        A shuffle takes channels as (groups, rest) and makes them (rest, groups).
        """
        natural = list(self.axis(CHANNELS))
        for place in range(max(len(natural), 1)):
            if list(order) == natural[place:] + natural[:place]:
                return math.prod(self.size(factor) for factor in natural[:place])
        return None
