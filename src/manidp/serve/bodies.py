"""Pictures and options from the body of a request: a form, a JSON document with base64, or one picture as it is.

Names and content types that a client gives to a file are not looked at: what it holds says what it is.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from manidp.errors import quoted
from manidp.serve.limits import Limits, RefusedError

PICTURES = "pictures"
PART_HEADER = 8 * 2**10  # bytes of the headers of one part of a form
PART_COUNT = 32  # parts of a form beside its pictures


@dataclass(frozen=True)
class Asked:
    """Pictures as the bytes of their files, and options as they came: text from a form, any value from JSON."""

    pictures: list[bytes]
    options: Mapping[str, Any] = field(default_factory=dict)


def asked_of(content_type: str, body: bytes, limits: Limits) -> Asked:
    """What a body holds, by its content type. Raises RefusedError: 400, 413, 415 or 422."""
    header = Message()
    header["content-type"] = content_type or "application/octet-stream"
    kind = header.get_content_type()
    if kind == "multipart/form-data":
        asked = _form(body, header.get_param("boundary"), limits)
    elif kind == "application/json":
        asked = _json(body, limits)
    elif kind == "application/octet-stream" or kind.startswith("image/"):
        asked = Asked([body])
    else:
        raise RefusedError(415, "send one picture as it is (image/*), multipart/form-data, or application/json; "
                           f"got {quoted(content_type, 60)}")  # fmt: skip
    if not asked.pictures:
        raise RefusedError(422, f"at least one picture is needed: files of a form, or {PICTURES!r} in JSON")
    if len(asked.pictures) > limits.pictures:
        raise RefusedError(422, f"at most {limits.pictures} pictures a request; got {len(asked.pictures):,}")
    if not all(asked.pictures):
        raise RefusedError(422, f"picture {asked.pictures.index(b'')} is empty")
    return asked


def json_of(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object that a body holds as JSON; its structure is counted before it is built. Raises RefusedError."""
    if sum(map(body.count, (b"[", b"{", b'"'))) > limits.fields:
        raise RefusedError(413, f"a JSON document has at most {limits.fields:,} brackets and quotes")
    if body.count(b",") > limits.commas:
        raise RefusedError(413, f"a JSON document has at most {limits.commas:,} commas; send tensors in binary")
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "brackets in too many brackets" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"the body is not JSON: {reason:.200}") from None
    if not isinstance(found, dict):
        raise RefusedError(422, f"the JSON document must be an object; got {type(found).__name__}")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _json(body: bytes, limits: Limits) -> Asked:
    found = json_of(body, limits)
    pictures = found.pop(PICTURES, [])
    if not isinstance(pictures, list) or not all(isinstance(one, str) for one in pictures):
        raise RefusedError(422, f"{PICTURES!r} must be a list of pictures in base64")
    if len(pictures) > limits.pictures:
        raise RefusedError(422, f"at most {limits.pictures} pictures a request; got {len(pictures):,}")
    decoded = []
    for number, text in enumerate(pictures):
        try:
            decoded.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise RefusedError(422, f"picture {number} is not base64") from None
    return Asked(decoded, found)


def _form(body: bytes, boundary: object, limits: Limits) -> Asked:
    """multipart/form-data (RFC 7578). A part with a file name, or one called "pictures", is a picture."""
    if not isinstance(boundary, str) or not 0 < len(boundary) <= 70 or not boundary.isascii():
        raise RefusedError(400, "multipart/form-data needs a boundary of 1 to 70 characters")
    mark = b"\r\n--" + boundary.encode()
    most = limits.pictures + PART_COUNT
    pieces = (b"\r\n" + body).split(mark, most + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        if len(pieces) == most + 3:
            raise RefusedError(413, f"a form has at most {limits.pictures} pictures and {PART_COUNT} other parts")
        raise RefusedError(400, "the form does not end with its boundary: it is cut short")
    pictures: list[bytes] = []
    options: dict[str, Any] = {}
    for piece in pieces[1:-1]:
        start, blank, content = piece.partition(b"\r\n\r\n")
        if not blank or len(start) > PART_HEADER or not start.lstrip(b" \t").startswith(b"\r\n"):
            raise RefusedError(400, "a part of the form has no headers, or too long ones")
        name, is_file = _disposition(start)
        if is_file or name == PICTURES:
            pictures.append(content)
        elif name in options:
            raise RefusedError(400, f"{quoted(name, 60)} is given twice")
        else:
            try:
                options[name] = content.decode()
            except UnicodeDecodeError:
                raise RefusedError(422, f"{quoted(name, 60)} is not text in UTF-8") from None
    return Asked(pictures, options)


def _disposition(headers: bytes) -> tuple[str, bool]:
    """The name of a part, and whether it is a file."""
    for line in headers.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            found = Message()
            found["content-disposition"] = value.decode("latin-1").replace("\r", "").replace("\n", "")
            name = found.get_param("name", header="content-disposition")
            file = found.get_param("filename", header="content-disposition")
            if found.get_content_disposition() == "form-data" and name is not None:
                return (name if isinstance(name, str) else str(name[2])), file is not None
    raise RefusedError(400, "a part of the form has no name")
