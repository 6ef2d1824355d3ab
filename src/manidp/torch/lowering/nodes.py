"""A graph under construction: nodes called after their modules, their shapes and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from manidp.graph import Node, Shape
from manidp.torch.layout import Value

BATCH_SIZE = 2  # images that the module is exported with; no axis of a graph's value is this one's
MOST_ROWS = 4096  # of a matrix that is made of constants


class RefusedError(Exception):
    """An op that no op of a graph can stand for, and why."""


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no image.

    name: in the module's state_dict, if it is as it is there. learned: whether it is made of the module's parameters.
    """

    tensor: Tensor
    name: str | None = None
    learned: bool = False


@dataclass(frozen=True)
class Unknown:
    """What nothing can be made of."""


@dataclass
class Nodes:
    """What has been made so far, for the op ``at``."""

    nodes: dict[str, Node] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    weights: dict[str, Constant] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)  # a node made again for another use -> its name
    at: fx.Node = field(init=False)

    def emit(self, op: type[Node], inputs: Sequence[str], word: str, weight: Constant | None = None, /,
             **fields: Any) -> str:  # fmt: skip
        """A new node called after its parameter or its module; ``word`` tells it from others of the same module."""
        if weight is not None and weight.name and "." in weight.name:
            path = weight.name.rpartition(".")[0]
        else:
            path, leaf = module_of(self.at)
            path = path if leaf else f"{path}.{word}".removeprefix(".")
        name, count = path, 1
        while name in self.nodes:
            count += 1
            name = f"{path}_{count}"
        return self._add(op(name=name, inputs=tuple(inputs), **fields))

    def _add(self, node: Node) -> str:
        self.shapes[node.name] = node.shape(*(self.shapes[source] for source in node.inputs))
        self.nodes[node.name] = node
        return node.name

    def give(self, node: str, **parameters: Constant | None) -> None:
        """A node's parameters; training leaves them as they are if none is made of the module's."""
        given = {f"{node}.{name}": value for name, value in parameters.items() if value is not None}
        self.weights |= given
        if not any(value.learned for value in given.values()):
            self.nodes[node] = replace(self.nodes[node], trainable=False)

    def value(self, node: str) -> Value:
        return Value.natural(node, self.shapes[node], BATCH_SIZE)

    def _again(self, node: str, word: str, op: type[Node], inputs: Sequence[str], /, **fields: Any) -> str:
        """A node that makes the same as another, in another shape; made once."""
        key = f"{node} {word}"
        if key not in self.derived:
            name = node + word
            while name in self.nodes:
                name += "_"
            self.derived[key] = self._add(op(name=name, inputs=tuple(inputs), **fields))
        return self.derived[key]

    def _constant(self, *parts: Any) -> None:
        if any(part is not None and not isinstance(part, Constant) for part in parts):
            raise RefusedError("weights that depend on the image")


def module_of(node: fx.Node) -> tuple[str, bool]:
    """Path of the module that an op belongs to, and whether that is one of torch's own layers."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", False
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path, bool(path) and kind.startswith("torch.nn.modules.") and ".container." not in kind


def two(value: Any) -> tuple[int, int]:
    """A setting as (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def wide(tensor: Tensor) -> Tensor:
    """Weights in float64, on the CPU."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def constant(part: Any) -> Constant:
    """A number or a constant as a constant."""
    return part if isinstance(part, Constant) else Constant(torch.tensor(float(part), dtype=torch.float64))


def number(part: Any, change: Callable[[Tensor], Tensor]) -> Constant:
    """What becomes of a number or a constant."""
    given = constant(part)
    return Constant(change(given.tensor), learned=given.learned)
