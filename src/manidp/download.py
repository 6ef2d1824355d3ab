"""One file from the web: only from hosts on a list, over verified TLS, resumed where it broke off, and verified.

The connection is made with the standard library's http.client, so that each hop of a redirect is checked before it is
followed and every wait has an end: a server must bring something worth having within each stretch of ``patience``
seconds, headers included, which the timeouts of single reads (all that http libraries offer) do not ensure.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import os
import random
import re
import shutil
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from manidp.errors import HubError
from manidp.files import sha256_of
from manidp.images import Progress

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 30.0
CONNECT_S = 10.0
LEAST_BYTES = 4096
"""What a server must bring in each stretch of ``patience`` seconds."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 2**16

Kind = Literal["refused", "unreachable", "missing", "passing", "wrong", "disk"]


class TransferError(HubError):
    """A transfer that failed, and how.

    ``refused``: a rule of ours forbids it; ``unreachable``: the host does not answer; ``missing``: the host has no
    such file; ``passing``: worth another try; ``wrong``: what came is not the file; ``disk``: it cannot be
    written, for want of room as a rule.
    """

    def __init__(self, kind: Kind, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.wait_s = wait_s


@dataclass(frozen=True)
class Target:
    """A checked address: ``origin`` is what the list of hosts holds, ``path`` what the server is asked for."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def target_of(url: str) -> Target:
    """Take an address apart. Only https has a meaning here, and http to this machine itself; else a TransferError."""

    def refusal(reason: str) -> TransferError:
        return TransferError("refused", f"{url[:200]!r} is not an address to download from: {reason}")

    if not re.fullmatch(r"[\x21-\x7e]+", url):
        raise refusal("it holds characters that addresses do not have")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refusal(str(error)) from error
    host = (parts.hostname or "").lower()
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise refusal("it must begin with https://")
    if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*|[0-9a-f:]+", host):
        raise refusal("it names no host")
    if "@" in parts.netloc:
        raise refusal("it holds a user name")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def origins(hosts: Iterable[str]) -> frozenset[str]:
    """A list of hosts as exact origins. An entry is ``HOST``, ``HOST:PORT`` or ``https://HOST[:PORT]``.

    ``http://127.0.0.1:PORT`` is allowed too: this machine itself. Raises HubError for anything else.
    """
    allowed = set()
    for entry in hosts:
        target = target_of(entry if "://" in entry else f"https://{entry}")
        if target.path != "/":
            raise HubError(f"{entry!r} in the list of hosts must be HOST or HOST:PORT, without a path")
        allowed.add(target.origin)
    return frozenset(allowed)


@dataclass(frozen=True)
class Downloader:
    """How files are brought.

    ``allowed``: the exact origins that may be asked, as :func:`origins` gives them; redirects are held to them too.
    ``patience``: seconds without anything worth having after which a server has stalled. ``attempts``: how often a
    transfer is tried while the failure may pass; the wait doubles from ``backoff`` seconds. ``offline``: nothing is
    asked at all and no socket opened.
    """

    allowed: frozenset[str]
    offline: bool = False
    patience: float = 30.0
    attempts: int = 4
    backoff: float = 0.5

    def refusal(self, url: str) -> str | None:
        """Why this address would not be asked, or None if it would."""
        try:
            target = target_of(url)
        except TransferError as error:
            return str(error)
        if target.origin not in self.allowed:
            known = ", ".join(sorted(self.allowed)) or "none"
            return f"the host of {url} is not on the list of allowed hosts ({known})"
        return None

    def text(self, url: str, limit: int) -> bytes:
        """A small file of at most ``limit`` bytes. Raises TransferError."""

        def once() -> bytes:
            with self._response(url, 0) as response:
                _expect_ok(response, url)
                content = bytearray()
                for chunk in response.body():
                    content += chunk
                    if len(content) > limit:
                        raise TransferError("wrong", f"{url}: more than {limit:,} bytes came")
                response.expect_whole(len(content))
                return bytes(content)

        for wait in self._waits():
            try:
                return once()
            except TransferError as error:
                self._wait_or_raise(error, wait)
        raise AssertionError("the last attempt returns or raises")

    def file(self, url: str, part: Path, sha256: str, limit: int, progress: Progress | None = None) -> None:
        """Bring a file of this digest to ``part``, going on with what already stands there.

        At the end ``part`` is on the disk and has the digest. On TransferError it holds nothing or the beginning of
        the file, for the next call to go on with; what has the wrong digest is deleted.
        """
        if part.exists() and sha256_of(part) == sha256:  # killed just before it could be said
            return
        for wait in self._waits():
            try:
                resumed = self._transfer(url, part, limit, progress)
                self._verify(url, part, sha256, resumed)
                return
            except TransferError as error:
                self._wait_or_raise(error, wait)

    def _waits(self) -> Iterator[float | None]:
        """Seconds to wait after each attempt; None after the last."""
        for attempt in range(self.attempts - 1):
            yield self.backoff * 2**attempt * random.uniform(0.5, 1.5)
        yield None

    def _wait_or_raise(self, error: TransferError, wait: float | None) -> None:
        if error.kind not in ("passing", "unreachable"):
            raise error
        if wait is None:
            tried = f" (tried {self.attempts} times)" if self.attempts > 1 else ""
            raise TransferError(error.kind, f"{error}{tried}") from error
        time.sleep(max(wait, min(error.wait_s, MAX_RETRY_AFTER_S)))

    def _transfer(self, url: str, part: Path, limit: int, progress: Progress | None) -> bool:
        """One attempt; whether it went on with what was there."""
        try:
            offset = part.stat().st_size if part.exists() else 0
            with self._response(url, offset) as response:
                if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
                    part.unlink()
                    raise TransferError("passing", f"{url}: cannot be resumed at byte {offset}")
                _expect_ok(response, url)
                if response.status == HTTPStatus.OK:
                    offset = 0  # the server sends all of it
                total = None if response.length is None else offset + response.length
                if (total or 0) > limit:
                    raise TransferError("refused", f"{url}: {total:,} bytes; the limit is {limit:,}")
                free = shutil.disk_usage(part.parent).free
                if response.length is not None and response.length > free:
                    raise OSError(errno.ENOSPC, f"{response.length:,} bytes are to come, {free:,} are free")
                done = offset
                with open(part, "ab" if offset else "wb") as file:
                    for chunk in response.body():
                        done += len(chunk)
                        if done > limit:
                            raise TransferError("wrong", f"{url}: more than {limit:,} bytes came")
                        file.write(chunk)
                        if progress is not None:
                            progress(done, total)
                    file.flush()
                    os.fsync(file.fileno())
                response.expect_whole(done - offset)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()  # give the room back
            raise TransferError("disk", f"{part.parent}: cannot be written to: {error.strerror or error}") from error
        except TransferError as error:
            if error.kind in ("wrong", "refused"):
                part.unlink(missing_ok=True)
            raise
        return offset > 0

    def _verify(self, url: str, part: Path, sha256: str, resumed: bool) -> None:
        came, size = sha256_of(part), part.stat().st_size
        if came == sha256:
            return
        with part.open("rb") as file:
            start = file.read(64)
        part.unlink()
        if resumed:  # what was there before may have been damaged, or the start of another version
            raise TransferError("passing", f"{url}: the resumed file has the wrong digest")
        page = " (an HTML page)" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""
        raise TransferError(
            "wrong", f"{url}: what came is not the file: sha256 {came} of {size:,} bytes{page}, expected {sha256}"
        )

    @contextlib.contextmanager
    def _response(self, url: str, offset: int) -> Iterator[_Response]:
        """The answer to a GET from byte ``offset`` on, every redirect checked before it is followed."""
        for _ in range(MAX_REDIRECTS + 1):
            refusal = self.refusal(url)
            if refusal is not None:
                raise TransferError("refused", refusal)
            if self.offline:
                raise TransferError("refused", f"{url}: not asked, as MANIDP_OFFLINE=1")
            target = target_of(url)
            with _Connection(target, self.patience) as connection:
                response = connection.get(target.path, offset)
                if response.status not in _REDIRECTS:
                    yield response
                    return
                location = response.headers.get("Location", "")
            if not location:
                raise TransferError("wrong", f"{url}: a redirect to nowhere")
            url = urllib.parse.urljoin(url, location)
        raise TransferError("wrong", f"{url}: more than {MAX_REDIRECTS} redirects")


def _expect_ok(response: _Response, url: str) -> None:
    status = response.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransferError("wrong", f"{url}: came encoded though it was not asked to be")
        return
    said = f"{url}: the server says {status} {response.reason}".rstrip()
    if status in _PASSING:
        after = response.headers.get("Retry-After", "")
        raise TransferError("passing", said, float(after) if after.isdecimal() else 0.0)
    raise TransferError("missing" if status in (404, 410) else "refused", said)


class _Response:
    """What a server answered, its body not yet read."""

    def __init__(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.status, self.reason, self.headers = response.status, response.reason[:100], response.headers
        self.length = response.length  # http.client's: None while unknown, as in chunked bodies

    def body(self) -> Iterator[bytes]:
        with self._connection.failures():
            while chunk := self._response.read1(_CHUNK):
                self._connection.received += len(chunk)
                yield chunk
        self._connection.check()

    def expect_whole(self, received: int) -> None:
        if self.length is not None and received < self.length:
            url = f"{self._connection.target.origin}{self._connection.target.path}"
            raise TransferError("passing", f"{url}: cut short, {received:,} of {self.length:,} bytes came")


class _Connection:
    """A connection to one host, watched: it is shut when too little comes through it for too long."""

    def __init__(self, target: Target, patience: float) -> None:
        self.target, self.patience = target, patience
        self.received = 0
        self._stalled = False
        self._done = threading.Event()
        self._http = self._connection()

    def _connection(self) -> http.client.HTTPConnection:
        target = self.target
        wait = min(self.patience, CONNECT_S)
        if target.scheme == "http":
            return http.client.HTTPConnection(target.host, target.port, timeout=wait)
        verified = ssl.create_default_context()
        proxy = "" if urllib.request.proxy_bypass(target.host) else urllib.request.getproxies().get("https", "")
        if not proxy:
            return http.client.HTTPSConnection(target.host, target.port, timeout=wait, context=verified)
        at = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if not at.hostname or at.scheme != "http":
            raise TransferError("refused", "the proxy that the environment names must be http://HOST:PORT")
        tunnel = http.client.HTTPSConnection(at.hostname, at.port or 80, timeout=wait, context=verified)
        login = base64.b64encode(urllib.parse.unquote(f"{at.username}:{at.password or ''}").encode()).decode()
        tunnel.set_tunnel(target.host, target.port, {"Proxy-Authorization": f"Basic {login}"} if at.username else {})
        return tunnel

    def __enter__(self) -> _Connection:
        with self.failures():
            self._http.connect()
            self._http.sock.settimeout(None)  # from here on the watch ends every wait
        self._watch = threading.Thread(target=self._watch_over, args=(self._http.sock,), daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()
        self._http.close()

    def _watch_over(self, connected: socket.socket) -> None:
        before = 0
        while not self._done.wait(self.patience):
            if self.received < before + LEAST_BYTES:
                self._stalled = True
                with contextlib.suppress(OSError):  # of the plain socket: TLS must not take part, it may be waiting
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)
                return
            before = self.received

    def check(self) -> None:
        if self._stalled:
            raise self._stall()

    def _stall(self) -> TransferError:
        said = f"stalled, {self.received:,} bytes came and then too little in {self.patience:g} s"
        return TransferError("passing" if self.received else "unreachable", f"{self.target.origin}: {said}")

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Failures of the network as TransferErrors."""
        where = self.target.origin
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message or error.reason
            raise TransferError("refused", f"{where}: its certificate is not trusted: {reason}") from error
        except TimeoutError as error:
            raise self._stall() from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.check()
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            kind: Kind = "passing" if self.received else "unreachable"
            raise TransferError(kind, f"{where}: the connection failed: {reason}") from error

    def get(self, path: str, offset: int) -> _Response:
        headers = {"User-Agent": "manidp", "Accept": "*/*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self.failures():
            self._http.request("GET", path, headers=headers)
            return _Response(self, self._http.getresponse())
