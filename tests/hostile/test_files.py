"""No file costs more than a second and 200 MB, or ends in anything but a network or one line that says why not."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.campaign import KINDS, try_file, try_mutant
from hostile.mutate import ckpt_value, nested, networks, safetensors_file, tensors_of
from manidp.errors import CheckpointError, CkptError
from manidp.formats.checkpoint import load_checkpoint
from manidp.formats.ckpt import read_ckpt

GRAPH = networks()[3]


def header() -> dict[str, Any]:
    return {
        "version": 1,
        "graph": json.loads(json.dumps(GRAPH.to_json())),
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": [8, 8]},
        "classes": ["a", "b", "c"],
        "provenance": {"seed": 7},
    }


def node(meta: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in meta["graph"]["nodes"] if item["op"] == kind)
    return found


def renamed(meta: dict[str, Any], name: str) -> None:
    for each in meta["graph"]["nodes"]:
        each["inputs"] = [name if source == "relu_1" else source for source in each.get("inputs", [])]
        each["name"] = name if each["name"] == "relu_1" else each["name"]


CHANGED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "nodes 5": ("a list 'nodes'", lambda m: m["graph"].update(nodes=5)),
    "nodes null": ("a list 'nodes'", lambda m: m["graph"].update(nodes=None)),
    "nodes a text": ("a list 'nodes'", lambda m: m["graph"].update(nodes="abc")),
    "nodes of null": ("node 0 is not an object", lambda m: m["graph"].update(nodes=[None])),
    "eps a whole number": ("'eps' must be of type float", lambda m: node(m, "BatchNorm").update(eps=10**400)),
    "eps too small": ("an eps that is a positive float32", lambda m: node(m, "BatchNorm").update(eps=1e-320)),
    "eps zero": ("an eps that is a positive float32", lambda m: node(m, "BatchNorm").update(eps=0)),
    "eps negative": ("an eps that is a positive float32", lambda m: node(m, "BatchNorm").update(eps=-1.0)),
    "a layer norm's eps": (
        "an eps that is a positive float32",
        lambda m: node(m, "BatchNorm").update(op="LayerNorm", eps=0),
    ),
    "a saliency limit": ("'high' must be of type float", lambda m: node(m, "Clip").update(high=3.5e38)),
    "std tiny": ("positive stds", lambda m: m["preprocessing"].update(std=[1, 1e-320, 1])),
    "std small": ("more than a float32 holds", lambda m: m["preprocessing"].update(std=[1, 2e-38, 1], mean=[9, 9, 9])),
    "std zero": ("positive stds", lambda m: m["preprocessing"].update(std=[1, 0, 1])),
    "std negative": ("positive stds", lambda m: m["preprocessing"].update(std=[1, 1, -1])),
    "std endless": ("std must be 3 numbers", lambda m: m["preprocessing"].update(std=[1, 10**400, 1])),
    "size": ("size must be 2 numbers", lambda m: m["preprocessing"].update(size=[10**400, 8])),
    "a node's half pair": ("half of a surrogate pair", lambda m: renamed(m, "a\ud800")),
    "a class's half pair": ("half of a surrogate pair", lambda m: m["classes"].__setitem__(0, "\udfff")),
    "a half pair of provenance": ("half of a surrogate pair", lambda m: m["provenance"].update(x=["\ud800"])),
    "a half pair as a key": ("half of a surrogate pair", lambda m: m["provenance"].update({"\ud800": 1})),
    "a node's endless name": ("1 to 255 printable characters", lambda m: renamed(m, "a" * 10**6)),
    "a node's control characters": ("1 to 255 printable characters", lambda m: renamed(m, "\x1b[2J")),
    "a node's space": ("1 to 255 printable characters", lambda m: renamed(m, "a ")),
    "a class's endless name": ("at most 1000 characters", lambda m: m["classes"].__setitem__(0, "a" * 10**6)),
    "nested provenance": ("nests deeper than 64", lambda m: m["provenance"].update(x=nested(100))),
    "many values": ("has 1,[0-9,]* values; the limit is 1,000,000", lambda m: m["provenance"].update(x=[0] * 10**6)),
    "many lists": ("values; the limit is 1,000,000", lambda m: m["provenance"].update(x=[[]] * 10**6)),
    "an image": ("1,200,000,000 numbers", lambda m: node(m, "Input").update(dims=[3, 20_000, 20_000])),
    "padding": ("padding of 1,000,000,000", lambda m: node(m, "Conv").update(padding=10**9)),
    "a version": ("of version 1000000", lambda m: m.update(version=10**100)),
}
TEXTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "1e400": ("is not plain JSON", lambda text: text.replace("0.25", "1e400", 1)),
    "NaN": ("is not plain JSON", lambda text: text.replace("0.25", "NaN", 1)),
    "endless digits": ("is not plain JSON", lambda text: text.replace("0.25", "9" * 10**5, 1)),
    "a key twice": ("the key 'version' is given twice", lambda text: '{"version":1,' + text[1:]),
    "a key twice within": ("the key 'seed' is given twice", lambda text: text.replace('{"seed"', '{"seed":1,"seed"')),
    "deep": (
        "is not plain JSON",
        lambda text: text.replace('{"seed"', '{"x":' + "[" * 10**5 + "]" * 10**5 + ',"seed"'),
    ),
    "no JSON": ("is not plain JSON", lambda text: text[:-1]),
}


def assert_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    assert try_file("checkpoint", data, path) == "refused"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("what", CHANGED)
def test_a_header_that_holds_what_cannot_be(what: str, tmp_path: Path) -> None:
    message, change = CHANGED[what]
    meta = header()
    change(meta)
    assert_refused(tmp_path, safetensors_file(tensors_of(GRAPH, random.Random(0)), meta), message)


@pytest.mark.parametrize("what", TEXTS)
def test_a_header_that_is_no_plain_json(what: str, tmp_path: Path) -> None:
    message, change = TEXTS[what]
    text = change(json.dumps(header()))
    assert_refused(tmp_path, safetensors_file(tensors_of(GRAPH, random.Random(0)), text), message)


def test_a_tensor_is_given_once(tmp_path: Path) -> None:
    data = safetensors_file(tensors_of(GRAPH, random.Random(0)), header())
    head = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    more = head[:-1] + b"," + head[head.index(b'"conv_1_3x3.weight"') : head.index(b', "bn_1.moving_mean"')] + b"}"
    assert_refused(tmp_path, len(more).to_bytes(8, "little") + more + data[8 + len(head) :], "given twice")


OTHERS = {
    "an empty file": b"",
    "a MindSpore .ckpt; .* manidp convert": ckpt_value(b"conv.weight", [2], b"Float32", bytes(8)),
    "a zip archive, such as torch.save": b"PK\x03\x04" + bytes(60),
    "a Python pickle": b"\x80\x02}q\x00X" + bytes(60),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a gzip file": b"\x1f\x8b\x08" + bytes(60),
    "an ONNX model": b"\x08\x09\x12\x06manidp:\x00" + bytes(60),
    "a NumPy array": b"\x93NUMPY\x01\x00" + bytes(60),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(60),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_kind_is_told_by_its_kind(what: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, OTHERS[what], f"it looks like {what}")
    if "ckpt" not in what and OTHERS[what]:
        with pytest.raises(CkptError, match=f"it looks like {what}"):
            read_ckpt(tmp_path / "model.safetensors")


def test_a_checkpoint_is_no_ckpt(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(safetensors_file(tensors_of(GRAPH, random.Random(0)), header()))
    with pytest.raises(CkptError, match=r"it looks like a \.safetensors file"):
        read_ckpt(path)


def test_a_ckpt_of_a_thousand_gated_blocks_costs_little(tmp_path: Path) -> None:
    values = [ckpt_value(b"conv_1_3x3.weight", [1, 0, 0, 0], b"Float32", b"")]
    values += [ckpt_value(b"classifier.weight", [2, 0], b"Float32", b"")]
    values += [ckpt_value(f"stage_1.{n}.conv_a.weight".encode(), [0], b"Float32", b"") for n in range(1000)]
    values += [ckpt_value(b"stage_1.0.mb1.fc1.weight", [0], b"Float32", b"")]
    assert try_file("ckpt", b"".join(values), tmp_path / "x.ckpt", seconds=5) == "refused"


@pytest.mark.parametrize("kind", ["checkpoint", "ckpt"])
def test_mutants(kind: str, tmp_path: Path) -> None:
    """A few here; ``make fuzz`` tries many more, each with a number of its own."""
    outcomes = Counter(try_mutant(kind, seed, tmp_path / "mutant", runs=seed % 12 == 0) for seed in range(150))
    assert set(outcomes) >= {"refused", "loaded"}, "mutants that all end alike try little"


def test_the_mutants_are_what_their_numbers_say() -> None:
    for make, _ in KINDS.values():
        assert [make(seed) for seed in (1, 2)] == [make(seed) for seed in (1, 2)]
        assert make(1) != make(2)
