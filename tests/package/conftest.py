"""An installed tree, and a checkpoint to run; CMake gives build folder and compilers by environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ["FOURFOLD_BUILD"])


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    environment = os.environ | env if env else None
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cmake --install`, then moved: nothing in the tree may know where it was installed."""
    folder = tmp_path_factory.mktemp("install")
    run("cmake", "--install", BUILD, "--prefix", folder / "first")
    return Path(shutil.move(folder / "first", folder / "moved"))


@pytest.fixture(scope="session")
def libdir(prefix: Path) -> Path:
    """Where the libraries lie: lib, lib64, or lib and the machine's name."""
    return next(prefix.glob("lib*/**/libfourfold.a")).parent


@pytest.fixture(scope="session")
def model(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVFP4 model of two layers, made by the installed command: 8 experts, H 128, I 64, K 2, a router."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shape = ("--family", "qwen3-moe", "--shape", "8,128,64,2", "--layers", "2", "--tokens", "4")
    run(prefix / "bin" / "fourfold", "synthesize", folder, *shape)
    return folder / "nvfp4"
