"""The one way from the name of a model to the model: bundled names, files, folders, cards."""

from __future__ import annotations

import os
from pathlib import Path

from manidp.errors import CheckpointError, HubError, quoted
from manidp.files import sha256_of
from manidp.formats.checkpoint import Found, checkpoint_path, load_checkpoint


def find_model(name: str | Path) -> Found:
    """The model of this name, wherever models are: all that ``manidp.load`` takes.

    A bundled name, a file, a folder that holds model.safetensors, or, where there is no such file, the name of a card
    on the hub. Raises CheckpointError, HubError, CardError or CkptError.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise CheckpointError(f"a model is called by a name or a path; got {name!r:.80}")
    name = name if isinstance(name, str) else Path(name)
    if isinstance(name, Path) or "/" not in name or name.endswith(".safetensors") or os.path.exists(name):
        path = checkpoint_path(name)
        checkpoint = load_checkpoint(path)
        return Found(path.stem, path, sha256_of(path), checkpoint)
    from manidp.hub.hub import open_hub  # only now: it takes as long to import as half of the rest

    hub = open_hub()
    try:
        decision = hub.resolve(name)
    except HubError as error:
        raise HubError(f"there is no file {quoted(name)}, and as the name of a card: {error}") from error
    return hub.load(decision)
