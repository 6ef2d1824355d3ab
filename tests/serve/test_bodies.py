"""What comes out of a body: forms as clients make them, JSON, and what is refused."""

from __future__ import annotations

import base64
import json

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manidp.serve.bodies import PART_COUNT, asked_of, json_of
from manidp.serve.limits import Limits, RefusedError

LIMITS = Limits(pictures=3, fields=100, commas=200)
FORM = "multipart/form-data; boundary=x"


def form(files: list[bytes], **fields: str) -> tuple[str, bytes]:
    request = httpx2.Request("POST", "http://x", files=[("pictures", ("a.png", file)) for file in files], data=fields)
    return request.headers["content-type"], request.read()


def refused(content_type: str, body: bytes) -> tuple[int, str]:
    with pytest.raises(RefusedError) as error:
        asked_of(content_type, body, LIMITS)
    return error.value.status, error.value.message


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(min_size=1), min_size=1, max_size=3), st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_form_gives_back_what_a_client_put_into_it(files: list[bytes], text: str) -> None:
    asked = asked_of(*form(files, budget=text), LIMITS)
    assert asked.pictures == files
    assert asked.options == {"budget": text}


def test_json_and_plain_bodies() -> None:
    body = json.dumps({"pictures": [base64.b64encode(b"abc").decode()], "top": 2}).encode()
    asked = asked_of("application/json; charset=utf-8", body, LIMITS)
    assert (asked.pictures, asked.options) == ([b"abc"], {"top": 2})
    for kind in ("image/png", "image/anything", "application/octet-stream", ""):
        assert asked_of(kind, b"abc", LIMITS).pictures == [b"abc"]


@pytest.mark.parametrize("cut", [0, 1, 20, 60, 100, 150, -3, -10])
def test_a_form_cut_short_is_refused(cut: int) -> None:
    kind, body = form([b"p" * 50])
    assert refused(kind, body[:cut])[0] == 400


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("text/plain", b"x", 415, "image/"),
        ("image/png", b"", 422, "empty"),
        ("application/json", b"{", 400, "not JSON"),
        ("application/json", b"\xff\xfe", 400, "not JSON"),
        ("application/json", b"[1]", 422, "must be an object"),
        ("application/json", b"{}", 422, "at least one"),
        ("application/json", b'{"pictures": "abc"}', 422, "list"),
        ("application/json", b'{"pictures": ["a!"]}', 422, "picture 0 is not base64"),
        ("application/json", b'{"pictures": [1]}', 422, "base64"),
        ("application/json", b'{"pictures": ["","","",""]}', 422, "at most 3"),
        ("application/json", b'{"top": NaN}', 400, "NaN"),
        ("application/json", b'{"top": ' + b"9" * 5000 + b"}", 400, "digits"),
        ("application/json", b"[" * 101, 413, "brackets"),
        ("application/json", b"[" + b"0," * 201, 413, "commas"),
        ("multipart/form-data", b"x", 400, "boundary"),
        ("multipart/form-data; boundary=" + "x" * 71, b"x", 400, "boundary"),
        (FORM, b"--x\r\n\r\n\r\n--x--", 400, "no headers"),
        (FORM, b"--x\r\nA: b\r\n\r\nc\r\n--x--", 400, "no name"),
        (FORM, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--x--', 422, "UTF-8"),
        (FORM, 2 * b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' + b"--x--", 400, "twice"),
        (FORM, b"--x\r\nContent-Disposition: " + b"y" * 9000 + b"\r\n\r\n\r\n--x--", 400, "too long"),
        (FORM, b"\r\n--x" * 10_000, 413, f"{PART_COUNT} other parts"),
        (FORM, b"--x--", 422, "at least one"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: str, body: bytes, status: int, words: str) -> None:
    came, message = refused(kind, body)
    assert came == status
    assert words in message


@given(st.binary(max_size=200))
def test_whatever_comes_is_read_or_refused(body: bytes) -> None:
    for kind in (FORM, "application/json"):
        try:
            asked_of(kind, body, LIMITS)
        except RefusedError as error:
            assert 400 <= error.status < 500


def test_deep_json_is_refused() -> None:
    with pytest.raises(RefusedError, match="not JSON: brackets in too many brackets"):
        json_of(b"[" * 100_000, Limits())
