"""Write the README's table from benchmarks/evaluation.json, the recorded output of `manidp evaluate --json`.

`make table` measures and renders; `python benchmarks/render_readme.py` renders only; a test asserts none is due.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "evaluation.json"
README = ROOT / "README.md"
BETWEEN = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """The table and the line about the machine, as markdown."""
    lines = [
        "| model | right, of all CIFAR-10 test images | multiply-adds an image (mean) | time an image |",
        "|---|---|---|---|",
    ]
    for row in record["models"]:
        share = row["mean_macs"] / row["dense_macs"]
        saved = "" if share == 1 else f" ({1 - share:.1%} fewer)"
        lines.append(
            f"| `{row['model']}` | {row['correct']:,} of {row['total']:,} = {row['correct'] / row['total']:.2%} "
            f"| {row['mean_macs'] / 1e6:.2f} M{saved} | {row['milliseconds_per_image']:.3f} ms |"
        )
    machine, row = record["machine"], record["models"][0]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("manidp", "numpy", "llvmlite") if name in machine)
    lines += [
        "",
        f"Time: this library's engine, one image at a time, {row['threads']} thread of {machine['cpu']} "
        f"({machine['system']}), {row['precision']}, median of {row['rounds']} rounds over the test set, the models in "
        f"turn; Python {machine['python']}, {versions}. Multiply-adds: the gates' own are counted; "
        f"without gates the network takes {row['dense_macs']:,}.",
        "",
    ]
    return "\n".join(lines)


def rendered(readme: str, record: dict[str, Any]) -> str:
    """The README with its table replaced."""
    if not BETWEEN.search(readme):
        raise SystemExit("README.md has lost its markers <!-- table --> and <!-- /table -->")
    return BETWEEN.sub(lambda _: table(record), readme)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(), json.loads(RECORD.read_text())))
