"""A backend is a table from op to handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from manidp.errors import UnsupportedError
from manidp.graph.ops import Node

H = TypeVar("H")
V = TypeVar("V")


class Handlers(Generic[H]):
    """What one backend does for each op: filled by ``@handles(Conv)``, asked by ``handles[node]``.

    backend: what messages call it. What it lacks is an UnsupportedError that names the node and the op.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._of: dict[type[Node], H] = {}

    def __call__(self, op: type[Node]) -> Callable[[H], H]:
        """Decorates the handler of an op."""

        def add(handler: H) -> H:
            self._of[op] = handler
            return handler

        return add

    def __getitem__(self, node: Node) -> H:
        handler = self._of.get(type(node))
        if handler is None:
            raise UnsupportedError(f"{node}: {self.backend} does not run this op")
        return handler

    def variant(self, node: Node, table: Mapping[str, V], kind: str) -> V:
        """The entry of a backend's table of the kinds of an op; raises UnsupportedError."""
        found = table.get(kind)
        if found is None:
            raise UnsupportedError(f"{node}: {self.backend} does not run the kind '{kind}'")
        return found
