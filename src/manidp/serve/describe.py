"""What OpenAPI tells of the routes: bodies, answers, and each status that may come."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from fastapi import Response

from manidp.formats.checkpoint import Checkpoint
from manidp.graph.macs import ungated_macs
from manidp.serve import protocol
from manidp.serve.bodies import PICTURES
from manidp.serve.limits import LONGEST_DEADLINE, Limits

ABOUT = (
    "Classifies pictures with a network that decides for each of them which channels to compute. Under load the server "
    "goes to cheaper operating points before it refuses requests; each answer says which one was used."
)
SAMPLES = 12  # bundled test images that are shown
JSON = "application/json"
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SHARE: Schema = {"type": "number", "minimum": 0}
YES: Schema = {"type": "boolean"}
FILE: Schema = {"type": "string", "format": "binary"}
DEADLINE: Schema = {
    "type": "number", "minimum": 1, "maximum": LONGEST_DEADLINE, "description":
    "Milliseconds, from the request's first byte, after which the answer is of no use.",
}  # fmt: skip


def _object(properties: dict[str, Schema], *optional: str) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _by_name(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


ERROR = _object({"error": TEXT})
_RETRY = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}}
_ERRORS: dict[int, str] = {
    400: "The body, or what was asked for, makes no sense.",
    404: "There is no such model, version or address.",
    408: "The body did not come in time.",
    413: "The body, a picture, or their number is beyond the server's limits.",
    415: "The body is of another type than those listed, or compressed.",
    422: "A picture cannot be read, or an option is not valid.",
    429: "Under load: the answer would come too late even at the cheapest operating point.",
    431: "The headers are too long.",
    503: "The server is not ready, or has no room; try again.",
    504: "The deadline passed while the request waited.",
}


def _route(summary: str, tag: str, answer: Schema | str, errors: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    """Arguments of a route; ``answer``: the schema of its JSON, or the type of its text."""
    content = {answer: {"schema": TEXT}} if isinstance(answer, str) else {JSON: {"schema": answer}}
    responses: dict[int, Any] = {200: {"description": "The answer.", "content": content}}
    for status in errors:
        responses[status] = {"description": _ERRORS[status], "content": {JSON: {"schema": ERROR}}}
        if status in (429, 503, 504):
            responses[status]["headers"] = _RETRY
    return {"summary": summary, "tags": [tag], "response_class": Response, "responses": responses,
            "openapi_extra": extra}  # fmt: skip


class Described:
    """Arguments of each route of a server, by the name of its handler."""

    def __init__(self, name: str, checkpoint: Checkpoint, limits: Limits) -> None:
        self.name, self.checkpoint, self.limits = name, checkpoint, limits
        self.points = [one.name for one in checkpoint.every_point]

    @cached_property
    def schemas(self) -> dict[str, Schema]:
        """Bodies that a schema alone does not make valid: what is a picture, or how many numbers a shape asks for.

        Routes name them in words, and have as their schema the body of which every value is valid.
        """
        most = {"minItems": 1, "maxItems": self.limits.pictures}
        base64 = TEXT | {"contentEncoding": "base64", "minLength": 1}
        form, document = (_object({PICTURES: _list(one, **most), **self._options}, *self._options)
                          for one in (FILE, base64))  # fmt: skip
        return {"ClassifyForm": form, "ClassifyDocument": document, "InferRequest": self._any_request}

    @cached_property
    def _options(self) -> dict[str, Schema]:
        return {
            "budget": self._budget,
            "deadline_ms": DEADLINE,
            "top": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "How many classes. Default: 5."},
            "channels": {"type": "boolean", "description": "Also tell which channels of each gate ran."},
        }

    @cached_property
    def _budget(self) -> Schema:
        shares = [one.macs / ungated_macs(self.checkpoint.graph) for one in self.checkpoint.every_point if one.macs]
        share = [{"type": "number", "minimum": min(shares), "maximum": 1}] if shares and min(shares) <= 1 else []
        return {"anyOf": [{"type": "string", "enum": self.points}, *share], "description":
                "The most that may be spent: an operating point, or a share of the dense multiply-adds, 0.45 or 45%, "
                "that has a point within it. Under load less may be spent; the answer says what was."}  # fmt: skip

    @cached_property
    def classify(self) -> dict[str, Any]:
        body = {
            "required": True,
            "content": {"image/*": {"schema": FILE}},
            "description": "One picture: JPEG, PNG, WebP, BMP, GIF or TIFF. Several, and options with them, are "
            "multipart/form-data, #/components/schemas/ClassifyForm, or application/json, "
            "#/components/schemas/ClassifyDocument.",
        }
        picture = {
            "class": TEXT, "probability": SHARE, "top": _list(_object({"class": TEXT, "probability": SHARE})),
            "macs": COUNT, "share_of_dense": SHARE, "kept": _by_name(SHARE),
            "channels": _by_name({"type": "string", "pattern": "^[01]*$"}),
        }  # fmt: skip
        answer = _object({"model": TEXT, "budget": {"type": "string", "enum": self.points},
                          "pictures": _list(_object(picture, "channels"))})  # fmt: skip
        return _route(
            "Classify pictures", "classify", answer, (400, 408, 413, 415, 422, 429, 431, 503, 504),
            requestBody=body,
            parameters=[{"name": name, "in": "query", "schema": schema} for name, schema in self._options.items()],
        )  # fmt: skip

    @cached_property
    def model(self) -> dict[str, Any]:
        point = _object({"name": TEXT, "macs": _or_null(NUMBER), "accuracy": _or_null(NUMBER), "on_dial": YES})
        answer = _object({
            "name": TEXT, "classes": _list(TEXT), "size": _list(COUNT), "dense_macs": COUNT, "target_ms": NUMBER,
            "points": _list(point), "samples": COUNT,
            "limits": _object(dict.fromkeys(("body", "pictures", "pixels"), COUNT)),
        })  # fmt: skip
        return _route("The model, its operating points and the limits", "classify", answer, ())

    @cached_property
    def samples(self) -> dict[str, Any]:
        told = _route("A bundled test image", "classify", "image/png", (404,))
        number = {"type": "string", "enum": [str(number) for number in range(SAMPLES)]}
        told["openapi_extra"]["parameters"] = [{"name": "number", "in": "path", "required": True, "schema": number}]
        return told

    @cached_property
    def status(self) -> dict[str, Any]:
        answer = _object({
            "ready": YES, "budget": {"type": "string", "enum": self.points}, "queued": COUNT, "wait_ms": NUMBER,
            "images_per_second": NUMBER, "p50_ms": _or_null(NUMBER), "p99_ms": _or_null(NUMBER),
        })  # fmt: skip
        return _route("Load and the operating point in force", "classify", answer, ())

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return _route("Metrics for Prometheus", "operation", "text/plain", ())

    @cached_property
    def live(self) -> dict[str, Any]:
        return _route("Whether the process lives", "inference protocol", _object({"live": YES}), ())

    @cached_property
    def ready(self) -> dict[str, Any]:
        return _route("Whether requests may be sent", "inference protocol", _object({"ready": YES}), (503,))

    @cached_property
    def server(self) -> dict[str, Any]:
        answer = _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)})
        return _route("The server", "inference protocol", answer, ())

    def _of_model(self, summary: str, answer: Schema, errors: tuple[int, ...], **extra: Any) -> dict[str, Any]:
        told = _route(summary, "inference protocol", answer, (*errors, 404), **extra)
        told["openapi_extra"]["parameters"] = [_in_path("name", self.name)]
        return told

    @cached_property
    def metadata(self) -> dict[str, Any]:
        tensor = _object({"name": TEXT, "datatype": TEXT, "shape": _list({"type": "integer"})})
        answer = _object({"name": TEXT, "versions": _list(TEXT), "platform": TEXT, "inputs": _list(tensor),
                          "outputs": _list(tensor)})  # fmt: skip
        return self._of_model("The model's tensors", answer, ())

    @cached_property
    def model_ready(self) -> dict[str, Any]:
        return self._of_model("Whether the model is ready", _object({"ready": YES}), (503,))

    def _infer_request(self, *inputs: Schema) -> Schema:
        parameters = {"budget": _or_null(self._budget), "deadline_ms": _or_null(DEADLINE), "binary_data_output": YES}
        wanted = {"type": "object", "required": ["name"], "properties": {
            "name": {"enum": list(protocol.OUTPUTS)},
            "parameters": {"type": "object", "properties": {"binary_data": YES}}}}  # fmt: skip
        return {"type": "object", "required": ["inputs"], "properties": {
            "id": _or_null(TEXT), "inputs": _list({"oneOf": [*inputs]}, minItems=1, maxItems=1),
            "outputs": _or_null(_list(wanted)), "parameters": {"type": "object", "properties": parameters},
        }}  # fmt: skip

    def _tensor(self, kind: str, **told: Schema) -> Schema:
        sides = protocol.input_shapes(self.checkpoint)[kind]
        count = {"type": "integer", "minimum": 1, "maximum": self.limits.pictures}
        shape = {"type": "array", "prefixItems": [count, *({"const": side} for side in sides)], "items": False,
                 "minItems": 1 + len(sides)}  # fmt: skip
        properties = {"name": {"const": protocol.INPUT}, "datatype": {"const": kind}, "shape": shape, **told}
        return {"type": "object", "required": ["name", "datatype", "shape"], "properties": properties}

    @cached_property
    def _any_request(self) -> Schema:
        data = {"type": "array", "description": "Flat, or nested as the shape is; absent in binary."}
        parameters = {"type": "object", "properties": {"binary_data_size": COUNT}}
        return self._infer_request(
            *(self._tensor(kind, data=data, parameters=parameters) for kind in protocol.input_shapes(self.checkpoint))
        )

    @cached_property
    def _pixels_request(self) -> Schema:
        """One image of pixels in JSON."""
        tensor = self._tensor("UINT8")
        sides = protocol.input_shapes(self.checkpoint)["UINT8"]
        tensor["properties"]["shape"]["prefixItems"][0] = {"const": 1}
        tensor["properties"]["data"] = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                        "minItems": math.prod(sides), "maxItems": math.prod(sides)}  # fmt: skip
        tensor["required"].append("data")
        return self._infer_request(tensor)

    @cached_property
    def infer(self) -> dict[str, Any]:
        body = {"required": True, "content": {JSON: {"schema": self._pixels_request}}, "description":
                "One image of pixels in JSON. Several, normalised ones, and tensors in binary: "
                "#/components/schemas/InferRequest."}  # fmt: skip
        output = _object({
            "name": TEXT, "datatype": TEXT, "shape": _list(COUNT), "data": {"type": "array"},
            "parameters": {"type": "object"},
        }, "data", "parameters")  # fmt: skip
        answer = _object({"model_name": TEXT, "model_version": TEXT, "id": TEXT, "parameters": {"type": "object"},
                          "outputs": _list(output)}, "id")  # fmt: skip
        told = self._of_model("Infer", answer, (400, 408, 413, 415, 422, 429, 431, 503, 504), requestBody=body)
        told["responses"][200]["content"]["application/octet-stream"] = {"schema": {"type": "string"}}
        return told


def versioned(told: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the same route with the version in its path."""
    extra = told["openapi_extra"]
    return told | {
        "openapi_extra": extra | {"parameters": [*extra["parameters"], _in_path("version", protocol.VERSION)]}
    }


def _in_path(name: str, only: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [only]}}
