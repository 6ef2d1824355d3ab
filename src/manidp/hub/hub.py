"""Models by name: a uid leads to a card, the card to a file and its sha256, the sha256 to a verified file on disk.

First it is decided, then done. ``resolve`` reads cards and says which file a uid stands for, which digest it must
have and where it could come from; ``fetch`` brings it. The cache knows files by their digest alone, so that all names
of one file share it, and a file is verified again each time it is asked for. Nothing that is downloaded is executed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from manidp.data.preprocessing import Preprocessing
from manidp.errors import CardError, HubError, quoted, short
from manidp.fetch.archive import ArchiveError, members
from manidp.fetch.download import Downloader, TransferError, is_offline, origins, target_of
from manidp.files import open_regular, replacing, sha256_of, sweep, sync_folder
from manidp.formats.checkpoint import Found, load_checkpoint
from manidp.formats.ckpt import read_ckpt, write_ckpt
from manidp.formats.conversion import from_ckpt, to_ckpt
from manidp.gating.place import with_gates
from manidp.hub.card import MAX_CARD_BYTES, Asset, ModelCard, Remark, parse_card
from manidp.models import resnet
from manidp.progress import Progress

HOSTS = ("download.mindspore.cn",)
"""The host of the hub's weights; all that is asked unless the user allows more."""
DATA = Path(__file__).parents[1] / "data"
CARDS = DATA / "cards"
"""The bundled catalogue."""

MAX_ASSET_BYTES = 4 * 2**30
MAX_CARDS = 20_000
MAX_ARCHIVE_BYTES = 32 * 2**20
FORGOTTEN_S = 30 * 86_400
"""A download that was interrupted so long ago is deleted, not resumed."""
_PART = re.compile(r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?")
_TREE = "mshub_res/assets/"  # where cards are in the hub's repository
_DEVICES = {"ascend", "cpu", "gpu"}  # of the names with four parts
_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Uid:
    """The name of a card: publisher/version/stem or publisher/device/version/stem; raises HubError as parse_uid."""

    publisher: str
    device: str  # "" where the name has three parts
    version: str
    stem: str

    def __post_init__(self) -> None:
        parts = [self.publisher, self.version, self.stem, *([self.device] if self.device else [])]
        if not all(_PART.fullmatch(part) for part in parts):
            raise _no_name(str(self))

    def __str__(self) -> str:
        return "/".join(part for part in (self.publisher, self.device, self.version, self.stem) if part)


def parse_uid(text: str) -> Uid:
    """A uid, or the address of its card on the hub (``https://.../mshub_res/assets/UID.md``).

    Each part is of letters, digits, '_', '.' and '-', does not start with '.' or '-' nor end in '.', has at most 100 of
    them, and is no name of a device on Windows (such as nul). Raises HubError.
    """
    name = text
    if re.match("https?://", text):
        path = text.partition("://")[2].removesuffix(".md").split("/")[1:]
        tail = "/".join(path).partition(_TREE)[2]
        name = tail or "/".join(path[-4 if _DEVICES.intersection(path[-3:-2]) else -3 :])
    try:
        match name.split("/"):
            case [publisher, version, stem]:
                return Uid(publisher, "", version, stem)
            case [publisher, device, version, stem] if device:
                return Uid(publisher, device, version, stem)
    except HubError:
        pass
    raise _no_name(text)


def _no_name(text: str) -> HubError:
    return HubError(
        f"{quoted(text)} is not the name of a card: publisher/version/name or publisher/device/version/name expected, "
        "such as noah-cvlab/gpu/1.1/manidp_v1.0_cifar10"
    )


# Where cards are ----------------------------------------------------------------------------------------------------


class Source(Protocol):
    """A place with cards."""

    name: str

    def uids(self) -> Iterable[Uid]:
        """The cards that can be listed."""

    def read(self, uid: Uid, ask: bool = True) -> bytes | None:
        """The text of a card, or None if it is not here; the web is asked only with ``ask``. Raises HubError."""

    def beside(self, uid: Uid, filename: str) -> Path | None:
        """A file of this name beside the card, on this machine; not verified."""


class Folder:
    """Cards in a folder, ``UID.md`` each; also a checkout of the hub's repository."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.name = name or str(path)
        self._root = path / _TREE if os.path.isdir(path / _TREE) else path
        if not os.path.isdir(self._root):
            raise HubError(f"{quoted(str(path))} is no folder of cards")

    def uids(self) -> Iterator[Uid]:
        found = 0
        for pattern in ("*/*/*.md", "*/*/*/*.md"):  # no name has more parts, so a loop of links has an end
            for path in self._root.glob(pattern):
                with contextlib.suppress(HubError):
                    yield parse_uid(path.relative_to(self._root).as_posix().removesuffix(".md"))
                    found += 1
                if found > MAX_CARDS:
                    raise HubError(f"{quoted(self.name)}: more than {MAX_CARDS:,} cards")

    def read(self, uid: Uid, ask: bool = True) -> bytes | None:
        path = self._root / f"{uid}.md"
        try:
            with open_regular(path) as file:
                return file.read(MAX_CARD_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise HubError(f"{quoted(str(path))}: cannot be read: {error.strerror}") from error

    def beside(self, uid: Uid, filename: str) -> Path | None:
        path = (self._root / str(uid)).parent / filename
        return path if os.path.isfile(path) else None


class Archive:
    """Cards in a .zip or .tar file (.gz, .bz2 and .xz too); nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    @cached_property
    def _cards(self) -> dict[Uid, bytes]:
        cards: dict[Uid, bytes] = {}
        try:
            with open_regular(self._path) as file:
                for name, content in members(file, _is_card, MAX_CARD_BYTES + 1, MAX_ARCHIVE_BYTES):
                    with contextlib.suppress(HubError):
                        path = posixpath.normpath(name)
                        cards[parse_uid((path.partition(_TREE)[2] or path).removesuffix(".md"))] = content
        except (OSError, ArchiveError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise HubError(f"{quoted(self.name)} is no whole .zip or .tar archive of cards: {reason}") from error
        if len(cards) > MAX_CARDS:
            raise HubError(f"{quoted(self.name)}: more than {MAX_CARDS:,} cards")
        return dict(sorted(cards.items()))

    def uids(self) -> Iterable[Uid]:
        return self._cards

    def read(self, uid: Uid, ask: bool = True) -> bytes | None:
        return self._cards.get(uid)

    def beside(self, uid: Uid, filename: str) -> Path | None:
        return None


def _is_card(name: str) -> bool:
    return name.endswith(".md")


class Website:
    """Cards under an https address, ``BASE/UID.md`` each. They are kept, for when it cannot be reached."""

    def __init__(self, base: str, downloader: Downloader, cache: Path) -> None:
        self.name = base
        self._base = base.rstrip("/") + "/"
        self._downloader = downloader
        self._cache, self._key = cache, hashlib.sha256(self._base.encode()).hexdigest()[:16]

    def uids(self) -> Iterator[Uid]:
        kept = _inside(self._cache, "cards", self._key)
        if os.path.isdir(kept):
            yield from Folder(kept).uids()

    def read(self, uid: Uid, ask: bool = True) -> bytes | None:
        kept = _inside(self._cache, "cards", self._key, *f"{uid}.md".split("/"))
        if not ask:
            return _kept_card(kept)
        try:
            content = self._downloader.text(f"{self._base}{uid}.md", MAX_CARD_BYTES)
        except TransferError as error:
            if error.kind == "missing":
                with contextlib.suppress(OSError):
                    kept.unlink()
                return None
            last = _kept_card(kept)
            if last is None:
                raise
            _log.info("%s: the card kept from last time is used (%s)", uid, error)
            return last
        parse_card(content, f"{uid} ({self.name})")  # a page that is no card is not kept as one
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as file:
                file.write(content)
        except OSError as error:
            _log.warning("%s: the card cannot be kept: %s", kept, error)
        return content

    def beside(self, uid: Uid, filename: str) -> Path | None:
        return None


def _kept_card(path: Path) -> bytes | None:
    try:
        with open_regular(path, follow=False) as file:
            return file.read(MAX_CARD_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HubError(f"{path}: cannot be read: {error.strerror}") from error


def _inside(cache: Path, *names: str) -> Path:
    """A path in the cache. Raises HubError where it, or a folder on its way, is a link, which could lead anywhere."""
    path = cache
    for name in names:
        path = path / name
        if os.path.islink(path):
            raise HubError(f"{path} is a symbolic link, and nothing in the cache is read or written through one: "
                           "delete it, or name another cache in MANIDP_CACHE")  # fmt: skip
    return path


def _forget(parts: Path) -> None:
    """Delete the downloads that were not resumed for long."""
    for path in parts.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime >= FORGOTTEN_S:
                path.unlink()


# What is known of files beyond their cards --------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What makes a runnable network of a .ckpt: what the file does not hold and its card does not say.

    ``thresholds`` of the gates in their order, ``depth`` of the gated ResNet, ``at_hand``: the name of the bundled
    model that can be had where the file cannot.
    """

    depth: int
    thresholds: tuple[float, ...]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    at_hand: str


@cache
def known_networks() -> Mapping[str, Network]:
    """The networks that this library can make of a file, by its sha256."""
    entries = json.loads((CARDS / "networks.json").read_text("utf-8"))
    return {
        digest: Network(
            depth=entry["depth"],
            thresholds=tuple(entry["thresholds"]),
            preprocessing=Preprocessing(tuple(entry["mean"]), tuple(entry["std"]), tuple(entry["size"])),
            classes=tuple(entry["classes"]),
            at_hand=entry["at_hand"],
        )
        for digest, entry in entries.items()
    }


@dataclass(frozen=True)
class Bundled:
    """A bundled model of which a .ckpt can be made: its ``name``, and the ``sha256`` of its checkpoint."""

    name: str
    sha256: str

    @property
    def path(self) -> Path:
        return DATA / f"{self.name}.safetensors"

    def verified(self) -> Path:
        """The checkpoint, if it is the one that the catalogue was made for. Raises HubError."""
        if not _is(self.path, self.sha256):
            raise HubError(f"{self.path}: the bundled model is not the one of its card (sha256 {self.sha256}): the "
                           "installation is damaged, install manidp again; or, in a checkout: make cards")  # fmt: skip
        return self.path


@cache
def bundled_files() -> Mapping[str, Bundled]:
    """The .ckpt files that can be made of a bundled model, by their sha256."""
    entries = json.loads((CARDS / "bundled.json").read_text("utf-8"))
    return {digest: Bundled(**entry) for digest, entry in entries.items()}


# Deciding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A card in the catalogue, and where it was found."""

    uid: Uid
    source: str
    card: ModelCard


@dataclass(frozen=True)
class Decision:
    """Which file a uid stands for and where it can come from; made before anything is done.

    ``path``: where in the cache it is or will be; ``cached``: whether it is there (it is verified when it is
    fetched); ``beside``: a file of its name beside the card; ``links``: all addresses that may be asked, the card's
    own first, then those of other cards for the same file; ``refused``: why others may not be; ``network``: what is
    known beyond the card; ``bundled``: the model in this package of which the file is made; ``remarks``: what is wrong
    with the card.
    """

    uid: Uid
    source: str
    asset: Asset
    filename: str
    path: Path
    cached: bool
    beside: Path | None = None
    links: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    bundled: Bundled | None = None
    network: Network | None = None
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Cached:
    """A file on this machine, ``intact`` if it has the digest it should have; ``uids``: the cards that name it."""

    path: Path
    size: int
    intact: bool
    uids: tuple[Uid, ...]


@dataclass(frozen=True)
class Hub:
    """A catalogue (``sources``, the first that has a card counts), a cache folder, and the way to the web.

    ``patience``: seconds to wait for another process that is at work on the same file; that it waits is a logged
    warning.
    """

    sources: tuple[Source, ...]
    cache: Path
    downloader: Downloader = field(repr=False)
    patience: float = 600.0

    def uids(self) -> tuple[Uid, ...]:
        """All names in the catalogue, sorted; a web address shows only the cards that were read from it."""
        return tuple(sorted({uid for source in self.sources for uid in source.uids()}))

    def cards(self, words: Sequence[str] = ()) -> Iterator[Listed]:
        """The cards that hold all the words, in upper or lower case, in their name, title or fields.

        A broken card is left out with a logged warning.
        """
        for uid in self.uids():
            try:
                listed = self.card(uid, ask=False)
            except (HubError, CardError) as error:
                _log.warning("%s", error)
                continue
            text = "\n".join((str(uid), listed.card.title, *listed.card.fields.values())).lower()
            if all(word.lower() in text for word in words):
                yield listed

    def card(self, uid: Uid, ask: bool = True) -> Listed:
        """The card of this name; the web is asked only with ``ask``.

        Raises HubError if there is none, CardError if it is broken.
        """
        failed = []
        for source in self.sources:
            try:
                content = source.read(uid, ask)
            except TransferError as error:
                failed.append(str(error))
                continue
            if content is not None:
                return Listed(uid, source.name, parse_card(content, f"{uid} ({source.name})"))
        known = [str(known) for known in self.uids()[:2000]]  # comparing takes long
        similar = difflib.get_close_matches(str(uid), known, n=3)
        raise HubError(
            f"there is no card '{uid}' in {', '.join(source.name for source in self.sources)}"
            + (f"; not all could be asked: {'; '.join(failed)}" if failed else "")
            + (f"; similar names: {', '.join(similar)}" if similar else "")
        )

    def resolve(self, name: str | Uid) -> Decision:
        """Decide which file a name stands for and where it could come from; nothing is downloaded or changed.

        The file is the first .ckpt of the card with a whole sha256. Raises HubError if there is none, CardError if
        the card is broken.
        """
        uid = name if isinstance(name, Uid) else parse_uid(name)
        listed = self.card(uid)
        asset = _chosen(listed)
        path = self._path(asset.sha256)
        filename = re.split("[?#]", asset.link.partition("://")[2])[0].rpartition("/")[2]
        beside = None
        if _PART.fullmatch(filename):
            beside = next((s.beside(uid, filename) for s in self.sources if s.name == listed.source), None)
        cached = os.path.isfile(path)
        others = [] if cached else [link for _, link in self._named.get(asset.sha256, ())]
        refusals = {link: self.downloader.refusal(link) for link in (asset.link, *others) if link}
        return Decision(
            uid, listed.source, asset, filename, path, cached, beside,
            links=tuple(link for link, reason in refusals.items() if reason is None),
            refused=tuple(reason for reason in refusals.values() if reason is not None),
            bundled=bundled_files().get(asset.sha256),
            network=known_networks().get(asset.sha256),
            remarks=listed.card.remarks,
        )  # fmt: skip

    @cached_property
    def _named(self) -> Mapping[str, list[tuple[Uid, str]]]:
        """Who names each file of the catalogue, by its sha256: the cards, and the addresses they give."""
        named: dict[str, list[tuple[Uid, str]]] = {}
        for listed in self.cards():
            for asset in listed.card.assets:
                named.setdefault(asset.sha256, []).append((listed.uid, asset.link))
        return named

    def _uids(self, sha256: str) -> tuple[Uid, ...]:
        return tuple(dict.fromkeys(uid for uid, _ in self._named.get(sha256, ())))

    def _path(self, sha256: str) -> Path:
        return _inside(self.cache, "files", sha256)

    # Doing ----------------------------------------------------------------------------------------------------------

    def fetch(self, decision: Decision, progress: Progress | None = None) -> Path:
        """The decided file in the cache, verified now; downloaded first if it is missing or damaged.

        Of several processes that ask at once, one downloads it and the others wait. Raises HubError saying what was
        tried and how to add the file by hand; no wrong file is left under its name.
        """
        path = decision.path
        try:
            if _is(path, decision.asset.sha256):
                return path
            with self._locked(decision.asset.sha256):
                if not _is(path, decision.asset.sha256):
                    damaged = ["what was in the cache was damaged and is deleted"] if path.exists() else []
                    path.unlink(missing_ok=True)
                    self._bring(decision, damaged, progress)
                return path
        except OSError as error:
            raise HubError(f"the cache {self.cache} cannot be used: {error.strerror or error}") from error

    def _bring(self, decision: Decision, failed: list[str], progress: Progress | None) -> None:
        digest = decision.asset.sha256
        if decision.bundled:
            _write_bundled(decision.bundled, self._path(digest), digest)
            return
        if decision.beside is not None:
            if _is(decision.beside, digest):
                self._take(decision.beside, digest)
                return
            failed.append(f"{decision.beside} has another sha256")
        part = _inside(self.cache, "parts", digest)
        part.parent.mkdir(parents=True, exist_ok=True)
        _forget(part.parent)
        down = set()
        for link in decision.links:
            host = target_of(link).origin
            if host in down:
                continue
            try:
                self.downloader.file(link, part, digest, MAX_ASSET_BYTES, progress)
            except TransferError as error:
                failed.append(str(error))
                if error.kind == "disk":
                    break
                if error.kind in ("unreachable", "passing") or self.downloader.offline:
                    down.add(host)  # its other addresses would fail alike
                continue
            os.replace(part, decision.path)
            sync_folder(decision.path.parent)
            return
        raise HubError(_by_hand(decision, [*failed, *decision.refused]))

    def _take(self, source: Path, sha256: str) -> Path:
        """Copy a file of this digest into the cache."""
        path = self._path(sha256)
        came = hashlib.sha256()
        with open_regular(source) as file, replacing(path) as copy:
            while chunk := file.read(2**20):
                came.update(chunk)
                copy.write(chunk)
            if came.hexdigest() != sha256:
                raise HubError(f"{quoted(str(source))} changed while it was copied")
        return path

    def add(self, source: str | Path) -> Cached:
        """Add a file that was copied by hand. Raises HubError if no card of the catalogue names its sha256."""
        source = Path(source)
        try:
            digest = sha256_of(source)
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise HubError(f"cannot read {quoted(str(source))}: {reason}") from error
        uids = self._uids(digest)
        if not uids:
            raise HubError(
                f"{quoted(str(source))} is no file that the catalogue knows: no card names its sha256 {digest}. Is it "
                f"whole and of the right version? Searched were {len(self.uids())} cards in "
                f"{', '.join(place.name for place in self.sources)}"
            )
        try:
            with self._locked(digest):
                path = self._path(digest)
                if not _is(path, digest):
                    self._take(source, digest)
                return Cached(path, path.stat().st_size, True, uids)
        except OSError as error:
            raise HubError(f"the cache {self.cache} cannot be used: {error.strerror or error}") from error

    def verify(self, *, remove: bool = False) -> Iterator[Cached]:
        """Every bundled model that has a card and every file in the cache, hashed again.

        With ``remove``, files in the cache that are damaged are deleted.
        """
        for digest, bundled in bundled_files().items():
            size = bundled.path.stat().st_size if bundled.path.is_file() else 0
            yield Cached(bundled.path, size, _is(bundled.path, bundled.sha256), self._uids(digest))
        try:
            for path in sorted(_inside(self.cache, "files").glob("*")):
                if re.fullmatch("[0-9a-f]{64}", path.name) and not path.is_dir():
                    found = Cached(path, path.lstat().st_size, _is_own(path), self._uids(path.name))
                    if remove and not found.intact:
                        with self._locked(path.name):
                            if not _is_own(path):
                                path.unlink(missing_ok=True)
                    yield found
        except OSError as error:
            raise HubError(f"the cache {self.cache} cannot be used: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        """One process at a time works on a file. The system frees the lock of a process that was killed."""
        for folder in ("files", "locks"):
            _inside(self.cache, folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(_inside(self.cache, "locks", sha256))
        try:
            lock.acquire(timeout=min(1.0, self.patience))
        except Timeout:
            said = "another process is at work on the same file and holds %s: waiting for it, %g s at most"
            _log.warning(said, lock.lock_file, self.patience)
            try:
                lock.acquire(timeout=self.patience)
            except Timeout as error:
                raise HubError(
                    f"{lock.lock_file} is held by another process, for more than {self.patience:g} s. If that is "
                    "bringing a large file, wait for it and try again; if it hangs, end it"
                ) from error
        try:
            sweep(self.cache / "files" / sha256)
            yield
        finally:
            lock.release()

    def load(self, decision: Decision, progress: Progress | None = None) -> Found:
        """The decided network, ready to run.

        Raises HubError if this library does not know the network or its file is not available, CkptError or
        CheckpointError if the file is not what it should be.
        """
        uid, network = str(decision.uid), decision.network
        if decision.bundled is not None:
            path = decision.bundled.verified()
            return Found(uid, path, decision.bundled.sha256, load_checkpoint(path))
        if network is None:
            able = sorted({str(uid) for digest in (*known_networks(), *bundled_files()) for uid in self._uids(digest)})
            raise HubError(f"'{uid}' is no network that manidp can run; it can run {', '.join(able)}")
        path = self.fetch(decision, progress)
        graph = with_gates(resnet(network.depth, num_classes=len(network.classes)))
        provenance = {"uid": uid, "source": decision.source, "sha256": decision.asset.sha256}
        checkpoint, ignored = from_ckpt(
            read_ckpt(path), network.thresholds, graph, network.preprocessing, network.classes, provenance
        )
        return Found(uid, path, decision.asset.sha256, checkpoint, ignored)


def open_hub(
    sources: Iterable[str | Path] = (),
    *,
    cache: str | Path | None = None,
    hosts: Iterable[str] = (),
    offline: bool | None = None,
) -> Hub:
    """The hub as the user set it up. What is given goes before what the environment says.

    ``sources``: folders, archives and https addresses of cards, before those of MANIDP_HUB (separated by commas) and
    the bundled catalogue. ``cache``: a folder; MANIDP_CACHE, else ``~/.cache/manidp``. ``hosts``: further hosts that
    files may come from, with those of MANIDP_HUB_HOSTS (separated by commas). ``offline``: open no socket;
    MANIDP_OFFLINE=1 (anything but 0). Raises HubError for what makes no sense.
    """
    named = [os.path.expanduser(str(source)) for source in (*sources, *_listed_in("MANIDP_HUB"))]
    sites = [name for name in named if "://" in name]
    allowed = origins([*HOSTS, *hosts, *_listed_in("MANIDP_HUB_HOSTS"), *(target_of(site).origin for site in sites)])
    downloader = Downloader(allowed, offline=is_offline() if offline is None else offline)
    try:
        folder = Path(cache or os.environ.get("MANIDP_CACHE") or "~/.cache/manidp").expanduser().absolute()
    except RuntimeError as error:
        raise HubError("there is no home folder to keep a cache in; name a folder in MANIDP_CACHE") from error
    places: list[Source] = [
        Website(name, downloader, folder) if name in sites
        else Archive(Path(name)) if os.path.isfile(name)
        else Folder(Path(name))
        for name in named
    ]  # fmt: skip
    return Hub((*places, Folder(CARDS, "the bundled catalogue")), folder, downloader)


def _listed_in(variable: str) -> list[str]:
    return [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


def _is(path: Path, sha256: str) -> bool:
    return os.path.isfile(path) and sha256_of(path) == sha256


def _is_own(path: Path) -> bool:
    """Whether a file of the cache, which is no link, has the digest that is its name."""
    return not path.is_symlink() and _is(path, path.name)


def _chosen(listed: Listed) -> Asset:
    """The first .ckpt of a card with a whole digest."""
    assets = [asset for asset in listed.card.assets if asset.file_format == "ckpt"]
    for asset in assets:
        if asset.verifiable:
            return asset
    if assets:
        weak = assets[0].sha256
        raise HubError(f"the card '{listed.uid}' gives {f'only {len(weak)} digits' if weak else 'nothing'} of the "
                       "sha256 of its .ckpt: a download could not be verified, so it is not tried")  # fmt: skip
    formats = ", ".join(short(asset.file_format, 20) or "no format" for asset in listed.card.assets[:9])
    raise HubError(f"the card '{listed.uid}' names no .ckpt file ({formats or 'no files at all'})")


def _write_bundled(bundled: Bundled, path: Path, sha256: str) -> None:
    """Make the .ckpt of a bundled model; its bytes are those of the published file."""
    values, _ = to_ckpt(load_checkpoint(bundled.verified()))
    write_ckpt(values, path)
    if not _is(path, sha256):
        path.unlink()
        raise HubError(f"the bundled model {bundled.name} does not make the file of its card (sha256 {sha256})")


def _by_hand(decision: Decision, failed: Sequence[str]) -> str:
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    reasons = "; ".join(failed[:3]) + more or "the card gives no address"
    at_hand = decision.network.at_hand if decision.network else ""
    filename = decision.filename if _PART.fullmatch(decision.filename) else "FILE"
    return (
        f"{filename} of '{decision.uid}' is not available: {reasons}. If you have the file from elsewhere "
        f"(sha256 {decision.asset.sha256}), add it with: manidp hub add {filename}"
        + (f". Available without it is our own model: {at_hand}" if at_hand else "")
    )
