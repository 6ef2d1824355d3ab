"""What is said of a model when it is published, and the folder that can be uploaded to a model hub as it is.

Every figure is read from the checkpoint: its graph, or its provenance. What is not on record is not said. The folder
holds ``model.safetensors`` and its card, ``README.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manidp.errors import HubError, quoted
from manidp.files import filling, replacing
from manidp.formats.checkpoint import Checkpoint, save_checkpoint
from manidp.graph.macs import ungated_macs
from manidp.terminal import escaped

_LONGEST_FACT = 2000  # characters
_MOST_MACS = 1e18  # and neither NaN nor infinity


@dataclass(frozen=True)
class Measured:
    """The figures on record: ``correct`` of ``total`` images of ``data``; multiply-adds an image.

    ``macs``: their mean; ``dense``: without gates; ``percentiles``: over the images.
    """

    data: str
    correct: int
    total: int
    macs: float
    dense: int
    percentiles: Mapping[int, float]

    @property
    def accuracy(self) -> float:
        """Share of the images that are right."""
        return self.correct / self.total


def measured(checkpoint: Checkpoint) -> Measured | None:
    """The figures in the provenance of a checkpoint; None if there are none, or none that can be."""
    dense = ungated_macs(checkpoint.graph)
    match checkpoint.provenance.get("measured"):
        case {"data": str(data), "correct": int(correct), "total": int(total), "mean_macs": float(macs),
              **more} if 0 <= correct <= total > 0 < dense and 0 <= macs < _MOST_MACS:  # fmt: skip
            given = more.get("macs_percentiles")
            percentiles = {
                int(q): float(value)
                for q, value in (given.items() if isinstance(given, Mapping) else ())
                if re.fullmatch("[0-9]{1,3}", q) and isinstance(value, (int, float)) and 0 <= value < _MOST_MACS
            }
            return Measured(data, correct, total, macs, dense, dict(sorted(percentiles.items())))
    return None


def write_folder(checkpoint: Checkpoint, folder: str | Path, name: str) -> None:
    """Write the model and its card into ``folder``, which must be new or empty, whole or not at all.

    ``manidp.load(folder)`` reads it back. Raises HubError if it cannot be written, or the name is not printable.
    """
    if not name.strip() or not name.isprintable():
        raise HubError(f"a card needs a name of printable characters; got {quoted(name)}")
    try:
        with filling(folder) as temporary:
            save_checkpoint(checkpoint, temporary / "model.safetensors")
            with replacing(temporary / "README.md") as file:
                file.write(card(checkpoint, name).encode("utf-8", "backslashreplace"))
    except OSError as error:
        reason = f"{error.strerror or error}; a new folder or an empty one is needed"
        raise HubError(f"cannot write the model to {quoted(str(folder))}: {reason}") from error


def card(checkpoint: Checkpoint, name: str) -> str:
    """The card, as markdown: what it is, how trained, what measured, what for, its limits."""
    use = python_use(checkpoint, name, "this folder")
    return "\n".join((*_head(checkpoint), "", f"# {name}", "", *sections(checkpoint, use), ""))


def _head(checkpoint: Checkpoint) -> Iterator[str]:
    yield "---"
    yield "library_name: manidp"
    yield "pipeline_tag: image-classification"
    yield "tags: [dynamic-pruning, channel-pruning, manidp]" if checkpoint.graph.gates else "tags: [manidp]"
    yield "---"


def sections(checkpoint: Checkpoint, use: Iterable[str]) -> Iterator[str]:
    """The lines of a card's text, in markdown; ``use``: those of its section on use."""
    graph = checkpoint.graph
    height, width = checkpoint.preprocessing.size
    yield from ("## What it is", "")
    yield f"An image classifier for {len(checkpoint.classes)} classes: {', '.join(map(_plain, checkpoint.classes))}."
    yield f"It reads {width} x {height} pixels, RGB; without gates an image takes {ungated_macs(graph):,}"
    yield "multiply-adds."
    if graph.gates:
        yield f"Its {len(graph.gates)} gates decide for every image which channels are computed (ManiDP, Tang et al.,"
        yield "CVPR 2021); the gates' own cost is counted in the figures below."
    yield from ("", "## Measured", "")
    yield from _figures(measured(checkpoint))
    yield from ("", "## How it was trained", "")
    yield from _trained(checkpoint.provenance)
    yield from ("", "## Use", "", *use)
    yield from ("", "## What for, and what not", "")
    yield "For research on dynamic pruning and as a start for fine-tuning. It knows only the classes above and gives"
    yield "one of them for any picture; its probabilities are not calibrated."
    if graph.gates:
        yield "How long an image takes depends on the image: who can measure the time learns something about it."


def python_use(checkpoint: Checkpoint, name: str, remark: str = "") -> Iterator[str]:
    """How to run it with manidp, for ``sections``."""
    height, width = checkpoint.preprocessing.size
    yield from ("```python", "import manidp", "")
    yield f'engine = manidp.load("{name}")' + (f"  # {remark}" if remark else "")
    yield f"result = engine.run(images)  # uint8 (B, {height}, {width}, 3), RGB"
    yield "```"


def _figures(measured: Measured | None) -> Iterator[str]:
    if measured is None:
        yield "Accuracy and multiply-adds are not on record."
        return
    right = f"{measured.correct:,} of {measured.total:,} right ({measured.accuracy:.2%})"
    fewer = 1 - measured.macs / measured.dense
    yield f"- {right} on {_plain(measured.data)}: every image, last epoch,"
    yield "  the thresholds in the file"
    yield f"- {measured.macs / 1e6:.3f} M multiply-adds an image on average ({fewer:.1%} fewer than without gates)"
    if measured.percentiles:
        spread = ", ".join(f"{q} %: {value / 1e6:.2f} M" for q, value in measured.percentiles.items())
        yield f"- over the images, percentiles of the multiply-adds: {spread}"


def _trained(provenance: Mapping[str, Any]) -> Iterator[str]:
    known = False
    titles = {"from": "started from", "teacher": "taught by"}
    for key in ("data", "from", "teacher", "training", "recipe", "made_with", "converted_from"):
        value = provenance.get(key)
        if value:
            known = True
            for one in value if isinstance(value, list) else [value]:
                facts = one.items() if isinstance(one, Mapping) else [("", one)]
                yield f"- {titles.get(key, key.replace('_', ' '))}: " + ", ".join(
                    f"{_plain(name)} {_plain(fact)}".strip() for name, fact in facts if fact is not None
                )
    if not known:
        yield "Not on record."


def _plain(fact: object) -> str:
    """A fact on one line, which makes no line of the card's own and nothing that a terminal would obey."""
    text = fact if isinstance(fact, str) else json.dumps(fact)
    return escaped(" ".join(text[:_LONGEST_FACT].split()))
