"""The few kinds of error this library raises on purpose; every one is a ``ManiDPError``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence


def quoted(text: str, most: int = 200) -> str:
    """Text from outside as a message can hold it: in quotes, escaped, cut after ``most`` characters."""
    shown = repr(text[:most])
    if len(text) <= most and len(shown) <= most + 2:
        return shown
    return f"{shown[: most + 1]}{shown[0]}... ({len(text):,} characters)"


def short(text: str, most: int = 100) -> str:
    """A name from outside as a message can hold it: as it is if that is short and printable, else ``quoted``."""
    return text if text.isprintable() and len(text) <= most else quoted(text, most)


def some(names: Iterable[str], count: int = 4) -> str:
    """The first few of many names, for a message: "a, b, c, d, ... (9 in all)"."""
    names = list(names)
    return ", ".join(map(short, names[:count])) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def listed(names: Iterable[str]) -> str:
    """The first dozen of many names that may hold anything, each quoted."""
    return some((quoted(name, 60) for name in names), 12)


def shown(path: str | os.PathLike[str]) -> str:
    """The path as text for a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def reason(error: Exception) -> str:
    """What an error says of itself, on one line."""
    said = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(said.split())


class ManiDPError(Exception):
    """Something given to the library is wrong; the message says what was expected, what came and what to do.

    A message is one line of printable characters: whatever else is put into it is escaped, such as ``\\n``.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(printable))


class GraphError(ManiDPError):
    """A network description that cannot be: the message names the nodes."""


class CheckpointError(ManiDPError):
    """A checkpoint file that is broken, hostile, from the future, or does not fit its graph."""


class CkptError(ManiDPError):
    """A MindSpore .ckpt that cannot be read or written, or that does not hold what its network needs."""


class CardError(ManiDPError):
    """A model card that cannot be read, or that the hub would refuse; the message names the line."""


class HubError(ManiDPError):
    """A model that cannot be found, downloaded or trusted: a bad name, host, digest, or a transfer that failed."""


class ImageError(ManiDPError):
    """A picture, folder or data set that cannot be read."""


class ScoreError(ManiDPError):
    """A source that cannot be scored, or a folder of results that belongs to another run."""


class UnsupportedError(ManiDPError):
    """A backend met a node it cannot run; the message names the node."""


class FrontendError(ManiDPError):
    """A module of another library that cannot become a graph.

    refused: where ops stand in the way, a line for each: module, source line, op, reason; the message holds them all.
    """

    def __init__(self, message: str, refused: Sequence[str] = ()) -> None:
        super().__init__("; ".join((message, *refused)))
        self.refused = tuple(refused)


class TrainingError(ManiDPError):
    """Training cannot start or continue (loss not finite, recipe that does not fit, ...)."""


class MissingExtraError(ManiDPError):
    """An optional dependency is needed; the message holds the pip command that brings it."""
