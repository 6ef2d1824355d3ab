"""The walk over an exported module: op by op to its handler; what has none is listed, all of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from manidp.errors import FrontendError, GraphError
from manidp.graph import Graph, Input, Shape
from manidp.torch.layout import Value
from manidp.torch.lowering.layers import Layers
from manidp.torch.lowering.nodes import BATCH_SIZE, Constant, RefusedError, Unknown, module_of, wide
from manidp.torch.lowering.patterns import ending_of, written_activation, written_layer_norm

ATEN = torch.ops.aten
TORCH = str(Path(torch.__file__).parent)  # code below is torch's, not a network's author's
OURS = str(Path(__file__).parents[2])  # and what is below this is ours: an ONNX file has no lines of code


@dataclass(frozen=True)
class Lowered:
    """A graph, its parameters in float64, and which of them are which of the module's (same numbers, same order).

    ending: what the module makes of the graph's logits, "softmax", "log_softmax" or nothing, "".
    """

    graph: Graph
    weights: Mapping[str, Tensor]
    names: Mapping[str, str]
    ending: str


def lower(exported: torch.export.ExportedProgram, state: Mapping[str, Tensor], image: Shape) -> Lowered:
    """The graph of a functional exported module, with the parameters and buffers in ``state``.

    Raises FrontendError listing every op that cannot be lowered, with its module's path and its source line.
    """
    return Lowering(exported=exported, state=state, image=image).run()


@dataclass(kw_only=True)
class Lowering(Layers):
    """An exported module on its way to a graph: ``refused`` lists what has none, ``env`` what each op made."""

    exported: torch.export.ExportedProgram
    state: Mapping[str, Tensor]
    image: Shape
    refused: list[str] = field(default_factory=list)
    env: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self) -> Lowered:
        graph = self.exported.graph
        output = next(node for node in graph.nodes if node.op == "output")
        (made,) = output.args[0]  # one output, checked before
        ending, result = ending_of(made)
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
            ending,
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
            return Constant(wide(self.state[known[name]]), known[name], name in signature.inputs_to_parameters)
        if name in signature.inputs_to_lifted_tensor_constants:
            return Constant(wide(self.exported.constants[signature.inputs_to_lifted_tensor_constants[name]]))
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
        if not any(isinstance(part, (Value, Unknown)) for part in parts):
            return self._attempt(lambda: self._folded(node, args, kwargs))
        handler = _HANDLERS.get(str(node.target).removeprefix("aten."))
        if handler is None:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            return self._refuse("random numbers" if random else "no op of a graph is like it")
        if any(isinstance(part, Unknown) for part in parts):
            return self._unknown()
        made = self._attempt(lambda: handler(self, *args, **kwargs))
        meant = node.meta.get("val")
        if isinstance(made, Value) and isinstance(meant, Tensor) and not made.expanded and not any(made.pad):
            assert made.shape == tuple(meant.shape), f"{node.format_node()}: {made.shape} for {tuple(meant.shape)}"
        return made

    def _folded(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What depends on no image, computed now, in float64."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RefusedError("random numbers")
        args_, kwargs_ = _mapped((args, kwargs), lambda part: part.tensor if isinstance(part, Constant) else part)
        kwargs_ = {name: value for name, value in kwargs_.items() if name not in ("device", "pin_memory")}
        if kwargs_.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs_["dtype"] = torch.float64
        target: Any = node.target
        same = target in (ATEN.clone.default, ATEN.detach.default, ATEN.alias.default, ATEN.unsqueeze.default,
                          ATEN.view.default)  # fmt: skip
        name, parts = args[0].name if same else None, list[Any]()
        _mapped((args, kwargs), parts.append)
        learned = any(isinstance(part, Constant) and part.learned for part in parts)
        return _mapped(
            target(*args_, **kwargs_),
            lambda part: Constant(wide(part), name, learned) if isinstance(part, Tensor) else part,
        )

    def _attempt(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except RefusedError as refusal:
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
            return Unknown()

        return _mapped(self.at.meta.get("val"), stand_in)


_Handler = Callable[..., Any]
_L = Lowering


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
    "mean.dim": _L.mean, "mean.default": _L.mean, "sum.dim_IntList": _L.sum,
    "amax.default": _L.maximum_over, "max.dim": _L.maximum_along,
    **{f"{kind}.default": _activation(kind) for kind in
       ("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "tanh", "mish")},
    "leaky_relu.default": _L.leaky_relu, "elu.default": _L.elu, "prelu.default": _L.prelu,
    "celu.default": _L.celu, "softplus.default": _L.softplus, "abs.default": _L.absolute,
    "maximum.default": _L.maximum, "minimum.default": _L.minimum, "gelu.default": _L.gelu,
    "clamp.default": _L.clamp, "clamp_min.default": _L.clamp, "hardtanh.default": _L.hardtanh,
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
    activation, norm = written_activation(node), written_layer_norm(node)
    if activation:
        return _activation(activation[0]), activation[1:]
    return (_L._layer_normed, norm) if norm else None


def _place(node: fx.Node) -> str:
    """ "layer1.0.act (net.py:12)": the module, and the last line of its author's that led to the op."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line]
    own = [line for line in frames if TORCH not in line] or frames
    path = module_of(node)[0] or "the network"
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
