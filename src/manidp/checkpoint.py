"""One safetensors file holds a whole model: graph, weights, thresholds, preprocessing, class names, provenance.

The tensors are the graph's parameters, float32, under the graph's own names. The header's one metadata entry,
``manidp``, is JSON: ``version``, ``graph``, ``preprocessing`` (mean, std, size), ``classes`` and ``provenance``.
The same model makes the same bytes. Loading needs no framework and runs nothing from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from manidp.errors import CheckpointError, GraphError, ImageError
from manidp.files import replacing
from manidp.graph import Graph, graph_from_json
from manidp.images import Preprocessing

VERSION = 1
MAX_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 16 * 2**20
MAX_NODES = 20_000
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Checkpoint:
    """A model as data. Raises CheckpointError unless weights, classes and thresholds fit the graph.

    weights: float32 arrays with exactly the names and shapes of ``graph.parameters``, all finite.
    provenance: JSON data; how the model came to be (recipe, seed, versions, data digests, measured accuracy and MACs).
    """

    graph: Graph
    weights: Mapping[str, NDArray[np.float32]]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_weights(self.graph, self.weights)
        if len(self.classes) != self.graph.num_classes:
            raise CheckpointError(
                f"the graph has {self.graph.num_classes} outputs but there are {len(self.classes)} class names"
            )
        if self.graph.input.dims != (3, *self.preprocessing.size):
            raise CheckpointError(
                f"preprocessing makes images of {self.preprocessing.size} pixels (height, width); "
                f"the graph reads {self.graph.input.dims} (channels, height, width)"
            )


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


def _check_weights(graph: Graph, weights: Mapping[str, NDArray[np.float32]]) -> None:
    for name, shape in graph.parameters.items():
        if name not in weights:
            raise CheckpointError(f"tensor '{name}' is missing; the graph asks for float32 {list(shape)}")
        value = weights[name]
        if value.dtype != np.float32 or value.shape != shape:
            raise CheckpointError(
                f"tensor '{name}': the graph asks for float32 {list(shape)}; got {value.dtype} {list(value.shape)}"
            )
        if not np.isfinite(value).all():
            raise CheckpointError(f"tensor '{name}' holds NaN or infinity")
        if name.endswith((".threshold", ".moving_variance")) and (value < 0).any():
            raise CheckpointError(f"tensor '{name}' must not be negative; its least value is {value.min()}")
    unknown = sorted(weights.keys() - graph.parameters.keys())
    if unknown:
        raise CheckpointError(f"tensors that the graph does not know: {', '.join(unknown[:5])} ({len(unknown)} in all)")


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
    }
    try:
        text = json.dumps(meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the provenance must be plain JSON data without NaN: {error}") from error
    tensors = {name: np.require(value, requirements="C") for name, value in checkpoint.weights.items()}
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
    _check_size(path)
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("manidp")
            if text is None:
                raise CheckpointError("a safetensors file, but not one of manidp: its header has no entry 'manidp'")
            weights = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"not a whole safetensors file of float32 tensors: {error}") from error
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header's entry 'manidp' is not JSON: {error}") from error
    version = meta.get("version") if isinstance(meta, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"the header's entry 'manidp' must hold a version of at least 1; got {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"the file is of version {version}; this manidp reads up to {VERSION}: pip install -U manidp"
        )
    missing = [name for name in ("graph", "preprocessing", "classes", "provenance") if name not in meta]
    if missing:
        raise CheckpointError(f"the header's entry 'manidp' lacks {', '.join(missing)}")
    if not isinstance(meta["provenance"], dict):
        raise CheckpointError("the provenance must be an object")
    classes = meta["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError("classes must be a list of names")
    if isinstance(meta["graph"], dict) and len(meta["graph"].get("nodes", ())) > MAX_NODES:
        raise CheckpointError(f"the graph has more than {MAX_NODES} nodes")
    preprocessing = _preprocessing(meta["preprocessing"])
    return Checkpoint(graph_from_json(meta["graph"]), weights, preprocessing, tuple(classes), meta["provenance"])


def _check_size(path: Path) -> None:
    """Refuse, before anything is read, a file whose size or header length cannot be right."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    if size > MAX_BYTES:
        raise CheckpointError(f"the file has {size:,} bytes; the limit is {MAX_BYTES:,}")
    header = int.from_bytes(head, "little")
    if len(head) < 8 or header > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"not a safetensors file: {size:,} bytes, of which the header claims {header:,} "
            f"(truncated, or another format?)"
        )


def _preprocessing(data: object) -> Preprocessing:
    numbers = {"mean": 3, "std": 3, "size": 2}
    if not isinstance(data, dict) or data.keys() != numbers.keys():
        raise CheckpointError(f"preprocessing must hold exactly {', '.join(numbers)}; got {data!r}")
    for name, count in numbers.items():
        kind = int if name == "size" else (int, float)
        value = data[name]
        if not isinstance(value, list) or len(value) != count or not all(
            isinstance(item, kind) and not isinstance(item, bool) and abs(item) < 2**31 for item in value
        ):  # fmt: skip
            raise CheckpointError(f"preprocessing: {name} must be {count} numbers; got {value!r}")
    return Preprocessing(tuple(data["mean"]), tuple(data["std"]), (data["size"][0], data["size"][1]))
