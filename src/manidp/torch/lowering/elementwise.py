"""Activations, sums and products of values, and of values with constants."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, get_args

import torch

from manidp.graph import (
    ELU,
    FACTOR,
    Activation,
    ActivationKind,
    Add,
    BatchNorm,
    Clip,
    Conv,
    LeakyReLU,
    Linear,
    Multiply,
    Node,
    Pool,
    PReLU,
)
from manidp.limits import FLOAT32_MAX
from manidp.torch.layout import CHANNELS, Value
from manidp.torch.lowering.nodes import Constant, RefusedError, constant, number
from manidp.torch.lowering.shapes import Shapes

MOST_POWER = 8
_KINDS: tuple[str, ...] = get_args(ActivationKind)


class Elementwise(Shapes):
    """Handlers of what changes each number by itself."""

    def activation(self, kind: str, x: Any) -> Any:
        if kind not in _KINDS:
            raise RefusedError("an activation that is not known")
        x = self.plain(x)
        return replace(x, node=self.emit(Activation, (x.node,), kind, kind=kind))

    def gelu(self, x: Any, approximate: str = "none") -> Any:
        """The one that tanh approximates, x (1 + tanh(u)) / 2, as x sigmoid(2 u)."""
        if approximate == "none":
            return self.activation("gelu", x)
        factor = math.sqrt(8 / math.pi)
        inner = self._affine(self.power(x, 2), 0.044715 * factor, factor)
        return self.multiply(x, self.activation("sigmoid", self.multiply(x, inner)))

    def softplus(self, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        if (beta, threshold) != (1, 20):
            raise RefusedError("a softplus with settings of its own")
        return self.activation("softplus", x)

    def leaky_relu(self, x: Any, slope: float = 0.01) -> Any:
        x = self.plain(x)
        return replace(x, node=self.emit(LeakyReLU, (x.node,), "leaky_relu", slope=float(slope)))

    def elu(self, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
        x = self.plain(x if input_scale == 1 else self.multiply(x, input_scale))
        made = replace(x, node=self.emit(ELU, (x.node,), "elu", alpha=float(alpha)))
        return made if scale == 1 else self.multiply(made, scale)

    def celu(self, x: Any, alpha: float = 1.0) -> Any:
        return self.elu(x, 1.0, alpha, 1 / alpha)

    def prelu(self, x: Any, slope: Any) -> Any:
        self._constant(slope)
        x = self.plain(x)
        if slope.tensor.numel() == 1:  # one for all channels
            count = self.shapes[x.node][0]
            slope = replace(
                slope, tensor=slope.tensor.reshape(-1).expand(count), name=slope.name if count == 1 else None
            )
        else:
            whole = slope.tensor.reshape((-1,) + (1,) * (len(x.dims) - 2))
            slope = self._per_channel(x, replace(slope, tensor=whole))
        made = self.emit(PReLU, (x.node,), "prelu")
        self.give(made, slope=slope)
        return replace(x, node=made)

    def clamp(self, x: Any, low: float | None = None, high: float | None = None) -> Any:
        low = -FLOAT32_MAX if low is None else low
        high = FLOAT32_MAX if high is None else high
        if (low, high) in ((0, 6), (0, FLOAT32_MAX)):
            return self.activation("relu6" if high == 6 else "relu", x)
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high):
            raise RefusedError("a clip whose bounds are no rising numbers")
        x = self.plain(x)
        return replace(x, node=self.emit(Clip, (x.node,), "clip", low=float(low), high=float(high)))

    def hardtanh(self, x: Any, low: float = -1.0, high: float = 1.0) -> Any:
        return self.clamp(x, low, high)

    def add(self, x: Any, y: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            y = self.multiply(y, alpha) if isinstance(y, Value) else number(y, lambda t: t * alpha)
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

    def absolute(self, x: Any) -> Any:
        return self.add(self.activation("relu", x), self.activation("relu", self.negative(x)))

    def maximum(self, x: Any, y: Any) -> Any:
        """relu(x - y) + y."""
        return self.add(self.activation("relu", self.subtract(x, y)), y)

    def minimum(self, x: Any, y: Any) -> Any:
        """x - relu(x - y)."""
        return self.subtract(x, self.activation("relu", self.subtract(x, y)))

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
                    raise RefusedError("a multiplication by a tensor of other channels")
                return self.value(self.emit(Multiply, (node, factor), "mul"))
            return self._together(Multiply, x, y)
        x, y = (x, y) if isinstance(x, Value) else (y, x)
        return self._affine(x, y, None)

    def divide(self, x: Any, y: Any) -> Any:
        if isinstance(y, Value):
            raise RefusedError("a division by what depends on the image")
        return self._affine(x, number(y, lambda t: 1 / t), None)

    def power(self, x: Any, exponent: Any) -> Any:
        if exponent not in range(1, MOST_POWER + 1):
            raise RefusedError(f"a power of {exponent}; whole ones up to {MOST_POWER} are products")
        x = self.plain(x)
        return functools.reduce(lambda y, _: self._together(Multiply, y, x), range(1, int(exponent)), x)

    def _together(self, kind: type[Node], x: Any, y: Any) -> Any:
        x, y = self.plain(x), self.plain(y)
        if x.is_feature_map() and y.is_feature_map() and x.shape[2:] == y.shape[2:]:
            most = max(x.shape[1], y.shape[1])
            x, y = (self._spread(part, most) if part.shape[1] == 1 < most else part for part in (x, y))
        if x.shape != y.shape:
            raise RefusedError(f"tensors of different shapes, {x.shape} and {y.shape}: one is repeated along an axis")
        word = "add" if kind is Add else "mul"
        if (x.axes, x.dims) == (y.axes, y.dims):
            return replace(x, node=self.emit(kind, (x.node, y.node), word))
        read = self.vector if x.is_vector() and y.is_vector() and not (x.is_map and y.is_map) else self.map
        made = self.value(self.emit(kind, (read(x), read(y)), word))
        return replace(made, dims=(*made.dims, *[()] * (len(x.dims) - len(made.dims))))

    def _spread(self, x: Value, channels: int) -> Value:
        """A map of one channel as so many, all the same."""
        node = self.map(x)
        made = self._again(node, f".spread{channels}", Conv, (node,), channels=channels, kernel=1, padding=0)
        self.give(made, weight=Constant(torch.ones(channels, dtype=torch.float64)))
        return self.value(made)

    def _affine(self, x: Any, scale: Any, shift: Any) -> Any:
        """x * scale + shift, numbers or constants of one number a channel.

        Of a map a convolution of each channel by itself; straight behind a linear layer that layer itself, so that a
        network's last one can be given other classes; of another vector a batch norm (``FACTOR``).
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
            parts = [part for part in (weight, bias, factor, term) if part is not None]
            learned = any(part.learned for part in parts)
            self.give(made, weight=Constant(weight.tensor.flatten(1) * factor.tensor[:, None], learned=learned),
                      bias=Constant(moved, learned=learned))  # fmt: skip
            return replace(x, node=made)
        if not x.is_map:
            zeros = torch.zeros_like(factor.tensor)
            made = self.emit(BatchNorm, (x.node,), "scaled", **FACTOR)
            self.give(made, moving_mean=Constant(zeros), moving_variance=Constant(zeros + 1 - FACTOR["eps"]),
                      gamma=factor, beta=term or Constant(zeros))  # fmt: skip
            return replace(x, node=made)
        count = self.shapes[x.node][0]
        made = self.emit(Conv, (x.node,), "scaled", channels=count, groups=count, kernel=1, padding=0,
                         bias=term is not None)  # fmt: skip
        self.give(made, weight=factor, bias=term)
        return replace(x, node=made)

    def _per_channel(self, x: Value, part: Any) -> Constant:
        """One number a channel of the value's node, from a number or a tensor that fits the tensor x."""
        part = constant(part)
        given = part.tensor
        if given.dim() > len(x.dims):
            raise RefusedError("a constant with more axes than what it meets")
        given = given.reshape((1,) * (len(x.dims) - given.dim()) + tuple(given.shape))
        varies = [dim for dim, size in enumerate(given.shape) if size > 1]
        if any(axis != CHANNELS for dim in varies for axis, _ in x.dims[dim]):
            raise RefusedError("a constant that is not one number, or one a channel")
        inside = [[factor for factor in dim if factor[0] == CHANNELS] for dim in x.dims]
        sizes = [math.prod(x.size(factor) for factor in dim) for dim in inside]
        spread = given.expand(sizes).reshape([x.size(factor) for dim in inside for factor in dim])
        order = [factor for dim in inside for factor in dim]
        flat = spread.permute([order.index(factor) for factor in sorted(order)]).reshape(-1)
        whole = given.numel() == flat.numel() and order == sorted(order)
        return Constant(flat, part.name if whole else None, part.learned)

    def _is_pooled(self, x: Value) -> bool:
        node = self.nodes.get(x.node)
        return not x.is_map or (isinstance(node, Pool) and self._whole(node))
