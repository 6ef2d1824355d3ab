"""LLVM IR as text: a function under construction, with loops, vectors and what is computed on them.

What an instruction makes is a name; its Python type says what is behind the name, so that mypy finds an index where a
pointer belongs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np


class Value(str):
    """The name of a value, or a constant, in the text."""

    __slots__ = ()


class Pointer(Value):
    """An address."""

    __slots__ = ()


class Index(Value):
    """An i64: a count, a position, an offset in elements."""

    __slots__ = ()


class Scalar(Value):
    """One element."""

    __slots__ = ()


class Vec(Value):
    """A vector of as many elements as the instruction set has lanes."""

    __slots__ = ()


class Piece(Value):
    """A vector of another length, or of other numbers."""

    __slots__ = ()


class Bits(Value):
    """One bit a lane."""

    __slots__ = ()


class Bool(Value):
    """One bit."""

    __slots__ = ()


V = TypeVar("V", bound=Value)
Offset = Index | int
Body = Callable[..., Sequence[Value]]
ZERO = Index("0")
NULL = Pointer("null")


@dataclass(frozen=True)
class Element:
    """A type of number as LLVM names it; ``suffix`` in the names of intrinsics."""

    name: str
    suffix: str
    size: int

    def literal(self, value: float) -> Scalar:
        """A number as LLVM writes it."""
        if self.size == 2:
            return Scalar(f"0xH{np.float16(value).view(np.uint16):04X}")
        return Scalar(f"0x{np.float64(np.float32(value)).view(np.uint64):016X}")


# what ``Function.apply`` knows; those that take a few instructions
SIMPLE = ("relu", "relu6", "clip", "leaky_relu", "hardsigmoid", "hardswish")
FUNCTIONS = (*SIMPLE, "sigmoid", "silu", "tanh", "gelu", "mish", "elu", "squareplus")
_LOG2_E = 1.4426950408889634
# 2^x for |x| <= 0.5, the largest relative error (9e-8) as small as can be with 1 at 0; highest power first
_POWER = (0.0013264591, 0.0096716192, 0.055507351, 0.24022241, 0.693147, 1.0)
FLOAT = Element("float", "f32", 4)
HALF = Element("half", "f16", 2)


class Function:
    """The text of one function; ``arguments`` are its parameters, names that begin with %.

    Vectors hold ``lanes`` elements, floats unless said otherwise. NaN goes through whatever is computed, so that an
    overflow anywhere is seen at the end.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[Value],
        *,
        lanes: int,
        element: Element = FLOAT,
        linkage: str = "internal",
    ) -> None:
        self.lanes = lanes
        self.element = element
        taken = ", ".join(map(self.typed, arguments))
        self.lines = [f"define {linkage} void @{name}({taken}) #0 {{", "entry:"]
        self.numbers = itertools.count(1)
        self.label = "entry"

    @cached_property
    def floats(self) -> Function:
        """This function, its vectors and addresses taken to be of floats; not for loops."""
        return self.of(FLOAT)

    def of(self, element: Element) -> Function:
        """This function, its vectors and addresses taken to be of other elements; not for loops."""
        view = copy.copy(self)
        view.element = element
        return view

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.element.name}>"

    def kind(self, value: Value) -> str:
        """LLVM's type of a value."""
        match value:
            case Pointer():
                return "ptr"
            case Index():
                return "i64"
            case Scalar():
                return self.element.name
            case Vec():
                return self.vector
            case Bits():
                return f"<{self.lanes} x i1>"
            case Bool():
                return "i1"
        raise TypeError(f"{type(value).__name__} {value} has no one type")

    def typed(self, value: Value) -> str:
        """A value with its type before it, as in a list of arguments."""
        return f"{self.kind(value)} {value}"

    def text(self) -> str:
        return "\n".join([*self.lines, "  ret void", "}"])

    def make(self, kind: type[V], instruction: str) -> V:
        """The value that an instruction makes."""
        name = kind(f"%v{next(self.numbers)}")
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        self.lines.append(f"  {instruction}")

    def call(self, name: str, *arguments: Value | int) -> None:
        """Call a function that returns nothing; an int is an i64."""
        given = (Index(value) if isinstance(value, int) else value for value in arguments)
        self.do(f"call void @{name}({', '.join(map(self.typed, given))})")

    # Control

    def begin(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def new_label(self, name: str) -> str:
        return f"{name}{next(self.numbers)}"

    def go(self, label: str) -> None:
        self.do(f"br label %{label}")

    def branch(self, condition: Bool, yes: str, no: str) -> None:
        self.do(f"br i1 {condition}, label %{yes}, label %{no}")

    def loop(self, count: Offset, body: Body, *carried: Value) -> list[Any]:
        """For i from 0 to count - 1: carried = body(i, *carried). ``carried`` are the first values."""
        if count == 1:
            return list(body(ZERO, *carried))
        before, start, after = self.label, self.new_label("loop"), self.new_label("after")
        some = self.make(Bool, f"icmp sgt i64 {count}, 0")
        self.branch(some, start, after)
        self.begin(start)
        counter, index = Index(f"%{start}.i"), Index(f"%{start}.index")
        values = [type(first)(f"%{start}.{n}") for n, first in enumerate(carried)]
        head = len(self.lines)
        updated = list(body(index, *values))
        following = self.make(Index, f"add nsw i64 {counter}, 1")
        again = self.make(Bool, f"icmp slt i64 {following}, {count}")
        self.branch(again, start, after)
        last = self.label
        self.lines[head:head] = [
            f"  {counter} = phi i64 [0, %{before}], [{following}, %{last}]",
            *(
                f"  {value} = phi {self.kind(first)} [{first}, %{before}], [{update}, %{last}]"
                for value, first, update in zip(values, carried, updated, strict=True)
            ),
            # opaque: LLVM's search for the cheapest addresses in a loop takes long, and gains nothing
            f'  {index} = call i64 asm "", "=r,0"(i64 {counter})',
        ]
        self.begin(after)
        return [
            self.make(type(first), f"phi {self.kind(first)} [{first}, %{before}], [{update}, %{last}]")
            for first, update in zip(carried, updated, strict=True)
        ]

    def switch(self, number: Index, numbers: Sequence[int], default: int, write: Callable[[int], None]) -> None:
        """``write`` one of the numbers' code for each; at run time that of ``number``, or of ``default`` if none."""
        arms, after = {n: self.new_label("case") for n in numbers}, self.new_label("after")
        cases = " ".join(f"i64 {n}, label %{arm}" for n, arm in arms.items())
        self.do(f"switch i64 {number}, label %{arms[default]} [{cases}]")
        for n, arm in arms.items():
            self.begin(arm)
            write(n)
            self.go(after)
        self.begin(after)

    # Whole numbers

    def plus(self, a: Offset, b: Offset) -> Index:
        return self.make(Index, f"add i64 {a}, {b}")

    def minus(self, a: Offset, b: Offset) -> Index:
        return self.make(Index, f"sub i64 {a}, {b}")

    def scaled(self, value: Index, factor: Offset) -> Index:
        if value.isdecimal() and str(factor).isdecimal():
            return Index(int(value) * int(factor))
        return ZERO if "0" in (value, str(factor)) else self.make(Index, f"mul nsw i64 {value}, {factor}")

    def divided(self, value: Offset, divisor: Offset) -> Index:
        return self.make(Index, f"udiv i64 {value}, {divisor}")

    def remainder(self, value: Offset, divisor: Offset) -> Index:
        return self.make(Index, f"urem i64 {value}, {divisor}")

    def least(self, a: Offset, b: Offset) -> Index:
        return self.make(Index, f"call i64 @llvm.umin.i64(i64 {a}, i64 {b})")

    # Addresses and memory; offsets count elements

    def at(self, pointer: Pointer, *offsets: Offset, element: Element | None = None) -> Pointer:
        for offset in offsets:
            if str(offset) != "0":
                kind = (element or self.element).name
                pointer = self.make(Pointer, f"getelementptr inbounds {kind}, ptr {pointer}, i64 {offset}")
        return pointer

    def bytes_at(self, pointer: Pointer, *offsets: Index) -> Pointer:
        for offset in offsets:
            pointer = self.make(Pointer, f"getelementptr inbounds i8, ptr {pointer}, i64 {offset}")
        return pointer

    def index(self, pointer: Pointer, position: Offset = 0) -> Index:
        """An int32 of a list, as i64."""
        number = self.make(Piece, f"load i32, ptr {self.floats.at(pointer, position)}")
        return self.make(Index, f"zext i32 {number} to i64")

    def load(self, pointer: Pointer, offset: Offset = 0) -> Vec:
        return self.make(Vec, f"load {self.vector}, ptr {self.at(pointer, offset)}, align {self.element.size}")

    def store(self, value: Vec, pointer: Pointer, offset: Offset = 0) -> None:
        self.do(f"store {self.vector} {value}, ptr {self.at(pointer, offset)}, align {self.element.size}")

    def prefetch(self, pointer: Pointer, offset: Offset = 0, *, near: bool = True) -> None:
        """Bring the cache line nearer: into the first-level cache, or the second-level one."""
        level = 3 if near else 2
        self.do(f"call void @llvm.prefetch.p0(ptr {self.at(pointer, offset)}, i32 0, i32 {level}, i32 1)")

    def scalar(self, pointer: Pointer, offset: Offset = 0) -> Scalar:
        return self.make(Scalar, f"load {self.element.name}, ptr {self.at(pointer, offset)}, align {self.element.size}")

    def put_scalar(self, value: Scalar | str, pointer: Pointer, offset: Offset = 0) -> None:
        name, size = self.element.name, self.element.size
        self.do(f"store {name} {value}, ptr {self.at(pointer, offset)}, align {size}")

    def get(self, address: Pointer, element: Element, lanes: int) -> Piece:
        """A vector of any type and length."""
        return self.make(Piece, f"load <{lanes} x {element.name}>, ptr {address}, align {element.size}")

    def put(self, value: Piece, address: Pointer, element: Element, lanes: int) -> None:
        """Store a vector of any type and length."""
        self.do(f"store <{lanes} x {element.name}> {value}, ptr {address}, align {element.size}")

    def copy(self, source: Pointer, target: Pointer, size: Offset) -> None:
        """Copy ``size`` floats."""
        length = self.make(Index, f"mul i64 {size}, 4")
        self.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {length}, i1 false)")

    def clear(self, target: Pointer, length: int) -> None:
        """Zeros to so many bytes."""
        self.do(f"call void @llvm.memset.p0.i64(ptr {target}, i8 0, i64 {length}, i1 false)")

    # Arithmetic on vectors

    def convert(self, value: V, source: Element, target: Element, lanes: int) -> V:
        """Elements of one type as elements of another; ``lanes`` 0 stands for a single one."""
        if source == target:
            return value
        from_, to = (f"<{lanes} x {e.name}>" if lanes else e.name for e in (source, target))
        return self.make(type(value), f"{'fpext' if source.size < target.size else 'fptrunc'} {from_} {value} to {to}")

    def widen(self, value: Vec) -> Vec:
        """A vector as floats."""
        return self.convert(value, self.element, FLOAT, self.lanes)

    def splat_float(self, pointer: Pointer, offset: Offset) -> Vec:
        """A float in memory, in every lane."""
        return self.splat(self.convert(self.floats.scalar(pointer, offset), FLOAT, self.element, 0))

    def splat(self, value: Scalar) -> Vec:
        one = self.make(Vec, f"insertelement {self.vector} poison, {self.element.name} {value}, i64 0")
        every = f"<{self.lanes} x i32> zeroinitializer"
        return self.make(Vec, f"shufflevector {self.vector} {one}, {self.vector} poison, {every}")

    def insert(self, vector: Vec, value: Scalar, lane: int) -> Vec:
        return self.make(Vec, f"insertelement {self.vector} {vector}, {self.element.name} {value}, i64 {lane}")

    def constant(self, *values: float) -> Vec:
        """The values again and again."""
        lanes = [f"{self.element.name} {self.element.literal(value)}" for value in values]
        return Vec(f"<{', '.join(lanes * (self.lanes // len(lanes)))}>")

    def fma(self, a: Vec, b: Vec, c: Vec) -> Vec:
        v = self.vector
        return self.make(Vec, f"call {v} @llvm.fmuladd.v{self.lanes}{self.element.suffix}({v} {a}, {v} {b}, {v} {c})")

    def sqrt(self, value: Vec) -> Vec:
        """Square roots of floats."""
        v = self.vector
        return self.make(Vec, f"call {v} @llvm.sqrt.v{self.lanes}{self.element.suffix}({v} {value})")

    def arithmetic(self, operation: str, a: Vec, b: Vec) -> Vec:
        return self.make(Vec, f"{operation} {self.vector} {a}, {b}")

    def compare(self, comparison: str, a: Vec, b: Vec) -> Bits:
        return self.make(Bits, f"fcmp {comparison} {self.vector} {a}, {b}")

    def select(self, mask: Bits, a: Vec, b: Vec) -> Vec:
        return self.make(Vec, f"select <{self.lanes} x i1> {mask}, {self.vector} {a}, {self.vector} {b}")

    def zero_unless(self, mask: Bits | None, value: Vec) -> Vec:
        return value if mask is None else self.select(mask, value, self.constant(0))

    def total(self, value: Vec) -> Scalar:
        """The sum of all lanes, in any order."""
        v, (name, lanes) = self.vector, self._reduced
        return self.make(Scalar, f"call reassoc {name} @llvm.vector.reduce.fadd.{lanes}({name} 0.0, {v} {value})")

    def largest(self, value: Vec) -> Scalar:
        """The maximum of all lanes, NaN if any is."""
        v, (name, lanes) = self.vector, self._reduced
        found = self.make(Scalar, f"call nnan {name} @llvm.vector.reduce.fmax.{lanes}({v} {value})")
        bad, nan = self.any_of(self.is_nan(value)), self.element.literal(np.nan)
        return self.make(Scalar, f"select i1 {bad}, {name} {nan}, {name} {found}")

    @property
    def _reduced(self) -> tuple[str, str]:
        """The type of one lane, and the vector's in the names of intrinsics."""
        return self.element.name, f"v{self.lanes}{self.element.suffix}"

    def any_of(self, bits: Bits) -> Bool:
        integer = self.make(Piece, f"bitcast <{self.lanes} x i1> {bits} to i{self.lanes}")
        return self.make(Bool, f"icmp ne i{self.lanes} {integer}, 0")

    def shuffle(self, kind: str, value: V, lanes: Sequence[int | None], other: Value | None = None) -> V:
        """Lanes of one or two vectors of type ``kind``; None stands for any."""
        chosen = ", ".join("i32 poison" if lane is None else f"i32 {lane}" for lane in lanes)
        second = other if other is not None else "poison"
        pattern = f"<{len(lanes)} x i32> <{chosen}>"
        return self.make(type(value), f"shufflevector {kind} {value}, {kind} {second}, {pattern}")

    def ahead(self, low: Vec, high: Vec, by: int) -> Vec:
        """The lanes ``by`` further on of two vectors that follow one another."""
        return self.shuffle(self.vector, low, range(by, by + self.lanes), high) if by else low

    def scale_and_shift(self, value: Piece, scale: Scalar, shift: Scalar, lanes: int) -> Piece:
        """value * scale + shift for a vector of any length."""
        kind = f"<{lanes} x float>"
        ones = [self.make(Piece, f"insertelement {kind} poison, float {x}, i64 0") for x in (scale, shift)]
        scales, shifts = (self.shuffle(kind, one, [0] * lanes) for one in ones)
        product = self.make(Piece, f"fmul contract {kind} {value}, {scales}")
        return self.make(Piece, f"fadd contract {kind} {product}, {shifts}")

    def maximum(self, a: Vec, b: Vec) -> Vec:
        """The larger of two, NaN if one of them is; cheapest if ``a`` is a constant."""
        return self._extreme("ogt", a, b)

    def minimum(self, a: Vec, b: Vec) -> Vec:
        """The smaller of two, NaN if one of them is; cheapest if ``a`` is a constant."""
        return self._extreme("olt", a, b)

    def _extreme(self, comparison: str, a: Vec, b: Vec) -> Vec:
        chosen = self.select(self.compare(comparison, a, b), a, b)  # b if one of them is NaN
        return chosen if a.startswith("<") else self.select(self.is_nan(a), a, chosen)

    def is_nan(self, value: Vec) -> Bits:
        return self.compare("uno", value, value)

    def spoil(self, value: Vec) -> Vec:
        """NaN in place of infinities, all else as it is: what would make a decent number of them lets NaN through."""
        return self.fma(value, self.constant(0), value)

    def combine(self, coefficients: Sequence[float], values: Sequence[Vec]) -> Vec:
        """The sum of coefficient * value, terms with coefficient 0 left out."""
        terms = [(c, v) for c, v in zip(coefficients, values, strict=True) if c != 0]
        (first, total), *rest = sorted(terms, key=lambda term: (term[0] != 1, term[0] < 0))
        if first != 1:
            total = self.arithmetic("fmul", total, self.constant(first))
        for coefficient, value in rest:
            total = self.add_multiple(total, coefficient, value)
        return total

    def add_multiple(self, total: Vec, coefficient: float, value: Vec) -> Vec:
        if abs(coefficient) == 1:
            return self.arithmetic("fadd" if coefficient > 0 else "fsub", total, value)
        return self.fma(value, self.constant(coefficient), total)

    def multiply(self, matrix: Sequence[Sequence[float]], values: Sequence[Vec]) -> list[Vec]:
        """Matrix times values; sums and differences serve all neighbouring pairs that differ in signs only."""
        coefficients, terms = np.array(matrix, dtype=np.float64), list(values)
        for j in range(0, len(terms) - 1, 2):
            a, b = coefficients.T[j : j + 2]
            if (abs(a) == abs(b)).all():
                terms[j : j + 2] = [self.arithmetic(way, *terms[j : j + 2]) for way in ("fadd", "fsub")]
                coefficients.T[j : j + 2] = (a + b) / 2, (a - b) / 2
        made: list[Vec] = []
        for i in range(0, len(coefficients), 2):
            rows = coefficients[i : i + 2]
            if len(rows) == 2 and (abs(rows[0]) == abs(rows[1])).all():
                same, other = (rows[0] + rows[1]) / 2, (rows[0] - rows[1]) / 2
                sizes = set(abs(other[other != 0]))
                size = sizes.pop() if len(sizes) == 1 else 1.0
                total, difference = self.combine(same, terms), self.combine(other / size, terms)
                made += [self.add_multiple(total, sign * size, difference) for sign in (1, -1)]
            else:
                made += [self.combine(row, terms) for row in rows]
        return made

    def prelu(self, y: Vec, slope: Vec) -> Vec:
        """y where it is above 0, else slope * y."""
        return self.select(self.compare("ogt", y, self.constant(0)), y, self.arithmetic("fmul", y, slope))

    def apply(self, kind: str, settings: Sequence[float], y: Vec) -> Vec:
        """An elementwise function of a vector, one of FUNCTIONS."""
        if kind == "clip":
            low, high = settings
            return self.minimum(self.maximum(y, self.constant(low)), self.constant(high))
        if kind == "leaky_relu":
            return self.prelu(y, self.constant(*settings))
        if kind == "elu":
            return self.convert(self.floats._elu(self.widen(y), *settings), FLOAT, self.element, self.lanes)
        if kind == "squareplus":
            return self.convert(self.floats._squareplus(self.widen(y), *settings), FLOAT, self.element, self.lanes)
        if kind == "relu":
            return self.maximum(self.constant(0), y)
        if kind == "relu6":
            return self.minimum(self.constant(6), self.maximum(self.constant(0), y))
        if kind in ("hardsigmoid", "hardswish"):
            clipped = self.apply("relu6", (), self.arithmetic("fadd", y, self.constant(3)))
            sixth = self.arithmetic("fmul", clipped, self.constant(1 / 6))
            return sixth if kind == "hardsigmoid" else self.arithmetic("fmul", y, sixth)
        floats = self.floats
        smooth = {"tanh": floats._tanh, "gelu": floats._gelu, "mish": floats._mish}
        made = smooth[kind](self.widen(y)) if kind in smooth else floats._sigmoid(kind, self.widen(y))
        return self.convert(made, FLOAT, self.element, self.lanes)

    def _sigmoid(self, kind: str, y: Vec) -> Vec:
        """sigmoid(y), or y * sigmoid(y)."""
        sum_ = self.fma(*self._power(y, -_LOG2_E), self.constant(1))
        return self.arithmetic("fdiv", self.constant(1) if kind == "sigmoid" else y, sum_)

    def _tanh(self, y: Vec) -> Vec:
        """2 sigmoid(2 y) - 1."""
        twice = self._sigmoid("sigmoid", self.arithmetic("fadd", y, y))
        return self.fma(twice, self.constant(2), self.constant(-1))

    def _gelu(self, y: Vec) -> Vec:
        """y / 2 * (1 + erf(y / sqrt 2)); erf within 1.5e-7 by Abramowitz & Stegun 7.1.26."""
        zero, one = self.constant(0), self.constant(1)
        size = self.maximum(y, self.arithmetic("fsub", zero, y))
        z = self.arithmetic("fmul", size, self.constant(0.5**0.5))
        t = self.arithmetic("fdiv", one, self.fma(z, self.constant(0.3275911), one))
        polynomial = self.constant(1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0):
            polynomial = self.fma(polynomial, t, self.constant(coefficient))
        falling = self._exp(self.arithmetic("fsub", zero, self.arithmetic("fmul", z, z)))
        rest = self.arithmetic("fmul", polynomial, falling)
        above = self.arithmetic("fsub", self.constant(2), rest)  # 1 + erf where y > 0
        return self.arithmetic(
            "fmul",
            self.arithmetic("fmul", y, self.constant(0.5)),
            self.select(self.compare("ogt", y, zero), above, rest),
        )

    def _mish(self, y: Vec) -> Vec:
        """y tanh(log(1 + e^y)) = y n / (n + 2), n = e^y (e^y + 2); from y = 20 on it is y."""
        u = self._exp(self.minimum(self.constant(20), y))
        n = self.arithmetic("fmul", u, self.arithmetic("fadd", u, self.constant(2)))
        share = self.arithmetic("fdiv", n, self.arithmetic("fadd", n, self.constant(2)))
        return self.arithmetic("fmul", y, share)

    def _elu(self, y: Vec, alpha: float) -> Vec:
        """y where it is above 0, else alpha * (e^y - 1)."""
        below = self.arithmetic("fmul", self.constant(alpha), self.fma(*self._power(y, _LOG2_E), self.constant(-1)))
        return self.select(self.compare("ogt", y, self.constant(0)), y, below)

    def _squareplus(self, y: Vec, b: float) -> Vec:
        """(y + sqrt(y^2 + b)) / 2."""
        square = self.fma(y, y, self.constant(b))
        return self.arithmetic("fmul", self.constant(0.5), self.arithmetic("fadd", y, self.sqrt(square)))

    def _exp(self, x: Vec) -> Vec:
        """e^x for |x| <= 87 and clipped beyond."""
        return self.arithmetic("fmul", *self._power(x, _LOG2_E))

    def _power(self, x: Vec, factor: float) -> tuple[Vec, Vec]:
        """2^(factor x) as a product p 2^n: n the nearest whole number, p a polynomial; NaN if x is.

        For |x| <= 87, |factor| <= log2(e), and clipped beyond; relative error 2e-7 where multiply-adds are fused, from
        |x| = 10 on a unit in the last place of factor x more where they are not.
        """
        x = self.minimum(self.constant(87), self.maximum(self.constant(-87), x))
        magic = self.constant(1.5 * 2**23 + 127)  # adding it rounds to an integer, kept in the low bits
        shifted = self.fma(x, self.constant(factor), magic)
        r = self.fma(x, self.constant(factor), self.arithmetic("fsub", magic, shifted))
        polynomial = self.constant(_POWER[0])
        for coefficient in _POWER[1:]:
            polynomial = self.fma(polynomial, r, self.constant(coefficient))
        integers = f"<{self.lanes} x i32>"
        bits = self.make(Piece, f"bitcast {self.vector} {shifted} to {integers}")
        exponent = self.make(Piece, f"shl {integers} {bits}, <{', '.join(['i32 23'] * self.lanes)}>")
        return polynomial, self.make(Vec, f"bitcast {integers} {exponent} to {self.vector}")
