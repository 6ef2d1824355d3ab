"""Between checkpoints and torch networks."""

from __future__ import annotations

from collections.abc import Sequence

from manidp.errors import CheckpointError
from manidp.formats.checkpoint import Checkpoint
from manidp.graph import Graph, Linear
from manidp.torch.network import Network


def network_from(checkpoint: Checkpoint) -> Network:
    """The checkpoint's network with its weights and thresholds, in evaluation mode."""
    network = Network(checkpoint.graph)
    network.load(checkpoint.weights)
    return network.eval()


def network_inheriting(
    graph: Graph, checkpoint: Checkpoint, *, classes: Sequence[str] | None = None, seed: int = 0
) -> Network:
    """A network of another graph that starts from a checkpoint's weights.

    Fresh may be: the parameters of gates that the checkpoint lacks (they start as the identity) and of the classifier,
    if it tells other ``classes`` (default: the checkpoint's) or another number of them. All else must be there under
    the same name and in the same shape, and nothing of the checkpoint may be left over: CheckpointError names what does
    not fit.
    """
    network = Network(graph, seed=seed)
    weights = network.weights()
    given = checkpoint.weights
    same = graph.num_classes == len(checkpoint.classes) and tuple(classes or checkpoint.classes) == checkpoint.classes
    fresh = {
        f"{node.name}.{name}"
        for node in graph.nodes
        if (node.name in graph.deciding and node.name not in checkpoint.graph.by_name)
        or (isinstance(node, Linear) and node.name == graph.output and not same)
        for name in node.parameters(*graph.input_shapes(node))
    }
    needed = weights.keys() - fresh
    wrong = [name for name in sorted(needed) if name not in given or given[name].shape != weights[name].shape]
    wrong += sorted(given.keys() - weights.keys())
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the network; missing, left over or of another shape: "
            f"{', '.join(wrong[:5])} ({len(wrong)} in all)"
        )
    network.load({name: given[name] if name in needed else weights[name] for name in weights})
    return network
