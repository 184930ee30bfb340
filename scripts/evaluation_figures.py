#!/usr/bin/env python3
"""Turns docs/measured/evaluation.json, which scripts/evaluate.py writes, into the documentation's table and plot.

    scripts/evaluation_figures.py write    the tables of README.md and docs/evaluation.md, and the plot
    scripts/evaluation_figures.py check    exit status 1 where those are not what the JSON says

`write` needs matplotlib (pip install matplotlib), `check` Python alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measured_pages import ROOT, digest, pyplot, report_stale, row, save_plot, with_tables

MEASURED = ROOT / "docs/measured/evaluation.json"
PLOT = ROOT / "docs/measured/evaluation.svg"
RULES = {"amax": "tab:blue", "four-over-six": "tab:orange", "mse": "tab:green"}
FORMATS = ("bf16", "nvfp4x2", "fp8", "nvfp4")


def is_baseline(case: dict) -> bool:
    return case["weights"] == case["activations"] == "bf16"


def quality_table(cases: list[dict]) -> str:
    """A line a case: members of evaluate.py's Case and Quality."""
    text = row(["weights", "activations", "perplexity", "change, %", "KL, nats", "top-1, %"]) + row(["---"] * 6)
    for case in cases:
        weights = f"NVFP4 {case['weights']}" if case["weights"] in RULES else case["weights"]
        scales = f" ({case['scales']})" if case["scales"] else ""
        compared = ["", "", ""]
        if not is_baseline(case):
            error = "" if case["change_error"] is None else f" ± {100 * case['change_error']:.2f}"
            compared = [f"{100 * case['change']:+.2f}{error}", f"{case['kl']:.5f}", f"{100 * case['top1']:.2f}"]
        text += row([weights, case["activations"] + scales, f"{case['perplexity']:.3f}", *compared])
    return text


def documents(measured: dict) -> dict[Path, str]:
    """The files that hold tables, as they have to be."""
    every = measured["cases"]
    amax = [case for case in every if case["weights"] in ("bf16", "amax") and case["scales"] != "dynamic-token"]
    pages = {ROOT / "README.md": amax, ROOT / "docs/evaluation.md": every}
    return {
        page: with_tables(page, {"measured: evaluation": lambda cases=cases: quality_table(cases)})
        for page, cases in pages.items()
    }


def plot(measured: dict) -> None:
    plt = pyplot()
    figure, (change, divergence) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, (rule, color) in enumerate(RULES.items()):
        cases = {
            case["activations"]: case
            for case in measured["cases"]
            if case["weights"] == rule and case["scales"] != "dynamic-token"
        }
        places = [place + 0.22 * (index - 1) for place in range(len(FORMATS))]
        chosen = [cases[format] for format in FORMATS]
        errors = [100 * (case["change_error"] or 0) for case in chosen]
        heights = [100 * case["change"] for case in chosen]
        change.bar(places, heights, 0.2, yerr=errors, capsize=2, color=color, label=f"weights: {rule}")
        divergence.bar(places, [case["kl"] for case in chosen], 0.2, color=color)
    change.set(title="perplexity against bf16", ylabel="change, % (± standard error)")
    divergence.set(title="KL divergence from bf16", ylabel="nats a token")
    for axis in (change, divergence):
        axis.set_xticks(range(len(FORMATS)), [f"{name} (W4A16)" if name == "bf16" else name for name in FORMATS])
        axis.set_xlabel("activations, beside NVFP4 weights")
        axis.grid(True, axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    change.legend(fontsize=8)
    save_plot(figure, PLOT, digest(MEASURED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write", help="tables and plot from the JSON")
    commands.add_parser("check", help="whether tables and plot are what the JSON says")
    command = parser.parse_args().command
    measured = json.loads(MEASURED.read_text())
    if command == "check":
        return report_stale(documents(measured), {PLOT: digest(MEASURED)}, "docs/measured/evaluation.json",
                            Path(__file__).name)
    for file, text in documents(measured).items():
        file.write_text(text)
    plot(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
