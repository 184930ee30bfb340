"""The example of examples/python, and the command that the package carries."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fourfold

EXAMPLE = Path(__file__).parents[2] / "examples/python/run_layer.py"


def test_example(synthesized: Callable[[str], Path]) -> None:
    command = [sys.executable, str(EXAMPLE), str(synthesized("qwen3-moe") / "nvfp4")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "y (4, 64) bfloat16, norm" in ran.stdout


def test_command() -> None:
    command = [sys.executable, "-c", "import sys; sys.argv[1:] = ['--version']; import fourfold._command as c; c.main()"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert fourfold.__version__ in ran.stdout
