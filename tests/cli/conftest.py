"""Checkpoints that many tests read and none changes."""

from pathlib import Path

import pytest

import checkpoints as ck
from command import FINE, run
from models import FAMILIES, LAYERS


@pytest.fixture(scope="session")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 under DeepSeek-V4's names, the exact cast of `mxfp4`: layertest calls it fine."""
    return ck.write_model(tmp_path_factory.mktemp("cast"), ck.CAST)


@pytest.fixture(scope="session")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original of `cast`."""
    return ck.write_model(tmp_path_factory.mktemp("mxfp4"), ck.MXFP4)


@pytest.fixture(scope="session")
def input_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 tokens, each to two different experts of four."""
    return ck.write_inputs(tmp_path_factory.mktemp("inputs") / "inputs.safetensors")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/<family>/{original,nvfp4}; the original is MXFP4, FP8 or bf16, as the family's is."""
    folder = tmp_path_factory.mktemp("models")
    shape = ("--shape", "8,128,64,2", "--layers", str(LAYERS), "--tokens", "16")
    for family in FAMILIES:
        result = run("synthesize", folder / family, "--family", family, *shape)
        assert result.code == FINE, str(result)
    return folder
