"""A graph as a torch module: walks the nodes, returns the logits and one record for every gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from manidp.errors import CheckpointError, some
from manidp.graph import (
    ELU,
    Activation,
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
    PReLU,
    Scatter,
    Select,
    Shuffle,
    Slice,
    Squareplus,
    pair,
    sides,
)
from manidp.graph.handlers import Handlers
from manidp.result import Result
from manidp.torch.processes import Processes, batch_norm

BUFFERS = ("moving_mean", "moving_variance", "threshold", "mask")  # parameters that no gradient moves

P = Mapping[str, Tensor]  # parameters of a node, by their local names


@dataclass(frozen=True)
class GateRecord:
    """What one gate did to a batch; three (B, C) tensors.

    saliency: before the threshold, >= 0. gate: the factor, 0 where closed. feature: mean over H and W of the feature
    map that the gate scales, before it is scaled.
    """

    saliency: Tensor
    gate: Tensor
    feature: Tensor


@dataclass(frozen=True)
class Output:
    """logits (B, classes), and the record of every gate under its name."""

    logits: Tensor
    records: Mapping[str, GateRecord]


class Network(nn.Module):
    """A graph's parameters and how to run it. ``state_dict`` has exactly the names of ``graph.parameters``.

    Fresh weights: convolutions N(0, sqrt(2 / (kernel^2 * out))); gates are the identity (fc2 = 0, bias = 1,
    threshold = 0), so that a net and its gated copy give the same logits to the last bit.
    Departs: the reference starts gates at random, which makes the activations of a fresh net explode.

    Raises UnsupportedError for an op that torch's table lacks.

    The parameters are all the module's own, under their whole names. Each such name has a dot, as no attribute of a
    module has: whatever a file calls its nodes, they meet neither one another nor what torch or we keep in a module.
    """

    def __init__(self, graph: Graph, *, seed: int = 0) -> None:
        super().__init__()
        self.graph = graph
        self.momentum = 0.1  # weight of a new batch in the moving statistics
        self.processes = Processes()  # those that share a batch in training
        # as plain data, which torch.compile follows: what is computed in float32, and what each gate scales
        self._deciding = graph.deciding
        self._gate_of = {node.name: gate for node in graph.nodes if (gate := graph.select_of(node)) is not None}
        self._done = _last_reads(graph)
        self._handlers = {node.name: handles[node] for node in graph.nodes if not isinstance(node, Input)}
        self._local: dict[str, tuple[str, ...]] = {}  # node -> its parameters' names without its own
        generator = torch.Generator().manual_seed(seed)
        for node in graph.nodes:
            shapes = node.parameters(*graph.input_shapes(node))
            self._local[node.name] = tuple(shapes)
            for name, shape in shapes.items():
                value = _fresh(graph, node, name, shape, generator)
                if name in BUFFERS:
                    self._buffers[f"{node.name}.{name}"] = value
                else:  # not register_parameter: it refuses dots
                    self._parameters[f"{node.name}.{name}"] = nn.Parameter(value, requires_grad=node.trainable)

    def _collect(self) -> dict[str, Tensor]:
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """A copy of every parameter as float32 arrays under the graph's names."""
        return {name: value.detach().cpu().float().numpy().copy() for name, value in self._collect().items()}

    def load(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over all parameters; names and shapes must be exactly the graph's, else CheckpointError."""
        self.load_state_dict({name: torch.from_numpy(np.array(w, np.float32)) for name, w in weights.items()})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over all parameters and statistics; raises CheckpointError unless names and shapes are the graph's."""
        own = self._collect()
        wrong = sorted(own.keys() ^ state_dict.keys())
        wrong += [name for name, value in own.items() if name in state_dict and state_dict[name].shape != value.shape]
        if wrong:
            raise CheckpointError(f"weights do not fit the graph; missing, unknown or of another shape: {some(wrong)}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)  # strict takes dots for submodules

    @torch.no_grad()
    def run(self, images: NDArray[np.float32]) -> Result:
        """Normalised images (B, C, H, W) in evaluation mode, in float32; the network is left in that mode."""
        device = next(self.parameters()).device
        output = self.eval()(torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last))
        gates = [output.records[name].gate for name in self.graph.gate_channels]
        values = torch.cat(gates, 1) if gates else output.logits.new_zeros(len(images), 0)
        return Result(self.graph, output.logits.cpu().numpy(), values.cpu().numpy())

    def forward(self, images: Tensor) -> Output:
        """Run a batch (B, C, H, W) of normalised images."""
        values, records = self._run(images, self._done)
        return Output(values[self.graph.output], records)

    def node_values(self, images: Tensor) -> dict[str, Tensor]:
        """Value of every node by name, batch axis first, for normalised images (B, C, H, W)."""
        return self._run(images, {})[0]

    def _run(self, images: Tensor, done: Mapping[str, list[str]]) -> tuple[dict[str, Tensor], dict[str, GateRecord]]:
        """Values and records; after each node what is ``done`` with it is forgotten."""
        own = self._collect()
        values = {self.graph.input.name: images}
        pooled: dict[str, Tensor] = {}  # mean over H and W in float32, for gates and the similarity loss
        records: dict[str, GateRecord] = {}
        for node in self.graph.nodes:
            if isinstance(node, Input):
                continue
            if isinstance(node, GlobalPool) and node.kind == "average":  # the mean may be known already
                values[node.name] = self._mean_of(node.inputs[0], values, pooled)
            elif node.name in self._deciding:
                with torch.autocast(images.device.type, enabled=False):
                    values[node.name] = self._step(node, own, values)
            else:
                values[node.name] = self._step(node, own, values)
            gate = self._gate_of.get(node.name)
            if gate is not None:
                score = values[self.graph.by_name[gate].inputs[0]]
                feature = self._mean_of(node.inputs[0], values, pooled)
                records[gate] = GateRecord(score, values[gate], feature)
            for name in done.get(node.name, ()):
                del values[name]
        return values, records

    def _step(self, node: Node, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        parameters = {p: own[f"{node.name}.{p}"] for p in self._local[node.name]}
        return self._handlers[node.name](self, node, parameters, *(values[source] for source in node.inputs))

    def _mean_of(self, name: str, values: Mapping[str, Tensor], pooled: dict[str, Tensor]) -> Tensor:
        """Mean over H and W of a value, from ``pooled`` if it is there.

        Pooling is linear: the mean of a gated map is the gate times the mean of the map.
        """
        gated: list[Node] = []
        while name not in pooled:
            node = self.graph.by_name[name]
            if name not in self._gate_of:
                pooled[name] = _mean(values[name])
                break
            gated.append(node)
            name = node.inputs[0]
        for node in reversed(gated):
            pooled[node.name] = pooled[node.inputs[0]] * values[node.inputs[1]]
            name = node.name
        return pooled[name]


handles: Handlers[Callable[..., Tensor]] = Handlers("torch")
"""Handlers take the network, the node, its parameters and the values that it reads, and return its value."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "mish": F.mish,
}


@handles(Conv)
def _conv(net: Network, node: Conv, p: P, x: Tensor) -> Tensor:
    (down, across), plain = pair(node.stride), pair(node.kernel) == (1, 1) and not any(sides(node.padding))
    if plain and down * across > 1 and x.shape[1] % 8:
        # The same pixels, chosen here: with AVX2, oneDNN 3's gradient of such a convolution of float32 maps
        # writes beyond its memory unless channels come in eights.
        x, down, across = x[:, :, ::down, ::across], 1, 1
    x, padding = padded(x, sides(node.padding), 0.0)
    settings = (down, across), padding, node.spread, node.groups
    depthwise = node.groups == x.shape[1] > 1
    if net.training and depthwise and down * across > 1 and x.is_cpu and torch.is_autocast_enabled("cpu"):
        # oneDNN's gradient of a strided depthwise convolution takes up to ten times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), p["weight"], p.get("bias"), *settings).to(torch.get_autocast_dtype("cpu"))
    return F.conv2d(x, p["weight"], p.get("bias"), *settings)


@handles(BatchNorm)
def _batch_norm(net: Network, node: BatchNorm, p: P, x: Tensor) -> Tensor:
    mean, variance = p["moving_mean"], p["moving_variance"]
    of_batch = net.training and not node.use_global_stats
    if of_batch and net.processes.size > 1:
        return batch_norm(x, p["gamma"], p["beta"], (mean, variance), net.momentum, node.eps, net.processes)
    return F.batch_norm(x, mean, variance, p["gamma"], p["beta"], of_batch, net.momentum, node.eps)


@handles(LayerNorm)
def _layer_norm(net: Network, node: LayerNorm, p: P, x: Tensor) -> Tensor:
    last = x.movedim(1, -1)
    return F.layer_norm(last, last.shape[-1:], p["gamma"], p["beta"], node.eps).movedim(-1, 1)


@handles(Activation)
def _activation(net: Network, node: Activation, p: P, x: Tensor) -> Tensor:
    return handles.variant(node, ACTIVATIONS, node.kind)(x)


@handles(LeakyReLU)
def _leaky_relu(net: Network, node: LeakyReLU, p: P, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.slope)


@handles(PReLU)
def _prelu(net: Network, node: PReLU, p: P, x: Tensor) -> Tensor:
    return F.prelu(x, p["slope"].to(x.dtype))


@handles(ELU)
def _elu(net: Network, node: ELU, p: P, x: Tensor) -> Tensor:
    return F.elu(x, node.alpha)


@handles(Squareplus)
def _squareplus(net: Network, node: Squareplus, p: P, x: Tensor) -> Tensor:
    return 0.5 * (x + (x * x + node.b).sqrt())


@handles(Clip)
def _clip(net: Network, node: Clip, p: P, x: Tensor) -> Tensor:
    return x.clamp(node.low, node.high)


@handles(Select)
def _select(net: Network, node: Select, p: P, x: Tensor) -> Tensor:
    kept = x > (p["threshold"] if node.rule == "threshold" else 0)
    if node.rule == "constant":
        kept = (p["mask"] > 0) & (kept | (node.gain == "one"))
    return torch.where(kept, x if node.gain == "score" else torch.ones_like(x), torch.zeros_like(x))


@handles(Add)
def _add(net: Network, node: Add, p: P, x: Tensor, *others: Tensor) -> Tensor:
    return sum(others, x)


@handles(Multiply)
def _multiply(net: Network, node: Multiply, p: P, x: Tensor, factor: Tensor) -> Tensor:
    factor = factor.to(x.dtype)
    return x * (factor if factor.dim() == x.dim() else factor[:, :, None, None])


@handles(Concat)
def _concat(net: Network, node: Concat, p: P, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, 1)


@handles(Slice)
def _slice(net: Network, node: Slice, p: P, x: Tensor) -> Tensor:
    return x[:, node.start : node.stop]


@handles(Shuffle)
def _shuffle(net: Network, node: Shuffle, p: P, x: Tensor) -> Tensor:
    return x.reshape(len(x), node.groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@handles(Scatter)
def _scatter(net: Network, node: Scatter, p: P, x: Tensor) -> Tensor:
    zeros = x.new_zeros(len(x), node.channels, *x.shape[2:])
    return zeros.index_copy(1, torch.tensor(node.at, device=x.device), x)


@handles(Pool)
def _pool(net: Network, node: Pool, p: P, x: Tensor) -> Tensor:
    pool, outside = (F.max_pool2d, -math.inf) if node.kind == "max" else (F.avg_pool2d, 0.0)
    high, wide = pair(node.kernel)

    def pooled(x: Tensor) -> Tensor:
        x, padding = padded(x, sides(node.padding), outside, (high // 2, wide // 2))
        return pool(x, (high, wide), pair(node.stride), padding)

    return pooled(x) if node.count_include_pad else pooled(x) / pooled(x.new_ones(1, 1, *x.shape[2:]))


@handles(GlobalPool)
def _global_pool(net: Network, node: GlobalPool, p: P, x: Tensor) -> Tensor:
    return _mean(x) if node.kind == "average" else x.amax((2, 3))


@handles(Flatten)
def _flatten(net: Network, node: Flatten, p: P, x: Tensor) -> Tensor:
    return x.flatten(1)


@handles(Linear)
def _linear(net: Network, node: Linear, p: P, x: Tensor) -> Tensor:
    return F.linear(x, p["weight"], p.get("bias"))


def padded(
    x: Tensor, around: tuple[int, int, int, int], value: float, most: tuple[float, float] = (math.inf, math.inf)
) -> tuple[Tensor, tuple[int, int]]:
    """The map and the padding that is left to the operator: that of unequal sides, or too much, is put around it first.

    around: (top, left, bottom, right). most: (vertical, horizontal), what the operator takes.
    """
    top, left, bottom, right = around
    if (top, left) == (bottom, right) and top <= most[0] and left <= most[1]:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


class _SpatialMean(torch.autograd.Function):
    """Mean over H and W, in float32 at least, whose gradient keeps the map's memory layout.

    The gradient of ``x.mean`` is laid out plainly; one such gradient turns all of the backward pass of a
    channels-last network into the slow layout (four times the time of a step on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.format = (
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return x.mean((2, 3), dtype=_wide(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        each = (gradient / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        spread: Tensor = each[:, :, None, None].expand(ctx.shape).contiguous(memory_format=ctx.format)
        return spread


def _wide(x: Tensor) -> torch.dtype:
    """The type to sum in: float32 for it and what is narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mean(x: Tensor) -> Tensor:
    """Mean over H and W, in float32 or float64: (B, C, H, W) -> (B, C); a vector (B, C) is its own."""
    if x.dim() == 2:
        return x.to(_wide(x))
    mean: Tensor = _SpatialMean.apply(x)  # type: ignore[no-untyped-call]
    return mean


def _last_reads(graph: Graph) -> dict[str, list[str]]:
    """Node -> the maps that no later node reads. Vectors are small, and later means are made of them."""
    last = {source: node.name for node in graph.nodes for source in node.inputs}
    found: dict[str, list[str]] = {}
    for value, reader in last.items():
        if value != graph.output and len(graph.shapes[value]) == 3:
            found.setdefault(reader, []).append(value)
    return found


def _fresh(graph: Graph, node: Node, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name in ("gamma", "moving_variance", "mask"):
        return torch.ones(shape)
    if name == "slope":
        return torch.full(shape, 0.25)
    if isinstance(node, Conv) and name == "weight":
        area = math.prod(pair(node.kernel))
        return torch.randn(shape, generator=generator) * math.sqrt(2 / (area * node.channels))
    if isinstance(node, Linear) and node.name in graph.heads:
        if node.name in graph.scorers:  # the identity: every score is 1
            return torch.full(shape, 1.0 if name == "bias" else 0.0)
        return torch.randn(shape, generator=generator) * math.sqrt(2 / shape[-1])
    if isinstance(node, Linear):
        bound = 1 / math.sqrt(shape[-1]) if name == "weight" else 0.0
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return torch.zeros(shape)
