"""The hub's commands: list, show, pull, add, verify, pack."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manidp.cli.options import Json, Model, Sources, help_alone
from manidp.errors import ManiDPError
from manidp.terminal import complain, progress, say, say_json, show, show_markdown, steps

app = typer.Typer(
    help="Models by name: search the catalogue; download, verify and publish files.",
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
)

MOST_LISTED, MOST_IN_A_CELL = 2000, 200  # cards and characters: laying out a table takes long


@app.command("list")
def hub_list(
    words: Annotated[list[str] | None, typer.Argument(help="Only cards that contain all these words.")] = None,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """List the cards of the catalogue."""
    from rich.box import SIMPLE
    from rich.table import Table

    from manidp.hub.hub import open_hub

    found = list(open_hub(source or ()).cards(words or ()))
    if as_json:
        say_json([{**one.card.fields, "uid": str(one.uid), "source": one.source} for one in found], indent=2)
        return
    table = Table(box=SIMPLE)
    for heading in ("uid", "model", "data set", "MindSpore"):
        table.add_column(heading, overflow="fold")
    for one in found[:MOST_LISTED]:
        fields = one.card.fields
        keys = ("model-name", "train-dataset", "mindspore-version")
        table.add_row(str(one.uid), *(fields.get(key, "")[:MOST_IN_A_CELL] for key in keys))
    show(table)
    if len(found) > MOST_LISTED:
        complain(f"{len(found) - MOST_LISTED:,} more cards are not listed; give words to search for, or --json")


@app.command("show")
def hub_show(
    uid: Annotated[str, typer.Argument(help="Name of a card, such as noah-cvlab/gpu/1.1/manidp_v1.0_cifar10.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Show a card: its fields, files and text, and what is wrong with it."""
    from manidp.hub.hub import open_hub, parse_uid

    listed = open_hub(source or ()).card(parse_uid(uid))
    card = listed.card
    if as_json:
        shown = {"uid": str(listed.uid), "source": listed.source, "title": card.title, "fields": dict(card.fields),
                 "assets": [asdict(asset) for asset in card.assets], "body": card.body,
                 "remarks": [str(remark) for remark in card.remarks]}  # fmt: skip
        say_json(shown, indent=2)
        return
    facts = [f"- **{key}**: {value}" for key, value in card.fields.items()]
    for asset in card.assets:
        weak = "" if asset.verifiable else " (weak: what comes cannot be verified)"
        facts.append(f"- **{asset.file_format}**: {asset.link} sha256 {asset.sha256}{weak}")
    show_markdown(f"# {card.title}\n\n" + "\n".join(facts) + f"\n\n{card.body}")
    for remark in card.remarks[:10]:
        complain(f"{listed.uid}, {remark}")
    if len(card.remarks) > 10:
        complain(f"{listed.uid}: {len(card.remarks) - 10:,} more remarks; --json has all")


@app.command("pull")
def hub_pull(
    uid: Annotated[str, typer.Argument(help="Name of a card.")], source: Sources = None, as_json: Json = False
) -> None:
    """Download the file of a card into the cache and verify it; if it is there, only verify it."""
    from manidp.hub.hub import open_hub

    hub = open_hub(source or ())
    decision = hub.resolve(uid)
    with progress() as bars:
        path = hub.fetch(decision, steps(bars, decision.filename))
    shown = {"uid": str(decision.uid), "file": str(path), "sha256": decision.asset.sha256}
    say_json(shown) if as_json else say(f"{path}: {decision.filename}, sha256 verified")


@app.command("add")
def hub_add(
    file: Annotated[Path, typer.Argument(help="A file whose sha256 is on a card of the catalogue.")],
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Add a file that you copied by hand to the cache."""
    from manidp.hub.hub import open_hub

    added = open_hub(source or ()).add(file)
    uids = [str(uid) for uid in added.uids]
    shown = {"file": str(added.path), "uids": uids}
    say_json(shown) if as_json else say(f"{added.path}: {file.name}, the file of {', '.join(uids)}")


@app.command("verify")
def hub_verify(
    remove: Annotated[bool, typer.Option("--remove", help="Delete damaged files.")] = False,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Check the digests of the bundled models and of all files in the cache; exit code 1 if one is damaged."""
    from manidp.hub.hub import open_hub

    found = list(open_hub(source or ()).verify(remove=remove))
    if as_json:
        say_json([{"file": str(one.path), "bytes": one.size, "intact": one.intact,
                   "uids": [str(uid) for uid in one.uids]} for one in found], indent=2)  # fmt: skip
    else:
        for one in found:
            state = "intact" if one.intact else "DAMAGED" if one.path.exists() else "damaged, deleted"
            name = one.path.name if one.path.suffix else f"{one.path.name[:16]}..."
            say(f"{name:24}  {one.size:>12,} bytes  {state}  {', '.join(map(str, one.uids))}")
        say(f"{sum(one.intact for one in found)} of {len(found)} files intact")
    if not all(one.intact for one in found):
        raise typer.Exit(1)


@app.command("pack")
def hub_pack(
    model: Model = "manidp-res20",
    mindspore: Annotated[
        Path | None, typer.Option(help="New folder: a bundle that MindSpore's own hub client loads.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="New folder: model.safetensors and its card, ready to upload.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model on its card. Default: that of the file.")] = None,
    home: Annotated[
        str | None, typer.Option(help="With --mindspore: the page where it will be published, https://.../tree/REF.")
    ] = None,
) -> None:
    """Write the files to publish a model with: for MindSpore's hub, for other hubs, or for both."""
    from manidp.hub.bundle import HOME, pack
    from manidp.hub.find import find_model
    from manidp.hub.publish import write_folder

    if mindspore is None and folder is None:
        raise typer.BadParameter("give --mindspore FOLDER, --folder FOLDER or both")
    if mindspore and folder and os.path.realpath(mindspore) == os.path.realpath(folder):
        raise ManiDPError(f"{folder}: would be written twice; give another name")
    found = find_model(model)
    called = name if name is not None else found.name.rpartition("/")[2]
    if mindspore is not None:
        card = pack(found.checkpoint, mindspore, called, home=home or HOME)
        say(f'{card}: load it with mindspore_hub.load("{card}", source="local")')
    if folder is not None:
        write_folder(found.checkpoint, folder, called)
        say(f'{folder}: load it with manidp.load("{folder}")')
