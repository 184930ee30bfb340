"""layertest --stress as a user runs it."""

import json
from pathlib import Path

import pytest

from command import FINE, SANITIZED, assert_fine, assert_refused, assert_usage, run

TIME_LIMIT_S = 120


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stress_passes(tmp_path: Path, backend: str) -> None:
    if SANITIZED and backend == "reference":
        pytest.skip("half a minute of plain loops, which the oracle's tests run")
    file = tmp_path / "stress.json"
    result = run("layertest", "--stress", "--backend", backend, "--json", file, time_limit_s=TIME_LIMIT_S)
    assert_fine(result)
    report = json.loads(file.read_text())
    assert (report["verdict"], report["backend"]) == ("fine", backend)
    assert {case["state"] for case in report["cases"]} == {"ok", "left out"}
    graphs = {case["text"] for case in report["cases"] if case["name"] == "graph replay"}
    assert graphs == {"not on this backend: it has no graphs"}
    for case in report["cases"]:
        assert case["name"] in result.stdout


def test_stress_takes_the_checkpoints_layer(tmp_path: Path, cast: Path) -> None:
    file = tmp_path / "stress.json"
    result = run("layertest", "--stress", "--nvfp4", cast, "--json", file, time_limit_s=TIME_LIMIT_S)
    assert result.code == FINE, str(result)
    assert f"layer 0 of {cast}" in {case["layer"] for case in json.loads(file.read_text())["cases"]}


def test_stress_options(tmp_path: Path) -> None:
    assert_usage(run("layertest", "--stress", "--all-layers"), "--stress")
    assert_usage(run("layertest"), "--nvfp4")
    assert_refused(run("layertest", "--stress", "--nvfp4", tmp_path / "nosuch"), "nosuch")
