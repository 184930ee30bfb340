#!/usr/bin/env python3
"""Turns a run of scripts/gpu_check.sh into the tables and the plot of the documentation.

    scripts/hopper_figures.py record FOLDER --commit SUBJECT [--counters FOLDER]
                                                               FOLDER: gpu_check's --out -> docs/measured/hopper.json,
                                                               or h200.json where that is the GPU
    scripts/hopper_figures.py record-humming GRID PEERS --commit SUBJECT
                                                               bench's and vllm_peers.py's JSON of one machine ->
                                                               docs/measured/h200_humming.json
    scripts/hopper_figures.py write                            the tables of README.md, docs/hopper.md,
                                                               docs/hopper-counters.md and docs/hopper-h100.md, and
                                                               the plots
    scripts/hopper_figures.py check                            exit status 1 where those are not what the JSON says

docs/measured/hopper.json (an H100's), h200.json and h200_humming.json hold times and floors as measured, and but for the
targets, below, nothing else may stand in the tables; docs/measured/hopper_peers.json holds figures of programs that were
measured elsewhere, on an H100, with their source. An H200's peers are of its own run, but for humming.
`write` needs matplotlib (pip install matplotlib), the others Python alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
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

MEASURED = ROOT / "docs/measured/hopper.json"
MEASURED_H200 = ROOT / "docs/measured/h200.json"
HUMMING = ROOT / "docs/measured/h200_humming.json"
PEERS = ROOT / "docs/measured/hopper_peers.json"
PAGES = {ROOT / "docs/hopper.md": MEASURED_H200, ROOT / "docs/hopper-h100.md": MEASURED}
COUNTER_PAGES = {ROOT / "docs/hopper-counters.md": MEASURED_H200, ROOT / "docs/hopper-h100.md": MEASURED}
PLOTS = {MEASURED: ROOT / "docs/measured/hopper.svg", MEASURED_H200: ROOT / "docs/measured/h200.svg"}
FORMATS = ("bf16", "nvfp4")
TORCH = "torch grouped_mm bf16"
PEER_NAMES = {"marlin": "Marlin (vLLM)", "triton_kernels": "triton_kernels (MXFP4)", "humming": "humming"}
README_TOKENS = (1, 16, 256, 4096, 16384)
UNTUNED_TOKENS = (1, 16, 256, 1024, 4096)
LEAST_SHARE = 0.02
ROUTINGS = ("zipf", "one-expert", "sequences")  # beside the grid's uniform ones
TITLES = {
    "deepseek-v3": "A: DeepSeek-V3 (H 7168, I 2048, E 256, top-8)",
    "qwen3-30b-a3b": "B: Qwen3-30B-A3B (H 2048, I 768, E 128, top-8)",
    "deepseek-v4-flash": "C: DeepSeek-V4-Flash (H 4096, I 2048, E 256, top-6)",
}
# What the project set out to reach on an H100, in per cent of the floor.
TARGETS = {
    "deepseek-v3": {1: 82, 4: 90, 16: 93, 64: 93, 256: 93, 1024: 82, 4096: 86, 8192: 92, 16384: 92},
    "qwen3-30b-a3b": {1: 50, 4: 70, 16: 85, 64: 85, 256: 85, 1024: 65, 4096: 80, 8192: 86, 16384: 86},
    "deepseek-v4-flash": {1: 75, 4: 87, 16: 93, 64: 93, 256: 93, 1024: 82, 4096: 82, 8192: 90, 16384: 90},
}


@dataclass
class Cell:
    """One shape and number of tokens; times in seconds."""

    ours: dict[str, float]  # by activation format; the median
    fastest: dict[str, float]  # the 10th percentile
    floor: dict[str, float]
    others: dict[str, float]  # by program; torch's is of the same run

    def fraction(self, activations: str) -> float:
        return self.floor[activations] / self.ours[activations]


def cells(of: Path) -> dict[str, dict[int, Cell]]:
    """By model, then tokens. Peers that were measured elsewhere were so on an H100, and are none of another GPU's."""
    measured, peers = json.loads(of.read_text()), json.loads(PEERS.read_text())
    found: dict[str, dict[int, Cell]] = {}
    for case in measured["cases"]:
        cell = found.setdefault(case["model"], {}).setdefault(case["tokens"], Cell({}, {}, {}, {}))
        cell.ours[case["activations"]] = case["seconds"]
        cell.fastest[case["activations"]] = case["p10"]
        cell.floor[case["activations"]] = case["floor_seconds"]
    for case in measured["torch"]:
        found[case["model"]][case["tokens"]].others[TORCH] = case["seconds"]
    for case in measured.get("peers", {}).get("cases", []):
        if case["seconds"]:
            found[case["model"]][case["tokens"]].others[PEER_NAMES[case["peer"]]] = case["seconds"]
    for program in peers["programs"] if of == MEASURED else []:
        for model, times in program["microseconds"].items():
            for tokens, microseconds in times.items():
                found[model][int(tokens)].others[program["name"]] = microseconds / 1e6
    return found


def programs_of(found: dict[int, Cell]) -> list[str]:
    """Those that have a time in any cell."""
    return list(dict.fromkeys(name for cell in found.values() for name in cell.others))


def microseconds(seconds: float | None) -> str:
    """Nothing where a program has no time."""
    if seconds is None:
        return ""
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


# ---- recording ----


def result_of(folder: Path, name: str) -> str:
    """The text of one of gpu_check's files."""
    if not (folder / name).is_file():
        sys.exit(f"error: {folder}: expected what scripts/gpu_check.sh --out wrote, found no {name}")
    return (folder / name).read_text()


def fractions(folder: Path, name: str) -> list[dict]:
    """Of each case of one of gpu_check's files: the share of its floor."""
    cases = json.loads(result_of(folder, name))["cases"]
    for case in cases:
        require_checked(folder / name, case)
    return [
        {key: case[key] for key in ("model", "tokens", "activations")}
        | {"seconds": case["seconds"]["median"], "floor_seconds": case["floor"]["seconds"], "shape": shape_text(case)}
        for case in cases
    ]


def shape_text(case: dict) -> str:
    return f"H {case['hidden']}, I {case['intermediate']}, E {case['experts']}, top-{case['top_k']}"


def target_of(machine: str) -> Path:
    """The file of a machine's figures."""
    for gpu, target in (("H100", MEASURED), ("H200", MEASURED_H200)):
        if gpu in machine:
            return target
    sys.exit(f"error: grid.json: expected a run on an H100 or H200, whose figures docs/hopper.md has, found {machine}")


def peers_of(folder: Path, machine: str) -> dict:
    """Versions and times of scripts/vllm_peers.py, no seconds where a result was wrong; none where it was not run."""
    if not (folder / "peers.json").is_file():
        return {}
    peers = json.loads(result_of(folder, "peers.json"))
    if peers["gpu"] not in machine:
        sys.exit(f"error: {folder}/peers.json: expected a run on {machine}, as grid.json's, found {peers['gpu']}")
    kept = ("peer", "model", "tokens", "seconds", "rel_l2")
    return {"versions": peers["peers"], "cases": [{key: case[key] for key in kept} for case in peers["cases"]]}


def counters_of(folder: Path, commit: str, target: Path) -> dict:
    """Those of this run; where it read none, those that the file has, with the commit that they are of."""
    if (folder / "counters.json").is_file():
        counters = json.loads(result_of(folder, "counters.json"))
        if not re.search(r"^passed +counters ", result_of(folder, "summary.txt"), re.MULTILINE):
            cases = ", ".join(dict.fromkeys(entry["case"] for entry in counters))
            print(f"note: {folder}: the step counters did not pass; recorded are {cases} alone", file=sys.stderr)
        return {"counters_commit": commit, "counters": counters}
    if not target.is_file():
        sys.exit(f"error: {folder}: expected counters.json, as {target} has none; run gpu_check with its step counters")
    before = json.loads(target.read_text())
    return {"counters_commit": before.get("counters_commit", before["commit"]), "counters": before["counters"]}


def require_all_checked(file: Path, grid: dict) -> None:
    for case in grid["cases"]:
        require_checked(file, case)


def times_of(grid: dict) -> list[dict]:
    return [
        {key: case[key] for key in ("model", "tokens", "activations")} | measured_times(case) for case in grid["cases"]
    ]


def record(folder: Path, counters: Path | None, commit: str) -> None:
    """`counters`: the folder of another run, of its step counters alone."""
    if counters and not (counters / "counters.json").is_file():
        sys.exit(f"error: --counters: expected a run of gpu_check with its step counters, found no {counters}/counters.json")
    grid, control = json.loads(result_of(folder, "grid.json")), json.loads(result_of(folder, "control.json"))
    require_all_checked(folder / "grid.json", grid)
    machine = grid["machines"][0]
    target = target_of(machine["machine"])
    driver = re.search(r"^fourfold on .*, ([\d.]+)$", result_of(folder, "summary.txt"), re.MULTILINE)
    measured = {
        "machine": machine["machine"],
        "driver": driver.group(1) if driver else None,
        "read_bytes_per_second": machine["read_bandwidth"]["per_second"],
        "commit": commit,
        "torch_version": control["torch"],
        "cases": times_of(grid),
        "torch": [{key: case[key] for key in ("model", "tokens", "seconds")} for case in control["cases"]],
        "peers": peers_of(folder, machine["machine"]),
        "untuned": fractions(folder, "untuned.json"),
        "routings": {name: fractions(folder, f"{name}.json") for name in ROUTINGS},
        **counters_of(counters or folder, commit, target),
    }
    target.write_text(json.dumps(measured, indent=1) + "\n")


def written_by(command: str, file: Path, member: str) -> dict:
    """What `command` wrote with --json, which has `member`."""
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {file}: expected what {command} --json wrote, found: {error}")
    if not isinstance(result, dict) or member not in result:
        sys.exit(f"error: {file}: expected what {command} --json wrote, found JSON without '{member}'")
    return result


def record_humming(grid_file: Path, peers_file: Path, commit: str) -> None:
    """Of a run apart from gpu_check's: humming, and fourfold's grid on the same machine."""
    grid = written_by("fourfold bench", grid_file, "machines")
    peers = written_by("vllm_peers.py --peers humming", peers_file, "peers")
    machine = grid["machines"][0]
    if peers["gpu"] not in machine["machine"]:
        sys.exit(f"error: {peers_file}: expected a run on {machine['machine']}, as {grid_file}'s, found {peers['gpu']}")
    require_all_checked(grid_file, grid)
    measured = {
        "machine": machine["machine"],
        "read_bytes_per_second": machine["read_bandwidth"]["per_second"],
        "commit": commit,
        "versions": peers["peers"],
        "cases": times_of(grid),
        "humming": [{key: case[key] for key in ("model", "tokens", "seconds", "rel_l2")} for case in peers["cases"]],
    }
    HUMMING.write_text(json.dumps(measured, indent=1) + "\n")


# ---- tables ----


def table_of(model: str, of: Path) -> str:
    found = cells(of)[model]
    programs = programs_of(found)
    text = row(["T", *(f"fourfold {name}" for name in FORMATS), *programs])
    text += row(["---"] * (1 + len(FORMATS) + len(programs)))
    for tokens, cell in found.items():
        ours = [f"{microseconds(cell.ours[name])} ({100 * cell.fraction(name):.0f}%)" for name in FORMATS]
        text += row([str(tokens), *ours, *(microseconds(cell.others.get(name)) for name in programs)])
    return text


def target_table(of: Path) -> str:
    """Per cent of the floor, in brackets of the fastest tenth of calls; bold where the median reaches the target."""
    found = cells(of)
    columns = [f"{title[:1]} {what}" for title in TITLES.values() for what in ("target", *FORMATS)]
    text = row(["T", *columns]) + row(["---"] * (1 + len(columns)))
    for tokens in found["deepseek-v3"]:
        line = [str(tokens)]
        for model in TITLES:
            cell, target = found[model][tokens], TARGETS[model][tokens]
            line.append(str(target))
            for name in FORMATS:
                share = f"{100 * cell.fraction(name):.0f} ({100 * cell.floor[name] / cell.fastest[name]:.0f})"
                line.append(f"**{share}**" if 100 * cell.fraction(name) >= target else share)
        text += row(line)
    return text


def humming_table() -> str:
    """Of a machine of its own: fourfold's times with per cent of the floor, and humming's."""
    measured = json.loads(HUMMING.read_text())
    ours = {(case["model"], case["tokens"], case["activations"]): case for case in measured["cases"]}
    theirs = {(case["model"], case["tokens"]): case["seconds"] for case in measured["humming"]}
    columns = [f"{title[:1]} {what}" for title in TITLES.values() for what in (*FORMATS, "humming")]
    text = row(["T", *columns]) + row(["---"] * (1 + len(columns)))
    for tokens in dict.fromkeys(case["tokens"] for case in measured["cases"]):
        line = [str(tokens)]
        for model in TITLES:
            for case in (ours[model, tokens, name] for name in FORMATS):
                line.append(f"{microseconds(case['seconds'])} ({100 * case['floor_seconds'] / case['seconds']:.0f}%)")
            line.append(microseconds(theirs[model, tokens]))
        text += row(line)
    return text


def share_cells(cases: list[dict], model: str) -> list[str]:
    """Per cent of the floor, bf16 / nvfp4, by UNTUNED_TOKENS."""
    share = {
        (case["tokens"], case["activations"]): 100 * case["floor_seconds"] / case["seconds"]
        for case in cases
        if case["model"] == model
    }
    return [" / ".join(f"{share[tokens, name]:.0f}" for name in FORMATS) for tokens in UNTUNED_TOKENS]


def untuned_table(of: Path) -> str:
    cases = json.loads(of.read_text())["untuned"]
    text = row(["shape", *(f"T = {tokens}" for tokens in UNTUNED_TOKENS)]) + row(["---"] * (1 + len(UNTUNED_TOKENS)))
    for model, shape in {case["model"]: case["shape"] for case in cases}.items():
        text += row([f"{model} ({shape})", *share_cells(cases, model)])
    return text


def routing_table(of: Path) -> str:
    measured = json.loads(of.read_text())
    text = row(["shape", "routing", *(f"T = {tokens}" for tokens in UNTUNED_TOKENS)])
    text += row(["---"] * (2 + len(UNTUNED_TOKENS)))
    for model, title in TITLES.items():
        for name, cases in {"uniform": measured["cases"], **measured["routings"]}.items():
            text += row([title[:1], name, *share_cells(cases, model)])
    return text


def counter_table(of: Path) -> str:
    """Without kernels that take less than LEAST_SHARE of their case; a case's formats follow each other."""
    columns = {"SM GHz": "sm_ghz", "issue": "issue_pct", "tensor": "tensor_pct", "DRAM": "dram_pct", "L2": "l2_pct"}
    text = row(["case", "format", "kernel", "us", *columns, "stalls"]) + row(["---"] * (5 + len(columns)))
    entries = json.loads(of.read_text())["counters"]
    cases = list(dict.fromkeys(entry["case"] for entry in entries))
    entries.sort(key=lambda entry: cases.index(entry["case"]))
    whole: dict[tuple[str, str], float] = {}
    for entry in entries:
        key = entry["case"], entry["activations"]
        whole[key] = whole.get(key, 0.0) + entry["us"]
    for entry in entries:
        if entry["us"] < LEAST_SHARE * whole[entry["case"], entry["activations"]]:
            continue
        kernel = entry["kernel"].partition("<")[0]
        values = [f"{entry[key]:.2f}" if key == "sm_ghz" else f"{entry[key]:.0f}" for key in columns.values()]
        stalls = ", ".join(f"{name} {share:.0f}" for name, share in entry["stalls_pct"].items())
        case = entry["case"].replace(":", " T ")
        text += row([case, entry["activations"], kernel, f"{entry['us']:.1f}", *values, stalls])
    return text


def readme_table() -> str:
    """Of the kernels of now, which an H200 ran."""
    found = cells(MEASURED_H200)["deepseek-v3"]
    programs = programs_of(found)
    text = row(["tokens", "fourfold", "floor", *programs]) + row(["---"] * (3 + len(programs)))
    for tokens, cell in found.items():
        if tokens in README_TOKENS:
            times = (cell.ours["bf16"], cell.floor["bf16"], *(cell.others.get(name) for name in programs))
            text += row([str(tokens), *map(microseconds, times)])
    return text


def documents() -> dict[Path, str]:
    """The files that hold tables, as they have to be."""
    files = {ROOT / "README.md": {"measured: hopper": readme_table}}
    for page, of in PAGES.items():
        tables = {f"measured: {model}": lambda model=model, of=of: table_of(model, of) for model in TITLES}
        others = {"targets": target_table, "untuned": untuned_table, "routings": routing_table}
        for name, table in others.items():
            tables[f"measured: {name}"] = lambda table=table, of=of: table(of)
        if of == MEASURED_H200:
            tables["measured: humming"] = humming_table
        files[page] = tables
    for page, of in COUNTER_PAGES.items():
        files.setdefault(page, {})["measured: counters"] = lambda of=of: counter_table(of)
    return {file: with_tables(file, sections) for file, sections in files.items()}


# ---- the plot ----


def plot(of: Path) -> None:
    plt = pyplot()
    found = cells(of)
    figure, axes = plt.subplots(1, len(TITLES), figsize=(15, 5), layout="constrained")
    for axis, (model, title) in zip(axes, TITLES.items(), strict=True):
        tokens = list(found[model])
        lines = [
            (name, [cell.others.get(name, float("nan")) for cell in found[model].values()], "--")
            for name in programs_of(found[model])
        ]
        for name in FORMATS:
            lines.append((f"fourfold {name}", [cell.ours[name] for cell in found[model].values()], "-"))
        for label, seconds, style in lines:
            axis.plot(tokens, [1e6 * value for value in seconds], style, marker="o", markersize=3, label=label)
        floor = [1e6 * cell.floor["bf16"] for cell in found[model].values()]
        axis.plot(tokens, floor, ":", color="black", label="floor: bytes / bandwidth, flops / peak")
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
        axis.title.set_size(9)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize=8)
    save_plot(figure, PLOTS[of], digest(of, PEERS))


# ---- the command ----


def check() -> int:
    plots = {file: digest(of, PEERS) for of, file in PLOTS.items()}
    return report_stale(documents(), plots, "docs/measured/hopper.json, h200.json and h200_humming.json", Path(__file__).name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="gpu_check's results -> docs/measured/hopper.json or h200.json")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--counters", type=Path, metavar="FOLDER", help="of a run with the step counters, if another")
    recording.add_argument("--commit", required=True, help="subject of the commit that was measured")
    humming = commands.add_parser("record-humming", help="a grid and humming's times -> docs/measured/h200_humming.json")
    humming.add_argument("grid", type=Path, help="of fourfold bench --json")
    humming.add_argument("peers", type=Path, help="of vllm_peers.py --peers humming --json")
    humming.add_argument("--commit", required=True, help="subject of the commit that was measured")
    commands.add_parser("write", help="tables and plots from the JSON")
    commands.add_parser("check", help="whether tables and plots are what the JSON says")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.folder, arguments.counters, arguments.commit)
    elif arguments.command == "record-humming":
        record_humming(arguments.grid, arguments.peers, arguments.commit)
    elif arguments.command == "write":
        for file, text in documents().items():
            file.write_text(text)
        for of in PLOTS:
            plot(of)
    else:
        return check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
