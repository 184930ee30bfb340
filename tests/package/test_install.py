"""What is installed, and that other projects find it: by CMake and by pkg-config, static and shared, C and C++."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BUILD, ROOT, run

EXAMPLE = ROOT / "examples" / "find_package"
CXX, CC = os.environ["FOURFOLD_CXX"], os.environ["FOURFOLD_CC"]
PKG_CONFIG = shutil.which("pkg-config") or "pkgconf"
VERSION = re.search(r"project\(fourfold VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]


def needed(binary: Path) -> set[str]:
    """Shared libraries that a binary names."""
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", binary)))


def build_example(folder: Path, prefix: Path, *options: str) -> Path:
    run("cmake", "-S", EXAMPLE, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_COMPILER={CXX}",
        f"-DCMAKE_C_COMPILER={CC}", *options)  # fmt: skip
    run("cmake", "--build", folder)
    return folder


def test_tree(prefix: Path, libdir: Path) -> None:
    headers = {path.name for path in (prefix / "include" / "fourfold").iterdir()}
    assert headers == {path.name for path in (ROOT / "include" / "fourfold").iterdir()}
    assert {path.name for path in (prefix / "include").iterdir()} == {"fourfold"}
    documents = prefix / "share" / "doc" / "fourfold"
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "docs/install.md", "docs/formats.md"):
        assert (documents / name).is_file(), name
    assert f"fourfold {VERSION}" in run(prefix / "bin" / "fourfold", "--version")
    # The link by which programs are linked leads to the one by which they are loaded, and on to the file.
    minor = VERSION.rpartition(".")[0]
    assert os.readlink(libdir / "libfourfold.so") == f"libfourfold.so.{minor}"
    assert os.readlink(libdir / f"libfourfold.so.{minor}") == f"libfourfold.so.{VERSION}"
    assert f"Library soname: [libfourfold.so.{minor}]" in run("readelf", "-d", libdir / "libfourfold.so")


def test_nothing_names_the_build(prefix: Path, libdir: Path) -> None:
    texts = [*libdir.rglob("*.cmake"), *libdir.rglob("*.pc")]
    assert len(texts) >= 6
    for path in texts:
        text = path.read_text()
        assert str(BUILD) not in text and str(ROOT) not in text and str(prefix.parent / "first") not in text, path


def test_headers_name_no_library() -> None:
    """An installed header that included fmt or nlohmann would make every user need them."""
    for path in (ROOT / "include" / "fourfold").iterdir():
        included = re.findall(r"#include <([^>]*/[^>]*)>", path.read_text())
        assert not included, f"{path.name}: {included}"


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_find_package(kind: str, prefix: Path, model: Path, tmp_path: Path) -> None:
    build = build_example(tmp_path, prefix, f"-DBUILD_SHARED_LIBS={'ON' if kind == 'shared' else 'OFF'}")
    outputs = {run(build / name, model) for name in ("run_layer", "run_layer_c")}
    assert len(outputs) == 1, outputs
    assert re.fullmatch(r"y\[0\.\.3\] = [0-9a-f]{4}( [0-9a-f]{4}){3}\n", outputs.pop())
    uses_shared = any(name.startswith("libfourfold.so") for name in needed(build / "run_layer"))
    assert uses_shared == (kind == "shared")


def configure(folder: Path, prefix: Path, languages: str, package: str) -> tuple[int, str]:
    """Configures a project that only looks for the package; its exit code and messages."""
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.22)\nproject(p LANGUAGES {languages})\nfind_package({package})\n"
        "add_library(x x.c)\ntarget_link_libraries(x fourfold::fourfold)\n"
    )
    (folder / "x.c").write_text("int x;\n")
    command = ["cmake", "-S", folder, "-B", folder / "b", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("languages", "package", "works"),
    [
        ("C", "fourfold 0.1 REQUIRED", True),
        ("C", "fourfold REQUIRED COMPONENTS shared", True),
        ("C", "fourfold REQUIRED COMPONENTS static", "add CXX to the project's LANGUAGES"),
        ("C CXX", "fourfold REQUIRED COMPONENTS static", True),
        ("C CXX", "fourfold REQUIRED COMPONENTS static shared", True),
        ("C", "fourfold 0.0 REQUIRED", 'compatible with requested version "0.0"'),
        ("C", "fourfold 0.2 REQUIRED", 'compatible with requested version "0.2"'),
        ("C", "fourfold REQUIRED COMPONENTS python", "not built with the component 'python'"),
    ],
)
def test_find_package_says_why_not(
    languages: str, package: str, works: bool | str, prefix: Path, tmp_path: Path
) -> None:
    code, text = configure(tmp_path / "p", prefix, languages, package)
    assert (code == 0) == (works is True), text
    assert works is True or works in re.sub(r"\s+", " ", text), text


@pytest.mark.parametrize("package", ["fourfold", "fourfold-static"])
def test_pkg_config(package: str, prefix: Path, libdir: Path, model: Path, tmp_path: Path) -> None:
    found = {"PKG_CONFIG_PATH": str(libdir / "pkgconfig")}
    assert run(PKG_CONFIG, "--modversion", package, env=found).strip() == VERSION
    flags = run(PKG_CONFIG, "--cflags", "--libs", package, env=found).split()
    run(CC, "-std=c99", EXAMPLE / "run_layer.c", "-o", tmp_path / "c", *flags)
    run(CXX, "-std=c++20", EXAMPLE / "run_layer.cpp", "-o", tmp_path / "cpp", *flags)
    loaded = {"LD_LIBRARY_PATH": str(libdir)} if package == "fourfold" else None
    assert run(tmp_path / "c", model, env=loaded) == run(tmp_path / "cpp", model, env=loaded)
    assert any(name.startswith("libfourfold") for name in needed(tmp_path / "c")) == (package == "fourfold")
