"""LLVM IR as text: a function under construction, with loops, vectors of floats and what is computed on them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Body = Callable[..., Sequence[str]]


@dataclass(frozen=True)
class Element:
    """A type of number as LLVM names it; ``suffix`` in the names of intrinsics."""

    name: str
    suffix: str
    size: int

    def literal(self, value: float) -> str:
        """A number as LLVM writes it."""
        if self.size == 2:
            return f"0xH{np.float16(value).view(np.uint16):04X}"
        return f"0x{np.float64(np.float32(value)).view(np.uint64):016X}"


FLOAT = Element("float", "f32", 4)
HALF = Element("half", "f16", 2)


class Function:
    """The text of one function; every method that makes a value returns its name.

    Vectors hold ``lanes`` elements, floats unless said otherwise. NaN goes through whatever is computed, so that an
    overflow anywhere is seen at the end.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        lanes: int,
        element: Element = FLOAT,
        linkage: str = "internal",
    ) -> None:
        self.lines = [f"define {linkage} void @{name}({arguments}) #0 {{", "entry:"]
        self.numbers = itertools.count(1)
        self.label = "entry"
        self.lanes = lanes
        self.element = element

    @cached_property
    def floats(self) -> Function:
        """This function, its vectors and addresses taken to be of floats; not for loops."""
        view = copy.copy(self)
        view.element = FLOAT
        return view

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.element.name}>"

    def text(self) -> str:
        return "\n".join([*self.lines, "  ret void", "}"])

    def __call__(self, instruction: str) -> str:
        name = f"%v{next(self.numbers)}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        self.lines.append(f"  {instruction}")

    def begin(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def new_label(self, name: str) -> str:
        return f"{name}{next(self.numbers)}"

    def loop(self, count: str | int, body: Body, *carried: tuple[str, str]) -> list[str]:
        """For i from 0 to count - 1: carried = body(i, *carried). ``carried`` are (type, first value)."""
        if count == 1:
            return list(body("0", *(first for _, first in carried)))
        before, start, after = self.label, self.new_label("loop"), self.new_label("after")
        some = self(f"icmp sgt i64 {count}, 0")
        self.do(f"br i1 {some}, label %{start}, label %{after}")
        self.begin(start)
        counter, index = f"%{start}.i", f"%{start}.index"
        values = [f"%{start}.{n}" for n in range(len(carried))]
        head = len(self.lines)
        updated = list(body(index, *values))
        following = self(f"add nsw i64 {counter}, 1")
        again = self(f"icmp slt i64 {following}, {count}")
        self.do(f"br i1 {again}, label %{start}, label %{after}")
        last = self.label
        self.lines[head:head] = [
            f"  {counter} = phi i64 [0, %{before}], [{following}, %{last}]",
            *(
                f"  {value} = phi {kind} [{first}, %{before}], [{update}, %{last}]"
                for value, (kind, first), update in zip(values, carried, updated, strict=True)
            ),
            # opaque: LLVM's search for the cheapest addresses in a loop takes long, and gains nothing
            f'  {index} = call i64 asm "", "=r,0"(i64 {counter})',
        ]
        self.begin(after)
        return [
            self(f"phi {kind} [{first}, %{before}], [{update}, %{last}]")
            for (kind, first), update in zip(carried, updated, strict=True)
        ]

    # Addresses and memory; offsets count elements

    def at(self, pointer: str, *offsets: str | int, element: Element | None = None) -> str:
        for offset in offsets:
            if str(offset) != "0":
                kind = (element or self.element).name
                pointer = self(f"getelementptr inbounds {kind}, ptr {pointer}, i64 {offset}")
        return pointer

    def bytes_at(self, pointer: str, *offsets: str) -> str:
        for offset in offsets:
            pointer = self(f"getelementptr inbounds i8, ptr {pointer}, i64 {offset}")
        return pointer

    def scaled(self, value: str, factor: str | int) -> str:
        return "0" if "0" in (value, str(factor)) else self(f"mul nsw i64 {value}, {factor}")

    def index(self, pointer: str, position: str | int = 0) -> str:
        """An int32 of a list, as i64."""
        return self(f"zext i32 {self(f'load i32, ptr {self.floats.at(pointer, position)}')} to i64")

    def load(self, pointer: str, offset: str | int = 0) -> str:
        return self(f"load {self.vector}, ptr {self.at(pointer, offset)}, align {self.element.size}")

    def store(self, value: str, pointer: str, offset: str | int = 0, mask: str | None = None) -> None:
        address = self.at(pointer, offset)
        if mask is None:
            self.do(f"store {self.vector} {value}, ptr {address}, align {self.element.size}")
        else:
            lanes = f"<{self.lanes} x i1> {mask}"
            name = f"llvm.masked.store.v{self.lanes}{self.element.suffix}.p0"
            self.do(f"call void @{name}({self.vector} {value}, ptr {address}, i32 {self.element.size}, {lanes})")

    def scalar(self, pointer: str, offset: str | int = 0) -> str:
        return self(f"load {self.element.name}, ptr {self.at(pointer, offset)}, align {self.element.size}")

    def get(self, address: str, element: Element, lanes: int) -> str:
        """A vector of any type and length."""
        return self(f"load <{lanes} x {element.name}>, ptr {address}, align {element.size}")

    def put(self, value: str, address: str, element: Element, lanes: int) -> None:
        """Store a vector of any type and length."""
        self.do(f"store <{lanes} x {element.name}> {value}, ptr {address}, align {element.size}")

    def copy(self, source: str, target: str, size: int | str) -> None:
        """Copy ``size`` floats."""
        length = self(f"mul i64 {size}, 4")
        self.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {length}, i1 false)")

    # Arithmetic on vectors

    def convert(self, value: str, source: Element, target: Element, lanes: int) -> str:
        """Elements of one type as elements of another; ``lanes`` 0 stands for a single one."""
        if source == target:
            return value
        from_, to = (f"<{lanes} x {e.name}>" if lanes else e.name for e in (source, target))
        return self(f"{'fpext' if source.size < target.size else 'fptrunc'} {from_} {value} to {to}")

    def widen(self, value: str) -> str:
        """A vector as floats."""
        return self.convert(value, self.element, FLOAT, self.lanes)

    def splat_float(self, pointer: str, offset: str | int) -> str:
        """A float in memory, in every lane."""
        return self.splat(self.convert(self.floats.scalar(pointer, offset), FLOAT, self.element, 0))

    def splat(self, value: str) -> str:
        one = self(f"insertelement {self.vector} poison, {self.element.name} {value}, i64 0")
        return self(f"shufflevector {self.vector} {one}, {self.vector} poison, <{self.lanes} x i32> zeroinitializer")

    def constant(self, *values: float) -> str:
        """The values again and again."""
        lanes = [f"{self.element.name} {self.element.literal(value)}" for value in values]
        return f"<{', '.join(lanes * (self.lanes // len(lanes)))}>"

    def fma(self, a: str, b: str, c: str) -> str:
        v = self.vector
        return self(f"call {v} @llvm.fmuladd.v{self.lanes}{self.element.suffix}({v} {a}, {v} {b}, {v} {c})")

    def arithmetic(self, operation: str, a: str, b: str) -> str:
        return self(f"{operation} {self.vector} {a}, {b}")

    def select(self, mask: str, a: str, b: str) -> str:
        return self(f"select <{self.lanes} x i1> {mask}, {self.vector} {a}, {self.vector} {b}")

    def zero_unless(self, mask: str | None, value: str) -> str:
        return value if mask is None else self.select(mask, value, self.constant(0))

    def shuffle(self, kind: str, value: str, lanes: Sequence[int | None], other: str = "poison") -> str:
        """Lanes of one or two vectors of type ``kind``; None stands for any."""
        chosen = ", ".join("i32 poison" if lane is None else f"i32 {lane}" for lane in lanes)
        return self(f"shufflevector {kind} {value}, {kind} {other}, <{len(lanes)} x i32> <{chosen}>")

    def scale_and_shift(self, value: str, scale: str, shift: str, lanes: int) -> str:
        """value * scale + shift for a vector of any length."""
        kind = f"<{lanes} x float>"
        ones = [self(f"insertelement {kind} poison, float {x}, i64 0") for x in (scale, shift)]
        scales, shifts = (self.shuffle(kind, one, [0] * lanes) for one in ones)
        product = self(f"fmul contract {kind} {value}, {scales}")
        return self(f"fadd contract {kind} {product}, {shifts}")

    def maximum(self, a: str, b: str) -> str:
        """The larger of two, NaN if one of them is; cheapest if ``a`` is a constant."""
        return self._extreme("ogt", a, b)

    def minimum(self, a: str, b: str) -> str:
        """The smaller of two, NaN if one of them is; cheapest if ``a`` is a constant."""
        return self._extreme("olt", a, b)

    def _extreme(self, comparison: str, a: str, b: str) -> str:
        chosen = self.select(self(f"fcmp {comparison} {self.vector} {a}, {b}"), a, b)  # b if one of them is NaN
        return chosen if a.startswith("<") else self.select(self.is_nan(a), a, chosen)

    def is_nan(self, value: str) -> str:
        return self(f"fcmp uno {self.vector} {value}, {value}")

    def spoil(self, value: str) -> str:
        """NaN in place of infinities, all else as it is: what would make a decent number of them lets NaN through."""
        return self.fma(value, self.constant(0), value)

    def combine(self, coefficients: Sequence[float], values: Sequence[str]) -> str:
        """The sum of coefficient * value, terms with coefficient 0 left out."""
        terms = [(c, v) for c, v in zip(coefficients, values, strict=True) if c != 0]
        (first, total), *rest = sorted(terms, key=lambda term: (term[0] != 1, term[0] < 0))
        if first != 1:
            total = self.arithmetic("fmul", total, self.constant(first))
        for coefficient, value in rest:
            total = self.add_multiple(total, coefficient, value)
        return total

    def add_multiple(self, total: str, coefficient: float, value: str) -> str:
        if abs(coefficient) == 1:
            return self.arithmetic("fadd" if coefficient > 0 else "fsub", total, value)
        return self.fma(value, self.constant(coefficient), total)

    def multiply(self, matrix: Sequence[Sequence[float]], values: Sequence[str]) -> list[str]:
        """Matrix times values; sums and differences serve all neighbouring pairs that differ in signs only."""
        coefficients, terms = np.array(matrix, dtype=np.float64), list(values)
        for j in range(0, len(terms) - 1, 2):
            a, b = coefficients.T[j : j + 2]
            if np.array_equal(abs(a), abs(b)):
                terms[j : j + 2] = [self.arithmetic(way, *terms[j : j + 2]) for way in ("fadd", "fsub")]
                coefficients.T[j : j + 2] = (a + b) / 2, (a - b) / 2
        made: list[str] = []
        for i in range(0, len(coefficients), 2):
            rows = coefficients[i : i + 2]
            if len(rows) == 2 and np.array_equal(*abs(rows)):
                same, other = (rows[0] + rows[1]) / 2, (rows[0] - rows[1]) / 2
                sizes = set(abs(other[other != 0]))
                size = sizes.pop() if len(sizes) == 1 else 1.0
                total, difference = self.combine(same, terms), self.combine(other / size, terms)
                made += [self.add_multiple(total, sign * size, difference) for sign in (1, -1)]
            else:
                made += [self.combine(row, terms) for row in rows]
        return made

    def clip(self, y: str, low: float, high: float) -> str:
        return self.minimum(self.maximum(y, self.constant(low)), self.constant(high))

    def activate(self, kind: str, y: str) -> str:
        if kind == "relu":
            return self.maximum(self.constant(0), y)
        if kind == "relu6":
            return self.minimum(self.constant(6), self.maximum(self.constant(0), y))
        if kind in ("hardsigmoid", "hardswish"):
            clipped = self.activate("relu6", self.arithmetic("fadd", y, self.constant(3)))
            sixth = self.arithmetic("fmul", clipped, self.constant(1 / 6))
            return sixth if kind == "hardsigmoid" else self.arithmetic("fmul", y, sixth)
        return self.convert(self.floats._sigmoid(kind, self.widen(y)), FLOAT, self.element, self.lanes)

    def _sigmoid(self, kind: str, y: str) -> str:
        """sigmoid(y), or y * sigmoid(y)."""
        exponential = self._exp(self.arithmetic("fsub", self.constant(0), y))
        exponential = self.fma(y, self.constant(0), exponential)  # NaN if y is: its bits are no exponent
        sum_ = self.arithmetic("fadd", exponential, self.constant(1))
        return self.arithmetic("fdiv", self.constant(1) if kind == "sigmoid" else y, sum_)

    def _exp(self, x: str) -> str:
        """e^x for |x| <= 87 and clipped beyond: 2^n e^r, n = round(x / ln 2), a polynomial for e^r."""
        x = self.minimum(self.constant(87), self.maximum(self.constant(-87), x))
        magic = self.constant(1.5 * 2**23)  # adding it rounds to an integer, kept in the low bits
        shifted = self.fma(x, self.constant(1.4426950408889634), magic)
        n = self.arithmetic("fsub", shifted, magic)
        r = self.fma(n, self.constant(-0.693359375), x)
        r = self.fma(n, self.constant(2.12194440e-4), r)
        polynomial = self.constant(1 / 720)
        for factorial in (120, 24, 6, 2, 1, 1):
            polynomial = self.fma(polynomial, r, self.constant(1 / factorial))
        integers = f"<{self.lanes} x i32>"
        bits = self(f"bitcast {self.vector} {shifted} to {integers}")
        exponent = self(f"shl {integers} {bits}, <{', '.join(['i32 23'] * self.lanes)}>")
        scaled = self(f"add {integers} {self(f'bitcast {self.vector} {polynomial} to {integers}')}, {exponent}")
        return self(f"bitcast {integers} {scaled} to {self.vector}")
