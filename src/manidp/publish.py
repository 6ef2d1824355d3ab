"""A model as a folder that can be uploaded to a model hub as it is: ``model.safetensors`` and its card, ``README.md``.

Every figure on the card is read from the checkpoint: its graph, or its provenance. What is not on record is not said.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from manidp.checkpoint import Checkpoint, save_checkpoint
from manidp.errors import HubError
from manidp.files import replacing
from manidp.macs import ungated_macs


def write_folder(checkpoint: Checkpoint, folder: str | Path, name: str) -> None:
    """Write the model and its card into ``folder``, which must be new or empty, whole or not at all.

    ``manidp.load(folder)`` reads it back. Raises HubError if it cannot be written.
    """
    folder = Path(folder)
    temporary = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        try:
            save_checkpoint(checkpoint, temporary / "model.safetensors")
            with replacing(temporary / "README.md") as file:
                file.write(card(checkpoint, name).encode())
            os.replace(temporary, folder)  # takes the place of an empty folder, of no other
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = f"{error.strerror or error}; a new folder or an empty one is needed"
        raise HubError(f"cannot write the model to '{folder}': {reason}") from error


def card(checkpoint: Checkpoint, name: str) -> str:
    """The card, as markdown: what it is, how trained, what measured, what for, its limits."""
    return "\n".join((*_head(checkpoint), "", f"# {name}", "", *_body(checkpoint, name), ""))


def _head(checkpoint: Checkpoint) -> Iterator[str]:
    yield "---"
    yield "library_name: manidp"
    yield "pipeline_tag: image-classification"
    yield "tags: [dynamic-pruning, channel-pruning, manidp]" if checkpoint.graph.gates else "tags: [manidp]"
    yield "---"


def _body(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    graph, provenance = checkpoint.graph, checkpoint.provenance
    dense = ungated_macs(graph)
    height, width = checkpoint.preprocessing.size
    yield f"An image classifier for {len(checkpoint.classes)} classes: {', '.join(checkpoint.classes)}."
    yield f"It reads {width} x {height} pixels, RGB; without gates it takes {dense:,} multiply-adds an image."
    if graph.gates:
        yield f"Its {len(graph.gates)} gates decide for every image which channels are computed (ManiDP, Tang et al.,"
        yield "CVPR 2021); the gates' own cost is counted in the figures below."
    yield from ("", "## Measured", "")
    yield from _measured(provenance.get("measured"), dense)
    yield from ("", "## How it was trained", "")
    yield from _trained(provenance)
    yield from ("", "## Use", "", "```python", "import manidp", "")
    yield f'engine = manidp.load("{name}")  # this folder'
    yield f"result = engine.run(images)  # uint8 (B, {height}, {width}, 3), RGB"
    yield from ("```", "", "## What for, and what not", "")
    yield "For research on dynamic pruning and as a start for fine-tuning. It knows only the classes above and gives"
    yield "one of them for any picture; its probabilities are not calibrated."
    if graph.gates:
        yield "How long an image takes depends on the image: who can measure the time learns something about it."


def _measured(measured: object, dense: int) -> Iterator[str]:
    if not isinstance(measured, Mapping):
        yield "Accuracy and multiply-adds are not on record."
        return
    correct, total, macs = measured["correct"], measured["total"], measured["mean_macs"]
    yield f"- {correct:,} of {total:,} right ({correct / total:.2%}) on {measured['data']}: every image, last epoch,"
    yield "  the thresholds in the file"
    yield f"- {macs / 1e6:.3f} M multiply-adds an image on average ({1 - macs / dense:.1%} fewer than without gates)"
    percentiles = measured.get("macs_percentiles")
    if isinstance(percentiles, Mapping):
        spread = ", ".join(f"{q} %: {value / 1e6:.2f} M" for q, value in percentiles.items())
        yield f"- over the images, percentiles of the multiply-adds: {spread}"


def _trained(provenance: Mapping[str, Any]) -> Iterator[str]:
    known = False
    titles = {"from": "started from", "teacher": "taught by"}
    for key in ("data", "from", "teacher", "training", "recipe", "made_with", "converted_from"):
        value = provenance.get(key)
        if value:
            known = True
            facts = value.items() if isinstance(value, Mapping) else [("", value)]
            yield f"- {titles.get(key, key.replace('_', ' '))}: " + ", ".join(
                f"{name} {_plain(fact)}".strip() for name, fact in facts if fact is not None
            )
    if not known:
        yield "Not on record."


def _plain(fact: object) -> str:
    return fact if isinstance(fact, str) else json.dumps(fact)
