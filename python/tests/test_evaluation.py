"""scripts/evaluate.py, on a short text: the whole model through fourfold's layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate.py"


def evaluate(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_quality_falls_as_formats_lose(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install --no-deps -r scripts/requirements.txt")
    text, file = tmp_path / "text", tmp_path / "figures.json"
    text.write_text("The quick brown fox jumps over the lazy dog. Every morning, the sun rises in the east. " * 6)
    ran = evaluate("--text", text, "--tokens", 96, "--window", 48, "--weights", "amax", "--json", file)
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(file.read_text())
    cases = {(case["weights"], case["activations"], case["scales"]): case for case in measured["cases"]}
    assert len(cases) == 7
    same = cases["float32", "float32", None]
    assert same["kl"] < 1e-3 and abs(same["change"]) < 0.01  # bf16's rounding alone
    half, two_terms, quarter = (
        cases["amax", name, scales]["kl"]
        for name, scales in (("bf16", None), ("nvfp4x2", "static"), ("nvfp4", "static"))
    )
    assert 10 * same["kl"] < half < quarter
    assert abs(two_terms - half) < 0.2 * half
    assert ran.stdout.count("\n") == 2 + len(cases)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install --no-deps -r scripts/requirements.txt")
    short = tmp_path / "short"
    short.write_text("Too short.")
    ran = evaluate("--text", short, "--tokens", 512)
    assert ran.returncode == 1 and "expected at least 512 tokens, found 3" in ran.stderr
    assert evaluate("--tokens", 500).returncode == 2
    assert "found 'int3'" in evaluate("--activations", "int3").stderr
    assert evaluate("--json", tmp_path / "no" / "file").returncode == 2
