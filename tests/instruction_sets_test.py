"""Instructions stay behind the choice of an instruction set.

Disassembles the command: AVX may be used by functions that are compiled for it by name alone, AVX-512 and AMX
likewise. Where qemu-user is installed, runs GEMMs and a layer on emulated CPUs without AVX-512 and without AVX, which
stop at the first such instruction. Usage: instruction_sets_test.py FOURFOLD. Exit code 77: nothing to disassemble with.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What a function of the project may be named after to use these registers: the namespaces of src/cpu, the ceilings of
# `fourfold bench` (src/tools/cpu_peaks.cpp), and loops that are compiled twice (src/base/avx2.h).
AVX512_NAMES = re.compile(r"avx512|::amx::|_amx\(")
AVX_NAMES = re.compile(r"avx512|avx2|::amx::|run_int8_maddubs|_amx\(")

# zmm, the upper 16 vector registers and masks exist with AVX-512 alone; tiles with AMX.
AVX512_OPERAND = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|%tmm|\bldtilecfg|\btilerelease")
AVX_OPERAND = re.compile(r"%ymm|\tv[a-z]")

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def leaks(command: Path) -> list[str]:
    """C++ functions that use more than their name says."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(command)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    seen = {"avx512": 0, "avx": 0}
    function = ""
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
            continue
        if "::" not in function:  # C++: the project's, and templates of libraries that were compiled with it
            continue
        for kind, operand, names in (
            ("avx512", AVX512_OPERAND, AVX512_NAMES),
            ("avx", AVX_OPERAND, AVX_NAMES),
        ):
            if operand.search(line):
                seen[kind] += 1
                if not names.search(function):
                    found.setdefault(function, line.strip())
    assert seen["avx512"] > 1000 and seen["avx"] > 1000, f"kernels missing from the disassembly: {seen}"
    return [f"{function}: {line}" for function, line in found.items()]


def run_emulated(command: Path, emulator: str, cpu: str, *arguments: str) -> None:
    result = subprocess.run([emulator, "-cpu", cpu, str(command), *arguments], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{arguments}: code {result.returncode}\n{result.stdout}{result.stderr}"


def main() -> int:
    command = Path(sys.argv[1])
    if shutil.which("objdump") is None:
        print("skipped: no objdump")
        return 77
    violations = leaks(command)
    print("\n".join(violations) or "every function uses what its name says")
    if violations:
        return 1
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        print("not run on an emulated CPU: no qemu-x86_64")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [command, "synthesize", folder, "--shape", "4,64,48,2", "--original", "bf16", "--tokens", "8", "--force"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        # A Haswell has AVX2 and nothing beyond; a Nehalem has no AVX, as the reference's loops must not need it.
        for cpu, isa in (("Haswell", "avx2"), ("Haswell", "portable"), ("Nehalem", "portable")):
            run_emulated(command, emulator, cpu, "gemmtest", "--shape", "3,20,40,48", "--backend", "cpu", "--isa", isa)
            for activations in ("nvfp4", "nvfp4x2", "fp8", "bf16"):
                run_emulated(
                    command,
                    emulator,
                    cpu,
                    *("layertest", "--nvfp4", f"{folder}/nvfp4", "--tokens", "8", "--backend", "cpu"),
                    *("--isa", isa, "--activations", activations),
                )
        default = subprocess.run(
            [emulator, "-cpu", "Haswell", str(command), "--version"], capture_output=True, text=True, check=True
        ).stdout
        assert "here avx2 (" in default, default
    print("runs on an emulated Haswell and an emulated Nehalem")
    return 0


if __name__ == "__main__":
    sys.exit(main())
