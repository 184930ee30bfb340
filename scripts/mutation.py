#!/usr/bin/env python3
"""Changes each constant of the quantizer and the layouts, one at a time, and shows that a test fails for each.

    scripts/mutation.py [--jobs N] [--only TEXT] [--list]

A constant is a number in the code of MUTATED, which stands in no comment, string or preprocessor line. Integers become
one more and one less, floats the next float32 above and below; 0 becomes 1, true false. A mutant is killed when its
program does not compile, when a test of TESTS fails, or when the tests crash or take over 20 times as long as without.
Mutants that cannot change a result stand in scripts/equivalent_mutants.txt, each with its reason; they are run too, and
one that a test kills is an error: the reason is wrong.

The sources and tests of numbers and layouts make one small program, compiled without optimisation and with a
precompiled header of what is not ours. Most mutants are in it all at once: each constant becomes an expression that
asks which mutant is wanted (environment variable FOURFOLD_MUTANT). What the compiler evaluates stays as it was there,
so a mutant that lives through that is compiled on its own, and only then counts. The working tree is left alone:
everything happens in copies under build/mutation.

    --jobs N     so many at a time (default: the number of cores)
    --only TEXT  those whose file and line hold TEXT
    --list       print every mutant, not only what survived

Needs g++, GoogleTest, fmt and lld or another linker. Exit status: 0 every mutant killed or equivalent, 1 error, 2 usage,
3 a mutant survived.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import queue
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "mutation"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.txt"

MUTATED = [
    "include/fourfold/number_formats.h",
    "include/fourfold/block_scaled.h",
    "include/fourfold/quantize.h",
    "include/fourfold/scale_layout.h",
    "src/numeric/block_quantizer.h",
    "src/numeric/quantize.cpp",
    "src/numeric/scale_layout.cpp",
    "src/numeric/scale_rules.cpp",
    "src/numeric/tensor.cpp",
]
SOURCES = ["numeric/quantize.cpp", "numeric/scale_layout.cpp", "numeric/scale_rules.cpp", "numeric/tensor.cpp",
           "moe/routing.cpp"]  # routing: what tests of properties permute with
TESTS = ["number_formats_test.cpp", "quantize_test.cpp", "scale_layout_test.cpp", "properties_test.cpp"]

PRECOMPILED = ["gtest/gtest.h", "fmt/format.h", "algorithm", "array", "cmath", "cstring", "functional", "numeric",
               "optional", "random", "set", "variant", "vector"]
FLAGS = ["-std=c++20", "-O0", "-ffp-contract=off", "-w", "-Wno-narrowing", "-D_GLIBCXX_ASSERTIONS"]
LIBRARIES = ["-lgtest", "-lgtest_main", "-lfmt", "-lpthread"]
SLOWER = 20  # times as slow as the program without a mutant: it hangs

NUMBER = re.compile(
    r"""(?<![\w.'])(?:
        0[xX][0-9a-fA-F]+(?:\.[0-9a-fA-F]*)?[pP][-+]?\d+[fF]?      # hexadecimal float
      | 0[xX][0-9a-fA-F]+[uUlL]*
      | \d+\.\d*(?:[eE][-+]?\d+)?[fF]? | \d+[eE][-+]?\d+[fF]?      # float
      | \d+[uUlL]*
      | true | false
    )(?![\w.])""",
    re.VERBOSE,
)
NO_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\#[^\n]*(?:\\\n[^\n]*)*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'",
                     re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str
    start: int
    line: int
    code: str  # the line, without its indentation
    nth: int  # of the constants on its line
    old: str
    new: str

    @property
    def key(self) -> str:
        """How equivalent_mutants.txt names it: where it stands in the file does not matter."""
        return f"{self.file} | {self.code} | {self.nth} | {self.old} -> {self.new}"


@dataclasses.dataclass
class Outcome:
    mutant: Mutant
    killed_by: str | None  # None: it survived


def die(message: str) -> None:
    sys.exit(f"error: {message}")


# ---- mutants ----


def next_float(value: float, up: bool) -> float:
    bits = struct.unpack("<i", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<i", bits + (1 if up else -1)))[0]


def replacements(number: str) -> list[str]:
    if number in ("true", "false"):
        return ["false" if number == "true" else "true"]
    is_hex = number[:2] in ("0x", "0X")
    is_float = "p" in number.lower() if is_hex else any(c in number for c in ".eE")
    if is_float:
        suffix = "f" if number[-1] in "fF" else ""
        text = number.rstrip("fF") if suffix else number
        value = float.fromhex(text) if is_hex else float(text)
        if value == 0.0:
            return [f"1.0{suffix}"]
        return [f"{next_float(value, up).hex()}{suffix}" for up in (True, False)]
    digits = number.rstrip("uUlL")
    suffix, value = number[len(digits):], int(digits, 0)
    changed = [value + 1] if value == 0 else [value + 1, value - 1]
    return [f"{hex(new) if is_hex else new}{suffix}" for new in changed]


def mutants_of(file: str) -> list[Mutant]:
    text = (ROOT / file).read_text()
    code = NO_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    mutants, on_line = [], collections.Counter()
    for match in NUMBER.finditer(code):
        line = text.count("\n", 0, match.start()) + 1
        on_line[line] += 1
        source = text.splitlines()[line - 1]
        mutants += [Mutant(file, match.start(), line, source.strip(), on_line[line], match[0], new)
                    for new in replacements(match[0])]
    return mutants


def read_equivalent() -> dict[str, str]:
    """Key of every mutant that cannot change a result, with the reason: blocks of keys, each after its reason."""
    reasons, reason = {}, ""
    for number, line in enumerate(EQUIVALENT.read_text().splitlines(), start=1):
        if not line.strip():
            reason = ""
        elif line.startswith("#"):
            reason = f"{reason} {line.lstrip('# ')}".strip()
        elif not reason:
            die(f"{EQUIVALENT.name}:{number}: expected a reason ('# ...') before this mutant, found none since the blank "
                "line above it")
        else:
            reasons[line.strip()] = reason
    return reasons


# ---- building and running one ----


class Workplace:
    """A copy of the sources and tests, which becomes a program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("include", "src/numeric", "src/base", "src/moe"):
            shutil.copytree(ROOT / part, folder / part)
        (folder / "tests").mkdir()
        for file in [*(ROOT / "tests" / test for test in TESTS), *(ROOT / "tests").glob("*.h")]:
            shutil.copy(file, folder / "tests")
        for name, included in (("sources", SOURCES), ("tests", TESTS)):
            (folder / f"{name}.cpp").write_text("".join(f'#include "{file}"\n' for file in included))

    def compile(self, name: str) -> str | None:
        """What the compiler says against it, or None."""
        done = subprocess.run(
            ["g++", *FLAGS, "-Iinclude", "-Isrc", "-Itests", "-include", str(FOLDER / "precompiled.h"), "-c",
             f"{name}.cpp", "-o", f"{name}.o"],
            cwd=self.folder, capture_output=True, text=True)
        return done.stderr if done.returncode else None

    def link(self, objects: list[str]) -> str | None:
        done = subprocess.run(["g++", *FLAGS, *linker(), *objects, "-o", "program", *LIBRARIES], cwd=self.folder,
                              capture_output=True, text=True)
        return done.stderr if done.returncode else None

    def failing_test(self, patience: float, mutant: int = -1) -> str | None:
        """The first test that fails, with the loops for AVX2 or with the portable ones (src/base/avx2.h), or None."""
        for isa in ("", "portable"):
            try:
                done = subprocess.run(["./program", "--gtest_fail_fast", "--gtest_brief=1"], cwd=self.folder,
                                      capture_output=True, text=True, errors="replace", timeout=patience,
                                      env={**os.environ, "FOURFOLD_MUTANT": str(mutant), "FOURFOLD_ISA": isa})
            except subprocess.TimeoutExpired:
                return "(takes too long)"
            if done.returncode:
                failed = re.search(r"\[  FAILED  \] ([\w./]+)", done.stdout)
                return failed[1] if failed else "(crash)"
        return None

    def killer_of(self, mutant: Mutant, plain_tests: Path, patience: float) -> str | None:
        """Compiles this mutant alone."""
        file = self.folder / mutant.file
        text = file.read_text()
        file.write_text(replace(text, mutant.start, mutant.old, mutant.new))
        try:
            if self.compile("sources"):
                return "(the compiler)"
            tests = str(plain_tests)
            if mutant.file.endswith(".h"):
                tests = "tests.o"
                if self.compile("tests"):
                    return "(the compiler)"
            problem = self.link(["sources.o", tests])
            return f"(the linker) {problem}" if problem else self.failing_test(patience)
        finally:
            file.write_text(text)


def linker() -> list[str]:
    return ["-fuse-ld=lld"] if shutil.which("ld.lld") else []


def replace(text: str, start: int, old: str, new: str) -> str:
    assert text[start:start + len(old)] == old, (start, old)
    return text[:start] + new + text[start + len(old):]


SELECT = """#include <cstdlib>
inline int wanted_mutant() {
  static const int kWanted = std::getenv("FOURFOLD_MUTANT") ? std::atoi(std::getenv("FOURFOLD_MUTANT")) : -1;
  return kWanted;
}
"""


def make_program_of_all(mutants: list[Mutant], workplace: Workplace) -> float:
    """A program that holds every mutant; how long its tests may take."""
    header = FOLDER / "precompiled.h"
    header.write_text("#pragma once\n" + "".join(f"#include <{name}>\n" for name in PRECOMPILED) + SELECT)
    done = subprocess.run(["g++", *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"], capture_output=True,
                          text=True)
    if done.returncode:
        die(f"the precompiled header does not compile:\n{done.stderr}")

    by_constant = collections.defaultdict(list)
    for number, mutant in enumerate(mutants):
        by_constant[mutant.file, mutant.start].append((number, mutant))
    for (file, start), here in sorted(by_constant.items(), reverse=True):  # from the end: starts stay right
        old = here[0][1].old
        choice = "".join(f"wanted_mutant() == {number} ? {mutant.new} : " for number, mutant in here)
        path = workplace.folder / file
        path.write_text(replace(path.read_text(), start, old,
                                f"(__builtin_is_constant_evaluated() ? {old} : {choice}{old})"))
    problem = workplace.compile("sources") or workplace.compile("tests") or workplace.link(["sources.o", "tests.o"])
    if problem:
        die(f"the program of all mutants does not compile:\n{problem}")
    began = time.monotonic()
    failed = workplace.failing_test(600)
    if failed:
        die(f"a test fails without a mutant: {failed}")
    return max(30.0, SLOWER * (time.monotonic() - began))


def run_all(mutants: list[Mutant], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    shutil.rmtree(FOLDER, ignore_errors=True)
    everything, plain = Workplace(FOLDER / "all"), Workplace(FOLDER / "plain")
    alone: queue.Queue[Workplace] = queue.Queue()
    for number in range(jobs):
        alone.put(Workplace(FOLDER / f"alone{number}"))
    patience = make_program_of_all(mutants, everything)
    if problem := plain.compile("tests"):
        die(f"the tests do not compile:\n{problem}")

    def run_one(number: int) -> Outcome:
        killer = everything.failing_test(patience, number)
        if killer is None:
            workplace = alone.get()
            killer = workplace.killer_of(mutants[number], plain.folder / "tests.o", patience)
            alone.put(workplace)
        return Outcome(mutants[number], killer)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        outcomes = []
        for outcome in pool.map(run_one, range(len(mutants))):
            outcomes.append(outcome)
            report(outcome)
        return outcomes


# ---- the report ----


def print_table(outcomes: list[Outcome], equivalent: dict[str, str]) -> None:
    rows = []
    for file in [*MUTATED, None]:
        mine = [outcome for outcome in outcomes if file in (None, outcome.mutant.file)]
        if not mine:
            continue
        counts = collections.Counter(
            "equivalent" if outcome.mutant.key in equivalent and outcome.killed_by is None
            else "survived" if outcome.killed_by is None
            else "compiler" if outcome.killed_by == "(the compiler)"
            else "test"
            for outcome in mine)
        constants = len({(outcome.mutant.file, outcome.mutant.start) for outcome in mine})
        rows.append([file or "all", constants, len(mine), counts["test"], counts["compiler"], counts["equivalent"],
                     counts["survived"]])
    print("| file | constants | mutants | killed by a test | refused by the compiler | equivalent | survived |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")

    every = [mutant for file in MUTATED for mutant in mutants_of(file)]
    equivalent = read_equivalent()
    stale = equivalent.keys() - {mutant.key for mutant in every}
    if stale:
        die(f"{EQUIVALENT.name} names mutants that no longer are; take them out:\n" + "\n".join(sorted(stale)))
    mutants = [mutant for mutant in every if options.only in f"{mutant.file} {mutant.code}"]
    if not mutants:
        die(f"no mutant's file and line hold {options.only!r}; --list without --only prints all")

    def report(outcome: Outcome) -> None:
        mutant = outcome.mutant
        fate = outcome.killed_by or equivalent.get(mutant.key) or "SURVIVED"
        if options.list:
            print(f"{mutant.file}:{mutant.line}: {mutant.old} -> {mutant.new}: {fate}", flush=True)

    outcomes = run_all(mutants, options.jobs, report)
    print_table(outcomes, equivalent)
    wrong = [outcome for outcome in outcomes if outcome.killed_by and outcome.mutant.key in equivalent]
    survived = [outcome for outcome in outcomes if outcome.killed_by is None and outcome.mutant.key not in equivalent]
    for outcome in wrong:
        print(f"said to be equivalent, but killed by {outcome.killed_by}: {outcome.mutant.key}")
    for outcome in survived:
        print(f"SURVIVED {outcome.mutant.key}")
    return 3 if survived or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
