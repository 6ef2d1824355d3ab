"""The instruction sets that the engine writes code for."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding as llvm

from manidp.engine.ir import FLOAT, HALF, Element
from manidp.errors import UnsupportedError

_ELEMENTS = {"float32": FLOAT, "float16": HALF}


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


def available_isas(precision: str = "float32") -> tuple[str, ...]:
    """Names of the vector instruction sets of this CPU that have arithmetic of a precision, widest first."""
    return tuple(isa.name for isa in _runnable(precision) if not isa.emulates)


def emulating_isas(precision: str) -> tuple[str, ...]:
    """Names of those that only emulate it, slowly: never taken unless asked for."""
    return tuple(isa.name for isa in _runnable(precision) if isa.emulates)


def choose_isa(precision: str, name: str | None) -> Isa:
    """The instruction set of this name, by default the widest. Raises UnsupportedError if this CPU lacks it."""
    available = available_isas(precision)
    if isinstance(name, str) and name in available + emulating_isas(precision):
        return ISAS[name]
    if name is None and available:
        return ISAS[available[0]]
    if not available:
        missing = "AVX512-FP16 or Arm's FP16" if precision == "float16" else "vector"
        raise UnsupportedError(f"precision {precision!r} needs {missing} instructions, which this CPU does not have")
    raise UnsupportedError(f"for {precision} this CPU has {', '.join(available)}; got {name!r}")


def _runnable(precision: str) -> list[Isa]:
    if not isinstance(precision, str) or precision not in _ELEMENTS:
        raise UnsupportedError(f"precisions {' and '.join(map(repr, _ELEMENTS))} can be run; got {precision!r}")
    features = llvm.get_host_cpu_features()
    return [
        isa
        for isa in ISAS.values()
        if isa.element == _ELEMENTS[precision] and all(features.get(feature) for feature in isa.features)
    ]
