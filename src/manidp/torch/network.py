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
    Linear,
    Multiply,
    Node,
    Pool,
    Scatter,
    Select,
    Shuffle,
    Slice,
    pair,
    sides,
)

BUFFERS = ("moving_mean", "moving_variance", "threshold", "mask")  # parameters that no gradient moves

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


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

    The parameters are all the module's own, under their whole names. Each such name has a dot, as no attribute of a
    module has: whatever a file calls its nodes, they meet neither one another nor what torch or we keep in a module.
    """

    def __init__(self, graph: Graph, *, seed: int = 0) -> None:
        super().__init__()
        self.graph = graph
        self.momentum = 0.1  # weight of a new batch in the moving statistics
        # as plain data, which torch.compile follows: what is computed in float32, and what each gate scales
        self._deciding = graph.heads | {gate.name for gate in graph.gates}
        self._gate_of = {node.name: gate for node in graph.nodes if (gate := graph.select_of(node)) is not None}
        generator = torch.Generator().manual_seed(seed)
        for node in graph.nodes:
            for name, shape in node.parameters(*graph.input_shapes(node)).items():
                value = _fresh(graph, node, name, shape, generator)
                if name in BUFFERS:
                    self._buffers[f"{node.name}.{name}"] = value
                else:  # not register_parameter: it refuses dots
                    self._parameters[f"{node.name}.{name}"] = nn.Parameter(value)

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

    def forward(self, images: Tensor) -> Output:
        """Run a batch (B, C, H, W) of normalised images."""
        own = self._collect()
        values: dict[str, Tensor] = {}
        pooled: dict[str, Tensor] = {}  # mean over H and W in float32, for gates and the similarity loss
        records: dict[str, GateRecord] = {}
        graph = self.graph
        for node in graph.nodes:
            if isinstance(node, Input):
                values[node.name] = images
            elif isinstance(node, GlobalPool) and node.kind == "average":
                values[node.name] = self._mean_of(node.inputs[0], values, pooled)
            else:
                inputs = [values[source] for source in node.inputs]
                if node.name in self._deciding:
                    with torch.autocast(images.device.type, enabled=False):
                        values[node.name] = self._step(node, own, inputs)
                else:
                    values[node.name] = self._step(node, own, inputs)
                gate = self._gate_of.get(node.name)
                if gate is not None:
                    score = values[graph.by_name[gate].inputs[0]]
                    feature = self._mean_of(node.inputs[0], values, pooled)
                    records[gate] = GateRecord(score, values[gate], feature)
        return Output(values[graph.output], records)

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

    def _step(self, node: Node, own: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
        x = inputs[0]
        match node:
            case Conv():
                weight, bias = own[f"{node.name}.weight"], own.get(f"{node.name}.bias")
                (down, across), plain = pair(node.stride), pair(node.kernel) == (1, 1) and not any(sides(node.padding))
                if plain and down * across > 1 and x.shape[1] % 8:
                    # The same pixels, chosen here: with AVX2, oneDNN 3's gradient of such a convolution of float32 maps
                    # writes beyond its memory unless channels come in eights.
                    x, down, across = x[:, :, ::down, ::across], 1, 1
                x, padding = _padded(x, node, 0.0)
                return F.conv2d(x, weight, bias, (down, across), padding, node.spread, node.groups)
            case BatchNorm():
                mean, variance, gamma, beta = (
                    own[f"{node.name}.{name}"] for name in ("moving_mean", "moving_variance", "gamma", "beta")
                )
                return F.batch_norm(x, mean, variance, gamma, beta, self.training, self.momentum, node.eps)
            case Activation():
                return ACTIVATIONS[node.kind](x)
            case Add():
                return sum(inputs[1:], x)
            case Multiply():
                factor = inputs[1].to(x.dtype)
                return x * (factor if factor.dim() == x.dim() else factor[:, :, None, None])
            case Concat():
                return torch.cat(inputs, 1)
            case Slice():
                return x[:, node.start : node.stop]
            case Shuffle():
                return x.reshape(len(x), node.groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
            case Pool(kind="max"):
                x, padding = _padded(x, node, -math.inf)
                return F.max_pool2d(x, pair(node.kernel), pair(node.stride), padding)
            case Pool():
                x, padding = _padded(x, node, 0.0)
                return F.avg_pool2d(x, pair(node.kernel), pair(node.stride), padding)
            case GlobalPool():
                return x.amax((2, 3))
            case Clip():
                return x.clamp(node.low, node.high)
            case Select():
                kept = x > (own[f"{node.name}.threshold"] if node.rule == "threshold" else 0)
                if node.rule == "constant":
                    kept = (own[f"{node.name}.mask"] > 0) & (kept | (node.gain == "one"))
                return torch.where(kept, x if node.gain == "score" else torch.ones_like(x), torch.zeros_like(x))
            case Scatter():
                return x.new_zeros(len(x), node.channels, *x.shape[2:]).index_copy(
                    1, torch.tensor(node.at, device=x.device), x
                )
            case Flatten():
                return x.flatten(1)
            case Linear():
                return F.linear(x, own[f"{node.name}.weight"], own.get(f"{node.name}.bias"))
        raise NotImplementedError(type(node).__name__)


def _padded(x: Tensor, node: Conv | Pool, value: float) -> tuple[Tensor, tuple[int, int]]:
    """The map and the padding that is left to the operator: padding of unequal sides is put around it first."""
    top, left, bottom, right = sides(node.padding)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


class _SpatialMean(torch.autograd.Function):
    """Mean over H and W in float32 whose gradient keeps the map's memory layout.

    The gradient of ``x.mean`` is laid out plainly; one such gradient turns all of the backward pass of a
    channels-last network into the slow layout (four times the time of a step on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.format = (
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return x.mean((2, 3), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        each = (gradient / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        spread: Tensor = each[:, :, None, None].expand(ctx.shape).contiguous(memory_format=ctx.format)
        return spread


def _mean(x: Tensor) -> Tensor:
    """Mean over H and W, in float32: (B, C, H, W) -> (B, C); a vector (B, C) is its own."""
    if x.dim() == 2:
        return x.float()
    mean: Tensor = _SpatialMean.apply(x)  # type: ignore[no-untyped-call]
    return mean


def _fresh(graph: Graph, node: Node, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name in ("gamma", "moving_variance", "mask"):
        return torch.ones(shape)
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
