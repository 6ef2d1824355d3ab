"""docs/support.md: which backend runs which op, made of what the backends do with the zoo.

Written anew by ``make support``, in each environment the columns of the backends that it has.
"""

from __future__ import annotations

from pathlib import Path

from conformance.backends import COMPARE, HERE, runs
from manidp.graph import OPS
from networks import ZOO

PATH = Path(__file__).parents[2] / "docs" / "support.md"
HEAD = """# What each backend runs

Made by `make support` from what the backends do with the small networks of `tests/networks.py`; tests compare it with
what they do now.

- **yes**: every layer equals the NumPy reference in float64: torch in float64 within 1e-10, the reference itself in
  float32, ONNX Runtime and MindSpore within 2e-5, the engine within 2e-4, of the largest number of the layer.
- **no**: the backend raises `UnsupportedError`, which names the node.

A feature that an op has in several rows is supported only where all of its rows say so.
"""

Answers = dict[tuple[str, str], bool]  # (name in the zoo, backend) -> whether it runs there


def here() -> Answers:
    """What the backends of this environment do."""
    return {(name, backend): runs(backend, name) for name in ZOO for backend in HERE}


def written() -> Answers:
    """What the page says."""
    answers: Answers = {}
    for line in PATH.read_text(encoding="utf-8").splitlines() if PATH.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[-1] in ("yes", "no"):
            *variants, first = cells[: -len(COMPARE)][::-1]
            names = [f"{first}, {variant}" for variant in variants[0].split("; ")] if variants else [first]
            for backend, cell in zip(COMPARE, cells[-len(COMPARE) :], strict=True):
                answers |= {(name, backend): cell == "yes" for name in names}
    return answers


def page(answers: Answers) -> str:
    """The page for these answers; variants of an op with the same answers share a row."""
    lines = [HEAD, "## Ops", "", f"| op | variants | {' | '.join(COMPARE)} |", "|---|---|" + "---|" * len(COMPARE)]
    rows: dict[tuple[str, str], list[str]] = {}
    networks = []
    for name in ZOO:
        op, _, variant = name.partition(", ")
        found = " | ".join("yes" if answers[name, backend] else "no" for backend in COMPARE)
        if op in OPS:
            rows.setdefault((op, found), []).append(variant)
        else:
            networks.append(f"| {name} | {found} |")
    lines += [f"| {op} | {'; '.join(variants)} | {found} |" for (op, found), variants in rows.items()]
    lines += ["", "## Whole networks", "", f"| network | {' | '.join(COMPARE)} |", "|---|" + "---|" * len(COMPARE)]
    return "\n".join([*lines, *networks, ""])


if __name__ == "__main__":
    unknown = {(name, backend): False for name in ZOO for backend in COMPARE}
    PATH.write_text(page(unknown | written() | here()), encoding="utf-8")
    print(f"{PATH} written; columns tried here: {', '.join(HERE)}")
