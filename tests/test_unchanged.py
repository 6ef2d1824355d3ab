"""What the bundled models give, to the last bit, as it was before the engine was taken apart.

The digests were recorded at version 0.1 (commit 58f9382). They may change only together with a stated change of the
engine's arithmetic.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from manidp import load_model
from manidp.data.images import load_sample
from manidp.engine.engine import Engine
from manidp.engine.target import available_isas

ROOT = Path(__file__).parent.parent
RECORDED = {
    ("manidp-res20", "avx2"): "244664d3df4df8d658f25215b167cb6e99e132682e2b6074490e122cea5849f9",
    ("manidp-res20", "sse"): "229f33fed2982ffe556ac7122146dd25effaae1ee0ec7d155aface55cdd26b82",
    (
        "models/dense-res20/first.safetensors",
        "avx2",
    ): "169971fe2b073fbe00b3e01c687a12332cc814380584890575cdfc3e8a467f93",
    ("models/dense-res20/first.safetensors", "sse"): "7c248aa78208483946b2b9faf1b88557739aaa7769816d6ce574050b924d0f8e",
}


@pytest.mark.parametrize(("name", "isa"), RECORDED)
def test_logits_gates_and_multiply_adds_are_what_they_were(name: str, isa: str) -> None:
    if isa not in available_isas():
        pytest.skip(f"this CPU has no {isa}")
    result = Engine(load_model(str(ROOT / name) if "/" in name else name), isa=isa).run(load_sample().images)
    digest = hashlib.sha256(result.logits.tobytes())
    for _, gate in sorted(result.gates.items()):
        digest.update(np.ascontiguousarray(gate).tobytes())
    digest.update(result.macs.tobytes())
    assert digest.hexdigest() == RECORDED[name, isa]
