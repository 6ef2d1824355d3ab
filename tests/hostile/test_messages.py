"""Whatever a file calls things, what is said of it is one short line; and a file may end anywhere."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hostile.mutate import Tensors, ckpt_value, safetensors_file, tensors_of
from hostile.strangers import UID, assert_one_line
from hostile.test_files import GRAPH, OTHERS, header
from manidp.data.folders import load_folder
from manidp.data.images import ImageSet, load_image_set
from manidp.errors import CardError, ManiDPError
from manidp.formats.checkpoint import load_checkpoint
from manidp.formats.ckpt import read_ckpt
from manidp.formats.conversion import read_thresholds, resnet_of_ckpt
from manidp.formats.signatures import HEAD, looks_like
from manidp.graph import Graph
from manidp.hub.card import Asset, ModelCard, card_faults, parse_card, render_card
from manidp.hub.hub import Hub, open_hub

TEXTS = (
    "\ufeffckpt", "\u202e", "\x1b[31m", "a\nb", "\r", "\x85", "a" * 4000, "\N{IDEOGRAPHIC SPACE}" * 300, "\udcff",
)  # fmt: skip


def of_cards(text: str, place: Path) -> Iterator[Callable[[], object]]:
    """A card that holds the text in its title, its values, its keys and its asset: resolved, rendered, judged."""
    plain = f"# {text}\n\n---\n\nmodel-name: {text}\n\n{text[:50]}: {text}\n\nasset:\n\n-\n    file-format: {text}\n"
    plain += f"    asset-link: <https://{text}/{text}>\n    asset-sha256: {text}\n\n---\n{text}\n"
    content = plain.encode("utf-8", "surrogatepass")
    for version in (content, content.replace(b"file-format: ", b"file-format: ckpt\n    x: ")):
        path = place / "cards" / f"{UID}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(version)
        yield partial(_fetched, open_hub([place / "cards"], cache=place / "cache", offline=True))
    yield lambda: _raise_faults(content)
    card = ModelCard(text, {"model-name": text}, (Asset(text, text, text),), text)
    yield lambda: render_card(card)


def _fetched(hub: Hub) -> Path:
    return hub.fetch(hub.resolve(UID))


def _raise_faults(content: bytes) -> None:
    raise CardError(str(card_faults(content, "x")[-1]))


def of_ckpts(text: str, place: Path) -> Iterator[Callable[[], object]]:
    name = text.encode("utf-8", "surrogatepass")
    for count, content in enumerate((
        ckpt_value(name, [2], b"Float32", bytes(7)), ckpt_value(name, [2], b"Bool", b"\x02\x02"),
        ckpt_value(name, [1] * 40, b"Float32", bytes(4)), ckpt_value(b"x", [2], name, bytes(8)),
        ckpt_value(name, [2], b"str", b"x"), ckpt_value(name, [2], b"Float32", bytes(8)) * 2,
        ckpt_value(name, [1], b"Int8", b"x") + ckpt_value(name, [2], b"Int8", b"xx"),
        ckpt_value(name, [2**40] * 3, b"Float32", bytes(8)),
        b"".join(ckpt_value(name[:-1] + b"%d" % n, [2], b"Float32", bytes(8)) for n in range(5)),
    )):  # fmt: skip
        path = place / f"{count}.ckpt"
        path.write_bytes(content)
        yield partial(_resnet, path)


def _resnet(path: Path) -> Graph:
    return resnet_of_ckpt(read_ckpt(path))


def of_checkpoints(text: str, place: Path) -> Iterator[Callable[[], object]]:
    tensors = tensors_of(GRAPH, random.Random(0))
    meta = header()
    tensor = next(iter(tensors.values()))
    with_point = {**meta, "version": 2, "points": [{"name": text[:900], "macs": None, "accuracy": None}]}
    strange = {f"weights/{name}": value for name, value in tensors.items()} | {f"points/0/{text}": tensor}
    yield from _loading(place / "0.safetensors", safetensors_file(strange, with_point))
    renamed = {**tensors, text: tensor}
    yield from _loading(place / "1.safetensors", safetensors_file(renamed, meta))
    for count, key in enumerate(("version", "classes", "preprocessing", "graph"), 2):
        yield from _loading(place / f"{count}.safetensors", safetensors_file(tensors, {**meta, key: [text]}))
    for node in ("op", "name", "inputs", text):
        changed = json.loads(json.dumps(meta))
        changed["graph"]["nodes"][1][node] = [text] if node == "inputs" else text
        yield from _loading(place / f"{ascii(node)[1:9]}.safetensors", safetensors_file(tensors, changed))


def _loading(path: Path, content: bytes) -> Iterator[Callable[[], object]]:
    path.write_bytes(content)
    yield lambda: load_checkpoint(path)


def of_pictures(text: str, place: Path) -> Iterator[Callable[[], object]]:
    images = ImageSet(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64), (text,) * 30)
    yield lambda: images.relabelled(["x"] * 30, "a model")
    yield lambda: images.relabelled([text] * 30, "a model")
    metas: list[dict[str, object]] = [{"version": text}, {"version": 1, "classes": text}, {"version": 1, "classes": []}]
    for number, meta in enumerate(metas):
        path = place / f"{number}.safetensors"
        tensor: Tensors = {text: ("U8", [1], b"x")}
        path.write_bytes(safetensors_file(tensor, {"format": "image set", **meta}))
        yield partial(load_image_set, path)
    folder = place / "pictures"
    with suppress(OSError, ValueError):  # what no file can be called
        for number in range(20):
            name = os.fsdecode(os.fsencode(text)[:200].decode(errors="ignore"))
            (folder / f"{name}{number}").mkdir(parents=True)
    yield lambda: load_folder(folder, (4, 4), ["x", "y"])
    yield lambda: load_folder(folder, (4, 4))


@pytest.mark.parametrize("places", [of_cards, of_ckpts, of_checkpoints, of_pictures])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:8]))
def test_a_text_in_a_file_stays_one_short_line_of_the_message(
    places: Callable[[str, Path], Iterator[Callable[[], object]]], text: str, tmp_path: Path
) -> None:
    said = 0
    for attempt in places(text, tmp_path):
        try:
            attempt()
        except ManiDPError as error:
            said += 1
            assert_one_line(error)
    assert said >= 4


@pytest.mark.parametrize("kind", ManiDPError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_message_is_printable_whatever_is_put_into_it(kind: type[ManiDPError]) -> None:
    error = kind("".join(map(chr, range(0x3000))) + "\ud800")
    assert str(error).isprintable() and str(error).encode()
    assert str(kind(str(error))) == str(error), "what is printable stays as it is"


@pytest.mark.parametrize("content", [*OTHERS.values(), safetensors_file({}, {}), bytes(HEAD)])
def test_a_file_may_end_anywhere(content: bytes, tmp_path: Path) -> None:
    for length in range(min(len(content), HEAD) + 1):
        looks_like(content[:length])
        path = tmp_path / "x"
        path.write_bytes(content[:length])
        for read in (read_ckpt, load_checkpoint, read_thresholds, load_image_set):
            with suppress(ManiDPError):  # and nothing else
                read(path)
        with suppress(ManiDPError):
            parse_card(content[:length], "x")
