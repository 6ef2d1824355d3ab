"""Networks whose nodes are named like what the backends keep beside them; each must give the reference's results."""

from __future__ import annotations

from dataclasses import replace

from hostile.mutate import networks
from manidp.graph import Graph, Node

OURS = (
    # torch's modules and our own network
    "forward", "graph", "training", "momentum", "weight", "bias", "parameters", "weights", "load", "state_dict",
    "_parameters", "_buffers", "_modules", "__class__", "__dict__", "T_destination", "named_parameters.0", "to",
    # MindSpore's cells
    "construct", "steps", "sources", "gates", "thresholds", "cls_name", "_params_list", "phase", "name", "0.weight",
    # what is made of other names: values, parameters and parts of gates
    "image", "logits", "x:out", "x:mean", "x.mean", "x.pooled", "g.hidden", "g.saliency", "g.zero", "g list", "g mean",
    "x average", "x.a.b.c", "x.a", "x", "x.", ".x", "..", "a.b", "a.b.", "network/x", "average/x", "momentum/x",
    # texts of formats
    "%1", "@main", '"', "'", "\\", "<b>", "{0}", "%s", "__metadata__", "ä", "名", "a\u0301", "a b",
)  # fmt: skip


def renamed(graph: Graph, names: tuple[str, ...]) -> Graph:
    """The same network with these names, as many as it has nodes."""
    to = dict(zip((node.name for node in graph.nodes), names, strict=True))
    nodes: list[Node] = [
        replace(node, name=to[node.name], inputs=tuple(to[source] for source in node.inputs)) for node in graph.nodes
    ]
    return Graph(tuple(nodes), to[graph.output])


def like_ours() -> list[Graph]:
    """The small networks of the mutants, with all names of the list in turn."""
    made = []
    for graph in networks():
        count = len(graph.nodes)
        for start in range(0, len(OURS), count):
            names = OURS[start : start + count]
            rest = tuple(f"rest {i}" for i in range(count - len(names)))
            made.append(renamed(graph, names + rest))
    return made
