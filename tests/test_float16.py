"""The engine in float16: what it says of the bundled models, where it runs.

Networks of all kinds are compared with the reference in test_engine.py and test_engine_random.py. On a CPU without
float16 arithmetic the same code runs with each operation done in float32 and rounded.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import pytest

import manidp
from engine_cases import assert_same_result, close_calls, plan_of, run_program, some_images
from manidp import reference
from manidp.data.images import load_sample
from manidp.engine.engine import Engine, Program
from manidp.engine.ir import HALF
from manidp.engine.target import ISAS, available_isas, emulating_isas
from manidp.errors import ManiDPError, UnsupportedError
from manidp.formats.checkpoint import checkpoint_path, load_checkpoint
from manidp.graph import Conv, GlobalPool, Graph, Input
from manidp.models import resnet
from networks import checkpoint_of, random_weights
from test_overflow import OVERFLOWS

ISA = available_isas("float16") + emulating_isas("float16")
needs_isa = pytest.mark.skipif(not ISA, reason="this CPU can neither do nor convert float16")


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("name", ["dense-res20", "manidp-res20"])
def test_bundled_models_agree_with_the_reference_on_real_images(name: str, isa: str) -> None:
    checkpoint, images = load_checkpoint(checkpoint_path(name)), load_sample().images[::10]
    floats = checkpoint.preprocessing.apply(images)
    wanted = reference.run(checkpoint.graph, checkpoint.weights, floats)
    engine = manidp.load(name, precision="float16", isa=isa)
    for result in (engine.run(images), engine.run(floats)):
        same = ~close_calls(result, wanted, checkpoint.weights)
        assert same.sum() >= len(images) / 2
        assert_same_result(some_images(result, same), some_images(wanted, same), HALF)
        assert (result.logits.argmax(1) == wanted.logits.argmax(1)).all()


@needs_isa
def test_an_engine_takes_about_half_the_memory() -> None:
    graph = resnet(14, image=(3, 32, 32))
    checkpoint = checkpoint_of(graph, random_weights(graph))
    assert Engine(checkpoint, precision="float16", isa=ISA[0]).memory < 0.6 * Engine(checkpoint).memory


@pytest.mark.parametrize("isa", ISA)
def test_an_odd_number_of_halves_lies_within_the_workspace(isa: str) -> None:
    """Floats are two halves: of 37 a float too few was reserved."""
    nodes = (
        Input(name="image", dims=(1, 3, 9)),
        Conv(name="conv", inputs=("image",), channels=1, stride=2),
        GlobalPool(name="mean", inputs=("conv",)),
    )
    graph = Graph(nodes, "mean")
    plan = plan_of(graph, random_weights(graph), isa)
    run_program(Program(plan, ISAS[isa]), plan, np.zeros((1, 1, 3, 9), np.float32))


@needs_isa
def test_images_and_weights_beyond_float16_are_refused() -> None:
    graph = OVERFLOWS["max pool"]
    weights = random_weights(graph)
    engine = Engine(checkpoint_of(graph, weights), precision="float16", isa=ISA[0])
    with pytest.raises(ManiDPError, match=r"logits of images \[0\].*overflow float16"):
        engine.run(np.full((1, 3, 6, 6), 1e5, dtype=np.float32))
    weights["first.weight"] = weights["first.weight"] + 1e5
    with pytest.raises(UnsupportedError, match="'first': weights up to 65504"):
        Engine(checkpoint_of(graph, weights), precision="float16", isa=ISA[0])


def test_what_a_cpu_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OVERFLOWS["relu"]
    checkpoint = checkpoint_of(graph, random_weights(graph))
    with pytest.raises(UnsupportedError, match="'float32' and 'float16' can be run; got 'float8'"):
        Engine(checkpoint, precision="float8")
    features = dict.fromkeys(ISAS["avx512f16c"].features, True)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    for isa in (None, "sse"):
        with pytest.raises(UnsupportedError, match=r"'float16' needs AVX512-FP16 .*, which this CPU does not have"):
            Engine(checkpoint, precision="float16", isa=isa)
    features["avx512fp16"] = True
    assert available_isas("float16") == ("avx512fp16",)
    assert emulating_isas("float16") == ("avx512f16c", "avx2f16c")
    assert available_isas() == ("avx512", "avx2")
    with pytest.raises(UnsupportedError, match="for float16 this CPU has avx512fp16; got 'avx2'"):
        Engine(checkpoint, precision="float16", isa="avx2")
