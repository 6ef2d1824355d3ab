"""Mutants of the files that manidp reads: a number names a mutant, and the same number makes the same bytes.

The mutators know the structure of a file, so that most mutants are wrong in one place and come far: a network whose
nodes have other names, fields or inputs usually gets tensors that fit it. ``spoiled`` knows nothing and works on any
bytes, ``spoiled_json`` on any JSON data.
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

from manidp.errors import ManiDPError
from manidp.gating.manidp import head
from manidp.gating.place import with_gates
from manidp.gating.version1 import graph_of_version_1
from manidp.graph import (
    OPS,
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Linear,
    Multiply,
    Pool,
    Shuffle,
    Slice,
    graph_from_json,
)
from manidp.models import resnet

Json = Any
Tensors = dict[str, tuple[str, list[Any], bytes]]  # name -> safetensors' dtype, shape, content

# What a name may be: like names of our own, of torch, of ONNX, of files, or like none at all.
NAMES = (
    "image", "logits", "g list", "g mean", "g hidden", "g saliency", "g average", "g kept", "g.list", "g.mean",
    "g.fc1", "g.fc1.weight", "g.threshold", "g.gated", "a average", "a pooled", "a.pooled", "a.weight",
    "weight", "bias", "forward", "graph", "training", "momentum", "parameters", "weights", "load", "state_dict",
    "_modules", "__metadata__", "__class__", "__init__", "__dict__", "self", "run", "main", "entry", "printf",
    "malloc", "llvm.trap", "%0", "@run", "\\00", '"', "'", "<script>", "&amp;", "{}", "%s", "a b", "a/b",
    "../a", "/etc/passwd", "-", "--help", ".", "..", "...", ".a", "a.", "a..b", "0", "1e400", "None", "null",
    "true", "ä", "Łódź", "名", "a\u0301", "\u202e", "\u0000", "\n", "\r", "\t", "\x1b[2J", "\ud800", "\udfff",
    "\U0001f600", "", " ", "a" * 255, "a" * 5000, "network.a", "_backbone.a", "optimizer.a", "moments.a", "a:0",
    "a:mean", "value a", "model.safetensors",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1000, 4096, 5000, 20_000, 32_000,
    65_535, 65_536, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    -2, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-5, 1e-38, 1e-45, 1e-320, 1e38, 3.5e38, 1e308, -1e-320, 1.5,
    math.inf, -math.inf, math.nan,
)  # fmt: skip
THINGS: tuple[Json, ...] = (
    None,
    True,
    False,
    "",
    "relu",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0] * 70,
    "a",
    b"".decode(),
)


def nested(depth: int) -> Json:
    """Lists in lists."""
    value: Json = []
    for _ in range(depth):
        value = [value]
    return value


@cache
def networks() -> tuple[Graph, ...]:
    """What the mutants of checkpoints are made of: small, and together with every type of node."""
    every = Graph((
        Input(name="image", dims=(3, 9, 7)),
        Conv(name="a", inputs=("image",), channels=6, kernel=3, stride=1, groups=3, bias=True),
        BatchNorm(name="b", inputs=("a",), eps=1e-3),
        Activation(name="c", inputs=("b",), kind="hardswish"),
        *head("g", "c", 8, 4),
        Conv(name="h", inputs=("c",), channels=8, kernel=1, padding=0),
        BatchNorm(name="i", inputs=("h",)),
        Activation(name="r", inputs=("i",)),
        Multiply(name="m", inputs=("r", "g")),
        Pool(name="p", inputs=("m",), kind="max", kernel=3, stride=2, padding=1),
        Conv(name="s", inputs=("m",), channels=8, stride=2),
        Add(name="t", inputs=("p", "s")),
        Slice(name="q", inputs=("t",), start=2, stop=6),
        Shuffle(name="d", inputs=("q",), groups=2),
        Concat(name="u", inputs=("t", "d", "q")),
        GlobalPool(name="v", inputs=("u",)),
        Linear(name="w", inputs=("v",), features=16),
        Activation(name="x", inputs=("w",), kind="sigmoid"),
        Multiply(name="y", inputs=("u", "x")),
        Pool(name="z", inputs=("y",), kind="average", kernel=2, stride=2),
        Flatten(name="f", inputs=("z",)),
        Linear(name="out", inputs=("f",), features=3, bias=False),
    ), "out")  # fmt: skip
    chain = Graph((
        Input(name="image", dims=(3, 5, 5)),
        Conv(name="a", inputs=("image",), channels=4),
        Activation(name="b", inputs=("a",), kind="relu6"),
        GlobalPool(name="c", inputs=("b",), kind="max"),
        Linear(name="out", inputs=("c",), features=2),
    ), "out")  # fmt: skip
    gated = with_gates(resnet(8, num_classes=3, width=2, image=(3, 8, 8)))
    return every, chain, with_gates(chain, ["a"]), gated


def tensors_of(graph: Graph, rng: random.Random) -> Tensors:
    """Weights that fit a graph and keep values near 1."""
    made: Tensors = {}
    draw = np.random.default_rng(rng.randrange(2**32))
    for node in graph.nodes:
        for local, shape in node.parameters(*graph.input_shapes(node)).items():
            if local in ("moving_variance", "gamma", "fc2.bias"):
                value = draw.uniform(0.5, 1.5, shape)
            elif local == "threshold":
                value = np.full(shape, rng.choice([0.0, 0.5, 0.9, 100.0]))
            else:
                value = draw.normal(size=shape) / math.sqrt(math.prod(shape[1:]))
            made[f"{node.name}.{local}"] = ("F32", list(shape), np.asarray(value, "<f4").tobytes())
    return made


def safetensors_file(tensors: Tensors, meta: Json, spoil: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """A safetensors file, as much of one as its parts allow; ``spoil`` may change the header before it is written."""
    text = meta if isinstance(meta, str) else json.dumps(meta)
    header: dict[str, Any] = {"__metadata__": {"manidp": text}}
    content = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    if spoil is not None:
        spoil(header)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + content


def checkpoint_mutant(seed: int) -> bytes:
    """A checkpoint with one to three things wrong or odd: graph, names, tensors, header or bytes."""
    rng = random.Random(f"checkpoint {seed}")
    graph = rng.choice(networks())
    described = json.loads(json.dumps(graph.to_json()))
    height, width = graph.input.dims[1:]
    meta: Json = {
        "version": rng.choice((1, 2)),
        "points": [],
        "graph": described,
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "size": [height, width]},
        "classes": [f"class {i}" for i in range(graph.num_classes)],
        "provenance": {"seed": seed},
    }
    tensors = tensors_of(graph, rng)
    prefix = "" if meta["version"] == 1 else "weights/"
    if prefix and graph.thresholds and rng.random() < 0.5:
        meta["points"] = [{"name": "low", "macs": 1000.0, "accuracy": None}]
    kind = rng.choice(("names", "names", "graph", "graph", "graph", "json", "tensors", "header", "text", "bytes"))
    if kind in ("names", "graph"):
        for _ in range(rng.randint(1, 3)):
            rng.choice((_rename,) if kind == "names" else _GRAPH_CHANGES)(rng, described)
        if rng.random() < 0.9:
            tensors = _fitting(meta, rng) or tensors
    elif kind == "json":
        meta = spoiled_json(rng, meta)
        if rng.random() < 0.5 and isinstance(meta, dict):
            tensors = _fitting(meta, rng) or tensors
    elif kind == "tensors":
        rng.choice(_TENSOR_CHANGES)(rng, tensors)
    tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
    if isinstance(meta, dict) and meta.get("points"):
        tensors |= {f"points/0/{name}": tensors[f"weights/{name}"] for name in graph.thresholds
                    if f"weights/{name}" in tensors}  # fmt: skip
    text = json.dumps(meta)
    if kind == "text":
        text = _spoiled_text(rng, text)
    data = safetensors_file(tensors, text, (lambda header: _spoil_header(rng, header)) if kind == "header" else None)
    return spoiled(rng, data) if kind == "bytes" else data


def _fitting(meta: dict[str, Any], rng: random.Random) -> Tensors | None:
    """Tensors, size of images and class names that fit the graph of a header, if it is one and small."""
    try:
        read = graph_of_version_1 if meta.get("version") == 1 else graph_from_json
        graph = read(meta.get("graph"))
    except (ManiDPError, ArithmeticError, ValueError, TypeError, AttributeError, KeyError):
        return None  # the reader's own errors are the tests' concern, not the mutator's
    if sum(math.prod(shape) for shape in graph.parameters.values()) > 2**20 or graph.num_classes > 1000:
        return None
    if isinstance(meta.get("preprocessing"), dict):
        meta["preprocessing"]["size"] = list(graph.input.dims[1:])
    meta["classes"] = [f"class {i}" for i in range(graph.num_classes)]
    return tensors_of(graph, rng)


def _rename(rng: random.Random, graph: dict[str, Any]) -> None:
    """A node gets another name, and those that read it follow; now and then made of another node's name."""
    nodes = graph["nodes"]
    old, other = rng.choice(nodes)["name"], rng.choice(nodes)["name"]
    tails = (" list", " mean", " hidden", " saliency", " average", ".weight", ".fc1", ".gated", ".a", "", ":0", " ")
    new = rng.choice(NAMES) if rng.random() < 0.6 else other + rng.choice(tails)
    for node in nodes:
        if node["name"] == old:
            node["name"] = new
        if rng.random() < 0.98 and isinstance(node.get("inputs"), list):
            node["inputs"] = [new if source == old else source for source in node["inputs"]]
    if graph.get("output") == old:
        graph["output"] = new


def _change_field(rng: random.Random, graph: dict[str, Any]) -> None:
    node = rng.choice(graph["nodes"])
    kind = OPS.get(node.get("op", ""))
    fields = [name for name in getattr(kind, "__dataclass_fields__", {}) if name not in ("name", "inputs")] or ["eps"]
    name = rng.choice(fields)
    small = rng.random() < 0.6
    if name == "dims":
        node[name] = [rng.choice((3, 3, 1, 4)), *(rng.choice(range(1, 40) if small else NUMBERS) for _ in range(2))]
    elif name == "kind":
        node[name] = rng.choice(("relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "average", "max"))
    elif name in ("bias", "count_include_pad", "use_global_stats"):
        node[name] = not node.get(name)
    else:
        node[name] = rng.choice(range(1, 10) if small and name != "eps" else NUMBERS)


def _insert(rng: random.Random, graph: dict[str, Any]) -> None:
    """A new node between a value and one of its readers, or all of them."""
    nodes = graph["nodes"]
    source, reader = rng.choice(nodes)["name"], rng.choice(nodes)
    new = rng.choice(NAMES) if rng.random() < 0.3 else f"n{rng.randrange(10**6)}"
    kinds: tuple[dict[str, Any], ...] = (
        {"op": "Activation", "kind": rng.choice(("relu", "silu", "sigmoid", "hardsigmoid"))},
        {"op": "BatchNorm"},
        {"op": "LayerNorm"},
        {"op": "Conv", "channels": rng.choice((1, 3, 8, 17)), "kernel": rng.choice((1, 3)), "padding": 1},
        {"op": "Add", "inputs": [source] * rng.choice((2, 3, 64))},
        {"op": "Concat", "inputs": [source] * rng.choice((2, 3, 64))},
        {"op": "Multiply", "inputs": [source, source]},
        {"op": "Pool", "kind": "max", "kernel": 3, "stride": 1, "padding": 1},
        {"op": "Pool", "kind": "average", "kernel": 2, "stride": rng.choice((1, 2))},
        {"op": "Pool", "kind": "average", "kernel": 3, "stride": 1, "padding": 1, "count_include_pad": False},
        {"op": "GlobalPool"},
        {"op": "Flatten"},
        {"op": "Linear", "features": rng.choice((1, 4, 16))},
        {"op": "Gate", "channels": rng.choice((4, 8)), "hidden": 3},
        {"op": "Clip", "high": rng.choice((1, 6.5, 1e-3))},
        {"op": "Select", "rule": rng.choice(("threshold", "constant")), "gain": rng.choice(("score", "one"))},
        {"op": "Scatter", "channels": rng.choice((4, 9, 20)), "at": list(range(rng.choice((3, 4, 8))))},
    )  # fmt: skip
    node = {"name": new, "inputs": [source], **rng.choice(kinds)}
    readers = nodes if rng.random() < 0.5 else [reader]
    for other in readers:
        other["inputs"] = [new if name == source else name for name in other.get("inputs", [])]
    nodes.insert(rng.randint(0, len(nodes)), node)


def _chain(rng: random.Random, graph: dict[str, Any]) -> None:
    """Many nodes one after the other, each made of the one before, some of them doubling what they read."""
    nodes = graph["nodes"]
    source = rng.choice(nodes)["name"]
    count = rng.choice((3, 20, 70, 300))
    kind = rng.choice(("Activation", "Add", "Concat", "Multiply", "BatchNorm", "Pool"))
    readers = [node for node in nodes if source in node.get("inputs", [])]
    for index in range(count):
        many = rng.choice((2, 2, 64)) if kind in ("Add", "Concat") else 2 if kind == "Multiply" else 1
        new = {"op": kind, "name": f"chain{index}", "inputs": [source] * many}
        nodes.append(new | ({"kind": "max", "kernel": 3, "stride": 1, "padding": 1} if kind == "Pool" else {}))
        source = new["name"]
    for node in readers:
        node["inputs"] = [source, *node["inputs"][1:]]
    if rng.random() < 0.5:
        nodes.reverse()


def _rewire(rng: random.Random, graph: dict[str, Any]) -> None:
    node = rng.choice(graph["nodes"])
    if node.get("inputs"):
        node["inputs"][rng.randrange(len(node["inputs"]))] = rng.choice(graph["nodes"])["name"]


def _drop(rng: random.Random, graph: dict[str, Any]) -> None:
    """A node is gone; its readers read what it read."""
    nodes = graph["nodes"]
    gone = nodes.pop(rng.randrange(len(nodes)))
    for node in nodes:
        node["inputs"] = [
            other for name in node.get("inputs", [])
            for other in ((gone.get("inputs") or [name])[:1] if name == gone["name"] else [name])
        ]  # fmt: skip


def _shuffle(rng: random.Random, graph: dict[str, Any]) -> None:
    rng.shuffle(graph["nodes"])


_GRAPH_CHANGES = (
    _rename,
    _change_field,
    _change_field,
    _change_field,
    _insert,
    _insert,
    _chain,
    _rewire,
    _drop,
    _shuffle,
)


def _change_value(rng: random.Random, tensors: Tensors) -> None:
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    values = np.frombuffer(data, "<f4").copy()
    values[rng.randrange(len(values))] = rng.choice((0, -0.0, 1, -1, 1e-40, 1e9, 1e30, 3e38, -3e38, math.nan, math.inf))
    tensors[name] = (dtype, shape, values.tobytes())


def _change_shape(rng: random.Random, tensors: Tensors) -> None:
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    shape = list(shape)
    choice = rng.randrange(4)
    if choice == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
    elif choice == 1:
        shape.insert(rng.randint(0, len(shape)), rng.choice((0, 1, 2**63, 2**64, -1)))
    elif choice == 2:
        data = data[: rng.randrange(len(data))]
    else:
        shape.reverse()
    tensors[name] = (dtype, shape, data)


def _change_dtype(rng: random.Random, tensors: Tensors) -> None:
    name = rng.choice(list(tensors))
    _, shape, data = tensors[name]
    dtype = rng.choice(("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "X" * 1000))
    tensors[name] = (dtype, shape, data)


def _rename_tensor(rng: random.Random, tensors: Tensors) -> None:
    tensors[rng.choice(NAMES)] = tensors.pop(rng.choice(list(tensors)))


def _add_tensor(rng: random.Random, tensors: Tensors) -> None:
    tensors[rng.choice(NAMES)] = ("F32", [2], b"\0" * 8)


_TENSOR_CHANGES = (_change_value, _change_value, _change_shape, _change_dtype, _rename_tensor, _add_tensor)


def _spoil_header(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(list(header))
    header[name] = spoiled_json(rng, header[name])


def spoiled_json(rng: random.Random, value: Json) -> Json:
    """JSON data with one place changed, removed, doubled or put elsewhere."""
    places = list(_places(value))
    if not places:
        return rng.choice(THINGS)
    holder, key = rng.choice(places)
    choice = rng.randrange(6)
    if choice == 0:
        del holder[key]
    elif choice == 1:
        holder[key] = rng.choice(NUMBERS)
    elif choice == 2:
        holder[key] = rng.choice(NAMES)
    elif choice == 3:
        holder[key] = rng.choice((*THINGS, nested(rng.choice((5, 200, 900)))))
    elif choice == 4 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 2, 70))
    elif isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    else:
        other, place = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    return value


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def _spoiled_text(rng: random.Random, text: str) -> str:
    """JSON text that no JSON data would give: keys twice, endless numbers, deep nesting, half of a pair, or cut."""
    at = text.find(rng.choice(('"version"', '"classes"', '"nodes"', '"seed"', '"mean"')))
    choice = rng.randrange(7)
    if choice == 0:
        return text[:at] + text[at : text.find(",", at) + 1] + text[at:]
    if choice == 1:
        return text.replace("0.5", rng.choice(("1e400", "1" + "0" * 5000, "NaN", "-Infinity", "1e-400", "0" * 9)), 1)
    if choice == 2:
        depth = rng.choice((100, 1000, 100_000))
        return text.replace('"seed":', '"deep":' + "[" * depth + "]" * depth + ',"seed":', 1)
    if choice == 3:
        return text.replace("class 0", rng.choice(("\\ud800", "\\udc00\\ud800", "\\u0000", "\\uD83D")), 1)
    if choice == 4:
        return text[: rng.randrange(len(text))]
    if choice == 5:
        return text + rng.choice(("}", ",", "\x00", " " * 10**5, text))
    return text.replace(rng.choice("{}[]:,"), rng.choice("{}[]:,"), rng.randint(1, 3))


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """Any bytes with some flipped, cut out, doubled, overwritten by lengths, or others put in."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(made) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(256))  # heads are what readers steer by
        choice = rng.randrange(6)
        if choice == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif choice == 1 and at < len(made):
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif choice == 2:
            del made[at : at + rng.choice((1, 2, 8, 100, len(made)))]
        elif choice == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 100))]
        elif choice == 4:
            made[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)))
        else:
            made[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        if not made:
            break
    return bytes(made)


def varint(number: int) -> bytes:
    number %= 2**64
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protobuf message: bytes, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def ckpt_value(name: bytes, dims: Iterable[int], kind: bytes, content: bytes) -> bytes:
    tensor = b"".join(field(1, dim) for dim in dims) + field(2, kind) + field(3, content)
    return field(1, field(1, name) + field(2, tensor))


@cache
def _ckpt_values(gated: bool) -> tuple[tuple[bytes, tuple[int, ...], bytes, bytes], ...]:
    """Name, dims, type and content of each value."""
    graph = resnet(8, num_classes=3, width=2)
    tensors = tensors_of(with_gates(graph) if gated else graph, random.Random(0))
    return tuple(
        (name.encode(), tuple(shape), b"Float32", data)
        for name, (_, shape, data) in tensors.items()
        if not name.endswith(".threshold")
    )


_encoded = lru_cache(1000)(ckpt_value)  # most values of a mutant are those of all others


def ckpt_mutant(seed: int) -> bytes:
    """A .ckpt with one to three things wrong or odd: values, names, dims, types, lengths, checksum or bytes."""
    rng = random.Random(f"ckpt {seed}")
    values: list[list[Any]] = [list(value) for value in _ckpt_values(rng.random() < 0.5)]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        value = rng.choice(values)
        choice = rng.randrange(8)
        if choice == 0:
            value[0] = rng.choice(NAMES).encode("utf-8", "surrogatepass")
        elif choice == 1:
            dims = (0, 1, 2, 3, 2**31, 2**40, 2**63, 2**64 - 1)
            value[1] = tuple(rng.choice(dims) for _ in range(rng.choice((0, 1, 2, 4, 40))))
        elif choice == 2:
            value[2] = rng.choice(
                (b"Float16", b"Float64", b"BFloat16", b"Int4", b"str", b"Bool", b"Int64", b"", b"X" * 5000)
            )
        elif choice == 3:
            value[3] = spoiled(rng, value[3] or b"\0")
        elif choice == 4:
            values.insert(rng.randrange(len(values)), list(value))
        elif choice == 5:
            values.remove(value)
        elif choice == 6:  # a head for very many classes, of which no byte need be there
            value[1], value[3] = (rng.choice((2**20, 2**40, 2**62)), 0), b""
        else:
            prefix = rng.choice((b"network.", b"_backbone.", b"moments."))
            for each in values:
                each[0] = prefix + each[0]
        if not values:
            break
    data = b"".join(_encoded(*value) for value in values)
    if rng.random() < 0.2:
        data += b"crc_num" + zlib.crc32(data).to_bytes(10, "big")
    return spoiled(rng, data) if rng.random() < 0.5 else data
