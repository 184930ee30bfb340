"""Who may include whom: fails when a file includes what docs/design.md forbids its room to include."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Room -> rooms that it may include beside itself, directly. The table of docs/design.md, "Rooms".
ROOMS: dict[str, set[str]] = {
    "base": set(),
    "numeric": {"base"},
    "moe": {"base", "numeric"},
    "checkpoint": {"base", "numeric", "moe"},
    "reference": {"base", "numeric", "moe"},
    "diagnosis": {"base", "numeric", "moe", "reference"},
    "c_api": {"base", "numeric", "moe", "checkpoint"},
    "cpu": {"base", "numeric", "moe"},
    "cuda": {"base", "numeric", "moe"},
    "sm90": {"base", "numeric", "moe", "cuda"},
    "blackwell": {"base", "numeric", "moe", "cuda"},
    "parallel": {"base", "numeric", "moe"},
}
EVERYTHING = {"tools", "tests", "bench"}  # these may include any room

# Public headers belong to rooms too: a backend that includes fourfold/checkpoint.h includes the checkpoint room.
PUBLIC_HEADERS = {
    "error.h": "base",
    "export.h": "base",
    "number_formats.h": "numeric",
    "tensor.h": "numeric",
    "memory.h": "numeric",
    "block_scaled.h": "numeric",
    "scale_layout.h": "numeric",
    "weight_statistics.h": "numeric",
    "quantize.h": "numeric",
    "comparison.h": "numeric",
    "activations.h": "moe",
    "expert_weights.h": "moe",
    "gemm.h": "moe",
    "moe_layer.h": "moe",
    "parallel_degrees.h": "moe",
    "router.h": "moe",
    "routing.h": "moe",
    "safetensors.h": "checkpoint",
    "checkpoint.h": "checkpoint",
    "model_family.h": "checkpoint",
    "inspection.h": "checkpoint",
    "reference.h": "reference",
    "cpu.h": "cpu",
    "fourfold.h": "c_api",
}

# Libraries that only some places may see: (pattern of the include, who may).
LIBRARIES = [
    (re.compile(r"^CLI/"), lambda path: path.parts[:2] == ("src", "tools")),
    (re.compile(r"^fmt/"), lambda path: path.suffix != ".cu" and path.parts[0] != "include"),
    (re.compile(r"^nlohmann/"), lambda path: path.parts[0] != "include" and path.suffix != ".cu"),
    (
        re.compile(r"^(cuda(_runtime\w*|_fp\w+|_bf16)?\.h|cudaTypedefs\.h|cuda/std/|cub/|thrust/|cooperative_groups)"),
        lambda path: path.suffix in (".cu", ".cuh"),
    ),
    (
        re.compile(r"^(cutlass|cute)/"),
        lambda path: path.parts[:2] == ("src", "blackwell")
        and path.suffix in (".cu", ".cuh")
        or path.parts[0] == "tests"
        and path.name.startswith("blackwell_"),
    ),
]

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def room_of_file(path: Path) -> str:
    """Room of a file, by its path relative to the root."""
    if path.parts[0] == "include":
        return PUBLIC_HEADERS.get(path.name, f"(public header {path.name} is in no room)")
    return path.parts[1] if path.parts[0] == "src" else path.parts[0]


def room_of_include(include: str) -> str | None:
    """Room of an included file; None for what is not the project's."""
    if include.startswith("fourfold/"):
        return PUBLIC_HEADERS.get(include.removeprefix("fourfold/"), f"(unknown header {include})")
    first = include.split("/")[0]
    return first if "/" in include and (first in ROOMS or first in EVERYTHING) else None


def violations_in(path: Path, text: str) -> list[str]:
    """What a file includes against the rules."""
    room = room_of_file(path)
    found = []
    for include in INCLUDE.findall(text):
        for library, allowed in LIBRARIES:
            if library.match(include) and not allowed(path):
                found.append(f"{path} includes <{include}>, which is not for this place")
        target = room_of_include(include)
        if target is None or target == room or room in EVERYTHING:
            continue
        if room not in ROOMS:
            found.append(f"{path}: no room of docs/design.md: {room}")
        elif target not in ROOMS[room]:
            found.append(f'{path} includes "{include}": {room} may include {sorted(ROOMS[room])}, not {target}')
    return found


def check_itself() -> None:
    """The rules catch what they are there to catch."""
    for path, text in [
        ("src/numeric/a.cpp", '#include "moe/workspace.h"'),
        ("src/reference/a.cpp", '#include "fourfold/checkpoint.h"'),
        ("src/cpu/a.cpp", '#include "reference/grouped_multiply.h"'),
        ("src/moe/a.cpp", "#include <CLI/CLI.hpp>"),
        ("src/cuda/a.cpp", "#include <cuda_runtime.h>"),
        ("src/cuda/a.cu", "#include <fmt/format.h>"),
        ("include/fourfold/tensor.h", '#include "fourfold/gemm.h"'),
        ("include/fourfold/new.h", '#include "fourfold/gemm.h"'),
        ("src/attic/a.cpp", '#include "base/fail.h"'),
    ]:
        assert violations_in(Path(path), text), f"{path} with {text} should be a violation"
    assert not violations_in(Path("src/sm90/a.cu"), '#include "cuda/check.cuh"\n#include <cuda_runtime.h>')
    assert not violations_in(Path("src/sm90/a.cpp"), '#include "cuda/device.h"')


def main() -> int:
    check_itself()
    files = [
        path.relative_to(ROOT)
        for folder in ("include", "src", "tests", "bench")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]
    violations = [line for path in files for line in violations_in(path, (ROOT / path).read_text())]
    print("\n".join(violations) or f"{len(files)} files, no include against the rules")
    return 1 if violations or not files else 0


if __name__ == "__main__":
    sys.exit(main())
