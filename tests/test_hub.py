"""The hub: names, catalogues, decisions, and files that are right or not there."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from loopback import Loopback, Request, Route, in_turn, serving, status, whole
from manidp.data.preprocessing import CIFAR10_CLASSES, CIFAR10_PREPROCESSING
from manidp.errors import CardError, HubError, ManiDPError
from manidp.formats.checkpoint import Checkpoint, save_checkpoint
from manidp.formats.ckpt import write_ckpt
from manidp.formats.conversion import to_ckpt
from manidp.gating.place import with_gates
from manidp.hub.card import card_faults, parse_card
from manidp.hub.find import find_model
from manidp.hub.hub import CARDS, FORGOTTEN_S, Bundled, Hub, Uid, bundled_files, known_networks, open_hub, parse_uid
from manidp.models import resnet

REAL_CARDS = Path(__file__).parents[2] / "shared" / "data" / "hub-cards.tar.xz"
ORIGINAL = "noah-cvlab/gpu/1.1/manidp_v1.0_cifar10"
OURS = "manidp/1.0/manidp-res20_cifar10"
ORIGINAL_SHA256 = "3ba6e1e064231e5afd7bb776c52442a9bacb4e48195c9c93d1f7e4c3ddc279eb"
CONTENT = bytes(range(256)) * 200
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
                 "MANIDP_HUB", "MANIDP_HUB_HOSTS", "MANIDP_OFFLINE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANIDP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving(f=whole(CONTENT)) as running:
        yield running


def card_text(*assets: tuple[str, str], kind: str = "ckpt", title: str = "a model") -> str:
    """A card with assets of these links and digests."""
    lines = [f"# {title}", "---", f"model-name: {title}", "asset:"]
    for link, digest in assets:
        lines += [f"- file-format: {kind}", f"  asset-link: <{link}>", f"  asset-sha256: {digest}"]
    return "\n".join([*lines, "---", "body", ""])


def folder_of(tmp_path: Path, **cards: str) -> Path:
    """A folder with the cards ``me/1.0/NAME``."""
    place = tmp_path / "cards" / "me" / "1.0"
    place.mkdir(parents=True, exist_ok=True)
    for name, text in cards.items():
        (place / f"{name}.md").write_text(text)
    return tmp_path / "cards"


def hub_with(tmp_path: Path, *servers: Loopback, **cards: Any) -> Hub:
    """The hub with these cards, hosts that are tried twice, and perhaps ``offline``."""
    offline = cards.pop("offline", False)
    hub = open_hub([folder_of(tmp_path, **cards)], hosts=[server.origin for server in servers], offline=offline)
    return replace(hub, downloader=replace(hub.downloader, patience=5.0, backoff=0.01, attempts=2))


def files_in(hub: Hub) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (hub.cache / "files").glob("*")}


def assert_nothing_wrong(hub: Hub) -> None:
    """Every file in the cache is what its name says."""
    for name, content in files_in(hub).items():
        assert hashlib.sha256(content).hexdigest() == name


# Names --------------------------------------------------------------------------------------------------------------

TREE = "https://gitee.com/mindspore/hub/blob/master/mshub_res/assets"


@pytest.mark.parametrize(
    ("text", "uid"),
    [
        (ORIGINAL, Uid("noah-cvlab", "gpu", "1.1", "manidp_v1.0_cifar10")),
        ("mindspore/1.10/manidp_cifar10", Uid("mindspore", "", "1.10", "manidp_cifar10")),
        (f"{TREE}/{ORIGINAL}.md", Uid("noah-cvlab", "gpu", "1.1", "manidp_v1.0_cifar10")),
        (f"{TREE}/mindspore/1.7/albert_squadv1.1.md", Uid("mindspore", "", "1.7", "albert_squadv1.1")),
        ("http://any.host/deep/down/mindspore/1.7/albert_squadv1.1", Uid("mindspore", "", "1.7", "albert_squadv1.1")),
        (f"https://any.host/cards/{ORIGINAL}.md", Uid("noah-cvlab", "gpu", "1.1", "manidp_v1.0_cifar10")),
    ],
)
def test_names_and_addresses_of_cards(text: str, uid: Uid) -> None:
    assert parse_uid(text) == uid and parse_uid(str(uid)) == uid


def test_names_that_begin_like_devices_are_names() -> None:
    for text in ("con1/com/lpt", "nul_/1.0/aux-net", "a/1.0/com12"):
        assert str(parse_uid(text)) == text


BAD_NAMES = [
    "", "manidp-res20", "a/b", "a/b/c/d/e", "a//b/c", "/a/b/c", "a/b/c/", "../a/b", "a/../b", "a/b/..", "a/./b/c",
    "a/.b/c", "a/-b/c", "a/b./c", "a/b/c\n", " a/b/c", "a/b/c d", "a/b/ç", "a/b/c%2e", "a\\b\\c", "a/b/c:d", "a/b/c\0",
    f"a/b/{'c' * 101}", "https://h/a/b", f"{TREE}/../../../etc/a/b/c/d.md", f"{TREE}/a/b/c.md?x=y", "file:///a/b/c",
    "a/b/nul", "CON/b/c", "a/com1.x/c", "a/b/Lpt9", "\ud800/b/c", "\x1b[31m/b/c", "a" * 70_000, "a/" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_NAMES)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(HubError, match="is not the name of a card"):
        parse_uid(text)


@given(st.one_of(st.text(max_size=40), st.text("ab.-_/%", max_size=12), st.text("ab./", max_size=12).map(TREE.__add__)))
def test_every_name_that_is_accepted_stays_below_its_folder(text: str) -> None:
    try:
        uid = parse_uid(text)
    except HubError:
        return
    assert parse_uid(str(uid)) == uid
    assert len(Path(str(uid)).parts) in (3, 4) and Path(os.path.normpath(f"x/{uid}.md")) == Path(f"x/{uid}.md")


def test_a_uid_cannot_be_made_around_the_grammar() -> None:
    with pytest.raises(HubError):
        Uid("..", "", "..", "etc")


# The bundled catalogue ----------------------------------------------------------------------------------------------


def test_the_bundled_catalogue_has_the_eight_cards_of_the_original() -> None:
    hub = open_hub()
    originals = [listed for listed in hub.cards(["manidp"]) if listed.card.assets[0].sha256 == ORIGINAL_SHA256]
    versions = ["1.10", "1.3", "1.5", "1.6", "1.7", "1.8", "1.9"]
    assert [str(o.uid) for o in originals] == [*(f"mindspore/{v}/manidp_cifar10" for v in versions), ORIGINAL]
    assert len({o.card.assets[0].link for o in originals}) == 8
    assert [str(uid) for uid in hub.uids() if uid not in {o.uid for o in originals}] == [OURS]


@pytest.mark.parametrize("path", sorted(CARDS.rglob("*.md")), ids=lambda path: str(path.relative_to(CARDS)))
def test_a_bundled_card_has_no_faults(path: Path) -> None:
    assert card_faults(path.read_bytes(), path.name) == ()


def test_the_thresholds_of_the_original_are_known_to_the_last_bit() -> None:
    network = known_networks()[ORIGINAL_SHA256]
    assert len(network.thresholds) == len(with_gates(resnet(network.depth)).gates) == 18
    for threshold in network.thresholds:
        assert float(str(np.float32(threshold))) == threshold
    assert network.thresholds[0] == 0.020589862 and network.thresholds[-1] == 1.2263142e-06
    assert network.preprocessing.std[0] == 0.2471 and network.classes == CIFAR10_CLASSES


def test_the_original_that_cannot_be_had_is_named_with_the_ways_out(tmp_path: Path) -> None:
    hub = open_hub(offline=True)
    decision = hub.resolve(ORIGINAL)
    assert decision.filename == "resnet20.ckpt" and decision.asset.sha256 == ORIGINAL_SHA256 and not decision.cached
    assert len(decision.links) == 8 and decision.links[0].endswith("manidp/resnet20.ckpt") and not decision.refused
    for call in (lambda: hub.fetch(decision), lambda: hub.load(decision)):
        with pytest.raises(HubError) as caught:
            call()
        said = str(caught.value)
        assert "manidp hub add resnet20.ckpt" in said and ORIGINAL_SHA256 in said and "manidp-res20" in said
        assert "MANIDP_OFFLINE=1" in said and "\n" not in said


# Catalogues of the user ---------------------------------------------------------------------------------------------


def _archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        mode: Any = f"w:{path.suffix[1:].replace('tar', '')}"
        with tarfile.open(path, mode) as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["c.zip", "c.tar", "c.tar.gz", "c.tar.bz2", "c.tar.xz"])
def test_an_archive_is_a_catalogue(tmp_path: Path, name: str) -> None:
    text = card_text(("https://h/f", DIGEST)).encode()
    members = {"./me/1.0/a.md": text, "hub-master/mshub_res/assets/me/gpu/1.0/b.md": text, "me/1.0/../../../x.md": text,
               "README.md": b"no card", "/etc/1.0/c.md": text, "me/1.0/f.ckpt": bytes(9)}  # fmt: skip
    hub = open_hub([_archive(tmp_path / name, members)])
    mine = [str(uid) for uid in hub.uids() if uid.publisher == "me"]
    assert mine == ["me/1.0/a", "me/gpu/1.0/b"] and hub.resolve("me/1.0/a").asset.sha256 == DIGEST


@pytest.mark.parametrize("name", ["c.zip", "c.tar.gz", "c.tar.xz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _archive(tmp_path / name, {f"me/1.0/a{n}.md": bytes(300_000) for n in range(9)})
    other = _archive(tmp_path / f"other-{name}", {"one.bin": bytes(3_000_000), "me/1.0/a.md": b""})
    assert path.stat().st_size < 30_000
    monkeypatch.setattr("manidp.hub.hub.MAX_ARCHIVE_BYTES", 1_000_000)
    for archive in (path, other) if name != "c.zip" else (path,):  # members of a .zip that are no cards are not read
        with pytest.raises(HubError, match=r"1,000,000 bytes"):
            open_hub([archive]).uids()
    monkeypatch.setattr("manidp.hub.hub.MAX_ARCHIVE_BYTES", 2**28)
    monkeypatch.setattr("manidp.hub.hub.MAX_CARDS", 8)
    with pytest.raises(HubError, match="more than 8 cards"):
        open_hub([path]).uids()


@pytest.mark.parametrize("keep", [slice(0, 0), slice(0, 100), slice(0, 20_000), slice(30, None), None])
@pytest.mark.parametrize("name", ["c.tar", "c.zip", "c.tar.gz", "c.tar.bz2", "c.tar.xz"])
def test_a_broken_archive_is_an_error(tmp_path: Path, name: str, keep: slice | None) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 25_000, np.uint8).tobytes().hex().encode()
    path = _archive(tmp_path / name, {"me/1.0/a.md": noise})
    content = path.read_bytes()
    if keep is None and name == "c.tar":
        return  # which has no checksum
    path.write_bytes(content[:9000] + b"\xff" * 99 + content[9099:] if keep is None else content[keep])
    with pytest.raises(HubError, match=r"c\..*is no whole .zip or .tar archive"):
        open_hub([path]).uids()


@pytest.mark.parametrize(
    ("at", "new", "said"), [(45, b"#", "CRC"), (6, b"\1", "encrypted"), (8, b"\x63", "not supported"), (0, b"", "")]
)
def test_a_zip_that_cannot_be_read_is_an_error(tmp_path: Path, at: int, new: bytes, said: str) -> None:
    """``at``: a byte of the local header, or of the content after it; fields stand two bytes later in the directory."""
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("me/1.0/a.md", card_text())
    content = bytearray((tmp_path / "c.zip").read_bytes())
    for place in (at, content.index(b"PK\1\2") + 2 + at)[: 1 if at > 30 else 2]:
        content[place : place + len(new)] = new
    (tmp_path / "c.zip").write_bytes(content)
    if not said:
        assert Uid("me", "", "1.0", "a") in open_hub([tmp_path / "c.zip"]).uids()
        return
    with pytest.raises(HubError, match=f"no whole .zip or .tar archive.*{said}"):
        open_hub([tmp_path / "c.zip"]).uids()


def test_a_checkout_of_the_hub_is_a_catalogue_and_comes_before_the_bundled_one(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "mshub_res" / "assets" / "noah-cvlab" / "gpu" / "1.1"
    place.mkdir(parents=True)
    (place / "manidp_v1.0_cifar10.md").write_text(card_text(("https://h/f", DIGEST), title="mine"))
    (tmp_path / "hub" / "a" / "b").mkdir(parents=True)
    (tmp_path / "hub" / "a" / "b" / "c.md").write_text("outside")
    hub = open_hub([tmp_path / "hub"])
    assert hub.card(parse_uid(ORIGINAL)).card.title == "mine" and len(hub.uids()) == len(open_hub().uids())


@pytest.mark.skipif(not REAL_CARDS.exists(), reason="the real cards are not beside the project")
def test_all_real_cards_are_listed_and_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIDP_HUB", str(REAL_CARDS))
    hub = open_hub()
    assert len(hub.uids()) >= 1500 and sum(listed.source == str(REAL_CARDS) for listed in hub.cards()) == 1500
    assert hub.card(parse_uid(ORIGINAL)).source == str(REAL_CARDS)
    assert hub.resolve(ORIGINAL).network == known_networks()[ORIGINAL_SHA256]
    with pytest.raises(HubError, match="only 8 digits of the sha256"):
        hub.resolve("mindspore/2.5/yolox_s_coco2017")


def test_catalogues_may_be_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card_text(("https://h/f", DIGEST))
    folder_of(tmp_path, a=text)
    _archive(tmp_path / "c.zip", {"me/1.0/b.md": text.encode()})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MANIDP_HUB", "~/cards, ~/c.zip")
    assert {Uid("me", "", "1.0", "a"), Uid("me", "", "1.0", "b")} < set(open_hub().uids())


def test_a_search_finds_the_cards_with_all_the_words(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, one=card_text(title="Red Net"), two=card_text(title="Blue net"), net=card_text(title="x"))
    for words, stems in ((["NET"], ["net", "one", "two"]), (["red", "net"], ["one"]), (["red", "blue"], [])):
        assert [listed.uid.stem for listed in hub.cards([*words, "me/"])] == stems


def test_a_name_that_is_not_there_is_met_with_similar_ones() -> None:
    with pytest.raises(HubError, match=r"no card 'mindspore/1.7/manidp_cifar100' .*similar names: mindspore/1"):
        open_hub().resolve("mindspore/1.7/manidp_cifar100")


def test_a_broken_card_stops_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = hub_with(tmp_path, good=card_text(("https://h/f", DIGEST)), bad="no card")
    assert [listed.uid.stem for listed in hub.cards() if listed.uid.publisher == "me"] == ["good"]
    assert "me/1.0/bad" in caplog.text
    with pytest.raises(CardError, match=r"me/1.0/bad .*line 1"):
        hub.resolve("me/1.0/bad")


def test_only_regular_files_are_cards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = hub_with(tmp_path, good=card_text(("https://h/f", DIGEST)))
    place = tmp_path / "cards" / "me" / "1.0"
    os.mkfifo(place / "pipe.md")
    (place / "piped.md").symlink_to("pipe.md")
    (place / "zero.md").symlink_to("/dev/zero")
    (place / "folder.md").mkdir()
    (place / "gone.md").symlink_to("nowhere")
    (place / "linked.md").symlink_to("good.md")
    (tmp_path / "cards" / "loop").symlink_to(tmp_path / "cards")
    start = time.monotonic()
    assert {listed.uid.stem for listed in hub.cards() if listed.uid.publisher == "me"} == {"good", "linked"}
    assert time.monotonic() - start < 2
    for name in ("pipe", "piped", "zero", "folder"):
        assert f"{name}.md': cannot be read: not a regular file" in caplog.text
        with pytest.raises(HubError, match="not a regular file"):
            hub.resolve(f"me/1.0/{name}")
    os.mkfifo(tmp_path / "pipe")
    for call in (hub.add, lambda path: open_hub([path])):
        with pytest.raises(HubError, match=r"not a regular file|is no folder of cards"):
            call(tmp_path / "pipe")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "\ud800", "\x1b[31m", "\n", "/dev/zero", "~nobody/x", "a/" * 3000]
)
def test_a_place_that_is_none_is_one_line(tmp_path: Path, name: str) -> None:
    calls: list[Callable[[], object]] = [lambda: open_hub([name]), lambda: hub_with(tmp_path).add(name)]
    for call in calls:
        with pytest.raises(HubError) as caught:
            call()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_a_folder_of_too_many_cards_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_with(tmp_path, a="", b="", c="")
    monkeypatch.setattr("manidp.hub.hub.MAX_CARDS", 2)
    with pytest.raises(HubError, match="more than 2 cards"):
        hub.uids()


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sources, hosts in (([tmp_path / "none"], []), (["http://example.com/cards"], []), (["https://["], [])):
        with pytest.raises(HubError):
            open_hub(sources, hosts=hosts)
    for host in ("http://example.com", "[", "a b", "h:x", "\x1b"):
        with pytest.raises(HubError, match="list of hosts"):
            open_hub(hosts=[host])
    monkeypatch.setenv("MANIDP_HUB_HOSTS", "mirror.example, other.example:8443")
    allowed = open_hub().downloader.allowed
    assert allowed == {"https://download.mindspore.cn:443", "https://mirror.example:443", "https://other.example:8443"}


@pytest.mark.parametrize(
    ("value", "offline"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True), ("yes", True)]
)
def test_the_offline_switch_errs_on_the_quiet_side(
    value: str | None, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("MANIDP_OFFLINE", value)
    assert open_hub().downloader.offline == offline and not open_hub(offline=False).downloader.offline


def test_without_a_home_a_cache_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("MANIDP_CACHE")
    with pytest.raises(HubError, match="MANIDP_CACHE"):
        open_hub()


# Cards from the web -------------------------------------------------------------------------------------------------


def test_a_web_address_is_a_catalogue_and_its_cards_are_kept(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card_text((f"{server.origin}/f", DIGEST))
    server.routes["/cards/me/1.0/a.md"] = whole(text.encode())
    base = f"{server.origin}/cards"
    hub = open_hub([base])
    assert Uid("me", "", "1.0", "a") not in hub.uids()
    assert hub.resolve("me/1.0/a").source == base and Uid("me", "", "1.0", "a") in hub.uids()
    with pytest.raises(HubError, match=r"no card 'me/1.0/b'") as caught:
        hub.resolve("me/1.0/b")
    assert "not all could be asked" not in str(caught.value)
    path = hub.fetch(hub.resolve("me/1.0/a"))
    asked = len(server.asked)
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    hub = open_hub([base])
    assert hub.fetch(hub.resolve("me/1.0/a")) == path and len(server.asked) == asked
    with pytest.raises(HubError, match=r"not all could be asked: .*MANIDP_OFFLINE"):
        hub.resolve("me/1.0/b")


def test_listing_asks_nothing_of_the_web(server: Loopback) -> None:
    server.routes["/me/1.0/a.md"] = whole(card_text((f"{server.origin}/f", DIGEST)).encode())
    hub = open_hub([server.origin])
    hub.resolve("me/1.0/a")
    server.asked.clear()
    assert "me/1.0/a" in [str(listed.uid) for listed in hub.cards()] and not server.asked


def test_a_page_that_is_no_card_is_not_kept_as_one(server: Loopback) -> None:
    good = whole(card_text((f"{server.origin}/f", DIGEST)).encode())
    server.routes["/me/1.0/a.md"] = in_turn(whole(b"<html>please log in</html>"), good, status(404))
    hub = open_hub([server.origin])
    with pytest.raises(CardError):
        hub.resolve("me/1.0/a")
    assert Uid("me", "", "1.0", "a") not in hub.uids()
    assert hub.resolve("me/1.0/a").asset.sha256 == DIGEST
    with pytest.raises(HubError, match="there is no card"):
        hub.resolve("me/1.0/a")
    assert Uid("me", "", "1.0", "a") not in hub.uids()


# Deciding -----------------------------------------------------------------------------------------------------------


def test_a_decision_says_what_and_where_from_and_does_nothing(tmp_path: Path, server: Loopback) -> None:
    mine = f"{server.origin}/f"
    hub = hub_with(
        tmp_path, server,
        a=card_text(("https://elsewhere.example/x/net.ckpt", DIGEST.upper())),
        b=card_text((mine, DIGEST)),
        c=card_text(("http://plain.example/f", DIGEST), (mine, "0" * 64)),
    )  # fmt: skip
    decision = hub.resolve("me/1.0/a")
    assert (decision.filename, decision.asset.sha256) == ("net.ckpt", DIGEST)
    assert decision.links == (mine,) and decision.path == hub.cache / "files" / DIGEST and not decision.cached
    assert len(decision.refused) == 2 and "elsewhere.example" in decision.refused[0]
    assert "must begin with https" in decision.refused[1]
    assert [remark.text for remark in decision.remarks] == ["the asset's sha256 is not in lower case"]
    assert not hub.cache.exists() and not server.asked


@pytest.mark.parametrize(
    "link",
    ["http://[", "https://[", "//[", "https://h:x/f", "https://h:99999/f", "https://me:pw@h/f", "https://\xe9/f", "h", "://",
     "https://" + "a" * 64 + ".com/f", "https://h/a b", "https://h/\x1b[31m", "file:///etc/passwd",
     "https://h/" + "x" * 9999, "https://h/..", "https://h/%00", "https://h/f\x00",
     "https://h/" + "x" * 4000],
)  # fmt: skip
def test_a_link_that_is_no_address_is_said_in_one_line(tmp_path: Path, link: str) -> None:
    hub = hub_with(tmp_path, offline=True, a=card_text((link, DIGEST)))
    decision = hub.resolve("me/1.0/a")
    with pytest.raises(HubError) as caught:
        hub.fetch(decision)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 800 and "If you have the file from elsewhere" in said
    assert ("is not an address to download from" in said) != (
        link in ("https://h/..", "https://h/%00", "https://h/" + "x" * 4000)
    )
    (tmp_path / "f").write_bytes(CONTENT)
    hub.add(tmp_path / "f")
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT  # what is there needs no address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (card_text(("https://h/f", "e616cdcb")), "only 8 digits of the sha256"),
        (card_text(("https://h/f", "")), "nothing of the sha256"),
        (card_text(("https://h/f", DIGEST), kind="mslite"), r"names no .ckpt file \(mslite\)"),
        (card_text(), "no files at all"),
        (
            card_text(*[("https://h/f", DIGEST)] * 99, kind="x" * 9000),
            r"file \(('x{20}'[^,]*9,000 characters\)(, )?){9}\)$",
        ),
    ],
)
def test_a_card_without_a_verifiable_ckpt_leads_nowhere(tmp_path: Path, text: str, said: str) -> None:
    hub = hub_with(tmp_path, a=text)
    with pytest.raises(HubError, match=said):
        hub.resolve("me/1.0/a")


def test_the_first_verifiable_ckpt_is_chosen(tmp_path: Path) -> None:
    mindir = card_text(("https://h/m", "1" * 64), kind="mindir").split("---")[1]
    text = card_text(("https://h/weak", "e616cdcb"), ("https://h/f", DIGEST), ("https://h/g", "2" * 64))
    hub = hub_with(tmp_path, a=text.replace("asset:\n", mindir.partition("\n")[2].partition("\n")[2]))
    assert parse_card((tmp_path / "cards/me/1.0/a.md").read_bytes(), "a").assets[0].file_format == "mindir"
    assert hub.resolve("me/1.0/a").asset.link == "https://h/f"


# Bringing -----------------------------------------------------------------------------------------------------------


def test_a_file_is_brought_once_for_all_its_names(tmp_path: Path, server: Loopback) -> None:
    link = f"{server.origin}/f"
    hub = hub_with(tmp_path, server, a=card_text((link, DIGEST)), b=card_text(("https://nowhere.example/f", DIGEST)))
    path = hub.fetch(hub.resolve("me/1.0/a"))
    assert path.read_bytes() == CONTENT and path == hub.fetch(hub.resolve("me/1.0/a"))
    assert path == hub.fetch(hub.resolve("me/1.0/b")) and hub.resolve("me/1.0/b").cached
    assert server.asked == [("/f", "")] and files_in(hub) == {DIGEST: CONTENT}


def test_a_cached_file_is_had_offline_without_a_socket(
    tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = card_text((f"{server.origin}/f", DIGEST))
    hub = hub_with(tmp_path, server, a=text)
    hub.fetch(hub.resolve("me/1.0/a"))

    def opened(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.__init__", opened)
    monkeypatch.setattr("socket.getaddrinfo", opened)
    monkeypatch.setenv("MANIDP_OFFLINE", "1")
    hub = open_hub([tmp_path / "cards"], hosts=[server.origin])
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"x" + CONTENT[1:]])
def test_a_file_that_was_damaged_in_the_cache_is_brought_again(tmp_path: Path, server: Loopback, damage: bytes) -> None:
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    path = hub.fetch(hub.resolve("me/1.0/a"))
    path.write_bytes(damage)
    _, found = hub.verify()  # the first is the bundled model
    assert (found.intact, found.size, [uid.stem for uid in found.uids]) == (False, len(damage), ["a"])
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT
    path.write_bytes(damage)
    with pytest.raises(HubError, match=r"what was in the cache was damaged and is deleted; .*MANIDP_OFFLINE"):
        hub_with(tmp_path, server, offline=True).fetch(hub.resolve("me/1.0/a"))
    assert files_in(hub) == {}


def _page(request: Request) -> None:
    whole(b"<html>please log in</html>", Content_Type="text/html")(request)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (status(404), "404"),
        (status(503), "503"),
        (_page, "an HTML page"),
        (whole(CONTENT[:-1]), "what came is not the file"),
        (whole(CONTENT + b"x"), "what came is not the file"),
    ],
)
def test_after_any_failure_the_cache_is_right_and_the_next_call_works(
    tmp_path: Path, server: Loopback, route: Route, said: str
) -> None:
    server.routes["/f"] = route
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    with pytest.raises(HubError, match=f"{said}.*manidp hub add f$"):
        hub.fetch(hub.resolve("me/1.0/a"))
    assert files_in(hub) == {}
    server.routes["/f"] = whole(CONTENT)
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT


def test_other_addresses_of_the_file_are_tried_in_turn(tmp_path: Path, server: Loopback) -> None:
    server.routes |= {"/gone": status(404), "/wrong": whole(b"x"), "/good": whole(CONTENT)}
    cards = {name: card_text((f"{server.origin}/{name}", DIGEST)) for name in ("gone", "wrong", "zgood")}
    cards["zgood"] = card_text((f"{server.origin}/good", DIGEST))
    hub = hub_with(tmp_path, server, **cards)
    assert hub.fetch(hub.resolve("me/1.0/gone")).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/gone", "/wrong", "/good"]


def test_a_host_that_is_down_is_not_asked_for_each_of_its_addresses(tmp_path: Path, server: Loopback) -> None:
    with serving(f=whole(CONTENT)) as mirror:
        cards = {f"a{n}": card_text((f"{server.origin}/{n}", DIGEST)) for n in range(4)}
        cards["z"] = card_text((f"{mirror.origin}/f", DIGEST))
        server.routes = {f"/{n}": status(503) for n in range(4)}
        hub = hub_with(tmp_path, server, mirror, **cards)
        assert hub.fetch(hub.resolve("me/1.0/a0")).read_bytes() == CONTENT
    assert server.asked == [("/0", ""), ("/0", "")]


def test_the_command_that_is_told_holds_nothing_of_a_strangers(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, offline=True, a=card_text(("https://h/f;rm$(x)", DIGEST)))
    with pytest.raises(HubError, match=r"manidp hub add FILE$"):
        hub.fetch(hub.resolve("me/1.0/a"))


def test_many_failures_are_told_in_one_short_line(tmp_path: Path, server: Loopback) -> None:
    hub = hub_with(tmp_path, server, **{f"a{n}": card_text((f"{server.origin}/{n}", DIGEST)) for n in range(9)})
    with pytest.raises(HubError, match=r"; and 6 more\. If you have the file") as caught:
        hub.fetch(hub.resolve("me/1.0/a0"))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_a_file_beside_its_card_is_taken_if_it_is_right(tmp_path: Path, server: Loopback) -> None:
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    beside = tmp_path / "cards" / "me" / "1.0" / "f"
    beside.write_bytes(CONTENT)
    assert hub.resolve("me/1.0/a").beside == beside
    path = hub.fetch(hub.resolve("me/1.0/a"))
    assert path.read_bytes() == CONTENT and path != beside and not server.asked
    path.unlink()
    beside.write_bytes(b"another")
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT and len(server.asked) == 1


def test_a_file_that_changes_while_it_is_copied_is_not_taken(
    tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    (tmp_path / "cards" / "me" / "1.0" / "f").write_bytes(b"another by now")
    monkeypatch.setattr("manidp.hub.hub.sha256_of", lambda path: DIGEST)
    with pytest.raises(HubError, match="changed while it was copied"):
        hub.fetch(hub.resolve("me/1.0/a"))
    assert files_in(hub) == {}


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    decision = hub.resolve("me/1.0/a")
    done: list[str] = []

    def watched(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*given: object) -> None:
            done.append(name)
            real(*given)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    hub.fetch(decision)
    assert done == ["fsync", "replace", "fsync"]  # of the file; its name; of the folder that holds the name


def test_on_a_full_disk_no_other_address_is_tried(
    tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.routes["/g"] = whole(CONTENT)
    cards = {name: card_text((f"{server.origin}/{name}", DIGEST)) for name in ("f", "g")}
    hub = hub_with(tmp_path, server, **cards)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(HubError, match="cannot be written to: 51,200 bytes are to come, 9 are free"):
        hub.fetch(hub.resolve("me/1.0/f"))
    assert len(server.asked) == 1 and files_in(hub) == {}


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, server: Loopback) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    with pytest.raises(HubError, match=r"the cache .*cannot be used: Not a directory|File exists"):
        hub.fetch(hub.resolve("me/1.0/a"))
    (tmp_path / "f").write_bytes(CONTENT)
    with pytest.raises(HubError, match=r"the cache .*cannot be used"):
        hub.add(tmp_path / "f")


@pytest.mark.parametrize("name", ["files", "parts", "locks", f"files/{DIGEST}", f"parts/{DIGEST}", f"locks/{DIGEST}"])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_in_the_cache_leads_out_of_it(tmp_path: Path, server: Loopback, name: str, there: bool) -> None:
    outside = tmp_path / "outside"
    link = tmp_path / "cache" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    if there and "/" in name:
        outside.write_bytes(b"mine")
    elif there:
        outside.mkdir()
        (outside / DIGEST).write_bytes(b"mine")
    (tmp_path / "f").write_bytes(CONTENT)
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    calls: list[Callable[[], object]] = [lambda: hub.fetch(hub.resolve("me/1.0/a"))]
    if not name.startswith("parts"):  # which only downloads need
        calls.append(lambda: hub.add(tmp_path / "f"))
    if name == "files":
        calls.append(lambda: list(hub.verify(remove=True)))
    for call in calls:
        with pytest.raises(HubError, match=f"cache/{name} is a symbolic link"):
            call()
    held = outside.read_bytes() if outside.is_file() else (outside / DIGEST).read_bytes() if there else b"mine"
    assert held == b"mine" and there == outside.exists() and link.is_symlink()
    assert not outside.is_dir() or len(list(outside.iterdir())) == 1
    link.unlink()
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT


def test_a_link_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, a=card_text(("https://h/f", DIGEST)))
    (tmp_path / "f").write_bytes(CONTENT)
    (tmp_path / "cache" / "files").mkdir(parents=True)
    (tmp_path / "cache" / "files" / DIGEST).symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "cache" / "files" / ("1" * 64))
    assert [found.intact for found in hub.verify(remove=True)] == [True, False, False]
    assert files_in(hub) == {} and (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("depth", range(1, 5))
def test_a_card_is_kept_in_the_cache_and_nowhere_else(tmp_path: Path, server: Loopback, depth: int) -> None:
    server.routes["/me/1.0/a.md"] = whole(card_text((f"{server.origin}/f", DIGEST)).encode())
    hub = open_hub([server.origin])
    hub.resolve("me/1.0/a")
    (kept,) = (tmp_path / "cache" / "cards").rglob("*.md")
    link = [*reversed(kept.relative_to(tmp_path / "cache").parents), kept.relative_to(tmp_path / "cache")][depth]
    moved = tmp_path / "outside"
    (tmp_path / "cache" / link).rename(moved)
    (tmp_path / "cache" / link).symlink_to(moved)
    before = [(path, path.lstat().st_mtime_ns) for path in (moved, *moved.rglob("*"))]
    with pytest.raises(HubError, match=f"{link} is a symbolic link"):
        hub.resolve("me/1.0/a")
    assert before == [(path, path.lstat().st_mtime_ns) for path in (moved, *moved.rglob("*"))]


# Several processes --------------------------------------------------------------------------------------------------

FETCH = """
import sys
from manidp.hub.hub import open_hub
hub = open_hub([sys.argv[1]], hosts=[sys.argv[2]])
print(len(hub.fetch(hub.resolve("me/1.0/a")).read_bytes()))
"""


def _fetching(tmp_path: Path, server: Loopback) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cards"), server.origin]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _slow(seconds: float) -> Route:
    def route(request: Request) -> None:
        if request.offset():
            whole(CONTENT)(request)
        else:
            request.answer(200, Content_Length=len(CONTENT))
            request.send(CONTENT[:20_000])
            request.pause(seconds)
            request.send(CONTENT[20_000:])

    return route


def test_two_processes_at_once_bring_a_file_once(tmp_path: Path, server: Loopback) -> None:
    server.routes["/f"] = _slow(1.5)
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    both = [_fetching(tmp_path, server) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == [f"{len(CONTENT)}\n"] * 2
    assert server.asked == [("/f", "")] and files_in(hub) == {DIGEST: CONTENT}


def test_a_killed_download_is_gone_on_with_and_blocks_nobody(tmp_path: Path, server: Loopback) -> None:
    server.routes["/f"] = _slow(60)
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    part = hub.cache / "parts" / DIGEST
    process = _fetching(tmp_path, server)
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert files_in(hub) == {} and 0 < part.stat().st_size < len(CONTENT)
    left = part.stat().st_size
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT
    assert server.asked == [("/f", ""), ("/f", f"bytes={left}-")]


def test_who_waits_for_another_process_says_so_and_gives_up(
    tmp_path: Path, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    hub = replace(hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST))), patience=0.2)
    lock = tmp_path / "cache" / "locks" / DIGEST
    lock.parent.mkdir(parents=True)
    (tmp_path / "f").write_bytes(CONTENT)
    calls: list[Callable[[], object]] = [
        lambda: hub.fetch(hub.resolve("me/1.0/a")), lambda: hub.add(tmp_path / "f")
    ]  # fmt: skip
    with FileLock(lock):
        for call in calls:
            caplog.clear()
            with pytest.raises(HubError, match=rf"{lock} is held by another process, for more than 0.2 s"):
                call()
            assert f"holds {lock}: waiting for it, 0.2 s at most" in caplog.text
    caplog.clear()
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == CONTENT and not caplog.text


def test_what_killed_processes_left_is_swept(tmp_path: Path, server: Loopback) -> None:
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/f", DIGEST)))
    for name in (f"files/.{DIGEST}.aaaaaaaaaaaa.tmp", "files/.other.aaaaaaaaaaaa.tmp", "parts/old", "parts/new"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(b"x")
    month_ago = time.time() - FORGOTTEN_S
    os.utime(tmp_path / "cache" / "parts" / "old", (month_ago, month_ago))
    hub.fetch(hub.resolve("me/1.0/a"))
    left = {path.name for folder in ("files", "parts") for path in (tmp_path / "cache" / folder).iterdir()}
    assert left == {DIGEST, ".other.aaaaaaaaaaaa.tmp", "new"}  # the other's lock is not held, so it may be in use


# By hand, and again -------------------------------------------------------------------------------------------------


def test_a_file_carried_by_hand_is_taken_in_if_it_is_known(tmp_path: Path) -> None:
    hub = hub_with(tmp_path, offline=True, a=card_text(("https://h/f", DIGEST)), b=card_text(("https://h/g", DIGEST)))
    (tmp_path / "carried").write_bytes(CONTENT)
    added = hub.add(tmp_path / "carried")
    assert [uid.stem for uid in added.uids] == ["a", "b"] and added.size == len(CONTENT) and added.intact
    assert hub.fetch(hub.resolve("me/1.0/b")) == added.path and added.path.read_bytes() == CONTENT
    assert hub.add(tmp_path / "carried") == added
    (tmp_path / "carried").write_bytes(CONTENT + b"x")
    digest = hashlib.sha256(CONTENT + b"x").hexdigest()
    with pytest.raises(HubError, match=f"no card names its sha256 {digest}"):
        hub.add(tmp_path / "carried")
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(HubError, match="cannot read"):
            hub.add(path)
    assert files_in(hub) == {DIGEST: CONTENT}


def test_verifying_hashes_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = b"other"
    digests = {hashlib.sha256(content).hexdigest(): content for content in (CONTENT, other)}
    hub = hub_with(tmp_path, **{f"a{n}": card_text(("https://h/f", d)) for n, d in enumerate(digests)})
    monkeypatch.setattr("manidp.hub.hub.bundled_files", dict)
    assert list(hub.verify()) == []
    for digest, content in digests.items():
        (tmp_path / digest).write_bytes(content)
        hub.add(tmp_path / digest)
    assert {c.path.name: c.intact for c in hub.verify()} == dict.fromkeys(digests, True)
    (hub.cache / "files" / DIGEST).write_bytes(CONTENT[:-1])
    expected = {digest: digest != DIGEST for digest in digests}
    assert {c.path.name: c.intact for c in hub.verify()} == expected and len(files_in(hub)) == 2
    assert {c.path.name: c.intact for c in hub.verify(remove=True)} == expected
    assert list(files_in(hub).values()) == [other]


# Networks -----------------------------------------------------------------------------------------------------------


def _network() -> tuple[Checkpoint, np.ndarray[Any, Any]]:
    graph = with_gates(resnet(20))
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in graph.parameters.items()}
    checkpoint = Checkpoint(graph, weights, CIFAR10_PREPROCESSING, CIFAR10_CLASSES)
    return checkpoint, to_ckpt(checkpoint)[1]


def assert_weights(got: Checkpoint, expected: Checkpoint) -> None:
    assert got.graph == expected.graph and got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(got.weights[name], weight, strict=True)


def test_a_known_network_is_ready_to_run(tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's whole path, with a network of our own in its place."""
    network, thresholds = _network()
    write_ckpt({**to_ckpt(network)[0], "epoch_num": np.array(3)}, tmp_path / "x.ckpt")
    content = (tmp_path / "x.ckpt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    known = replace(known_networks()[ORIGINAL_SHA256], thresholds=tuple(thresholds))
    monkeypatch.setattr("manidp.hub.hub.known_networks", lambda: {digest: known})
    server.routes["/x.ckpt"] = whole(content)
    hub = hub_with(tmp_path, server, a=card_text((f"{server.origin}/x.ckpt", digest)), b=card_text(("", DIGEST)))
    found = hub.load(hub.resolve("me/1.0/a"))
    assert found.ignored == ("epoch_num",) and (found.name, found.sha256) == ("me/1.0/a", digest)
    assert found.checkpoint.preprocessing == known.preprocessing and found.checkpoint.provenance["sha256"] == digest
    assert_weights(found.checkpoint, network)
    offline = hub_with(tmp_path, offline=True)
    assert_weights(offline.load(offline.resolve("me/1.0/a")).checkpoint, network)
    with pytest.raises(HubError, match=rf"'me/1.0/b' is no network that manidp can run; it can run {OURS}, me/1\.0/a$"):
        hub.load(hub.resolve("me/1.0/b"))


def test_a_file_of_a_bundled_model_is_made_on_the_spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = _network()
    (tmp_path / "data").mkdir()
    ours = tmp_path / "data" / "ours.safetensors"
    save_checkpoint(network, ours)
    write_ckpt(to_ckpt(network)[0], tmp_path / "x.ckpt")
    digest = hashlib.sha256((tmp_path / "x.ckpt").read_bytes()).hexdigest()
    bundled = Bundled("ours", hashlib.sha256(ours.read_bytes()).hexdigest())
    monkeypatch.setattr("manidp.hub.hub.DATA", tmp_path / "data")
    monkeypatch.setattr("manidp.hub.hub.bundled_files", lambda: {digest: bundled, DIGEST: bundled})
    cards = {"a": card_text(("https://h/x.ckpt", digest)), "wrong": card_text(("https://h/f", DIGEST))}
    hub = hub_with(tmp_path, offline=True, **cards)
    found = hub.load(hub.resolve("me/1.0/a"))
    assert (found.name, found.path, found.sha256, found.ignored) == ("me/1.0/a", ours, bundled.sha256, ())
    assert_weights(found.checkpoint, network)
    assert hub.fetch(hub.resolve("me/1.0/a")).read_bytes() == (tmp_path / "x.ckpt").read_bytes()
    with pytest.raises(HubError, match="does not make the file of its card"):
        hub.fetch(hub.resolve("me/1.0/wrong"))
    assert_nothing_wrong(hub)


def test_a_bundled_model_that_is_not_the_one_of_its_card_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "data" / "manidp-res20.safetensors"
    monkeypatch.setattr("manidp.hub.hub.DATA", ours.parent)
    ours.parent.mkdir()
    hub = open_hub()
    for damage in (None, lambda: save_checkpoint(_network()[0], ours)):
        if damage is not None:
            damage()
        for call in (lambda: hub.load(hub.resolve(OURS)), lambda: hub.fetch(hub.resolve(OURS))):
            with pytest.raises(HubError, match="not the one of its card"):
                call()
        (listed,) = hub.verify(remove=True)
        assert (listed.path, listed.intact, [str(uid) for uid in listed.uids]) == (ours, False, [OURS])
    assert ours.exists() and files_in(hub) == {}


def test_our_own_model_is_had_by_its_name_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.__init__", opened)
    monkeypatch.setattr("socket.getaddrinfo", opened)
    (bundled,) = bundled_files().values()
    expected = find_model("manidp-res20")
    for name in (OURS, f"{TREE}/{OURS}.md"):
        found = find_model(name)
        assert (found.name, found.path, found.sha256) == (OURS, expected.path, expected.sha256)
        assert found.sha256 == bundled.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
        assert_weights(found.checkpoint, expected.checkpoint)
    hub = open_hub()
    assert hub.load(hub.resolve(OURS)).path == expected.path and files_in(hub) == {}
    assert hashlib.sha256(hub.fetch(hub.resolve(OURS)).read_bytes()).hexdigest() in bundled_files()
    assert [(c.intact, [str(uid) for uid in c.uids]) for c in hub.verify()] == [(True, [OURS])] * 2


def test_a_model_is_found_by_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = _network()
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "model.safetensors"
    save_checkpoint(network, file)
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/model.safetensors", "a/b", "./a/b/", Path("a/b"), file):
        found = find_model(name)
        assert found.path.absolute() == file and found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert found.name == "model"
        assert_weights(found.checkpoint, network)
    assert find_model("dense-res20").name == "dense-res20"


def test_a_model_at_hand_is_had_without_what_the_hub_needs() -> None:
    probe = "import sys, manidp; manidp.load_model('manidp-res20'); print('manidp.hub.hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("manidp-res21", "no such file, and no model of this name"),
        ("x" * 5000, "no such file"),
        ("a/" + "x" * 5000, "there is no file 'a/x.*is not the name of a card"),
        ("runs/mine", "there is no file 'runs/mine', and as the name of a card: .*is not the name of a card"),
        ("runs/mine/model", "there is no file 'runs/mine/model', and .*there is no card"),
        ("runs/mine.safetensors", "no such file"),
        ("a/\0b", r"there is no file 'a/\\x00b'"),
        ("a//b", "'a//b' is not the name of a card"),
        ("a/\x1b[31m", r"'a/\\x1b\[31m' is not the name of a card"),
        ("https://[/a/b", r"'https://\[/a/b' is not the name of a card"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_that_says_where_was_looked(name: str, said: str) -> None:
    with pytest.raises(ManiDPError, match=said):
        find_model(name)


def test_every_error_of_the_hub_is_one_of_ours() -> None:
    assert issubclass(HubError, ManiDPError) and issubclass(CardError, ManiDPError)
