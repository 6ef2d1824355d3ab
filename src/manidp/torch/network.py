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
    Concat,
    Conv,
    Flatten,
    Gate,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Node,
    Pool,
)

BUFFERS = ("moving_mean", "moving_variance", "threshold")  # parameters that no gradient moves

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
        generator = torch.Generator().manual_seed(seed)
        for node in graph.nodes:
            for name, shape in node.parameters(*graph.input_shapes(node)).items():
                value = _fresh(node, name, shape, generator)
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
        saliencies: dict[str, Tensor] = {}
        graph = self.graph
        for node in graph.nodes:
            if isinstance(node, Input):
                values[node.name] = images
            elif isinstance(node, Gate):
                fc1, fc2 = own[f"{node.name}.fc1.weight"], own[f"{node.name}.fc2.weight"]
                with torch.autocast(images.device.type, enabled=False):
                    hidden = F.relu(F.linear(self._mean_of(node.inputs[0], values, pooled), fc1))
                    score = F.linear(hidden, fc2, own[f"{node.name}.fc2.bias"])
                    saliency = F.relu(score).clamp(max=node.saliency_max)
                saliencies[node.name] = saliency
                kept = saliency > own[f"{node.name}.threshold"]
                values[node.name] = torch.where(kept, saliency, torch.zeros_like(saliency))
            else:
                values[node.name] = self._step(node, own, [values[source] for source in node.inputs])
                if isinstance(node, Multiply) and node.inputs[1] in saliencies:
                    gate = node.inputs[1]
                    records[gate] = GateRecord(
                        saliencies[gate], values[gate], self._mean_of(node.inputs[0], values, pooled)
                    )
        return Output(values[graph.output], records)

    def _mean_of(self, name: str, values: Mapping[str, Tensor], pooled: dict[str, Tensor]) -> Tensor:
        """Mean over H and W of a value, from ``pooled`` if it is there.

        Pooling is linear: the mean of a gated map is the gate times the mean of the map.
        """
        gated: list[Node] = []
        while name not in pooled:
            node = self.graph.by_name[name]
            if not (isinstance(node, Multiply) and isinstance(self.graph.by_name[node.inputs[1]], Gate)):
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
                stride = node.stride
                if node.kernel == 1 and stride > 1 and x.shape[1] % 8 and not node.padding:
                    # The same pixels, chosen here: with AVX2, oneDNN 3's gradient of such a convolution of float32 maps
                    # writes beyond its memory unless channels come in eights.
                    x, stride = x[:, :, ::stride, ::stride], 1
                return F.conv2d(x, weight, bias, stride, node.padding, groups=node.groups)
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
            case Pool(kind="max"):
                return F.max_pool2d(x, node.kernel, node.stride, node.padding)
            case Pool():
                return F.avg_pool2d(x, node.kernel, node.stride, node.padding)
            case GlobalPool(kind="max"):
                return x.amax((2, 3))
            case GlobalPool():
                return _mean(x)
            case Flatten():
                return x.flatten(1)
            case Linear():
                return F.linear(x, own[f"{node.name}.weight"], own.get(f"{node.name}.bias"))
        raise NotImplementedError(type(node).__name__)


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


def _fresh(node: Node, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name in ("gamma", "moving_variance"):
        return torch.ones(shape)
    if isinstance(node, Conv) and name == "weight":
        return torch.randn(shape, generator=generator) * math.sqrt(2 / (node.kernel**2 * node.channels))
    if isinstance(node, Linear):
        bound = 1 / math.sqrt(shape[-1]) if name == "weight" else 0.0
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound
    if name == "fc1.weight":
        return torch.randn(shape, generator=generator) * math.sqrt(2 / shape[1])
    if name == "fc2.bias":
        return torch.ones(shape)
    return torch.zeros(shape)
