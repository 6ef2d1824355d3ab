"""Layers that an author has written out by hand, recognised by their ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx


def written_layer_norm(node: Any) -> Sequence[Any] | None:
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
                found = written_layer_norm(normal) if _is(normal, "div.Tensor") else None
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


def written_activation(node: fx.Node) -> tuple[str, fx.Node] | None:
    """An activation and what it is taken of: x sigmoid(x), x tanh(softplus(x)), relu6(x + 3) / 6, x times that."""
    if _is(node, "mul.Tensor"):
        first, second = node.args[:2]
        for x, factor in ((first, second), (second, first)):
            if isinstance(factor, fx.Node) and isinstance(x, fx.Node):
                if _is(factor, "sigmoid.default") and factor.args[0] is x:
                    return "silu", x
                plus: Any = factor.args[0] if _is(factor, "tanh.default") else None
                if _is(plus, "softplus.default") and plus.args == (x,):
                    return "mish", x
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


def ending_of(node: fx.Node) -> tuple[str, fx.Node]:
    """What a network makes of its logits at its end, "softmax", "log_softmax" or "", and the logits."""
    for name in ("softmax", "log_softmax"):
        if _is(node, f"_{name}.default") and node.args[1] in (1, -1):
            logits = node.args[0]
            assert isinstance(logits, fx.Node)
            return name, logits
    return "", node


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
