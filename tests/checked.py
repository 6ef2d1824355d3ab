"""The engine's code with every load and store bounded: instead of leaving its region, it says which one would have.

``Checked`` is the module with its text rewritten. Every pointer is followed from where it enters a function to where
it is used, and with it goes the region that it may be used in: a map, a vector, a part of the constants, a table, the
images, the results, the state. A line with a pointer that is not understood is an error, so nothing is left unchecked.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator
from unittest import mock

from engine_cases import Array, run_program
from manidp.engine.engine import Program
from manidp.engine.module import Module
from manidp.engine.steps import Plan
from manidp.engine.target import ISAS, Isa
from manidp.result import Result

BOUNDS = ("low", "high", "first", "last")  # where a pointer may write, and where it may read; ends not included
Region = tuple[int, int, int, int]  # the same in bytes
READ_BEYOND = 9  # vectors that a map may be read beyond its end
TRASH = 1 << 16  # bytes: what would leave its region goes there
_SIZES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "half": 2, "float": 4}
_DEFINE = re.compile(r"define (?:internal|dso_local) void @(\w+)\((.*)\) #0 \{")
_TABLE = re.compile(r"(@table\d+) = internal constant \[(\d+) x (\w+)\] .*")
_OFFSET = re.compile(r"  (%\S+) = getelementptr (?:inbounds )?\w+, ptr ([%@]\S+), i64 (\S+)")
_LOAD = re.compile(r"  %\S+ = load (.+?), ptr ([%@]\S+?)(?:, align \d+)?")
_STORE = re.compile(r"  store (?:atomic )?(<\d+ x \w+>|\w+) .*, ptr ([%@]\S+?)(?: monotonic)?, align \d+")
_ATOMIC = re.compile(r"  %\S+ = atomicrmw add ptr (%\S+), i64 1 monotonic")
_COPY = re.compile(r"  call void @llvm\.memcpy\.\S+\(ptr (%\S+), ptr (%\S+), i64 (\S+), i1 false\)")
_CLEAR = re.compile(r"  call void @llvm\.memset\.\S+\(ptr (%\S+), i8 0, i64 (\d+), i1 false\)")
_PREFETCH = re.compile(r"  call void @llvm\.prefetch\.\S+\(ptr (%\S+), i32 0, i32 [23], i32 1\)")
_LINE = 64  # bytes of a cache line
_CALL = re.compile(r"  call void @([\w.]+)\((.*)\)")


def _size(kind: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    return int(vector[1]) * _SIZES[vector[2]] if vector else _SIZES[kind]


class Checked(Module):
    """Code that counts accesses and notes the line of ``lines`` that would have left its region."""

    def __init__(self, plan: Plan, isa: Isa) -> None:
        super().__init__(plan, isa)
        self.lines = self.text.split("\n")
        self.of_tables = {m[1]: int(m[2]) * _SIZES[m[3]] for m in map(_TABLE.fullmatch, self.lines) if m}
        self.of_workspace = dict(_regions(plan, self.workspace, isa))
        parts = {int(m[3]) for m in map(_OFFSET.fullmatch, self.lines) if m and m[2] == "%k" and m[3].isdigit()}
        self.of_constants = {
            begin: (4 * begin, 4 * end, 4 * begin, 4 * end)
            for begin, end in itertools.pairwise(sorted({0, *parts, len(plan.constants)}))
        }
        self.parts = {m[1] for m in map(_DEFINE.fullmatch, self.lines) if m and "ptr %w" in m[2]}
        self.numbers, self.entry = itertools.count(), list[str]()
        self.text = "\n".join(
            [
                "@violation = dso_local global i64 0",
                "@accesses = dso_local global i64 0",
                f"@trash = internal global [{TRASH} x i8] zeroinitializer",
                *(new for number, line in enumerate(self.lines) for new in self._rewritten(number, line)),
            ]
        )

    def _rewritten(self, number: int, line: str) -> Iterator[str]:
        if line == "entry:":
            yield line
            yield from self.entry
        elif not re.search(r"\bptr\b", line) or line.startswith(("declare", "@table")):
            yield line
        elif match := _DEFINE.fullmatch(line):
            pointers = re.findall(r"ptr (%\w+)", match[2])
            self.regions = {pointer: pointer for pointer in pointers}  # pointer -> whose bounds hold for it
            self.entry = list(self._areas()) if match[1] == "run" else []
            if match[1] != "run":
                line = re.sub(
                    r"ptr (%\w+)", lambda m: f"ptr {m[1]}{''.join(f', i64 {m[1]}.{b}' for b in BOUNDS)}", line
                )
            yield line
        elif match := _OFFSET.fullmatch(line):
            yield line
            name, base, offset = match.groups()
            self.regions[name] = self.regions.get(base, base)
            if base in ("%w", "%k"):
                regions = self.of_workspace if base == "%w" else self.of_constants
                self.regions[name] = name
                yield from _bounds(name, base, regions[int(offset) if offset.isdigit() else 0])
        elif match := _CALL.fullmatch(line):
            yield from self._call(number, *match.groups())
        elif match := _LOAD.fullmatch(line):
            yield from self._bounded(number, line, match[2], str(_size(match[1])), reads=True)
        elif match := _STORE.fullmatch(line):
            yield from self._bounded(number, line, match[2], str(_size(match[1])))
        elif match := _ATOMIC.fullmatch(line):
            yield from self._bounded(number, line, match[1], "8")
        else:
            raise AssertionError(f"not understood: {line}")

    def _areas(self) -> Iterator[str]:
        """What the caller of ``run`` must provide."""
        channels, height, width = self.plan.graph.input.dims
        pixels = channels * height * width
        results = self.plan.graph.num_classes + sum(self.plan.graph.gate_channels.values())
        yield "  %bytes.are = icmp ne i64 %bytes, 0"
        yield f"  %images.one = select i1 %bytes.are, i64 {pixels}, i64 {4 * pixels}"
        yield "  %images.size = mul i64 %images.one, %count"
        yield f"  %results.size = mul i64 {4 * results}, %count"
        sizes = {"state": 16, "w": 4 * self.workspace, "k": 4 * len(self.plan.constants)}
        for name in ("images", "results", *sizes):
            yield f"  %{name}.low = ptrtoint ptr %{name} to i64"
            yield f"  %{name}.high = add i64 %{name}.low, {sizes.get(name, f'%{name}.size')}"
            yield f"  %{name}.first = add i64 %{name}.low, 0"
            yield f"  %{name}.last = add i64 %{name}.high, 0"

    def _call(self, number: int, function: str, arguments: str) -> Iterator[str]:
        line = f"  call void @{function}({arguments})"
        if match := _CLEAR.fullmatch(line):
            yield from self._bounded(number, line, match[1], match[2])
        elif match := _PREFETCH.fullmatch(line):
            yield from self._bounded(number, line, match[1], str(_LINE), reads=True)
        elif match := _COPY.fullmatch(line):
            target, source, length = match.groups()
            for pointer, reads in ((target, False), (source, True)):
                *lines, line = self._bounded(number, line, pointer, length, reads=reads)
                yield from lines
                name = f"%length{next(self.numbers)}"
                yield f"  {name} = select i1 {self.fits}, i64 {length}, i64 0"
                line = line.replace(f"i64 {length}", f"i64 {name}")
                length = name
            yield line
        else:
            whole = []
            for argument in arguments.split(", "):
                whole.append(argument)
                if argument.startswith("ptr "):
                    pointer = argument.removeprefix("ptr ")
                    region = self.regions.get(pointer, pointer)
                    if pointer == "%k" and function not in self.parts:
                        region = f"%constants{next(self.numbers)}"
                        yield from _bounds(region, "%k", self.of_constants[0])
                    whole += [f"i64 {self._bound(region, bound)}" for bound in BOUNDS]
            yield f"  call void @{function}({', '.join(whole)})"

    def _bound(self, region: str, bound: str) -> str:
        if region == "null":
            return "0"
        if not region.startswith("@"):
            return f"{region}.{bound}"
        size = self.of_tables[region] if bound in ("high", "last") else 0
        return f"add (i64 ptrtoint (ptr {region} to i64), i64 {size})"

    def _bounded(self, number: int, line: str, pointer: str, end: str, *, reads: bool = False) -> Iterator[str]:
        """The line, if the bytes before ``end`` from ``pointer`` on are in its region."""
        low, high = BOUNDS[2:] if reads else BOUNDS[:2]
        region, name = self.regions.get(pointer, pointer), f"%check{next(self.numbers)}"
        self.fits = f"{name}.fits"
        yield f"  {name}.at = ptrtoint ptr {pointer} to i64"
        yield f"  {name}.end = add i64 {name}.at, {end}"
        yield f"  {name}.low = icmp uge i64 {name}.at, {self._bound(region, low)}"
        yield f"  {name}.high = icmp ule i64 {name}.end, {self._bound(region, high)}"
        yield f"  {self.fits} = and i1 {name}.low, {name}.high"
        yield f"  {name}.safe = select i1 {self.fits}, ptr {pointer}, ptr @trash"
        yield f"  {name}.old = load i64, ptr @violation"
        yield f"  {name}.new = select i1 {self.fits}, i64 {name}.old, i64 {number}"
        yield f"  store i64 {name}.new, ptr @violation"
        yield f"  {name}.before = load i64, ptr @accesses"
        yield f"  {name}.after = add i64 {name}.before, 1"
        yield f"  store i64 {name}.after, ptr @accesses"
        yield re.sub(rf"ptr {re.escape(pointer)}(?![\w.])", f"ptr {name}.safe", line)


def _bounds(name: str, base: str, region: Region) -> Iterator[str]:
    for bound, offset in zip(BOUNDS, region, strict=True):
        yield f"  {name}.{bound} = add i64 {base}.low, {offset}"


def _regions(plan: Plan, workspace: int, isa: Isa) -> Iterator[tuple[int, Region]]:
    """Offset in the workspace, in floats -> bounds of what begins there, in bytes from the workspace's begin.

    Maps may be read beyond their ends, as docs/engine.md says, but not written.
    """
    size = isa.element.size
    maps: dict[int, Region] = {}
    gaps: dict[int, Region] = {}  # before maps
    for map_ in plan.maps.values():
        if map_.at >= 0:
            begin, end = 4 * map_.at, 4 * map_.at + map_.channels * map_.layout.channel * size
            gap = (map_.layout.plane - map_.layout.rows * map_.layout.pitch) * size
            beyond = READ_BEYOND * isa.lanes * size
            first = begin - gap - isa.lanes * size
            if map_.at in maps:  # some maps share their memory
                end, first = max(end, maps[map_.at][1]), min(first, maps[map_.at][2])
            maps[map_.at] = (begin, end, first, end + beyond)
            if map_.gap:
                at = map_.at - map_.gap
                last = max(begin, gaps[at][1] if at in gaps else 0)
                gaps[at] = (begin - 4 * map_.gap, last, last, last)
    for at, (begin, end, first, last) in gaps.items():  # another map may have begun there
        low, high, *read = maps.get(at, (begin, end, first, last))
        maps[at] = (low, max(high, end), read[0], max(read[1], end))
    yield from maps.items()
    begins = sorted([*set(plan.vectors.values()), *(r[0] // 4 for r in maps.values()), plan.workspace])
    for begin, end in itertools.pairwise(begins):
        if begin not in maps:
            yield begin, (4 * begin, 4 * end, 4 * begin, 4 * end)
    yield plan.workspace, (4 * plan.workspace, 4 * workspace, 4 * plan.workspace, 4 * workspace)


def run_checked(plan: Plan, isa: str, images: Array, module: type[Checked] = Checked) -> tuple[Result, str, int]:
    """What a plan's checked code gives, an instruction that would have left its region, and the number of accesses."""
    with mock.patch("manidp.engine.engine.Module", module):
        program = Program(plan, ISAS[isa])
    result, _ = run_program(program, plan, images)
    addresses = (program._code.get_global_value_address(name) for name in ("violation", "accesses"))
    violation, accesses = (ctypes.c_int64.from_address(address).value for address in addresses)
    return result, module(plan, ISAS[isa]).lines[violation].strip() if violation else "", accesses
