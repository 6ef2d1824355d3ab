"""The bench: every peer gives the engine's answers, turns are fair, what is recorded can be rendered and drawn."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manidp
from manidp import cli
from manidp.bench import measure
from manidp.bench.measure import Contender, calibrated, interleaved, random_checkpoint
from manidp.bench.peers import PEERS, Batch, Opened, Peer
from manidp.data.images import ImageSet, draw_sample, load_sample
from manidp.data.preprocessing import CIFAR10_CLASSES
from manidp.engine.engine import Engine
from manidp.engine.peak import multiply_add_peak
from manidp.engine.target import ISAS, available_isas
from manidp.errors import ManiDPError, MissingExtraError, UnsupportedError
from manidp.formats.checkpoint import Checkpoint, save_checkpoint
from manidp.gating.place import with_gates
from manidp.graph import GlobalPool, Graph, Input, Scatter
from manidp.graph.macs import dense_macs
from manidp.models import resnet
from manidp.result import Result
from networks import checkpoint_of


@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
@pytest.mark.parametrize(
    "peer",
    [peer for peer in PEERS if peer.package != "torch" and "quantised" not in peer.name],
    ids=lambda peer: peer.name,
)
def test_a_peer_gives_the_engines_logits(peer: Peer, gated: bool) -> None:
    model = manidp.load_model("manidp-res20" if gated else "dense-res20")
    pixels = model.preprocessing.apply(load_sample().images[:6])
    try:
        opened = peer.open(model, 3, 1, pixels)
    except MissingExtraError as error:
        pytest.skip(str(error))
    except UnsupportedError:
        assert gated
        assert peer.name == "ncnn"
        return
    wanted = Engine(model).run(pixels).logits
    logits = np.concatenate([opened.run(pixels[:3]), opened.run(pixels[3:])])
    assert logits.shape == wanted.shape
    if opened.precision == "float32":
        np.testing.assert_allclose(logits, wanted, atol=2e-4 * np.abs(wanted).max())


def test_ncnn_refuses_what_its_converter_writes_and_it_does_not_know() -> None:
    nodes = (
        Input(name="image", dims=(3, 8, 8)),
        Scatter(name="scattered", inputs=("image",), channels=5, at=(0, 2, 4)),
        GlobalPool(name="pool", inputs=("scattered",)),
    )
    (ncnn,) = (peer for peer in PEERS if peer.name == "ncnn")
    with pytest.raises((MissingExtraError, UnsupportedError)):
        ncnn.open(checkpoint_of(Graph(nodes, "pool"), {}), 1, 1, np.zeros((1, 3, 8, 8), np.float32))


def test_a_peer_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'manidp\[bench\]'"):
        PEERS[0].open(manidp.load_model("dense-res20"), 1, 1, np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("peer", [peer for peer in PEERS if "quantised" in peer.name], ids=lambda peer: peer.name)
def test_a_quantised_peer_computes_in_int8_and_nearly_agrees(peer: Peer) -> None:
    model = small("gated")
    pixels = model.preprocessing.apply(load_sample().images[:12])
    try:
        opened = peer.open(model, 6, 1, pixels[:6])
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert opened.precision == "int8"
    wanted = Engine(model).run(pixels).logits
    logits = np.concatenate([opened.run(pixels[:6]), opened.run(pixels[6:])])
    difference = np.abs(logits - wanted).max() / np.abs(wanted).max()
    assert 1e-3 < difference < 0.3


def test_every_contender_takes_every_image_of_a_round_once_in_each_round() -> None:
    pixels = np.arange(30, dtype=np.float32).reshape(30, 1, 1, 1)
    seen: dict[str, list[float]] = {"a": [], "b": []}

    def contender(name: str) -> Contender:
        def run(batch: Batch) -> Batch:
            seen[name] += batch.ravel().tolist()
            return batch

        return Contender(name, "model", "everything", "float32", run)

    times = interleaved([contender("a"), contender("b")], {"model": pixels}, 5, 10, 4, threads=1)
    assert [len(each) for each in times] == [4, 4]
    assert all((each > 0).all() for each in times)
    assert seen["a"] == seen["b"]  # the same images for both, in the same order
    assert seen["a"][:10] == seen["a"][10:20]  # a round to warm up, then the first that counts
    assert len(seen["a"]) == 10 * (1 + 4)


def test_a_large_set_is_read_in_pieces_and_its_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = small("gated"), {"model": load_sample().labels[:25]}
    asked: list[int] = []

    class Watched(measure.Prepared):
        def __getitem__(self, part: slice, /) -> Batch:
            made = super().__getitem__(part)
            asked.append(len(made))
            return made

    engine = Engine(model)
    contender = Contender("peer", "model", "kept channels", "float32", lambda images: engine.run(images).logits)
    pieces = Watched(model.preprocessing, load_sample().images[:25])
    whole = pieces[:]
    asked.clear()
    monkeypatch.setattr(measure, "PIECE", 4)
    peak = {available_isas()[0]: 1e9}
    rows = [
        list(measure._rows([contender], [np.ones(3)], {"model": model}, {"model": images}, labels, 6, 1, peak))
        for images in (pieces, whole)
    ]
    assert rows[0] == rows[1]
    assert max(asked) == 6
    result = engine.run(whole)
    assert rows[0][0].correct == (result.logits.argmax(1) == labels["model"]).sum()
    assert rows[0][0].macs == pytest.approx(result.macs.mean()) and rows[0][0].largest_difference == 0
    interleaved([contender], {"model": pieces}, 5, 10, 2, threads=1)
    assert max(asked) == 6


def test_the_peak_is_about_lanes_times_clock() -> None:
    peaks = [multiply_add_peak(ISAS[isa], rounds=5) for isa in available_isas()]
    for isa, peak in zip(available_isas(), peaks, strict=True):
        # one or two vector multiply-adds a cycle (where the set has none, they take two instructions), 1 to 7 GHz
        assert 0.25e9 < peak / ISAS[isa].lanes < 14e9


def test_calibration_keeps_the_share_asked_for() -> None:
    graph = with_gates(resnet(8, image=(3, 8, 8)))
    pixels = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    model = calibrated(random_checkpoint(graph), pixels, 0.58)
    result = Engine(model).run(pixels)
    assert abs((result.gate_values > 0).mean() - 0.58) < 0.01
    assert (result.macs < dense_macs(graph)).all()


def broken(*_: Any) -> Opened:
    raise RuntimeError("no such instruction")


def small(name: str) -> Checkpoint:
    """A network of a few thousand multiply-adds, dense or gated, for CIFAR-10's images and classes."""
    graph = resnet(8, width=4)
    model = random_checkpoint(graph if name == "dense" else with_gates(graph))
    thresholds = {gate: np.asarray(0.9, np.float32) for gate in model.graph.thresholds}
    return replace(model, weights={**model.weights, **thresholds}, classes=CIFAR10_CLASSES)


@pytest.fixture(scope="module")
def found() -> Any:
    """The whole bench in small: two peers, one of them broken, 20 images."""
    images = load_sample()
    chosen = draw_sample(images, 2, 0)
    few = type(images)(images.images[chosen], images.labels[chosen], images.classes)

    peers = (PEERS[0], Peer("broken", broken, "broken"))
    models = {name: small(name) for name in ("dense", "gated")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "GROWN", {"resnet-8": lambda: resnet(8, width=4)})
        patch.setattr(measure, "PROCESSES", 1)
        few = few.relabelled(few.classes[::-1], "few")  # classes are matched by name, whatever their order
        return measure.bench(models, few, threads=1, batch=6, rounds=3, growth=True, say=lambda _: None, peers=peers)


def test_rows_tell_accuracy_of_all_images_and_macs_of_what_was_computed(found: Any) -> None:
    assert [(mode["batch"], mode["threads"]) for mode in found["modes"]] == [(1, 1), (6, 1)]
    sample = load_sample()
    chosen = draw_sample(sample, 2, 0)
    results: dict[tuple[str, str], Result] = {}
    for mode in found["modes"]:
        own = {f"manidp {isa}" for isa in available_isas() + available_isas("float16")}
        assert {row["runtime"] for row in mode["rows"]} == own | {PEERS[0].name}
        for row in mode["rows"]:
            model, precision = small(row["model"]), row["precision"]
            if (row["model"], precision) not in results:
                results[row["model"], precision] = Engine(model, precision=precision).run(sample.images[chosen])
            result = results[row["model"], precision]
            assert row["total"] == len(chosen)  # 20 images in batches of 6: none is left out
            assert row["correct"] == (result.logits.argmax(1) == sample.labels[chosen]).sum()
            skips = row["computes"] == "kept channels"
            assert row["macs"] == (result.macs.mean() if skips else dense_macs(model.graph))
            assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
            assert row["other_answers"] == 0
            assert row["largest_difference"] < (1e-4 if row["precision"] == "float32" else 3e-2)
    assert found["skipped"] == {f"broken, {name}": "RuntimeError: no such instruction" for name in ("dense", "gated")}
    assert found["start_up"]["import_seconds"] < found["start_up"]["start_to_result_seconds"]
    assert [grown["network"] for grown in found["growth"]] == ["resnet-8"]


def test_what_was_measured_can_be_rendered_and_drawn(found: Any, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "render_readme.py"
    spec = importlib.util.spec_from_file_location("render_readme", path)
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    record = json.loads(json.dumps({"data": "a few"} | found))
    gated = next(row for row in record["modes"][0]["rows"] if row["computes"] == "kept channels")
    assert f"{gated['median']:.3f} ms" in render.table(record)
    assert "resnet-8" in render.full(record)
    dense = next(r for r in record["modes"][0]["rows"] if r["runtime"] == "ONNX Runtime" and "dense" in r["model"])
    ratio = render.ratios(record["modes"][0], f"manidp {available_isas()[0]}")["dense"]
    assert ratio == pytest.approx(dense["median"] / gated["median"])
    smaller = dense | {"model": "runs/static/model.safetensors", "median": dense["median"] / 100}
    for mode in record["modes"]:  # a static twin beside them: told, and nothing that speedups are over
        mode["rows"].append(smaller)
    assert "| `static`: everything | ONNX Runtime |" in render.table(record)
    assert render.ratios(record["modes"][0], f"manidp {available_isas()[0]}")["dense"] == ratio
    for mode in record["modes"]:  # as on a CPU that computes float16: a row for it, beside a peer in half precision
        mode["rows"] = [row for row in mode["rows"] if row["precision"] == "float32" and row != smaller]
    assert "float16" not in render.table(record) + render.full(record)
    for mode in record["modes"]:
        fastest = min(row["median"] for row in mode["rows"])
        mode["rows"].append(gated | {"runtime": "manidp wide", "precision": "float16", "median": fastest / 5})
        mode["rows"].append(dense | {"runtime": "half", "precision": "bf16", "median": fastest / 2})
    assert "manidp wide (float16)" in render.table(record)
    assert "In float16 its latency is 2.5x better than that of any other runtime" in render.table(record)
    assert "of any precision: 2.50x" in render.full(record)
    assert "(float16)" not in render.table(record).partition("**Not faster**")[2]
    for mode in record["modes"]:
        wide, half = (next(r for r in mode["rows"] if r["runtime"] == name) for name in ("manidp wide", "half"))
        half["median"] = 0.9 * wide["median"]
    assert "0.90x (float16)" in render.table(record).partition("**Not faster** than ")[2].splitlines()[0]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from manidp.bench.plot import draw

    draw(record, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("classes", "size", "scored"),
    [(CIFAR10_CLASSES, (32, 32), True), (("a", "b", "c"), (32, 32), False), (CIFAR10_CLASSES, (40, 48), False)],
)
def test_any_pair_of_models_is_measured_without_data(
    classes: tuple[str, ...], size: tuple[int, int], scored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks for other sizes or classes than those of the bundled images get these images, and no accuracy."""
    graph = resnet(8, num_classes=len(classes), width=4, image=(3, *size))
    for name, one in (("dense", graph), ("gated", with_gates(graph))):
        save_checkpoint(replace(random_checkpoint(one), classes=classes), tmp_path / f"{name}.safetensors")
    seen: list[Any] = []

    def bench(models: Any, images: ImageSet, **options: Any) -> Any:
        seen.append((images.size, options["scored"], [bool(model.graph.gates) for model in models.values()]))
        return measured(models, images, **options | {"peers": ()})

    measured = measure.bench
    monkeypatch.setattr(measure, "bench", bench)
    monkeypatch.setattr(measure, "_apart", lambda *_: ({}, {}))
    monkeypatch.setattr(measure, "PROCESSES", 1)
    pair = [f"--{option}={tmp_path / name}.safetensors" for option, name in (("model", "gated"), ("dense", "dense"))]
    monkeypatch.setattr("sys.argv", ["manidp", "bench", *pair, "--threads=1", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert seen == [(size, scored, [False, True])]


def test_more_threads_than_cores_are_refused() -> None:
    if not measure.CORES:
        pytest.skip("this system cannot pin threads")
    with pytest.raises(ManiDPError, match="may use"), measure.pinned(len(measure.CORES) + 1):
        pass
