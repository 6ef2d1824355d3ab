"""How many multiply-adds a second one core can do at most: what a share of the peak is a share of."""

from __future__ import annotations

import ctypes
import time

import numpy as np

from manidp.engine.engine import _compile
from manidp.engine.target import Isa

CHAINS = 12  # independent sums: more than latency times throughput of any CPU's multiply-add units
REPEATS = 400_000


def multiply_add_peak(isa: Isa, rounds: int = 15) -> float:
    """Multiply-adds a second of one core, registers only: the fastest of ``rounds`` runs of a few milliseconds."""
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    code = _compile(_loop(isa), isa)
    function = run(code.get_function_address("run"))
    numbers = np.full((CHAINS + 2) * isa.lanes, 0.5, dtype=np.float16 if isa.element.size == 2 else np.float32)
    best = np.inf
    for _ in range(rounds):
        started = time.perf_counter()
        function(numbers.ctypes.data, REPEATS)
        best = min(best, time.perf_counter() - started)
    return CHAINS * isa.lanes * REPEATS / best


def _loop(isa: Isa) -> str:
    """sums[i] = sums[i] * a + b, again and again; the sums stay in registers."""
    v = f"<{isa.lanes} x {isa.element.name}>"
    bits = 8 * isa.element.size * isa.lanes
    fma = f"@llvm.fmuladd.v{isa.lanes}{isa.element.suffix}"
    places = [f"  %p{i} = getelementptr {v}, ptr %numbers, i64 {i}" for i in range(CHAINS + 2)]
    aligned = f"align {isa.element.size}"
    loads = [f"  %start{i} = load {v}, ptr %p{i}, {aligned}" for i in range(CHAINS + 2)]
    sums = [f"  %sum{i} = phi {v} [ %start{i}, %entry ], [ %next{i}, %loop ]" for i in range(CHAINS)]
    steps = [
        f"  %next{i} = call {v} {fma}({v} %sum{i}, {v} %start{CHAINS}, {v} %start{CHAINS + 1})" for i in range(CHAINS)
    ]
    stores = [f"  store {v} %next{i}, ptr %p{i}, {aligned}" for i in range(CHAINS)]
    return "\n".join(
        [
            f"declare {v} {fma}({v}, {v}, {v})",
            "define void @run(ptr %numbers, i64 %repeats) #0 {",
            "entry:",
            *places,
            *loads,
            "  br label %loop",
            "loop:",
            "  %count = phi i64 [ 0, %entry ], [ %following, %loop ]",
            *sums,
            *steps,
            "  %following = add i64 %count, 1",
            "  %more = icmp ult i64 %following, %repeats",
            "  br i1 %more, label %loop, label %done",
            "done:",
            *stores,
            "  ret void",
            "}",
            f'attributes #0 = {{ nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}" }}',
        ]
    )
