"""Load bundles as the MindSpore hub's client does, and run them: hub_client.py CLIENT IMAGES CARD LOGITS [CARD LOGITS].

IMAGES and LOGITS are .npy files. CLIENT is the folder that holds the real package mindspore_hub. With "" for it, a
stand-in of our own does what the client does once it has the files: all are looked up by name beside the card, the
folder goes on sys.path, mindspore_hub_conf.py is executed, create_network(name) called, the .ckpt loaded into what it
returns.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import mindspore
import numpy as np


def load_as_the_client(card: str) -> mindspore.nn.Cell:
    """The stand-in: ``mindspore_hub.load(card, source="local")``."""
    head = Path(card).read_text(encoding="utf-8").split("---")[1]
    field = {
        key.strip(" -"): value.strip(" <>") for key, _, value in (line.partition(":") for line in head.splitlines())
    }
    folder = Path(card).parent / field["repo-link"].rpartition("/")[2]
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("mindspore_hub_conf.py", folder / "mindspore_hub_conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.create_network(field["model-name"].lower())
    assert isinstance(network, mindspore.nn.Cell)
    weights = mindspore.load_checkpoint(str(Path(card).parent / field["asset-link"].rpartition("/")[2]))
    mindspore.load_param_into_net(network, weights)
    return network


def load_with_the_client(card: str, client: str) -> mindspore.nn.Cell:
    """The real one, unmodified, but that it asks no server whether the links on the card exist."""
    sys.path.insert(0, client)
    hub = importlib.import_module("mindspore_hub")
    importlib.import_module("mindspore_hub._utils.check").ValidMarkdown._validate_repo_link = lambda *_: None
    return hub.load(card, source="local")


if __name__ == "__main__":
    client, images, *rest = sys.argv[1:]
    for card, logits in zip(rest[::2], rest[1::2], strict=True):
        network = load_with_the_client(card, client) if client else load_as_the_client(card)
        network.set_train(False)
        np.save(logits, network(mindspore.Tensor(np.load(images))).asnumpy())
    assert "manidp" not in sys.modules
