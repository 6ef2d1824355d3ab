"""The command that looks at a user's own network."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from manidp.cli.options import Json, UserNetwork, dims, refusals
from manidp.terminal import say, say_json, show


def inspect(
    network: UserNetwork,
    size: Annotated[str, typer.Option("--input", help="What the module reads: channels x height x width.")],
    as_json: Json = False,
) -> None:
    """Show a torch network of your own: layers, multiply-adds, and where gates would go or why not.

    The network is imported, and compared with the module in float64. Ops that cannot be imported are listed, all of
    them.
    """
    from manidp.gating.inspect import inspected

    shape = dims(size)
    with refusals():
        from manidp.torch.frontend import from_torch, random_images
        from manidp.torch.userfile import module_of

        if network.lower().endswith(".onnx"):
            from manidp.torch.onnx import from_onnx

            checkpoint = from_onnx(network, size=shape[1:])
        else:
            checkpoint = from_torch(module_of(network), random_images(*shape))
    facts = inspected(checkpoint.graph)
    if as_json:
        say_json(facts, indent=2)
    else:
        _table(network, facts)


def _table(network: str, facts: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    table.add_column("shape")
    table.add_column("M MACs", justify="right")
    table.add_column("gate, or why not", overflow="fold")
    for layer in facts["layers"]:
        if layer["macs"]:
            told = layer["gate"] or (f"none: {layer['why_not']}" if layer["why_not"] else "")
            shape = "x".join(map(str, layer["shape"]))
            table.add_row(layer["name"], layer["op"], shape, f"{layer['macs'] / 1e6:.3f}", told)
    show(table)
    whole = max(facts["macs"], 1)
    say(
        f"{network}: {whole / 1e6:.2f} million multiply-adds for an image; {facts['gates']} gates could close channels "
        f"of layers with {facts['macs_that_gates_govern'] / whole:.0%} of them, and would take "
        f"{facts['macs_of_gates'] / whole:.1%}"
    )
