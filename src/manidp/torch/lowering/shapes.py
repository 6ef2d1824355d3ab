"""Axes, parts and orders of tensors: which of them are a map or a vector as they stand, and what makes them one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from manidp.graph import (
    Add,
    BatchNorm,
    Concat,
    Conv,
    Elementwise,
    Flatten,
    GlobalPool,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Pool,
    PReLU,
    Scatter,
    Shuffle,
    Slice,
    pair,
)
from manidp.torch.layout import BATCH, CHANNELS, HEIGHT, WIDTH, Factor, Value
from manidp.torch.lowering.nodes import MOST_ROWS, Constant, Nodes, RefusedError, number

# ops that are of maps and vectors alike
_ON_BOTH = (Elementwise, BatchNorm, LayerNorm, PReLU, Add, Multiply, Concat, Slice, Shuffle, Scatter)
_NO_MAP = "a vector that becomes a map of 1 x 1 again"
MOST_CUT = 7  # rows or columns that are cut off a map, by a convolution that is larger by as many


class Shapes(Nodes):
    """Values as maps and vectors, and the handlers of what rearranges them."""

    def plain(self, x: Any) -> Value:
        """A value that is nothing but rearranged."""
        if isinstance(x, Constant):
            raise RefusedError("a tensor that does not depend on the image takes the place of a feature map")
        if not isinstance(x, Value):
            raise RefusedError("reads what cannot be imported")
        if any(x.pad):
            if x.pad_value:
                raise RefusedError("infinities around a map are taken by a maximum that follows, nothing else")
            return self._framed(x.node, x.pad)
        if x.expanded:
            raise RefusedError("a vector repeated over a map; only a multiplication takes it")
        return x

    def _framed(self, node: str, pad: tuple[int, int, int, int]) -> Value:
        """A map with so many zeros around it, or where negative so much less: each channel convolved by itself."""
        cut, count = [max(-side, 0) for side in pad], self.shapes[node][0]
        kernel = (cut[0] + 1 + cut[2], cut[1] + 1 + cut[3])
        if max(kernel) > MOST_CUT + 1:
            raise RefusedError(f"a map of which more than {MOST_CUT} rows or columns are cut off")
        made = self._again(
            node, ".pad" + "_".join(map(str, pad)), Conv, (node,), channels=count, groups=count, kernel=kernel,
            padding=tuple(max(side, 0) for side in pad),
        )  # fmt: skip
        weight = torch.zeros(count, 1, *kernel, dtype=torch.float64)
        weight[:, :, cut[0], cut[1]] = 1
        self.give(made, weight=Constant(weight))
        return self.value(made)

    def map(self, x: Any) -> str:
        """The node that makes this tensor (B, C, H, W) as a feature map."""
        x = self.plain(x)
        if x.is_feature_map():
            return self._in_order(x, x.dims[1])
        if x.is_blocks():
            return self._blocks(x)
        if x.is_vector() and len(x.dims) == 4 and not x.is_map:
            return self._in_order(replace(x, node=self._as_map(x.node)), x.dims[1])
        raise RefusedError(f"reads a tensor {tuple(x.shape)} whose axes are not batch, channels, height, width")

    def _as_map(self, node: str) -> str:
        """The node that makes the same as this vector, as a map of 1 x 1: all is made again from the pooling on."""
        behind: set[str] = set()  # what is to be made again, this node included
        waiting = [node]
        while waiting:
            name = waiting.pop()
            if name not in behind:
                behind.add(name)
                op = self.nodes.get(name)
                waiting += op.inputs if isinstance(op, (Linear, *_ON_BOTH)) else ()
        if not behind <= self.nodes.keys():  # what nothing could be made of has no node
            raise RefusedError(_NO_MAP)
        maps: dict[str, str] = {}
        for name, op in list(self.nodes.items()):  # each after what it reads
            if name in behind:
                maps[name] = self._one_as_map(op, maps)
        return maps[node]

    def _one_as_map(self, op: Node, maps: Mapping[str, str]) -> str:
        """What makes a map of 1 x 1 in place of the vector that an op makes; ``maps``: in place of those it reads."""
        if isinstance(op, Flatten) and self.shapes[op.inputs[0]][1:] == (1, 1):
            return op.inputs[0]
        if isinstance(op, GlobalPool):
            size = self.shapes[op.inputs[0]][1:]
            return self._again(op.name, ".map", Pool, op.inputs, kind=op.kind, kernel=size, stride=1)
        if not isinstance(op, (Linear, *_ON_BOTH)):
            raise RefusedError(_NO_MAP)
        sources = [maps[source] for source in op.inputs]
        if isinstance(op, Linear):
            made = self._again(op.name, ".map", Conv, sources, channels=op.features, kernel=1, padding=0, bias=op.bias)
        else:
            settings = {field.name: getattr(op, field.name) for field in fields(op)[2:]}
            made = self._again(op.name, ".map", type(op), sources, **settings)
        for name in op.parameters(*(self.shapes[source] for source in op.inputs)):
            self.weights[f"{made}.{name}"] = self.weights[f"{op.name}.{name}"]
        return made

    def _blocks(self, x: Value) -> str:
        """Blocks of pixels as channels (space to depth): a convolution that takes each number to its place."""
        inner = [factor for factor in x.dims[1] if factor[0] != CHANNELS]
        high, wide = (math.prod(x.size(factor) for factor in inner if factor[0] == axis) for axis in (HEIGHT, WIDTH))
        count = self.shapes[x.node][0]
        if count * high * wide > MOST_ROWS:
            raise RefusedError(f"blocks of pixels as {count * high * wide} channels; at most {MOST_ROWS}")
        places = torch.arange(count * high * wide).reshape([
            x.size(factor) for axis in (CHANNELS, HEIGHT, WIDTH) for factor in x.axis(axis) if factor in x.dims[1]
        ])  # fmt: skip
        order = [factor for axis in (CHANNELS, HEIGHT, WIDTH) for factor in x.axis(axis) if factor in x.dims[1]]
        places = places.permute([order.index(factor) for factor in x.dims[1]]).reshape(-1)
        made = self.emit(Conv, (x.node,), "blocks", channels=len(places), kernel=(high, wide), stride=(high, wide),
                         padding=0)  # fmt: skip
        weight = torch.eye(len(places), dtype=torch.float64)[places]
        self.give(made, weight=Constant(weight.reshape(len(places), count, high, wide)))
        return made

    def vector(self, x: Any) -> str:
        """The node that makes this tensor (B, C), or (B, C, 1, 1), as a vector."""
        x = self.plain(x)
        if not x.is_map and x.is_vector():
            return self._in_order(x, x.dims[1])
        source = self.nodes.get(x.node)
        if x.is_map and x.is_vector() and isinstance(source, Pool) and self._whole(source):
            again = self._again(x.node, ".vector", GlobalPool, source.inputs, kind=source.kind)
            return self._in_order(replace(x, node=again), x.dims[1])
        natural = (*x.axis(CHANNELS), *x.axis(HEIGHT), *x.axis(WIDTH))
        if x.is_map and len(x.dims) >= 2 and x.dims[:2] == (x.axis(BATCH), natural) and not any(x.dims[2:]):
            return self._again(x.node, ".flat", Flatten, (x.node,))
        raise RefusedError(f"reads a tensor {tuple(x.shape)} whose axes are not batch and features, channel by channel")

    def _in_order(self, x: Value, order: Sequence[Factor]) -> str:
        groups = x.rotation(order)
        if groups is None:
            places = torch.arange(self.shapes[x.node][0]).reshape(x.axes[CHANNELS])
            return self._arranged(x.node, places.permute([place for _, place in order]).flatten().tolist())
        return x.node if groups == 1 else self._again(x.node, f".shuffle{groups}", Shuffle, (x.node,), groups=groups)

    def _arranged(self, node: str, places: Sequence[int]) -> str:
        """These channels of a node: ranges of them, as they are or shuffled, one behind the other."""
        size = self.shapes[node][0]
        groups, ranges = min(
            ((groups, _ranges(_dealt(places, size, groups))) for groups in range(1, size + 1) if size % groups == 0),
            key=lambda found: len(found[1]),
        )
        if len(ranges) > Concat.arity[1]:
            raise RefusedError(
                f"channels in an order of {len(ranges)} ranges one behind the other; at most {Concat.arity[1]} are put "
                "together"
            )
        if groups > 1:
            node = self._again(node, f".shuffle{groups}", Shuffle, (node,), groups=groups)
        parts = [self.slice(self.value(node), 1, start, stop) for start, stop in ranges]
        return parts[0].node if len(parts) == 1 else self.concat(parts, 1).node

    def _whole(self, pool: Pool) -> bool:
        return pair(pool.kernel) == self.shapes[pool.inputs[0]][1:] and pool.padding == 0

    def same(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    def dropout(self, x: Any, share: float, train: bool) -> Any:
        if train:
            raise RefusedError("dropout that is always on")
        return x

    def cast(self, x: Any, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        types = [part for part in (dtype, *args) if isinstance(part, torch.dtype)]
        if any(not kind.is_floating_point for kind in types):
            raise RefusedError(f"a feature map as {types[0]}")
        return x

    def view(self, x: Any, *_: Any, **__: Any) -> Any:
        """Any op that only gives the same numbers, in the same order, another shape: that which torch found."""
        x = self.plain(x)
        sizes = tuple(self.at.meta["val"].shape)
        made = x.reshape(sizes)
        if made is None:
            raise RefusedError(f"a reshape from {x.shape} to {sizes} that goes across axes")
        return made

    def permute(self, x: Any, order: Sequence[int]) -> Any:
        return self.plain(x).permute([place % len(order) for place in order])

    def transpose(self, x: Any, first: int, second: int) -> Any:
        x = self.plain(x)
        order = list(range(len(x.dims)))
        order[first], order[second] = order[second], order[first]
        return x.permute(order)

    def expand(self, x: Any, *_: Any, **__: Any) -> Any:
        x = self.plain(x)
        if x.shape == tuple(self.at.meta["val"].shape):
            return x
        if len(x.dims) != 4 or not x.is_vector():
            raise RefusedError("a tensor repeated along an axis")
        return replace(x, expanded=True)

    def split(self, x: Any, size: int | Sequence[int], dim: int = 0) -> tuple[Value, ...]:
        x = self.plain(x)
        total = x.shape[dim]
        sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
        ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        return tuple(self.slice(x, dim, end - part, end) for part, end in zip(sizes, ends, strict=True))

    def unbind(self, x: Any, dim: int = 0) -> tuple[Value, ...]:
        return tuple(self.select(x, dim, index) for index in range(self.plain(x).shape[dim]))

    def select(self, x: Any, dim: int, index: int) -> Any:
        x = self.plain(x)
        index %= x.shape[dim]
        cut = self.slice(x, dim, index, index + 1)
        made = cut.reshape([size for place, size in enumerate(cut.shape) if place != dim % len(cut.dims)])
        assert made is not None
        return made

    def slice(self, x: Any, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
        x = self.plain(x)
        dim %= len(x.dims)
        size = x.shape[dim]
        start, stop, step = slice(start, stop, step).indices(size)
        if (start, stop, step) == (0, size, 1):
            return x
        if x.is_feature_map() and dim >= 2 and start == 0 and len(range(start, stop, step)) == -(-size // step):
            source, stride = self.map(x), (step, 1) if dim == 2 else (1, step)
            node = self.nodes.get(source)
            if isinstance(node, Pool) and node.kernel == 1 and node.padding == 0:  # both axes in one step
                (down, across), source = pair(node.stride), node.inputs[0]
                stride = (stride[0] * down, stride[1] * across)
            return self.value(self.emit(Pool, (source,), "subsample", kind="max", kernel=1, stride=stride))
        if x.is_feature_map() and dim >= 2 and start < stop:
            pad = (-start, 0, stop - size, 0) if dim == 2 else (0, -start, 0, stop - size)
            source = self.map(x)
            node = self.nodes.get(source)
            if isinstance(node, Pool) and node.kernel == 1 and pair(node.stride)[dim - 2] == 1:  # before that, as well
                cut = self._framed(node.inputs[0], pad)
                cut = self.value(self.emit(Pool, (cut.node,), "subsample", kind="max", kernel=1, stride=node.stride))
            else:
                cut = self._framed(source, pad)
            return self.slice(cut, dim, 0, None, step)
        if step > 1 and size % step == 0 and start < step and stop > size - step + start:
            shape = x.shape
            halves = x.reshape((*shape[:dim], size // step, step, *shape[dim + 1 :]))
            if halves is not None:
                return self.select(halves, dim + 1, start)
        if step > 1 or any(axis != CHANNELS for axis, _ in x.dims[dim]):
            raise RefusedError("a part of a tensor that is not a range of its channels")
        return self._channels(x, dim, start, stop)

    def _channels(self, x: Value, dim: int, start: int, stop: int) -> Value:
        """A range of a dimension that is made of channels: these factors first, then the others, in one piece."""
        own = x.dims[dim]
        rest = tuple(factor for other in x.dims for factor in other if factor[0] == CHANNELS and factor not in own)
        node = self._in_order(x, (*own, *rest))
        block = math.prod(x.size(factor) for factor in rest)
        made = self.emit(Slice, (node,), "slice", start=start * block, stop=stop * block)
        # the channels of what was made: (range, the others in the order in which the dimensions have them)
        sizes = ((stop - start,) if stop - start > 1 else ()) + tuple(x.size(factor) for factor in rest)
        place = {factor: index + (stop - start > 1) for index, factor in enumerate(rest)}
        axes = (x.axes[0], sizes, *x.axes[2:])
        dims = tuple(
            (((CHANNELS, 0),) if stop - start > 1 else ()) if index == dim else
            tuple((CHANNELS, place[f]) if f in place else f for f in factors)
            for index, factors in enumerate(x.dims)
        )  # fmt: skip
        return replace(x, node=made, axes=axes, dims=dims).merged()

    def index_select(self, x: Any, dim: int, index: Any) -> Value:
        """Some channels, in any order."""
        if not isinstance(index, Constant) or index.tensor.dim() != 1 or index.tensor.is_floating_point() or (
            index.tensor.dtype == torch.bool
        ):  # fmt: skip
            raise RefusedError("an index that is not a constant row of whole numbers")
        x = self.plain(x)
        dim %= len(x.dims)
        size = x.shape[dim]
        places: list[int] = [int(place) % size for place in index.tensor]
        step = places[1] - places[0] if len(places) > 1 else 1
        if step > 0 and places == list(range(places[0], places[-1] + 1, step)):
            try:
                made: Value = self.slice(x, dim, places[0], min(places[-1] + step, size), step)
                return made
            except RefusedError:
                if dim != 1:
                    raise
        if dim != 1 or not (x.is_feature_map() or x.is_vector()):
            raise RefusedError("a part of a tensor that is not channels of it")
        source = self.value(self.map(x) if x.is_feature_map() else self.vector(x))
        made = self.value(self._arranged(source.node, places))
        return replace(made, dims=(*made.dims, *[()] * (len(x.dims) - len(made.dims))))

    def index(self, x: Any, places: Sequence[Any]) -> Value:
        """Indexing by one tensor, and by nothing before it."""
        *before, index = places
        if any(place is not None for place in before):
            raise RefusedError("an index along several axes at once")
        return self.index_select(x, len(before), index)

    def flip(self, x: Any, dims: Sequence[int]) -> Any:
        for dim in dims:
            x = self.index_select(x, dim, Constant(torch.arange(self.plain(x).shape[dim]).flip(0)))
        return x

    def slice_scatter(self, x: Any, part: Any, dim: int = 0, start: int | None = None, stop: int | None = None,
                      step: int = 1) -> Any:  # fmt: skip
        """A write to a range of channels: what is before it, the new ones, what is behind."""
        x = self.plain(x)
        size = x.shape[dim]
        start, stop, step = slice(start, stop, step).indices(size)
        if (start, stop, step) == (0, size, 1):
            return self.plain(part)
        if dim != 1 or step != 1:
            raise RefusedError("a write to a part of a tensor that is not a range of its channels")
        parts = [self.slice(x, 1, 0, start)] if start else []
        parts += [part]
        parts += [self.slice(x, 1, stop, size)] if stop < size else []
        return self.concat(parts, 1)

    def copy(self, x: Any, source: Any, *_: Any) -> Any:
        meant = tuple(self.at.meta["val"].shape)
        if isinstance(source, Value) and source.shape == meant:
            return source
        if isinstance(source, Constant):
            return number(source, lambda t: t.expand(meant))
        raise RefusedError("a write of a tensor of another shape")

    def fill(self, x: Any, value: Any, *_: Any) -> Constant:
        return number(value, lambda t: t.expand(tuple(self.at.meta["val"].shape)))

    def zeros_like(self, x: Any, *_: Any, **__: Any) -> Constant:
        return Constant(torch.zeros(tuple(self.at.meta["val"].shape), dtype=torch.float64))

    def pad(self, x: Any, sizes: Sequence[int], mode: Any = "constant", value: float | None = None) -> Any:
        if mode != "constant":
            raise RefusedError(f"padding of mode '{mode}': nothing but zeros is put around a map")
        return self.constant_pad(x, sizes, value or 0.0)

    def constant_pad(self, x: Any, sizes: Sequence[int], value: float = 0.0) -> Any:
        sizes = [*sizes, 0, 0, 0, 0, 0, 0][:6]
        left, right, top, bottom, before, behind = sizes
        if value not in (0, -math.inf):
            raise RefusedError(f"padding with {value}, not with zeros")
        if min(before, behind) < 0:
            raise RefusedError("padding that cuts off channels")
        if before or behind:
            if value:
                raise RefusedError("channels of infinities")
            node = self.map(x)
            count = self.shapes[node][0]
            at = tuple(range(before, before + count))
            x = self.value(self.emit(Scatter, (node,), "pad", channels=before + count + behind, at=at))
        if not (left or right or top or bottom):
            return self.plain(x)
        pad = (top, left, bottom, right)
        if min(pad) < 0:
            if value:
                raise RefusedError("padding with infinities that cuts off")
            return self._framed(self.map(x), pad)
        return replace(self.value(self.map(x)), pad=pad, pad_value=float(value))

    def concat(self, parts: Sequence[Any], dim: int = 0) -> Value:
        values = [part for part in parts if isinstance(part, Value)]
        rank = len(values[0].dims)
        if dim % rank != 1:
            raise RefusedError("parts put together along another axis than channels")
        read = self.map if rank == 4 and any(not value.is_vector() or value.is_map for value in values) else self.vector
        names: list[str] = []
        at: list[int] = []
        total = 0
        for part in parts:
            if isinstance(part, Constant):
                if part.tensor.any():
                    raise RefusedError("constant channels that are not zeros")
                total += part.tensor.shape[1]
                continue
            names.append(read(part))
            count = self.shapes[names[-1]][0]
            at += range(total, total + count)
            total += count
        most = Concat.arity[1]
        while len(names) > 1:
            names = [
                self.emit(Concat, names[start : start + most], "cat") if len(names) - start > 1 else names[start]
                for start in range(0, len(names), most)
            ]
        if len(at) < total:
            names = [self.emit(Scatter, names, "cat", channels=total, at=tuple(at))]
        made = self.value(names[0])
        return made if rank == len(made.dims) else replace(made, dims=(*made.dims, (), ()))


def _dealt(places: Sequence[int], size: int, groups: int) -> list[int]:
    """Where these channels, of ``size``, are when all have been shuffled."""
    return [place % (size // groups) * groups + place // (size // groups) for place in places]


def _ranges(places: Sequence[int]) -> list[tuple[int, int]]:
    """These places as ranges (start, stop), one behind the other."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
