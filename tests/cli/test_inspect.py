"""`fourfold inspect`: sound models of every family are clean, damaged files do not hide the others, and what
it derives from shapes.
"""

import json
import shutil
from pathlib import Path

import pytest

import checkpoints as ck
from checkpoints import Tensor
from command import FINDING, FINE, assert_refused, assert_usage, run, run_on_terminal
from models import FAMILIES, LAYERS, QWEN, SCHEMES, UP, Model, found, inspect

THIRD_PARTY = Path(__file__).parents[1] / "data" / "third_party"

# ---- clean models ----


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_are_clean(tmp_path: Path, models: Path, family: str, scheme: str) -> None:
    result, report = inspect(tmp_path, models / family / scheme)
    assert result.code == FINE, str(result)
    assert "clean: nothing wrong was found" in result.stdout
    assert report["family"] == family
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert layer["loads"]
        assert (layer["experts"], layer["hidden"], layer["intermediate"]) == (8, 128, 64)
        assert layer["router"]["top_k"] == 2
        assert sum(group["unread"] for group in layer["matrices"]) == 0


@pytest.mark.parametrize("folder", sorted(path.name for path in THIRD_PARTY.iterdir() if path.is_dir()))
def test_checkpoints_that_other_tools_wrote_are_clean(tmp_path: Path, folder: str) -> None:
    result, report = inspect(tmp_path, THIRD_PARTY / folder)
    assert result.code == FINE, str(result)
    assert all(layer["loads"] for layer in report["layers"])


@pytest.mark.parametrize("profile", ["gaussian", "realistic"])
@pytest.mark.parametrize("original", ["mxfp4", "bf16", "fp8"])
def test_sound_pairs_of_either_profile_are_clean(tmp_path: Path, original: str, profile: str) -> None:
    result = run(
        "synthesize",
        tmp_path / "pair",
        "--shape",
        "4,256,96,2",
        "--original",
        original,
        "--profile",
        profile,
        "--seed",
        "3",
        "--tokens",
        "16",
    )
    assert result.code == FINE, str(result)
    for scheme in SCHEMES:
        _, report = inspect(tmp_path, tmp_path / "pair" / scheme)
        assert not report["findings"]
    assert_refused(run("inspect", tmp_path / "pair"), "found neither; its folders nvfp4, original have one")
    shutil.rmtree(tmp_path / "pair" / "original")
    assert_refused(run("inspect", tmp_path / "pair"), "found neither; its folder nvfp4 has one")
    shutil.rmtree(tmp_path / "pair" / "nvfp4")
    assert_refused(run("inspect", tmp_path / "pair"), "found neither\n")


# ---- damaged files ----


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def test_a_truncated_shard_does_not_hide_the_others(tmp_path: Path, models: Path) -> None:
    model = copy_of(models / "qwen3-moe/nvfp4", tmp_path)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    _, report = inspect(tmp_path, model)
    assert found(report) == {("damaged-file", None)}
    assert report["findings"][0]["file"] == str(shard)
    assert report["layers"], "the other shard's tensors are reported"


def test_a_missing_shard_does_not_hide_the_others(tmp_path: Path, models: Path) -> None:
    model = copy_of(models / "deepseek-v4/nvfp4", tmp_path)
    shard = min(model.glob("*.safetensors"))
    shard.unlink()
    _, report = inspect(tmp_path, model)
    assert found(report) == {("damaged-file", None)}
    assert "is the download complete?" in report["findings"][0]["found"]
    assert report["layers"]


def test_a_layer_that_a_missing_shard_may_hold(tmp_path: Path, models: Path) -> None:
    """Is no error of the caller: the shard is what is wrong."""
    model = copy_of(models / "qwen3-moe/nvfp4", tmp_path)
    max(model.glob("*.safetensors")).unlink()
    for layer in ("1", "7"):
        _, report = inspect(tmp_path, model, "--layer", layer)
        assert found(report) == {("damaged-file", None)}
        assert len(report["layers"]) <= 1


def test_a_tensor_that_only_the_index_knows(tmp_path: Path, models: Path) -> None:
    """The index says so, which is one finding; that the matrix lacks it is not another."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.remove(f"{UP}.weight_scale_2")
    directory = model.write(tmp_path / "model")
    index = json.loads((directory / ck.INDEX_NAME).read_text())
    index["weight_map"][f"{UP}.weight_scale_2"] = index["weight_map"][f"{UP}.weight_scale"]
    ck.write_json(directory / ck.INDEX_NAME, index)
    _, report = inspect(tmp_path, directory)
    assert found(report) == {("damaged-file", f"{UP}.weight_scale_2")}
    assert [group["unread"] for group in report["layers"][1]["matrices"]] == [0, 1, 0]


def test_a_damaged_config_does_not_hide_the_tensors(tmp_path: Path, models: Path) -> None:
    model = copy_of(models / "qwen3-moe/nvfp4", tmp_path)
    (model / "config.json").write_text('{"hidden_size": 128, ')
    _, report = inspect(tmp_path, model)
    assert found(report) == {("damaged-file", None)}
    assert report["findings"][0]["file"] == str(model / "config.json")
    assert len(report["layers"]) == LAYERS


def test_nothing_left_to_inspect(tmp_path: Path, models: Path) -> None:
    assert_refused(run("inspect", tmp_path / "nowhere"), "expected a model directory")
    model = copy_of(models / "qwen3-moe/nvfp4", tmp_path)
    for shard in model.glob("*.safetensors"):
        shard.write_bytes(b"")
    assert_refused(run("inspect", model), "safetensors")


def test_layers_without_experts_are_refused(models: Path) -> None:
    assert_refused(run("inspect", models / "qwen3-moe/nvfp4", "--layer", "2"), "layer 2", "layers 0, 1")


def test_hostile_names_stay_on_one_line(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.tensors[f"{QWEN}\x1b[31mred\nline"] = Tensor("F32", (1,), bytes(4))
    directory = model.write(tmp_path / "model")
    result = run("inspect", directory)
    assert result.code == FINDING
    assert "\x1b" not in result.stdout and "\\x1b[31mred\\x0aline" in result.stdout


# ---- what it derives ----


def test_degrees_and_memory(tmp_path: Path, models: Path) -> None:
    _, report = inspect(tmp_path, models / "deepseek-v4/nvfp4", "--layer", "1")
    parallel = report["layers"][0]["parallel"]
    assert parallel["tensor"] == {
        "clean": [2, 4],
        "padded": [2, 4],
        "cuts_block": [8, 16, 32, 64],
        "uneven": [],
    }
    assert parallel["shared"]["cuts_block"] == [2, 4, 8, 16, 32, 64], "tiles of 128 of its FP8 weights"
    assert parallel["expert"]["clean"] == [2, 4, 8]
    memory = {entry["backend"]: entry for entry in report["layers"][0]["memory"]}
    assert memory["sm90"]["bytes"] is None and "NVFP4" in memory["sm90"]["why_not"], (
        "its shared expert is FP8"
    )
    assert memory["cpu"]["compiled_in"] and memory["cpu"]["bytes"] > memory["reference"]["bytes"]
    _, report = inspect(tmp_path, models / "deepseek-v4/original", "--layer", "1")
    memory = {entry["backend"]: entry for entry in report["layers"][0]["memory"]}
    assert memory["cpu"]["bytes"] is None, "it takes no MXFP4"


def test_one_layer_is_told_in_detail(models: Path) -> None:
    whole = run("inspect", models / "qwen3-moe/nvfp4")
    one = run("inspect", models / "qwen3-moe/nvfp4", "--layer", "1")
    assert "codes" not in whole.stdout and "codes" in one.stdout
    assert "global scales differ in" in one.stdout


def test_json_that_cannot_be_written(tmp_path: Path, models: Path) -> None:
    assert_refused(
        run("inspect", models / "mixtral/nvfp4", "--json", tmp_path / "no" / "where"), "can't create"
    )


@pytest.mark.parametrize(
    "arguments", [(), ("--layer", "1"), ("{}", "--layer", "-1"), ("{}", "--layer", "x"), ("",)]
)
def test_command_lines_that_make_no_sense(models: Path, arguments: tuple[str, ...]) -> None:
    model = str(models / "mixtral/nvfp4")
    assert_usage(run("inspect", *(argument.format(model) for argument in arguments)))


def test_on_a_terminal_problems_are_red(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "mixtral/nvfp4")
    model.config["hidden_size"] = 256
    result = run_on_terminal("inspect", model.write(tmp_path / "model"))
    assert result.code == FINDING and "\033[31m" in result.stdout


def test_the_sampled_path(tmp_path: Path) -> None:
    """What models above 4 GB get: all block scales, and a part of the codes; the same problems of scales."""
    shape = ("--shape", "2,512,4096,1", "--family", "qwen3-moe", "--tokens", "1")
    assert run("synthesize", tmp_path / "m", *shape).code == FINE
    model = tmp_path / "m/nvfp4"
    whole, all_of_it = inspect(tmp_path, model)
    assert all_of_it["codes_one_in"] == 1 and "one run of rows" not in whole.stdout
    sampled, part = inspect(tmp_path, model, "--sample-above", "0")
    assert part["codes_one_in"] == 16, str(sampled)
    assert "of codes one run of rows in 16 (--all-codes reads all)" in sampled.stdout
    for before, after in zip(all_of_it["layers"][0]["matrices"], part["layers"][0]["matrices"], strict=True):
        assert before["scales"] == after["scales"]
        assert 0 < after["codes"]["total"] <= before["codes"]["total"] / 8
    size = all_of_it["layers"][0]["bytes"]
    assert inspect(tmp_path, model, "--sample-above", str(2 * size))[1]["codes_one_in"] == 1
    assert inspect(tmp_path, model, "--all-codes")[1]["codes_one_in"] == 1

    damaged = Model.read(model)
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
    damaged.set_bytes(name, 0x7F, len(damaged.tensors[name].data) - 1)
    _, report = inspect(tmp_path, damaged.write(tmp_path / "damaged"), "--sample-above", "0")
    assert [(finding["kind"], finding["tensor"]) for finding in report["findings"]] == [("nan-scale", name)]


def test_sampling_usage(models: Path) -> None:
    model = models / "mixtral/nvfp4"
    assert_usage(run("inspect", model, "--sample-above", "4GB"), "--sample-above")
    assert_usage(run("inspect", model, "--sample-above", "1", "--all-codes"), "--all-codes")


def test_scheme_reads_what_names_hide(tmp_path: Path, models: Path) -> None:
    """Divisors under ModelOpt's names: impossible weights, and nothing wrong once --scheme says so."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    for name in model.tensors:
        if name.endswith((".weight_scale_2", ".input_scale")):
            model.set_float(name, 1.0 / model.get_float(name))
    directory = model.write(tmp_path / "divisors")
    result = run("inspect", directory)
    assert result.code == FINDING and "reciprocal-global-scale" in result.stdout, str(result)
    assert "reciprocal-input-scale" in result.stdout, str(result)
    assert inspect(tmp_path, models / "qwen3-moe/nvfp4")[1]["forced_scheme"] is None
    result, report = inspect(tmp_path, directory, "--scheme", "compressed-tensors")
    assert result.code == FINE and report["forced_scheme"] == "compressed-tensors", str(result)
    assert "compressed-tensors, whatever names and types say (--scheme)" in result.stdout
    result = run("inspect", directory, "--scheme", "mxfp4")
    assert result.code == FINDING and "bad-tensor, layer 1: 24" in result.stdout, str(result)
    assert_usage(run("inspect", directory, "--scheme", "nvfp4"), "--scheme")
    # Layers in other formats are read as they are.
    result, _ = inspect(tmp_path, models / "qwen3-moe/original", "--scheme", "modelopt")
    assert result.code == FINE, str(result)
