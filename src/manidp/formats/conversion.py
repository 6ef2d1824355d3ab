"""A gated network's two MindSpore files, weights (.ckpt) and thresholds (.npy) <-> one checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from manidp.data.preprocessing import CIFAR10_CLASSES, MINDSPORE_PREPROCESSING, Preprocessing
from manidp.errors import CkptError, GraphError, quoted, shown, some
from manidp.files import open_regular, replacing, sha256_of
from manidp.formats.checkpoint import Checkpoint, Found
from manidp.formats.ckpt import BFLOAT16, bfloat16_to_float32, read_ckpt
from manidp.formats.signatures import HEAD, is_ckpt
from manidp.gating.place import with_gates
from manidp.graph import Graph
from manidp.models import resnet

STEM = "conv_1_3x3.weight"
MAX_THRESHOLDS_BYTES = 2**20
_NPY = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)\{'descr': '([<>]f[248])', 'fortran_order': (?:False|True), "
    rb"'shape': \((\d{1,6}),\), \} *\n",
    re.DOTALL,
)
"""The head of a .npy file of one dimension, as NumPy writes it."""
_log = logging.getLogger(__name__)


def is_ckpt_file(source: str | Path) -> bool:
    """Whether this is MindSpore's kind of file: by how it begins; where there is no file, by its suffix."""
    head = b""
    with contextlib.suppress(OSError, ValueError), open_regular(source) as file:  # whoever reads it says what is wrong
        head = file.read(HEAD)
    return is_ckpt(head) or (os.fspath(source).lower().endswith(".ckpt") and head[8:9] != b"{")


def load_ckpt(path: str | Path, thresholds: str | Path | None = None) -> Found:
    """The CIFAR ResNet in a .ckpt file, with the ``thresholds`` of its gates from a .npy file.

    The preprocessing is the original's for CIFAR-10, and so are the classes if there are ten; else they are called
    "class 0", "class 1" and so on. A prefix of all names is left off, with a logged warning. Raises CkptError,
    CheckpointError.
    """
    path = Path(path)
    values = read_ckpt(path)
    graph = resnet_of_ckpt(values)
    if graph.gates and thresholds is None:
        raise CkptError(f"{path}: a .ckpt does not hold its {len(graph.gates)} thresholds; give --thresholds FILE")
    given = read_thresholds(thresholds) if thresholds is not None else ()
    numbered = tuple(f"class {i}" for i in range(graph.num_classes))
    classes = CIFAR10_CLASSES if graph.num_classes == len(CIFAR10_CLASSES) else numbered
    sha256 = sha256_of(path)
    provenance = {"converted_from": {"name": shown(path.name), "sha256": sha256}}
    checkpoint, ignored = from_ckpt(values, given, graph, MINDSPORE_PREPROCESSING, classes, provenance)
    if prefix := prefix_of(values):
        _log.warning("%s: the network's names begin with %s, which is left off", path, quoted(prefix))
    return Found(path.stem, path, sha256, checkpoint, ignored)


def from_ckpt(
    values: Mapping[str, NDArray[Any]],
    thresholds: Sequence[float] | NDArray[Any],
    graph: Graph,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    provenance: Mapping[str, Any] | None = None,
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint that a .ckpt's values and the thresholds of its gates make, and the names that were ignored.

    Names and shapes must be the graph's, but for a prefix (``prefix_of``). ``thresholds``: one for each gate, in the
    order of the gates; () for a graph without gates. Values that are no parameters of the graph (an optimizer's state,
    an epoch count) are ignored.
    Raises CkptError for what is missing, of another shape or no floating-point numbers, CheckpointError for the rest.
    """
    given = np.asarray(thresholds, np.float32)
    if given.shape != (len(graph.thresholds),):
        raise CkptError(f"the network has {len(graph.gates)} gates and needs a threshold for each; got {given.shape}")
    weights = {name: np.asarray(value) for name, value in zip(graph.thresholds, given, strict=True)}
    wanted = _without_thresholds(graph)
    prefix = prefix_of(values, next(iter(wanted), ""))
    named = {f"{prefix}{name}": name for name in wanted}  # the .ckpt's name -> the graph's
    missing = [name for name in named if name not in values]
    if missing:
        raise CkptError(f"the .ckpt lacks {len(missing)} of the network's {len(wanted)} values: {some(missing)}; "
                        f"it holds {some(values)}")  # fmt: skip
    for full, name in named.items():
        value, shape = values[full], wanted[name]
        if value.shape != shape:
            raise CkptError(f"{quoted(full, 100)} has the shape {brief(value.shape)}; the network asks for {shape}")
        weights[name] = _float32(full, value)
    ignored = tuple(name for name in values if name not in named)
    ordered = {name: weights[name] for name in graph.parameters}
    return Checkpoint(graph, ordered, preprocessing, classes, provenance or {}), ignored


def prefix_of(values: Mapping[str, NDArray[Any]], name: str = STEM) -> str:
    """What stands before the names of a network in a .ckpt, such as "network." if a training cell was saved, or "".

    ``name`` is one of the network's, by default the first of the original's. Of several prefixes, the shortest: what
    an optimizer keeps of each value has a longer one.
    """
    if name in values:
        return ""
    prefixes = [value.removesuffix(name) for value in values if value.endswith(f".{name}")]
    return min(prefixes, key=len, default="")


def resnet_of_ckpt(values: Mapping[str, NDArray[Any]]) -> Graph:
    """The ResNet whose values a .ckpt holds, read off its names and shapes; ``from_ckpt`` then checks every one.

    Raises CkptError if they are not of a CIFAR ResNet with the original's names.
    """
    prefix = prefix_of(values)
    stem, head = values.get(f"{prefix}{STEM}"), values.get(f"{prefix}classifier.weight")
    blocks = sum(f"{prefix}stage_1.{index}.conv_a.weight" in values for index in range(len(values)))
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 2 or not blocks or not head.shape[0]:
        raise CkptError(f"the .ckpt is of no CIFAR ResNet with the original's names; it holds {some(values)}")
    try:
        graph = resnet(6 * blocks + 2, num_classes=head.shape[0], width=stem.shape[0])
        return with_gates(graph) if any(".mb1." in name for name in values) else graph
    except GraphError as error:
        raise CkptError(f"the .ckpt is of no network that can be: {error}") from error


def to_ckpt(checkpoint: Checkpoint) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float64]]:
    """The values of a .ckpt, in the order in which the original's network has them, and the thresholds, float64.

    Within a block, that order is: all nodes as they are computed, then the gates.
    """
    graph = checkpoint.graph
    blocks = {gate.name.rpartition(".")[0] for gate in graph.gates}
    first: dict[tuple[str, bool], int] = {}  # a block, or a node outside of all blocks -> place of its first node
    order = []
    for index, node in enumerate(graph.nodes):
        prefixes = itertools.accumulate(node.name.split(".")[:-1], "{}.{}".format)
        block = next((prefix for prefix in prefixes if prefix in blocks), None)
        key = (node.name, False) if block is None else (block, True)
        order.append((first.setdefault(key, index), node.name in graph.deciding, index))
    names = [
        f"{graph.nodes[index].name}.{name}"
        for _, _, index in sorted(order)
        for name in graph.nodes[index].parameters(*graph.input_shapes(graph.nodes[index]))
    ]
    wanted = _without_thresholds(graph)
    thresholds = np.array([checkpoint.weights[name] for name in graph.thresholds], np.float64)
    return {name: checkpoint.weights[name] for name in names if name in wanted}, thresholds


def read_thresholds(path: str | Path) -> NDArray[np.float64]:
    """The thresholds in a .npy file, float64 (gates,). Raises CkptError; runs nothing from the file."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_THRESHOLDS_BYTES + 1)
    except OSError as error:
        raise CkptError(f"cannot read '{path}': {error.strerror or error}") from error
    found = _NPY.match(content)
    if found is None or len(content) > MAX_THRESHOLDS_BYTES:
        raise CkptError(f"'{path}' must be a .npy file of one floating-point threshold for each gate")
    dtype, count, data = np.dtype(found[1].decode()), int(found[2]), content[found.end() :]
    if len(data) != count * dtype.itemsize:
        raise CkptError(f"'{path}' holds {len(data)} bytes; {count} thresholds take {count * dtype.itemsize}")
    return np.frombuffer(data, dtype).astype(np.float64)


def write_thresholds(thresholds: NDArray[np.float64], path: str | Path) -> None:
    """Write thresholds as the original has them, a .npy file of float64, whole or not at all. Raises CkptError."""
    try:
        with replacing(path) as file:
            npy.write_array(file, np.asarray(thresholds, np.float64), version=(1, 0), allow_pickle=False)
    except OSError as error:
        raise CkptError(f"cannot write '{path}': {error.strerror or error}") from error


def _without_thresholds(graph: Graph) -> dict[str, tuple[int, ...]]:
    thresholds = set(graph.thresholds)
    return {name: shape for name, shape in graph.parameters.items() if name not in thresholds}


def _float32(name: str, value: NDArray[Any]) -> NDArray[np.float32]:
    if value.dtype == BFLOAT16:
        return bfloat16_to_float32(value)
    if value.dtype.kind != "f":
        raise CkptError(
            f"{quoted(name, 100)} is of type {value.dtype}; the network's values are floating-point numbers"
        )
    with np.errstate(over="ignore"):  # what becomes infinite the checkpoint refuses
        return value.astype(np.float32)
