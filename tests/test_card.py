"""Model cards: 1,500 real ones, the oddities they hold, and what the writer refuses to write."""

# ruff: noqa: RUF001  (full-width colons, as in Chinese cards)
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manidp.errors import CardError
from manidp.hub.card import Asset, ModelCard, card_faults, parse_card, read_card, render_card, write_card

REAL_CARDS = Path(__file__).parents[2] / "shared" / "data" / "hub-cards.tar.xz"
DIGEST = "0123456789abcdef" * 4

CARD = f"""\
# manidp-res20

---

model-name: manidp-res20

backbone-name: manidp-res20

module-type: cv-classification

fine-tunable: True

input-shape: [32, 32, 3]

model-version: 1.10

train-dataset: cifar10

evaluation: acc92.05

accuracy: 0.9205

author: the manidp authors

update-time: 2026-11-20

repo-link: <https://example.com/manidp/manidp/tree/main/models/manidp-res20>

user-id: manidp

used-for: inference/transfer-learning

mindspore-version: 2.10

license: Apache2.0

summary: classifies CIFAR-10 and skips more than half of the work

asset:

-
    file-format: ckpt
    asset-link: <https://example.com/files/manidp-res20.ckpt>
    asset-sha256: {DIGEST}

---

## Usage

```python
# load it:
network = load()
```
"""


def card_with(old: str, new: str) -> bytes:
    assert CARD.count(old) == 1
    return CARD.replace(old, new).encode()


def assert_remarked(content: bytes, line: int, text: str) -> None:
    """The reader reads the card and has exactly one remark, on this line."""
    remarks = parse_card(content, "card").remarks
    assert [remark.line for remark in remarks] == [line], remarks
    assert text in remarks[0].text


def test_every_value_is_the_text_that_stands_in_the_card() -> None:
    card = parse_card(CARD.encode(), "card")
    assert card.title == "manidp-res20" and not card.remarks
    assert card.fields["model-version"] == "1.10" and card.fields["accuracy"] == "0.9205"
    assert card.fields["fine-tunable"] == "True" and card.fields["input-shape"] == "[32, 32, 3]"
    assert card.fields["repo-link"] == "https://example.com/manidp/manidp/tree/main/models/manidp-res20"
    assert card.assets == (Asset("ckpt", "https://example.com/files/manidp-res20.ckpt", DIGEST),)
    assert card.assets[0].verifiable and card.body.startswith("## Usage") and card.body.endswith("```")


@pytest.mark.parametrize(
    "layout",
    [
        "- file-format: ckpt\n\n  asset-link: <https://h/f>\n\n  asset-sha256: {0}",
        "-\n    file-format: ckpt\n    asset-link: https://h/f\n    asset-sha256: {0}",
        "  - asset-sha256: '{0}'\n    file-format: .ckpt\n    asset-link: \"<https://h/f>\"",
        "- 文件格式：.ckpt  \n  资源链接： <https://h/f>\n  资源SHA256校验码：{0}",
    ],
)
@pytest.mark.parametrize("head", ["asset:\n", "asset:", "资源："])
def test_assets_are_read_in_every_layout(layout: str, head: str) -> None:
    text = f"# T\n---\n{head}\n{layout.format(DIGEST)}\n\nlicense: x\n---\n"
    for content in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        card = parse_card(content.encode(), "card")
        assert card.assets == (Asset("ckpt", "https://h/f", DIGEST),) and card.fields == {"license": "x"}
        assert not card.remarks


def test_several_assets_stay_apart() -> None:
    one, two = (f"- file-format: {kind}\n  asset-link: https://h/{kind}\n  asset-sha256: {DIGEST}\n"
                for kind in ("ckpt", "mindir"))  # fmt: skip
    card = parse_card(f"# T\n---\nlicense: x\nasset:\n{one}{two}---\n".encode(), "card")
    assert [asset.link for asset in card.assets] == ["https://h/ckpt", "https://h/mindir"] and not card.remarks


def test_a_translated_head_has_the_usual_keys() -> None:
    text = "# T\n---\n模型名称：a\nMindSpore版本：0.7\n用户ID：b\nMindSpore Lite：True\nmAP：0.241\n摘要：c：d\n---\n"
    fields = {"model-name": "a", "mindspore-version": "0.7", "user-id": "b", "mindspore-lite": "True", "mAP": "0.241",
              "summary": "c：d"}  # fmt: skip
    assert parse_card(text.encode(), "card").fields == fields


def test_what_stops_yaml_does_not_stop_the_reader() -> None:
    text = "# T\n---\naccuracy: vit-base: 83.78 / swin-base: 84.03\nevaluation: -\nauthor: 'x'\n---\n---\nbody\n---\n"
    card = parse_card(text.encode(), "card")
    assert card.fields == {"accuracy": "vit-base: 83.78 / swin-base: 84.03", "evaluation": "-", "author": "x"}
    assert card.body == "---\nbody\n---" and not card.remarks


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("license: Apache2.0", "license Apache2.0", 35, "not a 'key: value': 'license Apache2.0'"),
        ("license: Apache2.0", "author: again", 35, "'author' is given again; line 23 is ignored"),
        ("license: Apache2.0", "license: Apache\n  2.0", 36, "taken for the rest of 'license'"),
        ("license: Apache2.0", "license: \x1b[2J", 35, "control characters"),
        ("# manidp-res20\n", "", 1, "no title"),
        ("asset:", "asset: none", 39, "lines of their own; got 'none'"),
        (DIGEST, "e616cdcb", 41, "weak: 8 characters"),
        (DIGEST, "unknown", 41, "no digest: 7 characters"),
        (DIGEST, DIGEST.upper(), 41, "not in lower case"),
        (f"    asset-sha256: {DIGEST}\n", "", 41, "lacks asset-sha256"),
        ("    file-format: ckpt\n", "", 41, "lacks file-format"),
        ("asset-sha256:", "asset-md5: 0\n    asset-sha256:", 44, "not one of an asset's"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, line: int, text: str) -> None:
    assert_remarked(card_with(old, new), line, text)


def test_a_second_link_is_a_second_asset() -> None:
    link = "    asset-link: https://h/2\n"
    content = card_with("    asset-sha256:", f"{link}    asset-sha256:")
    card = parse_card(content, "card")
    assert [(a.file_format, a.link) for a in card.assets][1:] == [("ckpt", "https://h/2")]
    assert [remark.line for remark in card.remarks] == [41, 44]


def test_a_digest_is_verifiable_only_if_it_is_whole() -> None:
    assert Asset("ckpt", "", DIGEST).verifiable
    for digest in ("", DIGEST[:8], DIGEST[:63], DIGEST + "0", DIGEST[:63] + "g", DIGEST.upper(), DIGEST + "\n"):
        assert not Asset("ckpt", "", digest).verifiable


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "line 1: .* between two lines"),
        (b"# T\n---\na: b\n", "line 4: .* got 1"),
        (b"# T\n---\n\n---\n", "line 3: .*no 'key: value'"),
        (b"# T\n---\na: b\n\xff\n---\n", "line 4: not UTF-8"),
        (b"# T\n---\n" + b"a: b\n" * 1001 + b"---\n", "head of 1001 lines"),
        (b"# T\n---\na: b\n---\n" + bytes(2**20), "larger than"),
    ],
)
def test_what_is_no_card_is_an_error(content: bytes, text: str) -> None:
    with pytest.raises(CardError, match=text):
        parse_card(content, "card")


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"absent\.md: cannot be read: No such file"):
        read_card(tmp_path / "absent.md")


def test_a_good_card_has_no_faults_and_is_written_as_it_was() -> None:
    assert card_faults(CARD.encode(), "card") == ()
    assert render_card(parse_card(CARD.encode(), "card")) == CARD


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("module-type: cv-classification", "module-type: vision", 9, "'module-type' must be of gnn"),
        ("fine-tunable: True", "fine-tunable: maybe", 11, "True or False"),
        ("model-version: 1.10", "", 46, "'model-version' is missing"),
        ("train-dataset: cifar10", "train-dataset: mine", 17, "'train-dataset' must be of cifar10"),
        ("accuracy: 0.9205", "accuracy: high", 21, "a number"),
        ("author: the manidp authors", "author: a: b", 23, "must not hold a ':'"),
        ("evaluation: acc92.05", "evaluation: acc: 92", 19, "something else by YAML"),
        ("evaluation: acc92.05", "evaluation: -", 19, "something else by YAML"),
        ("summary: classifies", "summary: '", 37, "something else by YAML"),
        ("update-time: 2026-11-20", "update-time: 2026-02-30", 25, "a date"),
        (
            "https://example.com/manidp/manidp/tree/main",
            "http://example.com/manidp/manidp/tree/main",
            27,
            "https://HOST",
        ),
        ("https://example.com/manidp/manidp/tree", "https://example.com/manidp/manidp/blob", 27, "https://HOST"),
        ("https://example.com/manidp", "https://example.org/manidp", 27, "https://HOST"),
        ("used-for: inference", "used-for: training", 31, "'used-for' must be of"),
        ("input-shape: [32, 32, 3]", "input-shape: [32", 13, "like [32, 32, 3]"),
        ("file-format: ckpt", "file-format: pickle", 41, "file-format must be of"),
        ("<https://example.com/files/manidp-res20.ckpt>", "manidp-res20.ckpt", 41, "a web address"),
        ("## Usage", "## Usage:", 48, "heading"),
        ("## Usage", "---", 48, "third line"),
        ("```\n", "```\n---\n", 54, "third line"),
        (DIGEST, "e616cdcb", 41, "weak"),
    ],
)
def test_what_the_hub_refuses_is_a_fault_and_is_never_written(old: str, new: str, line: int, text: str) -> None:
    content = CARD.encode().replace(old.encode(), new.encode()) if old == "```\n" else card_with(old, new)
    faults = card_faults(content, "card")
    assert [fault.line for fault in faults] == [line] and text in faults[0].text, faults
    with pytest.raises(CardError, match="would be refused: line"):
        render_card(parse_card(content, "card"))


def test_a_value_that_would_come_back_as_another_is_not_written() -> None:
    card = parse_card(CARD.encode(), "card")
    for key, value in (("summary", "a\nb"), ("author", " x"), ("asset", "x"), ("author", "x\nlicense: y"), ("a b", "")):
        with pytest.raises(CardError):
            render_card(replace(card, fields={**card.fields, key: value}))
    with pytest.raises(CardError):
        render_card(replace(card, title="x\n---"))
    with pytest.raises(CardError, match="asset"):
        render_card(replace(card, assets=(Asset("ckpt", "https://h/f", ""),)))


def test_a_card_is_written_only_under_a_name_that_the_hub_takes(tmp_path: Path) -> None:
    card = parse_card(CARD.encode(), "card")
    write_card(card, tmp_path / "manidp-res20_cifar10.md")
    assert read_card(tmp_path / "manidp-res20_cifar10.md") == card
    for name in ("card.txt", "card_v1.0.md", "card_cn.md"):
        with pytest.raises(CardError, match=re.escape(name)):
            write_card(card, tmp_path / name)
    with pytest.raises(CardError, match="cannot be written"):
        write_card(card, tmp_path / "absent" / "card.md")
    assert [path.name for path in tmp_path.iterdir()] == ["manidp-res20_cifar10.md"]


@pytest.mark.skipif(not REAL_CARDS.exists(), reason="the real cards are not beside the project")
def test_all_real_cards_are_read() -> None:
    count, weak = 0, 0
    with tarfile.open(REAL_CARDS) as archive:
        for member in archive:
            if not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            content = file.read()
            card = parse_card(content, member.name)
            head = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n---", 2)[1]
            count += 1
            assert card.fields["mindspore-version"] == member.name.split("/")[-2], member.name
            assert card.title and card.fields["model-name"] and card.fields["license"], member.name
            assert [a.sha256 for a in card.assets if a.sha256] == re.findall(r"256\w*[:：] ?([0-9a-f]+)", head)
            assert [a.link for a in card.assets] == re.findall(r"(?:asset-link|资源链接)[:：] <?(\S+?)>?\s", head)
            assert {a.file_format for a in card.assets} <= {"ckpt", "mslite"}
            assert all(str(remark.line) and 1 <= remark.line <= content.count(b"\n") + 1 for remark in card.remarks)
            weak += sum("weak" in remark.text for remark in card.remarks)
    assert (count, weak) == (1500, 63)


TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)
PIECES = st.sampled_from(["---\n", "- ", "  ", "\n", ": ", "：", "asset:", "asset-link: <", ">", "'", "# ", "\r", "\0"])


@given(st.lists(st.one_of(PIECES, TEXT, st.binary(max_size=6)), max_size=12), st.integers(0, len(CARD)))
@example(inserted=["---\n", "asset-link: <", ": ", "---\n", "asset-link: <"], at=0)
@settings(max_examples=300, deadline=None)
def test_no_line_of_a_damaged_head_is_lost_in_silence(inserted: list[str | bytes], at: int) -> None:
    """Whatever is put anywhere into a card: a CardError, or every line's value is read or remarked upon."""
    new = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in inserted)
    content = CARD.encode()[:at] + new + CARD.encode()[at:]
    try:
        card = parse_card(content, "card")
    except CardError:
        return
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    start, end = [n for n, line in enumerate(lines) if line.startswith("---")][:2]
    remarked = {remark.line for remark in card.remarks}
    # of a key that is given twice, the remark stands at the second line and names the first
    remarked |= {int(n) for remark in card.remarks for n in re.findall(r"; line (\d+) is ignored$", remark.text)}
    read = {*card.fields.values(), *(v.lower() for a in card.assets for v in (a.file_format, a.link, a.sha256))}
    for number, line in enumerate(lines[start + 1 : end], start + 2):
        value = re.sub(r"^[^:：]*[:：]", "", line.strip(" \t-")).strip().strip("'\"<>. \t")
        known = any(value.lower() in text.lower() for text in read)
        assert number in remarked or known or not value or any(not c.isprintable() for c in line), (number, line)
    card_faults(content, "card")


FREE = st.sampled_from(["model-name", "author", "evaluation", "license", "summary", "more"])


@given(TEXT, st.dictionaries(FREE, TEXT), st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(title: str, fields: dict[str, str], body: str) -> None:
    good = parse_card(CARD.encode(), "card")
    card = replace(good, title=title, fields={**good.fields, **fields}, body=body)
    try:
        text = render_card(card)
    except CardError:
        return
    assert parse_card(text.encode(), "card") == card and card_faults(text.encode(), "card") == ()


@pytest.mark.parametrize("pattern", ["- \n", ": ", "a: b\n ", "：", "# :", "```\n", "-" * 9 + "\n"])
def test_hostile_repetition_takes_no_time(pattern: str) -> None:
    fill = pattern * (900_000 // len(pattern.encode()))
    start = "# T\n---\na: b\n"
    for content in (f"{start}{fill}\n---\n", f"{start}---\n{fill}", f"{start}{pattern * 400}\n---\n"):
        try:
            assert isinstance(parse_card(content.encode(), "card"), ModelCard)
            card_faults(content.encode(), "card")
        except CardError:
            continue
