"""From a plan to LLVM IR: one module, whose function ``run`` does the whole network on a range of images.

Each step writes its own code (``manidp.engine.kernels``). The module keeps what they share: functions that several
layers call, constant tables, and where maps, vectors and lists of channels lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from manidp.engine.ir import FLOAT, Bits, Bool, Element, Function, Index, Piece, Pointer, Value
from manidp.engine.steps import Channels, MapKey, Plan, Step, VectorKey
from manidp.engine.target import Isa
from manidp.errors import UnsupportedError
from manidp.limits import Limits

WORKSPACE, CONSTANTS, IMAGES, STATE = Pointer("%w"), Pointer("%k"), Pointer("%images"), Pointer("%state")
GATES = Pointer("%gates")  # where the gates' factors of an image go, one gate after the other
IMAGE = Index("%image")  # its number
BYTES = Index("%bytes")  # 1 if images are bytes, 0 if they are floats
_PART = 64  # steps in one function: LLVM's time grows with the square of a function's length


class Module:
    """``text`` is the LLVM IR of a plan, ``workspace`` the floats that one call needs.

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
        self.text = "\n".join(
            [
                *self._declarations(),
                *(f"{name} = internal constant {values}" for values, name in self.tables.items()),
                *self.functions,
                main,
                self._attributes(),
            ]
        )
        self.workspace = plan.workspace + self.scratch
        self.limits.check("workspace_bytes", 4 * self.workspace, "the network", UnsupportedError)

    def _declarations(self) -> list[str]:
        n, v = self.lanes, f"<{self.lanes} x float>"
        kinds = {element: f"<{n} x {element.name}>" for element in (FLOAT, self.element)}
        return [
            *(f"declare {w} @llvm.fmuladd.v{n}{e.suffix}({w}, {w}, {w})" for e, w in kinds.items()),
            f"declare {v} @llvm.sqrt.v{n}f32({v})",
            f"declare float @llvm.vector.reduce.fadd.v{n}f32(float, {v})",
            f"declare float @llvm.vector.reduce.fmax.v{n}f32({v})",
            "declare i64 @llvm.umin.i64(i64, i64)",
            "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)",
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        ]

    def _attributes(self) -> str:
        width = 8 * self.element.size * self.lanes
        return f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" "min-legal-vector-width"="{width}" }}'

    # What kernels ask for

    def function(
        self,
        key: object,
        arguments: Sequence[Value],
        write: Callable[[Function], None],
        element: Element | None = None,
    ) -> str:
        """Name of the function that ``key`` stands for, written when first asked for.

        Its vectors are of ``element``, by default of what maps are made of.
        """
        if key not in self.names:
            self.names[key] = f"f{len(self.names)}"
            function = Function(self.names[key], arguments, lanes=self.lanes, element=element or self.element)
            write(function)
            self.functions.append(function.text())
            self._count(self.functions[-1])
        return self.names[key]

    def table(self, integer: str, numbers: Sequence[int]) -> Pointer:
        """The constant array of these numbers."""
        values = ", ".join(f"{integer} {number}" for number in numbers)
        contents = f"[{len(numbers)} x {integer}] [{values}]"
        if contents not in self.tables:
            self._count(contents)
            self.tables[contents] = f"@table{len(self.tables)}"
        return Pointer(self.tables[contents])

    def reserve_scratch(self, elements: int) -> None:
        """A convolution needs so many elements behind the plan's own workspace."""
        self.scratch = max(self.scratch, -(-elements * self.element.size // 4))

    def map_at(self, f: Function, key: MapKey) -> Pointer:
        """Where a map begins."""
        return f.at(WORKSPACE, self.plan.maps[key].at)

    def vector_at(self, f: Function, key: VectorKey) -> Pointer:
        """Where a vector begins."""
        return f.at(WORKSPACE, self.plan.vectors[key])

    def constant_at(self, f: Function, offset: int) -> Pointer:
        """Where an array among the constants begins."""
        return f.at(CONSTANTS, offset)

    def lists(self, f: Function, channels: Channels) -> tuple[Pointer, Pointer, Index]:
        """The int32 numbers of the channels, how many of them lie below each channel, how many there are."""
        if channels.kept is None:
            everything = self.constant_at(f, self.plan.everything)
            return everything, everything, Index(channels.count)
        kept = self.vector_at(f, channels.kept)
        below = f.at(kept, channels.count)
        number = f.index(below, channels.count)
        if channels.closed:
            return f.at(kept, number), below, f.minus(channels.count, number)
        return kept, below, number

    def finite(self) -> str:
        """The function that notes in the state if a number is not finite, i.e. if all bits of its exponent are set."""
        integers, exponent = f"<{self.lanes} x i32>", 0x7F800000
        every = f"<{', '.join([f'i32 {exponent}'] * self.lanes)}>"
        x, n = Pointer("%x"), Index("%n")

        def write(g: Function) -> None:
            def one_vector(index: Index, found: Bits) -> list[Bits]:
                address = g.at(x, g.scaled(index, self.lanes))
                bits = g.make(Piece, f"load {integers}, ptr {address}, align 4")
                bits = g.make(Piece, f"and {integers} {bits}, {every}")
                set_ = g.make(Bits, f"icmp eq {integers} {bits}, {every}")
                return [g.make(Bits, f"or <{self.lanes} x i1> {found}, {set_}")]

            def one_more(index: Index, found: Bool) -> list[Bool]:
                bits = g.make(Piece, f"load i32, ptr {g.at(x, whole, index)}, align 4")
                set_ = g.make(Bool, f"icmp eq i32 {g.make(Piece, f'and i32 {bits}, {exponent}')}, {exponent}")
                return [g.make(Bool, f"or i1 {found}, {set_}")]

            vectors = g.divided(n, self.lanes)
            whole = g.scaled(vectors, self.lanes)
            (lanes,) = g.loop(vectors, one_vector, Bits("zeroinitializer"))
            any_ = g.any_of(lanes)
            (bad,) = g.loop(g.minus(n, whole), one_more, any_)
            g.branch(bad, "note", "fine")
            g.begin("note")
            flag = g.make(Pointer, f"getelementptr i64, ptr {STATE}, i64 1")
            g.do(f"store atomic i64 1, ptr {flag} monotonic, align 8")
            g.go("fine")
            g.begin("fine")

        return self.function("finite", [x, n, STATE], write, FLOAT)

    def _count(self, code: str) -> None:
        self.size += len(code)
        self.limits.check("code", self.size, "the network", UnsupportedError)

    # The network

    def _main(self) -> str:
        results, count = Pointer("%results"), Index("%count")
        f = Function(
            "run",
            [IMAGES, BYTES, results, STATE, count, CONSTANTS, WORKSPACE],
            lanes=self.lanes,
            linkage="dso_local",
        )
        graph, steps = self.plan.graph, self.plan.steps
        f.go("take")
        f.begin("take")
        image = f.make(Index, f"atomicrmw add ptr {STATE}, i64 1 monotonic")
        f.branch(f.make(Bool, f"icmp slt i64 {image}, {count}"), "work", "done")
        f.begin("work")
        logits = f.at(results, f.scaled(image, graph.num_classes + sum(graph.gate_channels.values())))
        gates = f.at(logits, graph.num_classes)
        for first in range(0, len(steps), _PART):
            part = self._part(steps[first : first + _PART])
            f.call(part, IMAGES, BYTES, image, gates, STATE, WORKSPACE, CONSTANTS)
        f.copy(self.vector_at(f, VectorKey(graph.output)), logits, graph.num_classes)
        f.call(self.finite(), logits, graph.num_classes, STATE)
        f.go("take")
        f.begin("done")
        return f.text()

    def _part(self, steps: Sequence[Step]) -> str:
        """The function that does some steps for one image."""

        def write(f: Function) -> None:
            for step in steps:
                step.emit(self, f)

        arguments: list[Value] = [IMAGES, BYTES, IMAGE, GATES, STATE, WORKSPACE, CONSTANTS]
        return self.function(tuple(steps), arguments, write, FLOAT)
