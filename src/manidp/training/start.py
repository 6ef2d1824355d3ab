"""Where a training begins: a model's weights under the names of a graph, and fresh ones for what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

from manidp.data.labelled import Labelled
from manidp.data.preprocessing import Preprocessing
from manidp.errors import CheckpointError, TrainingError, some
from manidp.formats.checkpoint import Checkpoint
from manidp.gating.place import gate
from manidp.graph import Graph, Linear, with_classes
from manidp.training.backend import Backend


def graph_for(network: Graph, classes: Sequence[str], *, gates: bool) -> Graph:
    """The network with an output for each of the classes and, with ``gates``, with gates if it has none.

    Raises TrainingError, saying why for each convolution, if no gate has a place in it.
    """
    graph = with_classes(network, len(classes))
    if not gates or graph.gates:
        return graph
    gated = gate(graph)
    if not gated.gates:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in gated.ungated[:4])
        more = f"; {len(gated.ungated) - 4} more" if len(gated.ungated) > 4 else ""
        raise TrainingError(f"no gate has a place in this network: {reasons or 'it has no convolutions'}{more}")
    return gated.network


def start_of(
    backend: Backend,
    graph: Graph,
    parent: Checkpoint | None,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    seed: int,
) -> Checkpoint:
    """The model that a training begins with: fresh, or as far as it can be with the weights of ``parent``."""
    fresh = Checkpoint(graph, backend.fresh(graph, seed), preprocessing, tuple(classes))
    return fresh if parent is None else inheriting(fresh, parent)


def inheriting(fresh: Checkpoint, parent: Checkpoint) -> Checkpoint:
    """A fresh network with the weights of another model.

    Fresh stay the parameters of gates that the model lacks (they start as the identity) and of the classifier, if it
    tells other classes. All else must be there under the same name and in the same shape, and nothing of the model may
    be left over: CheckpointError names what does not fit.
    """
    graph, weights, given = fresh.graph, fresh.weights, parent.weights
    own = {
        f"{node.name}.{name}"
        for node in graph.nodes
        if (node.name in graph.deciding and node.name not in parent.graph.by_name)
        or (isinstance(node, Linear) and node.name == graph.output and fresh.classes != parent.classes)
        for name in node.parameters(*graph.input_shapes(node))
    }
    needed = weights.keys() - own
    wrong = [name for name in sorted(needed) if name not in given or given[name].shape != weights[name].shape]
    wrong += sorted(given.keys() - weights.keys())
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the network; missing, left over or of another shape: {some(wrong)}"
        )
    mixed = {name: given[name] if name in needed else value for name, value in weights.items()}
    return Checkpoint(graph, mixed, fresh.preprocessing, fresh.classes)


def in_order_of(parent: Checkpoint, data: Labelled) -> Labelled:
    """The data in the order of the parent's classes where they are the same, so that its classifier can stay."""
    same = sorted(parent.classes) == sorted(data.classes)
    return data.relabelled(parent.classes, "the model") if same else data
