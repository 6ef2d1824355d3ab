"""Images taken in, and copies of maps: into another number of phases, among channels of zeros, into a vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from manidp.engine.ir import FLOAT, Bool, Element, Function, Index, Offset, Piece, Pointer, Scalar
from manidp.engine.module import BYTES, IMAGE, IMAGES, STATE, WORKSPACE, Module
from manidp.engine.steps import Channels, Layout, MapKey, Step, VectorKey
from manidp.engine.walk import lines_of, mask_of, pieces_of, single

_X, _INTO, _LIST, _N = Pointer("%x"), Pointer("%into"), Pointer("%list"), Index("%n")


@dataclass(frozen=True, eq=False, repr=False)
class LoadImage(Step):
    """The image: bytes (H, W, C), which are normalised, or floats (C, H, W), as they are."""

    target: MapKey

    def maps(self) -> list[MapKey]:
        return [self.target]

    def emit(self, module: Module, f: Function) -> None:
        target = module.plan.maps[self.target]
        channels, layout = target.channels, target.layout
        size = channels * layout.height * layout.width
        into = module.map_at(f, self.target)
        floats, bytes_, after = (f.new_label("image") for _ in range(3))
        f.branch(f.make(Bool, f"icmp ne i64 {BYTES}, 0"), bytes_, floats)
        f.begin(floats)
        first, everything = f.at(IMAGES, f.scaled(IMAGE, size)), module.constant_at(f, module.plan.everything)
        f.call(module.finite(), first, size, STATE)
        f.call(_copy(module, layout.dense, layout, FLOAT, module.element), first, into, everything, channels)
        f.go(after)
        f.begin(bytes_)
        first = f.bytes_at(IMAGES, f.scaled(IMAGE, size))
        scale, shift = module.constant_at(f, module.plan.scale), module.constant_at(f, module.plan.shift)
        f.call(_normalise(module, channels, layout), first, into, scale, shift)
        f.go(after)
        f.begin(after)


@dataclass(frozen=True, eq=False, repr=False)
class Relayout(Step):
    """Copy a map into another number of phases."""

    source: MapKey
    target: MapKey
    channels: Channels

    def maps(self) -> list[MapKey]:
        return [self.target, self.source]

    def emit(self, module: Module, f: Function) -> None:
        list_, _, count = module.lists(f, self.channels)
        source, target = module.plan.maps[self.source].layout, module.plan.maps[self.target].layout
        copy = _copy(module, source, target, module.element, module.element)
        f.call(copy, module.map_at(f, self.source), module.map_at(f, self.target), list_, count)


@dataclass(frozen=True, eq=False, repr=False)
class MoveChannels(Step):
    """Channels of a map in another order, among zeros; ``places``: offset of int32s, where from, -1 for zeros."""

    source: MapKey
    target: MapKey
    channels: int
    places: int

    def maps(self) -> list[MapKey]:
        return [self.target, self.source]

    def together(self) -> list[MapKey]:
        return [self.target, self.source]

    def emit(self, module: Module, f: Function) -> None:
        source, target = module.plan.maps[self.source].layout, module.plan.maps[self.target].layout
        places_at = module.constant_at(f, self.places)
        places, one = Pointer("%places"), single(target, module.lanes)

        def write(g: Function) -> None:
            def one_channel(c: Index) -> list[Index]:
                at = g.floats.at(places, c)
                number = g.make(Piece, f"load i32, ptr {at}")
                place = g.make(Index, f"sext i32 {number} to i64")
                zeros, copied = g.new_label("zeros"), g.new_label("copied")
                into = g.at(_INTO, g.scaled(c, target.channel))
                g.branch(g.make(Bool, f"icmp slt i64 {place}, 0"), zeros, copied)
                after = g.new_label("done")
                for label in (zeros, copied):
                    g.begin(label)
                    x = g.at(_X, g.scaled(place, source.channel)) if label == copied else None

                    def one_block(block: Index, x: Pointer | None = x) -> list[Index]:
                        start = g.scaled(block, module.lanes)
                        for phase in range(target.phases**2):
                            y = g.load(g.at(x, start), phase * source.plane) if x else g.constant(0)
                            mask = mask_of(module, target, phase, one, 0).bits(g, block)
                            g.store(g.zero_unless(mask, y), g.at(into, start), phase * target.plane)
                        return []

                    g.loop(one.blocks, one_block)
                    g.go(after)
                g.begin(after)
                return []

            g.loop(_N, one_channel)

        name = module.function(("move", source, target), [_X, _INTO, places, _N], write)
        f.call(name, module.map_at(f, self.source), module.map_at(f, self.target), places_at, self.channels)


@dataclass(frozen=True, eq=False, repr=False)
class FlattenMap(Step):
    """A map as a vector, channel by channel and row by row."""

    source: MapKey
    target: VectorKey

    def maps(self) -> list[MapKey]:
        return [self.source]

    def emit(self, module: Module, f: Function) -> None:
        source = module.plan.maps[self.source]
        copy = _copy(module, source.layout, source.layout.dense, module.element, FLOAT)
        everything = module.constant_at(f, module.plan.everything)
        f.call(copy, module.map_at(f, self.source), module.vector_at(f, self.target), everything, source.channels)


@dataclass(frozen=True, eq=False, repr=False)
class ClearGaps(Step):
    """Zeros to the gaps of a map whose memory held another layout before, and to the one before its first channel."""

    target: MapKey

    def emit(self, module: Module, f: Function) -> None:
        target = module.plan.maps[self.target]
        layout, size = target.layout, module.element.size

        def write(g: Function) -> None:
            def clear(at: Pointer, elements: int) -> None:
                if elements:
                    g.clear(at, elements * size)

            def one_channel(c: Index) -> list[Index]:
                channel = g.at(_INTO, g.scaled(c, layout.channel))
                for phase in range(layout.phases**2):
                    height, width = layout.valid(phase)
                    plane = g.at(channel, phase * layout.plane)
                    if width < layout.pitch:

                        def one_row(y: Index, plane: Pointer = plane, width: int = width) -> list[Index]:
                            clear(g.at(plane, g.scaled(y, layout.pitch), width), layout.pitch - width)
                            return []

                        g.loop(height, one_row)
                    clear(g.at(plane, height * layout.pitch), layout.plane - height * layout.pitch)
                return []

            g.loop(_N, one_channel)

        name = module.function(("clear", layout), [_INTO, _N], write)
        f.call(name, module.map_at(f, self.target), target.channels)
        if target.gap:
            f.clear(f.at(WORKSPACE, target.at - target.gap), target.gap * FLOAT.size)


def _normalise(module: Module, channels: int, target: Layout) -> str:
    """The function that turns bytes (H, W, C) into a map, scaled and shifted channel by channel."""
    scales, shifts = Pointer("%scale"), Pointer("%shift")

    def write(g: Function) -> None:
        def one_channel(channel: Index) -> list[Index]:
            scale, shift = (g.floats.scalar(factors, channel) for factors in (scales, shifts))
            map_ = g.at(_INTO, g.scaled(channel, target.channel))

            def one_line(y: Index, phase_row: Index, row: Index) -> None:
                line = g.bytes_at(_X, g.scaled(y, target.width * channels), channel)
                phase = g.at(map_, g.scaled(phase_row, target.phases * target.plane), g.scaled(row, target.pitch))
                _Pixels(module, g, channels, target, line, phase, scale, shift).write()

            lines_of(g, target, one_line)
            return []

        g.loop(channels, one_channel)

    return module.function(("normalise", channels, target), [_X, _INTO, scales, shifts], write)


@dataclass(frozen=True)
class _Pixels:
    """One line of an image and one channel: from ``line``, its first byte, to ``phase``, its first element."""

    module: Module
    g: Function
    channels: int
    target: Layout
    line: Pointer
    phase: Pointer
    scale: Scalar
    shift: Scalar

    def write(self) -> None:
        if self.channels <= 4:
            pieces_of(self.g, self.target, self.module.lanes, self._some)
        else:  # one vector would have to hold too many bytes of other channels
            self.g.loop(self.target.width, self._one)

    def _some(self, first: Index, length: int) -> None:
        g, channels, phases = self.g, self.channels, self.target.phases
        piece = f"<{(length - 1) * channels + 1} x i8>"
        at = g.bytes_at(self.line, g.scaled(first, phases * channels))
        values = g.make(Piece, f"load {piece}, ptr {at}, align 1")
        for column in range(min(phases, length)):
            chosen = range(column * channels, length * channels, phases * channels)
            self._put(g.shuffle(piece, values, chosen), len(chosen), column * self.target.plane, first)

    def _one(self, x: Index) -> list[Index]:
        g = self.g
        value = g.make(Piece, f"load <1 x i8>, ptr {g.bytes_at(self.line, g.scaled(x, self.channels))}, align 1")
        column = g.remainder(x, self.target.phases)
        self._put(value, 1, g.scaled(column, self.target.plane), g.divided(x, self.target.phases))
        return []

    def _put(self, values: Piece, lanes: int, *places: Offset) -> None:
        g, element = self.g, self.module.element
        values = g.make(Piece, f"uitofp <{lanes} x i8> {values} to <{lanes} x float>")
        values = g.convert(g.scale_and_shift(values, self.scale, self.shift, lanes), FLOAT, element, lanes)
        g.put(values, g.at(self.phase, *places), element, lanes)


def _copy(module: Module, source: Layout, target: Layout, given: Element, wanted: Element) -> str:
    """The function that copies channels from few phases into more or from more into few.

    The one number of phases divides the other. ``given`` and ``wanted`` are the elements of source and target.
    """
    apart = source.phases < target.phases  # more, in whichever of the two layouts has them
    more, few = (target, source) if apart else (source, target)
    of_more, of_few = (wanted, given) if apart else (given, wanted)

    def write(g: Function) -> None:
        def one_channel(j: Index) -> list[Index]:
            channel = g.index(_LIST, j)
            x = g.at(_X, g.scaled(channel, source.channel), element=given)
            into = g.at(_INTO, g.scaled(channel, target.channel), element=wanted)
            first_few, first_more = (x, into) if apart else (into, x)
            for phase in range(few.phases**2):
                one_phase(phase, first_few, first_more)
            return []

        def one_phase(phase: int, first_few: Pointer, first_more: Pointer) -> None:
            """A phase of the few is a map that the other layout has in ``ratio`` phases."""
            ratio = more.phases // few.phases
            height, width = few.valid(phase)
            part = replace(more, height=height, width=width, phases=ratio)
            down, right = divmod(phase, few.phases)

            def one_line(y: Index, phase_row: Index, row: Index) -> None:
                line = g.at(first_few, phase * few.plane, g.scaled(y, few.pitch), element=of_few)
                plane = g.scaled(phase_row, few.phases * more.phases * more.plane)
                corner = (down * more.phases + right) * more.plane
                planes = g.at(first_more, corner, plane, g.scaled(row, more.pitch), element=of_more)

                def one_piece(first: Index, length: int) -> None:
                    at = g.at(line, g.scaled(first, ratio), element=of_few)

                    def place(column: int) -> Pointer:
                        return g.at(planes, column * few.phases * more.plane, first, element=of_more)

                    _piece(g, at, place, length, given, wanted, apart=apart, ratio=ratio)

                pieces_of(g, part, module.lanes, one_piece)

            lines_of(g, part, one_line)

        g.loop(_N, one_channel)

    return module.function(("copy", source, target, given, wanted), [_X, _INTO, _LIST, _N], write)


def _piece(
    g: Function,
    at: Pointer,
    place: Callable[[int], Pointer],
    length: int,
    given: Element,
    wanted: Element,
    *,
    apart: bool,
    ratio: int,
) -> None:
    """``length`` elements of a line at ``at``, the ratio-th ones from c on at ``place(c)``: taken apart or joined."""
    whole = f"<{length} x {wanted.name}>"
    joined = g.convert(g.get(at, given, length), given, wanted, length) if apart else Piece("poison")
    for column in range(min(ratio, length)):
        lanes = range(column, length, ratio)
        address = place(column)
        if apart:
            g.put(g.shuffle(whole, joined, lanes), address, wanted, len(lanes))
            continue
        value = g.convert(g.get(address, given, len(lanes)), given, wanted, len(lanes))
        spread = [i // ratio if i in lanes else None for i in range(length)]
        value = g.shuffle(f"<{len(lanes)} x {wanted.name}>", value, spread)
        chosen = [i + length if i in lanes else i for i in range(length)]
        joined = g.shuffle(whole, joined, chosen, value)
    if not apart:
        g.put(joined, at, wanted, length)
