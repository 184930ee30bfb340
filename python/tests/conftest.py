"""Checkpoints that the command makes: bf16 and NVFP4 halves of a tiny model, one of each family."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold._command import COMMAND


@pytest.fixture(scope="session")
def synthesized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's `original` and `nvfp4`, and the `inputs.safetensors` that they were calibrated on."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "pair"
            command = [COMMAND, "synthesize", folder, "--family", family, "--shape", "8,64,64,2", "--tokens", "64"]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            made[family] = folder
        return made[family]

    return make
