"""The Open Inference Protocol as functions of bytes; the real client is in test_process.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from manidp.result import probabilities
from manidp.serve.limits import Limits, RefusedError
from manidp.serve.protocol import format_infer, parse_infer
from serve.served import IMAGES, engine, small_model

LIMITS = Limits(pictures=4)
FLOATS = small_model().preprocessing.apply(IMAGES)


def asking(array: Any, kind: str, binary: bool = False, **more: Any) -> tuple[bytes, str | None]:
    tensor: dict[str, Any] = {"name": "image", "datatype": kind, "shape": list(array.shape)}
    raw = array.tobytes() if binary else b""
    tensor |= {"parameters": {"binary_data_size": len(raw)}} if binary else {"data": array.tolist()}
    head = json.dumps({"inputs": [tensor]} | more).encode()
    return head + raw, str(len(head)) if binary else None


@pytest.mark.parametrize(("array", "kind"), [(IMAGES, "UINT8"), (FLOATS, "FP32")])
def test_a_tensor_comes_out_as_it_went_in_nested_flat_or_binary(array: Any, kind: str) -> None:
    for body, length in (asking(array, kind), asking(array, kind, binary=True)):
        np.testing.assert_array_equal(parse_infer(body, length, small_model(), LIMITS).images, array)
    flat = json.loads(asking(array, kind)[0])
    flat["inputs"][0]["data"] = array.reshape(-1).tolist()
    np.testing.assert_array_equal(parse_infer(json.dumps(flat).encode(), None, small_model(), LIMITS).images, array)


def test_an_answer_holds_the_outputs_asked_for_in_json_and_binary() -> None:
    model = small_model()
    result = engine().run(IMAGES)
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "class"}, {"name": "macs"}]
    body, _ = asking(IMAGES, "UINT8", outputs=outputs, id="7")
    content, head = format_infer(parse_infer(body, None, model, LIMITS), "m", model, result, "50%")
    answer = json.loads(content[:head])
    assert (answer["model_name"], answer["id"], answer["parameters"]) == ("m", "7", {"budget": "50%"})
    logits, names, macs = answer["outputs"]
    assert logits == {"name": "logits", "datatype": "FP32", "shape": [4, 10], "parameters": {"binary_data_size": 160}}
    np.testing.assert_array_equal(np.frombuffer(content[head:], "<f4").reshape(4, 10), result.logits)
    assert names["data"] == [model.classes[i] for i in result.logits.argmax(1)]
    assert macs["data"] == result.macs.tolist()


def test_without_outputs_asked_for_all_come_and_binary_texts_have_their_lengths() -> None:
    model = small_model()
    result = engine().run(IMAGES)
    body, _ = asking(IMAGES, "UINT8", parameters={"binary_data_output": True})
    content, head = format_infer(parse_infer(body, None, model, LIMITS), "m", model, result, "default")
    told = {one["name"]: one for one in json.loads(content[:head])["outputs"]}
    assert list(told) == ["class", "probabilities", "logits", "macs"]
    size = told["class"]["parameters"]["binary_data_size"]
    texts, rest = content[head : head + size], content[head + size :]
    first = model.classes[int(result.logits[0].argmax())]
    assert texts.startswith(len(first).to_bytes(4, "little") + first.encode())
    np.testing.assert_array_equal(
        np.frombuffer(rest[:160], "<f4").reshape(4, 10), probabilities(result.logits).astype("<f4")
    )


def broken(change: dict[str, Any], length: str | None = None, more: bytes = b"") -> tuple[int, str]:
    document = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}]}
    tensor = change.pop("tensor", {})
    document["inputs"][0].update(tensor)
    body = json.dumps(document | change).encode() + more
    with pytest.raises(RefusedError) as error:
        parse_infer(body, length, small_model(), LIMITS)
    return error.value.status, error.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "one tensor"),
        ({"inputs": 3}, "one tensor"),
        ({"id": 3}, "id"),
        ({"parameters": 3}, "parameters"),
        ({"outputs": {}}, "outputs"),
        ({"outputs": [{"name": "x"}]}, "outputs are class"),
        ({"outputs": [{"name": "class", "parameters": {"classification": 3}}]}, "not offered"),
        ({"outputs": [{"name": "class", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"tensor": {"name": "x"}}, "called 'image'"),
        ({"tensor": {"datatype": "FP64"}}, "UINT8 or FP32"),
        ({"tensor": {"shape": [1, 3, 32, 32]}}, "[B, 32, 32, 3]"),
        ({"tensor": {"shape": [True, 32, 32, 3]}}, "[B, 32, 32, 3]"),
        ({"tensor": {"shape": [5, 32, 32, 3]}}, "1 to 4 images"),
        ({"tensor": {"shape": [-1, 32, 32, 3]}}, "1 to 4 images"),
        ({"tensor": {"shape": [10**30, 32, 32, 3]}}, "1 to 4 images"),
        ({"tensor": {"data": [0] * 3071}}, "3,072 numbers; got 3,071"),
        ({"tensor": {"data": [256] * 3072}}, "0 to 255"),
        ({"tensor": {"data": [1.5] * 3072}}, "numbers of UINT8"),
        ({"tensor": {"data": [True] * 3072}}, "numbers of UINT8"),
        ({"tensor": {"data": ["1"] * 3072}}, "numbers of UINT8"),
        ({"tensor": {"data": [[1, 2], [3]]}}, "numbers of UINT8"),
        ({"tensor": {"data": [[]]}}, "numbers of UINT8"),
        ({"tensor": {"data": None}}, "numbers of UINT8"),
        ({"tensor": {"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [1e300] * 3072}}, "not finite"),
        ({"tensor": {"datatype": "FP32", "shape": [1, 3, 32, 32], "data": [10**320] * 3072}}, "not finite"),
        ({"tensor": {"parameters": {"binary_data_size": 3072}}}, "3,072 bytes"),
        ({"tensor": {"parameters": {"shared_memory_region": "x"}}}, "shared memory"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    status, message = broken(change)
    assert status == 400
    assert words in message


def test_lengths_that_lie_are_refused() -> None:
    assert broken({}, "x")[0] == 400
    assert "the body has" in broken({}, "9999999")[1]
    body, _ = asking(IMAGES, "UINT8")
    with pytest.raises(RefusedError, match="4 bytes follow the JSON"):
        parse_infer(body + b"1234", str(len(body)), small_model(), LIMITS)
    body, length = asking(IMAGES, "UINT8", binary=True)
    with pytest.raises(RefusedError, match="12,287 came"):
        parse_infer(body[:-1], length, small_model(), LIMITS)


TENSOR = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3]}


@pytest.mark.parametrize("size", [0, 3071, 3073, -3072, 2**63, 10**30, 3072.0, 1.5, "3072", True, [3072], {}])
@pytest.mark.parametrize("tail", [3072, 3073])
def test_binary_sizes_that_lie_are_refused(size: Any, tail: int) -> None:
    head = json.dumps({"inputs": [TENSOR | {"parameters": {"binary_data_size": size}}]}).encode()
    with pytest.raises(RefusedError, match=r"of UINT8 are 3,072 bytes; binary_data_size says .*came$"):
        parse_infer(head + bytes(tail), str(len(head)), small_model(), LIMITS)


@pytest.mark.parametrize("length", ["-1", "+5", " 9", "1e3", "0x10", "1_0", "\u0661", "", "9" * 5000])
def test_a_header_length_that_is_no_number_is_refused(length: str) -> None:
    with pytest.raises(RefusedError, match=r"must be a whole number; got .{0,70}$"):
        parse_infer(b"{}", length, small_model(), LIMITS)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([TENSOR, TENSOR], "one tensor"),
        ([TENSOR, {"name": "mask", "datatype": "BOOL", "shape": [1]}], "one tensor"),
        *(([TENSOR | {"datatype": kind, "shape": [1, 3, 32, 32]}], f"UINT8 or FP32; got '{kind}'")
          for kind in ("FP16", "BF16", "INT8", "FP64", "BYTES", "uint8")),
    ],
)  # fmt: skip
def test_what_other_models_take_in_binary_is_refused_by_name(tensors: list[dict[str, Any]], words: str) -> None:
    sizes = [{"parameters": {"binary_data_size": 3072}} | one for one in tensors]
    head = json.dumps({"inputs": sizes}).encode()
    with pytest.raises(RefusedError, match=words) as error:
        parse_infer(head + bytes(3072 * len(tensors)), str(len(head)), small_model(), LIMITS)
    assert error.value.status == 400
