"""What the shared library exports: fourfold's public API, whole, and nothing else."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, run


@pytest.fixture(scope="module")
def exported(libdir: Path) -> list[str]:
    lines = run("nm", "-DC", "--defined-only", libdir / "libfourfold.so").splitlines()
    return [line.split(maxsplit=2)[2] for line in lines]


def test_nothing_foreign(exported: list[str]) -> None:
    ours = re.compile(r"fourfold_\w+$|((vtable|typeinfo|typeinfo name|guard variable) for )?fourfold::")
    foreign = [name for name in exported if not ours.match(name)]
    assert exported and not foreign, foreign


def test_c_functions(exported: list[str]) -> None:
    """Every function of the C header is there, and no other."""
    text = (ROOT / "include" / "fourfold" / "fourfold.h").read_text()
    declared = set(re.findall(r"^FOURFOLD_EXPORT [\w *]*?(fourfold_\w+)\(", text, re.MULTILINE))
    assert len(declared) > 20
    assert declared == {name for name in exported if name.startswith("fourfold_")}


def test_rooms_stay_inside(exported: list[str], libdir: Path) -> None:
    """Functions that no public header declares are hidden, though the archive has them."""
    archived, shown = run("nm", "-C", "--defined-only", libdir / "libfourfold.a"), "\n".join(exported)
    for inner in ("fourfold::MappedFile::", "fourfold::c_api::record_exception", "fourfold::ConfigRules::"):
        assert inner in archived and inner not in shown, inner


def test_every_header_is_marked() -> None:
    for path in (ROOT / "include" / "fourfold").glob("*.h"):
        opened = re.findall(r"^namespace .*fourfold.*\{", path.read_text(), re.MULTILINE)
        assert all(line == "namespace FOURFOLD_EXPORT fourfold {" for line in opened), f"{path.name}: {opened}"
