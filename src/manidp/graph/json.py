"""A graph as plain JSON data, and back, everything checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from reprlib import repr as brief
from typing import Any, get_args

from manidp.errors import GraphError
from manidp.graph import ops
from manidp.graph.ops import OPS, Node
from manidp.limits import FLOAT32_MAX, Limits

_CHOICES = {name: get_args(getattr(ops, name)) for name in ("ActivationKind", "PoolKind", "SelectRule", "SelectGain")}
_LENGTHS = {"Pair": (2,), "Padding": (2, 4), "tuple[int, int, int]": (3,), "tuple[int, ...]": None}


def node_to_json(node: Node) -> dict[str, Any]:
    """``op``, and the fields that are not at their defaults."""
    values = {f.name: getattr(node, f.name) for f in fields(node) if f.default is MISSING or
              getattr(node, f.name) != f.default}  # fmt: skip
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"op": type(node).__name__} | plain


def nodes_from_json(data: Sequence[object], known_ops: Mapping[str, type[Node]] = OPS) -> tuple[Node, ...]:
    """The nodes that ``node_to_json`` described. Raises GraphError saying what is wrong and where."""
    Limits.from_environment().check("nodes", len(data), "the graph")
    nodes: list[Node] = []
    for index, item in enumerate(data):
        if not isinstance(item, dict):
            raise GraphError(f"node {index} is not an object")
        where = f"node {index} ({brief(item.get('name', '?'))})"
        kind = known_ops.get(item["op"]) if isinstance(item.get("op"), str) else None
        if kind is None:
            raise GraphError(f"{where}: unknown op {brief(item.get('op'))}; known are {', '.join(known_ops)}")
        known = {f.name: f for f in fields(kind)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items() if k != "op"}
        for key, value in values.items():
            if key not in known:
                raise GraphError(f"{where}: {kind.__name__} has no field {brief(key)}; it has {', '.join(known)}")
            if not _fits(value, str(known[key].type)):
                raise GraphError(f"{where}: field {key!r} must be of type {known[key].type}; got {brief(value)}")
        missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
        if missing:
            raise GraphError(f"{where}: {kind.__name__} lacks {', '.join(missing)}")
        nodes.append(kind(**values))  # type: ignore[arg-type]  # each value was just checked against its field
    return tuple(nodes)


def _fits(value: object, annotation: str) -> bool:
    if annotation == "str":
        return isinstance(value, str) and value != ""
    if annotation == "int":
        return type(value) is int and abs(value) < 2**31
    if annotation == "bool":
        return type(value) is bool
    if annotation == "float":
        return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= FLOAT32_MAX
    if annotation == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation in _CHOICES:
        return value in _CHOICES[annotation]
    if annotation in ("Pair", "Padding") and _fits(value, "int"):
        return True
    lengths = _LENGTHS[annotation]
    whole = isinstance(value, tuple) and all(_fits(item, "int") for item in value)
    return whole and (lengths is None or len(value) in lengths)  # type: ignore[arg-type]
