"""Public headers compile, each without another, with every warning an error: g++, clang++ and nvcc, from C++20 on;
the C one as C."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, run

INCLUDE = ROOT / "include"
HEADERS = sorted(path.name for path in (INCLUDE / "fourfold").iterdir())
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
COMPILERS = [os.environ["FOURFOLD_CXX"], "clang++"]


def check(compiler: str, standard: str, headers: list[str], folder: Path) -> None:
    """Twice: an include guard that is missing shows."""
    source = folder / f"{headers[0]}{standard}.cpp"
    source.write_text("".join(f'#include "fourfold/{name}"\n' for name in headers * 2) + "int main() {}\n")
    run(compiler, f"-std={standard}", *WARNINGS, "-fsyntax-only", f"-I{INCLUDE}", source)


def chains() -> list[list[str]]:
    """All headers in chains, each header after some that it includes itself: what it lacks they do not bring."""
    text = {name: (INCLUDE / "fourfold" / name).read_text() for name in HEADERS}

    def includes(name: str) -> set[str]:
        direct = re.findall(r'^#include "fourfold/(.*)"$', text[name], re.MULTILINE)
        return set(direct).union(*map(includes, direct))

    of = {name: includes(name) for name in HEADERS}
    found: list[list[str]] = []
    for name in sorted(HEADERS, key=lambda name: len(of[name])):
        # A longer chain first: shorter ones are left to headers that include less.
        chain = next((c for c in sorted(found, key=len, reverse=True) if c[-1] in of[name]), None)
        if chain is None:
            found.append(chain := [])
        chain.append(name)
    return found


def test_alone(tmp_path: Path) -> None:
    """By one compiler: whether a header includes what it needs does not depend on it, and this takes a while."""
    assert sorted(sum(chains(), [])) == HEADERS
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda names: check(COMPILERS[0], "c++20", names, tmp_path), chains()))


@pytest.mark.parametrize("standard", ["c++20", "c++2b"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_together(compiler: str, standard: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    check(compiler, standard, HEADERS, tmp_path)


def test_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        pytest.skip("no nvcc here")
    source = tmp_path / "all.cu"
    source.write_text("".join(f'#include "fourfold/{name}"\n' for name in HEADERS) + "int main() {}\n")
    run(nvcc, "-std=c++20", "-arch=sm_90a", "-c", "-o", tmp_path / "all.o", f"-I{INCLUDE}", source)


@pytest.mark.parametrize("standard", ["c99", "c11", "c17"])
@pytest.mark.parametrize("compiler", [os.environ["FOURFOLD_CC"], "clang"])
def test_c(compiler: str, standard: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    source = tmp_path / "all.c"
    source.write_text('#include "fourfold/fourfold.h"\n#include "fourfold/export.h"\nint main(void) { return 0; }\n')
    run(compiler, f"-std={standard}", *WARNINGS, "-fsyntax-only", f"-I{INCLUDE}", source)
