"""The Open Inference Protocol, version 2, and its extension for binary tensors: bytes to images, results to bytes.

One input, ``image``: UINT8 [B, H, W, 3], pixels; or FP32 [B, 3, H, W], normalised as the checkpoint says. What is not
offered (other inputs, shared memory, compression) is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.errors import quoted, short
from manidp.formats.checkpoint import Checkpoint
from manidp.result import Result, probabilities
from manidp.serve.bodies import json_of
from manidp.serve.limits import Limits, RefusedError

INPUT = "image"
VERSION = "1"
LENGTH = "inference-header-content-length"  # the header that says where JSON ends and tensors begin
EXTENSIONS = ["binary_tensor_data"]

_INPUTS: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
OUTPUTS: dict[str, tuple[str, Callable[[Checkpoint, Result], NDArray[Any]]]] = {
    "class": ("BYTES", lambda model, result: np.array(model.classes, object)[result.logits.argmax(1)]),
    "probabilities": ("FP32", lambda _, result: probabilities(result.logits).astype("<f4")),
    "logits": ("FP32", lambda _, result: result.logits.astype("<f4")),
    "macs": ("INT64", lambda _, result: result.macs.astype("<i8")),
}


@dataclass(frozen=True)
class Infer:
    """A request: images as ``Engine.run`` takes them, options, and name -> whether it is wanted in binary."""

    id: str | None
    images: NDArray[Any]
    options: Mapping[str, Any]
    outputs: Mapping[str, bool]


def input_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Shape of one image, by the datatype of the tensor."""
    height, width = checkpoint.preprocessing.size
    return {"UINT8": [height, width, 3], "FP32": [3, height, width]}


def metadata(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the protocol tells of a model."""
    classes = len(checkpoint.classes)
    shapes = {"class": [-1], "macs": [-1], "logits": [-1, classes], "probabilities": [-1, classes]}
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "manidp",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *input_shapes(checkpoint)["UINT8"]]}],
        "outputs": [{"name": one, "datatype": kind, "shape": shapes[one]} for one, (kind, _) in OUTPUTS.items()],
    }


def parse_infer(body: bytes, header_length: str | None, checkpoint: Checkpoint, limits: Limits) -> Infer:
    """The request that a body holds; header_length: bytes of its JSON, where tensors follow. Raises RefusedError."""
    document, binary = body, memoryview(b"")
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            raise RefusedError(400, f"{LENGTH} must be a whole number; got {quoted(header_length, 40)}")
        if int(header_length) > len(body):
            raise RefusedError(400, f"{LENGTH} says {int(header_length):,} bytes; the body has {len(body):,}")
        document, binary = body[: int(header_length)], memoryview(body)[int(header_length) :]
    found = json_of(document, limits)
    name = found.get("id")
    if name is not None and not isinstance(name, str):
        raise RefusedError(400, "id must be text")
    parameters = _object(found, "parameters")
    inputs = found.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RefusedError(400, f"inputs must be a list of one tensor, {INPUT!r}")
    images = _images(inputs[0], binary, checkpoint, limits)
    every = parameters.get("binary_data_output", False)
    if not isinstance(every, bool):
        raise RefusedError(400, "binary_data_output must be true or false")
    return Infer(name, images, parameters, _wanted(found.get("outputs"), every))


def format_infer(request: Infer, name: str, checkpoint: Checkpoint, result: Result, budget: str) -> tuple[bytes, int]:
    """The body of an answer, and how many of its bytes are JSON; tensors follow where there are more."""
    outputs, tensors = [], []
    for output, in_binary in request.outputs.items():
        kind, of = OUTPUTS[output]
        values = of(checkpoint, result)
        told: dict[str, Any] = {"name": output, "datatype": kind, "shape": list(values.shape)}
        if in_binary:
            raw = _texts(values) if kind == "BYTES" else values.tobytes()
            told["parameters"] = {"binary_data_size": len(raw)}
            tensors.append(raw)
        else:
            told["data"] = values.reshape(-1).tolist()
        outputs.append(told)
    document = {
        "model_name": name,
        "model_version": VERSION,
        **({} if request.id is None else {"id": request.id}),
        "parameters": {"budget": budget},
        "outputs": outputs,
    }
    head = json.dumps(document, separators=(",", ":")).encode()
    return b"".join([head, *tensors]), len(head)


def _object(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name, {})
    if not isinstance(value, dict):
        raise RefusedError(400, f"{name} must be an object")
    return value


def _images(tensor: dict[str, Any], binary: memoryview, checkpoint: Checkpoint, limits: Limits) -> NDArray[Any]:
    if tensor.get("name") != INPUT:
        raise RefusedError(400, f"the input is called {INPUT!r}; got {quoted(str(tensor.get('name')), 60)}")
    kind, shape = tensor.get("datatype"), tensor.get("shape")
    sizes = input_shapes(checkpoint)
    if not isinstance(kind, str) or kind not in sizes:
        raise RefusedError(400, f"{INPUT!r} is of UINT8 or FP32; got {quoted(str(kind), 60)}")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape) or shape[1:] != sizes[kind]:
        expected = ", ".join(map(str, ["B", *sizes[kind]]))
        raise RefusedError(400, f"a tensor of {kind} has the shape [{expected}]; got {short(str(shape), 80)}")
    if not 1 <= shape[0] <= limits.pictures:
        raise RefusedError(400, f"1 to {limits.pictures} images a request; got {shape[0]:,}")
    parameters = _object(tensor, "parameters")
    if "shared_memory_region" in parameters:
        raise RefusedError(400, "shared memory is not offered")
    size = parameters.get("binary_data_size")
    if size is not None:
        bytes_ = math.prod(shape) * _INPUTS[kind].itemsize
        if "data" in tensor or type(size) is not int or size != bytes_ or len(binary) != bytes_:
            said = short(str(size), 40)
            raise RefusedError(400, f"{shape} of {kind} are {bytes_:,} bytes; binary_data_size says {said}, "
                               f"{len(binary):,} came")  # fmt: skip
        values = np.frombuffer(binary, _INPUTS[kind])
    elif len(binary):
        raise RefusedError(400, f"{len(binary):,} bytes follow the JSON, but the tensor has no binary_data_size")
    else:
        values = _listed(tensor.get("data"), kind)
    if values.size != math.prod(shape):
        raise RefusedError(400, f"{shape} are {math.prod(shape):,} numbers; got {values.size:,}")
    if kind == "FP32" and not np.isfinite(values).all():
        raise RefusedError(400, "the tensor holds numbers that are not finite (or exceed FP32)")
    return values.reshape(shape)


def _listed(data: object, kind: str) -> NDArray[Any]:
    """Numbers of a JSON list, which may be nested as the shape is; types are looked at before an array is made."""
    flat: list[Any] = [data]
    types = {type(data)}
    while types == {list} and len(set(map(len, flat))) == 1:
        flat = list(chain.from_iterable(flat))
        types = set(map(type, flat))
    if not types or not types <= {int, float}:
        raise RefusedError(400, f"data must be a list of numbers of {kind}, flat or nested as the shape is")
    try:
        values = np.array(flat, np.float64)
    except OverflowError:
        raise RefusedError(400, "the tensor holds numbers that are not finite (or exceed FP32)") from None
    if kind == "UINT8" and not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
        raise RefusedError(400, "numbers of UINT8 are whole, from 0 to 255")
    with np.errstate(over="ignore"):
        return values.astype(_INPUTS[kind])


def _wanted(outputs: object, every: bool) -> dict[str, bool]:
    """Name -> in binary. All of them where none is asked for."""
    if outputs is None or outputs == []:
        return dict.fromkeys(OUTPUTS, every)
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        raise RefusedError(400, "outputs must be a list of objects")
    wanted = {}
    for one in outputs:
        name = one.get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            raise RefusedError(400, f"outputs are {', '.join(OUTPUTS)}; got {quoted(str(name), 60)}")
        parameters = _object(one, "parameters")
        for refused in ("classification", "shared_memory_region"):
            if refused in parameters:
                raise RefusedError(400, f"{refused} of an output is not offered")
        wanted[name] = parameters.get("binary_data", every)
        if not isinstance(wanted[name], bool):
            raise RefusedError(400, "binary_data must be true or false")
    return wanted


def _texts(values: NDArray[Any]) -> bytes:
    """BYTES: before each text its length, four bytes, the lowest first."""
    raw = [str(value).encode() for value in values]
    return b"".join(len(text).to_bytes(4, "little") + text for text in raw)
