"""The hub's model cards, markdown with a head of ``key: value`` lines: a tolerant reader and a strict writer.

The head looks like YAML, but is read line by line. Every value stays the text that stands there (YAML would make
version ``1.10`` the number 1.1, and stop at the colons in ``accuracy: vit-base: 83.78``), every key and asset keeps
the number of its line, and there is nothing in it that could expand or run. Cards exist in two layouts of the list of
assets, with links in ``<>`` or bare, and in Chinese with full-width colons.
"""

# ruff: noqa: RUF001  (full-width colons, as in Chinese cards)
from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manidp.errors import CardError, quoted
from manidp.files import open_regular, replacing

MAX_CARD_BYTES = 2**20
MAX_HEAD_LINES = 1000

KEYS = (
    "model-name", "backbone-name", "module-type", "fine-tunable", "input-shape", "model-version", "train-dataset",
    "evaluation", "accuracy", "author", "update-time", "repo-link", "user-id", "used-for", "train-backend",
    "infer-backend", "mindspore-version", "mindspore-lite", "license", "summary",
)  # fmt: skip
"""The usual keys in the order in which they are written; others follow."""
ASSET_KEYS = ("file-format", "asset-link", "asset-sha256")

_TRANSLATED = {
    "模型名称": "model-name", "骨干网络": "backbone-name", "模块类型": "module-type", "可微调": "fine-tunable",
    "输入形状": "input-shape", "模型版本": "model-version", "训练数据集": "train-dataset", "评估": "evaluation",
    "准确率": "accuracy", "作者": "author", "更新时间": "update-time", "代码仓链接": "repo-link", "用户id": "user-id",
    "用途": "used-for", "训练后端": "train-backend", "推理后端": "infer-backend", "mindspore版本": "mindspore-version",
    "许可证": "license", "摘要": "summary", "资源": "asset", "文件格式": "file-format", "资源链接": "asset-link",
    "资源sha256校验码": "asset-sha256",
}  # fmt: skip
_LINE = re.compile(r"([^:：]{1,60}?)\s*[:：]\s*(.*)", re.DOTALL)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# What the hub's own validator asks of a card, as far as it can be told from the text.
_REQUIRED = (
    "model-name", "backbone-name", "module-type", "fine-tunable", "model-version", "author", "update-time",
    "repo-link", "user-id", "used-for", "mindspore-version", "license", "summary",
)  # fmt: skip
_MODULE_TYPES = ("gnn", "rl", "audio", "cv", "cvtmodel", "nlp", "recommend", "cross", "hpc", "mm", "other")
_USES = ("inference", "extract-feature", "transfer-learning")
_FORMATS = ("air", "ckpt", "onnx", "mindir", "mslite")
_DATASETS = ("cifar10", "cifar100")  # of its list, those that ManiDP networks are trained on
_REPO_LINK = re.compile(r"https://[\w.-]+\.com/[\w.-]+/[\w.-]+/tree/[\w.-]+/[\w./+-]*[\w+-]")
_COLON_ALLOWED = ("repo-link", "evaluation")
_YAML_SPECIAL = re.compile(r"^[\[\]{}&*!|>%@`\"'#?,-]|: |:$| #")
_SHAPE = re.compile(r"\[\d+(, \d+)*\]")


@dataclass(frozen=True)
class Remark:
    """Something wrong with a card, and the line it stands on (from 1)."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Asset:
    """A file that belongs to a model: ``file_format`` without a dot, ``link`` without ``<>``, ``sha256`` in lower case.

    Nothing is missing in the writer's assets; in the reader's, what a card leaves out is empty.
    """

    file_format: str
    link: str
    sha256: str

    @property
    def verifiable(self) -> bool:
        """Whether the digest is whole. A few digits of one are weak: they never make a file verified."""
        return _DIGEST.fullmatch(self.sha256) is not None


@dataclass(frozen=True)
class ModelCard:
    """A card as data: ``fields`` maps keys to texts, ``remarks`` says what the reader found wrong."""

    title: str
    fields: Mapping[str, str]
    assets: tuple[Asset, ...]
    body: str
    remarks: tuple[Remark, ...] = field(default=(), compare=False)


def read_card(path: str | Path) -> ModelCard:
    """Read a card's file; see :func:`parse_card`."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CARD_BYTES + 1)
    except (OSError, ValueError) as error:
        raise CardError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_card(content, str(path))


def parse_card(content: bytes, name: str) -> ModelCard:
    """Make a card of a file's content, however it is written; ``name`` is what errors call it.

    Raises CardError only if there is no card in it: too large, no text, no head. All else is a remark.
    """
    return _parse(content, name).card


def render_card(card: ModelCard) -> str:
    """The card's markdown. Raises CardError, naming the line, for the first thing that the hub's validator refuses."""
    lines = [f"# {card.title}", "", "---", ""]
    keys = [*(key for key in KEYS if key in card.fields), *(key for key in card.fields if key not in KEYS)]
    for key in keys:
        value = card.fields[key]
        lines += [f"{key}: <{value}>" if key == "repo-link" else f"{key}: {value}", ""]
    if card.assets:
        lines += ["asset:", ""]
        for asset in card.assets:
            lines += ["-", f"    file-format: {asset.file_format}", f"    asset-link: <{asset.link}>"]
            lines += [f"    asset-sha256: {asset.sha256}", ""]
    lines += ["---", "", card.body]
    text = "\n".join(lines).rstrip("\n") + "\n"
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
    called = f"the card {quoted(card.title)}"
    faults = card_faults(text.encode(), called)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CardError(f"{called} would be refused: {faults[0]}{more}")
    if parse_card(text.encode(), called) != card:
        raise CardError(f"{called} would not be read back as it is: line breaks or spaces in a value?")
    return text


def write_card(card: ModelCard, path: str | Path) -> None:
    """Write :func:`render_card` to a file, whole or not at all; raises CardError also for a name the hub refuses."""
    path = Path(path)
    if path.suffix != ".md" or "." in path.stem or path.stem.endswith("cn"):
        raise CardError(f"'{path.name}': a card's file is called NAME.md, without another dot and not ending in 'cn'")
    try:
        with replacing(path) as file:
            file.write(render_card(card).encode())
    except OSError as error:
        raise CardError(f"{path}: cannot be written: {error.strerror or error}") from error


def card_faults(content: bytes, name: str) -> tuple[Remark, ...]:
    """All that the hub's validator would refuse in a card, and all that a YAML reader would take for something else."""
    parsed = _parse(content, name)
    return tuple(sorted([*parsed.card.remarks, *_field_faults(parsed), *_text_faults(parsed)], key=lambda r: r.line))


@dataclass(frozen=True)
class _Parsed:
    """A card, its lines and where its parts stand (numbers of lines, from 1)."""

    card: ModelCard
    lines: list[str]
    head: range
    at: Mapping[str, int]
    assets_at: tuple[int, ...]


def _parse(content: bytes, name: str) -> _Parsed:
    if len(content) > MAX_CARD_BYTES:
        raise CardError(f"{name}: larger than {MAX_CARD_BYTES:,} bytes, which no model card is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CardError(f"{name}: line {line}: not UTF-8 text") from error
    text = text.replace("\r\n", "\n")
    remarks = []
    if control := _CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        remarks.append(Remark(line, "holds control characters, which are replaced"))
        text = _CONTROL.sub("\ufffd", text)
    lines = text.split("\n")
    marks = [n for n, line in enumerate(lines, 1) if line.startswith("---")]
    if len(marks) < 2:
        raise CardError(f"{name}: line {len(lines)}: a card's head stands between two lines '---'; got {len(marks)}")
    head = range(marks[0] + 1, marks[1])
    if len(head) > MAX_HEAD_LINES:
        raise CardError(f"{name}: line {head.start}: a head of {len(head)} lines; at most {MAX_HEAD_LINES} are read")
    title = next((line[2:].strip() for line in lines[: marks[0]] if line.startswith("# ")), "")
    if not title:
        remarks.append(Remark(1, "there is no title ('# NAME') above the head"))
    fields, at, items = _read_head(lines, head, remarks)
    if not fields:
        raise CardError(f"{name}: line {head.start}: there is no 'key: value' in the head")
    assets = tuple(_asset(item, line, remarks) for line, item in items)
    body = "\n".join(lines[marks[1] :]).strip("\n")
    card = ModelCard(title, fields, assets, body, tuple(sorted(remarks, key=lambda remark: remark.line)))
    return _Parsed(card, lines, head, at, tuple(line for line, _ in items))


def _read_head(
    lines: list[str], head: range, remarks: list[Remark]
) -> tuple[dict[str, str], dict[str, int], list[tuple[int, dict[str, str]]]]:
    """Fields, the line of each, and the assets with theirs."""
    fields: dict[str, str] = {}
    at: dict[str, int] = {}
    items: list[tuple[int, dict[str, str]]] = []
    last = ""  # the key that an indented line goes on with
    for number in head:
        line = lines[number - 1]
        entry = line.strip()
        if not entry:
            continue
        inside = line[0] in " \t-"
        if inside and last == "asset":
            if entry.startswith("-"):
                items.append((number, {}))
                entry = entry[1:].strip()
            key, value = _key_and_value(entry)
            if key in ASSET_KEYS and items:
                if key in items[-1][1]:
                    remarks.append(Remark(number, f"'{key}' is given again: taken for one more asset"))
                    items.append((number, {"file-format": items[-1][1].get("file-format", "")}))
                items[-1][1][key] = value
            elif entry:
                remarks.append(Remark(number, f"not one of an asset's {', '.join(ASSET_KEYS)}: {quoted(entry, 60)}"))
        elif inside and last:
            fields[last] = f"{fields[last]} {entry}".strip()
            remarks.append(Remark(number, f"taken for the rest of '{last}'"))
        else:
            key, value = _key_and_value(entry)
            if not key:
                remarks.append(Remark(number, f"not a 'key: value': {quoted(entry, 60)}"))
                continue
            if key in at:
                remarks.append(Remark(number, f"'{key}' is given again; line {at[key]} is ignored"))
            last, at[key] = key, number
            if key != "asset":
                fields[key] = value
            elif value:
                remarks.append(Remark(number, f"assets stand on lines of their own; got {quoted(value, 60)}"))
    return fields, at, items


def _key_and_value(entry: str) -> tuple[str, str]:
    found = _LINE.fullmatch(entry)
    if found is None:
        return "", ""
    key, value = found[1], found[2].strip()
    plain = key.lower().replace(" ", "-")
    plain = _TRANSLATED.get(plain, plain)
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if plain.endswith("-link"):
        value = value.removeprefix("<").removesuffix(">").strip()
    return plain if plain in (*KEYS, *ASSET_KEYS, "asset") else key, value


def _asset(item: Mapping[str, str], line: int, remarks: list[Remark]) -> Asset:
    missing = [key for key in ASSET_KEYS if not item.get(key)]
    if missing:
        remarks.append(Remark(line, f"the asset lacks {', '.join(missing)}"))
    digest = item.get("asset-sha256", "")
    if digest != digest.lower():
        remarks.append(Remark(line, "the asset's sha256 is not in lower case"))
    asset = Asset(item.get("file-format", "").lower().removeprefix("."), item.get("asset-link", ""), digest.lower())
    if digest and not asset.verifiable:
        kind = "weak" if re.fullmatch(r"[0-9a-f]{1,63}", asset.sha256) else "no digest"
        remarks.append(Remark(line, f"the asset's sha256 is {kind}: {len(digest)} characters where 64 hex digits are "
                                    "due, so the file cannot be verified"))  # fmt: skip
    return asset


def _field_faults(parsed: _Parsed) -> list[Remark]:
    fields, at = parsed.card.fields, parsed.at
    faults = [Remark(parsed.head.stop, f"'{key}' is missing") for key in _REQUIRED if not fields.get(key)]

    def expect(key: str, fits: bool, expected: str) -> None:
        if fields.get(key) and not fits:
            faults.append(Remark(at[key], f"'{key}' must be {expected}; got {quoted(fields[key], 60)}"))

    get = fields.get
    expect("module-type", get("module-type", "").split("-")[0] in _MODULE_TYPES,
           f"of {', '.join(_MODULE_TYPES)}, and what follows a '-'")  # fmt: skip
    expect("fine-tunable", get("fine-tunable") in ("True", "False"), "True or False")
    expect("used-for", all(use.lower() in _USES for use in get("used-for", "").split("/")), f"of {', '.join(_USES)}")
    expect("train-dataset", all(name in _DATASETS for name in get("train-dataset", "").split("_")),
           f"of {', '.join(_DATASETS)}")  # fmt: skip
    expect("accuracy", re.fullmatch(r"\d+(\.\d+)?", get("accuracy", "")) is not None, "a number")
    expect("repo-link", _REPO_LINK.fullmatch(get("repo-link", "")) is not None,
           "https://HOST.com/OWNER/REPOSITORY/tree/REF/PATH")  # fmt: skip
    expect("update-time", _is_date(get("update-time", "")), "a date, YYYY-MM-DD")
    expect("input-shape", _SHAPE.fullmatch(get("input-shape", "")) is not None, "like [32, 32, 3]")
    for key, value in fields.items():
        if ":" in value and key not in _COLON_ALLOWED:
            faults.append(Remark(at[key], f"'{key}' must not hold a ':'; got {quoted(value, 60)}"))
        elif _YAML_SPECIAL.search(value) and key != "input-shape":
            faults.append(Remark(at[key], f"'{key}' would be read as something else by YAML: {quoted(value, 60)}"))
        if not re.fullmatch(r"[A-Za-z][\w-]*", key):
            faults.append(Remark(at[key], f"a key is of letters, digits and '-'; got {quoted(key, 60)}"))
    for line, asset in zip(parsed.assets_at, parsed.card.assets, strict=True):
        if asset.file_format and asset.file_format not in _FORMATS:
            faults.append(
                Remark(line, f"file-format must be of {', '.join(_FORMATS)}; got {quoted(asset.file_format, 60)}")
            )
        if asset.link and not re.fullmatch(r"https?://[^\s<>]+", asset.link):
            faults.append(Remark(line, f"asset-link must be a web address; got {quoted(asset.link, 60)}"))
    return faults


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        return False
    return True


def _text_faults(parsed: _Parsed) -> list[Remark]:
    faults = []
    fence = ""
    for number, line in enumerate(parsed.lines, 1):
        if number > parsed.head.stop and line.startswith("---"):
            faults.append(Remark(number, "a third line that starts with '---'"))
        opened = re.match(r" {0,3}(```+|~~~+)", line)
        if opened and (not fence or opened[1].startswith(fence)):
            fence = "" if fence else opened[1]
        elif not fence and re.match(r" {0,3}#{1,6}\s.*:[\s#]*$", line):
            faults.append(Remark(number, "a heading must not end in ':'"))
    return faults
