"""From a plan to LLVM IR: one function that runs the whole network on a range of images.

A convolution is done block by block of neighbouring positions (the vector lanes) and, within a block, K kept outputs
at a time. The loop that takes the time is the *tile*, K outputs x V vectors of accumulators that stay in registers:

    for j in kept inputs:                  # li[j], so closed inputs cost nothing
        for each tap of the kernel:
            x[v] = V vectors of input channel li[j] at the tap's shift
            for k in K kept outputs:       # lo[k], so closed outputs cost nothing, either
                a[k][v] += weight[lo[k]][li[j]][tap] * x[v]

Weights are broadcast one by one from where they lie, so any set of channels can be skipped without packing anything.
A Winograd convolution multiplies transformed inputs instead of taps: on tiles of 4x4 outputs, 36 products make 16
outputs, not 144. ``transform`` puts the points of the kept inputs of a block into a scratch area; the products of each
point are a 1x1 convolution, done by the same tile. What tiles make goes to a scratch area, too, and ``finish`` makes
outputs from it: the inverse transform, bias, activation, gate, residual, pooled sums for the next gate, store.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from manidp.engine.ir import FLOAT, HALF, Element, Function
from manidp.engine.plan import (
    WINOGRAD,
    Channels,
    Convolve,
    Decide,
    Finish,
    FlattenMap,
    Layout,
    LoadImage,
    MapKey,
    MatVec,
    Plan,
    Pointwise,
    Relayout,
    ResetPooled,
    ScatterMap,
    Step,
    Unpool,
    Vector,
    VectorOp,
    Winograd,
    window_of,
)
from manidp.errors import UnsupportedError
from manidp.graph import Pool
from manidp.limits import Limits

Numbers = NDArray[np.int64]
Lanes = NDArray[np.bool_]


@dataclass(frozen=True)
class Isa:
    """A vector instruction set: elements in a register, number of registers, LLVM's names for its features.

    ``permutes``: it puts together any lanes of two vectors in one instruction. ``element``: what maps and
    convolutions are computed in; pooled sums, gates and linear layers are always float32. ``emulates``: it has no
    arithmetic for such elements, so that each operation is done in float32 and rounded; slow, but shows the results.
    """

    name: str
    lanes: int
    registers: int
    features: tuple[str, ...]
    permutes: bool = False
    element: Element = FLOAT
    emulates: bool = False


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "bmi2")
ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512", 16, 32, _AVX512, True),
        Isa("avx2", 8, 16, ("avx2", "fma", "bmi2")),
        Isa("sse", 4, 16, ("sse4.1",)),
        Isa("neon", 4, 32, ("neon",)),
        Isa("avx512fp16", 32, 32, (*_AVX512, "avx512fp16"), True, HALF),
        Isa("neonfp16", 8, 32, ("neon", "fullfp16"), False, HALF),
        Isa("avx512f16c", 32, 32, (*_AVX512, "f16c"), True, HALF, True),
        Isa("avx2f16c", 16, 16, ("avx2", "fma", "bmi2", "f16c"), False, HALF, True),
    )
}


@dataclass(frozen=True)
class Tile:
    """At most ``outputs`` x ``vectors`` sums; the map is walked in ``blocks`` blocks of that many vectors."""

    outputs: int
    vectors: int
    blocks: int

    @property
    def least(self) -> int:
        """Outputs of the smallest tile there is code for; more than one tile's are split evenly, so few need less."""
        return (self.outputs + 1) // 2


def tile_shape(positions: int, most_outputs: int, isa: Isa) -> Tile:
    """The tile that needs fewest cycles at two multiply-adds and two loads a cycle, padding of blocks counted."""
    best: tuple[float, Tile] | None = None
    needed = -(-positions // isa.lanes)
    for vectors in range(1, 9):
        outputs = min((isa.registers - 2 - vectors) // vectors, most_outputs)
        if outputs < 1:
            continue
        blocks = -(-needed // vectors)
        multiplied, loaded = outputs * vectors, outputs + vectors + 1
        cost = max(multiplied, loaded) / multiplied * blocks * vectors / needed + 0.5 / multiplied + 0.02 * vectors
        if best is None or cost < best[0]:
            best = cost, Tile(outputs, vectors, blocks)
    assert best is not None
    return best[1]


@dataclass(frozen=True)
class _Group:
    """What the code for one group of a convolution depends on, layouts aside."""

    inputs: int
    outputs: int
    row: int
    kernel: int
    padding: int
    winograd: int
    tile: Tile
    lanes: int

    @property
    def geometry(self) -> _Group:
        """The same without what most functions are told when called: how many channels, how far apart their weights."""
        return replace(self, inputs=0, outputs=0, row=0)

    @property
    def block(self) -> int:
        """Positions in a block."""
        return self.tile.vectors * self.lanes

    @property
    def way(self) -> Winograd:
        return WINOGRAD[self.winograd]

    @property
    def points(self) -> int:
        """Products that tiles make of each output and position."""
        return self.way.points**2 if self.winograd else 1

    @property
    def channel(self) -> int:
        """Elements of scratch for one channel of a block, what Winograd transformed or what tiles made.

        An odd number of vectors, so that neighbouring channels do not fall into the same lines of the cache.
        """
        return (self.points * self.tile.vectors | 1) * self.lanes

    @property
    def transformed(self) -> int:
        """Elements of scratch for the transformed inputs."""
        return self.inputs * self.channel if self.winograd else 0


@dataclass(frozen=True)
class Mask:
    """Lanes of a block's vector: ``lanes`` if they are the same in all blocks (None: all lanes), else a table."""

    lanes: tuple[bool, ...] | None = None
    table: str = ""

    @property
    def word(self) -> int:
        """A bit a lane, the first lane lowest."""
        return sum(lane << place for place, lane in enumerate(self.lanes or ()))

    def __call__(self, f: Function, block: str) -> str | None:
        """The mask as a value, None for all lanes."""
        if self.table:
            integer = f"i{max(8, f.lanes)}"
            word = f(f"load {integer}, ptr {f(f'getelementptr {integer}, ptr {self.table}, i64 {block}')}")
            return _mask_of(f, word, integer)
        return None if self.lanes is None else f"<{', '.join(f'i1 {int(lane)}' for lane in self.lanes)}>"


def _mask_of(f: Function, word: str, integer: str) -> str:
    """The lanes whose bits are set in an integer of this type."""
    if integer != f"i{f.lanes}":
        word = f(f"trunc {integer} {word} to i{f.lanes}")
    return f(f"bitcast i{f.lanes} {word} to <{f.lanes} x i1>")


_PART = 64  # steps in one function: LLVM's time grows with the square of a function's length
_TILE = (
    "ptr %x, ptr %weights, ptr %li, i64 %ni, ptr %lo, i64 %no, ptr %products, i64 %block, i64 %row, i64 %stride, "
    "i64 %channel, i64 %points, i64 %step, ptr %table"
)


class Generator:
    """Writes the module for a plan: ``text`` is LLVM IR, ``workspace`` the floats that one call needs.

    Raises UnsupportedError beyond the limits of code and workspace (``manidp.limits``).
    """

    def __init__(self, plan: Plan, isa: Isa) -> None:
        self.plan, self.isa, self.lanes, self.element = plan, isa, isa.lanes, isa.element
        self.names: dict[object, str] = {}  # what a function does -> its name
        self.functions: list[str] = []
        self.tables: dict[str, str] = {}  # constant arrays: contents -> name
        places = itertools.accumulate(plan.graph.gate_channels.values(), initial=0)
        self.gates = dict(zip(plan.graph.gate_channels, places, strict=False))
        self.limits = Limits.from_environment()
        self.size = 0  # characters of code so far
        self.scratch = 0  # floats behind the plan's own workspace, shared by all convolutions
        main = self._main()
        v, n = f"<{self.lanes} x float>", self.lanes
        kinds = {element: f"<{n} x {element.name}>" for element in (FLOAT, self.element)}
        width = 8 * self.element.size * n
        self.text = "\n".join(
            [
                *(f"declare {w} @llvm.fmuladd.v{n}{e.suffix}({w}, {w}, {w})" for e, w in kinds.items()),
                *(
                    f"declare void @llvm.masked.store.v{n}{e.suffix}.p0({w}, ptr, i32, <{n} x i1>)"
                    for e, w in kinds.items()
                ),
                f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, {v})",
                f"declare float @llvm.vector.reduce.fmax.v{n}f32({v})",
                "declare i64 @llvm.umin.i64(i64, i64)",
                "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)",
                *(f"{name} = internal constant {values}" for values, name in self.tables.items()),
                *self.functions,
                main,
                f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" "min-legal-vector-width"="{width}" }}',
            ]
        )
        self.workspace = plan.workspace + self.scratch
        self.limits.check("workspace_bytes", 4 * self.workspace, "the network", UnsupportedError)

    def _shared(
        self, key: object, arguments: str, write: Callable[[Function], None], element: Element | None = None
    ) -> str:
        """Name of the function that ``key`` stands for, written when first asked for.

        Its vectors are of ``element``, by default of what maps are made of.
        """
        if key not in self.names:
            self.names[key] = f"f{len(self.names)}"
            function = Function(
                self.names[key],
                arguments,
                lanes=self.lanes,
                element=element or self.element,
            )
            write(function)
            self.functions.append(function.text())
            self._count(self.functions[-1])
        return self.names[key]

    def _count(self, code: str) -> None:
        self.size += len(code)
        self.limits.check("code", self.size, "the network", UnsupportedError)

    # The network

    def _main(self) -> str:
        f = Function(
            "run",
            "ptr %images, i64 %bytes, ptr %results, ptr %state, i64 %count, ptr %k, ptr %w",
            lanes=self.lanes,
            linkage="dso_local",
        )
        graph, steps = self.plan.graph, self.plan.steps
        f.do("br label %take")
        f.begin("take")
        image = f("atomicrmw add ptr %state, i64 1 monotonic")
        f.do(f"br i1 {f(f'icmp slt i64 {image}, %count')}, label %work, label %done")
        f.begin("work")
        logits = f.at("%results", f.scaled(image, graph.num_classes + sum(graph.gate_channels.values())))
        gates = f.at(logits, graph.num_classes)
        for first in range(0, len(steps), _PART):
            part = self._part(steps[first : first + _PART])
            f.do(f"call void @{part}(ptr %images, i64 %bytes, i64 {image}, ptr {gates}, ptr %state, ptr %w, ptr %k)")
        f.copy(self._vector(f, Vector(graph.output)), logits, graph.num_classes)
        f.do(f"call void @{self._check()}(ptr {logits}, i64 {graph.num_classes}, ptr %state)")
        f.do("br label %take")
        f.begin("done")
        return f.text()

    def _part(self, steps: Sequence[Step]) -> str:
        """The function that does some steps for one image; ``gates`` of the image lie one after the other."""

        def write(f: Function) -> None:
            for step in steps:
                match step:
                    case LoadImage():
                        self._load_image(f, step)
                    case Relayout():
                        self._relayout(f, step)
                    case ScatterMap():
                        self._scatter(f, step)
                    case FlattenMap():
                        self._flatten(f, step)
                    case Convolve():
                        self._convolve(f, step)
                    case Pointwise():
                        self._pointwise(f, step)
                    case ResetPooled():
                        self._reset(f, step)
                    case Unpool():
                        self._unpool(f, step)
                    case MatVec():
                        self._matvec(f, step)
                    case VectorOp():
                        self._vector_op(f, step)
                    case Decide():
                        self._decide(f, step)

        arguments = "ptr %images, i64 %bytes, i64 %image, ptr %gates, ptr %state, ptr %w, ptr %k"
        return self._shared(steps, arguments, write, FLOAT)

    def _check(self) -> str:
        """The function that notes in the state if a number is not finite, i.e. if all bits of its exponent are set."""
        integers, exponent = f"<{self.lanes} x i32>", 0x7F800000
        every = f"<{', '.join([f'i32 {exponent}'] * self.lanes)}>"

        def write(g: Function) -> None:
            def one_vector(index: str, found: str) -> list[str]:
                bits = g(f"load {integers}, ptr {g.at('%x', g.scaled(index, self.lanes))}, align 4")
                set_ = g(f"icmp eq {integers} {g(f'and {integers} {bits}, {every}')}, {every}")
                return [g(f"or <{self.lanes} x i1> {found}, {set_}")]

            def one_more(index: str, found: str) -> list[str]:
                bits = g(f"load i32, ptr {g.at('%x', whole, index)}, align 4")
                set_ = g(f"icmp eq i32 {g(f'and i32 {bits}, {exponent}')}, {exponent}")
                return [g(f"or i1 {found}, {set_}")]

            vectors = g(f"udiv i64 %n, {self.lanes}")
            whole = g.scaled(vectors, self.lanes)
            (lanes,) = g.loop(vectors, one_vector, (f"<{self.lanes} x i1>", "zeroinitializer"))
            any_ = g(f"icmp ne i{self.lanes} {g(f'bitcast <{self.lanes} x i1> {lanes} to i{self.lanes}')}, 0")
            (bad,) = g.loop(g(f"sub i64 %n, {whole}"), one_more, ("i1", any_))
            g.do(f"br i1 {bad}, label %note, label %fine")
            g.begin("note")
            g.do(f"store atomic i64 1, ptr {g('getelementptr i64, ptr %state, i64 1')} monotonic, align 8")
            g.do("br label %fine")
            g.begin("fine")

        return self._shared("check", "ptr %x, i64 %n, ptr %state", write, FLOAT)

    def _map(self, f: Function, key: MapKey) -> str:
        return f.at("%w", self.plan.maps[key].at)

    def _vector(self, f: Function, vector: Vector) -> str:
        return f.at("%w", self.plan.vectors[vector])

    def _list(self, f: Function, channels: Channels) -> tuple[str, str, str]:
        """The int32 numbers of the channels, how many of them lie below each channel, how many there are."""
        if channels.gate is None:
            everything = f.at("%k", self.plan.everything)
            return everything, everything, str(channels.count)
        kept = self._vector(f, Vector(channels.gate, "list"))
        below = f.at(kept, channels.count)
        number = f.index(below, channels.count)
        if channels.closed:
            return f.at(kept, number), below, f(f"sub i64 {channels.count}, {number}")
        return kept, below, number

    # Convolution

    def _convolve(self, f: Function, step: Convolve) -> None:
        node, window, finish = step.node, window_of(step.node), step.finish
        source, frame = self.plan.maps[step.source].layout, self.plan.maps[finish.frame].layout
        outputs = node.channels // node.groups
        most = min(outputs, 10 if step.winograd else 6)
        group = _Group(
            inputs=step.inputs.count // node.groups,
            outputs=outputs,
            row=step.row,
            kernel=window.kernel,
            padding=window.padding,
            winograd=step.winograd,
            tile=tile_shape(frame.rows * frame.pitch, most, self.isa),
            lanes=self.lanes,
        )
        products = (outputs + group.tile.outputs) * group.channel
        self.scratch = max(self.scratch, (group.transformed + products) * self.element.size // 4)
        operands = self._operands(f, finish)
        extra = "".join(f", ptr %p{i}" for i in range(len(operands)))
        arguments = f"ptr %x, ptr %weights, ptr %bias, ptr %li, i64 %ni, ptr %lo, i64 %no, ptr %scratch{extra}"
        key = (group, source, frame, _signature(finish))
        name = self._shared(key, arguments, lambda g: self._write_group(g, group, source, frame, finish, extra))
        li, below_in, ni = self._list(f, step.inputs)
        lo, below_out, no = self._list(f, step.outputs)
        x, weights, bias = self._map(f, step.source), f.at("%k", step.weights), f.at("%k", step.bias)
        rest = f"ptr {f.at('%w', self.plan.workspace)}{''.join(f', ptr {operand}' for operand in operands)}"

        def one_group(index: str) -> list[str]:
            following = f(f"add i64 {index}, 1")
            first_in = f.index(below_in, f.scaled(index, group.inputs))
            first_out = f.index(below_out, f.scaled(index, group.outputs))
            these_in = f(f"sub i64 {f.index(below_in, f.scaled(following, group.inputs))}, {first_in}")
            these_out = f(f"sub i64 {f.index(below_out, f.scaled(following, group.outputs))}, {first_out}")
            # the list counts inputs from the first group's first, a row of weights counts from its own group's first
            own = f(f"getelementptr {self.element.name}, ptr {weights}, i64 {f.scaled(index, -group.row)}")
            f.do(f"call void @{name}(ptr {x}, ptr {own}, ptr {bias}, ptr {f.at(li, first_in)}, i64 {these_in}, "
                 f"ptr {f.at(lo, first_out)}, i64 {these_out}, {rest})")  # fmt: skip
            return []

        if node.groups > 1:
            f.loop(node.groups, one_group)
        else:
            f.do(f"call void @{name}(ptr {x}, ptr {weights}, ptr {bias}, ptr {li}, i64 {ni}, "
                 f"ptr {lo}, i64 {no}, {rest})")  # fmt: skip

    def _write_group(
        self, g: Function, group: _Group, source: Layout, frame: Layout, finish: Finish, extra: str
    ) -> None:
        """Block by block, and in each block the outputs in tiles of as even a size as can be."""
        tiles = g(f"udiv i64 {g(f'add i64 %no, {group.tile.outputs - 1}')}, {group.tile.outputs}")
        products = g.at("%scratch", group.transformed)
        multiply, table = self._tiles(group, source, frame)
        finishing = self._finish(group, frame, finish, extra)
        x, stride = ("%scratch", group.channel) if group.winograd else ("%x", source.channel)

        def one_block(block: str) -> list[str]:
            if group.winograd:
                transform = self._transform(group, source, frame)
                g.do(f"call void @{transform}(ptr %x, ptr %scratch, ptr %li, i64 %ni, i64 {block})")

            def one_tile(index: str) -> list[str]:
                first = g(f"udiv i64 {g.scaled(index, '%no')}, {tiles}")
                end = g(f"udiv i64 {g.scaled(g(f'add i64 {index}, 1'), '%no')}, {tiles}")
                outputs = f"ptr {g.floats.at('%lo', first)}, i64 {g(f'sub i64 {end}, {first}')}"
                into = g.at(products, g.scaled(first, group.channel))
                g.do(f"call void @{multiply}(ptr {x}, ptr %weights, ptr %li, i64 %ni, {outputs}, ptr {into}, "
                     f"i64 {0 if group.winograd else block}, i64 {group.row}, i64 {stride}, "
                     f"i64 {group.channel}, i64 {group.points}, i64 {group.inputs}, ptr {table})")  # fmt: skip
                return []

            g.loop(tiles, one_tile)
            g.do(f"call void @{finishing}(ptr {products}, ptr %bias, ptr %lo, i64 %no, i64 {block}{extra})")
            return []

        g.loop(group.tile.blocks, one_block)

    def _tiles(self, group: _Group, source: Layout, frame: Layout) -> tuple[str, str]:
        """The function that picks the tile for a number of outputs, and the table that it is to be called with.

        In the table lie the places of the kernel's lines and taps and the masks of the taps, where these are the same
        for all blocks: so layers that differ in nothing else share their tiles.
        """
        tile, kernel = group.tile, 1 if group.winograd else group.kernel
        lines, taps = [0], [(0, [Mask()] * tile.vectors)]  # a point of a Winograd convolution is a 1x1 convolution
        if not group.winograd:
            lines = [self._tap(source, frame, tile, u - group.padding, 0)[0] for u in range(kernel)]
            taps = [self._tap(source, frame, tile, 0, v - group.padding) for v in range(kernel)]
        places = [*lines, *(offset for offset, _ in taps)]
        masks = [mask for _, these in taps for mask in these]
        words = [mask.word for mask in masks if mask.lanes]
        table = self._table("i64", [*places, *words]) if any(places) or words else "null"
        unknown = tuple((mask.lanes and "in the table") or mask.table for mask in masks)
        key = ("tile", bool(group.winograd), tile.outputs, tile.vectors, kernel, any(places), unknown)

        def write(g: Function) -> None:
            arms = {n: g.new_label("tile") for n in range(tile.least, tile.outputs + 1)}
            cases = " ".join(f"i64 {n}, label %{arm}" for n, arm in arms.items())
            g.do(f"switch i64 %no, label %{arms[tile.least]} [{cases}]")
            for n, arm in arms.items():
                g.begin(arm)
                one = self._tile(tile, n, kernel, masks, apart=any(places), packed=bool(group.winograd))
                g.do(f"call void @{self._shared((*key, n), _TILE, one)}(ptr %x, ptr %weights, ptr %li, i64 %ni, "
                     "ptr %lo, i64 %no, ptr %products, i64 %block, i64 %row, i64 %stride, i64 %channel, "
                     "i64 %points, i64 %step, ptr %table)")  # fmt: skip
                g.do("br label %after")
            g.begin("after")

        return self._shared(key, _TILE, write), table

    def _tile(
        self, tile: Tile, outputs: int, kernel: int, masks: list[Mask], *, apart: bool, packed: bool
    ) -> Callable[[Function], None]:
        """Writes the function that multiplies and adds: ``outputs`` of a block, from all kept inputs, at each point.

        ``masks`` are those of the first tap's vectors, then of the second's, ... ``apart``: taps lie at the places in
        %table, else all in one. ``packed``: kept inputs lie one after the other, as ``_transform`` leaves them, not
        where their numbers say.
        """
        lanes, vectors = self.lanes, tile.vectors

        def write(g: Function) -> None:
            def number(position: str | int) -> str:
                return g(f"load i64, ptr {g(f'getelementptr i64, ptr %table, i64 {position}')}")

            rows = self._rows_of_weights(g, tile, outputs)
            start = g.at("%x", g.scaled("%block", vectors * lanes))
            offsets = [number(kernel + t) if apart else "0" for t in range(kernel)]
            words = iter(range(2 * kernel, 2 * kernel + len(masks)))
            shown = [_mask_of(g, number(next(words)), "i64") if mask.lanes else mask(g, "%block") for mask in masks]

            def one_point(point: str) -> list[str]:
                here, at_point = g.scaled(point, vectors * lanes), g.scaled(point, "%step")

                def one_input(j: str, *sums: str) -> list[str]:
                    i = g.index("%li", j)
                    x = g.at(start, here, g.scaled(j if packed else i, "%stride"))

                    def one_line(u: str, *sums: str) -> list[str]:
                        line = g.at(x, number(u)) if apart else x
                        first = g(f"add i64 {g.scaled(i, kernel**2)}, {g.scaled(u, kernel)}")
                        first = g(f"add i64 {at_point}, {first}")
                        totals = list(sums)
                        for t, offset in enumerate(offsets):
                            tap = g.at(line, offset)
                            values = [
                                g.zero_unless(mask, g.load(tap, v * lanes))
                                for v, mask in enumerate(shown[t * vectors : (t + 1) * vectors])
                            ]
                            for k in range(outputs):
                                weight = g.splat(g.scalar(g.at(rows[k], first), t))
                                for v, value in enumerate(values):
                                    totals[k * vectors + v] = g.fma(value, weight, totals[k * vectors + v])
                        return totals

                    return g.loop(kernel, one_line, *((g.vector, total) for total in sums))

                zeros = [(g.vector, "zeroinitializer")] * (outputs * vectors)
                for at, total in enumerate(g.loop("%ni", one_input, *zeros)):
                    k, v = divmod(at, vectors)
                    g.store(total, g.at("%products", g.scaled("%channel", k), here), v * lanes)
                return []

            g.loop("%points", one_point)

        return write

    def _rows_of_weights(self, g: Function, tile: Tile, outputs: int) -> list[str]:
        """Pointers to the weights of the outputs of a tile; one that is not full does its last output again."""
        positions: list[str | int] = list(range(outputs))
        if outputs == tile.least:
            last = g("sub i64 %no, 1")
            positions = [g(f"call i64 @llvm.umin.i64(i64 {last}, i64 {k})") for k in positions]
        return [g.at("%weights", g.scaled(g.index("%lo", position), "%row")) for position in positions]

    def _transform(self, group: _Group, source: Layout, frame: Layout) -> str:
        """The function that makes bt d bt' of every kept input, d the inputs around a tile's outputs.

        It goes by pairs of columns, as many as the registers hold.
        """
        way, size = group.way, range(group.way.points)
        arguments = "ptr %x, ptr %into, ptr %li, i64 %ni, i64 %block"

        def write(g: Function) -> None:
            def one_input(k: str) -> list[str]:
                map_ = g.at("%x", g.scaled(g.index("%li", k), source.channel))
                channel = g.at("%into", g.scaled(k, group.channel))

                def one_vector(v: str, block: str) -> None:
                    x, into = g.at(map_, g.scaled(block, self.lanes)), g.at(channel, g.scaled(v, self.lanes))
                    for first in range(0, way.points, 2):
                        pair = way.bt[first : first + 2]
                        used = [j for j in size if any(row[j] for row in pair)]
                        of_pair = [[row[j] for j in used] for row in pair]
                        d = [[self._neighbour(g, x, block, source, frame, i - 1, j - 1) for j in used] for i in size]
                        columns = zip(*(g.multiply(of_pair, row) for row in d), strict=True)
                        for column, values in enumerate(columns, first):
                            for point, value in enumerate(g.multiply(way.bt, values)):
                                g.store(value, into, (column * way.points + point) * group.block)

                _vectors(g, group.tile, _single(frame, self.lanes), one_vector)
                return []

            g.loop("%ni", one_input)

        return self._shared(("transform", group.geometry, source, frame), arguments, write)

    def _tap(self, source: Layout, frame: Layout, tile: Tile, down: int, right: int) -> tuple[int, list[Mask]]:
        """Where the elements ``down`` and ``right`` of the block's own lie, and the lanes that do not wrap around."""
        (row_phase, rows), (column_phase, columns) = source.reach(down), source.reach(right)

        def same_row(_: Numbers, column: Numbers) -> Lanes:
            return _within(column + columns, source.pitch)

        masks = [self._mask(frame, 0, tile, v, same_row) for v in range(tile.vectors)]
        phase = row_phase * source.phases + column_phase
        return phase * source.plane + rows * source.pitch + columns, masks

    def _neighbour(self, g: Function, x: str, block: str, source: Layout, frame: Layout, down: int, right: int) -> str:
        """The elements ``down`` and ``right`` of those of a block of one vector, zeros outside the map."""
        tile = _single(frame, self.lanes)
        offset, (same_row,) = self._tap(source, frame, tile, down, right)
        (_, rows), (_, columns) = source.reach(down), source.reach(right)

        def inside(row: Numbers, column: Numbers) -> Lanes:
            return _within(row + rows, source.rows) & _within(column + columns, source.pitch)

        mask = self._mask(frame, 0, tile, 0, inside)
        if mask.table:
            mask = same_row  # what lies above and below the map is zero anyway
        before, shift = divmod(offset, self.lanes)
        if not shift or not self.isa.permutes or mask.table:
            return g.zero_unless(mask(g, block), g.load(x, offset))
        # loads that cross cache lines are slow: put the lanes together from aligned vectors
        kept = mask.lanes or (True,) * self.lanes
        lanes = [shift + lane if kept[lane] else None for lane in range(self.lanes)]
        sides = [any(lane is not None and (lane >= self.lanes) == side for lane in lanes) for side in (False, True)]
        low, high = (g.load(x, (before + side) * self.lanes) if sides[side] else "poison" for side in range(2))
        return g.zero_unless(mask(g, block), g.shuffle(g.vector, low, lanes, high))

    def _finish(self, group: _Group, frame: Layout, finish: Finish, extra: str) -> str:
        """The function that makes outputs of a block from what tiles made, and does what follows."""
        tile = _single(frame, self.lanes)

        def write(g: Function) -> None:
            def one_output(k: str) -> list[str]:
                channel = g.index("%lo", k)
                bias = g.splat_float("%bias", channel)
                products = g.at("%products", g.scaled(k, group.channel))

                def one_vector(v: str, block: str) -> None:
                    element = _Element(self, g, frame, finish, channel, g.scaled(block, self.lanes))
                    here = g.at(products, g.scaled(v, self.lanes))
                    y = [g.load(here, n * group.block) for n in range(group.points)]
                    if group.winograd:
                        at, size = group.way.at, group.way.points
                        columns = [g.multiply(at, y[first : first + size]) for first in range(0, size**2, size)]
                        y = [value for row in zip(*columns, strict=True) for value in g.multiply(at, row)]
                    for phase, value in enumerate(y):
                        element.make(phase, block, g.arithmetic("fadd", value, bias))
                    element.pool()

                _vectors(g, group.tile, tile, one_vector)
                return []

            g.loop("%no", one_output)

        arguments = f"ptr %products, ptr %bias, ptr %lo, i64 %no, i64 %block{extra}"
        return self._shared(("finish", group.geometry, frame, _signature(finish)), arguments, write)

    # What follows a computed value

    def _operands(self, f: Function, finish: Finish) -> list[str]:
        """Pointers that a finishing function takes: those of the operations, of the stored map, of pooled sums."""
        pointers = []
        for op in finish.ops:
            match op.operand:
                case MapKey() as key:
                    pointers.append(self._map(f, key))
                case Vector() as vector:
                    pointers.append(self._vector(f, vector))
                case int(offset):
                    pointers.append(f.at("%k", offset))
        if finish.stored:
            frame = self.plan.maps[finish.frame].layout
            first = finish.first_channel * frame.channel
            pointers.append(f.at(self._map(f, finish.frame), first, element=self.element))
        for sums in finish.pooled:
            pointers.append(f.at(self._vector(f, sums), finish.first_channel * self.lanes))
        return pointers

    def _pointwise(self, f: Function, step: Pointwise) -> None:
        """Channel by channel, vector by vector: zeros, a map or its windows, then what follows."""
        frame, finish, pool = self.plan.maps[step.finish.frame].layout, step.finish, step.pool
        source = self.plan.maps[step.source].layout if step.source else None
        operands = self._operands(f, finish)
        extra = "".join(f", ptr %p{i}" for i in range(len(operands)))
        tile = _single(frame, self.lanes)

        def write(g: Function) -> None:
            def one_channel(j: str) -> list[str]:
                channel = g.index("%list", j)
                x = g.at("%x", g.scaled(channel, source.channel)) if source else ""

                def one_block(block: str) -> list[str]:
                    start = g.scaled(block, self.lanes)
                    element = _Element(self, g, frame, finish, channel, start)
                    for phase in range(frame.phases**2):
                        if source is None:
                            y = g.constant(0)
                        elif pool:
                            y = self._window(g, source, frame, tile, pool, g.at(x, start), block)
                        else:
                            y = g.load(g.at(x, start), phase * source.plane)
                        element.make(phase, block, y)
                    element.pool()
                    return []

                g.loop(tile.blocks, one_block)
                return []

            g.loop("%n", one_channel)

        window = pool and (pool.kind, pool.kernel, pool.stride, pool.padding)
        key = ("pointwise", source, window, frame, _signature(finish))
        name = self._shared(key, f"ptr %x, ptr %list, i64 %n{extra}", write)
        list_, _, count = self._list(f, step.channels)
        x = self._map(f, step.source) if step.source else "null"
        f.do(f"call void @{name}(ptr {x}, ptr {list_}, i64 {count}{''.join(f', ptr {o}' for o in operands)})")

    def _window(self, g: Function, source: Layout, frame: Layout, tile: Tile, pool: Pool, x: str, block: str) -> str:
        """Maximum or average of the windows at a vector of positions."""
        total, w = "", window_of(pool)
        for u in range(w.kernel):
            for v in range(w.kernel):
                down, right = u - w.padding, v - w.padding
                offset, (mask,) = self._tap(source, frame, tile, down, right)

                def inside(row: Numbers, column: Numbers, down: int = down, right: int = right) -> Lanes:
                    y, x = row * w.stride + down, column * w.stride + right
                    return _within(y, source.height) & _within(x, source.width)

                value = g.load(x, offset)
                if pool.kind == "max":
                    mask, value = self._mask(frame, 0, tile, 0, inside), g.spoil(value)
                lanes = mask(g, block)
                if lanes is not None:
                    value = g.select(lanes, value, g.constant(-np.inf if pool.kind == "max" else 0))
                if not total:
                    total = value
                else:
                    total = g.maximum(total, value) if pool.kind == "max" else g.arithmetic("fadd", total, value)
        return total if pool.kind == "max" else g.arithmetic("fmul", total, g.constant(1 / w.kernel**2))

    def _mask(
        self, frame: Layout, phase: int, tile: Tile, vector: int, valid: Callable[[Numbers, Numbers], Lanes] | None
    ) -> Mask:
        """The lanes of a block's vector for which ``valid(rows, columns)`` holds; those outside the map do not matter.

        With ``valid`` None, those that are inside the map.
        """
        height, width = frame.valid(phase)
        first = np.arange(tile.blocks)[:, None] * tile.vectors + vector
        row, column = np.divmod(first * self.lanes + np.arange(self.lanes), frame.pitch)
        inside = (row < height) & (column < width)
        set_, cleared = inside, ~inside
        if valid is not None:
            holds = valid(row, column)
            set_, cleared = inside & holds, inside & ~holds
        ever_set, ever_cleared = np.any(set_, axis=0), np.any(cleared, axis=0)
        if not ever_cleared.any():
            return Mask()
        if not (ever_set & ever_cleared).any():
            return Mask(tuple(not lane for lane in ever_cleared.tolist()))
        integer = f"i{max(8, self.lanes)}"
        return Mask(table=self._table(integer, (~cleared @ (1 << np.arange(self.lanes))).tolist()))

    def _table(self, integer: str, numbers: Sequence[int]) -> str:
        """Name of the constant array of these numbers."""
        values = ", ".join(f"{integer} {number}" for number in numbers)
        contents = f"[{len(numbers)} x {integer}] [{values}]"
        if contents not in self.tables:
            self._count(contents)
            self.tables[contents] = f"@table{len(self.tables)}"
        return self.tables[contents]

    # Images and copies from one layout into another

    def _load_image(self, f: Function, step: LoadImage) -> None:
        """Bytes (H, W, C), normalised here, or floats (C, H, W), as they are."""
        target = self.plan.maps[step.target]
        channels, layout = target.channels, target.layout
        size = channels * layout.height * layout.width
        into = self._map(f, step.target)
        floats, bytes_, after = (f.new_label("image") for _ in range(3))
        f.do(f"br i1 {f('icmp ne i64 %bytes, 0')}, label %{bytes_}, label %{floats}")
        f.begin(floats)
        first, everything = f.at("%images", f.scaled("%image", size)), f.at("%k", self.plan.everything)
        f.do(f"call void @{self._check()}(ptr {first}, i64 {size}, ptr %state)")
        copy = self._copy(_dense(layout), layout, FLOAT, self.element)
        f.do(f"call void @{copy}(ptr {first}, ptr {into}, ptr {everything}, i64 {channels})")
        f.do(f"br label %{after}")
        f.begin(bytes_)
        first = f.bytes_at("%images", f.scaled("%image", size))
        scale, shift = f.at("%k", self.plan.scale), f.at("%k", self.plan.shift)
        f.do(f"call void @{self._normalise(channels, layout)}(ptr {first}, ptr {into}, ptr {scale}, ptr {shift})")
        f.do(f"br label %{after}")
        f.begin(after)

    def _normalise(self, channels: int, target: Layout) -> str:
        def write(g: Function) -> None:
            def one_channel(channel: str) -> list[str]:
                scale, shift = (g.floats.scalar(factor, channel) for factor in ("%scale", "%shift"))
                map_ = g.at("%into", g.scaled(channel, target.channel))

                def one_line(y: str, phase_row: str, row: str) -> None:
                    line = g.bytes_at("%x", g.scaled(y, target.width * channels), channel)
                    phase = g.at(map_, g.scaled(phase_row, target.phases * target.plane), g.scaled(row, target.pitch))

                    def put(values: str, lanes: int, *places: str | int) -> None:
                        values = g(f"uitofp <{lanes} x i8> {values} to <{lanes} x float>")
                        values = g.convert(g.scale_and_shift(values, scale, shift, lanes), FLOAT, self.element, lanes)
                        g.put(values, g.at(phase, *places), self.element, lanes)

                    def some_pixels(first: str, length: int) -> None:
                        piece = f"<{(length - 1) * channels + 1} x i8>"
                        at = g.bytes_at(line, g.scaled(first, target.phases * channels))
                        values = g(f"load {piece}, ptr {at}, align 1")
                        for column in range(min(target.phases, length)):
                            chosen = range(column * channels, length * channels, target.phases * channels)
                            put(g.shuffle(piece, values, chosen), len(chosen), column * target.plane, first)

                    def one_pixel(x: str) -> list[str]:
                        value = g(f"load <1 x i8>, ptr {g.bytes_at(line, g.scaled(x, channels))}, align 1")
                        column = g(f"urem i64 {x}, {target.phases}")
                        put(value, 1, g.scaled(column, target.plane), g(f"udiv i64 {x}, {target.phases}"))
                        return []

                    if channels <= 4:
                        _pieces(g, target, self.lanes, some_pixels)
                    else:  # one vector would have to hold too many bytes of other channels
                        g.loop(target.width, one_pixel)

                _lines(g, target, one_line)
                return []

            g.loop(channels, one_channel)

        return self._shared(("normalise", channels, target), "ptr %x, ptr %into, ptr %scale, ptr %shift", write)

    def _relayout(self, f: Function, step: Relayout) -> None:
        list_, _, count = self._list(f, step.channels)
        source, target = self.plan.maps[step.source].layout, self.plan.maps[step.target].layout
        copy = self._copy(source, target, self.element, self.element)
        x, into = self._map(f, step.source), self._map(f, step.target)
        f.do(f"call void @{copy}(ptr {x}, ptr {into}, ptr {list_}, i64 {count})")

    def _scatter(self, f: Function, step: ScatterMap) -> None:
        source, target = self.plan.maps[step.source].layout, self.plan.maps[step.target].layout
        list_ = f.at("%k", step.places)
        one = _single(target, self.lanes)

        def write(g: Function) -> None:
            def one_channel(c: str) -> list[str]:
                at = g.floats.at("%places", c)
                place = g(f"sext i32 {g(f'load i32, ptr {at}')} to i64")
                zeros, copied = g.new_label("zeros"), g.new_label("copied")
                into = g.at("%into", g.scaled(c, target.channel))
                g.do(f"br i1 {g(f'icmp slt i64 {place}, 0')}, label %{zeros}, label %{copied}")
                after = g.new_label("done")
                for label in (zeros, copied):
                    g.begin(label)
                    x = g.at("%x", g.scaled(place, source.channel)) if label == copied else ""

                    def one_block(block: str, x: str = x) -> list[str]:
                        start = g.scaled(block, self.lanes)
                        for phase in range(target.phases**2):
                            y = g.load(g.at(x, start), phase * source.plane) if x else g.constant(0)
                            mask = self._mask(target, phase, one, 0, None)(g, block)
                            g.store(y, g.at(into, start), phase * target.plane, mask)
                        return []

                    g.loop(one.blocks, one_block)
                    g.do(f"br label %{after}")
                g.begin(after)
                return []

            g.loop("%n", one_channel)

        name = self._shared(("scatter", source, target), "ptr %x, ptr %into, ptr %places, i64 %n", write)
        f.do(f"call void @{name}(ptr {self._map(f, step.source)}, ptr {self._map(f, step.target)}, ptr {list_}, "
             f"i64 {step.channels})")  # fmt: skip

    def _flatten(self, f: Function, step: FlattenMap) -> None:
        source = self.plan.maps[step.source]
        copy = self._copy(source.layout, _dense(source.layout), self.element, FLOAT)
        everything = f.at("%k", self.plan.everything)
        f.do(f"call void @{copy}(ptr {self._map(f, step.source)}, ptr {self._vector(f, step.target)}, "
             f"ptr {everything}, i64 {source.channels})")  # fmt: skip

    def _copy(self, source: Layout, target: Layout, given: Element, wanted: Element) -> str:
        """The function that copies channels from few phases into more or from more into few.

        The one number of phases divides the other. ``given`` and ``wanted`` are the elements of source and target.
        """
        apart = source.phases < target.phases  # more, in whichever of the two layouts has them
        more, few = (target, source) if apart else (source, target)
        of_more, of_few = (wanted, given) if apart else (given, wanted)
        ratio = more.phases // few.phases

        def write(g: Function) -> None:
            def one_channel(j: str) -> list[str]:
                channel = g.index("%list", j)
                x = g.at("%x", g.scaled(channel, source.channel), element=given)
                into = g.at("%into", g.scaled(channel, target.channel), element=wanted)
                first_few, first_more = (x, into) if apart else (into, x)
                for phase in range(few.phases**2):
                    one_phase(phase, first_few, first_more)
                return []

            def one_phase(phase: int, first_few: str, first_more: str) -> None:
                """A phase of the few is a map that the other layout has in ``ratio`` phases."""
                height, width = few.valid(phase)
                part = replace(more, height=height, width=width, phases=ratio)
                down, right = divmod(phase, few.phases)

                def one_line(y: str, phase_row: str, row: str) -> None:
                    line = g.at(first_few, phase * few.plane, g.scaled(y, few.pitch), element=of_few)
                    plane = g.scaled(phase_row, few.phases * more.phases * more.plane)
                    corner = (down * more.phases + right) * more.plane
                    planes = g.at(first_more, corner, plane, g.scaled(row, more.pitch), element=of_more)

                    def one_piece(first: str, length: int) -> None:
                        whole = f"<{length} x {wanted.name}>"
                        at = g.at(line, g.scaled(first, ratio), element=of_few)
                        joined = g.convert(g.get(at, given, length), given, wanted, length) if apart else "poison"
                        for column in range(min(ratio, length)):
                            lanes = range(column, length, ratio)
                            place = g.at(planes, column * few.phases * more.plane, first, element=of_more)
                            if apart:
                                g.put(g.shuffle(whole, joined, lanes), place, wanted, len(lanes))
                                continue
                            value = g.convert(g.get(place, given, len(lanes)), given, wanted, len(lanes))
                            spread = [i // ratio if i in lanes else None for i in range(length)]
                            value = g.shuffle(f"<{len(lanes)} x {wanted.name}>", value, spread)
                            chosen = [i + length if i in lanes else i for i in range(length)]
                            joined = g.shuffle(whole, joined, chosen, value)
                        if not apart:
                            g.put(joined, at, wanted, length)

                    _pieces(g, part, self.lanes, one_piece)

                _lines(g, part, one_line)

            g.loop("%n", one_channel)

        return self._shared(("copy", source, target, given, wanted), "ptr %x, ptr %into, ptr %list, i64 %n", write)

    # Pooled sums, vectors and gates

    def _reset(self, f: Function, step: ResetPooled) -> None:
        start = _START[step.pooled.part]

        def write(g: Function) -> None:
            def one_channel(j: str) -> list[str]:
                g.store(g.constant(start), "%sums", g.scaled(g.index("%list", j), self.lanes))
                return []

            g.loop("%n", one_channel)

        name = self._shared(("reset", start), "ptr %sums, ptr %list, i64 %n", write, FLOAT)
        list_, _, count = self._list(f, step.channels)
        f.do(f"call void @{name}(ptr {self._vector(f, step.pooled)}, ptr {list_}, i64 {count})")

    def _unpool(self, f: Function, step: Unpool) -> None:
        v = f"v{self.lanes}f32"

        def write(g: Function) -> None:
            def one_channel(c: str) -> list[str]:
                sums = g.load("%sums", g.scaled(c, self.lanes))
                if step.pooled.part == "max":
                    total = g(f"call nnan float @llvm.vector.reduce.fmax.{v}({g.vector} {sums})")
                    bits = g(f"bitcast <{self.lanes} x i1> {g.is_nan(sums)} to i{self.lanes}")
                    bad = g(f"icmp ne i{self.lanes} {bits}, 0")
                    total = g(f"select i1 {bad}, float {FLOAT.literal(np.nan)}, float {total}")
                else:
                    total = g(f"call reassoc float @llvm.vector.reduce.fadd.{v}(float 0.0, {g.vector} {sums})")
                g.do(f"store float {g(f'fmul float {total}, %factor')}, ptr {g.at('%into', c)}, align 4")
                return []

            g.loop("%n", one_channel)

        name = self._shared(("unpool", step.pooled.part), "ptr %sums, ptr %into, i64 %n, float %factor", write, FLOAT)
        f.do(f"call void @{name}(ptr {self._vector(f, step.pooled)}, ptr {self._vector(f, step.target)}, "
             f"i64 {step.channels}, float {FLOAT.literal(step.factor)})")  # fmt: skip

    def _matvec(self, f: Function, step: MatVec) -> None:
        at_once = 4

        def write(g: Function) -> None:
            def some(vectors: int, first: str) -> None:
                """``vectors`` vectors of outputs from ``first`` on."""
                here = g.scaled(first, self.lanes)
                weights = g.at("%weights", here)

                def one_input(i: str, *sums: str) -> list[str]:
                    row, x = g.at(weights, g.scaled(i, "%row")), g.splat(g.scalar("%x", i))
                    return [g.fma(g.load(row, v * self.lanes), x, total) for v, total in enumerate(sums)]

                starts = [(g.vector, g.load(g.at("%bias", here), v * self.lanes)) for v in range(vectors)]
                for v, total in enumerate(g.loop("%inputs", one_input, *starts)):
                    g.store(total, g.at("%into", here), v * self.lanes)

            def four(index: str) -> list[str]:
                some(at_once, g.scaled(index, at_once))
                return []

            def rest(index: str) -> list[str]:
                some(1, g(f"add i64 {index}, {whole}"))
                return []

            vectors = g(f"udiv i64 %row, {self.lanes}")
            fours = g(f"udiv i64 {vectors}, {at_once}")
            whole = g.scaled(fours, at_once)
            g.loop(fours, four)
            g.loop(g(f"sub i64 {vectors}, {whole}"), rest)

        name = self._shared("matvec", "ptr %x, ptr %into, ptr %weights, ptr %bias, i64 %inputs, i64 %row", write, FLOAT)
        row = -(-step.outputs // self.lanes) * self.lanes
        f.do(f"call void @{name}(ptr {self._vector(f, step.source)}, ptr {self._vector(f, step.target)}, "
             f"ptr {f.at('%k', step.weights)}, ptr {f.at('%k', step.bias)}, i64 {step.inputs}, i64 {row})")  # fmt: skip

    def _vector_op(self, f: Function, step: VectorOp) -> None:
        def write(g: Function) -> None:
            def one_vector(index: str) -> list[str]:
                here = g.scaled(index, self.lanes)
                y = g.load("%x", here)
                if step.kind in ("add", "multiply"):
                    y = g.arithmetic("fadd" if step.kind == "add" else "fmul", y, g.load("%other", here))
                elif step.kind == "clip":
                    y = g.clip(g.spoil(y), *step.limits)
                else:
                    y = g.activate(step.kind, g.spoil(y))
                g.store(y, "%into", here)
                return []

            g.loop("%n", one_vector)

        x, into = self._vector(f, step.source), self._vector(f, step.target)
        if step.kind == "copy":
            f.copy(x, f.at(into, step.offset), step.size)
            return
        name = self._shared(("vector", step.kind, step.limits), "ptr %x, ptr %other, ptr %into, i64 %n", write, FLOAT)
        other = self._vector(f, step.operand) if step.operand else "null"
        f.do(f"call void @{name}(ptr {x}, ptr {other}, ptr {into}, i64 {-(-step.size // self.lanes)})")

    def _decide(self, f: Function, step: Decide) -> None:
        """factor = score (or 1) where the channel is open, else 0; lists of kept and closed channels."""
        above = "fcmp ugt"  # NaN passes, to be seen in the logits
        scores, masked = step.gate.gain == "score", step.mask is not None

        def write(g: Function) -> None:
            limit, zero = g.splat(g.scalar("%limit")), g.constant(0)

            def one_vector(index: str) -> list[str]:
                here = g.scaled(index, self.lanes)
                score = g.load("%scores", here)
                factor = g.select(g(f"{above} {g.vector} {score}, {limit}"), score if scores else g.constant(1), zero)
                if masked:
                    open_ = g(f"fcmp ogt {g.vector} {g.load('%mask', here)}, {zero}")
                    factor = g.select(open_, factor if scores else g.constant(1), zero)
                g.store(factor, "%gate", here)
                return []

            def one_channel(c: str, kept: str) -> list[str]:
                g.do(f"store i32 {g(f'trunc i64 {kept} to i32')}, ptr {g.at('%below', c)}, align 4")
                open_ = g(f"{above} float {g.scalar('%gate', c)}, 0.0")
                closed = g(f"sub i64 {c}, {kept}")
                place = g(f"select i1 {open_}, i64 {kept}, i64 {g(f'sub i64 %last, {closed}')}")
                g.do(f"store i32 {g(f'trunc i64 {c} to i32')}, ptr {g.at('%list', place)}, align 4")
                return [g(f"add i64 {kept}, {g(f'zext i1 {open_} to i64')}")]

            g.loop(g(f"udiv i64 {g(f'add i64 %n, {self.lanes - 1}')}, {self.lanes}"), one_vector)
            (kept,) = g.loop("%n", one_channel, ("i64", "0"))
            g.do(f"store i32 {g(f'trunc i64 {kept} to i32')}, ptr {g.at('%below', '%n')}, align 4")
            g.copy("%gate", "%values", "%n")

        arguments = (
            "ptr %scores, ptr %limit, ptr %mask, ptr %gate, ptr %list, ptr %below, ptr %values, i64 %n, i64 %last"
        )
        name = self._shared(("decide", scores, masked), arguments, write, FLOAT)
        list_ = self._vector(f, Vector(step.gate.name, "list"))
        values = f.at("%gates", self.gates[step.gate.name])
        mask = "null" if step.mask is None else f.at("%k", step.mask)
        f.do(f"call void @{name}(ptr {self._vector(f, step.scores)}, "
             f"ptr {f.at('%k', step.limit)}, ptr {mask}, ptr {self._vector(f, Vector(step.gate.name))}, ptr {list_}, "
             f"ptr {f.at(list_, step.channels)}, ptr {values}, i64 {step.channels}, "
             f"i64 {step.channels - 1})")  # fmt: skip


def _within(positions: Numbers, size: int) -> Lanes:
    return (positions >= 0) & (positions < size)


_START = {"average": 0.0, "max": -np.inf}  # of pooled sums and maxima


class _Element:
    """What becomes of the values of one channel and vector: operations, store, pooled sums."""

    def __init__(
        self, generator: Generator, g: Function, frame: Layout, finish: Finish, channel: str, start: str
    ) -> None:
        self.generator, self.g, self.frame, self.finish = generator, g, frame, finish
        in_map = g(f"add i64 {g.scaled(channel, frame.channel)}, {start}")
        pointers = iter(f"%p{i}" for i in range(len(finish.ops) + 1 + len(finish.pooled)))
        self.operands: list[tuple[str, ...]] = []
        for op in finish.ops:
            if op.kind in ("add", "multiply"):
                self.operands.append((g.at(next(pointers), in_map),))
            elif op.kind == "scale":
                self.operands.append((g.splat_float(next(pointers), channel),))
            elif op.kind == "affine":
                pair = g.floats.at(next(pointers), g.scaled(channel, 2))
                self.operands.append((g.splat_float(pair, 0), g.splat_float(pair, 1)))
            else:
                self.operands.append(())
        self.into = g.at(next(pointers), in_map) if finish.stored else None
        self.sums = [(sums.part, g.floats.at(next(pointers), g.scaled(channel, g.lanes))) for sums in finish.pooled]
        self.totals: dict[str, str] = {}

    def make(self, phase: int, block: str, y: str) -> None:
        """Do it for one vector of a phase."""
        g, offset = self.g, phase * self.frame.plane
        for op, operands in zip(self.finish.ops, self.operands, strict=True):
            if op.kind == "activate":
                y = g.activate(str(op.operand), g.spoil(y))
            elif isinstance(op.operand, tuple):
                y = g.clip(g.spoil(y), *op.operand)
            elif op.kind == "scale":
                y = g.arithmetic("fmul", y, operands[0])
            elif op.kind == "affine":
                y = g.fma(y, operands[0], operands[1])
            else:
                y = g.arithmetic("fadd" if op.kind == "add" else "fmul", y, g.load(operands[0], offset))
        mask = self.generator._mask(self.frame, phase, _single(self.frame, g.lanes), 0, None)(g, block)
        if self.into:
            g.store(y, self.into, offset, mask)
        for kind, _ in self.sums:
            counted = g.widen(g.spoil(y) if kind == "max" else y)
            if mask is not None:
                counted = g.floats.select(mask, counted, g.floats.constant(_START[kind]))
            self.totals[kind] = self._pooled(kind, self.totals[kind], counted) if kind in self.totals else counted

    def pool(self) -> None:
        """Add what was made to the pooled sums."""
        floats = self.g.floats
        for kind, pointer in self.sums:
            floats.store(self._pooled(kind, floats.load(pointer), self.totals[kind]), pointer)

    def _pooled(self, kind: str, a: str, b: str) -> str:
        floats = self.g.floats
        return floats.maximum(a, b) if kind == "max" else floats.arithmetic("fadd", a, b)


def _signature(finish: Finish) -> object:
    """What the code of a finish depends on, names and places aside."""
    ops = tuple((op.kind, op.operand if op.kind in ("activate", "clip") else None) for op in finish.ops)
    return ops, finish.stored, tuple(sums.part for sums in finish.pooled)


def _single(frame: Layout, lanes: int) -> Tile:
    """A map walked vector by vector."""
    return Tile(1, 1, -(-frame.rows * frame.pitch // lanes))


def _vectors(g: Function, tile: Tile, single: Tile, write: Callable[[str, str], None]) -> None:
    """``write(v, its number in the map)`` for the vectors of %block that lie in the map."""
    first = g.scaled("%block", tile.vectors)
    count: str | int = tile.vectors
    if single.blocks % tile.vectors:
        count = g(f"call i64 @llvm.umin.i64(i64 {count}, i64 {g(f'sub i64 {single.blocks}, {first}')})")

    def one_vector(v: str) -> list[str]:
        write(v, g(f"add i64 {first}, {v}"))
        return []

    g.loop(count, one_vector)


def _dense(layout: Layout) -> Layout:
    """The same map row after row, without gaps."""
    return Layout(layout.height, layout.width, 1, layout.width, layout.height * layout.width)


def _pieces(g: Function, layout: Layout, lanes: int, write: Callable[[str, int], None]) -> None:
    """``write(first column of the phases, number of elements of the map)`` for a row, ``lanes`` columns at a time."""
    whole, rest = divmod(layout.width, lanes * layout.phases)

    def one_piece(index: str) -> list[str]:
        write(g.scaled(index, lanes), lanes * layout.phases)
        return []

    if whole:
        g.loop(whole, one_piece)
    if rest:
        write(str(whole * lanes), rest)


def _lines(g: Function, layout: Layout, write: Callable[[str, str, str], None]) -> None:
    """``write(line of the map, its phase row, its row there)`` for every line."""

    def one_line(y: str) -> list[str]:
        write(y, g(f"urem i64 {y}, {layout.phases}"), g(f"udiv i64 {y}, {layout.phases}"))
        return []

    g.loop(layout.height, one_line)
