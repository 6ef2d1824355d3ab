"""Dynamic channel pruning: a CNN that decides for each image which of its channels to compute.

    engine = manidp.load("manidp-res20")
    result = engine.run(images)  # images: uint8 (B, 32, 32, 3); result: logits, kept, macs of each image

Importing this package loads no framework; ``manidp.torch`` trains, ``manidp.mindspore`` serves MindSpore users.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, overload

from manidp.moved import keep_old_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from manidp.data.preprocessing import Preprocessing
    from manidp.engine.engine import Engine
    from manidp.formats.checkpoint import Checkpoint
    from manidp.gating.place import Gated
    from manidp.graph import Graph

__version__ = "0.1.0"

keep_old_paths()


def load(name: str | Path, *, precision: str = "float32", threads: int = 1, isa: str | None = None) -> Engine:
    """A network ready to run; options are those of ``Engine``.

    ``name``: a bundled model ("manidp-res20"), a checkpoint file, a folder that holds model.safetensors, or the name
    of a card on the hub ("noah-cvlab/gpu/1.1/manidp_v1.0_cifar10"), whose file is downloaded and verified. Raises
    CheckpointError if there is no such model or its file is broken, HubError if the file of a card is not available.
    """
    from manidp.engine.engine import Engine

    return Engine(load_model(name), precision=precision, threads=threads, isa=isa)


def load_model(name: str | Path) -> Checkpoint:
    """The checkpoint that ``load`` runs."""
    from manidp.hub.find import find_model

    return find_model(name).checkpoint


def from_torch(
    module: nn.Module,
    example: Tensor,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """A torch CNN as a checkpoint, compared with the module in float64 before it is returned.

    See ``manidp.torch.frontend.from_torch``. Needs the extra "torch".
    """
    from manidp.torch.frontend import from_torch

    return from_torch(module, example, preprocessing=preprocessing, classes=classes)


def from_onnx(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
) -> Checkpoint:
    """The network of an ONNX file as a checkpoint, compared with ONNX Runtime before it is returned.

    See ``manidp.torch.onnx.from_onnx``. Needs the extras "torch" and "onnx".
    """
    from manidp.torch.onnx import from_onnx

    return from_onnx(path, size=size, preprocessing=preprocessing, classes=classes)


@overload
def gate(network: Checkpoint, *, seed: int = 0) -> Gated[Checkpoint]: ...
@overload
def gate(network: Graph, *, seed: int = 0) -> Gated[Graph]: ...
def gate(network: Checkpoint | Graph, *, seed: int = 0) -> Gated[Checkpoint] | Gated[Graph]:
    """The network with gates wherever skipping is exact and a gate pays: ``.network``, ``.gates`` and ``.ungated``.

    A checkpoint's new gates are open (``seed``: their hidden layers), so its logits are the same to the last bit until
    they are trained; what was measured of it, and other operating points, are left off. ``.ungated`` says of every
    convolution without a gate why. See ``manidp.gating.place.gate``.
    """
    from dataclasses import replace

    from manidp.gating import place
    from manidp.gating.manidp import fresh_gates
    from manidp.graph import Graph

    if isinstance(network, Graph):
        return place.gate(network)
    gated = place.gate(network.graph)
    told = {name: value for name, value in network.provenance.items() if name != "measured"}
    weights = fresh_gates(gated.network, seed) | dict(network.weights)
    checkpoint = replace(network, graph=gated.network, weights=weights, points=(), provenance=told)
    return place.Gated(checkpoint, gated.gates, gated.ungated)
