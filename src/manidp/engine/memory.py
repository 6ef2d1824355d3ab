"""Where everything lies: constants one after the other, layout and place of every map, place of every vector."""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, Element
from manidp.engine.steps import Layout, Map, MapKey, Step, VectorKey, lengthened
from manidp.errors import UnsupportedError
from manidp.graph import Graph

_LINE, _HUGE = 16, 2**19  # floats of a cache line, and of a huge page


def aligned(size: int) -> NDArray[np.float32]:
    """Zeros that begin with a cache line, or many of them with a huge page, of which they then take whole ones.

    NumPy asks the system for huge pages where it gets memory for so many, and channels of a map lie in many small ones.
    """
    unit = _HUGE if size >= 2 * _HUGE else _LINE
    memory = np.zeros(_whole(size, unit) + unit, dtype=np.float32)
    start = -memory.ctypes.data % (4 * unit) // 4
    return memory[start : start + size]


def held(array: NDArray[np.float32]) -> int:
    """Bytes that were taken for an array of ``aligned``."""
    return array.nbytes if array.base is None else int(np.asarray(array.base).nbytes)


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
            if max(np.fmax.reduce(flat, initial=0), -np.fmin.reduce(flat, initial=0)) > most:
                raise UnsupportedError(f"{owner}: weights up to {most:.6g} can be run in this precision")
            flat = flat.astype(f"f{element.size}", copy=False)
        at = self.size
        self.parts.append(lengthened(flat, 64 // flat.itemsize).view(np.float32))
        self.size += len(self.parts[-1])
        return at

    def joined(self) -> NDArray[np.float32]:
        """All of them; they are given back one by one, so that the largest is all that is ever held twice."""
        whole, end = aligned(self.size), self.size
        while self.parts:
            part = self.parts.pop()
            whole[end - len(part) : end] = part
            end -= len(part)
        return whole


SMALL = 2**20  # floats: maps that need no more all have memory of their own layout, whose gaps are never cleared


@dataclass
class _Slot:
    """Memory for maps of one layout, one after the other: of which map first, in floats, for which steps."""

    key: MapKey
    channels: int
    gap: int
    size: int  # gap included
    first: int
    last: int
    at: int = 0


def place(
    graph: Graph,
    steps: Sequence[Step],
    vectors: Mapping[VectorKey, int],
    in_place: Mapping[MapKey, MapKey],
    within: Mapping[MapKey, tuple[MapKey, int]],
    lanes: int,
    element: Element,
    reuse: bool,
) -> tuple[dict[MapKey, Map], dict[VectorKey, int], int, list[tuple[int, MapKey]]]:
    """Layout and place of every map, place of every vector, how many floats that takes, and what is to be cleared.

    vectors: their sizes in floats. in_place: a map -> the one whose memory it takes, which has its own. within: a map
    -> the one of which it is some channels, and the first of these; no map is in both. ``reuse``: the memory of maps
    that are no longer needed. To be cleared: (number of a step, map whose gaps must be zeros before it).
    """
    layouts = _layouts(graph, steps, within, lanes)
    slack = 16 * lanes  # blocks may read, never write, up to 9 vectors beyond a map and one before (docs/engine.md)
    size = slack

    def floats(elements: int) -> int:
        return _whole(-(-elements * element.size // FLOAT.size), 16)

    offsets: dict[VectorKey, int] = {}
    for vector, length in vectors.items():
        offsets[vector] = size
        size += _whole(length + lanes, 16)

    outermost: dict[MapKey, tuple[MapKey, int]] = {}
    for key, (whole, channel) in reversed(list(within.items())):  # a map is put into another before that one is
        outer, first = outermost.get(whole, (whole, 0))
        outermost[key] = outer, first + channel

    def owner(key: MapKey) -> tuple[MapKey, int]:
        """The map that has the memory, and the channel of it at which this one begins."""
        key = in_place.get(key, key)
        return outermost.get(key, (key, 0))

    life: dict[MapKey, list[int]] = {}  # first and last step that touches the memory of a map
    for index, step in enumerate(steps):
        for key in step.maps():
            life.setdefault(owner(key)[0], [index, index])[1] = index
    free: defaultdict[Layout, list[tuple[int, int]]] = defaultdict(
        list
    )  # (channels, number of a slot), the fewest channels first
    slots: list[_Slot] = []
    slot_of: dict[MapKey, _Slot] = {}
    ends: list[tuple[int, int]] = []  # (last step, number of a slot), the earliest on top
    for key, (first, last) in sorted(life.items(), key=lambda item: item[1]):
        while reuse and ends and ends[0][0] < first:
            _, number = heapq.heappop(ends)
            bisect.insort(free[layouts[slots[number].key]], (slots[number].channels, number))
        layout, channels = layouts[key], graph.shapes[key.node][0]
        here = free[layout]
        fitting = bisect.bisect_left(here, (channels, 0))
        if fitting < len(here):
            number = here.pop(fitting)[1]
            slots[number].last = last
        else:
            number, gap = len(slots), floats(layout.plane - layout.rows * layout.pitch)
            slots.append(_Slot(key, channels, gap, gap + floats(channels * layout.channel), first, last))
        slot_of[key] = slots[number]
        heapq.heappush(ends, (last, number))
    size, shared = _lay(slots, size, share=reuse and sum(slot.size for slot in slots) > SMALL)
    maps = {}
    for key, layout in layouts.items():
        whole, first = owner(key)
        slot = slot_of.get(whole)
        at, gap = (slot.at + slot.gap, slot.gap) if slot else (-1, 0)
        if first:
            at, gap = at + first * layout.channel * element.size // FLOAT.size, 0
        maps[key] = Map(at, graph.shapes[key.node][0], layout, gap)
    return maps, offsets, size + slack, [(slot.first, slot.key) for slot in shared]


def _lay(slots: Sequence[_Slot], start: int, *, share: bool) -> tuple[int, list[_Slot]]:
    """Give every slot its place from ``start`` on. Returns where the last one ends, and those whose memory is shared.

    ``share``: slots that are not needed at one time may overlap. Of free places the smallest that fits is taken.
    """
    end, free, ends = start, list[tuple[int, int]](), list[tuple[int, int]]()  # free: (place, size), in order
    waiting = sorted(slots, key=lambda slot: slot.first) if share else slots
    for number, slot in enumerate(waiting):
        while share and ends and ends[0][0] < slot.first:
            old = waiting[heapq.heappop(ends)[1]]
            _give_back(free, old.at, old.size)
        fitting = min(((size, at) for at, size in free if size >= slot.size), default=None)
        if fitting is not None:
            size, slot.at = fitting
            free.remove((slot.at, size))
            if size > slot.size:
                bisect.insort(free, (slot.at + slot.size, size - slot.size))
        else:
            slot.at = free.pop()[0] if free and sum(free[-1]) == end else end
            end = slot.at + slot.size
        heapq.heappush(ends, (slot.last, number))
    if not share:
        return end, []
    bounds = sorted(waiting, key=lambda slot: slot.at)
    shared, reach = [], start
    for slot, following in zip(bounds, [*bounds[1:], None], strict=True):
        if slot.at < reach or (following and following.at < slot.at + slot.size):
            shared.append(slot)
        reach = max(reach, slot.at + slot.size)
    return end, shared


def _give_back(free: list[tuple[int, int]], at: int, size: int) -> None:
    """Add a place to the free ones, joined with its neighbours."""
    index = bisect.bisect(free, (at, size))
    if index < len(free) and free[index][0] == at + size:
        size += free.pop(index)[1]
    if index and sum(free[index - 1]) == at:
        at, before = free.pop(index - 1)
        index, size = index - 1, size + before
    free.insert(index, (at, size))


def _layouts(
    graph: Graph, steps: Sequence[Step], within: Mapping[MapKey, tuple[MapKey, int]], lanes: int
) -> dict[MapKey, Layout]:
    """Maps that one step walks together, or that lie in one, get one pitch; maps of one size and pitch one layout."""
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
        for key in together:
            parent[find(key)] = find(together[0])
    for key, (whole, _) in within.items():
        parent[find(key)] = find(whole)
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
        below = max(0, max(1, window.stride // source.phases) * (rows_out - 1) + last - (rows_in - 1))
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
