"""Maxima, averages and sums over windows, whole maps and parts of channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from manidp.graph import Activation, Conv, GlobalPool, Pool, PoolKind
from manidp.torch.layout import CHANNELS, HEIGHT, WIDTH, Value
from manidp.torch.lowering.elementwise import Elementwise
from manidp.torch.lowering.nodes import Constant, RefusedError, Unknown, two

MOST_PARTS = 8  # of the channels that are added to one another


class Pooling(Elementwise):
    """Handlers of what makes one number of several."""

    def max_pool(self, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
                 ceil_mode: bool = False) -> Any:  # fmt: skip
        if two(dilation) != (1, 1):
            raise RefusedError("pooling with dilation")
        return self._pooled("max", x, two(kernel), two(stride or kernel), two(padding))

    def max_pool_with_indices(self, *args: Any) -> tuple[Value, Unknown]:
        return self.max_pool(*args), Unknown()

    def average_pool(self, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
                     count_include_pad: bool = True, divisor_override: int | None = None) -> Any:  # fmt: skip
        kernel, padding = two(kernel), two(padding)
        if divisor_override not in (None, math.prod(kernel)):
            raise RefusedError("an average with a divisor of its own")
        return self._pooled("average", x, kernel, two(stride or kernel), padding, count_include_pad)

    def _pooled(self, kind: PoolKind, x: Any, kernel: tuple[int, int], stride: tuple[int, int],
                padding: tuple[int, int], counts: bool = True) -> Any:  # fmt: skip
        """counts: whether an average counts ``padding`` in; never what windows that ceil_mode adds reach beyond it."""
        if not isinstance(x, Value):
            self.plain(x)
        if kernel == stride == (1, 1) and padding == (0, 0):
            return x
        made = self.at.meta["val"]
        shape = (made[0] if isinstance(made, (tuple, list)) else made).shape[2:]

        def beyond(node: str, sides: Sequence[int]) -> list[int]:
            """How far the last windows, those that ceil_mode adds, reach beyond the padding."""
            sizes = [size + sides[axis] + sides[axis + 2] for axis, size in enumerate(self.shapes[node][1:])]
            return [max((shape[axis] - 1) * stride[axis] + kernel[axis] - sizes[axis], 0) for axis in (0, 1)]

        most, sides = kind == "max", [*padding, *padding]
        counts = counts or not any(padding)
        if any(x.pad):
            both = [a + b for a, b in zip(sides, x.pad, strict=True)]
            same = x.pad_value == (-math.inf if most else 0.0) or (most and self._never_negative(x.node))
            fits = bool(x.pad_value) or all(side < size for side, size in zip(both, kernel * 2, strict=True))
            if same and fits and (most or (counts and not any(beyond(x.node, both)))):
                x, sides = replace(x, pad=(0, 0, 0, 0)), both
        source = self.map(x)
        if not most and counts and any(sides) and any(beyond(source, sides)):  # only some of what is outside counts
            source, sides = self._framed(source, (*padding, *padding)).node, [0, 0, 0, 0]
        more = beyond(source, sides)
        sides = [*sides[:2], sides[2] + more[0], sides[3] + more[1]]
        return self.value(
            self.emit(Pool, (source,), "pool", kind=kind, kernel=kernel, stride=stride, padding=tuple(sides),
                      count_include_pad=counts and not any(more))
        )  # fmt: skip

    def _never_negative(self, name: str) -> bool:
        node = self.nodes.get(name)
        while isinstance(node, Pool):
            node = self.nodes.get(node.inputs[0])
        return isinstance(node, Activation) and node.nonnegative(False)

    def adaptive_average(self, x: Any, size: Any) -> Any:
        return self._adaptive("average", x, two(size))

    def adaptive_max(self, x: Any, size: Any) -> tuple[Value, Unknown]:
        return self._adaptive("max", x, two(size)), Unknown()

    def _adaptive(self, kind: PoolKind, x: Any, size: tuple[int, int]) -> Any:
        x = self.plain(x)
        if size == (1, 1):
            return self._reduced(kind, x, (2, 3), True)
        (high, wide), (rows, columns) = x.shape[2:], size
        if (high, wide) == (1, 1):  # the one pixel again and again: in each window of a padded map
            node, count = self.map(x), self.shapes[x.node][0]
            made = self.emit(Conv, (node,), "pool", channels=count, groups=count, kernel=size,
                             padding=(rows - 1, columns - 1))  # fmt: skip
            self.give(made, weight=Constant(torch.ones(count, 1, *size, dtype=torch.float64)))
            return self.value(made)
        down, across = _evenly(high, rows), _evenly(wide, columns)
        if down is None or across is None:
            raise RefusedError(
                f"a pool from {high}x{wide} to {rows}x{columns}, whose windows are not alike; images of another size "
                "may make them so"
            )
        return self._pooled(kind, x, (down[0], across[0]), (down[1], across[1]), (0, 0))

    def mean(self, x: Any, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
        return self._reduced("average", x, dims, keepdim)

    def sum(self, x: Any, dims: Any, keepdim: bool = False, **_: Any) -> Any:
        """Over height and width as their mean times their size; over parts of the channels part by part."""
        x = self.plain(x)
        over = [dim % len(x.dims) for dim in ([dims] if isinstance(dims, int) else dims or range(len(x.dims)))]
        if over == [1] and x.is_feature_map():
            return self._summed(x, 1.0, keepdim)
        if len(over) == 1 and {axis for axis, _ in x.dims[over[0]]} == {CHANNELS}:
            (dim,) = over
            if x.shape[dim] > MOST_PARTS:
                raise RefusedError(f"a sum over {x.shape[dim]} parts of the channels; at most {MOST_PARTS} are added")
            made = functools.reduce(self.add, self.unbind(x, dim))
            return made.reshape((*x.shape[:dim], 1, *x.shape[dim + 1 :])) if keepdim else made
        count = math.prod(x.shape[dim] for dim in over)
        return self.multiply(self._reduced("average", x, over, keepdim), float(count))

    def maximum_over(self, x: Any, dims: Any = None, keepdim: bool = False) -> Any:
        return self._reduced("max", x, dims, keepdim)

    def maximum_along(self, x: Any, dim: int, keepdim: bool = False) -> tuple[Value, Unknown]:
        return self._reduced("max", x, dim, keepdim), Unknown()

    def _summed(self, x: Value, factor: float, keepdim: bool) -> Value:
        """The sum of a map's channels times a factor: a convolution to one."""
        count = x.shape[1]
        made = self.emit(Conv, (self.map(x),), "sum", channels=1, kernel=1, padding=0)
        self.give(made, weight=Constant(torch.full((count,), factor, dtype=torch.float64)))
        one = self.value(made)
        return one if keepdim else replace(one, dims=(one.dims[0], *one.dims[2:]))

    def _largest(self, x: Value, keepdim: bool) -> Value:
        """The largest of a map's channels: the larger of both halves, again and again."""
        while (count := x.shape[1]) > 1:
            half, whole = count // 2, x
            x = self.maximum(self.slice(whole, 1, 0, half), self.slice(whole, 1, half, 2 * half))
            x = self.concat([x, self.slice(whole, 1, count - 1, count)], 1) if count % 2 else x
        return x if keepdim else replace(x, dims=(x.dims[0], *x.dims[2:]))

    def _reduced(self, kind: PoolKind, x: Any, dims: Any, keepdim: bool) -> Any:
        """The mean or maximum over height, width or both, or over a map's channels."""
        x = self.plain(x)
        over = {dim % len(x.dims) for dim in ([dims] if isinstance(dims, int) else dims or range(len(x.dims)))}
        if over == {1} and x.is_feature_map():
            return self._largest(x, keepdim) if kind == "max" else self._summed(x, 1 / x.shape[1], keepdim)
        gone = {factor for dim in over for factor in x.dims[dim]}
        left = tuple(() if dim in over else factors for dim, factors in enumerate(x.dims) if keepdim or dim not in over)
        rows, columns = (set(x.axis(axis)) for axis in (HEIGHT, WIDTH))
        if not x.is_map and not gone:
            return replace(x, dims=left)
        if not x.is_map or not gone <= rows | columns or (gone & rows) not in (rows, set()) or (
            (gone & columns) not in (columns, set())
        ):  # fmt: skip
            raise RefusedError("a mean or maximum that is not over whole height, width or both, or a map's channels")
        if gone == rows | columns:
            made = self.emit(GlobalPool, (x.node,), "pool", kind=kind)
            return replace(x, node=made, axes=x.axes[:2], dims=left).merged()
        kernel = tuple(self.shapes[x.node][axis - 1] if gone & set(x.axis(axis)) else 1 for axis in (HEIGHT, WIDTH))
        made = self.emit(Pool, (x.node,), "pool", kind=kind, kernel=kernel, stride=1)
        axes = tuple(() if gone & set(x.axis(axis)) else sizes for axis, sizes in enumerate(x.axes))
        return replace(x, node=made, axes=axes, dims=left).merged()


def _evenly(size: int, count: int) -> tuple[int, int] | None:
    """(window, stride) of an adaptive pool from ``size`` to ``count``, if its windows are alike."""
    starts = [at * size // count for at in range(count)]
    windows = {-(-(at + 1) * size // count) - start for at, start in enumerate(starts)}
    strides = {after - before for before, after in pairwise(starts)} or {1}
    return (windows.pop(), strides.pop()) if len(windows) == len(strides) == 1 and strides != {0} else None
