"""What a network may ask for is decided before anything is allocated: at once, by name, and raised by one option."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from manidp.errors import GraphError
from manidp.gating.place import residual_convs, with_gates
from manidp.graph import Activation, Add, BatchNorm, Concat, Conv, Flatten, GlobalPool, Graph, Input, Linear, Node, Pool
from manidp.graph.macs import dense_macs
from manidp.limits import Limits
from manidp.models import imagenet_resnet, resnet


class Chain:
    """A network grown at its end; ``classify`` ends it."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.nodes: list[Node] = [Input(name="image", dims=(channels, height, width))]
        self.number = count()

    def add(self, node_type: type[Node], /, *inputs: str, **options: Any) -> str:
        name = f"n{next(self.number)}"
        self.nodes.append(node_type(name=name, inputs=inputs or (self.nodes[-1].name,), **options))
        return name

    def classify(self, features: int = 10) -> Graph:
        self.add(GlobalPool)
        output = self.add(Linear, features=features)
        return Graph(tuple(self.nodes), output)


def vgg16(size: int) -> Graph:
    chain = Chain(3, size, size)
    for channels, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            chain.add(Conv, channels=channels, bias=True)
            chain.add(Activation)
        chain.add(Pool, kind="max", kernel=2, stride=2)
    chain.add(Flatten)
    for features in (4096, 4096, 1000):
        last = chain.add(Linear, features=features)
    return Graph(tuple(chain.nodes), last)


def dpn92(size: int) -> Graph:
    """Like DPN-92 in its sizes: per block a 1x1, a grouped 3x3 and a 1x1 convolution, a sum, and a growing concat."""
    chain = Chain(3, size, size)
    chain.add(Conv, channels=64, kernel=7, stride=2, padding=3)
    chain.add(Pool, kind="max", kernel=3, stride=2, padding=1)
    for stage, (blocks, inner, wide, grow) in enumerate(((3, 96, 256, 16), (4, 192, 512, 32), (20, 384, 1024, 24), (3, 768, 2048, 128))):  # fmt: skip  # noqa: E501
        stride = 1 if stage == 0 else 2
        start = chain.nodes[-1].name
        dense = chain.add(Conv, start, channels=2 * grow, kernel=1, stride=stride, padding=0)
        residual = chain.add(Conv, start, channels=wide, kernel=1, stride=stride, padding=0)
        for _ in range(blocks):
            chain.add(Concat, residual, dense)
            for channels, kernel, groups in ((inner, 1, 1), (inner, 3, 32), (wide, 1, 1)):
                chain.add(BatchNorm)
                chain.add(Activation)
                made = chain.add(Conv, channels=channels, kernel=kernel, padding=kernel // 2, groups=groups)
            grown = chain.add(Conv, chain.nodes[-2].name, channels=grow, kernel=1, padding=0)
            residual, dense = chain.add(Add, residual, made), chain.add(Concat, dense, grown)
        chain.add(Concat, residual, dense)
    return chain.classify(1000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: vgg16(512),
        lambda: dpn92(512),
        lambda: imagenet_resnet(34, image=(3, 512, 512)),
        lambda: with_gates(resnet(6 * 333 + 2)),
    ],
)
def test_real_networks_stay_well_within_every_limit(make: Callable[[], Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits()
    for name in ("nodes", "macs", "map_bytes", "live_bytes", "elements", "side"):
        monkeypatch.setenv(f"MANIDP_MAX_{name.upper()}", str(getattr(limits, name) * 2 // 3))
    assert dense_macs(make()) > 0


def conv(planes: int, height: int, width: int, **options: int) -> Callable[[], Graph]:
    def make() -> Graph:
        chain = Chain(planes, height, width)
        chain.add(Conv, **{"channels": 4} | options)
        return chain.classify()

    return make


def doubling(kind: type[Node], times: int, many: int) -> Callable[[], Graph]:
    def make() -> Graph:
        chain = Chain(3, 8, 8)
        for _ in range(times):
            chain.add(kind, *[chain.nodes[-1].name] * many)
        return chain.classify()

    return make


def chained(nodes: int, channels: int, height: int, width: int) -> Callable[[], Graph]:
    def make() -> Graph:
        chain = Chain(channels, height, width)
        for _ in range(nodes):
            chain.add(Activation)
        return chain.classify()

    return make


def wide(maps: int) -> Graph:
    """Many maps that are all still to be read."""
    chain = Chain(3, 2048, 2048)
    chain.add(Add, *[chain.add(Activation, "image") for _ in range(maps)])
    return chain.classify()


def heavy() -> Graph:
    chain = Chain(3, 1, 1)
    for features in (2**15, 2**16):
        chain.add(Flatten)
        chain.add(Linear, features=features)
    return Graph(tuple(chain.nodes), chain.nodes[-1].name)


HUGE: dict[str, tuple[str, Callable[[], Graph]]] = {
    "image 20000 x 20000": ("1,200,000,000 numbers .* MANIDP_MAX_ELEMENTS", conv(3, 20_000, 20_000)),
    "image 1 x 1000000": ("is 1,000,000 pixels .* MANIDP_MAX_SIDE", conv(3, 1, 10**6)),
    "padding 5000": ("padding of 5,000; .* MANIDP_MAX_WINDOW", conv(3, 8, 8, padding=5000)),
    "padding 10^9": ("padding of 1,000,000,000; .* MANIDP_MAX_WINDOW", conv(3, 8, 8, padding=10**9)),
    "a kernel": ("kernel, stride or padding of 129; .* MANIDP_MAX_WINDOW", conv(3, 200, 200, kernel=129)),
    "channels": ("more than 10.18 channels .* MANIDP_MAX_CHANNELS", conv(3, 8, 8, channels=10**30)),
    "one value": ("numbers of one image; .* MANIDP_MAX_ELEMENTS", conv(3, 4096, 4096, channels=64)),
    "multiply-adds": ("multiply-adds .* MANIDP_MAX_MACS", conv(3, 1024, 1024, channels=64, kernel=127, padding=63)),
    "all maps": ("makes maps of .* MANIDP_MAX_MAP_BYTES", chained(300, 3, 2048, 2048)),
    "maps at one time": ("at one time .* MANIDP_MAX_LIVE_BYTES", lambda: wide(30)),
    "weights": ("weights; .* MANIDP_MAX_WEIGHTS", heavy),
    "nodes": ("has 100,003 nodes; .* MANIDP_MAX_NODES", chained(100_000, 3, 8, 8)),
    "a concat bomb": ("MANIDP_MAX_CHANNELS", doubling(Concat, 5000, 2)),
    "a concat bomb of 64": ("MANIDP_MAX_CHANNELS", doubling(Concat, 5000, 64)),
    "layers": ("has 6,000,000,002 nodes; .* MANIDP_MAX_NODES", lambda: resnet(6 * 10**9 + 2)),
    "classes": ("1,099,511,627,776 channels or features", lambda: resnet(20, num_classes=2**40)),
    "width": ("1,000,000,000 channels", lambda: resnet(20, width=10**9)),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
def test_what_asks_for_too_much_is_refused_at_once_with_the_limit_and_what_raises_it(what: str) -> None:
    message, make = HUGE[what]
    started = time.process_time()
    with pytest.raises(GraphError, match=message):
        make()
    assert time.process_time() - started < 2


def test_the_environment_sets_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    network = conv(3, 1, 40_000)
    with pytest.raises(GraphError, match="the limit is 32,768, which MANIDP_MAX_SIDE in the environment raises"):
        network()
    monkeypatch.setenv("MANIDP_MAX_SIDE", "40000")
    assert network().input.dims == (3, 1, 40_000)
    for wrong in ("", "-1", "1e3", "many", "1" * 30):
        monkeypatch.setenv("MANIDP_MAX_SIDE", wrong)
        with pytest.raises(GraphError, match="MANIDP_MAX_SIDE must be a positive whole number"):
            network()


def test_the_longest_networks_take_no_time_in_any_order() -> None:
    chain = Chain(3, 8, 8)
    chain.add(Conv, channels=4)
    stem = chain.nodes[-1].name
    for _ in range(2500):  # every sum has the stem as its other operand: all convolutions since count anew
        made = chain.add(Conv, channels=4)
        chain.add(Add, made, stem)
        chain.add(Activation)
    graph = chain.classify()
    started = time.process_time()
    assert Graph(graph.nodes[::-1], graph.output).shapes == graph.shapes
    assert len(residual_convs(graph)) == 2500
    assert len(with_gates(graph, residual_convs(graph)[:10]).gates) == 10
    assert len(graph.wanted_by) == len(graph.zeroed_by) == 0
    assert time.process_time() - started < 4  # seconds; it took 30 when each node was looked up among all others
