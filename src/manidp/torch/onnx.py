"""An ONNX file as a checkpoint: its nodes as a torch module, which then is imported like any other.

So the two doors share the lowering and its comparison in float64. What ONNX Runtime makes of the file is compared, too.
Files come from outside: their size, nodes and arrays are bounded, data in other files are refused, and every name in
them is replaced where it could meet one of ours.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from manidp import reference
from manidp.data.preprocessing import Preprocessing
from manidp.errors import FrontendError, MissingExtraError, quoted, short, shown
from manidp.files import open_regular
from manidp.formats.checkpoint import Checkpoint, Found
from manidp.limits import Limits
from manidp.torch.frontend import from_torch, random_images
from manidp.torch.network import padded

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

try:
    import onnx
    import onnxruntime
    from onnx import numpy_helper
except ImportError as error:
    raise MissingExtraError("this needs onnx and onnxruntime; install them with: pip install 'manidp[onnx]'") from error

MAX_BYTES = 2**31
TOLERANCE = 1e-3  # largest difference from ONNX Runtime, which computes in float32, relative to the largest logit
MOST = 2**27  # numbers in one array that is computed from constants

Array = NDArray[Any]
Attributes = Mapping[str, Any]


def from_onnx(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """The network of an ONNX file as a checkpoint: for the engine, gates, training and files.

    The file's one input is float32 (B, 3, H, W), its output (B, classes) the logits, or a softmax of them or the
    logarithm of one, which is left out. size: (H, W), where the file leaves them open. preprocessing, classes: as for
    ``from_torch``. A weight that the file uses twice is two here. Needs the extras "torch" and "onnx".

    Raises FrontendError for a file that is no ONNX or too large, for ops that no op of a graph stands for, all of them
    listed with their nodes, and for a network that differs from what ``from_torch`` or ONNX Runtime makes of it.
    """
    content = _content(Path(path))
    model = _ending_with_logits(_model(Path(path), content))
    image, dims = _image(model, size)
    needed = _needed(model)
    module = _Network(model, _recognised(model, needed), image, dims)
    example = random_images(*dims[1:])
    checkpoint = from_torch(module, example, preprocessing=preprocessing, classes=classes)
    _compare(model, needed, image, checkpoint, example, max(dims[0], 1))
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    told = {"sha256": hashlib.sha256(content).hexdigest(), "opset": opset, "producer": model.producer_name[:100]}
    return replace(checkpoint, provenance={"imported": {"onnx": told}})


def found_in(path: str, *, size: tuple[int, int] | None = None, preprocessing: Preprocessing | None = None) -> Found:
    """The network of an ONNX file as a model that comes from it; see ``from_onnx``."""
    checkpoint = from_onnx(path, size=size, preprocessing=preprocessing)
    return Found(Path(path).stem, Path(path), checkpoint.provenance["imported"]["onnx"]["sha256"], checkpoint)


# ---- the file


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FrontendError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise FrontendError(f"{shown(path)}: more than {MAX_BYTES:,} bytes; an ONNX file has fewer")
    return content


def _model(path: Path, content: bytes) -> ModelProto:
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own
        raise FrontendError(f"{shown(path)}: not an ONNX file") from error
    if not model.graph.node or not model.graph.output:
        raise FrontendError(f"{shown(path)}: not an ONNX file: it holds no network")
    Limits.from_environment().check("nodes", len(model.graph.node), shown(path), FrontendError)
    if model.graph.sparse_initializer:
        raise FrontendError(f"{shown(path)}: sparse weights cannot be read")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise FrontendError(
                f"{shown(path)}: weights lie in another file, which is not read; write one file that holds all, with "
                "torch.onnx.export(..., external_data=False) or onnx.save_model(..., save_as_external_data=False)"
            )
    return model


def _ending_with_logits(model: ModelProto) -> ModelProto:
    """Without the softmax, or the logarithm of one, that makes the file's output."""
    output = model.graph.output[0]
    ending = next((node for node in model.graph.node if output.name in node.output), None)
    if ending is not None and ending.op_type in ("Softmax", "LogSoftmax") and (
        all(attribute.i in (1, -1) for attribute in ending.attribute if attribute.name == "axis")
    ):  # fmt: skip
        output.name = ending.input[0]
    return model


def _image(model: ModelProto, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, int, int]]:
    """Name of the input, and (B, C, H, W); B is 0 where it is open."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise FrontendError(f"a network has one input, the image; this file has {len(inputs)}")
    (image,) = inputs
    if image.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise FrontendError(f"the input {quoted(image.name, 60)} must be float32")
    dims = [int(dim.dim_value) for dim in image.type.tensor_type.shape.dim]
    if len(dims) != 4 or dims[1] != 3:
        raise FrontendError(f"the input is a batch of RGB images (B, 3, H, W); this file's is {tuple(dims)}, 0 if open")
    for given, own in zip(size or (), dims[2:], strict=False):
        if own not in (0, given):
            raise FrontendError(f"the file's network reads {dims[2]}x{dims[3]}; got size={size}")
    height, width = size or (dims[2], dims[3])
    if min(height, width) < 1:
        raise FrontendError("the file leaves height and width of the image open; give size=(H, W)")
    if dims[0] * 3 * height * width > Limits.from_environment().elements:
        raise FrontendError(
            f"the file is for {dims[0]:,} images of {height}x{width} at a time, which is too much; write it for one, "
            "or leave open how many"
        )
    return image.name, (dims[0], 3, height, width)


def _needed(model: ModelProto) -> list[NodeProto]:
    """The nodes that the output depends on, each before those that read it."""
    return _behind(model.graph.node, model.graph.output[0].name)


def _behind(nodes: Sequence[NodeProto], output: str) -> list[NodeProto]:
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waiting, found = [output], set()
    while waiting:
        index = maker.get(waiting.pop())
        if index is not None and index not in found:
            found.add(index)
            waiting += nodes[index].input
    return [nodes[index] for index in sorted(found)]


def _recognised(model: ModelProto, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, each GELU written out, x * (1 + erf(x / sqrt(2))) / 2 in any order, as one node."""
    numbers = {tensor.name: _array(tensor) for tensor in model.graph.initializer if math.prod(tensor.dims) == 1}
    for node in nodes:
        value = node.attribute[0].t if node.op_type == "Constant" and node.attribute else None
        if value is not None and value.data_type and math.prod(value.dims) == 1:
            numbers[node.output[0]] = _array(value)
    maker = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def beside(node: NodeProto | None, kind: str, number: float) -> str | None:
        """The other operand of a sum or product with this number."""
        if node is None or node.op_type != kind or len(node.input) != 2:
            return None
        for one, other in (tuple(node.input), tuple(reversed(node.input))):
            if one in numbers and abs(float(numbers[one].reshape(-1)[0]) - number) < 1e-4:
                return other if kind != "Div" or other == node.input[0] else None
        return None

    found: dict[str, str] = {}  # what a GELU makes -> what it is taken of
    for node in nodes:
        if node.op_type != "Erf":
            continue
        scaled = maker.get(node.input[0])
        x = beside(scaled, "Mul", 0.5**0.5) or beside(scaled, "Div", 2**0.5)
        for above in readers.get(node.output[0], []):
            for first in readers.get(above.output[0], []) if x and beside(above, "Add", 1.0) else []:
                others = [name for name in first.input if name != above.output[0]]
                if first.op_type != "Mul" or len(others) != 1:
                    continue
                if beside(maker.get(others[0]), "Mul", 0.5) == x:
                    found[first.output[0]] = str(x)
                for last in readers.get(first.output[0], []):
                    if (others[0] == x and beside(last, "Mul", 0.5) is not None) or (
                        beside(first, "Mul", 0.5) is not None and last.op_type == "Mul" and x in last.input
                    ):
                        found[last.output[0]] = str(x)
    made = [
        onnx.helper.make_node("Gelu", [found[node.output[0]]], list(node.output), name=node.name)
        if node.output and node.output[0] in found else node
        for node in nodes
    ]  # fmt: skip
    return _behind(made, model.graph.output[0].name)


def _compare(
    model: ModelProto, needed: Sequence[NodeProto], image: str, checkpoint: Checkpoint, example: Tensor, batch: int
) -> None:
    """Whether ONNX Runtime makes the same logits, of nothing but what was imported."""
    used = {name for node in needed for name in node.input}
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for field, kept in (
        (part.graph.node, needed),
        (part.graph.initializer, [one for one in model.graph.initializer if one.name in used]),
        (part.graph.output, [model.graph.output[0]]),
        (part.graph.input, [one for one in model.graph.input if one.name in used]),
        (part.functions, []),
    ):
        copies = [type(one).FromString(one.SerializeToString()) for one in kept]
        del field[:]
        field.extend(copies)
    images = np.repeat(example.numpy(), batch, axis=0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        wanted = np.asarray(session.run(None, {image: images})[0])[:1]
    except Exception as error:  # ONNX Runtime's own
        line = str(error).partition("\n")[0]
        raise FrontendError(f"ONNX Runtime does not run the file: {line[:300]}") from error
    came = reference.run(checkpoint.graph, checkpoint.weights, images[:1].astype(np.float64)).logits
    largest = max(float(np.abs(wanted).max()), 1e-30)
    difference = float(np.abs(came - wanted).max()) / largest
    if not difference <= TOLERANCE:
        raise FrontendError(
            f"the imported network differs from what ONNX Runtime makes of the file by {difference:.1e} of its largest "
            f"logit (at most {TOLERANCE:.0e})"
        )


# ---- the module


class _RefusedError(Exception):
    """What a node does that no op of a graph can, and why."""


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever goes wrong here makes the node one that is refused: files come from outside."""
    try:
        with np.errstate(all="ignore"):
            yield
    except _RefusedError:
        raise
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise _RefusedError(f"it cannot be computed: {type(error).__name__}: {line[:200]}") from error


@dataclass(frozen=True)
class _Step:
    """A node: its name for messages, the values that it reads and makes, and the module that computes it."""

    told: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    path: str


class _Op(nn.Module):
    """One node. ``constants``: inputs that are no weights; weights are parameters, by the name of their place."""

    def __init__(self, kind: str = "", attributes: Attributes | None = None) -> None:
        super().__init__()
        self.kind, self.attributes = kind, dict(attributes or {})
        self.constants: dict[int, Array | None] = {}
        self.places: dict[int, str] = {}
        self.outputs = 1
        self.own: tuple[int, ...] | None = None  # shape of what it reads, for as many images as the file has

    def forward(self, *given: Any) -> Any:
        count = len(given) + len(self.constants) + len(self.places)
        rest = iter(given)
        inputs = [
            getattr(self, self.places[place]) if place in self.places
            else self.constants[place] if place in self.constants else next(rest)
            for place in range(count)
        ]  # fmt: skip
        return _OPS[self.kind](self, *inputs)

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)


class _Network(nn.Module):
    """The nodes one after the other. Raises FrontendError that lists all nodes that cannot be."""

    def __init__(
        self, model: ModelProto, nodes: Sequence[NodeProto], image: str, dims: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self._image, self._output = image, model.graph.output[0].name
        constants: dict[str, Array | None] = {"": None}
        for tensor in model.graph.initializer:
            constants[tensor.name] = _array(tensor)
        self._steps: list[_Step] = []
        refused: list[str] = []
        taken: set[str] = set()
        shapes: set[str] = set()  # values that are known once the image's size is
        for index, node in enumerate(nodes):
            told = f"{short(node.name or node.output[0])}: {short(node.op_type)}"
            try:
                with _refusing():
                    attributes = _attributes(node)
                    if all(name in constants for name in node.input):
                        made = _folded(node.op_type, attributes, [constants[name] for name in node.input])
                        constants |= dict(zip(node.output, made, strict=False))
                        continue
                    if node.domain not in ("", "ai.onnx"):
                        raise _RefusedError(f"an op of {short(node.domain)}, not of ONNX")
                    if node.op_type == "Shape" or all(name in shapes or name in constants for name in node.input):
                        if node.op_type not in ("Shape", *_FOLDED):
                            raise _RefusedError("it cannot be computed of the image's size")
                        shapes |= set(node.output)
                    elif node.op_type not in _OPS:
                        raise _RefusedError(_WHY_NOT.get(node.op_type, "no op of a graph is like it"))
                    op = _Op(node.op_type, attributes)
                    op.outputs = len(node.output)
                    path = self._placed(op, _path(node, index), index, taken)
                    _give(op, {place: constants[name] for place, name in enumerate(node.input) if name in constants})
            except _RefusedError as refusal:
                refused.append(f"{told}: {refusal}")
                constants = {name: value for name, value in constants.items() if name not in node.output}
                continue
            inputs = tuple(name for name in node.input if name not in constants)
            self._steps.append(_Step(told, inputs, tuple(node.output), path))
        if refused:
            count = len(refused)
            raise FrontendError(f"{count} {'node' if count == 1 else 'nodes'} of this file cannot be imported", refused)
        if self._output in constants:
            raise FrontendError("the output does not depend on the image")
        if not any(self._output in step.outputs for step in self._steps):
            raise FrontendError(f"no node makes the output {quoted(self._output, 60)}")
        if dims[0]:  # sizes may be written down for as many images
            with torch.no_grad():
                self._run(torch.zeros(dims), noting=True)

    def _placed(self, op: _Op, path: str, index: int, taken: set[str]) -> str:
        """Where the module is among the others: at its path if that can be one and is free, else by its number."""
        parts = path.split(".")
        plain = all(re.fullmatch(r"\w{1,60}", part, re.ASCII) and not hasattr(_Op(), part) for part in parts)
        if not plain or len(parts) > 20 or any(".".join(parts[:end]) in taken for end in range(1, len(parts) + 1)):
            parts = [f"node_{index}"]
        place: nn.Module = self
        for part in parts[:-1]:
            if part not in place._modules:
                place.add_module(part, _Op())
            place = place._modules[part]  # type: ignore[assignment]
        if parts[-1] in place._modules:  # others are below it
            parts, place = [f"node_{index}"], self
        place.add_module(parts[-1], op)
        whole = ".".join(parts)
        taken.add(whole)
        return whole

    def forward(self, image: Tensor) -> Any:
        return self._run(image)

    def _run(self, image: Tensor, noting: bool = False) -> Any:
        """The output; ``noting``: each op keeps the shape of what it reads."""
        values: dict[str, Any] = {self._image: image}
        for step in self._steps:
            try:
                with _refusing():
                    missing = [name for name in step.inputs if name not in values]
                    if missing:
                        raise _RefusedError(f"it reads {quoted(missing[0], 60)}, which nothing before it makes")
                    inputs = [values[name] for name in step.inputs]
                    op = self.get_submodule(step.path)
                    assert isinstance(op, _Op)
                    if noting and isinstance(inputs[0], Tensor):
                        op.own = tuple(inputs[0].shape)
                    if op.kind != "Shape" and not any(isinstance(one, Tensor) for one in inputs):
                        given = iter(inputs)
                        count = len(inputs) + len(op.constants)
                        every = [op.constants[i] if i in op.constants else next(given) for i in range(count)]
                        made: Any = tuple(_folded(op.kind, op.attributes, every))
                    else:
                        made = op(*inputs)
            except _RefusedError as refusal:
                raise FrontendError("1 node of this file cannot be imported", [f"{step.told}: {refusal}"]) from refusal
            made = made if isinstance(made, tuple) else (made,)
            values |= dict(zip(step.outputs, made, strict=False))
        return values[self._output]


def _path(node: NodeProto, index: int) -> str:
    """What a node is called: after its weight ("layer1.0.conv" of "layer1.0.conv.weight"), or by its own name."""
    weight = node.input[1] if len(node.input) > 1 else ""
    if weight.endswith((".weight", ".gamma")):
        return weight.rpartition(".")[0]
    own = node.name.strip("/").replace("/", ".")
    return own or f"node_{index}"


def _array(tensor: Any) -> Array:
    try:
        array = numpy_helper.to_array(tensor)
    except Exception as error:  # sizes that do not fit the data, kinds that NumPy has not
        raise FrontendError(f"the weights {quoted(tensor.name, 60)} cannot be read") from error
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _attributes(node: NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        if kind in ("GRAPH", "GRAPHS", "SPARSE_TENSOR", "SPARSE_TENSORS", "TYPE_PROTO", "TYPE_PROTOS"):
            raise _RefusedError("a network within a node: what is computed would depend on the image")
        value = onnx.helper.get_attribute_value(attribute)
        found[attribute.name] = (
            value.decode(errors="replace") if isinstance(value, bytes) else
            _array(value) if isinstance(value, onnx.TensorProto) else value
        )  # fmt: skip
    return found


def _give(op: _Op, constants: Mapping[int, Array | None]) -> None:
    """Weights become parameters, as the module takes them; all other constants, single numbers too, stay arrays."""
    prepared = _PREPARED.get(op.kind)
    arrays = dict(constants) if prepared is None else prepared(op, dict(constants))
    for place, array in arrays.items():
        number = array is not None and array.size == 1 and array.ndim < 2 and op.kind in _ARITHMETIC
        if array is not None and array.dtype.kind == "f" and op.kind not in _SETTINGS and not number:
            name = _PLACES.get(op.kind, {}).get(place, f"constant_{place}")
            op.places[place] = name
            op.register_parameter(name, nn.Parameter(torch.from_numpy(np.array(array, np.float32))))
        else:
            op.constants[place] = array


_PLACES = {
    "Conv": {1: "weight", 2: "bias"}, "Gemm": {1: "weight", 2: "bias"}, "MatMul": {1: "weight"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}, "PRelu": {1: "weight"},
    "LayerNormalization": {1: "weight", 2: "bias"},
}  # fmt: skip
_SETTINGS = ("Clip", "Concat", "Dropout", "Max", "Min", "Pad", "Pow")  # their floating constants are no weights
_ARITHMETIC = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}


def _gemm(op: _Op, given: dict[int, Array | None]) -> dict[int, Array | None]:
    weight, bias = given.get(1), given.get(2)
    if 0 in given or weight is None or weight.ndim != 2 or op.get("transA", 0):
        raise _RefusedError("a product of two things that depend on the image, or of a transposed one")
    weight = (weight if op.get("transB", 0) else weight.T) * np.float32(op.get("alpha", 1.0))
    given[1] = weight
    if bias is not None:
        rows = np.broadcast_to(bias, (1, len(weight))) if bias.size <= len(weight) else None
        if rows is None:
            raise _RefusedError("a bias that is not one number a feature")
        given[2] = rows.reshape(-1) * np.float32(op.get("beta", 1.0))
    elif 2 in given:
        del given[2]
    return given


def _matmul(op: _Op, given: dict[int, Array | None]) -> dict[int, Array | None]:
    weight = given.get(1)
    if 0 in given or weight is None or weight.ndim != 2:
        raise _RefusedError("a product of two things that depend on the image, or of a constant from the left")
    return given | {1: np.ascontiguousarray(weight.T)}


_PREPARED: dict[str, Callable[[_Op, dict[int, Array | None]], dict[int, Array | None]]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
}


# ---- ops on tensors


def _sides(op: _Op, x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """Padding (top, left, bottom, right)."""
    how, strides = op.get("auto_pad", "NOTSET"), _strides(op)
    if how == "VALID":
        return 0, 0, 0, 0
    if how in ("SAME_UPPER", "SAME_LOWER"):
        whole = [
            max((-(-size // stride) - 1) * stride + (high - 1) * spread + 1 - size, 0)
            for size, stride, high, spread in zip(x.shape[2:], strides, kernel, dilation, strict=True)
        ]
        less, more = [one // 2 for one in whole], [one - one // 2 for one in whole]
        first, last = (less, more) if how == "SAME_UPPER" else (more, less)
        return first[0], first[1], last[0], last[1]
    top, left, bottom, right = op.get("pads", (0, 0, 0, 0))
    return top, left, bottom, right


def _strides(op: _Op) -> tuple[int, int]:
    down, across = op.get("strides", (1, 1))
    return down, across


def _conv(op: _Op, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    if x.dim() != 4 or not isinstance(weight, Tensor) or weight.dim() != 4:
        raise _RefusedError("a convolution that is not two-dimensional, or whose weights are no constants")
    dilation = tuple(op.get("dilations", (1, 1)))
    x, padding = padded(x, _sides(op, x, weight.shape[2:], dilation), 0.0)
    return F.conv2d(x, weight, bias, _strides(op), padding, dilation, op.get("group", 1))


def _pool(op: _Op, x: Tensor) -> Tensor:
    kernel, dilation, ceil = op.get("kernel_shape", ()), op.get("dilations", (1, 1)), bool(op.get("ceil_mode", 0))
    if x.dim() != 4 or len(kernel) != 2:
        raise _RefusedError("a pooling that is not two-dimensional")
    most = op.kind == "MaxPool"
    sides = _sides(op, x, kernel, dilation)
    if not most and tuple(dilation) != (1, 1):
        raise _RefusedError("an average with dilation")
    strides, half = _strides(op), (kernel[0] // 2, kernel[1] // 2)
    if most or op.get("count_include_pad", 0):
        x, padding = padded(x, sides, -math.inf if most else 0.0, half)
        if most:
            return F.max_pool2d(x, kernel, strides, padding, dilation, ceil)
        return F.avg_pool2d(x, kernel, strides, padding, ceil)
    first, last = sides[:2], sides[2:]
    reached = [
        (size + before + behind - high) // stride + 1
        for size, before, behind, high, stride in zip(x.shape[2:], first, last, kernel, strides, strict=True)
    ]
    if first[0] <= half[0] and first[1] <= half[1] and not (ceil and first != last):
        made = F.avg_pool2d(x, kernel, strides, first, ceil or first != last, False)  # more behind is left out, too
        if ceil or list(made.shape[2:]) == reached:
            return made
    raise _RefusedError(f"an average that leaves out a padding of {sides} (top, left, bottom, right)")


def _batch_norm(op: _Op, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if op.get("training_mode", 0) or not op.get("spatial", 1):
        raise _RefusedError("a normalisation by statistics of the batch at hand")
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, op.get("epsilon", 1e-5))


def _layer_norm(op: _Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[op.get("axis", -1) % x.dim() :]
    shift = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, weight.expand(shape), shift, op.get("epsilon", 1e-5))


def _prelu(op: _Op, x: Tensor, slope: Tensor) -> Tensor:
    if slope.dim() > 1 and slope.numel() != slope.shape[-x.dim() + 1]:
        raise _RefusedError("a slope that is not one number a channel")
    return F.prelu(x, slope.reshape(-1))


def _clip(op: _Op, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    bounds = [op.get("min") if low is None else _number(low), op.get("max") if high is None else _number(high)]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)


def _limited(op: _Op, *inputs: Any) -> Tensor:
    """The largest or smallest of maps and numbers."""
    first: Tensor = next(one for one in inputs if isinstance(one, Tensor))
    x = first
    for other in (one for one in inputs if one is not first):
        if isinstance(other, Tensor):
            x = torch.maximum(x, other) if op.kind == "Max" else torch.minimum(x, other)
        else:
            bound = _number(other)
            x = torch.clamp(x, min=bound) if op.kind == "Max" else torch.clamp(x, max=bound)
    return x


def _power(op: _Op, x: Tensor, exponent: Any) -> Tensor:
    return torch.pow(x, _number(exponent))


def _hard_sigmoid(op: _Op, x: Tensor) -> Tensor:
    alpha, beta = op.get("alpha", 0.2), op.get("beta", 0.5)
    if abs(6 * alpha - 1) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _number(array: Any) -> float:
    if not isinstance(array, np.ndarray) or array.size != 1:
        raise _RefusedError("a bound or an exponent that is not one constant number")
    return float(array.reshape(-1)[0])


def _numbers(array: Any, what: str) -> list[int]:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise _RefusedError(f"{what} that are no constant whole numbers")
    return [int(one) for one in array.reshape(-1)]


def _axes(op: _Op, given: Any, x: Tensor) -> list[int] | None:
    chosen = _numbers(given, "axes") if given is not None else op.get("axes")
    return None if chosen is None else [axis % x.dim() for axis in chosen]


def _reduced(op: _Op, x: Tensor, axes: Any = None) -> Tensor:
    over = _axes(op, axes, x)
    if over is None:
        raise _RefusedError("a mean, sum or maximum over everything")
    reduce: Any = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax}[op.kind]
    made: Tensor = reduce(x, over, keepdim=bool(op.get("keepdims", 1)))
    return made


def _reshape(op: _Op, x: Tensor, shape: Any = None) -> Tensor:
    sizes = _numbers(shape, "sizes") if shape is not None else list(op.get("shape", ()))
    now = tuple(x.shape)
    own = now if op.own is None or (shape is not None and 1 not in op.constants) else op.own
    sizes = [own[place] if size == 0 and not op.get("allowzero", 0) else size for place, size in enumerate(sizes)]
    grown = [axis for axis in range(len(own)) if own[axis] != now[axis]]
    if not grown:
        return x.reshape(sizes)
    # written down for another number of images: the dimension that they go to is where they were before
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(own) // -math.prod(sizes)
    before = math.prod(own[: grown[0]])
    place = next(
        place for place in range(len(sizes))
        if math.prod(sizes[:place]) == before or math.prod(sizes[: place + 1]) > before
    )  # fmt: skip
    if len(grown) > 1 or sizes[place] * now[grown[0]] % own[grown[0]]:
        raise _RefusedError("a reshape across the images of a batch")
    sizes[place] = sizes[place] * now[grown[0]] // own[grown[0]]
    return x.reshape(sizes)


def _expand(op: _Op, x: Tensor, shape: Any) -> Tensor:
    sizes = _numbers(shape, "sizes")
    own = op.own or tuple(x.shape)
    shorter = len(sizes) - x.dim()
    for axis in range(x.dim()):
        if sizes and shorter + axis >= 0 and sizes[shorter + axis] in (1, own[axis]):
            sizes[shorter + axis] = x.shape[axis]
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(sizes)))


def _concat(op: _Op, *parts: Any) -> Tensor:
    """Constant parts are there for as many images as the file has, the same for each."""
    images = next(part for part in parts if isinstance(part, Tensor)).shape[0]

    def repeated(part: Array) -> Tensor:
        if part.ndim < 2 or (part != part[:1]).any():
            raise _RefusedError("constants that are not the same for each image")
        return torch.from_numpy(part[:1].astype(np.float32)).expand(images, *part.shape[1:])

    return torch.cat([repeated(part) if isinstance(part, np.ndarray) else part for part in parts], op.get("axis"))


def _flatten(op: _Op, x: Tensor) -> Tensor:
    axis = op.get("axis", 1)
    if axis % x.dim() != 1:
        raise _RefusedError("flattened together with the batch")
    return x.flatten(1)


def _squeeze(op: _Op, x: Tensor, axes: Any = None) -> Tensor:
    over = _axes(op, axes, x)
    if over is None:
        over = [axis for axis in range(1, x.dim()) if x.shape[axis] == 1]
    return x.squeeze(tuple(over))


def _unsqueeze(op: _Op, x: Tensor, axes: Any = None) -> Tensor:
    chosen = _numbers(axes, "axes") if axes is not None else list(op.get("axes", ()))
    for axis in sorted(one % (x.dim() + len(chosen)) for one in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(op: _Op, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    first = _numbers(starts, "bounds") if starts is not None else list(op.get("starts", ()))
    last = _numbers(ends, "bounds") if ends is not None else list(op.get("ends", ()))
    over = _axes(op, axes, x) or list(range(len(first)))
    step = _numbers(steps, "steps") if steps is not None else [1] * len(first)
    for axis, start, stop, by in zip(over, first, last, step, strict=True):
        begin, end, _ = slice(start, stop, by).indices(x.shape[axis])
        if by < 0:
            x = x.index_select(axis, torch.tensor(list(range(begin, end, by))))
        else:
            x = x[(*[slice(None)] * axis, slice(begin, end, by))]
    return x


def _split(op: _Op, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis = op.get("axis", 0)
    parts = _numbers(sizes, "sizes") if sizes is not None else op.get("split")
    if parts is None:
        count = op.get("num_outputs", 0) or op.outputs
        return tuple(torch.split(x, -(-x.shape[axis] // count), axis))
    return tuple(torch.split(x, list(parts), axis))


def _gather(op: _Op, x: Tensor, index: Any) -> Tensor:
    places, axis = _numbers(index, "places"), op.get("axis", 0)
    if not -x.dim() <= axis < x.dim():
        raise _RefusedError(f"axis {axis} of a tensor that has {x.dim()}")
    size = x.shape[axis]
    outside = [place for place in places if not -size <= place < size]
    if outside or not places:
        raise _RefusedError(f"it picks place {outside[0]} of {size}" if outside else "it picks nothing")
    if index.ndim == 0:
        return x.select(axis, places[0])
    made = x.index_select(axis, torch.tensor([place % size for place in places]))
    axis %= x.dim()
    return made.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _pad(op: _Op, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    if op.get("mode", "constant") != "constant":
        raise _RefusedError(f"padding of mode {op.get('mode')!r:.40}")
    given = _numbers(pads, "sizes") if pads is not None else list(op.get("pads", ()))
    over = _axes(op, axes, x) or list(range(x.dim()))
    if len(given) != 2 * len(over):
        raise _RefusedError("padding of another number of axes")
    sizes = [0] * (2 * x.dim())
    for place, axis in enumerate(over):
        sizes[2 * (x.dim() - 1 - axis)] = given[place]
        sizes[2 * (x.dim() - 1 - axis) + 1] = given[len(over) + place]
    if any(sizes[-2:]):
        raise _RefusedError("padding of the batch")
    return F.pad(x, sizes, value=float(value) if value is not None else float(op.get("value", 0.0)))


def _cast(op: _Op, x: Tensor) -> Tensor:
    if op.get("to") not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        raise _RefusedError("a feature map as whole numbers")
    return x


def _arithmetic(op: _Op, x: Any, y: Any) -> Tensor:
    made: Tensor = _ARITHMETIC[op.kind](*(_number(one) if isinstance(one, np.ndarray) else one for one in (x, y)))
    return made


def _sum(op: _Op, *inputs: Tensor) -> Tensor:
    return sum(inputs[1:], inputs[0])


_OPS: dict[str, Callable[..., Any]] = {
    "Conv": _conv, "MaxPool": _pool, "AveragePool": _pool, "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Gemm": lambda op, x, weight, bias=None: F.linear(x, weight, bias),
    "MatMul": lambda op, x, weight: F.linear(x, weight),
    "GlobalAveragePool": lambda op, x: F.adaptive_avg_pool2d(x, 1),
    "GlobalMaxPool": lambda op, x: torch.amax(x, (2, 3), keepdim=True),
    "ReduceMean": _reduced, "ReduceSum": _reduced, "ReduceMax": _reduced,
    "Relu": lambda op, x: F.relu(x), "Sigmoid": lambda op, x: torch.sigmoid(x), "Tanh": lambda op, x: torch.tanh(x),
    "HardSigmoid": _hard_sigmoid, "HardSwish": lambda op, x: F.hardswish(x), "Softplus": lambda op, x: F.softplus(x),
    "Mish": lambda op, x: F.mish(x), "LeakyRelu": lambda op, x: F.leaky_relu(x, op.get("alpha", 0.01)),
    "Elu": lambda op, x: F.elu(x, op.get("alpha", 1.0)), "PRelu": _prelu, "Clip": _clip,
    "Gelu": lambda op, x: F.gelu(x, approximate=op.get("approximate", "none")),
    "Swish": lambda op, x: F.silu(x) if op.get("alpha", 1.0) == 1 else x * torch.sigmoid(x * op.get("alpha")),
    **dict.fromkeys(_ARITHMETIC, _arithmetic), "Sum": _sum, "Neg": lambda op, x: -x,
    "Abs": lambda op, x: torch.abs(x), "Celu": lambda op, x: F.celu(x, op.get("alpha", 1.0)),
    "Selu": lambda op, x: op.get("gamma", 1.0507009873554805) * F.elu(x, op.get("alpha", 1.6732632423543772)),
    "Sqrt": lambda op, x: torch.sqrt(x),
    "Max": _limited, "Min": _limited, "Pow": _power, "Expand": _expand, "Concat": _concat,
    "Split": _split, "Slice": _slice, "Gather": _gather,
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Pad": _pad,
    "Transpose": lambda op, x: x.permute(op.get("perm", tuple(reversed(range(x.dim()))))),
    "Identity": lambda op, x: x, "Dropout": lambda op, x, *_: x, "Cast": _cast,
    "Shape": lambda op, x: np.array(tuple(x.shape)[op.get("start", 0) : op.get("end")], np.int64),
}  # fmt: skip

_WHY_NOT = {
    **dict.fromkeys(("Softmax", "LogSoftmax"), "a softmax that is not the network's end"),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"),
                    "a normalisation by statistics of the image at hand"),
}  # fmt: skip


# ---- ops on constants


def _bounded(*shapes: Sequence[int]) -> None:
    """Before it is made: whether what these shapes make together is not too large."""
    try:
        whole = np.broadcast_shapes(*(tuple(shape) for shape in shapes))
    except ValueError as error:
        raise _RefusedError("shapes that do not fit") from error
    if math.prod(whole) > MOST:
        raise _RefusedError(f"a constant of more than {MOST:,} numbers")


def _elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    def fold(attributes: Attributes, *inputs: Array) -> Array:
        _bounded(*(one.shape for one in inputs))
        return function(*inputs)

    return fold


def _made_constant(attributes: Attributes) -> Array:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in attributes:
            kind = np.float32 if "float" in name else np.int64 if "int" in name else None
            return np.asarray(attributes[name], kind)
    raise _RefusedError("a constant that is no number")


def _filled(attributes: Attributes, shape: Array) -> Array:
    sizes = [int(one) for one in shape]
    _bounded(sizes)
    return np.full(sizes, np.asarray(attributes.get("value", np.float32(0))).reshape(-1)[0])


def _repeated(attributes: Attributes, x: Array, shape: Array) -> Array:
    sizes = [int(one) for one in shape]
    _bounded(x.shape, sizes)
    return np.array(np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(sizes))))


def _cut(attributes: Attributes, x: Array, *given: Array) -> Array:
    starts, ends, *rest = given if given else (np.array(attributes["starts"]), np.array(attributes["ends"]))
    axes = rest[0] if rest else np.array(attributes.get("axes", range(len(starts))))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts), np.int64)
    for axis, start, stop, by in zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        x = x[(*[slice(None)] * (axis % x.ndim), slice(start, stop, by))]
    return x


def _joined(attributes: Attributes, *parts: Array) -> Array:
    if sum(part.size for part in parts) > MOST:
        raise _RefusedError(f"a constant of more than {MOST:,} numbers")
    return np.concatenate(parts, attributes.get("axis", 0))


def _shaped(attributes: Attributes, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(shape.tolist())])


def _without(attributes: Attributes, x: Array, axes: Array | None = None) -> Array:
    chosen = axes.tolist() if axes is not None else attributes.get("axes")
    return np.squeeze(x) if chosen is None else np.squeeze(x, tuple(chosen))


def _with(attributes: Attributes, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, tuple(axes.tolist() if axes is not None else attributes.get("axes", ())))


_KINDS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64, onnx.TensorProto.INT32: np.int32,
          onnx.TensorProto.FLOAT16: np.float32, onnx.TensorProto.DOUBLE: np.float32,
          onnx.TensorProto.BOOL: np.bool_}  # fmt: skip


def _as_kind(attributes: Attributes, x: Array) -> Array:
    kind = _KINDS.get(attributes.get("to", 0))
    if kind is None:
        raise _RefusedError("a constant of another kind of number")
    return x.astype(kind)


_FOLDED: dict[str, Callable[..., Array]] = {
    "Constant": _made_constant, "ConstantOfShape": _filled, "Expand": _repeated, "Slice": _cut, "Concat": _joined,
    "Reshape": _shaped, "Squeeze": _without, "Unsqueeze": _with, "Cast": _as_kind,
    "Identity": lambda attributes, x: x,
    "Shape": lambda attributes, x: np.array(x.shape, np.int64),
    "Gather": lambda attributes, x, index: np.take(x, index, attributes.get("axis", 0)),
    "Transpose": lambda attributes, x: np.transpose(x, attributes.get("perm")),
    "Add": _elementwise(np.add), "Sub": _elementwise(np.subtract), "Mul": _elementwise(np.multiply),
    "Div": lambda attributes, x, y: _elementwise(np.floor_divide if x.dtype.kind in "iu" else np.divide)({}, x, y),
    "Equal": _elementwise(np.equal), "Where": _elementwise(np.where), "Max": _elementwise(np.maximum),
    "Min": _elementwise(np.minimum), "Sqrt": _elementwise(np.sqrt),
    "Neg": _elementwise(np.negative), "Reciprocal": _elementwise(np.reciprocal),
}  # fmt: skip


def _folded(kind: str, attributes: Attributes, inputs: Sequence[Array | None]) -> list[Array]:
    """What a node makes of constants."""
    fold = _FOLDED.get(kind)
    if fold is None:
        raise _RefusedError("of constants alone, and not known")
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return [np.asarray(fold(attributes, *inputs))]
