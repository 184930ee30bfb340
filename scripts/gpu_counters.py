#!/usr/bin/env python3
"""What binds the kernels of `fourfold bench`: hardware counters of single cases, read by Nsight Compute.

usage: gpu_counters.py --fourfold FILE [--backend NAME] [--activations LIST] [--json FILE] SHAPE:TOKENS...

For every kernel of a call of each case (`fourfold bench --profile`), with each format of activations:

    us         as profiled: alone, at the clock of that moment, so not the time of the grid
    SM GHz     the clock meanwhile
    issue      cycles in which a scheduler issued an instruction, in per cent
    tensor     cycles in which the tensor pipes were busy, in per cent
    DRAM, L2   of peak throughput, in per cent
    stalls     what warps waited for, the three largest, in per cent of their cycles

A call of more than 131,072 slots is run in parts, each with kernels of its own. Counting replays a kernel several times,
with its memory as it was. What is known is printed, and written to the JSON file, case by case. Exit status: 0 done,
1 error, 2 usage.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

KERNELS = "regex:expert_gemm|fused_layer|combine|stage_|permute_|count_slots|sum_chunks|place_slots"
STALLS = "regex:smsp__average_warps_issue_stalled_.*_per_issue_active"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
# Metrics by what they are called here; in per cent, but for the clock.
METRICS = {
    "sm_ghz": "gpc__cycles_elapsed.avg.per_second",
    "issue_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
}
TIME = "gpu__time_duration.sum"
SECONDS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "nsecond": 1e-9}


def number(row: dict[str, str], metric: str) -> float:
    text = row.get(metric, "")
    try:
        return float(text.replace(",", ""))
    except ValueError:
        sys.exit(f"error: ncu: expected a number for {metric} of {row['Kernel Name']}, found '{text}'; is it another version?")


def short(kernel: str) -> str:
    """Without namespaces, return type and parameters: expert_gemm_kernel<GemmTraits<2, 2, ...>>."""
    return re.sub(r"\w+::|\(anonymous namespace\)::|<unnamed>::|^void |\(.*", "", kernel.replace("(int)", "").replace("(bool)", ""))


def stalls_of(row: dict[str, str]) -> dict[str, float]:
    """Shares of the warps' cycles, in per cent, largest first; "selected" is the cycle of issue itself."""
    cycles = {match[1]: number(row, name) for name in row if (match := STALL.fullmatch(name))}
    total = sum(cycles.values())
    shares = {name: 100 * value / total for name, value in cycles.items() if name != "selected" and total > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:3])


def profile(options: argparse.Namespace, case: str, activations: str) -> list[dict[str, str]]:
    """The launches of a call of the case; their times in seconds."""
    shape, _, tokens = case.rpartition(":")
    bench = [options.fourfold, "bench", "--shape", shape, "--tokens", tokens, "--backend", options.backend]
    bench += ["--activations", activations, "--repeats", "1", "--min-time", "0", "--profile"]
    command = [options.ncu, "--profile-from-start", "off", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--metrics", ",".join([TIME, *METRICS.values(), STALLS]), "--page", "raw", "--csv", *map(str, bench)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith('"')]
    if ran.returncode != 0 or len(lines) < 3:
        sys.exit(f"error: {case} {activations}: ncu gave no counters (exit status {ran.returncode}):\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    names, units, *rows = csv.reader(io.StringIO("\n".join(lines)))
    second = SECONDS[units[names.index(TIME)]]
    launches = [dict(zip(names, values, strict=True)) for values in rows]
    for row in launches:
        row[TIME] = str(number(row, TIME) * second)
    return launches


def measure(options: argparse.Namespace, case: str, activations: str) -> list[dict[str, Any]]:
    found = []
    for row in profile(options, case, activations):
        entry: dict[str, Any] = {"case": case, "activations": activations, "kernel": short(row["Kernel Name"])}
        entry["us"] = number(row, TIME) * 1e6
        entry |= {what: number(row, metric) for what, metric in METRICS.items()}
        entry["sm_ghz"] *= 1e-9
        entry["stalls_pct"] = stalls_of(row)
        found.append(entry)
    return found


def write(rows: list[dict[str, Any]], to: Path) -> None:
    part = to.with_name(to.name + ".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(to)


def case_of(text: str) -> str:
    if not re.fullmatch(r"[\w.,-]+:\d+", text):
        raise argparse.ArgumentTypeError(f"expected SHAPE:TOKENS, as B:1024 or qwen3-30b-a3b:16; found '{text}'")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fourfold", type=Path, required=True, metavar="FILE", help="the command")
    parser.add_argument("--backend", default="sm90")
    parser.add_argument("--activations", default="bf16", metavar="LIST", help="formats, with commas (default: bf16)")
    parser.add_argument("--ncu", default=shutil.which("ncu") or "/usr/local/cuda/bin/ncu", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("cases", nargs="+", type=case_of, metavar="SHAPE:TOKENS")
    options = parser.parse_args()
    if not Path(options.ncu).exists():
        sys.exit(f"error: Nsight Compute: expected {options.ncu}, found none; name it with --ncu")
    if not options.fourfold.is_file():
        sys.exit(f"error: --fourfold: expected the command, found no file {options.fourfold}")
    rows = []
    for activations, case in itertools.product(options.activations.split(","), options.cases):
        for row in measure(options, case, activations):
            rows.append(row)
            stalls = ", ".join(f"{name} {share:.0f}" for name, share in row["stalls_pct"].items())
            print(
                f"{case:<14} {activations:<6} {row['kernel'][:44]:<44} {row['us']:9.1f} us  {row['sm_ghz']:5.2f} GHz  issue {row['issue_pct']:4.0f}  "
                f"tensor {row['tensor_pct']:4.0f}  DRAM {row['dram_pct']:4.0f}  L2 {row['l2_pct']:4.0f}  {stalls}",
                flush=True,
            )
        if options.json:
            write(rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
