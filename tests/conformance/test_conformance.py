"""The zoo through every backend of this environment, and the page that says which backend runs what."""

from __future__ import annotations

from typing import get_args

import pytest

from conformance.backends import COMPARE, HERE, runs
from conformance.support import PATH, here, page, written
from manidp.graph import OPS, ActivationKind
from manidp.reference import run
from networks import ZOO, images_for, some_open


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_the_reference_or_is_refused_as_the_page_says(name: str, backend: str) -> None:
    assert runs(backend, name) == written()[name, backend]


def test_the_page_is_made_of_what_the_backends_do() -> None:
    assert PATH.read_text(encoding="utf-8") == page(written() | here()), "run: make support"


@pytest.mark.parametrize("name", [name for name, graph in ZOO.items() if graph.gates])
def test_every_gate_of_the_zoo_keeps_some_channels_and_closes_others(name: str) -> None:
    kept = run(ZOO[name], some_open(ZOO[name]), images_for(ZOO[name])).kept
    for gate in ZOO[name].gates:
        assert kept[gate.name].any()
        assert gate.rule == "constant" or not kept[gate.name].all()


def test_the_zoo_has_every_op_and_every_kind_of_activation() -> None:
    assert {name.partition(", ")[0] for name in ZOO} >= OPS.keys()
    assert {f"Activation, {kind}" for kind in get_args(ActivationKind)} <= ZOO.keys()
    assert COMPARE.keys() >= set(HERE)
