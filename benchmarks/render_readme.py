"""Write the README's table and benchmarks/README.md from benchmarks/bench.json, the record of `manidp bench`.

`make table` measures and renders; `python benchmarks/render_readme.py` renders only; a test asserts none is due.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "bench.json"
README = ROOT / "README.md"
FULL = ROOT / "benchmarks" / "README.md"
MORE = "; quartiles, other vector widths, larger networks: [benchmarks](benchmarks/README.md)"
BETWEEN = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """The README's table, what it says, what is not faster, and the line about the machine, as markdown."""
    single, many = record["modes"][0], record["modes"][-1]
    own = _own(record)
    latency, throughput = (_dense_peer(mode) for mode in (single, many))
    lines = [
        f"| computes | runtime | correct, of {record['images']:,} test images | multiply-adds an image "
        f"| latency: 1 image, 1 thread | throughput: batches of {many['batch']}, {many['threads']} threads |",
        "|---|---|---|---|---|---|",
    ]
    for row in single["rows"]:
        if row["runtime"].startswith("manidp") and row["runtime"] != own and row["precision"] == "float32":
            continue
        beside = _same(many, row)
        strong = "**" if row["computes"] == "kept channels" and row["model"] == _gated(single) else ""
        original = row["computes"] == "everything" and row["model"] == _dense(single)
        if (
            not original
            and row["computes"] != "kept channels"
            and not (row["runtime"] == own or (row["runtime"], row["precision"]) == ("ONNX Runtime", "float32"))
        ):
            continue
        runtime = row["runtime"] + ("" if row["precision"] == "float32" else f" ({row['precision']})")
        lines.append(
            f"| `{_short(row['model'])}`: {row['computes']} | {strong}{runtime}{strong} "
            f"| {row['correct']:,} = {row['correct'] / row['total']:.2%} | {row['macs'] / 1e6:.2f} M "
            f"| {strong}{row['median']:.3f} ms, {latency / row['median']:.1f}x{strong} "
            f"| {strong}{1e3 / beside['median']:,.0f} images/s, {throughput / beside['median']:.1f}x{strong} |"
        )
    lines += ["", _claim(record), "", _not_faster(record), "", _machine(record), ""]
    return "\n".join(lines)


def _own(record: dict[str, Any]) -> str:
    """The engine at the width it picks by itself: the first it lists."""
    name: str = record["modes"][0]["rows"][0]["runtime"]
    return name


def _same(mode: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(
        other for other in mode["rows"] if (other["runtime"], other["model"]) == (row["runtime"], row["model"])
    )
    return found


def _dense_peer(mode: dict[str, Any]) -> float:
    """Milliseconds an image of the fastest dense float32 runtime other than ours."""
    return min(row["median"] for row in _dense_peers(mode) if row["precision"] == "float32")


def _dense_peers(mode: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in mode["rows"] if not row["runtime"].startswith("manidp") and row["model"] == _dense(mode)]


def _dense(mode: dict[str, Any]) -> str:
    """The original network: the first that was measured."""
    name: str = mode["rows"][0]["model"]
    return name


def _gated(mode: dict[str, Any]) -> str:
    """The gated network: the last of which closed channels were skipped."""
    name: str = [row["model"] for row in mode["rows"] if row["computes"] == "kept channels"][-1]
    return name


def _short(model: str) -> str:
    """A model's name; of a file in a folder of its own, the folder's."""
    return model.removesuffix(".safetensors").removesuffix("/model").rpartition("/")[2]


def ratios(mode: dict[str, Any], own: str) -> dict[str, float]:
    """Speedups of the gated engine over the fastest dense float32 runtime, its dense self, and masked ONNX Runtime."""
    rows = [row for row in mode["rows"] if row["model"] == _gated(mode)]
    gated = next(row for row in rows if row["runtime"] == own)
    masked = [row["median"] for row in rows if row["runtime"] == "ONNX Runtime" and row["precision"] == "float32"]
    ours = next(row for row in mode["rows"] if row["runtime"] == own and row["model"] == _dense(mode))
    speedups = {"dense": _dense_peer(mode) / gated["median"], "own": ours["median"] / gated["median"]}
    return speedups | ({"masked": masked[0] / gated["median"]} if masked else {})


def half_ratio(mode: dict[str, Any]) -> float | None:
    """Speedup of the gated engine in float16 over the fastest dense runtime of any precision, if it ran."""
    own = [row for row in mode["rows"] if row["runtime"].startswith("manidp") and row["precision"] == "float16"]
    dense: float = min(row["median"] for row in _dense_peers(mode))
    gated = [row for row in own if row["model"] == _gated(mode)]
    return dense / gated[0]["median"] if gated else None


def _claim(record: dict[str, Any]) -> str:
    single, many = record["modes"][0], record["modes"][-1]
    one, all_ = ratios(single, _own(record)), ratios(many, _own(record))
    half = half_ratio(single)
    return (
        f"In float32 the gated network is **{one['dense']:.1f}x faster** in latency and {all_['dense']:.1f}x in "
        f"throughput than the fastest other runtime on the dense network, {one['own']:.1f}x and {all_['own']:.1f}x "
        f"faster than manidp on the dense network, and {one['masked']:.1f}x and {all_['masked']:.1f}x faster than ONNX "
        "Runtime on the gated network."
        + (f" In float16 its latency is {half:.1f}x better than that of any other runtime." if half else "")
        + " Speedups in the table are over the fastest other runtime on the dense network in float32."
    )


def _not_faster(record: dict[str, Any]) -> str:
    """The dense runtimes that the gated engine beats by less than 5 %, and where."""
    found: dict[str, list[str]] = {}
    for mode in record["modes"]:
        batch = "one image at a time" if mode["batch"] == 1 else f"in batches of {mode['batch']}"
        where = f"{batch} on {mode['threads']} thread{'s' if mode['threads'] > 1 else ''}"
        ours = [row for row in mode["rows"] if row["runtime"].startswith("manidp") and row["model"] == _gated(mode)]
        ours = [row for row in ours if row["runtime"] == _own(record) or row["precision"] == "float16"]
        for peer in _dense_peers(mode):
            speedups = [(peer["median"] / row["median"], row["precision"]) for row in ours]
            told = [f"{speedup:.2f}x ({precision})" for speedup, precision in speedups if speedup < 1.05]
            if told:
                found.setdefault(f"{peer['runtime']} ({peer['precision']})", []).append(f"{where} {' and '.join(told)}")
    if not found:
        return "**Not faster:** nothing in this table."
    peers = (f"{peer} on the dense network: {', '.join(places)}" for peer, places in found.items())
    return f"**Not faster** than {'; than '.join(peers)}."


def _machine(record: dict[str, Any]) -> str:
    machine, mode = record["machine"], record["modes"][0]
    versions = ", ".join(
        f"{name} {version}" for name, version in machine.items() if name not in ("cpu", "cores", "system", "python")
    )
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, {versions}. "
        f"Medians of {mode['rounds']} rounds; the runtimes take turns on the same images; multiply-adds include "
        f"those of the gates. `make table` repeats it{MORE}."
    )


def full(record: dict[str, Any]) -> str:
    """All that was measured, as markdown."""
    lines = ["# What was measured", "", "Rendered from `bench.json` by `render_readme.py`; `make table` measures anew."]
    lines += ["", _machine(record).replace(MORE, "")]
    peaks = ", ".join(f"{isa} {peak / 1e9:.1f}" for isa, peak in record["peak"].items())
    start = record["start_up"]
    lines += [
        "",
        f"Peak of one core, in billion multiply-adds a second, by instruction set: {peaks}. *Of peak* is the network's "
        "multiply-adds a second divided by that (for other runtimes: by the peak of the widest set). It can exceed "
        "100 %: Winograd's algorithm needs fewer multiplications than a convolution has multiply-adds.",
        "",
        f"Import {start['import_seconds']:.2f} s; load, with compilation, {start['load_seconds']:.2f} s; process "
        f"start to first result {start['start_to_result_seconds']:.2f} s; {start['resident_mebibytes']:.0f} MiB "
        "resident (medians of 7 processes).",
    ]
    for single in record["single_images"]:
        lines += [
            "",
            f"Single images, `{single['model']}`, {len(single['macs']):,} test images: "
            f"{single['fixed_microseconds']:.0f} µs and {single['microseconds_per_million_macs']:.2f} µs for each "
            f"million multiply-adds; correlation of time and multiply-adds {single['correlation']:.2f}.",
        ]
    lines += ["", "![Accuracy against time, and time against multiply-adds](../docs/speed.png)"]
    for mode in record["modes"]:
        plural = "s" if mode["threads"] > 1 else ""
        lines += _section(f"{mode['batch']} at a time on {mode['threads']} thread{plural}", mode, record)
    for grown in record["growth"]:
        note = (
            f"{grown['network']}, random weights, {grown['keep_rate']:.0%} of gated channels kept, one image at "
            "a time on one thread"
        )
        lines += _section(note, grown, record)
    if record["skipped"]:
        lines += ["", "## Not measured", "", *(f"- {name}: {reason}" for name, reason in record["skipped"].items())]
    return "\n".join([*lines, ""])


def _section(title: str, mode: dict[str, Any], record: dict[str, Any]) -> list[str]:
    found = ratios(mode, _own(record))
    said = f"Speedup of the gated engine over the fastest dense float32 runtime: {found['dense']:.2f}x"
    said += f"; over masked ONNX Runtime: {found['masked']:.2f}x." if "masked" in found else "."
    half = half_ratio(mode)
    said += f" In float16, over the fastest dense runtime of any precision: {half:.2f}x." if half is not None else ""
    lines = ["", f"## {title}", "", f"n = {mode['rounds']} rounds. {said}", ""]
    lines += [
        "| runtime | model | computes | precision | correct | M multiply-adds | ms an image (quartiles) | of peak "
        "| largest logit difference | predictions that differ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in mode["rows"]:
        right = "" if row["correct"] is None else f"{row['correct']:,} of {row['total']:,}"
        lines.append(
            f"| {row['runtime']} | {_short(row['model'])} | {row['computes']} | {row['precision']} | {right} "
            f"| {row['macs'] / 1e6:.2f} | {row['median']:.3f} "
            f"({row['lower_quartile']:.3f}, {row['upper_quartile']:.3f}) | {row['share_of_peak']:.0%} "
            f"| {row['largest_difference']:.1e} | {row['other_answers']} |"
        )
    return lines


def rendered(readme: str, record: dict[str, Any]) -> str:
    """The README with its table replaced."""
    if not BETWEEN.search(readme):
        raise SystemExit("README.md has lost its markers <!-- table --> and <!-- /table -->")
    return BETWEEN.sub(lambda _: table(record), readme)


if __name__ == "__main__":
    found = json.loads(RECORD.read_text())
    README.write_text(rendered(README.read_text(), found))
    FULL.write_text(full(found))
