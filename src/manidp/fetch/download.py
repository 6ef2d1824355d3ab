"""One file from the web: only from hosts on a list, over verified TLS, resumed where it broke off, and verified.

The connection is made with the standard library's http.client, so that each hop of a redirect is checked before it is
followed and every wait has an end, from the first byte of TLS to the last of the body: a server must keep up a least
rate, and the whole call has a time limit, neither of which the timeouts of single reads (all that http libraries
offer) ensure. Whatever a card, a redirect, a proxy or a server says, the only error is a TransferError.
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
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from manidp.errors import HubError, quoted
from manidp.files import open_regular, sha256_of
from manidp.progress import Progress

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 30.0
MAX_ADDRESS = 4096
CONNECT_S = 10.0

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
        return TransferError("refused", f"{quoted(url)} is not an address to download from: {reason}")

    if len(url) > MAX_ADDRESS:
        raise refusal(f"it has {len(url):,} characters; at most {MAX_ADDRESS:,} are taken")
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
    if not _is_host(host):
        raise refusal("it names no host")
    if port == 0:
        raise refusal("it names port 0, where nothing is")
    if "@" in parts.netloc:
        raise refusal("it holds a user name")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def _short(url: str) -> str:
    """A checked address as a message can hold it."""
    return url if len(url) <= 200 else f"{url[:200]}..."


def _is_host(name: str) -> bool:
    """Whether this is the name of a host, or an address of IPv4 or IPv6."""
    return re.fullmatch(r"(?=.{1,253}$)[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*|[0-9a-f:.]{2,45}", name) is not None


def origins(hosts: Iterable[str]) -> frozenset[str]:
    """A list of hosts as exact origins. An entry is ``HOST``, ``HOST:PORT`` or ``https://HOST[:PORT]``.

    ``http://127.0.0.1:PORT`` is allowed too: this machine itself. Raises HubError for anything else.
    """
    allowed = set()
    for entry in hosts:
        try:
            target = target_of(entry if "://" in entry else f"https://{entry}")
        except TransferError as error:
            raise HubError(f"the list of hosts: {error}") from error
        if target.path != "/":
            raise HubError(f"{quoted(entry)} in the list of hosts must be HOST or HOST:PORT, without a path")
        allowed.add(target.origin)
    return frozenset(allowed)


def is_offline() -> bool:
    """Whether MANIDP_OFFLINE says that no socket is opened: it is set, and not to 0."""
    return os.environ.get("MANIDP_OFFLINE", "0") not in ("", "0")


@dataclass(frozen=True)
class Downloader:
    """How files are downloaded.

    ``allowed``: the exact origins that may be asked, as :func:`origins` gives them; redirects are held to them too.
    ``offline``: nothing is asked at all and no socket opened. ``attempts``: how often a transfer is tried while the
    failure may pass; the wait doubles from ``backoff`` seconds.

    ``patience``, in seconds: an answer's headers must be there within it, and in each such stretch of the body at least
    ``least_rate`` bytes a second must come on average. A whole call, with all its attempts and redirects, may take
    ``grace`` seconds and then as long as its bytes take at ``mean_rate`` bytes a second: a file of 4 GiB has 36 hours.
    """

    allowed: frozenset[str]
    offline: bool = False
    patience: float = 30.0
    attempts: int = 4
    backoff: float = 0.5
    least_rate: float = 16 * 2**10
    mean_rate: float = 32 * 2**10
    grace: float = 120.0

    def refusal(self, url: str) -> str | None:
        """Why this address would not be asked, or None if it would."""
        try:
            target = target_of(url)
        except TransferError as error:
            return str(error)
        if target.origin not in self.allowed:
            known = ", ".join(sorted(self.allowed)) or "none"
            return f"the host of {_short(url)} is not on the list of allowed hosts ({known})"
        return None

    def text(self, url: str, limit: int) -> bytes:
        """A small file of at most ``limit`` bytes. Raises TransferError."""

        clock = _Clock(self)

        def once() -> bytes:
            with self._response(url, 0, clock) as response:
                if not response.goes_on_at(0):
                    raise TransferError(
                        "passing", f"{_short(url)}: the server sends a part without being asked for one"
                    )
                _expect_ok(response, url)
                clock.allow(limit)
                content = bytearray()
                for chunk in response.body():
                    content += chunk
                    if len(content) > limit:
                        raise TransferError("wrong", f"{_short(url)}: more than {limit:,} bytes came")
                response.expect_whole(len(content))
                return bytes(content)

        for wait in self._waits():
            try:
                return once()
            except TransferError as error:
                self._wait_or_raise(error, wait, clock)
        raise AssertionError("the last attempt returns or raises")

    def file(self, url: str, part: Path, sha256: str, limit: int, progress: Progress | None = None) -> None:
        """Bring a file of this digest to ``part``, resuming what is already there.

        At the end ``part`` is on the disk and has the digest. On TransferError it holds nothing or the beginning of
        the file, for the next call to resume; what has the wrong digest is deleted. A ``part`` that is a symbolic
        link, or no regular file, is an error and is left as it is.
        """
        clock = _Clock(self)
        try:
            if sha256_of(part, follow=False) == sha256:  # killed just before it could be said
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TransferError("disk", f"{part}: cannot be resumed: {error.strerror or error}") from error
        for wait in self._waits():
            try:
                resumed = self._transfer(url, part, limit, progress, clock)
                self._verify(url, part, sha256, resumed)
                return
            except TransferError as error:
                self._wait_or_raise(error, wait, clock)

    def _waits(self) -> Iterator[float | None]:
        """Seconds to wait after each attempt; None after the last."""
        for attempt in range(self.attempts - 1):
            yield self.backoff * 2**attempt * random.uniform(0.5, 1.5)
        yield None

    def _wait_or_raise(self, error: TransferError, wait: float | None, clock: _Clock) -> None:
        if error.kind not in ("passing", "unreachable"):
            raise error
        if wait is None:
            tried = f" (tried {self.attempts} times)" if self.attempts > 1 else ""
            raise TransferError(error.kind, f"{error}{tried}") from error
        wait = max(wait, min(error.wait_s, MAX_RETRY_AFTER_S))
        if clock.left() <= wait:
            raise error
        time.sleep(wait)

    def _transfer(self, url: str, part: Path, limit: int, progress: Progress | None, clock: _Clock) -> bool:
        """One attempt; whether it went on with what was there."""
        try:
            offset = _size(part)
            with self._response(url, offset, clock) as response:
                if not response.goes_on_at(offset):
                    part.unlink(missing_ok=True)
                    raise TransferError("passing", f"{_short(url)}: the server does not resume at byte {offset:,}")
                _expect_ok(response, url)
                if response.status == HTTPStatus.OK:
                    offset = 0  # the server sends all of it
                total = None if response.length is None else offset + response.length
                if (total or 0) > limit:
                    raise TransferError("refused", f"{_short(url)}: {total:,} bytes; the limit is {limit:,}")
                clock.allow(limit if total is None else total)
                free = shutil.disk_usage(part.parent).free
                if response.length is not None and response.length > free:
                    raise OSError(errno.ENOSPC, f"{response.length:,} bytes are to come, {free:,} are free")
                done = offset
                with open(part, "ab" if offset else "wb", opener=_own_file) as file:
                    for chunk in response.body():
                        done += len(chunk)
                        if done > limit:
                            raise TransferError("wrong", f"{_short(url)}: more than {limit:,} bytes came")
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
        came, size = sha256_of(part), _size(part)
        if came == sha256:
            return
        with open_regular(part) as file:
            start = file.read(64)
        part.unlink()
        if resumed:  # what was there before may have been damaged, or the start of another version
            raise TransferError("passing", f"{_short(url)}: the resumed file has the wrong digest")
        page = " (an HTML page)" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""
        raise TransferError(
            "wrong",
            f"{_short(url)}: what came is not the file: sha256 {came} of {size:,} bytes{page}, expected {sha256}",
        )

    @contextlib.contextmanager
    def _response(self, url: str, offset: int, clock: _Clock) -> Iterator[_Response]:
        """The answer to a GET from byte ``offset`` on, every redirect checked before it is followed."""
        for _ in range(MAX_REDIRECTS + 1):
            refusal = self.refusal(url)
            if refusal is not None:
                raise TransferError("refused", refusal)
            if self.offline:
                raise TransferError("refused", f"{_short(url)}: not asked, as MANIDP_OFFLINE=1")
            target = target_of(url)
            with _Connection(target, self, clock) as connection:
                response = connection.get(target.path, offset)
                if response.status not in _REDIRECTS:
                    yield response
                    return
                location = response.headers.get("Location", "")
            if not location:
                raise TransferError("wrong", f"{_short(url)}: a redirect to nowhere")
            try:
                url = urllib.parse.urljoin(url, location)
            except ValueError as error:
                said = f"{_short(url)}: a redirect to {quoted(location)}, which is no address: {error}"
                raise TransferError("refused", said) from error
        raise TransferError("wrong", f"{_short(url)}: more than {MAX_REDIRECTS} redirects")


def _own_file(path: str, flags: int) -> int:
    """An opener for ``open``: writes to a regular file only, and never to another one through a symbolic link."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags & ~os.O_TRUNC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _size(part: Path) -> int:
    try:
        with open_regular(part, follow=False) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0


class _Clock:
    """The time that one call has, all its attempts together."""

    def __init__(self, downloader: Downloader) -> None:
        self._start, self._downloader = time.monotonic(), downloader
        self.limit_s = downloader.grace

    def allow(self, size: int) -> None:
        """So many bytes are to come."""
        self.limit_s = self._downloader.grace + size / self._downloader.mean_rate

    def left(self) -> float:
        return self._start + self.limit_s - time.monotonic()


def _expect_ok(response: _Response, url: str) -> None:
    status = response.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransferError("wrong", f"{_short(url)}: came encoded though it was not asked to be")
        return
    said = f"{_short(url)}: the server says {status}" + (f" {quoted(response.reason)}" if response.reason else "")
    if status in _PASSING:
        after = response.headers.get("Retry-After", "")
        raise TransferError("passing", said, float(after) if re.fullmatch("[0-9]{1,9}", after) else 0.0)
    raise TransferError("missing" if status in (404, 410) else "refused", said)


class _Response:
    """What a server answered, its body not yet read; ``length``: of the body, None while unknown, as in chunks."""

    def __init__(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", ())}
        self.length: int | None = None
        if lengths and not response.chunked:
            told = " and ".join(sorted(lengths))
            if not re.fullmatch("[0-9]{1,20}", told):
                said = f"a Content-Length of {quoted(told)}"
                raise TransferError("wrong", f"{connection.target.origin}: the server says {said}")
            self.length = response.length

    def goes_on_at(self, offset: int) -> bool:
        """Whether this continues a file of ``offset`` bytes: it is not a part, or it is the part that follows."""
        if self.status == HTTPStatus.PARTIAL_CONTENT:
            span = self.headers.get("Content-Range", "").strip()
            return re.match(rf"bytes {offset}-[0-9]{{1,18}}/", span, re.IGNORECASE) is not None
        return self.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or offset == 0

    def body(self) -> Iterator[bytes]:
        with self._connection.failures():
            while chunk := self._response.read1(_CHUNK):
                self._connection.received += len(chunk)
                yield chunk

    def expect_whole(self, received: int) -> None:
        if self.length is not None and received < self.length:
            url = f"{self._connection.target.origin}{self._connection.target.path}"
            raise TransferError("passing", f"{_short(url)}: cut short, {received:,} of {self.length:,} bytes came")


@dataclass(frozen=True)
class _Proxy:
    """The way to all hosts but this machine; ``login`` as headers have it, ``setting``: who says so."""

    host: str
    port: int
    login: str
    setting: str

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} that {self.setting} names"


def _proxy_to(host: str) -> _Proxy | None:
    """The proxy that the environment, or else the system, names. Raises TransferError if that cannot be one."""
    address = "" if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https", "")
    if not address:
        return None
    variables = (name for name in os.environ if name.lower() == "https_proxy" and os.environ[name] == address)
    setting = next(variables, "the system")

    def refusal(reason: str) -> TransferError:
        shown = quoted(re.sub(r"[^/]*@", "...@", address))  # the password is not shown
        return TransferError(
            "refused", f"the proxy that {setting} names must be http://HOST:PORT; got {shown}: {reason}"
        )

    try:
        at = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        port = at.port
    except ValueError as error:
        raise refusal(quoted(str(error))) from error
    name = (at.hostname or "").lower()
    if at.scheme != "http" or not _is_host(name) or port == 0:
        raise refusal("it names no host and port" if at.scheme == "http" else "another scheme")
    user, password = (urllib.parse.unquote(part or "") for part in (at.username, at.password))
    login = base64.b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode() if user else ""
    return _Proxy(name, port or 80, login, setting)


class _Connection:
    """A connection to one host, watched: it is shut when too little comes through it, or when the time is up."""

    def __init__(self, target: Target, downloader: Downloader, clock: _Clock) -> None:
        self.target, self._downloader, self._clock = target, downloader, clock
        self.received = 0  # of the body; nothing else is worth having
        self._before, self._until = 0, time.monotonic() + downloader.patience
        self._shut = ""  # why
        self._sock: socket.socket | None = None  # http.client forgets it once it has the headers
        self._answer: http.client.HTTPResponse | None = None
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._watch_over, daemon=True)
        self._proxy = _proxy_to(target.host) if target.scheme == "https" else None
        wait = min(downloader.patience, CONNECT_S)
        first = self._proxy or target
        self._http = http.client.HTTPConnection(first.host, first.port, timeout=wait)
        if self._proxy:
            login = {"Proxy-Authorization": f"Basic {self._proxy.login}"} if self._proxy.login else {}
            self._http.set_tunnel(target.host, target.port, login)

    def __enter__(self) -> _Connection:
        self._watch.start()
        try:
            with self.failures(self._proxy):
                self._http.connect()
                self._sock = self._http.sock
                self._sock.settimeout(None)  # from here on the watch ends every wait
            if self.target.scheme == "https":
                with self.failures():
                    tls = ssl.create_default_context().wrap_socket(
                        self._sock, server_hostname=self.target.host, do_handshake_on_connect=False
                    )
                    self._sock = self._http.sock = tls
                    tls.do_handshake()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()
        for opened in (self._answer, self._sock, self._http):
            if opened is not None:
                opened.close()

    def _watch_over(self) -> None:
        least, patience = self._downloader.least_rate, self._downloader.patience
        while not self._shut:
            now, left = time.monotonic(), self._clock.left()
            if left <= 0:
                self._shut = (
                    f"too slow, {self.received:,} bytes came and the {self._clock.limit_s:,.0f} s for it are over"
                )
            elif now < self._until:
                if self._done.wait(min(self._until - now, left)):
                    return
            elif self.received - self._before < least * patience:
                slow = f"less than {least:,.0f} a second in {patience:g} s"
                self._shut = f"stalled, {self.received:,} bytes came and then {slow}"
            else:
                self._before, self._until = self.received, now + patience
        while True:
            sock = self._sock or self._http.sock
            if sock is not None:
                with contextlib.suppress(OSError):  # of the plain socket: TLS must not take part, it may be waiting
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            if self._done.wait(0.05):  # again until it is noticed: the socket may be about to be wrapped
                return

    def _check(self, where: object) -> None:
        if self._shut:
            raise TransferError("passing" if self.received else "unreachable", f"{where}: {self._shut}")

    @contextlib.contextmanager
    def failures(self, where: object = None) -> Iterator[None]:
        """Failures of the network as TransferErrors."""
        where = where or self.target.origin
        try:
            yield
            self._check(where)
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message or error.reason
            raise TransferError("refused", f"{where}: its certificate is not trusted: {reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._check(where)
            reason = (isinstance(error, OSError) and error.strerror) or quoted(str(error) or type(error).__name__)
            kind: Kind = "passing" if self.received else "unreachable"
            raise TransferError(kind, f"{where}: the connection failed: {reason}") from error

    def get(self, path: str, offset: int) -> _Response:
        target = self.target
        default = 443 if target.scheme == "https" else 80
        host = target.origin.partition("://")[2].removesuffix(f":{default}")
        headers = {"Host": host, "User-Agent": "manidp", "Accept": "*/*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self.failures():
            self._http.request("GET", path, headers=headers)
            response = self._answer = self._http.getresponse()
        self._until = time.monotonic() + self._downloader.patience
        return _Response(self, response)
