"""GPU code in the built command: which architectures, the multiply of each in its PTX, and that `doctor` says the same.

usage: embedded_kernels_test.py COMMAND ARCHITECTURES...   e.g. 90a 100a 120f; the fatbins are read here, without tools
"""

import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

MAGIC = b"\x50\xed\x55\xba"
PTX, CUBIN = 1, 2
COMPRESSED = 0x2000 | 0x8000  # LZ4, zstd
SPECIFIC = {0x100000: "a", 0x200000: "f"}  # to an architecture (sm_90a), to a family (sm_120f)
TARGET = re.compile(rb"^\.target\s+sm_(\w+)", re.MULTILINE)
MULTIPLY = re.compile(rb"\b((?:tcgen05\.mma|mma\.sync)[\w.:]*kind::mxf4nvf4[\w.:]*)")
# The grouped GEMMs, by their symbols in PTX and in machine code.
ENTRY_OF_PTX = re.compile(rb"\.entry\s+(\w*CutlassGemm\w*)")
SECTION_OF_CUBIN = re.compile(rb"\.text\.(\w*CutlassGemm\w*)")
OUTPUTS = 2  # bf16 and float32

# The multiply that an architecture's kernels have to be made of.
EXPECTED = {
    "100a": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16",
    "103a": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16",
    "120f": "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X",
}


class Entry(NamedTuple):
    """One image of a fatbin."""

    kind: int
    architecture: str
    payload: bytes  # empty where it is compressed


def entries_of(image: bytes) -> Iterator[Entry]:
    """Images of every fatbin in an ELF file, wherever its sections put them."""
    start = image.find(MAGIC)
    while start >= 0:
        version, header_bytes, bytes_behind = struct.unpack_from("<HHQ", image, start + 4)
        at, end = start + header_bytes, start + header_bytes + bytes_behind
        if version != 1 or end > len(image):
            start = image.find(MAGIC, start + 4)
            continue
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", image, at)
            (number,) = struct.unpack_from("<I", image, at + 28)
            (flags,) = struct.unpack_from("<Q", image, at + 40)
            architecture = str(number) + "".join(letter for flag, letter in SPECIFIC.items() if flags & flag)
            payload = b"" if flags & COMPRESSED else image[at + header : at + header + size]
            yield Entry(kind, architecture, payload)
            at += header + size
        start = image.find(MAGIC, end)


def check_itself() -> None:
    ptx = b".version 9.0\n.target sm_120f\n.entry _9CutlassGemm()\n mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64 {};\n"
    header = struct.pack("<HHIQIIHHIIIQQQ", PTX, 257, 64, len(ptx), 0, 64, 0, 9, 120, 0, 0, 0x200000, 0, 0)
    fatbin = MAGIC + struct.pack("<HHQ", 1, 16, len(header) + len(ptx)) + header + ptx
    (entry,) = entries_of(b"elf" + fatbin + b"rest")
    assert entry == Entry(PTX, "120f", ptx), entry
    assert TARGET.findall(ptx) == [b"120f"] and len(MULTIPLY.findall(ptx)) == len(ENTRY_OF_PTX.findall(ptx)) == 1


def host_stubs(command: Path) -> set[str]:
    """What launches the grouped GEMMs' kernels: a name for every type by which the host compiler knows one."""
    symbols = subprocess.run(["nm", command], capture_output=True, text=True, check=True).stdout.split()
    return {name for name in symbols if "device_kernel" in name and name.startswith("_ZN") and not name.endswith(".cold")}


def findings(command: Path, architectures: list[str]) -> list[str]:
    """What is wrong, a line each; prints what is there."""
    found: list[str] = []
    cubins: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    multiplies: dict[str, Counter[str]] = {}
    for entry in entries_of(command.read_bytes()):
        if entry.kind == CUBIN:
            cubins[entry.architecture] += 1
            kernels[entry.architecture] += len(set(SECTION_OF_CUBIN.findall(entry.payload)))
        elif symbols := set(ENTRY_OF_PTX.findall(entry.payload)):
            (target,) = TARGET.findall(entry.payload)
            counter = multiplies.setdefault(target.decode(), Counter())
            counter["kernels"] += len(symbols)
            counter.update(name.decode() for name in MULTIPLY.findall(entry.payload))
    print(f"cubins: {dict(sorted(cubins.items()))}")
    told = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False).stdout
    for architecture in architectures:
        if cubins[architecture] == 0:
            found.append(f"sm_{architecture}: no code in {command}")
        line = next((line for line in told.splitlines() if f"sm_{architecture} " in line), None)
        if line is None:
            found.append(f"sm_{architecture}: doctor does not list it")
        if architecture not in EXPECTED:
            continue
        counter = multiplies.get(architecture, Counter())
        number = counter.pop("kernels", 0)
        print(f"sm_{architecture}: {kernels[architecture]} kernels, {number} in PTX: {dict(counter)}")
        if kernels[architecture] != OUTPUTS or number != OUTPUTS:
            found.append(f"sm_{architecture}: expected {OUTPUTS} kernels as code and as PTX")
        if not counter or any(not name.startswith(EXPECTED[architecture]) for name in counter):
            found.append(f"sm_{architecture}: expected {EXPECTED[architecture]}, found {dict(counter)}")
        if line is not None and EXPECTED[architecture] not in line:
            found.append(f"sm_{architecture}: doctor says another instruction: {line}")
    stubs, expected = len(host_stubs(command)), OUTPUTS * sum(a in EXPECTED for a in architectures)
    if stubs != expected:
        found.append(f"expected {expected} functions on the host that launch a grouped GEMM, found {stubs}: where there "
                     "are more, one of them is not what the runtime knows the kernel by, and no launch works")
    for architecture in set(multiplies) - set(architectures):
        found.append(f"sm_{architecture}: PTX of a GEMM that the build does not name")
    return found


def main() -> int:
    check_itself()
    found = findings(Path(sys.argv[1]), sys.argv[2:])
    print("\n".join(found) or "every architecture of the build is there, with its multiply")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
