#!/usr/bin/env python3
"""Turns runs of `fourfold bench --backend cpu` and scripts/ggml_peers.py into the documentation's tables and plot.

    scripts/cpu_figures.py record GRID PEERS --commit SUBJECT   their --json files, of one session -> docs/measured/cpu.json
    scripts/cpu_figures.py write                                the tables of README.md and docs/cpu.md, and the plot
    scripts/cpu_figures.py check                                exit status 1 where those are not what the JSON says

`write` needs matplotlib (pip install matplotlib), the others Python alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from measured_pages import (
    ROOT,
    digest,
    measured_times,
    pyplot,
    report_stale,
    require_checked,
    row,
    save_plot,
    with_tables,
)

MEASURED = ROOT / "docs/measured/cpu.json"
PLOT = ROOT / "docs/measured/cpu.svg"
FORMATS = ("nvfp4", "bf16")
PEERS = {"nvfp4": "ggml NVFP4", "mxfp4": "ggml MXFP4 (repacked)", "q4_0": "ggml Q4_0 (repacked)"}


@dataclass
class Cell:
    """One number of threads and of tokens; seconds."""

    ours: dict[str, float] = field(default_factory=dict)  # by activation format
    floor: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)


def cells(measured: dict) -> dict[int, dict[int, Cell]]:
    """By threads, then tokens."""
    found: dict[int, dict[int, Cell]] = {}
    for case in measured["cases"]:
        cell = found.setdefault(case["threads"], {}).setdefault(case["tokens"], Cell())
        cell.ours[case["activations"]] = case["seconds"]
        cell.floor[case["activations"]] = case["floor_seconds"]
    for case in measured["peers"]:
        found[case["threads"]][case["tokens"]].peers[case["peer"]] = case["seconds"]
    return found


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


# ---- recording ----


def report_in(file: Path, program: str, members: tuple[str, ...]) -> dict:
    """What a program wrote as JSON, with these members in it and in its cases."""
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {file}: expected what {program} --json writes, found none: {error}")
    cases = report.get("cases") if isinstance(report, dict) else None
    if not cases or not all(set(members) <= set(case) for case in cases):
        sys.exit(f"error: {file}: expected what {program} --json writes, with {', '.join(members)} of each case")
    return report


def record(grid_file: Path, peers_file: Path, commit: str) -> None:
    common = ("model", "experts", "threads", "tokens")
    grid = report_in(grid_file, "fourfold bench", (*common, "status", "activations"))
    peers = report_in(peers_file, "ggml_peers.py", (*common, "peer", "rel_l2"))
    for case in grid["cases"]:
        require_checked(grid_file, case)
    layers = {(case["model"], case["experts"]) for case in (*grid["cases"], *peers["cases"])}
    if len(layers) != 1:
        found = ", ".join(f"{model} with {experts} experts" for model, experts in sorted(layers))
        sys.exit(f"error: {grid_file}, {peers_file}: expected cases of one layer, found {found}")
    cells_of_grid = {(case["threads"], case["tokens"]) for case in grid["cases"]}
    for threads, tokens in sorted(cells_of_grid):
        formats = {
            case["activations"] for case in grid["cases"] if (case["threads"], case["tokens"]) == (threads, tokens)
        }
        if formats != set(FORMATS):
            where = f"{threads} threads, {tokens} tokens"
            sys.exit(f"error: {grid_file}: {where}: expected activations {' and '.join(FORMATS)}, found {formats}")
    for case in peers["cases"]:
        where = f"{case['peer']}, {case['threads']} threads, {case['tokens']} tokens"
        if (case["threads"], case["tokens"]) not in cells_of_grid:
            sys.exit(f"error: {peers_file}: {where}: expected a case that {grid_file} has, too")
        if case["seconds"] is None:
            sys.exit(f"error: {peers_file}: {where}: expected a checked time, found relative L2 {case['rel_l2']:.1e}")
    if {machine["machine"] for machine in grid["machines"]} != {peers["machine"]}:
        sys.exit(f"error: {peers_file}: expected a run on the machine of {grid_file}, found {peers['machine']}")
    kept = ("peer", "threads", "tokens", "seconds", "rel_l2")
    measured = {
        "model": layers.pop()[0],
        "machines": [
            {
                "machine": machine["machine"],
                "threads": machine["threads"],
                "read_bytes_per_second": machine["read_bandwidth"]["per_second"],
                "peaks": {peak["name"]: peak["per_second"] for peak in machine["peaks"] if peak["per_second"]},
            }
            for machine in grid["machines"]
        ],
        "commit": commit,
        "ggml": peers["ggml"],
        "cases": [
            {key: case[key] for key in ("threads", "tokens", "activations", "kernel")} | measured_times(case)
            for case in grid["cases"]
        ],
        "peers": [{key: case[key] for key in kept} for case in peers["cases"]],
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")


# ---- tables and the plot ----


def table(measured: dict) -> str:
    """Milliseconds, in brackets % of the floor, m: of memory, a: of arithmetic."""
    by = {(case["threads"], case["tokens"], case["activations"]): case["floor_by"][0] for case in measured["cases"]}
    text = row(["threads", "T", *(f"fourfold {name}" for name in FORMATS), *PEERS.values()])
    text += row(["---"] * (2 + len(FORMATS) + len(PEERS)))
    for threads, of_threads in cells(measured).items():
        for tokens, cell in of_threads.items():
            ours = [
                f"{milliseconds(cell.ours[name])} ({100 * cell.floor[name] / cell.ours[name]:.0f}"
                f" {by[threads, tokens, name]})"
                for name in FORMATS
            ]
            peers = [milliseconds(cell.peers[name]) if name in cell.peers else "" for name in PEERS]
            text += row([str(threads), str(tokens), *ours, *peers])
    return text


def readme_table(measured: dict) -> str:
    """Of all threads."""
    text = row(["tokens", "fourfold nvfp4", "floor", "fourfold bf16", *PEERS.values()])
    text += row(["---"] * (4 + len(PEERS)))
    found = cells(measured)
    for tokens, cell in found[max(found)].items():
        times = [cell.ours["nvfp4"], cell.floor["nvfp4"], cell.ours["bf16"]]
        peers = [milliseconds(cell.peers[name]) if name in cell.peers else "" for name in PEERS]
        text += row([str(tokens), *map(milliseconds, times), *peers])
    return text


def documents(measured: dict) -> dict[Path, str]:
    """The files that hold tables, as they have to be."""
    sections = {ROOT / "README.md": readme_table, ROOT / "docs/cpu.md": table}
    return {
        file: with_tables(file, {"measured: cpu": lambda content=content: content(measured)})
        for file, content in sections.items()
    }


def plot(measured: dict) -> None:
    plt = pyplot()
    found = cells(measured)
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 5), layout="constrained", squeeze=False)
    for axis, (threads, of_threads) in zip(axes[0], found.items(), strict=True):
        tokens = list(of_threads)
        lines = [(PEERS[name], [cell.peers.get(name) for cell in of_threads.values()], "--") for name in PEERS]
        lines += [
            (f"fourfold {name}", [cell.ours[name] for cell in of_threads.values()], "-") for name in reversed(FORMATS)
        ]
        for label, seconds, style in lines:
            times = [float("nan") if value is None else 1e3 * value for value in seconds]
            axis.plot(tokens, times, style, marker="o", markersize=3, label=label)
        floor = [1e3 * cell.floor["nvfp4"] for cell in of_threads.values()]
        axis.plot(tokens, floor, ":", color="black", label="floor of nvfp4: bytes / bandwidth, operations / peak")
        title = f"{measured['model']}, {threads} thread{'s' if threads > 1 else ''}"
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
        axis.title.set_size(9)
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    save_plot(figure, PLOT, digest(MEASURED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="results of both programs -> docs/measured/cpu.json")
    recording.add_argument("grid", type=Path, help="of fourfold bench --json")
    recording.add_argument("peers", type=Path, help="of ggml_peers.py --json")
    recording.add_argument("--commit", required=True, help="subject of the commit that was measured")
    commands.add_parser("write", help="tables and plot from the JSON")
    commands.add_parser("check", help="whether tables and plot are what the JSON says")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.grid, arguments.peers, arguments.commit)
        return 0
    measured = json.loads(MEASURED.read_text())
    if arguments.command == "check":
        source = str(MEASURED.relative_to(ROOT))
        return report_stale(documents(measured), {PLOT: digest(MEASURED)}, source, Path(__file__).name)
    for file, text in documents(measured).items():
        file.write_text(text)
    plot(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
