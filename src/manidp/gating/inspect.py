"""What gates could do for a network, layer by layer, as plain data."""

from __future__ import annotations

from typing import Any

from manidp.gating.place import gate
from manidp.graph import Graph
from manidp.graph.macs import gate_macs, layers, node_macs


def inspected(graph: Graph) -> dict[str, Any]:
    """Layers in order, with shapes of their values and multiply-adds of one image, and what ``gate`` says of them.

    ``gate``: the gate that would close a layer's channels; ``why_not``: why a convolution would have none.
    """
    gated = gate(graph)
    macs = node_macs(graph)
    gate_of = {conv: name for name, convs in gated.gates.items() for conv in convs}
    why_not = dict(gated.ungated)
    return {
        "input": list(graph.input.dims),
        "classes": graph.num_classes,
        "macs": sum(macs.values()),
        "gates": len(gated.gates),
        "macs_of_gates": gate_macs(gated.network),
        "macs_that_gates_govern": sum(macs[conv] for conv in gate_of),
        "layers": [
            layer | {"gate": gate_of.get(layer["name"]), "why_not": why_not.get(layer["name"])}
            for layer in layers(graph)
        ],
    }
