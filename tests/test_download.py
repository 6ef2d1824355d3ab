"""Bringing a file from servers that behave, and from servers that do not."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback import TLS, Loopback, Request, Route, in_turn, redirect, serving, status, trickling, whole
from manidp.errors import HubError
from manidp.fetch.download import Downloader, TransferError, origins, target_of
from manidp.files import sha256_of

CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()
LIMIT = 2**20


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving() as running:
        yield running


def quick(*servers: Loopback, **options: Any) -> Downloader:
    return Downloader(origins(s.origin for s in servers), **{"patience": 5.0, "backoff": 0.01, **options})


def bring(server: Loopback, route: Route, part: Path, **options: Any) -> None:
    """The file of this route in ``part``, of the right digest; else TransferError."""
    server.routes["/f"] = route
    quick(server, **options).file(f"{server.origin}/f", part, DIGEST, LIMIT)
    assert part.read_bytes() == CONTENT


def assert_fails(server: Loopback, route: Route, part: Path, kind: str, text: str, **options: Any) -> None:
    """Bringing fails in this way within 3 s, what is left is a beginning of the file, and the next call works."""
    start = time.monotonic()
    with pytest.raises(TransferError, match=text) as caught:
        bring(server, route, part, **{"patience": 0.5, **options})
    assert caught.value.kind == kind and time.monotonic() - start < 3
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert not part.exists() or CONTENT.startswith(part.read_bytes())
    bring(server, whole(CONTENT), part)


def test_a_file_is_brought_with_its_progress(server: Loopback, tmp_path: Path) -> None:
    server.routes["/f"] = whole(CONTENT)
    seen: list[tuple[int, int | None]] = []
    quick(server).file(f"{server.origin}/f", tmp_path / "p", DIGEST, LIMIT, lambda done, all: seen.append((done, all)))
    assert (tmp_path / "p").read_bytes() == CONTENT and server.asked == [("/f", "")]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)


def test_what_is_there_already_is_not_brought_again(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(CONTENT[:1000])
    bring(server, whole(CONTENT), tmp_path / "p")
    assert server.asked == [("/f", "bytes=1000-")]
    bring(server, whole(CONTENT), tmp_path / "p")
    assert len(server.asked) == 1


def _everything(request: Request) -> None:
    request.answer(200, Content_Length=len(CONTENT))
    request.send(CONTENT)


def _another_range(request: Request) -> None:
    at = request.offset()
    if at:
        request.answer(206, Content_Length=5, Content_Range=f"bytes {at + 1}-{at + 5}/{len(CONTENT)}")
        request.send(b"wrong")
    else:
        _everything(request)


@pytest.mark.parametrize("route", [whole(CONTENT), _everything, _another_range])
@pytest.mark.parametrize("start", [CONTENT[:5000], b"x" * 5000, CONTENT + b"x", b"x" * len(CONTENT)])
def test_no_beginning_stands_in_the_way(server: Loopback, route: Route, start: bytes, tmp_path: Path) -> None:
    """Whatever an earlier call left, and however the server takes a Range, the right file comes."""
    (tmp_path / "p").write_bytes(start)
    bring(server, route, tmp_path / "p")


def test_a_server_that_cannot_resume_sends_the_file_once(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(CONTENT[:5000])
    bring(server, _everything, tmp_path / "p")
    assert server.asked == [("/f", "bytes=5000-")]


def _cut(at: int) -> Route:
    def route(request: Request) -> None:
        start = request.offset()
        if start:
            whole(CONTENT)(request)
        else:
            request.answer(200, Content_Length=len(CONTENT))
            request.send(CONTENT[:at])

    return route


def test_a_slow_server_is_waited_for(server: Loopback, tmp_path: Path) -> None:
    def route(request: Request) -> None:
        request.pause(0.3)
        request.answer(200, Content_Length=len(CONTENT))
        request.send(CONTENT, pause=0.3)

    bring(server, route, tmp_path / "p", attempts=1)


def test_a_body_that_is_cut_short_is_resumed(server: Loopback, tmp_path: Path) -> None:
    bring(server, _cut(3000), tmp_path / "p")
    assert server.asked == [("/f", ""), ("/f", "bytes=3000-")]


def _always_cut(request: Request) -> None:
    at = request.offset()
    request.answer(206 if at else 200, Content_Length=len(CONTENT) - at, Content_Range=f"bytes {at}-{at + 9}/*")
    request.send(CONTENT[at : at + 10])


def _chunked(content: bytes, last: bool = True) -> Route:
    def route(request: Request) -> None:
        request.answer(200, Transfer_Encoding="chunked")
        for at in range(0, len(content), 5000):
            chunk = content[at : at + 5000]
            request.send(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        request.send(b"0\r\n\r\n" if last else b"")

    return route


def test_a_body_of_unknown_length_is_brought(server: Loopback, tmp_path: Path) -> None:
    bring(server, _chunked(CONTENT), tmp_path / "p")
    bring(server, _until_closed, tmp_path / "q")


def _until_closed(request: Request) -> None:
    request.answer(200)
    request.send(CONTENT)


def _html(request: Request) -> None:
    whole(b"<!DOCTYPE html><html>please log in</html>", Content_Type="text/html")(request)


def _endless(request: Request) -> None:
    request.answer(200, Transfer_Encoding="chunked")
    while True:
        request.send(b"10000\r\n" + bytes(2**16) + b"\r\n")


def _silent(request: Request) -> None:
    request.pause(9)


def _drip(head: bytes, body: bytes, step: int = 1) -> Route:
    def route(request: Request) -> None:
        request.send(head)
        request.send(body, pause=0.05, step=step)

    return route


def _stalls(request: Request) -> None:
    request.answer(200, Content_Length=len(CONTENT))
    request.send(CONTENT[:5000])
    request.pause(9)


def _says(headers: str, body: bytes = b"") -> Route:
    return lambda request: request.send(f"HTTP/1.1 200 OK\r\n{headers}\r\n".encode("latin-1") + body)


def _continues(request: Request) -> None:
    while True:
        request.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 500, pause=0.01)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 102400\r\n\r\n"


@pytest.mark.parametrize(
    ("route", "kind", "text"),
    [
        (status(404), "missing", "404"),
        (status(410), "missing", "410"),
        (status(403), "refused", "the server says 403"),
        (status(304), "refused", "304"),
        (status(103), "refused", "103"),
        (status(503), "passing", "503"),
        (status(429, Retry_After=0), "passing", "429"),
        (whole(b"x" * len(CONTENT)), "wrong", r"what came is not the file: sha256 \w+ of 102,400 bytes, expected"),
        (whole(CONTENT + b"x"), "wrong", "not the file"),
        (whole(CONTENT[:-1]), "wrong", "not the file"),
        (_html, "wrong", "an HTML page"),
        (whole(CONTENT, Content_Encoding="gzip"), "wrong", "encoded"),
        (_always_cut, "passing", "cut short, 10 of"),
        (_chunked(CONTENT[:9000], last=False), "passing", "connection failed"),
        (whole(bytes(LIMIT + 1)), "refused", "1,048,577 bytes; the limit is 1,048,576"),
        *((_says(f"Content-Length: {length}\r\n"), "wrong", f"the server says a Content-Length of .*{length[-1:]}'$")
          for length in ("-5", "+5", "0x5", "5_0", "5, 5", "many", "9" * 21, "5\r\nContent-Length: 6")),
        (_says(f"Content-Length: {'9' * 5000}\r\n"), "wrong", r"a Content-Length of '9{200}'\.\.\. \(5,000 characters"),
        (_says("Content-Length: 9" + "9" * 4299 + "\r\n"), "wrong", "Content-Length"),
        (lambda r: r.send(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 5-9/10\r\n\r\n"), "passing", "resume at byte 0"),
        (lambda r: r.send(b"HTTP/1.1 206 OK\r\nContent-Range: many\r\n\r\n"), "passing", "resume at byte 0"),
        (_says("Transfer-Encoding: chunked\r\n", b"-5\r\n" + CONTENT[:9]), "passing", "connection failed"),
        (_says("Transfer-Encoding: chunked\r\n", b"\xff\x1b[31m\r\nxxxxx\r\n"), "unreachable", "connection failed"),
        (_says("Transfer-Encoding: chunked\r\n", b"f" * 60000 + b"\r\n"), "unreachable", "connection failed"),
        (_says("Transfer-Encoding: chunked\r\n", b"0\r\n" + b"X: y\r\n" * 9000), "wrong", "not the file"),
        (_endless, "wrong", "more than 1,048,576 bytes came"),
        (_silent, "unreachable", "stalled, 0 bytes"),
        (_stalls, "passing", "stalled, 5,000 bytes"),
        (_drip(b"", b"HTTP/1.1 200 OK" + bytes(99)), "unreachable", "stalled"),
        (_drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 99, 6), "unreachable", "stalled"),
        (_drip(HEAD, CONTENT), "passing", "stalled"),
        (_drip(HEAD, CONTENT, 500), "passing", "stalled, .* bytes came and then less than 16,384 a second in 0.5 s"),
        (_continues, "unreachable", "stalled, 0 bytes"),
        (_drip(HEAD + CONTENT[:9000], CONTENT[9000:]), "passing", "stalled"),
        (_drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 99), "unreachable", "stalled"),
        (lambda r: r.send(b"not http at all\r\n\r\n"), "unreachable", "connection failed"),
        (lambda r: r.send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"), "unreachable", "100 headers"),
        (lambda r: r.send(b"HTTP/1.1 200 " + b"x" * 2**17), "unreachable", "connection failed"),
        (lambda r: r.send(b"\x1b]0;owned\x07\x1b[31m" * 3000 + b"\r\n\r\n"), "unreachable", r"failed: '\\x1b\]0;owned"),
        (lambda r: r.send(b"HTTP/1.1 403 \x1b[31m" + b"x" * 60000 + b"\r\n\r\n"), "refused", r"403 '\\x1b\[31mx+'\."),
        (lambda r: r.send(b"HTTP/9.9 200 OK\r\n\r\n"), "unreachable", "connection failed: 'HTTP/9.9'"),
        (lambda r: r.send(b"HTTP/1.1 99999999999 OK\r\n\r\n"), "unreachable", "connection failed"),
        (lambda r: None, "unreachable", "connection failed"),
        (redirect("file:///etc/passwd"), "refused", "must begin with https"),
        (redirect("http://192.0.2.1/f"), "refused", "must begin with https"),
        (redirect("https://192.0.2.1/f"), "refused", "not on the list of allowed hosts"),
        (redirect("http://user@127.0.0.1/f"), "refused", "user name"),
        (redirect("/f"), "wrong", "more than 5 redirects"),
        (redirect(""), "wrong", "redirect to nowhere"),
        *((redirect(location), "refused", "not? (an )?address|on the list") for location in (
            "http://[", "//[", "http://[::1", "https://127.0.0.1:99999/", "https://127.0.0.1:x/", "https://\xe9/",
            "data:,x", "https://", "http://a b/", "https://" + "a" * 64 + ".com/", "https://127.0.0.1:0/",
            "/" + "x" * 50_000, "http://[v9.x]/", "https://\x1b[31m/", "ftp://127.0.0.1/", "javascript:x", "https://me:pw@h/",
        )),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves(server: Loopback, tmp_path: Path, route: Route, kind: str, text: str) -> None:
    assert_fails(server, route, tmp_path / "p", kind, text, attempts=1)


def test_what_is_final_is_tried_once_and_what_may_pass_is_tried_again(server: Loopback, tmp_path: Path) -> None:
    for route, tries in ((status(404), 1), (_html, 1), (status(500), 3), (_silent, 3)):
        server.asked.clear()
        with pytest.raises(TransferError):
            bring(server, route, tmp_path / "p", attempts=3, patience=0.3)
        assert len(server.asked) == tries
    server.asked.clear()
    with pytest.raises(TransferError):
        bring(server, redirect("/f"), tmp_path / "p")
    assert len(server.asked) == 6
    bring(server, in_turn(status(503), _silent, whole(CONTENT)), tmp_path / "p", patience=1)


def test_a_server_that_asks_for_time_is_given_it(server: Loopback, tmp_path: Path) -> None:
    start = time.monotonic()
    bring(server, in_turn(status(503, Retry_After=1), whole(CONTENT)), tmp_path / "p")
    assert 1 <= time.monotonic() - start < 2


def test_waits_double(monkeypatch: pytest.MonkeyPatch, server: Loopback, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr("manidp.fetch.download.time.sleep", waits.append)
    with pytest.raises(TransferError):
        bring(server, status(500), tmp_path / "p", attempts=4, backoff=1.0)
    assert len(waits) == 3 and all(0.5 * 2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(waits))


def test_a_call_has_a_time_limit_that_grows_with_the_size(server: Loopback, tmp_path: Path) -> None:
    """Fast enough at every moment, but too slow in all; what came is kept, and the next call goes on with it."""

    def slow(request: Request) -> None:
        at = request.offset()
        request.answer(206 if at else 200, Content_Length=len(CONTENT) - at, Content_Range=f"bytes {at}-{at + 9}/*")
        request.send(CONTENT[at : at + 15_000], pause=0.05, step=1000)

    for route, text in (
        (_drip(HEAD, CONTENT, 5000), r"too slow, [0-9,]+ bytes came and the 1 s for it are over"),
        (slow, "cut short, 15,000 of|too slow"),  # many attempts make it no longer
        (in_turn(*[redirect("/f")] * 3, _silent), "too slow, 0 bytes"),
        (status(503, Retry_After=9), "503"),  # there is no time left to wait so long
    ):
        start = time.monotonic()
        with pytest.raises(TransferError, match=text):
            bring(server, route, tmp_path / "p", grace=0.2, mean_rate=len(CONTENT) / 0.5, attempts=9)
        assert time.monotonic() - start < 1.5
    assert 15_000 < (tmp_path / "p").stat().st_size < len(CONTENT)
    bring(server, _drip_rest, tmp_path / "p", grace=0.2, mean_rate=len(CONTENT) / 9)
    with pytest.raises(TransferError, match="too slow"):
        server.routes["/f"] = _drip(HEAD, CONTENT, 5000)
        quick(server, grace=0.2, mean_rate=2e6).text(f"{server.origin}/f", LIMIT)


def _drip_rest(request: Request) -> None:
    at = request.offset()
    request.answer(206, Content_Length=len(CONTENT) - at, Content_Range=f"bytes {at}-{len(CONTENT) - 1}/*")
    request.send(CONTENT[at:], pause=0.05, step=5000)


@pytest.mark.parametrize(
    "content", [b"\x16\x03\x03\x40\0" + bytes(999), b"HTTP/1.1 400 no\r\n", b"\x15\x03\x03\0\2\2\x28"]
)
def test_tls_that_goes_on_for_ever_is_ended(content: bytes, tmp_path: Path) -> None:
    with trickling(content) as port:
        origin, start = f"https://127.0.0.1:{port}", time.monotonic()
        with pytest.raises(TransferError, match=r"stalled, 0 bytes|connection failed") as caught:
            Downloader(origins([origin]), patience=0.4, attempts=1).file(origin, tmp_path / "p", DIGEST, LIMIT)
    assert caught.value.kind == "unreachable" and time.monotonic() - start < 2


def test_a_redirect_is_followed_only_to_hosts_on_the_list(server: Loopback, tmp_path: Path) -> None:
    with serving(g=whole(CONTENT)) as other:
        route = redirect(f"{other.origin}/g")
        with pytest.raises(TransferError, match="not on the list"):
            bring(server, route, tmp_path / "p")
        assert not other.asked
        server.routes["/f"] = route
        quick(server, other).file(f"{server.origin}/f", tmp_path / "p", DIGEST, LIMIT)
        assert sha256_of(tmp_path / "p") == DIGEST and other.asked == [("/g", "")]


def test_a_host_that_is_not_on_the_list_is_not_even_connected_to(server: Loopback, tmp_path: Path) -> None:
    server.routes["/f"] = whole(CONTENT)
    for allowed in ((), ("example.com",), (f"http://127.0.0.1:{server.server_port + 1}",), ("127.0.0.1",)):
        downloader = Downloader(origins(allowed))
        assert downloader.refusal(f"{server.origin}/f") is not None
        with pytest.raises(TransferError, match="not on the list"):
            downloader.file(f"{server.origin}/f", tmp_path / "p", DIGEST, LIMIT)
    assert not server.asked and quick(server).refusal(f"{server.origin}/f") is None


def test_a_closed_port_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TransferError, match=r"refused \(tried 2 times\)") as caught:
            Downloader(origins([origin]), attempts=2, backoff=0.01).file(origin, tmp_path / "p", DIGEST, LIMIT)
        assert caught.value.kind == "unreachable"


def test_offline_opens_no_socket(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.__init__", opened)
    with pytest.raises(TransferError, match="MANIDP_OFFLINE=1") as caught:
        quick(server, offline=True).file(f"{server.origin}/f", tmp_path / "p", DIGEST, LIMIT)
    assert caught.value.kind == "refused"
    with pytest.raises(AssertionError, match="opened"):
        quick(server).file(f"{server.origin}/f", tmp_path / "p", DIGEST, LIMIT)


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("localhost.pem", f=whole(CONTENT)) as server:
        with pytest.raises(TransferError, match="certificate is not trusted") as caught:
            bring(server, whole(CONTENT), tmp_path / "p")
        assert caught.value.kind == "refused" and not server.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "localhost.pem"))
        bring(server, whole(CONTENT), tmp_path / "p")
        (tmp_path / "p").unlink()
        assert_fails(server, _stalls, tmp_path / "p", "passing", "stalled, 5,000 bytes", attempts=1, patience=0.4)
    with serving("other.pem") as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "other.pem"))
        with pytest.raises(TransferError, match=r"certificate is not trusted.*127"):
            bring(server, whole(CONTENT), tmp_path / "q")


def _tunnel(listening: socket.socket, asked: list[bytes]) -> None:
    """A proxy for one connection."""
    client, _ = listening.accept()
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    asked.append(head)
    host, port = head.split()[1].decode().split(":")
    with client, socket.create_connection((host, int(port))) as behind:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        def pump(source: socket.socket, sink: socket.socket) -> None:
            while content := source.recv(2**16):
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)

        up = threading.Thread(target=pump, args=(client, behind))
        up.start()
        pump(behind, client)
        up.join()


def test_a_proxy_of_the_environment_is_used_and_tls_reaches_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "localhost.pem"))
    asked: list[bytes] = []
    with serving("localhost.pem") as server, socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = threading.Thread(target=_tunnel, args=(listening, asked), daemon=True)
        proxy.start()
        monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{listening.getsockname()[1]}")
        bring(server, whole(CONTENT), tmp_path / "p", patience=3)
        proxy.join(3)
    assert asked and asked[0].startswith(f"CONNECT 127.0.0.1:{server.server_port} ".encode())
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0" in asked[0]
    with serving("localhost.pem") as server:  # the proxy is gone
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        bring(server, whole(CONTENT), tmp_path / "q", attempts=1)


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
@pytest.mark.parametrize(
    "value",
    ["http://[", ":::", "::1", "http://", "http://:8080", "socks5://127.0.0.1:9", "https://127.0.0.1:9", "http://h:x",
     "http://h:99999", "http://h:0", "http://a b", "http://\x1b[31m", "http://me:secret@[", "http://\udcff", "http://h\xe9",
     "http://me:secret@/", "x" * 9999],
)  # fmt: skip
def test_a_setting_that_is_no_proxy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    origin = "https://127.0.0.1:9"
    with pytest.raises(TransferError, match=f"the proxy that {name} names") as caught:
        Downloader(origins([origin]), attempts=1).file(origin, tmp_path / "p", DIGEST, LIMIT)
    said = str(caught.value)
    assert caught.value.kind in ("refused", "unreachable") and said.isprintable() and len(said) < 500
    assert "secret" not in said


def test_what_a_proxy_does_wrong_is_not_said_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failure(proxy: str) -> str:
        monkeypatch.setenv("https_proxy", f"http://me:secret@{proxy}")
        origin, start = "https://192.0.2.1", time.monotonic()
        with pytest.raises(TransferError) as caught:
            Downloader(origins([origin]), attempts=1, patience=0.4).file(origin, tmp_path / "p", DIGEST, LIMIT)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500 and time.monotonic() - start < 2
        assert "secret" not in str(caught.value)
        return str(caught.value)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{taken.getsockname()[1]}"
        expected = f"the proxy {proxy} that https_proxy names: the connection failed: Connection refused"
        assert failure(proxy) == expected
    for content, said in (
        (b"HTTP/1.1 407 who \x1b[31mare you?\r\n\r\n", r"failed: 407 who \\x1b\[31mare"),
        (b"HTTP/1.1 200 OK\r\nX: y", "stalled, 0 bytes"),
        (b"\xff\r\n\r\n", "connection failed"),
        (b"H", "stalled, 0 bytes"),
    ):
        with trickling(content, every=0.001) as port:
            told = failure(f"127.0.0.1:{port}")
        assert told.startswith(f"the proxy 127.0.0.1:{port} that https_proxy names: ") and re.search(said, told), told


BRING_UNDER_A_FILE_SIZE_LIMIT = """
import sys, resource
from pathlib import Path
from manidp.fetch.download import Downloader, TransferError, origins
origin, part, digest = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    Downloader(origins([origin])).file(origin + "/f", Path(part), digest, 2**20)
except TransferError as error:
    print(error.kind, error)
"""


def test_a_full_disk_is_said_and_given_its_room_back(server: Loopback, tmp_path: Path) -> None:
    server.routes["/f"] = whole(CONTENT)
    command = [sys.executable, "-c", BRING_UNDER_A_FILE_SIZE_LIMIT, server.origin, str(tmp_path / "p"), DIGEST]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"disk {tmp_path}: cannot be written to: File too large") and len(server.asked) == 1
    assert not list(tmp_path.iterdir())
    bring(server, whole(CONTENT), tmp_path / "p")


def test_a_file_larger_than_the_disk_is_not_begun(server: Loopback, tmp_path: Path) -> None:
    server.routes["/f"] = lambda request: request.answer(200, Content_Length=2**60)
    with pytest.raises(TransferError, match=r"1,152,921,504,606,846,976 bytes are to come") as caught:
        quick(server).file(f"{server.origin}/f", tmp_path / "p", DIGEST, 2**61)
    assert caught.value.kind == "disk" and not list(tmp_path.iterdir())


def test_nothing_is_written_or_read_through_a_link(server: Loopback, tmp_path: Path) -> None:
    part, outside = tmp_path / "p", tmp_path / "outside"
    for content in (b"mine", CONTENT[:5000], CONTENT):
        outside.write_bytes(content)
        part.symlink_to(outside)
        assert_left_alone(server, part)
        assert outside.read_bytes() == content
        part.unlink()
    part.symlink_to(tmp_path / "new")
    assert_left_alone(server, part)
    part.unlink()
    os.mkfifo(part)
    assert_left_alone(server, part)
    part.unlink()
    part.mkdir()
    assert_left_alone(server, part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "p"]


def test_a_link_that_comes_meanwhile_is_not_followed(server: Loopback, tmp_path: Path) -> None:
    part, outside = tmp_path / "p", tmp_path / "outside"
    outside.write_bytes(b"mine")

    def route(request: Request) -> None:
        part.symlink_to(outside)
        whole(CONTENT)(request)

    with pytest.raises(TransferError, match="cannot be written to"):
        bring(server, route, part)
    assert outside.read_bytes() == b"mine"


def assert_left_alone(server: Loopback, part: Path) -> None:
    before = part.lstat()
    with pytest.raises(TransferError, match="cannot be resumed: ") as caught:
        bring(server, whole(CONTENT), part)
    assert caught.value.kind == "disk" and part.lstat().st_ino == before.st_ino


def test_no_folder_to_write_to_is_an_error_of_the_disk(server: Loopback, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="cannot be written to: No such file") as caught:
        bring(server, whole(CONTENT), tmp_path / "absent" / "p")
    assert caught.value.kind == "disk"


def test_small_texts_are_limited_and_retried(server: Loopback) -> None:
    server.routes = {"/t": in_turn(status(503), _cut(10), whole(b"text")), "/long": whole(bytes(101)), "/e": _endless}
    assert quick(server).text(f"{server.origin}/t", 100) == b"text"
    for path in ("/long", "/e"):
        with pytest.raises(TransferError, match="more than 100 bytes"):
            quick(server).text(server.origin + path, 100)
    with pytest.raises(TransferError, match="404"):
        quick(server).text(f"{server.origin}/none", 100)


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "//example.com/f", "http://example.com/f", "ftp://example.com/f", "file:///etc/passwd", "data:,x",
        "https:///f", "https://", "https://user@example.com/", "https://example.com@evil.example/", "https://a b/",
        "https://example.com:99999/", "https://example.com:x/", "https://example.com\\@evil/", "https://exämple.com/",
        "https://example.com/f\r\nX: y", "https://[::1/", "https://example..com/", "https://.example.com/",
        f"https://{'a' * 64}.com/", f"https://{'a.' * 130}com/", "https://example.com:0/", "http://[",
        "https://[1.2.3.4]/", "https://[::1%eth0]/", f"https://example.com/{'x' * 5000}", "https://\ud800/", "\0",
        "https://example.com:\u0663/",
        "https://example.com./", "https://example_com/", "https://example.com%2eevil/", "HTTP://example.com/",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(TransferError, match="not an address"):
        target_of(url)


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://Example.COM/a/b?c=d#e", "https://example.com:443", "/a/b?c=d"),
        ("HTTPS://example.com", "https://example.com:443", "/"),
        ("https://example.com:8443//x", "https://example.com:8443", "//x"),
        ("http://127.0.0.1:80/", "http://127.0.0.1:80", "/"),
        ("http://[::1]:8000/x", "http://[::1]:8000", "/x"),
    ],
)
def test_addresses_are_taken_apart(url: str, origin: str, path: str) -> None:
    target = target_of(url)
    assert (target.origin, target.path) == (origin, path)


@given(
    st.text(max_size=30), st.sampled_from(["", "https://", "https://example.com", "https://example.com@", "http://"])
)
def test_only_the_listed_host_itself_is_allowed(text: str, start: str) -> None:
    downloader = Downloader(origins(["example.com"]))
    url = start + text
    if downloader.refusal(url) is None:
        assert target_of(url).host == "example.com" and target_of(url).port == 443
        assert url.lower().startswith(("https://example.com/", "https://example.com?", "https://example.com#",
                                       "https://example.com:443", "https://example.com:0443")) or url.lower() in (
            "https://example.com", "https://example.com:")  # fmt: skip


def test_the_list_of_hosts_is_exact() -> None:
    assert origins(["Example.com", "a.b:8443", "http://localhost:80"]) == {
        "https://example.com:443", "https://a.b:8443", "http://localhost:80"}  # fmt: skip
    for bad in ("http://example.com", "example.com/x", "*.example.com", "", "a,b", "example.com?x"):
        with pytest.raises(HubError):
            origins([bad])
