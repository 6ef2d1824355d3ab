"""Every op there is, and all that the rest of the library needs to know of it.

An op is a frozen dataclass: its fields are what a checkpoint's header says of it. It states the shape of its value, its
parameters, how channels go through it and what it costs. Shapes are without the batch axis: ``(C, H, W)`` for feature
maps, ``(C,)`` for vectors. A backend is a table from these classes to handlers; no backend restates what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from manidp.errors import GraphError, some
from manidp.limits import FLOAT32_MAX, FLOAT32_TINY

Shape = tuple[int, ...]
Pair = int | tuple[int, int]  # one number for both, or (vertical, horizontal)
Padding = (
    int | tuple[int, int] | tuple[int, int, int, int]
)  # all sides, (vertical, horizontal), (top, left, bottom, right)

ActivationKind = Literal[
    "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "tanh", "gelu", "softplus", "mish"
]  # fmt: skip
PoolKind = Literal["average", "max"]
SelectRule = Literal["threshold", "constant"]
SelectGain = Literal["score", "one"]
ChannelFlow = Literal["own", "moved", "summed", "mixed"]
"""How the channels of an op's value come from those of its inputs.

own: channel c depends on channel c of each input alone. moved: each channel is one of the inputs' channels, unchanged,
or zeros; ``Node.origin`` says which. summed: each is a sum over all channels of the input, weighted by the parameter
``weight`` (out, in, ...), plus ``bias`` (out,) if it has one. mixed: none of these.
"""


def pair(value: Pair) -> tuple[int, int]:
    """(vertical, horizontal)."""
    return value if isinstance(value, tuple) else (value, value)


def sides(padding: Padding) -> tuple[int, int, int, int]:
    """(top, left, bottom, right)."""
    if isinstance(padding, int):
        return (padding,) * 4
    return padding if len(padding) == 4 else (*padding, *padding)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of a network. ``inputs`` are names of other nodes; ``name`` is also the prefix of its parameters.

    trainable: whether gradients move its parameters; the moving statistics of a batch norm move all the same.
    """

    arity: ClassVar[tuple[int, int]] = (1, 1)
    flow: ClassVar[ChannelFlow] = "mixed"
    name: str
    inputs: tuple[str, ...] = ()
    trainable: bool = True

    def shape(self, *inputs: Shape) -> Shape:
        """Shape of the value this node makes from values of the given shapes; raises GraphError."""
        raise NotImplementedError

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        """Local name and shape of each parameter, given the shapes of the inputs."""
        return {}

    def channel_flow(self, *inputs: Shape) -> ChannelFlow:
        """How channels go through this node, given the shapes of the inputs."""
        return self.flow

    def origin(self, *inputs: Shape) -> NDArray[np.intp]:
        """(C,) of each channel the one that it is, counted through all inputs one after the other; -1: zeros.

        For nodes whose channels are moved.
        """
        raise NotImplementedError

    @property
    def keeps_zero(self) -> bool:
        """Whether a channel of zeros in every input becomes one of zeros; asked where channels stay their own."""
        return False

    @property
    def keeps_gain(self) -> bool:
        """Whether a factor >= 0 on each channel of its one input is one on its value; asked where channels stay own."""
        return False

    def narrowed(self, channels: int) -> Node:
        """The same with so many channels in its value; where channels stay their own, in its input, too."""
        return self

    def nonnegative(self, *inputs: bool) -> bool:
        """Whether what it makes is known to be never negative, given whether that is known of each input."""
        return False

    @property
    def reach(self) -> int:
        """The largest of its kernel, stride, padding and dilation, where it has such."""
        return 0

    def macs(self, *inputs: Shape) -> int:
        """Multiply-adds of one image with every channel kept, given the shapes of the inputs."""
        return 0

    def pair_macs(self, *inputs: Shape) -> tuple[int, int] | None:
        """(groups, multiply-adds for one channel that is read and one that is made, both in one group).

        None if everything is computed, whatever gates close. The channels read are those of the first input.
        """
        return None

    def __str__(self) -> str:
        return f"node '{self.name}' ({type(self).__name__})"

    def _expect(self, fits: bool, expected: str, *inputs: Shape) -> None:
        if not fits:
            came = some(f"{name} {shape}" for name, shape in zip(self.inputs, inputs, strict=False))
            raise GraphError(f"{self} expects {expected}; got {came}")


@dataclass(frozen=True, kw_only=True)
class Input(Node):
    """The image, ``dims`` = (C, H, W), already normalised."""

    arity: ClassVar[tuple[int, int]] = (0, 0)
    dims: tuple[int, int, int]

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(self.dims) == 3 and min(self.dims) > 0, "three positive dimensions (C, H, W)")
        return self.dims


@dataclass(frozen=True, kw_only=True)
class _Window(Node):
    """What walks over a map window by window. ``kernel``, ``stride``: one number or (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Padding

    def __post_init__(self) -> None:
        for field in ("kernel", "stride", "padding", "dilation"):  # one way to say it: a number where one is enough
            value = getattr(self, field, 1)
            if isinstance(value, tuple):
                if len(value) == 4 and value[:2] == value[2:]:
                    value = value[:2]
                if len(set(value)) == 1:
                    value = value[0]
                object.__setattr__(self, field, value)

    @property
    def reach(self) -> int:
        return max(*pair(self.kernel), *pair(self.stride), *sides(self.padding), *self.spread)

    @property
    def spread(self) -> tuple[int, int]:
        """Dilation, (vertical, horizontal)."""
        return pair(getattr(self, "dilation", 1))

    @property
    def square(self) -> bool:
        """Whether one number says each of kernel, stride and padding, and there is no dilation."""
        return all(isinstance(value, int) for value in (self.kernel, self.stride, self.padding)) and self.spread == (
            1,
            1,
        )

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """How many windows fit below one another and side by side."""
        top, left, bottom, right = sides(self.padding)
        (high, wide), (down, across), (rows, columns) = pair(self.kernel), pair(self.stride), self.spread
        return (
            (height + top + bottom - rows * (high - 1) - 1) // down + 1,
            (width + left + right - columns * (wide - 1) - 1) // across + 1,
        )


@dataclass(frozen=True, kw_only=True)
class Conv(_Window):
    """2-D convolution. Parameters: weight (out, in / groups, kernel, kernel), bias (out,) if ``bias``.

    ``kernel``, ``stride``, ``dilation``: one number or (vertical, horizontal); ``padding``: one number, (vertical,
    horizontal) or (top, left, bottom, right).
    """

    channels: int
    kernel: Pair = 3
    stride: Pair = 1
    padding: Padding = 1
    dilation: Pair = 1
    groups: int = 1
    bias: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        self._expect(len(x) == 3, "a feature map (C, H, W)", x)
        whole = self.groups > 0 and x[0] % self.groups == 0 and self.channels % self.groups == 0
        self._expect(whole, f"channels that {self.groups} groups divide ({self.channels} out)", x)
        positive = min(self.channels, *pair(self.kernel), *pair(self.stride), *self.spread) > 0
        self._expect(positive and min(sides(self.padding)) >= 0, "positive channels, kernel and stride", x)
        out = self.positions(*x[1:])
        self._expect(min(out) > 0, f"a map at least as large as its {'x'.join(map(str, pair(self.kernel)))} kernel", x)
        return (self.channels, *out)

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        weight = (self.channels, inputs[0][0] // self.groups, *pair(self.kernel))
        return {"weight": weight} | ({"bias": (self.channels,)} if self.bias else {})

    def channel_flow(self, *inputs: Shape) -> ChannelFlow:
        if self.groups == self.channels == inputs[0][0]:
            return "own"
        return "summed" if self.groups == 1 else "mixed"

    @property
    def keeps_zero(self) -> bool:
        return not self.bias

    def narrowed(self, channels: int) -> Conv:
        return replace(self, channels=channels, groups=1 if self.groups == 1 else channels)

    def macs(self, *inputs: Shape) -> int:
        return math.prod(self.shape(*inputs)) * inputs[0][0] // self.groups * math.prod(pair(self.kernel))

    def pair_macs(self, *inputs: Shape) -> tuple[int, int]:
        return self.groups, math.prod(pair(self.kernel)) * math.prod(self.positions(*inputs[0][1:]))


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Node):
    """gamma * (x - moving_mean) / sqrt(moving_variance + eps) + beta, per channel of a map or a vector.

    In training the mean and variance are the batch's, and move the moving ones; with ``use_global_stats`` they are the
    moving ones there too, and stay: a factor and a term for each channel.
    """

    flow: ClassVar[ChannelFlow] = "own"
    eps: float = 1e-5
    use_global_stats: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(FLOAT32_TINY <= self.eps <= FLOAT32_MAX, "an eps that is a positive float32", *inputs)
        return inputs[0]

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return dict.fromkeys(("moving_mean", "moving_variance", "gamma", "beta"), inputs[0][:1])


# settings of a batch norm that is gamma * x + beta, exactly: its moving mean is 0, its moving variance 1 - eps
FACTOR: Mapping[str, Any] = MappingProxyType({"eps": 0.5, "use_global_stats": True})


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Node):
    """gamma * (x - mean) / sqrt(variance + eps) + beta, at each position of a map or of a vector as a whole.

    Mean and variance (divided by C) are over the channels. Parameters: gamma, beta (C,). Source: Ba et al. 2016; at
    each position of a map, Liu et al. 2022.
    """

    eps: float = 1e-5

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(FLOAT32_TINY <= self.eps <= FLOAT32_MAX, "an eps that is a positive float32", *inputs)
        return inputs[0]

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return dict.fromkeys(("gamma", "beta"), inputs[0][:1])


@dataclass(frozen=True, kw_only=True)
class Elementwise(Node):
    """What changes each number by itself: no op, but what the activations have in common."""

    flow: ClassVar[ChannelFlow] = "own"

    def shape(self, *inputs: Shape) -> Shape:
        return inputs[0]


@dataclass(frozen=True, kw_only=True)
class Activation(Elementwise):
    """An elementwise function without settings."""

    kind: ActivationKind = "relu"

    @property
    def keeps_zero(self) -> bool:
        return self.kind not in ("sigmoid", "hardsigmoid", "softplus")

    def nonnegative(self, *inputs: bool) -> bool:
        return self.kind in ("relu", "relu6", "sigmoid", "hardsigmoid")

    @property
    def keeps_gain(self) -> bool:
        return self.kind == "relu"


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Elementwise):
    """x where x > 0, else slope * x."""

    slope: float = 0.01

    @property
    def keeps_zero(self) -> bool:
        return True

    @property
    def keeps_gain(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class PReLU(Elementwise):
    """x where x > 0, else slope * x. Parameter: slope (C,), one for each channel. Source: He et al. 2015."""

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return {"slope": inputs[0][:1]}

    @property
    def keeps_zero(self) -> bool:
        return True

    @property
    def keeps_gain(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class ELU(Elementwise):
    """x where x > 0, else alpha * (exp(x) - 1). Source: Clevert et al. 2016."""

    alpha: float = 1.0

    @property
    def keeps_zero(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Squareplus(Elementwise):
    """(x + sqrt(x^2 + b)) / 2: above 0 everywhere, about x where x is well above sqrt(b). Source: Barron 2021."""

    b: float = 4.0

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(2.0**-126 <= self.b <= FLOAT32_MAX, "b above 0, a normal float32", *inputs)
        return inputs[0]

    def nonnegative(self, *inputs: bool) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Clip(Elementwise):
    """min(max(x, low), high), elementwise."""

    low: float = 0.0
    high: float = 1000.0

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(-FLOAT32_MAX <= self.low < self.high <= FLOAT32_MAX, "low below high, both float32", *inputs)
        return inputs[0]

    @property
    def keeps_zero(self) -> bool:
        return self.low <= 0 <= self.high

    def nonnegative(self, *inputs: bool) -> bool:
        return self.low >= 0


@dataclass(frozen=True, kw_only=True)
class Select(Node):
    """Decides which channels are computed: one factor per image and channel, exactly 0 for a closed channel.

    A Multiply by it closes channels. ``rule`` "threshold": a channel is open where its score exceeds the parameter
    ``threshold`` (one scalar, >= 0). ``rule`` "constant": where the parameter ``mask`` (C,) is above 0, for every
    image. ``gain``: an open channel is scaled by its score, or by 1; with "score", a score of 0 or less closes in any
    case: open means a factor above 0. Source: Tang et al. 2021, eq. 2.
    """

    flow: ClassVar[ChannelFlow] = "own"
    rule: SelectRule = "threshold"
    gain: SelectGain = "score"

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 1, "a vector of scores (C,)", *inputs)
        return inputs[0]

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        return {"threshold": ()} if self.rule == "threshold" else {"mask": inputs[0]}

    def nonnegative(self, *inputs: bool) -> bool:
        return True  # a score that is kept exceeds a threshold of 0 or more


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """Sum of values of the same shape."""

    arity: ClassVar[tuple[int, int]] = (2, 64)
    flow: ClassVar[ChannelFlow] = "own"

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(set(inputs)) == 1, "inputs of one shape", *inputs)
        return inputs[0]

    @property
    def keeps_zero(self) -> bool:
        return True

    def nonnegative(self, *inputs: bool) -> bool:
        return all(inputs)


@dataclass(frozen=True, kw_only=True)
class Multiply(Node):
    """First input times the second, which is of the same shape or a vector (C,): one factor per channel."""

    arity: ClassVar[tuple[int, int]] = (2, 2)
    flow: ClassVar[ChannelFlow] = "own"

    def shape(self, *inputs: Shape) -> Shape:
        value, factor = inputs
        self._expect(factor in (value, value[:1]), "a second input of the same shape or a vector (C,)", *inputs)
        return value

    @property
    def keeps_zero(self) -> bool:
        return True

    def nonnegative(self, *inputs: bool) -> bool:
        return all(inputs)


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """Inputs one after the other along the channel axis."""

    arity: ClassVar[tuple[int, int]] = (2, 64)
    flow: ClassVar[ChannelFlow] = "moved"

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len({x[1:] for x in inputs}) == 1, "inputs of one height and width", *inputs)
        return (sum(x[0] for x in inputs), *inputs[0][1:])

    def origin(self, *inputs: Shape) -> NDArray[np.intp]:
        return np.arange(self.shape(*inputs)[0])

    def nonnegative(self, *inputs: bool) -> bool:
        return all(inputs)


@dataclass(frozen=True, kw_only=True)
class Slice(Node):
    """Channels ``start`` to ``stop`` - 1, of a map or a vector."""

    flow: ClassVar[ChannelFlow] = "moved"
    start: int = 0
    stop: int

    def shape(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        self._expect(0 <= self.start < self.stop <= x[0], f"channels {self.start} to {self.stop - 1}", x)
        return (self.stop - self.start, *x[1:])

    def origin(self, *inputs: Shape) -> NDArray[np.intp]:
        return np.arange(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Shuffle(Node):
    """Channels in ``groups`` equal parts, dealt out in turn: the first of each part, then the second of each, ...

    Source: ShuffleNet, Zhang et al. 2018.
    """

    flow: ClassVar[ChannelFlow] = "moved"
    groups: int

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(self.groups > 0 and inputs[0][0] % self.groups == 0, f"channels that {self.groups} groups divide",
                     *inputs)  # fmt: skip
        return inputs[0]

    def origin(self, *inputs: Shape) -> NDArray[np.intp]:
        return np.arange(inputs[0][0]).reshape(self.groups, -1).T.ravel()


@dataclass(frozen=True, kw_only=True)
class Scatter(Node):
    """A value whose channels are put among ``channels`` ones at the places ``at``, in rising order; others are zeros.

    What is left of a multiplication by a constant mask when closed channels are no longer computed at all.
    """

    flow: ClassVar[ChannelFlow] = "moved"
    channels: int
    at: tuple[int, ...]

    def shape(self, *inputs: Shape) -> Shape:
        rising = all(a < b for a, b in zip((-1, *self.at), (*self.at, self.channels), strict=True))
        self._expect(len(self.at) == inputs[0][0] and rising,
                     f"a place below {self.channels}, in rising order, for each channel", *inputs)  # fmt: skip
        return (self.channels, *inputs[0][1:])

    def origin(self, *inputs: Shape) -> NDArray[np.intp]:
        origin = np.full(self.channels, -1)
        origin[list(self.at)] = range(len(self.at))
        return origin


@dataclass(frozen=True, kw_only=True)
class Pool(_Window):
    """Windowed pooling. Max never picks the padding; average counts it in, as zeros, if ``count_include_pad``."""

    flow: ClassVar[ChannelFlow] = "own"
    kind: PoolKind
    padding: Padding = 0
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "max" or self.padding == 0:  # one way to say it: where it makes no difference
            object.__setattr__(self, "count_include_pad", True)

    def shape(self, *inputs: Shape) -> Shape:
        (x,) = inputs
        self._expect(len(x) == 3, "a feature map (C, H, W)", x)
        (high, wide), (top, left, bottom, right) = pair(self.kernel), sides(self.padding)
        fits = min(high, wide, *pair(self.stride)) > 0 <= min(top, left, bottom, right)
        fits = fits and max(top, bottom) < high and max(left, right) < wide
        self._expect(fits, "a positive kernel and stride, and padding that is less than the kernel", x)
        out = self.positions(*x[1:])
        self._expect(min(out) > 0, f"a map at least as large as its {high}x{wide} window", x)
        return (x[0], *out)

    @property
    def keeps_zero(self) -> bool:
        return True

    def nonnegative(self, *inputs: bool) -> bool:
        return all(inputs)


@dataclass(frozen=True, kw_only=True)
class GlobalPool(Node):
    """Average or maximum over the whole map: (C, H, W) -> (C,)."""

    flow: ClassVar[ChannelFlow] = "own"
    kind: PoolKind = "average"

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 3, "a feature map (C, H, W)", *inputs)
        return inputs[0][:1]

    @property
    def keeps_zero(self) -> bool:
        return True

    def nonnegative(self, *inputs: bool) -> bool:
        return all(inputs)


@dataclass(frozen=True, kw_only=True)
class Flatten(Node):
    """(C, H, W) -> (C * H * W,), channel by channel."""

    def shape(self, *inputs: Shape) -> Shape:
        return (math.prod(inputs[0]),)


@dataclass(frozen=True, kw_only=True)
class Linear(Node):
    """Fully connected. Parameters: weight (features, in), bias (features,) if ``bias``."""

    flow: ClassVar[ChannelFlow] = "summed"
    features: int
    bias: bool = True

    def shape(self, *inputs: Shape) -> Shape:
        self._expect(len(inputs[0]) == 1, "a vector (C,); pool or flatten first", *inputs)
        self._expect(self.features > 0, "at least one feature", *inputs)
        return (self.features,)

    def parameters(self, *inputs: Shape) -> dict[str, Shape]:
        weight = {"weight": (self.features, inputs[0][0])}
        return weight | ({"bias": (self.features,)} if self.bias else {})

    def narrowed(self, channels: int) -> Linear:
        return replace(self, features=channels)

    def macs(self, *inputs: Shape) -> int:
        return inputs[0][0] * self.features


OPS: dict[str, type[Node]] = {
    kind.__name__: kind
    for kind in (
        Input, Conv, BatchNorm, LayerNorm, Activation, LeakyReLU, PReLU, ELU, Squareplus, Clip, Select, Add, Multiply,
        Concat, Slice, Shuffle, Scatter, Pool, GlobalPool, Flatten, Linear,
    )
}  # fmt: skip
