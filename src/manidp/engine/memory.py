"""Where everything lies: constants one after the other, layout and place of every map, place of every vector."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Element
from manidp.engine.steps import Layout, Map, MapKey, Step, VectorKey
from manidp.errors import UnsupportedError
from manidp.graph import Graph


@dataclass
class Constants:
    """Arrays laid one after the other, each at a multiple of 16 floats."""

    parts: list[NDArray[np.float32]] = field(default_factory=list)
    size: int = 0

    def add(self, array: NDArray[Any], element: Element = FLOAT, owner: str = "the network") -> int:
        """Its offset in floats. Raises UnsupportedError, naming ``owner``, for numbers that ``element`` cannot hold."""
        flat = np.ascontiguousarray(array).reshape(-1)
        if flat.dtype != np.int32:
            most = np.finfo(f"f{element.size}").max
            if (np.abs(flat) > most).any():
                raise UnsupportedError(f"{owner}: weights up to {most:.6g} can be run in this precision")
            flat = flat.astype(f"f{element.size}")
        at = self.size
        self.parts.append(np.pad(flat, (0, -len(flat) % (64 // flat.itemsize))).view(np.float32))
        self.size += len(self.parts[-1])
        return at


def place(
    graph: Graph,
    steps: Sequence[Step],
    vectors: Mapping[VectorKey, int],
    in_place: Mapping[MapKey, MapKey],
    lanes: int,
    element: Element,
    reuse: bool,
) -> tuple[dict[MapKey, Map], dict[VectorKey, int], int]:
    """Layout and place of every map, place of every vector, and how many floats that takes.

    vectors: their sizes in floats. in_place: a map -> the one whose memory it takes, which has its own. ``reuse``: the
    memory of maps that are no longer needed.
    """
    layouts = _layouts(graph, steps, lanes)
    slack = 16 * lanes  # blocks may read, never write, up to 9 vectors beyond a map and one before (docs/engine.md)
    size = slack

    def floats(elements: int) -> int:
        return _whole(-(-elements * element.size // FLOAT.size), 16)

    offsets: dict[VectorKey, int] = {}
    for vector, length in vectors.items():
        offsets[vector] = size
        size += _whole(length + lanes, 16)

    life: dict[MapKey, list[int]] = {}  # first and last step that touches the memory of a map
    for index, step in enumerate(steps):
        for key in step.maps():
            life.setdefault(in_place.get(key, key), [index, index])[1] = index
    free: dict[Layout, list[tuple[int, int]]] = {}  # (channels, offset), the fewest channels first
    places: dict[MapKey, int] = {}
    ends: list[tuple[int, int, int, Layout]] = []  # (last step, offset, channels, layout), the earliest on top
    for key, (first, last) in sorted(life.items(), key=lambda item: item[1]):
        while reuse and ends and ends[0][0] < first:
            _, at, channels, layout = heapq.heappop(ends)
            bisect.insort(free.setdefault(layout, []), (channels, at))
        layout, channels = layouts[key], graph.shapes[key.node][0]
        slots = free.get(layout, [])
        fitting = bisect.bisect_left(slots, (channels, 0))
        if fitting < len(slots):
            places[key] = slots.pop(fitting)[1]
        else:
            gap = layout.plane - layout.rows * layout.pitch
            places[key] = size + floats(gap)
            size = places[key] + floats(channels * layout.channel)
        heapq.heappush(ends, (last, places[key], channels, layout))
    maps = {
        key: Map(places.get(in_place.get(key, key), -1), graph.shapes[key.node][0], layout)
        for key, layout in layouts.items()
    }
    return maps, offsets, size + slack


def _layouts(graph: Graph, steps: Sequence[Step], lanes: int) -> dict[MapKey, Layout]:
    """Maps that one step walks together get one pitch; maps of one size and pitch get one layout."""
    parent: dict[MapKey, MapKey] = {}

    def find(key: MapKey) -> MapKey:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for step in steps:
        for key in step.maps():
            find(key)
        together = step.together()
        for key in together[1:]:
            parent[find(key)] = find(together[0])
    size = {key: graph.shapes[key.node][1:] for key in parent}
    pitch: dict[MapKey, int] = {}
    for key in parent:
        pitch[find(key)] = max(pitch.get(find(key), 1), -(-size[key][1] // key.phases))

    def kind(key: MapKey) -> tuple[int, int, int, int]:
        height, width = size[key]
        return height, width, key.phases, pitch[find(key)]

    gaps: dict[tuple[int, int, int, int], int] = {}
    for source, frame, window in filter(None, (step.window() for step in steps)):
        step_pitch = pitch[find(source)]
        rows_in, rows_out = -(-size[source][0] // source.phases), -(-size[frame][0] // frame.phases)
        (above, last), (left, right) = (
            (taps[0] // source.phases, (taps[-1] + frame.phases - 1) // source.phases)
            for taps in (window.lines, window.columns)
        )
        below = max(0, rows_out - 1 + last - (rows_in - 1))
        gap = max(-above, below) * step_pitch + max(-left, right, 0)
        gaps[kind(source)] = max(gaps.get(kind(source), 0), gap)
    return {
        key: Layout(
            *kind(key), plane=_whole(-(-size[key][0] // key.phases) * kind(key)[3] + gaps.get(kind(key), 0), lanes)
        )
        for key in parent
    }


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
