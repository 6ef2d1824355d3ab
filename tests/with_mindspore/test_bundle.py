"""What is packed, loaded in a process that has MindSpore and not manidp, by the hub's own client if it is here.

The client is looked for in the folder that MINDSPORE_HUB names, and in a checkout ``hub`` beside this repository.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manidp.hub.bundle import pack
from manidp.models import resnet
from manidp.reference import run

from .cases import assert_close, checkpoint_of, gated_resnet, images_for

CLIENT = Path(os.environ.get("MINDSPORE_HUB", Path(__file__).parents[3] / "hub"))
REAL = pytest.mark.skipif(
    not (CLIENT / "mindspore_hub").is_dir(),
    reason=f"the hub's client is not at {CLIENT} (MINDSPORE_HUB); only our stand-in for it was tried",
)


@pytest.mark.parametrize("client", ["", pytest.param(str(CLIENT), marks=REAL)], ids=["stand-in", "real"])
def test_the_client_loads_bundles_one_after_the_other(client: str, tmp_path: Path) -> None:
    gated = checkpoint_of(gated_resnet())
    dense = checkpoint_of(resnet(8, num_classes=3, width=4, image=gated.graph.input.dims))
    images = images_for(gated.graph)
    np.save(tmp_path / "images.npy", images)
    arguments: list[str | Path] = [client, tmp_path / "images.npy"]
    for name, checkpoint in (("gated", gated), ("dense", dense)):
        arguments += [pack(checkpoint, tmp_path / name, name), tmp_path / f"{name}.npy"]
    script = Path(__file__).with_name("hub_client.py")
    isolated = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=isolated, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, checkpoint in (("gated", gated), ("dense", dense)):
        assert_close(np.load(tmp_path / f"{name}.npy"), run(checkpoint.graph, checkpoint.weights, images).logits)
