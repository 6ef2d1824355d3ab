"""From torch's ATen ops to the ops of a graph, one handler each; what has none is listed, all of it."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx

from manidp.errors import FrontendError, GraphError
from manidp.graph import (
    ELU,
    Activation,
    ActivationKind,
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    LayerNorm,
    LeakyReLU,
    Linear,
    Multiply,
    Node,
    Pool,
    PoolKind,
    PReLU,
    Scatter,
    Shape,
    Shuffle,
    Slice,
    pair,
)
from manidp.limits import FLOAT32_MAX
from manidp.torch.layout import BATCH, CHANNELS, HEIGHT, WIDTH, Factor, Value

ATEN = torch.ops.aten
TORCH = str(Path(torch.__file__).parent)  # code below is torch's, not a network's author's
OURS = str(Path(__file__).parent.parent)  # and what is below this is ours: an ONNX file has no lines of code
BATCH_SIZE = 2  # images that the module is exported with; no axis of a graph's value is this one's
MOST_ROWS = 4096  # of a matrix that is made of constants
MOST_PARTS = 8  # of the channels that are added to one another
MOST_CUT = 7  # rows or columns that are cut off a map, by a convolution that is larger by as many
_KINDS: tuple[str, ...] = get_args(ActivationKind)


class _RefusedError(Exception):
    """An op that no op of a graph can stand for, and why."""


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no image; ``name`` is its name in the module's state_dict, if it is as it is there."""

    tensor: Tensor
    name: str | None = None


@dataclass(frozen=True)
class Lowered:
    """A graph, its parameters in float64, and which of them are which of the module's (same numbers, same order)."""

    graph: Graph
    weights: Mapping[str, Tensor]
    names: Mapping[str, str]


def lower(exported: torch.export.ExportedProgram, state: Mapping[str, Tensor], image: Shape) -> Lowered:
    """The graph of a functional exported module, with the parameters and buffers in ``state``.

    Raises FrontendError listing every op that cannot be lowered, with its module's path and its source line.
    """
    return _Lowering(exported, state, image).run()


@dataclass
class _Lowering:
    exported: torch.export.ExportedProgram
    state: Mapping[str, Tensor]
    image: Shape
    nodes: dict[str, Node] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    weights: dict[str, Constant] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    at: fx.Node = field(init=False)
    derived: dict[str, str] = field(default_factory=dict)  # a node made again for another use -> its name

    # ---- the walk

    def run(self) -> Lowered:
        graph = self.exported.graph
        output = next(node for node in graph.nodes if node.op == "output")
        (result,) = output.args[0]  # one output, checked before
        needed = self._needed(result)
        for node in graph.nodes:
            self.at = node
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
            elif node in needed:
                self.env[node] = self._lowered(node)
        self.at = result
        logits = self._attempt(lambda: self.vector(self.env[result]))
        if self.refused:
            count = len(self.refused)
            raise FrontendError(
                f"{count} {'op' if count == 1 else 'ops'} of this network cannot be imported", self.refused
            )
        used = self._used(logits)
        kept = tuple(node for name, node in self.nodes.items() if name in used)
        whole = Graph(kept, logits)
        weights = {name: self.weights[name] for name in whole.parameters}
        return Lowered(
            whole,
            {name: weight.tensor.reshape(whole.parameters[name]) for name, weight in weights.items()},
            {name: weight.name for name, weight in weights.items() if weight.name is not None},
        )

    def _needed(self, result: fx.Node) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        waiting = [result]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                found = _pattern(node)
                read = found[1] if found else node.all_input_nodes
                waiting += [part for part in read if isinstance(part, fx.Node)]
        return needed

    def _used(self, output: str) -> set[str]:
        used: set[str] = set()
        waiting = [output]
        while waiting:
            name = waiting.pop()
            if name not in used:
                used.add(name)
                waiting += self.nodes[name].inputs
        return used | {name for name, node in self.nodes.items() if isinstance(node, Input)}

    def _placeholder(self, node: fx.Node) -> Any:
        signature, name = self.exported.graph_signature, node.name
        known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        if name in known:
            return Constant(_wide(self.state[known[name]]), known[name])
        if name in signature.inputs_to_lifted_tensor_constants:
            return Constant(_wide(self.exported.constants[signature.inputs_to_lifted_tensor_constants[name]]))
        self.nodes["image"] = Input(name="image", dims=self.image)  # type: ignore[arg-type]
        self.shapes["image"] = self.image
        return Value.natural("image", self.image, BATCH_SIZE)

    def _lowered(self, node: fx.Node) -> Any:
        found = _pattern(node)
        if found:
            given = [self.env[part] if isinstance(part, fx.Node) else part for part in found[1]]
            return self._attempt(lambda: found[0](self, *given))
        args, kwargs = _mapped(
            (node.args, node.kwargs), lambda part: self.env[part] if isinstance(part, fx.Node) else part
        )
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else self._unknown()
        parts: list[Any] = []
        _mapped((args, kwargs), parts.append)
        if not any(isinstance(part, (Value, _Unknown)) for part in parts):
            return self._attempt(lambda: self._folded(node, args, kwargs))
        handler = _HANDLERS.get(str(node.target).removeprefix("aten."))
        if handler is None:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            return self._refuse("random numbers" if random else "no op of a graph is like it")
        if any(isinstance(part, _Unknown) for part in parts):
            return self._unknown()
        made = self._attempt(lambda: handler(self, *args, **kwargs))
        meant = node.meta.get("val")
        if isinstance(made, Value) and isinstance(meant, Tensor) and not made.expanded and not any(made.pad):
            assert made.shape == tuple(meant.shape), f"{node.format_node()}: {made.shape} for {tuple(meant.shape)}"
        return made

    def _folded(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What depends on no image, computed now, in float64."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise _RefusedError("random numbers")
        args_, kwargs_ = _mapped((args, kwargs), lambda part: part.tensor if isinstance(part, Constant) else part)
        kwargs_ = {name: value for name, value in kwargs_.items() if name not in ("device", "pin_memory")}
        if kwargs_.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs_["dtype"] = torch.float64
        target: Any = node.target
        same = target in (ATEN.clone.default, ATEN.detach.default, ATEN.alias.default, ATEN.unsqueeze.default,
                          ATEN.view.default)  # fmt: skip
        name = args[0].name if same else None
        return _mapped(
            target(*args_, **kwargs_), lambda part: Constant(_wide(part), name) if isinstance(part, Tensor) else part
        )

    def _attempt(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except _RefusedError as refusal:
            return self._refuse(str(refusal))
        except GraphError as error:
            return self._refuse(str(error))

    def _refuse(self, reason: str) -> Any:
        place = _place(self.at)
        line = f"{place}: {str(self.at.target).removeprefix('aten.')}: {reason}"
        if line not in self.refused:
            self.refused.append(line)
        return self._unknown()

    def _unknown(self) -> Any:
        """Something to go on with, so that later ops are looked at too."""

        def stand_in(meant: Any) -> Any:
            if isinstance(meant, Tensor) and meant.dim() in (2, 4) and meant.shape[0] == BATCH_SIZE:
                name = f"\0{len(self.shapes)}"  # no module is called so
                self.shapes[name] = tuple(meant.shape[1:])
                return Value.natural(name, self.shapes[name], BATCH_SIZE)
            return _Unknown()

        return _mapped(self.at.meta.get("val"), stand_in)

    # ---- names and nodes

    def emit(self, op: type[Node], inputs: Sequence[str], word: str, weight: Constant | None = None, /,
             **fields: Any) -> str:  # fmt: skip
        """A new node called after its parameter or its module; ``word`` tells it from others of the same module."""
        if weight is not None and weight.name and "." in weight.name:
            path = weight.name.rpartition(".")[0]
        else:
            path, leaf = _module(self.at)
            path = path if leaf else f"{path}.{word}".removeprefix(".")
        name, count = path, 1
        while name in self.nodes:
            count += 1
            name = f"{path}_{count}"
        node = op(name=name, inputs=tuple(inputs), **fields)
        self.shapes[name] = node.shape(*(self.shapes[source] for source in inputs))
        self.nodes[name] = node
        return name

    def give(self, node: str, **parameters: Constant | None) -> None:
        self.weights |= {f"{node}.{name}": value for name, value in parameters.items() if value is not None}

    def value(self, node: str) -> Value:
        return Value.natural(node, self.shapes[node], BATCH_SIZE)

    # ---- layouts

    def plain(self, x: Any) -> Value:
        """A value that is nothing but rearranged."""
        if isinstance(x, Constant):
            raise _RefusedError("a tensor that does not depend on the image takes the place of a feature map")
        if not isinstance(x, Value):
            raise _RefusedError("reads what cannot be imported")
        if any(x.pad):
            if x.pad_value:
                raise _RefusedError("infinities around a map are taken by a maximum that follows, nothing else")
            return self._framed(x.node, x.pad)
        if x.expanded:
            raise _RefusedError("a vector repeated over a map; only a multiplication takes it")
        return x

    def _framed(self, node: str, pad: tuple[int, int, int, int]) -> Value:
        """A map with so many zeros around it, or where negative so much less: each channel convolved by itself."""
        cut, count = [max(-side, 0) for side in pad], self.shapes[node][0]
        kernel = (cut[0] + 1 + cut[2], cut[1] + 1 + cut[3])
        if max(kernel) > MOST_CUT + 1:
            raise _RefusedError(f"a map of which more than {MOST_CUT} rows or columns are cut off")
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
        source = self.nodes.get(x.node)
        if x.is_vector() and len(x.dims) == 4 and isinstance(source, GlobalPool):
            size = self.shapes[source.inputs[0]][1:]
            again = self._again(x.node, ".map", Pool, source.inputs, kind=source.kind, kernel=size, stride=1)
            return self._in_order(replace(x, node=again), x.dims[1])
        if x.is_vector() and len(x.dims) == 4 and not x.is_map:
            raise _RefusedError("a vector that becomes a map of 1 x 1 again")
        raise _RefusedError(f"reads a tensor {tuple(x.shape)} whose axes are not batch, channels, height, width")

    def _blocks(self, x: Value) -> str:
        """Blocks of pixels as channels (space to depth): a convolution that takes each number to its place."""
        inner = [factor for factor in x.dims[1] if factor[0] != CHANNELS]
        high, wide = (math.prod(x.size(factor) for factor in inner if factor[0] == axis) for axis in (HEIGHT, WIDTH))
        count = self.shapes[x.node][0]
        if count * high * wide > MOST_ROWS:
            raise _RefusedError(f"blocks of pixels as {count * high * wide} channels; at most {MOST_ROWS}")
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
        raise _RefusedError(
            f"reads a tensor {tuple(x.shape)} whose axes are not batch and features, channel by channel"
        )

    def _whole(self, pool: Pool) -> bool:
        return pair(pool.kernel) == self.shapes[pool.inputs[0]][1:] and pool.padding == 0

    def _again(self, node: str, word: str, op: type[Node], inputs: Sequence[str], /, **fields: Any) -> str:
        """A node that makes the same as another, in another shape; made once."""
        key = f"{node} {word}"
        if key not in self.derived:
            name = node + word
            while name in self.nodes:
                name += "_"
            made = op(name=name, inputs=tuple(inputs), **fields)
            self.shapes[name] = made.shape(*(self.shapes[source] for source in inputs))
            self.nodes[name] = made
            self.derived[key] = name
        return self.derived[key]

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
            raise _RefusedError(
                f"channels in an order of {len(ranges)} ranges one behind the other; at most {Concat.arity[1]} are put "
                "together"
            )
        if groups > 1:
            node = self._again(node, f".shuffle{groups}", Shuffle, (node,), groups=groups)
        parts = [self.slice(self.value(node), 1, start, stop) for start, stop in ranges]
        return parts[0].node if len(parts) == 1 else self.concat(parts, 1).node

    # ---- handlers: shapes

    def same(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    def dropout(self, x: Any, share: float, train: bool) -> Any:
        if train:
            raise _RefusedError("dropout that is always on")
        return x

    def cast(self, x: Any, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        types = [part for part in (dtype, *args) if isinstance(part, torch.dtype)]
        if any(not kind.is_floating_point for kind in types):
            raise _RefusedError(f"a feature map as {types[0]}")
        return x

    def view(self, x: Any, *_: Any, **__: Any) -> Any:
        """Any op that only gives the same numbers, in the same order, another shape: that which torch found."""
        x = self.plain(x)
        sizes = tuple(self.at.meta["val"].shape)
        made = x.reshape(sizes)
        if made is None:
            raise _RefusedError(f"a reshape from {x.shape} to {sizes} that goes across axes")
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
            raise _RefusedError("a tensor repeated along an axis")
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
            raise _RefusedError("a part of a tensor that is not a range of its channels")
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
            raise _RefusedError("an index that is not a constant row of whole numbers")
        x = self.plain(x)
        dim %= len(x.dims)
        size = x.shape[dim]
        places: list[int] = [int(place) % size for place in index.tensor]
        step = places[1] - places[0] if len(places) > 1 else 1
        if step > 0 and places == list(range(places[0], places[-1] + 1, step)):
            try:
                made: Value = self.slice(x, dim, places[0], min(places[-1] + step, size), step)
                return made
            except _RefusedError:
                if dim != 1:
                    raise
        if dim != 1 or not (x.is_feature_map() or x.is_vector()):
            raise _RefusedError("a part of a tensor that is not channels of it")
        source = self.value(self.map(x) if x.is_feature_map() else self.vector(x))
        made = self.value(self._arranged(source.node, places))
        return replace(made, dims=(*made.dims, *[()] * (len(x.dims) - len(made.dims))))

    def index(self, x: Any, places: Sequence[Any]) -> Value:
        """Indexing by one tensor, and by nothing before it."""
        *before, index = places
        if any(place is not None for place in before):
            raise _RefusedError("an index along several axes at once")
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
            raise _RefusedError("a write to a part of a tensor that is not a range of its channels")
        parts = [self.slice(x, 1, 0, start)] if start else []
        parts += [part]
        parts += [self.slice(x, 1, stop, size)] if stop < size else []
        return self.concat(parts, 1)

    def copy(self, x: Any, source: Any, *_: Any) -> Any:
        meant = tuple(self.at.meta["val"].shape)
        if isinstance(source, Value) and source.shape == meant:
            return source
        if isinstance(source, Constant):
            return Constant(source.tensor.expand(meant))
        raise _RefusedError("a write of a tensor of another shape")

    def fill(self, x: Any, value: Any, *_: Any) -> Constant:
        number = value.tensor if isinstance(value, Constant) else torch.tensor(value, dtype=torch.float64)
        return Constant(number.expand(tuple(self.at.meta["val"].shape)))

    def zeros_like(self, x: Any, *_: Any, **__: Any) -> Constant:
        return Constant(torch.zeros(tuple(self.at.meta["val"].shape), dtype=torch.float64))

    def pad(self, x: Any, sizes: Sequence[int], mode: Any = "constant", value: float | None = None) -> Any:
        if mode != "constant":
            raise _RefusedError(f"padding of mode '{mode}': nothing but zeros is put around a map")
        return self.constant_pad(x, sizes, value or 0.0)

    def constant_pad(self, x: Any, sizes: Sequence[int], value: float = 0.0) -> Any:
        sizes = [*sizes, 0, 0, 0, 0, 0, 0][:6]
        left, right, top, bottom, before, behind = sizes
        if value not in (0, -math.inf):
            raise _RefusedError(f"padding with {value}, not with zeros")
        if min(before, behind) < 0:
            raise _RefusedError("padding that cuts off channels")
        if before or behind:
            if value:
                raise _RefusedError("channels of infinities")
            node = self.map(x)
            count = self.shapes[node][0]
            at = tuple(range(before, before + count))
            x = self.value(self.emit(Scatter, (node,), "pad", channels=before + count + behind, at=at))
        if not (left or right or top or bottom):
            return self.plain(x)
        pad = (top, left, bottom, right)
        if min(pad) < 0:
            if value:
                raise _RefusedError("padding with infinities that cuts off")
            return self._framed(self.map(x), pad)
        return replace(self.value(self.map(x)), pad=pad, pad_value=float(value))

    def concat(self, parts: Sequence[Any], dim: int = 0) -> Value:
        values = [part for part in parts if isinstance(part, Value)]
        rank = len(values[0].dims)
        if dim % rank != 1:
            raise _RefusedError("parts put together along another axis than channels")
        read = self.map if rank == 4 and any(not value.is_vector() or value.is_map for value in values) else self.vector
        names: list[str] = []
        at: list[int] = []
        total = 0
        for part in parts:
            if isinstance(part, Constant):
                if part.tensor.any():
                    raise _RefusedError("constant channels that are not zeros")
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

    # ---- handlers: layers

    def conv(self, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
             groups: int = 1) -> Any:  # fmt: skip
        self._constant(weight, bias)
        if weight.tensor.dim() == 3:
            return self._over_channels(x, weight.tensor, bias, stride, padding, dilation)
        if weight.tensor.dim() != 4:
            raise _RefusedError("a convolution that is not two-dimensional")
        if not isinstance(x, Value):
            self.plain(x)
        out, _, *kernel = weight.tensor.shape
        stride, dilation = (_two(value) for value in (stride, dilation))
        if padding == "same":
            spans = [span * (size - 1) for span, size in zip(dilation, kernel, strict=True)]
            top, left = (span // 2 for span in spans)
            sides = (top, left, spans[0] - top, spans[1] - left)
        else:
            high, wide = (0, 0) if padding == "valid" else _two(padding)
            sides = (high, wide, high, wide)
        if any(x.pad):
            if x.pad_value:
                raise _RefusedError("a convolution of infinities")
            sides = tuple(a + b for a, b in zip(sides, x.pad, strict=True))
            x = replace(x, pad=(0, 0, 0, 0))
        plain = kernel == [1, 1] and groups == 1 and not any(sides)
        if plain and x.is_vector() and self._is_pooled(x):  # a 1x1 convolution of a pooled map
            made = self.emit(Linear, (self.vector(x),), "conv", weight, features=out, bias=bias is not None)
            self.give(made, weight=weight, bias=bias)
            return replace(self.value(made), dims=(*self.value(made).dims, (), ()))
        made = self.emit(
            Conv, (self.map(x),), "conv", weight, channels=out, kernel=tuple(kernel), stride=stride, padding=sides,
            dilation=dilation, groups=groups, bias=bias is not None,
        )  # fmt: skip
        self.give(made, weight=weight, bias=bias)
        return self.value(made)

    def _over_channels(self, x: Any, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any) -> Value:
        """A convolution (1, 1, kernel) over a vector's channels: a matrix with the kernel in each row, a constant."""
        x, kernel = self.plain(x), weight.shape[2]
        if x.dims[:1] + x.dims[2:] != (x.axis(BATCH), x.axis(CHANNELS)) or x.dims[1] or weight.shape[:2] != (1, 1) or (
            _two(stride) != (1, 1)
        ):  # fmt: skip
            raise _RefusedError(
                "a one-dimensional convolution that is not one, with stride 1, over a vector's channels"
            )
        (before, _), (step, _) = _two(padding), _two(dilation)
        count = x.shape[2]
        if count > MOST_ROWS:
            raise _RefusedError(f"a convolution over {count} channels of a vector; at most {MOST_ROWS}")
        band = torch.zeros(count + 2 * before - step * (kernel - 1), count + 2 * before, dtype=torch.float64)
        for at, row in enumerate(band):
            row[at : at + step * (kernel - 1) + 1 : step] = weight.flatten()
        band = band[:, before : before + count]
        source = self.vector(replace(x, dims=(x.dims[0], x.dims[2])))
        made = self.emit(Linear, (source,), "conv", features=len(band), bias=bias is not None)
        bias = None if bias is None else Constant(bias.tensor.expand(len(band)))
        self.give(made, weight=Constant(band), bias=bias)
        new = self.value(made)
        return replace(new, dims=(new.dims[0], (), new.dims[1]))

    def convolution(self, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
                    output_padding: Any, groups: int) -> Any:  # fmt: skip
        if transposed:
            raise _RefusedError(
                "transposed convolution: channels are skipped where convolutions read, not where they spread"
            )
        return self.conv(x, weight, bias, stride, padding, dilation, groups)

    def transposed(self, *_: Any, **__: Any) -> Value:
        raise _RefusedError(
            "transposed convolution: channels are skipped where convolutions read, not where they spread"
        )

    def _is_pooled(self, x: Value) -> bool:
        node = self.nodes.get(x.node)
        return not x.is_map or (isinstance(node, Pool) and self._whole(node))

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        self._constant(weight, bias)
        x = self.plain(x)
        out, into = weight.tensor.shape
        if len(x.dims) == 2:
            made = self.emit(Linear, (self.vector(x),), "linear", weight, features=out, bias=bias is not None)
            self.give(made, weight=weight, bias=bias)
            return self.value(made)
        if not (x.is_map and x.dims[-1] == x.axis(CHANNELS) and self.shapes[x.node][0] == into):
            raise _RefusedError("a linear layer along another axis than channels")
        made = self.emit(Conv, (x.node,), "linear", weight, channels=out, kernel=1, padding=0, bias=bias is not None)
        self.give(made, weight=weight, bias=bias)
        new = self.value(made)  # channels last, as before
        places = iter(new.axis(CHANNELS))
        axes = (x.axes[0], new.axes[1], *x.axes[2:])
        return replace(x, node=made, axes=axes, dims=(*x.dims[:-1], tuple(places)))

    def product(self, x: Any, weight: Any) -> Any:
        self._constant(weight)
        return self.linear(x, Constant(weight.tensor.T))

    def sum_and_product(self, bias: Any, x: Any, weight: Any) -> Any:
        self._constant(weight)
        return self.linear(x, Constant(weight.tensor.T), bias)

    def batch_norm(self, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float) -> Any:
        self._constant(weight, bias, mean, variance)
        x = self.plain(x)
        source = self.vector(x) if not x.is_map or (x.is_vector() and self._is_pooled(x)) else self.map(x)
        ones = torch.ones_like(mean.tensor)
        made = self.emit(BatchNorm, (source,), "norm", mean, eps=eps)
        self.give(
            made, moving_mean=mean, moving_variance=variance, gamma=weight or Constant(ones),
            beta=bias or Constant(torch.zeros_like(ones)),
        )  # fmt: skip
        new = self.value(made)
        return (replace(new, dims=(*new.dims, *[()] * (len(x.dims) - len(new.dims)))),)

    def layer_norm(self, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
                   *_: Any) -> Any:  # fmt: skip
        x = self.plain(x)
        return self._layer_normed(x, range(len(x.dims) - len(shape), len(x.dims)), eps, weight, bias)

    def _layer_normed(self, x: Any, dims: Sequence[int], eps: float, weight: Any = None, bias: Any = None) -> Any:
        self._constant(weight, bias)
        x = self.plain(x)
        if sorted(factor for dim in dims for factor in x.dims[dim]) != list(x.axis(CHANNELS)):
            raise _RefusedError("a layer norm over other axes than channels")
        made = self.emit(LayerNorm, (x.node,), "norm", weight, eps=eps)
        count = self.shapes[made][0]
        gamma, beta = (None if part is None else self._per_channel(x, part) for part in (weight, bias))
        self.give(
            made, gamma=gamma or Constant(torch.ones(count, dtype=torch.float64)),
            beta=beta or Constant(torch.zeros(count, dtype=torch.float64)),
        )  # fmt: skip
        return replace(x, node=made)

    def own_statistics(self, *_: Any, **__: Any) -> Any:
        raise _RefusedError("a normalisation by statistics of the image at hand")

    def softmax(self, x: Any, dim: int, *_: Any) -> Any:
        """Of two parts of a vector, sigmoids: attention between two branches (SKNet, Li et al. 2019)."""
        x = self.plain(x)
        shape = x.shape
        inside = {axis for factors in x.dims[1:] for axis, _ in factors}
        if dim % len(shape) != 1 or len(shape) < 3 or shape[1] != 2 or inside != {CHANNELS}:
            raise _RefusedError(
                "a network's output is its logits; return them as they are (elsewhere: a softmax is taken of two parts "
                "of a vector, along dimension 1, nothing else)"
            )
        first, second = (part.reshape((shape[0], math.prod(shape[2:]))) for part in self.unbind(x, 1))
        less = self.subtract(first, second)
        parts = [self.activation("sigmoid", less), self.activation("sigmoid", self.negative(less))]
        return self.concat(parts, 1).reshape(shape)

    def log_softmax(self, *_: Any, **__: Any) -> Any:
        raise _RefusedError("a network's output is its logits; return them as they are")

    # ---- handlers: pooling

    def max_pool(self, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
                 ceil_mode: bool = False) -> Any:  # fmt: skip
        if _two(dilation) != (1, 1):
            raise _RefusedError("pooling with dilation")
        return self._pooled("max", x, _two(kernel), _two(stride or kernel), _two(padding))

    def max_pool_with_indices(self, *args: Any) -> tuple[Value, _Unknown]:
        return self.max_pool(*args), _Unknown()

    def average_pool(self, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
                     count_include_pad: bool = True, divisor_override: int | None = None) -> Any:  # fmt: skip
        kernel, padding = _two(kernel), _two(padding)
        if divisor_override not in (None, math.prod(kernel)):
            raise _RefusedError("an average with a divisor of its own")
        return self._pooled("average", x, kernel, _two(stride or kernel), padding, count_include_pad)

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
        return self._adaptive("average", x, _two(size))

    def adaptive_max(self, x: Any, size: Any) -> tuple[Value, _Unknown]:
        return self._adaptive("max", x, _two(size)), _Unknown()

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
            raise _RefusedError(
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
        if len(over) == 1 and {axis for axis, _ in x.dims[over[0]]} == {CHANNELS}:
            (dim,) = over
            if x.shape[dim] > MOST_PARTS:
                raise _RefusedError(f"a sum over {x.shape[dim]} parts of the channels; at most {MOST_PARTS} are added")
            made = functools.reduce(self.add, self.unbind(x, dim))
            return made.reshape((*x.shape[:dim], 1, *x.shape[dim + 1 :])) if keepdim else made
        count = math.prod(x.shape[dim] for dim in over)
        return self.multiply(self._reduced("average", x, over, keepdim), float(count))

    def maximum_over(self, x: Any, dims: Any = None, keepdim: bool = False) -> Any:
        return self._reduced("max", x, dims, keepdim)

    def _reduced(self, kind: PoolKind, x: Any, dims: Any, keepdim: bool) -> Any:
        """The mean or maximum over height, width or both."""
        x = self.plain(x)
        over = {dim % len(x.dims) for dim in ([dims] if isinstance(dims, int) else dims or range(len(x.dims)))}
        gone = {factor for dim in over for factor in x.dims[dim]}
        left = tuple(() if dim in over else factors for dim, factors in enumerate(x.dims) if keepdim or dim not in over)
        rows, columns = (set(x.axis(axis)) for axis in (HEIGHT, WIDTH))
        if not x.is_map and not gone:
            return replace(x, dims=left)
        if not x.is_map or not gone <= rows | columns or (gone & rows) not in (rows, set()) or (
            (gone & columns) not in (columns, set())
        ):  # fmt: skip
            raise _RefusedError("a mean or maximum that is not over whole height, width or both")
        if gone == rows | columns:
            made = self.emit(GlobalPool, (x.node,), "pool", kind=kind)
            return replace(x, node=made, axes=x.axes[:2], dims=left).merged()
        kernel = tuple(self.shapes[x.node][axis - 1] if gone & set(x.axis(axis)) else 1 for axis in (HEIGHT, WIDTH))
        made = self.emit(Pool, (x.node,), "pool", kind=kind, kernel=kernel, stride=1)
        axes = tuple(() if gone & set(x.axis(axis)) else sizes for axis, sizes in enumerate(x.axes))
        return replace(x, node=made, axes=axes, dims=left).merged()

    # ---- handlers: elementwise

    def activation(self, kind: str, x: Any) -> Any:
        if kind not in _KINDS:
            raise _RefusedError("an activation that is not known")
        x = self.plain(x)
        return replace(x, node=self.emit(Activation, (x.node,), kind, kind=kind))

    def gelu(self, x: Any, approximate: str = "none") -> Any:
        if approximate != "none":
            raise _RefusedError(f"a GELU that is approximated by {approximate}")
        return self.activation("gelu", x)

    def leaky_relu(self, x: Any, slope: float = 0.01) -> Any:
        x = self.plain(x)
        return replace(x, node=self.emit(LeakyReLU, (x.node,), "leaky_relu", slope=float(slope)))

    def elu(self, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
        if (scale, input_scale) != (1, 1):
            raise _RefusedError("a scaled ELU")
        x = self.plain(x)
        return replace(x, node=self.emit(ELU, (x.node,), "elu", alpha=float(alpha)))

    def prelu(self, x: Any, slope: Any) -> Any:
        self._constant(slope)
        x = self.plain(x)
        if slope.tensor.numel() == 1:  # one for all channels
            slope = Constant(slope.tensor.reshape(-1).expand(self.shapes[x.node][0]),
                             slope.name if self.shapes[x.node][0] == 1 else None)  # fmt: skip
        else:
            slope = self._per_channel(x, Constant(slope.tensor.reshape((-1,) + (1,) * (len(x.dims) - 2)), slope.name))
        made = self.emit(PReLU, (x.node,), "prelu")
        self.give(made, slope=slope)
        return replace(x, node=made)

    def clamp(self, x: Any, low: float | None = None, high: float | None = None) -> Any:
        low = -FLOAT32_MAX if low is None else low
        high = FLOAT32_MAX if high is None else high
        if (low, high) in ((0, 6), (0, FLOAT32_MAX)):
            return self.activation("relu6" if high == 6 else "relu", x)
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high):
            raise _RefusedError("a clip whose bounds are no rising numbers")
        x = self.plain(x)
        return replace(x, node=self.emit(Clip, (x.node,), "clip", low=float(low), high=float(high)))

    def hardtanh(self, x: Any, low: float = -1.0, high: float = 1.0) -> Any:
        return self.clamp(x, low, high)

    def add(self, x: Any, y: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            y = self.multiply(y, alpha) if isinstance(y, Value) else _number(y, lambda t: t * alpha)
        if isinstance(x, Value) and isinstance(y, Value):
            return self._together(Add, x, y)
        x, y = (x, y) if isinstance(x, Value) else (y, x)
        return self._affine(x, None, y)

    def subtract(self, x: Any, y: Any, alpha: float = 1) -> Any:
        return self.add(x, y, -alpha)

    def subtract_from(self, x: Any, y: Any, alpha: float = 1) -> Any:
        return self.add(self.multiply(x, -alpha), y)

    def negative(self, x: Any) -> Any:
        return self.multiply(x, -1.0)

    def multiply(self, x: Any, y: Any) -> Any:
        if isinstance(x, Value) and isinstance(y, Value):
            if len(x.dims) == len(y.dims) == 5 and x.shape[3:] == (1, 1):
                x, y = y, x
            shape = x.shape
            if len(shape) == 5 and y.shape == (*shape[:3], 1, 1) and not (any(x.pad) or any(y.pad)):  # channels in two
                flat = [part.reshape((shape[0], shape[1] * shape[2], *part.shape[3:])) for part in (x, y)]
                return self.multiply(*flat).reshape(shape)
            if y.is_map and not y.is_vector() and (not x.is_map or x.is_vector()):
                x, y = y, x
            if len(x.dims) == len(y.dims) == 4 and y.is_vector() and (self._is_pooled(y) or y.expanded) and x.is_map:
                node, factor = self.map(x), self.vector(replace(y, expanded=False))
                if self.shapes[node][0] != self.shapes[factor][0]:
                    raise _RefusedError("a multiplication by a tensor of other channels")
                return self.value(self.emit(Multiply, (node, factor), "mul"))
            return self._together(Multiply, x, y)
        x, y = (x, y) if isinstance(x, Value) else (y, x)
        return self._affine(x, y, None)

    def divide(self, x: Any, y: Any) -> Any:
        if isinstance(y, Value):
            raise _RefusedError("a division by what depends on the image")
        return self._affine(x, _number(y, lambda t: 1 / t), None)

    def power(self, x: Any, exponent: Any) -> Any:
        if exponent != 2:
            raise _RefusedError(f"a power of {exponent}")
        return self._together(Multiply, self.plain(x), self.plain(x))

    def _together(self, kind: type[Node], x: Any, y: Any) -> Any:
        x, y = self.plain(x), self.plain(y)
        if x.shape != y.shape:
            raise _RefusedError(f"tensors of different shapes, {x.shape} and {y.shape}: one is repeated along an axis")
        word = "add" if kind is Add else "mul"
        if (x.axes, x.dims) == (y.axes, y.dims):
            return replace(x, node=self.emit(kind, (x.node, y.node), word))
        read = self.vector if x.is_vector() and y.is_vector() and not (x.is_map and y.is_map) else self.map
        made = self.value(self.emit(kind, (read(x), read(y)), word))
        return replace(made, dims=(*made.dims, *[()] * (len(x.dims) - len(made.dims))))

    def _affine(self, x: Any, scale: Any, shift: Any) -> Any:
        """x * scale + shift, numbers or constants of one number a channel.

        Of a map a convolution of each channel by itself; straight behind a linear layer that layer itself, so that a
        network's last one can be given other classes; of another vector a batch norm whose statistics are 0 and 1.
        """
        x = self.plain(x)
        factor, term = (None if part is None else self._per_channel(x, part) for part in (scale, shift))
        if factor is None:
            factor = Constant(torch.ones(self.shapes[x.node][0], dtype=torch.float64))
        before = self.nodes.get(x.node)
        if isinstance(before, Linear):
            old = {name: self.weights.get(f"{before.name}.{name}") for name in ("weight", "bias")}
            weight, bias = old["weight"], old["bias"]
            assert weight is not None
            moved = bias.tensor * factor.tensor if bias is not None else torch.zeros_like(factor.tensor)
            moved = moved + term.tensor if term is not None else moved
            made = self.emit(Linear, before.inputs, "scaled", features=before.features, bias=True)
            self.give(made, weight=Constant(weight.tensor.flatten(1) * factor.tensor[:, None]), bias=Constant(moved))
            return replace(x, node=made)
        if not x.is_map:
            zeros = torch.zeros_like(factor.tensor)
            made = self.emit(BatchNorm, (x.node,), "scaled", eps=0.5, use_global_stats=True)
            self.give(made, moving_mean=Constant(zeros), moving_variance=Constant(zeros + 0.5), gamma=factor,
                      beta=term or Constant(zeros))  # fmt: skip
            return replace(x, node=made)
        count = self.shapes[x.node][0]
        made = self.emit(Conv, (x.node,), "scaled", channels=count, groups=count, kernel=1, padding=0,
                         bias=term is not None)  # fmt: skip
        self.give(made, weight=factor, bias=term)
        return replace(x, node=made)

    def _per_channel(self, x: Value, part: Any) -> Constant:
        """One number a channel of the value's node, from a number or a tensor that fits the tensor x."""
        given = part.tensor if isinstance(part, Constant) else torch.tensor(float(part), dtype=torch.float64)
        name = part.name if isinstance(part, Constant) else None
        if given.dim() > len(x.dims):
            raise _RefusedError("a constant with more axes than what it meets")
        given = given.reshape((1,) * (len(x.dims) - given.dim()) + tuple(given.shape))
        varies = [dim for dim, size in enumerate(given.shape) if size > 1]
        if any(axis != CHANNELS for dim in varies for axis, _ in x.dims[dim]):
            raise _RefusedError("a constant that is not one number, or one a channel")
        inside = [[factor for factor in dim if factor[0] == CHANNELS] for dim in x.dims]
        sizes = [math.prod(x.size(factor) for factor in dim) for dim in inside]
        spread = given.expand(sizes).reshape([x.size(factor) for dim in inside for factor in dim])
        order = [factor for dim in inside for factor in dim]
        flat = spread.permute([order.index(factor) for factor in sorted(order)]).reshape(-1)
        whole = given.numel() == flat.numel() and order == sorted(order)
        return Constant(flat, name if whole else None)

    def _constant(self, *parts: Any) -> None:
        if any(part is not None and not isinstance(part, Constant) for part in parts):
            raise _RefusedError("weights that depend on the image")


@dataclass(frozen=True)
class _Unknown:
    """What nothing can be made of."""


_Handler = Callable[..., Any]
_L = _Lowering


def _activation(kind: str) -> _Handler:
    return lambda lowering, x: lowering.activation(kind, x)


_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("clone.default", "alias.default", "detach.default", "contiguous.default",
                     "lift_fresh_copy.default"), _L.same), "dropout.default": _L.dropout,
    **dict.fromkeys(("_to_copy.default", "to.dtype"), _L.cast),
    **dict.fromkeys(("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints",
                     "unflatten.int", "squeeze.dim", "squeeze.dims", "squeeze.default", "unsqueeze.default",
                     "view_copy.default"), _L.view),
    "permute.default": _L.permute, "transpose.int": _L.transpose, "expand.default": _L.expand,
    "split.Tensor": _L.split, "split_with_sizes.default": _L.split, "unbind.int": _L.unbind,
    "index_select.default": _L.index_select, "index.Tensor": _L.index, "flip.default": _L.flip,
    "select.int": _L.select, "slice.Tensor": _L.slice, "slice_scatter.default": _L.slice_scatter,
    "copy.default": _L.copy, "fill.Scalar": _L.fill, "fill.Tensor": _L.fill, "zeros_like.default": _L.zeros_like,
    "pad.default": _L.pad, "constant_pad_nd.default": _L.constant_pad, "cat.default": _L.concat,
    "conv2d.default": _L.conv, "conv2d.padding": _L.conv, "convolution.default": _L.convolution,
    "conv_transpose2d.input": _L.transposed, "linear.default": _L.linear,
    "mm.default": _L.product, "addmm.default": _L.sum_and_product,
    "_native_batch_norm_legit_no_training.default": _L.batch_norm,
    "layer_norm.default": _L.layer_norm,
    **dict.fromkeys(("_native_batch_norm_legit.no_stats", "instance_norm.default", "group_norm.default"),
                    _L.own_statistics),
    "_softmax.default": _L.softmax, "_log_softmax.default": _L.log_softmax,
    "max_pool2d.default": _L.max_pool, "max_pool2d_with_indices.default": _L.max_pool_with_indices,
    "avg_pool2d.default": _L.average_pool, "adaptive_avg_pool2d.default": _L.adaptive_average,
    "_adaptive_avg_pool2d.default": _L.adaptive_average, "adaptive_max_pool2d.default": _L.adaptive_max,
    "mean.dim": _L.mean, "mean.default": _L.mean, "sum.dim_IntList": _L.sum, "amax.default": _L.maximum_over,
    **{f"{kind}.default": _activation(kind) for kind in
       ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "tanh", "mish")},
    "leaky_relu.default": _L.leaky_relu, "elu.default": _L.elu, "prelu.default": _L.prelu,
    "gelu.default": _L.gelu, "clamp.default": _L.clamp, "clamp_min.default": _L.clamp, "hardtanh.default": _L.hardtanh,
    "clamp_max.default": lambda lowering, x, high: lowering.clamp(x, None, high),
    **dict.fromkeys(("add.Tensor", "add.Scalar"), _L.add), **dict.fromkeys(("sub.Tensor", "sub.Scalar"), _L.subtract),
    "rsub.Scalar": _L.subtract_from, "neg.default": _L.negative, "pow.Tensor_Scalar": _L.power,
    **dict.fromkeys(("mul.Tensor", "mul.Scalar"), _L.multiply),
    **dict.fromkeys(("div.Tensor", "div.Scalar"), _L.divide),
}  # fmt: skip

KEPT_WHOLE = tuple(
    getattr(getattr(ATEN, name.partition(".")[0]), name.partition(".")[2]) for name in _HANDLERS
)  # not to be taken apart: torch's decompositions of these are harder to recognise


def _pattern(node: fx.Node) -> tuple[_Handler, Sequence[Any]] | None:
    """A layer written out by hand: its handler, and what that is called with."""
    activation, norm = _written_activation(node), _written_layer_norm(node)
    if activation:
        return _activation(activation[0]), activation[1:]
    return (_L._layer_normed, norm) if norm else None


def _written_layer_norm(node: Any) -> Sequence[Any] | None:
    """x, dimensions, eps of (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps); of w times that + b also w and b."""
    if _is(node, "div.Tensor"):
        centred, root = _centred(node.args[0]), node.args[1]
        above: Any = root.args[0] if _is(root, "sqrt.default") else None
        variance: Any
        variance, eps = above.args[:2] if _is(above, "add.Tensor") else (None, None)
        if centred and isinstance(eps, float) and _is(variance, "mean.dim") and variance.args[1:] == (centred[1], True):
            square = variance.args[0]
            if _is(square, "pow.Tensor_Scalar") and square.args[1] == 2 and _centred(square.args[0]) == centred:
                return (*centred, eps)
    if _is(node, "add.Tensor") and not node.kwargs:
        for product, bias in (node.args, node.args[::-1]):
            for weight, normal in (product.args, product.args[::-1]) if _is(product, "mul.Tensor") else ():
                found = _written_layer_norm(normal) if _is(normal, "div.Tensor") else None
                if found and all(_rank(part) < _rank(normal) for part in (weight, bias)):  # not made of images
                    return (*found, weight, bias)
    return None


def _rank(part: Any) -> float:
    """Number of a tensor's axes; of what is none more than any has."""
    return part.meta["val"].dim() if isinstance(part, fx.Node) else math.inf


def _centred(node: Any) -> tuple[fx.Node, list[int]] | None:
    """x and the dimensions of x - mean(x)."""
    if not _is(node, "sub.Tensor") or not _is(mean := node.args[1], "mean.dim") or mean.args[0] is not node.args[0]:
        return None
    return (mean.args[0], mean.args[1]) if mean.args[2:] == (True,) else None


def _written_activation(node: fx.Node) -> tuple[str, fx.Node] | None:
    """An activation and what it is taken of: x * sigmoid(x), relu6(x + 3) / 6 and x times that."""
    if _is(node, "mul.Tensor"):
        first, second = node.args[:2]
        for x, factor in ((first, second), (second, first)):
            if isinstance(factor, fx.Node) and isinstance(x, fx.Node):
                if _is(factor, "sigmoid.default") and factor.args[0] is x:
                    return "silu", x
                if (_is(factor, "hardsigmoid.default") and factor.args[0] is x) or _clipped(_sixth(factor)) is x:
                    return "hardswish", x
    product = _sixth(node)
    if isinstance(product, fx.Node) and _is(product, "mul.Tensor"):
        first, second = product.args[:2]
        for x, factor in ((first, second), (second, first)):
            if isinstance(x, fx.Node) and _clipped(factor) is x:
                return "hardswish", x
    x = _clipped(product)
    return None if x is None else ("hardsigmoid", x)


def _sixth(node: fx.Node) -> Any:
    """y of y / 6."""
    divided = _is(node, "div.Tensor") and node.args[1] == 6
    scaled = _is(node, "mul.Tensor") and isinstance(node.args[1], float) and abs(6 * node.args[1] - 1) < 1e-9
    return node.args[0] if divided or scaled else None


def _clipped(node: Any) -> fx.Node | None:
    """x of relu6(x + 3)."""
    if not isinstance(node, fx.Node):
        return None
    clips = _is(node, "relu6.default") or (
        (_is(node, "hardtanh.default") or _is(node, "clamp.default")) and tuple(node.args[1:]) == (0, 6)
    )
    shifted = node.args[0] if clips else None
    if isinstance(shifted, fx.Node) and _is(shifted, "add.Tensor") and shifted.args[1] == 3 and not shifted.kwargs:
        x = shifted.args[0]
        return x if isinstance(x, fx.Node) else None
    return None


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and str(node.target) == f"aten.{name}"


def _module(node: fx.Node) -> tuple[str, bool]:
    """Path of the module that an op belongs to, and whether that is one of torch's own layers."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", False
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path, bool(path) and kind.startswith("torch.nn.modules.") and ".container." not in kind


def _place(node: fx.Node) -> str:
    """ "layer1.0.act (net.py:12)": the module, and the last line of its author's that led to the op."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line]
    own = [line for line in frames if TORCH not in line] or frames
    path = _module(node)[0] or "the network"
    if not own or OURS in own[-1]:
        return path
    file, _, rest = own[-1].removeprefix('File "').partition('"')
    number = "".join(ch for ch in rest.split(",")[1] if ch.isdigit()) if "," in rest else "?"
    return f"{path} ({Path(file).name}:{number})"


def _mapped(parts: Any, change: Callable[[Any], Any]) -> Any:
    """Lists, tuples and dicts with everything in them changed."""
    if isinstance(parts, (tuple, list)):
        return type(parts)(_mapped(part, change) for part in parts) if type(parts) in (tuple, list) else [
            _mapped(part, change) for part in parts]  # fmt: skip
    if isinstance(parts, Mapping):
        return {name: _mapped(part, change) for name, part in parts.items()}
    return change(parts)


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


def _evenly(size: int, count: int) -> tuple[int, int] | None:
    """(window, stride) of an adaptive pool from ``size`` to ``count``, if its windows are alike."""
    starts = [at * size // count for at in range(count)]
    windows = {-(-(at + 1) * size // count) - start for at, start in enumerate(starts)}
    strides = {after - before for before, after in pairwise(starts)} or {1}
    return (windows.pop(), strides.pop()) if len(windows) == len(strides) == 1 and strides != {0} else None


def _two(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _number(part: Any, change: Callable[[Tensor], Tensor]) -> Constant:
    return Constant(
        change(part.tensor if isinstance(part, Constant) else torch.tensor(float(part), dtype=torch.float64))
    )
