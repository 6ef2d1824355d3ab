"""The bundle for MindSpore users: what the MindSpore hub's own client loads, for people who do not have manidp.

``pack`` writes into one folder, for a model called NAME (``-`` becomes ``_`` in names of files)::

    NAME.md                         the card
    NAME.ckpt                       the weights, under the names of the original's network
    NAME/mindspore_hub_conf.py      the client's entry point: create_network("NAME")
    NAME/manidp_network_DIGEST.py   the network, which needs MindSpore and NumPy only
    NAME/network.json               the graph it walks
    NAME/thresholds.npy             of the gates, which a .ckpt does not hold

The client finds all of them beside the card (``source="local"``, or below its cache in ``PUBLISHER/VERSION/``).
Packing needs no MindSpore.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from manidp.errors import HubError, quoted
from manidp.files import filling
from manidp.formats.checkpoint import Checkpoint
from manidp.formats.ckpt import write_ckpt
from manidp.formats.conversion import to_ckpt, write_thresholds
from manidp.graph import Graph, Select
from manidp.hub.card import Asset, ModelCard, write_card
from manidp.hub.publish import measured, sections

NETWORK = Path(__file__).parents[1] / "mindspore" / "network.py"
HOME = "https://example.com/manidp/manidp/tree/main"
"""Where a bundle is said to be until its publisher says better; no file is there."""
_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")


def description(graph: Graph) -> dict[str, Any]:
    """A graph with everything spelled out, as JSON data, for a reader without manidp; see ``mindspore/network.py``.

    Raises GraphError for a gate that scales nothing.
    """
    nodes = [
        {"op": type(node).__name__, **asdict(node), "shape": graph.shapes[node.name],
         "parameters": node.parameters(*graph.input_shapes(node))}
        | ({"scales": graph.gated_value(node)} if isinstance(node, Select) else {})
        for node in graph.nodes
    ]  # fmt: skip
    return {"nodes": nodes, "output": graph.output}


def pack(checkpoint: Checkpoint, folder: str | Path, name: str, *, home: str = HOME) -> Path:
    """Write the bundle of a model as ``folder``, which must be new or empty, whole or not at all; returns the card.

    name: of letters, digits, '-' and '_', all small, such as manidp-res20. home: the page below which the bundle will
    be published, https://HOST.com/OWNER/REPOSITORY/tree/REF; the hub's client asks for its links when it is online.
    The same checkpoint makes the same files, the day on the card apart. Raises HubError, CardError.
    """
    stem = name.replace("-", "_")
    if not _NAME.fullmatch(name) or stem.endswith("cn"):
        raise HubError("a model's name is of small letters and digits, joined by '-' or '_', and does not end in 'cn'; "
                       f"got {quoted(name)}")  # fmt: skip
    folder = Path(folder)
    try:
        with filling(folder) as temporary:
            (temporary / stem).mkdir()
            _write(checkpoint, temporary, name, stem, home)
    except OSError as error:
        reason = f"{error.strerror or error}; a new folder or an empty one is needed"
        raise HubError(f"cannot write the bundle to {quoted(str(folder))}: {reason}") from error
    return folder / f"{stem}.md"


def _write(checkpoint: Checkpoint, folder: Path, name: str, stem: str, home: str) -> None:
    source = NETWORK.read_bytes()
    module = f"manidp_network_{hashlib.sha256(source).hexdigest()[:12]}"  # the client lets one module serve all bundles
    (folder / stem / f"{module}.py").write_bytes(source)
    (folder / stem / "mindspore_hub_conf.py").write_text(_CONF.format(name=name, module=module), "utf-8")
    text = json.dumps(description(checkpoint.graph), separators=(",", ":"))
    (folder / stem / "network.json").write_text(text, "utf-8")
    values, thresholds = to_ckpt(checkpoint)
    write_thresholds(thresholds, folder / stem / "thresholds.npy")
    weights = folder / f"{stem}.ckpt"
    write_ckpt(values, weights)
    asset = Asset("ckpt", f"{home}/{weights.name}", hashlib.sha256(weights.read_bytes()).hexdigest())
    card = hub_card(
        checkpoint, name, repository=f"{home}/{stem}", asset=asset, date=datetime.date.today().isoformat(),
        use=_mindspore_use(checkpoint, stem),
    )  # fmt: skip
    write_card(card, folder / f"{stem}.md")


_CONF = '''\
"""Entry point of the MindSpore hub's client for {name}. Needs MindSpore and NumPy."""

import json
from pathlib import Path

import numpy as np
from {module} import Network

FOLDER = Path(__file__).parent


def create_network(name):
    """{name}, without its weights: they are in the .ckpt."""
    if name != "{name}":
        raise NotImplementedError(f"this folder holds {name}; {{name}} was asked for")
    return Network(json.loads((FOLDER / "network.json").read_text()), np.load(FOLDER / "thresholds.npy"))
'''

_USE = """\
```python
import mindspore_hub
import numpy as np
from mindspore import Tensor

network = mindspore_hub.load("{stem}.md", source="local")
network.set_train(False)

# images: uint8 (B, {height}, {width}, 3), RGB
mean, std = np.array({mean}), np.array({std})
logits = network(Tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)))
```

The order of the logits is that of the classes above. The network runs in PYNATIVE and in GRAPH mode, and it trains.
MindSpore 2.10 needs NumPy below 2; on CPUs with AVX-512 its convolutions are much faster with
`ONEDNN_MAX_CPU_ISA=AVX2` in the environment.{gated}"""
_GATED_USE = """

Here all channels are computed and multiplied by the factors of the gates, exactly 0 for what this image does not need:
the results are exact, nothing is skipped. `network.records(x)` gives the logits and, for each of {gates} gates, its
saliencies, its factors and the pooled feature, of which the losses of the method are made."""


def hub_card(
    checkpoint: Checkpoint, name: str, *, repository: str, asset: Asset, date: str, use: Iterable[str]
) -> ModelCard:
    """The card of a model for the MindSpore hub; what it says is read from the checkpoint.

    repository: the page of its code; date: YYYY-MM-DD; use: the lines of its section on use.
    """
    height, width = checkpoint.preprocessing.size
    fields = {
        "model-name": name, "backbone-name": name, "module-type": "cv-classification", "fine-tunable": "True",
        "input-shape": f"[{height}, {width}, 3]", "model-version": "1.0", "author": "manidp", "user-id": "manidp",
        "update-time": date, "repo-link": repository, "used-for": "inference",
        "train-backend": "cpu", "infer-backend": "cpu/gpu/ascend", "mindspore-version": "2.10.0",
        "license": "Apache2.0", "summary": "image classification" + (
            " that computes, image by image, only the channels that are needed (ManiDP)"
            if checkpoint.graph.gates else ""
        ),
    }  # fmt: skip
    figures = measured(checkpoint)
    if figures is not None:
        fields["accuracy"] = f"{figures.accuracy:.4f}"
    match checkpoint.provenance.get("data"):
        case {"name": str(trained_on)} if trained_on.startswith("CIFAR-10 "):
            fields["train-dataset"] = "cifar10"
    return ModelCard(name, fields, (asset,), "\n".join(sections(checkpoint, use)))


def _mindspore_use(checkpoint: Checkpoint, stem: str) -> list[str]:
    preprocessing, gates = checkpoint.preprocessing, len(checkpoint.graph.gates)
    height, width = preprocessing.size
    return _USE.format(
        stem=stem, height=height, width=width, mean=list(preprocessing.mean), std=list(preprocessing.std),
        gated=_GATED_USE.format(gates=gates) if gates else "",
    ).split("\n")  # fmt: skip
