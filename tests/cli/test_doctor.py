"""`fourfold doctor`: this machine, and which backend takes a layer."""

import json
from pathlib import Path

import pytest

from command import ERROR, FINDING, FINE, SANITIZED, Json, assert_refused, assert_usage, run
from models import FAMILIES, UP, Model

# Every run of doctor multiplies with every backend and instruction set.
seconds_each = pytest.mark.skipif(SANITIZED, reason="runs of seconds each, of code that the others run as well")


def test_doctor_of_this_machine() -> None:
    result = run("doctor")
    assert result.code == FINE, str(result)
    for part in (
        "machine",
        "cpu sets",
        "driver",
        "gpu",
        "backends",
        "reference",
        "chosen",
        "cpu portable",
        "this machine is fine",
    ):
        assert part in result.stdout, str(result)


@seconds_each
def test_doctor_tests_the_gpu_at_length_where_there_is_one() -> None:
    result = run("doctor", "--self-test")
    assert result.code == FINE and "this machine is fine" in result.stdout, str(result)
    on_gpu = "gpu          none that runs" not in result.stdout and "gpu code" in result.stdout
    assert (" gemm 5,300,328,272" in result.stdout) == on_gpu, str(result)


@seconds_each
def test_doctor_names_what_forces_a_backend() -> None:
    result = run("doctor", env={"FOURFOLD_BACKEND": "reference", "FOURFOLD_ISA": "portable"})
    assert "FOURFOLD_BACKEND=reference" in result.stdout and "reference (forced by" in result.stdout
    assert "FOURFOLD_ISA=portable" in result.stdout
    result = run("doctor", env={"FOURFOLD_BACKEND": "abacus"})
    assert result.code == FINDING and "'abacus'" in result.stdout, str(result)
    result = run("doctor", env={"FOURFOLD_ISA": "mmx"})
    assert result.code == FINDING and "FOURFOLD_ISA: expected one of" in result.stdout, str(result)
    assert "this machine is fine" not in result.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_of_a_layer(models: Path, family: str) -> None:
    result = run("doctor", models / family / "nvfp4", "--layer", "1")
    assert result.code == FINE, str(result)
    assert "layer 1: 8 experts, nvfp4" in result.stdout
    assert "kernel:" in result.stdout


@seconds_each
def test_doctor_says_why_not_the_faster_backend(models: Path) -> None:
    result = run("doctor", models / "deepseek-v4/original")
    assert "reference (passed over" in result.stdout and "mxfp4" in result.stdout, str(result)


def test_doctor_of_damaged_layers(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.remove(f"{UP}.weight_scale_2")
    result = run("doctor", model.write(tmp_path / "model"), "--layer", "1")
    assert result.code == FINDING and "weight_scale_2" in result.stdout and "inspect" in result.stdout, str(
        result
    )
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.set_float(f"{UP}.input_scale", 0.0)
    result = run("doctor", model.write(tmp_path / "model"), "--layer", "1")
    assert result.code == FINDING and "input_scale" in result.stdout, str(result)


def test_doctor_of_what_is_not_there(tmp_path: Path, models: Path) -> None:
    assert_refused(run("doctor", tmp_path / "nowhere"), "expected a model directory")
    assert_refused(run("doctor", models / "mixtral/nvfp4", "--layer", "9"), "layer 9")
    assert_usage(run("doctor", "--layer", "1"))
    assert run("doctor", "").code != ERROR


def doctor_json(folder: Path, *arguments: str | Path, **options: object) -> Json:
    """Agrees with the exit code."""
    file = folder / "doctor.json"
    result = run("doctor", *arguments, "--json", file, **options)  # type: ignore[arg-type]
    report = json.loads(file.read_text())
    assert result.code == (FINE if report["verdict"] == "fine" else FINDING), str(result)
    return report


def test_doctor_json(tmp_path: Path, models: Path) -> None:
    """docs/inspect.md, section doctor: what programs may rely on."""
    report = doctor_json(tmp_path, models / "qwen3-moe/nvfp4", "--layer", "1")
    assert list(report) == ["version", "verdict", "machine", "chosen", "isa_trouble", "layer", "self_tests"]
    assert all(isinstance(text, str) for texts in report["machine"].values() for text in texts)
    assert len(report["machine"]["cpu sets"]) == 5 and report["isa_trouble"] is None
    layer = report["layer"]
    assert (layer["layer"], layer["experts"], layer["hidden"], layer["intermediate"]) == (1, 8, 128, 64)
    assert [choice["activations"] for choice in layer["choices"]] == ["nvfp4", "bf16"]
    for choice in layer["choices"]:
        assert choice["backend"] and choice["kernel"] and choice["reason"] and choice["trouble"] is None
    for test in report["self_tests"]:
        assert test["right"] and test["trouble"] is None and test["seconds"] > 0
    assert {"cpu portable"} <= {test["backend"] for test in report["self_tests"]}


def test_doctor_json_of_trouble(tmp_path: Path, models: Path) -> None:
    report = doctor_json(tmp_path, env={"FOURFOLD_BACKEND": "abacus"})
    assert report["layer"] is None
    assert "'abacus'" in report["chosen"]["trouble"] and report["chosen"]["backend"] is None
    assert "mmx" in doctor_json(tmp_path, env={"FOURFOLD_ISA": "mmx"})["isa_trouble"]
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.remove(f"{UP}.weight_scale_2")
    report = doctor_json(tmp_path, model.write(tmp_path / "model"), "--layer", "1")
    assert "weight_scale_2" in report["layer"]["trouble"] and "choices" not in report["layer"]
    assert_refused(run("doctor", "--json", tmp_path / "no/where.json"), "no/where.json")
