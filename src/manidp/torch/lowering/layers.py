"""Convolutions, linear layers, norms, attention between two branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from manidp.graph import BatchNorm, Conv, LayerNorm, Linear
from manidp.torch.layout import BATCH, CHANNELS, Value
from manidp.torch.lowering.nodes import MOST_ROWS, Constant, RefusedError, number, two
from manidp.torch.lowering.pooling import Pooling


class Layers(Pooling):
    """Handlers of what has weights, and of what is refused because no graph can hold it."""

    def conv(self, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
             groups: int = 1) -> Any:  # fmt: skip
        self._constant(weight, bias)
        if weight.tensor.dim() == 3:
            return self._over_channels(x, weight, bias, stride, padding, dilation)
        if weight.tensor.dim() != 4:
            raise RefusedError("a convolution that is not two-dimensional")
        if not isinstance(x, Value):
            self.plain(x)
        out, _, *kernel = weight.tensor.shape
        stride, dilation = (two(value) for value in (stride, dilation))
        if padding == "same":
            spans = [span * (size - 1) for span, size in zip(dilation, kernel, strict=True)]
            top, left = (span // 2 for span in spans)
            sides = (top, left, spans[0] - top, spans[1] - left)
        else:
            high, wide = (0, 0) if padding == "valid" else two(padding)
            sides = (high, wide, high, wide)
        if any(x.pad):
            if x.pad_value:
                raise RefusedError("a convolution of infinities")
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

    def _over_channels(self, x: Any, weight: Constant, bias: Any, stride: Any, padding: Any, dilation: Any) -> Value:
        """A convolution (1, 1, kernel) over a vector's channels: a matrix with the kernel in each row, a constant."""
        x, (*ways, kernel) = self.plain(x), weight.tensor.shape
        over = x.dims[:1] + x.dims[2:] == (x.axis(BATCH), x.axis(CHANNELS)) and not x.dims[1]
        if not over or ways != [1, 1] or two(stride) != (1, 1):
            raise RefusedError("a one-dimensional convolution that is not one, with stride 1, over a vector's channels")
        (before, _), (step, _) = two(padding), two(dilation)
        count = x.shape[2]
        if count > MOST_ROWS:
            raise RefusedError(f"a convolution over {count} channels of a vector; at most {MOST_ROWS}")
        band = torch.zeros(count + 2 * before - step * (kernel - 1), count + 2 * before, dtype=torch.float64)
        for at, row in enumerate(band):
            row[at : at + step * (kernel - 1) + 1 : step] = weight.tensor.flatten()
        band = band[:, before : before + count]
        source = self.vector(replace(x, dims=(x.dims[0], x.dims[2])))
        made = self.emit(Linear, (source,), "conv", features=len(band), bias=bias is not None)
        bias = None if bias is None else Constant(bias.tensor.expand(len(band)), learned=bias.learned)
        self.give(made, weight=Constant(band, learned=weight.learned), bias=bias)
        new = self.value(made)
        return replace(new, dims=(new.dims[0], (), new.dims[1]))

    def convolution(self, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
                    output_padding: Any, groups: int) -> Any:  # fmt: skip
        if transposed:
            raise RefusedError(
                "transposed convolution: channels are skipped where convolutions read, not where they spread"
            )
        return self.conv(x, weight, bias, stride, padding, dilation, groups)

    def transposed(self, *_: Any, **__: Any) -> Value:
        raise RefusedError(
            "transposed convolution: channels are skipped where convolutions read, not where they spread"
        )

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        self._constant(weight, bias)
        x = self.plain(x)
        out, into = weight.tensor.shape
        if len(x.dims) == 2:
            made = self.emit(Linear, (self.vector(x),), "linear", weight, features=out, bias=bias is not None)
            self.give(made, weight=weight, bias=bias)
            return self.value(made)
        if not (x.is_map and x.dims[-1] == x.axis(CHANNELS) and self.shapes[x.node][0] == into):
            raise RefusedError("a linear layer along another axis than channels")
        made = self.emit(Conv, (x.node,), "linear", weight, channels=out, kernel=1, padding=0, bias=bias is not None)
        self.give(made, weight=weight, bias=bias)
        new = self.value(made)  # channels last, as before
        places = iter(new.axis(CHANNELS))
        axes = (x.axes[0], new.axes[1], *x.axes[2:])
        return replace(x, node=made, axes=axes, dims=(*x.dims[:-1], tuple(places)))

    def product(self, x: Any, weight: Any) -> Any:
        self._constant(weight)
        return self.linear(x, number(weight, lambda t: t.T))

    def sum_and_product(self, bias: Any, x: Any, weight: Any) -> Any:
        self._constant(weight)
        return self.linear(x, number(weight, lambda t: t.T), bias)

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
            raise RefusedError("a layer norm over other axes than channels")
        made = self.emit(LayerNorm, (x.node,), "norm", weight, eps=eps)
        count = self.shapes[made][0]
        gamma, beta = (None if part is None else self._per_channel(x, part) for part in (weight, bias))
        self.give(
            made, gamma=gamma or Constant(torch.ones(count, dtype=torch.float64)),
            beta=beta or Constant(torch.zeros(count, dtype=torch.float64)),
        )  # fmt: skip
        return replace(x, node=made)

    def own_statistics(self, *_: Any, **__: Any) -> Any:
        raise RefusedError("a normalisation by statistics of the image at hand")

    def softmax(self, x: Any, dim: int, *_: Any) -> Any:
        """Of two parts of a vector, sigmoids: attention between two branches (SKNet, Li et al. 2019)."""
        x = self.plain(x)
        shape = x.shape
        inside = {axis for factors in x.dims[1:] for axis, _ in factors}
        if dim % len(shape) != 1 or len(shape) < 3 or shape[1] != 2 or inside != {CHANNELS}:
            raise RefusedError(
                "a softmax that is neither the network's end nor of two parts of a vector, along dimension 1"
            )
        first, second = (part.reshape((shape[0], math.prod(shape[2:]))) for part in self.unbind(x, 1))
        less = self.subtract(first, second)
        parts = [self.activation("sigmoid", less), self.activation("sigmoid", self.negative(less))]
        return self.concat(parts, 1).reshape(shape)

    def log_softmax(self, *_: Any, **__: Any) -> Any:
        raise RefusedError("a logarithm of a softmax that is not the network's end")
