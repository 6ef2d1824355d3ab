"""Write our own model's card in the bundled catalogue, and the digests of its files: `make cards`.

Everything on the card comes from the checkpoint; its date changes only when something else does.
"""

import datetime
import hashlib
import json
import tempfile
from pathlib import Path

from manidp.formats.checkpoint import checkpoint_path, load_checkpoint
from manidp.formats.ckpt import write_ckpt
from manidp.formats.conversion import to_ckpt
from manidp.hub.bundle import HOME, hub_card
from manidp.hub.card import Asset, read_card, render_card
from manidp.hub.hub import CARDS
from manidp.hub.publish import python_use

MODEL = "manidp-res20"
UID = f"manidp/1.0/{MODEL}_cifar10"
CARD = CARDS / f"{UID}.md"
DIGESTS = CARDS / "bundled.json"


def contents(date: str) -> dict[Path, str]:
    """What the two files must hold, by their paths; ``date`` stands on the card."""
    path = checkpoint_path(MODEL)
    checkpoint = load_checkpoint(path)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f"{MODEL}.ckpt"
        write_ckpt(to_ckpt(checkpoint)[0], weights)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = hub_card(
        checkpoint,
        MODEL,
        repository=f"{HOME}/models/{MODEL}",
        asset=Asset("ckpt", f"{HOME}/{MODEL}.ckpt", digest),
        date=date,
        use=python_use(checkpoint, UID, "comes with the package: nothing is downloaded"),
    )
    model = {"name": MODEL, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return {CARD: render_card(card), DIGESTS: json.dumps({digest: model}, indent=2) + "\n"}


def recorded_date() -> str:
    """The date that stands on the card now."""
    return read_card(CARD).fields["update-time"]


if __name__ == "__main__":
    today = datetime.date.today().isoformat()
    date = recorded_date() if CARD.exists() else today
    if any(not path.exists() or path.read_text("utf-8") != text for path, text in contents(date).items()):
        CARD.parent.mkdir(parents=True, exist_ok=True)
        for path, text in contents(today).items():
            path.write_text(text, "utf-8")
            print(f"{path}: written")
