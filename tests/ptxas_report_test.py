"""The compiler's report on the GPU kernels: no spills, no local memory, no WGMMA that waits for the one before.

Kernels of CUTLASS are not ours to change: what they spill is named here, and may not grow.

usage: ptxas_report_test.py FOLDER, which holds the reports that cmake/record_ptxas.py wrote.
"""

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Potential performance losses of WGMMA: C7510 to C7518; C7508: setmaxnreg ignored.
LOSS = re.compile(r"\(C75\d\d\)")

# Bytes of stack, spill stores and spill loads of CUTLASS's kernels, by target of the build, with nvcc 13.0.
CUTLASS_MEMORY = {"fourfold_sm_120f": (16, 52, 68)}


def allowed_memory(path: Path) -> tuple[int, ...]:
    """What the kernels of a report may use."""
    return next((limit for target, limit in CUTLASS_MEMORY.items() if target in path.as_posix()), (0, 0, 0))


def findings(report: str, allowed: tuple[int, ...] = (0, 0, 0)) -> list[str]:
    """What is wrong, a line each."""
    found = [line for line in report.splitlines() if LOSS.search(line) or "setmaxnreg" in line]
    entry = ""
    for line in report.splitlines():
        if match := ENTRY.search(line):
            entry = match[1]
        elif (match := MEMORY.search(line)) and any(int(number) > most for number, most in zip(match.groups(), allowed)):
            found.append(f"{entry}: {line.strip()}")
    return found


def check_itself() -> None:
    clean = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    assert not findings(clean)
    assert findings(clean.replace("0 bytes stack", "8 bytes stack"))
    assert not findings(clean.replace("0 bytes stack", "8 bytes stack"), (8, 0, 0))
    assert allowed_memory(Path("src/CMakeFiles/fourfold_sm_120f.dir/a.ptxas")) != (0, 0, 0)
    assert allowed_memory(Path("src/CMakeFiles/fourfold_sm90.dir/a.ptxas")) == (0, 0, 0)
    assert findings(clean + "ptxas info    : (C7512) Potential Performance Loss: wgmma ... serialized")


def main() -> int:
    check_itself()
    reports = sorted(Path(sys.argv[1]).rglob("*.ptxas"))
    found = [f"{path.name}: {line}" for path in reports for line in findings(path.read_text(), allowed_memory(path))]
    kernels = sum(len(ENTRY.findall(path.read_text())) for path in reports)
    print("\n".join(found) or f"{kernels} kernels in {len(reports)} reports, nothing found")
    return 1 if found or kernels == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
