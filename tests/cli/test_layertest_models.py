"""layertest --all-layers and --layers: tables, JSON, exit codes, and layers that can't be read or tested."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import zeros
from command import (
    ERROR,
    FINDING,
    FINE,
    SANITIZED,
    Json,
    Result,
    assert_refused,
    assert_usage,
    command_path,
    layertest,
    run,
)
from models import Model

LAYERS = 4
INPUT_SCALE = "model.layers.2.mlp.experts.3.down_proj.input_scale"
SCALES = "model.layers.1.mlp.experts.3.down_proj.weight_scale"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3's layout, four layers: original and nvfp4."""
    folder = tmp_path_factory.mktemp("models") / "m"
    shape = ("--shape", "8,128,64,2", "--layers", str(LAYERS), "--tokens", "16")
    result = run("synthesize", folder, "--family", "qwen3-moe", "--original", "bf16", *shape)
    assert result.code == FINE, str(result)
    return folder


def many(folder: Path, model: Path, *arguments: str | Path) -> tuple[Result, Json]:
    file = folder / "models.json"
    result = layertest(model, *arguments, "--json", file)
    report = json.loads(file.read_text())
    codes = {"fine": FINE, "finding": FINDING, "error": ERROR}
    assert result.code == codes[report["verdict"]], str(result)
    return result, report


def table_layers(result: Result) -> list[int]:
    """Numbers of the layers, in the order of the table."""
    return [int(number) for number in re.findall(r"^ +(\d+) (?:\w|not read)", result.stdout, re.M)]


def write(folder: Path, model: Model) -> Path:
    folder.mkdir()
    return model.write(folder)


def test_all_layers_are_fine(tmp_path: Path, pair: Path) -> None:
    """As many rows as layers, each with the JSON of its own run."""
    result, report = many(tmp_path, pair / "nvfp4", "--original", pair / "original", "--all-layers")
    assert result.code == FINE and not result.stderr, str(result)
    assert sorted(table_layers(result)) == [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    assert report["skipped"] == report["damage"] == []
    alone = tmp_path / "alone.json"
    layertest(pair / "nvfp4", "--original", pair / "original", "--layer", "2", "--json", alone)
    layer = report["layers"][2]
    assert layer.pop("seconds") >= 0
    assert layer == json.loads(alone.read_text())


def test_layers_that_were_asked_for(tmp_path: Path, pair: Path) -> None:
    _, report = many(tmp_path, pair / "nvfp4", "--layers", "2-3,0")
    assert [layer["layer"] for layer in report["layers"]] == [0, 2, 3]


def test_worst_first(tmp_path: Path, pair: Path) -> None:
    """A layer that can't be read, then one with a finding, then the others; the run goes on, exit code 1."""
    model = Model.read(pair / "nvfp4")
    model.set_float(INPUT_SCALE, 1e-9)
    finding = write(tmp_path / "finding", model)
    result, report = many(tmp_path, finding, "--all-layers")
    assert result.code == FINDING and table_layers(result)[0] == 2, str(result)
    assert "finding  layer 2: activations: input_scale of the intermediate" in result.stdout

    scales = model.tensors[SCALES]
    rows = scales.shape[0] // 2
    model.tensors[SCALES] = replace(scales, shape=(rows, *scales.shape[1:]), data=scales.data[: rows * scales.shape[1]])
    result, report = many(tmp_path, write(tmp_path / "both", model), "--all-layers")
    assert result.code == ERROR and table_layers(result)[:2] == [1, 2], str(result)
    assert [("error" in layer, layer.get("verdict")) for layer in report["layers"]] == [
        (False, "fine"),
        (True, None),
        (False, "activations"),
        (False, "fine"),
    ]
    assert SCALES in report["layers"][1]["error"] and SCALES in result.stdout
    assert "2 of 4 layers fine, 1 with findings, 1 not read" in result.stdout


def test_a_shard_that_can_not_be_read(tmp_path: Path, pair: Path) -> None:
    """Its layers are rows with an error, the others are tested, and the file is named."""
    shutil.copytree(pair, tmp_path / "m")
    shard = max((tmp_path / "m" / "nvfp4").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    result, report = many(tmp_path, tmp_path / "m" / "nvfp4", "--all-layers")
    assert result.code == ERROR and len(report["damage"]) == 1 and str(shard) in report["damage"][0]
    kinds = ["error" in layer for layer in report["layers"]]
    assert len(kinds) == LAYERS and any(kinds) and not all(kinds), report


def test_dense_layers_are_skipped_by_name(tmp_path: Path, pair: Path) -> None:
    model = Model.read(pair / "nvfp4")
    model.remove("model.layers.1.mlp.")
    model.tensors["model.layers.1.mlp.down_proj.weight"] = zeros("BF16", 128, 64)
    directory = write(tmp_path / "m", model)
    for arguments in (("--all-layers",), ("--layers", "0-3")):
        result, report = many(tmp_path, directory, *arguments)
        assert result.code == FINE, str(result)
        assert [layer["layer"] for layer in report["layers"]] == [0, 2, 3]
        assert report["skipped"] == [{"layer": 1, "reason": "dense: it has no experts"}]
        assert "skipped      layer 1: dense" in result.stdout


def test_layers_in_another_format_are_skipped_by_name(tmp_path: Path, pair: Path) -> None:
    """As exporters leave the last one in bf16."""
    model, original = Model.read(pair / "nvfp4"), Model.read(pair / "original")
    prefix = "model.layers.3.mlp.experts."
    model.remove(prefix)
    model.tensors |= {name: t for name, t in original.tensors.items() if name.startswith(prefix)}
    _, report = many(tmp_path, write(tmp_path / "m", model), "--all-layers")
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2]
    (skipped,) = report["skipped"]
    assert skipped["layer"] == 3 and "bf16" in skipped["reason"]


def test_layers_that_are_not_there(pair: Path) -> None:
    assert_refused(layertest(pair / "nvfp4", "--layers", "1,9"), "--layers", "9", "with experts: 0-3")
    assert_refused(layertest(pair / "original", "--all-layers"), "expected layers with NVFP4 experts", "bf16")


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_that_cant_be_written_is_refused_before_the_work(pair: Path, tmp_path: Path, option: str) -> None:
    for layers in (("--all-layers",), ("--layer", "0")):
        result = layertest(pair / "nvfp4", *layers, option, tmp_path / "none" / "report")
        assert_refused(result, "can't create it")
        assert not result.stdout, str(result)


def test_options_that_make_no_sense_together(pair: Path) -> None:
    assert_usage(layertest(pair / "nvfp4", "--layers", "1", "--all-layers"), "--layers", "--all-layers")
    assert_usage(layertest(pair / "nvfp4", "--layers", "1", "--layer", "0"), "--layer")
    assert_usage(layertest(pair / "nvfp4", "--layers", "a-b"), "--layers")
    assert_usage(layertest(pair / "nvfp4", "--layers", ""), "--layers")


@pytest.mark.skipif(SANITIZED, reason="sanitizers keep freed memory for a while")
def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    """Peak memory of six layers against one: mapped pages are given back."""
    shape = ("--shape", "8,512,512,2", "--layers", "6", "--tokens", "4")
    assert run("synthesize", tmp_path / "m", "--family", "qwen3-moe", *shape, time_limit_s=60).code == FINE
    arguments = ("layertest", "--nvfp4", tmp_path / "m" / "nvfp4", "--tokens", "4")

    def peak_kilobytes(*layers: str) -> int:
        file = tmp_path / "peak"
        script = 'import resource,subprocess,sys; subprocess.run(sys.argv[2:], check=True, stdout=-3); '
        script += 'open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))'
        subprocess.run([sys.executable, "-c", script, file, command_path(), *map(str, arguments), *layers], check=True)
        return int(file.read_text())

    weights = 8 * 3 * 512 * 512 * 9 // 16 // 1024  # kilobytes of a layer; measured: a tenth of it more
    assert peak_kilobytes("--all-layers") < peak_kilobytes("--layer", "0") + 2 * weights
