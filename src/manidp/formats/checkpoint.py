"""One safetensors file holds a whole model: graph, weights, thresholds, preprocessing, class names, provenance.

Version 2: the tensors are float32. ``weights/NAME`` is the graph's parameter NAME; ``points/K/NAME`` is what takes its
place at the K-th operating point. The header's one metadata entry, ``manidp``, is JSON: ``version``, ``graph``,
``preprocessing`` (mean, std, size), ``classes``, ``provenance`` and ``points`` (of each name, macs and accuracy).
Version 1 had plain names, no points, and one node for a whole gate; it is read and written out as version 2.
The same model makes the same bytes. Loading needs no framework and runs nothing from the file. Of a file from outside
the header is checked first, and no tensor is read before the network that it describes is known to be within limits.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from manidp.data.preprocessing import Preprocessing
from manidp.errors import CheckpointError, GraphError, ImageError, quoted, short, some
from manidp.files import replacing
from manidp.formats.signatures import HEAD, looks_like
from manidp.gating.version1 import graph_of_version_1
from manidp.graph import Graph, graph_from_json
from manidp.graph.macs import ungated_macs
from manidp.limits import Limits

VERSION = 2
DEFAULT = "default"
BUDGET_TOLERANCE = 0.01  # a point may take so much more than its budget: training meets budgets within 1 %
MAX_POINTS = 100
HEADER_BYTES, JSON_VALUES = 300, 25  # for each node that a network may have
JSON_DEPTH = 64
CLASS_LENGTH = 1000  # characters in the name of a class or an operating point
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64"}
ADJUSTABLE = ("threshold", "mask", "moving_mean", "moving_variance")  # what an operating point may set
Described = dict[str, tuple[str, tuple[int, ...]]]  # name -> type and shape
_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class OperatingPoint:
    """Another budget that the same network runs at: thresholds, and where they differ batch statistics.

    values: parameters of the graph that take the place of the checkpoint's own; thresholds, masks, moving means and
    variances only. macs: mean multiply-adds an image; accuracy: top-1, 0..1; both as measured, None if they were not.
    """

    name: str
    values: Mapping[str, NDArray[np.float32]]
    macs: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model as data. Raises CheckpointError unless weights, classes, thresholds and points fit the graph.

    weights: float32 arrays with exactly the names and shapes of ``graph.parameters``; every number is finite, and
    those of thresholds and variances are not negative.
    provenance: JSON data; how the model came to be (recipe, seed, versions, data digests, measured accuracy and MACs).
    points: other budgets that the same network runs at; "default" is the weights as they are.
    """

    graph: Graph
    weights: Mapping[str, NDArray[np.float32]]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[OperatingPoint, ...] = ()

    def __post_init__(self) -> None:
        _check_tensors(self.graph, _described_tensors(self.weights))
        _check_values(self.weights)
        _check_points(self.graph, [(point.name, _described_tensors(point.values)) for point in self.points])
        for point in self.points:
            _check_values(point.values)
            if not all(
                figure is None or (_is_number(figure) and figure >= 0) for figure in (point.macs, point.accuracy)
            ):
                raise CheckpointError(
                    f"operating point {quoted(point.name, 60)}: macs and accuracy are numbers >= 0 or None"
                )
        if len(self.classes) != self.graph.num_classes:
            raise CheckpointError(
                f"the graph has {self.graph.num_classes} outputs but there are {len(self.classes)} class names"
            )
        for name in self.classes:
            if len(name) > CLASS_LENGTH or not _is_unicode(name):
                raise CheckpointError(f"a class name is text of at most {CLASS_LENGTH} characters; got {brief(name)}")
        if self.graph.input.dims != (3, *self.preprocessing.size):
            raise CheckpointError(
                f"preprocessing makes images of {self.preprocessing.size} pixels (height, width); "
                f"the graph reads {self.graph.input.dims} (channels, height, width)"
            )

    def __repr__(self) -> str:
        """What it is, in one line: weights would fill pages."""
        graph, size = self.graph, "x".join(map(str, self.graph.input.dims))
        parameters = sum(array.size for array in self.weights.values())
        points = f", points {', '.join(quoted(point.name, 60) for point in self.points)}" if self.points else ""
        return (
            f"Checkpoint({size} to {graph.num_classes} classes, {len(graph.nodes)} nodes, {len(graph.gates)} gates, "
            f"{parameters:,} parameters{points})"
        )

    def point(self, budget: str | float) -> OperatingPoint:
        """The operating point of a name, or the most expensive one within a share of the dense multiply-adds (0..1].

        "default" is the weights as they are. Raises CheckpointError for an unknown budget, listing those known.
        """
        known = self.every_point
        if isinstance(budget, str):
            for point in known:
                if point.name == budget:
                    return point
        else:
            limit = budget * ungated_macs(self.graph) * (1 + BUDGET_TOLERANCE)
            within = [point for point in known if point.macs is not None and point.macs <= limit]
            if within:
                return max(within, key=lambda point: point.macs or 0.0)
        listed = some(map(self._told, known), 12)
        asked = quoted(budget, 60) if isinstance(budget, str) else repr(budget)
        raise CheckpointError(f"no operating point fits the budget {asked}; this model has {listed}")

    def at(self, budget: str | float) -> Checkpoint:
        """The checkpoint whose own weights are those of an operating point, without others."""
        return replace(self, weights={**self.weights, **self.point(budget).values}, points=())

    @cached_property
    def default_point(self) -> OperatingPoint:
        """The weights as they are, with what was measured of them."""
        measured = self.provenance.get("measured")
        facts = measured if isinstance(measured, dict) else {}
        macs, correct, total = (facts.get(name) for name in ("mean_macs", "correct", "total"))
        accuracy = correct / total if _is_number(correct) and _is_number(total) and total else None
        return OperatingPoint(DEFAULT, {}, macs if _is_number(macs) else None, accuracy)

    @property
    def every_point(self) -> tuple[OperatingPoint, ...]:
        """The default one, then the others."""
        return (self.default_point, *self.points)

    def _told(self, point: OperatingPoint) -> str:
        share = "" if point.macs is None else f" ({point.macs / ungated_macs(self.graph):.1%} of dense)"
        return f"{quoted(point.name, 40)}{share}"


@dataclass(frozen=True)
class Found:
    """A model and where it came from: the ``path`` of the file it was read from and that file's ``sha256``.

    ``name``: a card's, or the file's; ``ignored``: names in the file that are not of the network.
    """

    name: str
    path: Path
    sha256: str
    checkpoint: Checkpoint
    ignored: tuple[str, ...] = ()


def _check_tensors(graph: Graph, given: Described) -> None:
    """Whether the tensors, of which types and shapes are given, are exactly the graph's parameters."""
    for name, shape in graph.parameters.items():
        if name not in given:
            raise CheckpointError(f"tensor '{name}' is missing; the graph asks for float32 {list(shape)}")
        if given[name] != ("float32", shape):
            dtype, came = given[name]
            raise CheckpointError(
                f"tensor '{name}': the graph asks for float32 {list(shape)}; got {dtype} {brief(list(came))}"
            )
    unknown = sorted(given.keys() - graph.parameters.keys())
    if unknown:
        raise CheckpointError(f"tensors that the graph does not know: {some(unknown)}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _described_tensors(tensors: Mapping[str, NDArray[np.float32]]) -> Described:
    return {
        name: ("float32" if value.dtype == np.float32 else str(value.dtype), value.shape)
        for name, value in tensors.items()
    }


def _check_values(tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Whether every number is finite, and those of thresholds and variances are not negative."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(f"tensor '{name}' holds NaN or infinity")
        if name.endswith((".threshold", ".moving_variance")) and (value < 0).any():
            raise CheckpointError(f"tensor '{name}' must not be negative; its least value is {value.min()}")


def _check_points(graph: Graph, points: Sequence[tuple[str, Described]]) -> None:
    """Whether the points have names of their own, and change only what may differ between them."""
    names = [name for name, _ in points]
    fits = all(0 < len(name) <= CLASS_LENGTH and _is_unicode(name) for name in names)
    if not fits or len({*names, DEFAULT}) <= len(names):
        raise CheckpointError(f"operating points need different names, other than '{DEFAULT}'; got {brief(names)}")
    for point, given in points:
        for name, described in given.items():
            if name.rpartition(".")[2] not in ADJUSTABLE or name not in graph.parameters:
                raise CheckpointError(
                    f"operating point {quoted(point, 60)} sets {short(name)}; only {', '.join(ADJUSTABLE)} may differ"
                )
            if described != ("float32", graph.parameters[name]):
                raise CheckpointError(
                    f"operating point {quoted(point, 60)}, '{name}': the graph asks for float32 "
                    f"{list(graph.parameters[name])}; got {described[0]} {brief(list(described[1]))}"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def bundled() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.stem for path in _DATA.glob("*-res*.safetensors")))


def checkpoint_path(name: str | Path) -> Path:
    """The file of a model: a bundled name ("manidp-res20"), a file, or a folder that holds model.safetensors.

    Raises CheckpointError if there is none.
    """
    if str(name) in bundled():
        return _DATA / f"{name}.safetensors"
    for path in (Path(name) / "model.safetensors", Path(name)):
        if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
            return path
    raise CheckpointError(f"{name}: no such file, and no model of this name; bundled are {', '.join(bundled())}")


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write the file whole or not at all; raises CheckpointError if it cannot be written."""
    meta = {
        "version": VERSION,
        "graph": checkpoint.graph.to_json(),
        "preprocessing": {
            "mean": list(checkpoint.preprocessing.mean),
            "std": list(checkpoint.preprocessing.std),
            "size": list(checkpoint.preprocessing.size),
        },
        "classes": list(checkpoint.classes),
        "provenance": dict(checkpoint.provenance),
        "points": [{"name": point.name, "macs": point.macs, "accuracy": point.accuracy} for point in checkpoint.points],
    }
    try:
        text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the provenance must be plain JSON data without NaN: {error}") from error
    _plain_json(text, "the header's entry 'manidp'")  # what is written can be read
    named = {f"weights/{name}": value for name, value in checkpoint.weights.items()}
    for index, point in enumerate(checkpoint.points):
        named |= {f"points/{index}/{name}": value for name, value in point.values.items()}
    tensors = {name: np.require(value, requirements="C") for name, value in named.items()}
    data = safetensors.numpy.save(tensors, metadata={"manidp": text})
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the whole file; raises CheckpointError saying what is wrong with it, and loads nothing then."""
    try:
        return _load(Path(path))
    except (GraphError, ImageError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _load(path: Path) -> Checkpoint:
    header = _header(path)
    try:
        with safe_open(path, framework="np") as file:
            return _described(header, lambda name: np.array(file.get_tensor(name)))
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error)[:200].split())
        raise CheckpointError(f"not a whole safetensors file of float32 tensors: {reason}") from error


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; refuses, before anything else is read, what cannot be one."""
    longest = HEADER_BYTES * Limits.from_environment().nodes
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(HEAD)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 8 or length > size - 8:
                guess = looks_like(head, str(path))
                raise CheckpointError(
                    f"not a safetensors file: it looks like {guess}" if guess else
                    f"not a safetensors file, or cut short: of {size:,} bytes the header claims {length:,}"
                )  # fmt: skip
            if length > longest:
                raise CheckpointError(
                    f"the header has {length:,} bytes; the limit is {longest:,}, "
                    f"which MANIDP_MAX_NODES in the environment raises"
                )
            file.seek(8)
            text = file.read(length).decode()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not a safetensors file: its header is not text: {error.reason}") from error
    header = _plain_json(text, "the header")
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file: its header is not an object")
    return header


def _plain_json(text: str, what: str) -> Any:
    """JSON data without NaN, infinity, halves of surrogate pairs or keys given twice, of limited number and depth."""
    values = sum(map(text.count, "{[,"))
    most = JSON_VALUES * Limits.from_environment().nodes
    if values > most:
        raise CheckpointError(
            f"{what} has {values:,} values; the limit is {most:,}, which MANIDP_MAX_NODES in the environment raises"
        )
    try:
        data = json.loads(text, object_pairs_hook=_unique)
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{what} holds text that is not Unicode: half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not plain JSON: {error}") from error
    level, depth = [data], 0
    while level := [value for value in level if isinstance(value, (dict, list))]:
        level = [item for value in level for item in (value.values() if isinstance(value, dict) else value)]
        depth += 1
        if depth > JSON_DEPTH:
            raise CheckpointError(f"{what} nests deeper than {JSON_DEPTH} levels")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {brief(twice)} is given twice")
    return made


def _described(header: dict[str, Any], read: Callable[[str], NDArray[Any]]) -> Checkpoint:
    """The checkpoint of a header; ``read`` gives a tensor by its name, when all names and shapes were found right."""
    entries = header.pop("__metadata__", None)
    text = entries.get("manidp") if isinstance(entries, dict) else None
    if not isinstance(text, str):
        raise CheckpointError("a safetensors file, but not one of manidp: its header has no entry 'manidp'")
    meta = _plain_json(text, "the header's entry 'manidp'")
    version = meta.get("version") if isinstance(meta, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"the header's entry 'manidp' must hold a version of at least 1; got {brief(version)}")
    if version > VERSION:
        raise CheckpointError(
            f"the file is of version {brief(version)}; this manidp reads up to {VERSION}: pip install -U manidp"
        )
    missing = [
        name
        for name in ("graph", "preprocessing", "classes", "provenance", *(["points"] if version > 1 else []))
        if name not in meta
    ]
    if missing:
        raise CheckpointError(f"the header's entry 'manidp' lacks {', '.join(missing)}")
    if not isinstance(meta["provenance"], dict):
        raise CheckpointError("the provenance must be an object")
    classes = meta["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError("classes must be a list of names")
    preprocessing = _preprocessing(meta["preprocessing"])
    graph = graph_of_version_1(meta["graph"]) if version == 1 else graph_from_json(meta["graph"])
    given = {
        name: (_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()
    }
    if version == 1:
        _check_tensors(graph, given)
        weights = {name: read(name) for name in given}
        return Checkpoint(graph, weights, preprocessing, tuple(classes), meta["provenance"])
    points = _points(meta["points"])
    own, values = _sorted_out(given, len(points))
    _check_tensors(graph, own)
    _check_points(graph, list(zip([point.name for point in points], values, strict=True)))
    weights = {name: read(f"weights/{name}") for name in own}
    points = tuple(
        replace(point, values={name: read(f"points/{index}/{name}") for name in values[index]})
        for index, point in enumerate(points)
    )
    return Checkpoint(graph, weights, preprocessing, tuple(classes), meta["provenance"], points)


def _points(data: object) -> tuple[OperatingPoint, ...]:
    """The operating points that a header tells of, without their values."""
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,), "macs": (int, float, type(None)), "accuracy": (int, float, type(None)),
    }  # fmt: skip
    if not isinstance(data, list) or len(data) > MAX_POINTS or not all(
        isinstance(point, dict) and point.keys() == kinds.keys()
        and all(isinstance(point[name], kind) for name, kind in kinds.items()) for point in data
    ):  # fmt: skip
        raise CheckpointError(f"points must be a list of at most {MAX_POINTS} objects with name, macs and accuracy")
    return tuple(OperatingPoint(point["name"], {}, point["macs"], point["accuracy"]) for point in data)


def _sorted_out(given: Described, points: int) -> tuple[Described, list[Described]]:
    """The graph's own tensors, and those of each operating point, under the names of the graph."""
    own: Described = {}
    values: list[Described] = [{} for _ in range(points)]
    groups = {"weights": own} | {f"points/{index}": value for index, value in enumerate(values)}
    for name, described in given.items():
        first, _, rest = name.partition("/")
        if first == "points":
            number, _, rest = rest.partition("/")
            first = f"points/{number}"
        if first not in groups:
            raise CheckpointError(f"tensor {short(name)} is neither a weight nor of one of {points} points")
        groups[first][rest] = described
    return own, values


def _preprocessing(data: object) -> Preprocessing:
    numbers = {"mean": 3, "std": 3, "size": 2}
    if not isinstance(data, dict) or data.keys() != numbers.keys():
        raise CheckpointError(f"preprocessing must hold exactly {', '.join(numbers)}; got {brief(data)}")
    for name, count in numbers.items():
        kind = int if name == "size" else (int, float)
        value = data[name]
        if not isinstance(value, list) or len(value) != count or not all(
            isinstance(item, kind) and not isinstance(item, bool) and abs(item) < 2**31 for item in value
        ):  # fmt: skip
            raise CheckpointError(f"preprocessing: {name} must be {count} numbers; got {brief(value)}")
    return Preprocessing(tuple(data["mean"]), tuple(data["std"]), (data["size"][0], data["size"][1]))
