"""Mutants of what strangers send: cards, archives of cards, CIFAR-10's files, answers of servers, a spoiled cache.

As in mutate.py a number names a mutant. Each attempt ends well or in one of our errors, of one short line.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from hostile.mutate import NAMES, spoiled
from manidp.data.cifar10 import fetch_cifar10
from manidp.data.images import CIFAR10_SHA1
from manidp.errors import CardError, HubError, ImageError, ManiDPError
from manidp.fetch.download import Downloader, TransferError, origins
from manidp.files import sha256_of
from manidp.hub.card import card_faults, parse_card, render_card
from manidp.hub.hub import CARDS, Folder, Website, open_hub
from test_cifar10 import as_npm, as_python, packed

UID = "me/1.0/a"
LINKS = (
    "http://[", "//[", "https://", "https://h:x/", "https://h:99999/", "https://\ud800/", "https://u:p@h/", "file:///x",
    "https://h/\x00", "https://h/\x1b[31m", "javascript:x", "https://" + "a" * 300 + "/", "https://ex\xe4mple.com/f",
    "..", "https://h/../../x", "https://h/" + "%2e" * 5000, "https://127.0.0.1:9/f", "data:,x", "\\\\h\\x",
    "https://h?#", "<>",
)  # fmt: skip
PIECES = (
    b"---", b"---\n", b"\n---\n", b"\n", b"\r", b"\r\n", b": ", b"\xef\xbc\x9a", b"<", b">", b"- ", b"  - ", b"\t",
    b"#", b"# ", b"asset:", b"asset-link: ", b"asset-sha256: ", b"file-format: ckpt", b"```", b"|", b"\xef\xbb\xbf",
    b"\xff", b"\x00", b"\xed\xa0\x80", b"\xe2\x80\xae", b"a: &x [*x, *x]", b"!!python/object/apply:os.system ['x']",
    b"{{", b"0" * 63, b"f" * 64, b"F" * 64, b" " * 300, b"[" * 300, b"key: value\n" * 400,
)  # fmt: skip


@cache
def _cards() -> tuple[bytes, ...]:
    """The bundled cards, and those of an archive or folder that HOSTILE_CARDS names."""
    found = [path.read_bytes() for path in sorted(CARDS.rglob("*.md"))]
    more = os.environ.get("HOSTILE_CARDS")
    if more:
        source = next(iter(open_hub([more]).sources))
        found += [content for uid in source.uids() if (content := source.read(uid)) is not None]
    return tuple(found)


def card_mutant(seed: int) -> bytes:
    rng = random.Random(seed)
    made = rng.choice(_cards())
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines = made.split(b"\n")
        at = rng.randrange(len(lines))
        choice = rng.randrange(8)
        if choice == 0:
            link = rng.choice(LINKS).encode("utf-8", rng.choice(("surrogatepass", "replace")))
            lines[at] = rng.choice((b"    asset-link: <", b"repo-link: ", b"- asset-link: ")) + link
            lines += [b""] * rng.randrange(2)
        elif choice == 1:
            lines[at] = rng.choice(PIECES) + lines[at]
        elif choice == 2:
            lines[at] = lines[at].partition(b":")[0] + b": " + rng.choice(NAMES).encode("utf-8", "surrogatepass")
        elif choice == 3:
            lines[at:at] = lines[rng.randrange(len(lines)) :][: rng.choice((1, 5, 50))] * rng.choice((1, 2, 20))
        elif choice == 4:
            del lines[at : at + rng.choice((1, 3, 1000))]
        elif choice == 5:
            rng.shuffle(lines)
        else:
            place = rng.randrange(len(made) + 1)
            lines = (made[:place] + rng.choice(PIECES) * rng.choice((1, 1, 40)) + made[place:]).split(b"\n")
        made = b"\n".join(lines)
    return spoiled(rng, made) if rng.random() < 0.3 else made


def try_card(path: Path, runs: bool) -> str:
    content = path.read_bytes()
    place = path.parent / "cards" / UID
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_bytes(content)
    hub = open_hub([path.parent / "cards"], cache=path.parent / "cache", offline=True)
    try:
        card_faults(content, "mutant")
        with contextlib.suppress(CardError):
            assert parse_card(render_card(parse_card(content, "mutant")).encode(), "mutant")
        hub.fetch(hub.resolve(UID))
    except (HubError, CardError) as error:
        assert_one_line(error)
        return "refused by the parser" if isinstance(error, CardError) else "refused"
    return "had"


def _tar(rng: random.Random) -> bytes:
    """A tar with headers that are wrong in places and have their right checksums."""
    buffer = io.BytesIO()
    kind = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name in ("me/1.0/a.md", "x" * 60 + "/" + "y" * 60 + "/long.md", "me/gpu/1.0/b.md", "other"):
            member = tarfile.TarInfo(name)
            content = rng.choice(_cards())
            member.size = len(content)
            member.mtime = rng.choice((0, 1))
            if rng.random() < 0.2:
                member.pax_headers = {rng.choice(("path", "size", "GNU.sparse.map", "hdrcharset", "x")): rng.choice(
                    ("0", "-1", "9" * 30, "me/1.0/c.md", "BINARY", "1,2,3"))}  # fmt: skip
            archive.addfile(member, io.BytesIO(content))
    made = bytearray(buffer.getvalue())
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        heads = [at for at in range(0, len(made) - 511, 512) if made[at + 257 : at + 262] == b"ustar"] or [0]
        at = rng.choice(heads)
        where = rng.choice((124, 124, 156, 156, 257, 345, 0, 482, rng.randrange(512)))
        new = rng.choice(
            (b"7" * 11, b"-1", b"\x80" + b"\xff" * 11, b"x", b"g", b"L", b"K", b"S", b"5", b"\0" * 12, b"\xff")
        )
        made[at + where : at + where + len(new)] = new
        made[at + 148 : at + 156] = b" " * 8
        made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def archive_mutant(seed: int) -> bytes:
    rng = random.Random(seed)
    choice = rng.randrange(6)
    if choice < 2:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name in ("me/1.0/a.md", "me/gpu/1.0/b.md", "other", "me/1.0/c.md/"):
                archive.writestr(name, b"" if name.endswith("/") else rng.choice(_cards())[:2000])
        made = buffer.getvalue()
        at = made.rfind(b"PK\1\2", 0, -22 - rng.randrange(200))
        made = made[:at] + spoiled(rng, made[at:]) if rng.random() < 0.5 else spoiled(rng, made)
        return made
    made = _tar(rng)
    pack = (bytes, gzip.compress, bz2.compress, lambda data: lzma.compress(data, preset=0))[choice - 2]
    made = pack(spoiled(rng, made) if rng.random() < 0.3 else made)
    return spoiled(rng, made) if rng.random() < 0.3 else made


def try_archive(path: Path, runs: bool) -> str:
    try:
        hub = open_hub([path], cache=path.parent / "cache", offline=True)
        uids = hub.sources[0].uids()
        for uid in uids:
            with contextlib.suppress(CardError):
                hub.card(uid)
    except HubError as error:
        assert_one_line(error)
        return "refused"
    return f"read, {min(len(list(uids)), 5)} cards"


@cache
def _batches() -> tuple[dict[str, bytes], ...]:
    records = np.random.default_rng(0).integers(0, 10, (12, 3073), dtype=np.uint8).tobytes()
    binary = dict.fromkeys(CIFAR10_SHA1, records)
    return binary, as_python(binary), as_npm(binary)


def cifar_mutant(seed: int) -> bytes:
    rng = random.Random(seed)
    files = dict(rng.choice(_batches()))
    first = [name for name in files if "data_batch_1" in name or "json" in name]
    name = rng.choice(first)
    files[name] = spoiled(rng, files[name])
    made = packed(files, "cifar-10-batches", "w")
    return spoiled(rng, made) if rng.random() < 0.2 else gzip.compress(made, 1) if rng.random() < 0.2 else made


def try_cifar(path: Path, runs: bool) -> str:
    try:
        fetch_cifar10(path.parent / "cifar10", path)
    except ImageError as error:
        assert_one_line(error)
        assert not (path.parent / "cifar10").exists()
        return "refused: " + (
            "broken" if "is broken" in str(error) else "archive" if "archive" in str(error) else "other"
        )
    raise AssertionError("a mutant is no CIFAR-10")


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-4/5\r\nContent-Length: 3\r\n\r\nllo",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
)  # fmt: skip

HEADERS = (
    b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 5", b"Transfer-Encoding: chunked",
    b"Location: http://[", b"X: y\r\n" * 200, b"x" * 70_000, b"-1", b"fffffffff", b"\x1b[31m\x00",
)  # fmt: skip


def answer_mutant(seed: int) -> bytes:
    rng = random.Random(seed)
    made = rng.choice(ANSWERS)
    if b"%s" in made:
        link = rng.choice((*LINKS, *NAMES)).encode("utf-8", "surrogatepass")
        made = made.replace(b"%s", link.replace(b"\n", b"\r"))
    for _ in range(rng.choice((0, 1, 2))):
        lines = made.split(b"\r\n")
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(rng.choice((HEADERS, PIECES))))
        made = b"\r\n".join(lines)
    return spoiled(rng, made) if rng.random() < 0.7 else made


class _Server:
    """Answers every connection with ``answer``, and hangs up."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.answer = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listening.accept()
            with client, contextlib.suppress(OSError):
                client.recv(2**16)
                client.sendall(self.answer)


@cache
def _server(process: int) -> _Server:
    return _Server()


def try_answer(path: Path, runs: bool) -> str:
    server = _server(os.getpid())
    server.answer = path.read_bytes()
    downloader = Downloader(origins([server.origin]), attempts=1, patience=0.5, grace=2.0)
    part = path.parent / "part"
    try:
        downloader.text(f"{server.origin}/t", 1000)
        downloader.file(f"{server.origin}/f", part, "0" * 64, 1000)
    except TransferError as error:
        assert_one_line(error)
        part.unlink(missing_ok=True)
        return error.kind
    raise AssertionError("no mutant has this digest")


def cache_mutant(seed: int) -> bytes:
    return seed.to_bytes(8, "big")


def try_cache(path: Path, runs: bool) -> str:
    """Whatever stands in the cache: nothing beside it is touched, and nothing wrong is had from it."""
    rng = random.Random(path.read_bytes())
    digest = rng.choice(_digests())
    root = path.parent / "root"
    with _emptied(root):
        outside, hub_cache = root / "outside", root / "cache"
        outside.mkdir(parents=True)
        (outside / digest).write_bytes(b"mine")
        key = Website("https://h/cards", Downloader(frozenset()), hub_cache)._key
        names = ("files", "parts", "locks", "cards", f"files/{digest}", f"parts/{digest}", f"locks/{digest}",
                 f"cards/{key}", f"cards/{key}/me", f"cards/{key}/me/1.0", f"cards/{key}/{UID}.md", ".")  # fmt: skip
        for name in rng.sample(names, rng.choice((1, 2, 4))):
            with contextlib.suppress(OSError):
                _put(rng, hub_cache / name, outside, digest)
        try:
            hub = open_hub(["https://h/cards"], cache=hub_cache, offline=True)
            list(hub.cards(["me/"]))
            list(hub.verify(remove=rng.random() < 0.5))
            had = hub.fetch(hub.resolve(UID))  # offline there is the bundled model's file
            assert sha256_of(had) == had.name and had.parent == hub_cache / "files"
        except (HubError, CardError) as error:
            assert_one_line(error)
            outcome = "link" if "symbolic link" in str(error) else "card" if isinstance(error, CardError) else "refused"
        else:
            outcome = "had"
        assert [(p.name, p.read_bytes()) for p in outside.iterdir()] == [(digest, b"mine")], (
            "something beside the cache"
        )
    return outcome


@cache
def _digests() -> tuple[str, ...]:
    folder = Folder(CARDS)
    cards = [parse_card(folder.read(uid) or b"", str(uid)) for uid in folder.uids()]
    return tuple(sorted({asset.sha256 for card in cards for asset in card.assets}))


def _put(rng: random.Random, path: Path, outside: Path, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    choice = rng.randrange(6)
    if choice == 0:
        path.symlink_to(rng.choice((outside, outside / digest, outside / "new", path, Path("/dev/zero"), Path("/"))))
    elif choice == 1:
        os.mkfifo(path)
    elif choice == 2:
        path.mkdir()
    elif choice == 3:
        path.write_bytes(card_mutant(rng.randrange(2**32)))
    elif choice == 4:
        path.write_bytes(rng.choice(_cards()).replace(b"https://", rng.choice((b"http://[", b"https://h/"))))
    else:
        path.write_bytes(rng.choice((b"", b"{", b"null", b"NaN", b'{"a": [' * 99, bytes(5000))))


@contextlib.contextmanager
def _emptied(root: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for folder, _, names in os.walk(root, topdown=False):
            for name in names:
                os.unlink(os.path.join(folder, name))
            for name in os.listdir(folder):
                inner = os.path.join(folder, name)
                (os.unlink if os.path.islink(inner) else os.rmdir)(inner)
        if root.exists():
            root.rmdir()


def assert_one_line(error: ManiDPError) -> None:
    text = str(error)
    assert len(text) < 2000 and text.isprintable() and text.encode(), f"not one short line: {text[:300]!r}"


KINDS: dict[str, tuple[Callable[[int], bytes], Callable[[Path, bool], str]]] = {
    "card": (card_mutant, try_card),
    "archive": (archive_mutant, try_archive),
    "cifar": (cifar_mutant, try_cifar),
    "answer": (answer_mutant, try_answer),
    "cache": (cache_mutant, try_cache),
}
