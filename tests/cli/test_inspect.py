"""`fourfold inspect`: one planted fault of each kind is what it lists, by name, and nothing else; sound models
of every family are clean; its counts are those of numpy on the same bytes.

Models come from `fourfold synthesize`. Faults are planted here, in the bytes of the files, by code that shares
nothing with the C++ reader.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from checkpoints import Config, Tensor, Tensors
from command import ERROR, FINDING, FINE, Json, Result, assert_refused, assert_usage, run, run_on_terminal

FAMILIES = ("deepseek-v4", "deepseek-v3", "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss")
SCHEMES = ("nvfp4", "original")
LAYERS = 2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/<family>/{original,nvfp4}; the original is MXFP4, FP8 or bf16, as the family's is."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        result = run("synthesize", folder / family, "--shape", "8,128,64,2", "--family", family,
                     "--layers", str(LAYERS), "--tokens", "16")  # fmt: skip
        assert result.code == FINE, str(result)
    return folder


@dataclass
class Model:
    """All of a model directory, to change and write again."""

    tensors: Tensors
    config: Config
    quantization: Config | None

    @staticmethod
    def read(directory: Path) -> "Model":
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            header, data = ck.read_header(file)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
        side = directory / "hf_quant_config.json"
        quantization = json.loads(side.read_text()) if side.exists() else None
        return Model(tensors, json.loads((directory / "config.json").read_text()), quantization)

    def write(self, directory: Path) -> Path:
        ck.write_shards(directory, self.tensors, self.config)
        if self.quantization is not None:
            ck.write_json(directory / "hf_quant_config.json", self.quantization)
        return directory

    def set_bytes(self, name: str, value: int, *at: int) -> None:
        """Bytes `at` of a tensor, or all of them."""
        data = bytearray(self.tensors[name].data)
        for index in at or range(len(data)):
            data[index] = value
        self.tensors[name] = replace(self.tensors[name], data=bytes(data))

    def set_float(self, name: str, value: float, index: int = 0) -> None:
        values = np.frombuffer(self.tensors[name].data, np.float32).copy()
        values[index] = value
        self.tensors[name] = replace(self.tensors[name], data=values.tobytes())

    def get_float(self, name: str) -> float:
        return float(np.frombuffer(self.tensors[name].data, np.float32)[0])

    def remove(self, prefix: str) -> None:
        gone = [name for name in self.tensors if name.startswith(prefix)]
        assert gone, prefix
        for name in gone:
            del self.tensors[name]


def inspect(folder: Path, model: Path, *arguments: str) -> tuple[Result, Json]:
    """Text and JSON agree with each other and with the exit code."""
    file = folder / "inspection.json"
    result = run("inspect", model, "--json", file, *arguments)
    report = json.loads(file.read_text())
    assert result.code == (FINDING if report["findings"] else FINE), str(result)
    assert (report["verdict"] == "clean") == (result.code == FINE)
    assert not result.stderr, str(result)
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"{len(report['findings'])} problem" if report["findings"] else "model "), first
    for finding in report["findings"]:
        assert finding["kind"] in result.stdout
        assert (finding["tensor"] or finding["file"]) in result.stdout, str(result)
        assert finding["remedy"] in result.stdout
    return result, report


def found(report: Json) -> set[tuple[str, str]]:
    return {(finding["kind"], finding["tensor"]) for finding in report["findings"]}


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


@pytest.mark.parametrize("profile", ["gaussian", "realistic"])
@pytest.mark.parametrize("original", ["mxfp4", "bf16", "fp8"])
def test_sound_pairs_of_either_profile_are_clean(tmp_path: Path, original: str, profile: str) -> None:
    result = run("synthesize", tmp_path / "pair", "--shape", "4,256,96,2", "--original", original,
                 "--profile", profile, "--seed", "3", "--tokens", "16")  # fmt: skip
    assert result.code == FINE, str(result)
    for scheme in SCHEMES:
        _, report = inspect(tmp_path, tmp_path / "pair" / scheme)
        assert not report["findings"]


# ---- planted faults ----

QWEN = "model.layers.1.mlp."
UP = QWEN + "experts.3.up_proj"
V4 = "layers.1.ffn.experts.2.w1"
GPT = "model.layers.1.mlp.experts.gate_up_proj"

Plant = Callable[[Model], None]
FAULTS: dict[str, tuple[str, Plant, set[tuple[str, str]]]] = {}


def fault(model: str, kind: str, tensor: str) -> Callable[[Plant], Plant]:
    """Registers a way to damage `model`, and the one finding that it must give."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (model, plant, {(kind, tensor)})
        return plant

    return register


@fault("qwen3-moe/nvfp4", "nan-scale", f"{UP}.weight_scale")
def nan_scale(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0x7F, 17)


@fault("qwen3-moe/nvfp4", "nan-scale", f"{UP}.weight_scale")
def nan_scale_with_its_sign_set(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0xFF, 0)


@fault("qwen3-moe/nvfp4", "negative-scale", f"{UP}.weight_scale")
def negative_scale(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0xB8, 511)


@fault("deepseek-v4/original", "nan-scale", f"{V4}.scale")
def nan_scale_of_mxfp4(model: Model) -> None:
    model.set_bytes(f"{V4}.scale", 0xFF, 5)


@fault("gpt-oss/nvfp4", "nan-scale", f"{GPT}_weight_scale")
def nan_scale_of_a_fused_tensor(model: Model) -> None:
    model.set_bytes(f"{GPT}_weight_scale", 0x7F, 3 * 8 * 128 + 130)


@fault("gpt-oss/original", "nan-scale", f"{GPT}_scales")
def nan_scale_of_fused_mxfp4(model: Model) -> None:
    model.set_bytes(f"{GPT}_scales", 0xFF, 700)


@fault("deepseek-v3/original", "bad-scale", f"{UP}.weight_scale_inv")
def nan_tile_scale(model: Model) -> None:
    model.set_float(f"{UP}.weight_scale_inv", np.nan)


@fault("deepseek-v3/original", "non-finite-weights", f"{UP}.weight")
def nan_among_fp8_weights(model: Model) -> None:
    model.set_bytes(f"{UP}.weight", 0x7F, 99)


@fault("qwen3-moe/original", "non-finite-weights", f"{UP}.weight")
def infinity_among_bf16_weights(model: Model) -> None:
    model.set_bytes(f"{UP}.weight", 0x7F, 101)
    model.set_bytes(f"{UP}.weight", 0x80, 100)


@fault("deepseek-v3/nvfp4", "non-finite-weights", f"{QWEN}gate.weight")
def nan_in_the_router(model: Model) -> None:
    model.set_bytes(f"{QWEN}gate.weight", 0xFF, 20, 21)


@fault("qwen3-moe/nvfp4", "missing-input-scale", f"{UP}.input_scale")
def missing_input_scale(model: Model) -> None:
    model.remove(f"{UP}.input_scale")


@fault("qwen2-moe/nvfp4", "missing-input-scale", f"{QWEN}shared_expert.down_proj.input_scale")
def missing_input_scale_of_the_shared_expert(model: Model) -> None:
    model.remove(f"{QWEN}shared_expert.down_proj.input_scale")


@fault("qwen3-moe/nvfp4", "bad-input-scale", f"{UP}.input_scale")
def input_scale_of_zero(model: Model) -> None:
    model.set_float(f"{UP}.input_scale", 0.0)


@fault("qwen3-moe/nvfp4", "bad-input-scale", f"{UP}.input_scale")
def input_scale_of_infinity(model: Model) -> None:
    model.set_float(f"{UP}.input_scale", np.inf)


@fault("qwen3-moe/nvfp4", "bad-input-scale", f"{UP}.input_scale")
def input_scale_of_nan(model: Model) -> None:
    model.set_float(f"{UP}.input_scale", np.nan)


@fault("qwen3-moe/nvfp4", "bad-input-scale", f"{UP}.input_scale")
def negative_input_scale(model: Model) -> None:
    model.set_float(f"{UP}.input_scale", -0.01)


@fault("gpt-oss/nvfp4", "bad-input-scale", f"{GPT}_input_scale")
def input_scale_of_a_fused_tensor(model: Model) -> None:
    model.set_float(f"{GPT}_input_scale", 0.0)


@fault("qwen3-moe/nvfp4", "reciprocal-input-scale", f"{UP}.input_scale")
def reciprocal_input_scale(model: Model) -> None:
    model.set_float(f"{UP}.input_scale", 1 / model.get_float(f"{UP}.input_scale"))


@fault("qwen3-moe/nvfp4", "reciprocal-global-scale", f"{UP}.weight_scale_2")
def reciprocal_global_scale(model: Model) -> None:
    model.set_float(f"{UP}.weight_scale_2", 1 / model.get_float(f"{UP}.weight_scale_2"))


@fault("gpt-oss/nvfp4", "reciprocal-global-scale", f"{GPT}_weight_scale_2")
def reciprocal_global_scale_of_a_fused_tensor(model: Model) -> None:
    model.set_float(f"{GPT}_weight_scale_2", 1 / model.get_float(f"{GPT}_weight_scale_2"))


@fault("qwen3-moe/nvfp4", "bad-scale", f"{UP}.weight_scale_2")
def global_scale_of_zero(model: Model) -> None:
    model.set_float(f"{UP}.weight_scale_2", 0.0)


@fault("qwen3-moe/nvfp4", "bad-scale", f"{UP}.weight_scale_2")
def global_scale_of_infinity(model: Model) -> None:
    model.set_float(f"{UP}.weight_scale_2", np.inf)


@fault("gpt-oss/nvfp4", "bad-scale", f"{GPT}_weight_scale_2")
def global_scale_of_nan_in_a_fused_tensor(model: Model) -> None:
    model.set_float(f"{GPT}_weight_scale_2", np.nan)


@fault("qwen3-moe/nvfp4", "zero-weights", f"{UP}.weight_scale")
def zero_scales(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0)


@fault("qwen3-moe/nvfp4", "zero-weights", f"{UP}.weight")
def zero_codes(model: Model) -> None:
    model.set_bytes(f"{UP}.weight", 0)


@fault("mixtral/original", "zero-weights", "model.layers.0.block_sparse_moe.experts.7.w2.weight")
def zero_bf16_weights(model: Model) -> None:
    model.set_bytes("model.layers.0.block_sparse_moe.experts.7.w2.weight", 0)


@fault("gpt-oss/nvfp4", "zero-weights", GPT)
def one_expert_of_a_fused_tensor_is_zero(model: Model) -> None:
    model.set_bytes(GPT, 0, *range(5 * 64 * 128, 6 * 64 * 128))


@fault("qwen3-moe/nvfp4", "saturated-scales", f"{UP}.weight_scale")
def saturated_scales(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0x7E, *range(0, 512, 8))


@fault("qwen3-moe/nvfp4", "subnormal-scales", f"{UP}.weight_scale")
def subnormal_scales(model: Model) -> None:
    model.set_bytes(f"{UP}.weight_scale", 0x03, *range(300))


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{UP}.weight")
def missing_matrix(model: Model) -> None:
    model.remove(f"{UP}.")


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{QWEN}experts.3.gate_proj.weight")
def missing_gate(model: Model) -> None:
    model.remove(f"{QWEN}experts.3.gate_proj.")


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{UP}.weight")
def missing_codes(model: Model) -> None:
    del model.tensors[f"{UP}.weight"]


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{UP}.weight_scale_2")
def missing_global_scale(model: Model) -> None:
    model.remove(f"{UP}.weight_scale_2")


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{QWEN}experts.4")
def missing_expert(model: Model) -> None:
    model.remove(f"{QWEN}experts.4.")


@fault("qwen3-moe/nvfp4", "missing-tensor", f"{QWEN}experts.")
def missing_experts_of_a_layer_with_a_router(model: Model) -> None:
    model.remove(f"{QWEN}experts.")


@fault("qwen3-moe/nvfp4", "bad-tensor", f"{UP}.weight_scale")
def transposed_scales(model: Model) -> None:
    model.tensors[f"{UP}.weight_scale"] = model.tensors[f"{UP}.weight_scale"].with_shape(8, 64)


@fault("qwen3-moe/nvfp4", "bad-tensor", f"{UP}.weight")
def weight_of_another_type(model: Model) -> None:
    model.tensors[f"{UP}.weight"] = model.tensors[f"{UP}.weight"].with_dtype("F8_E5M2")


@fault("qwen3-moe/original", "bad-tensor", f"{UP}.weight")
def weight_of_another_shape(model: Model) -> None:
    model.tensors[f"{UP}.weight"] = model.tensors[f"{UP}.weight"].with_shape(128, 64)


@fault("gpt-oss/nvfp4", "bad-tensor", f"{GPT}_weight_scale")
def fused_scales_of_another_shape(model: Model) -> None:
    model.tensors[f"{GPT}_weight_scale"] = model.tensors[f"{GPT}_weight_scale"].with_shape(8, 128, 8)


@fault("qwen3-moe/nvfp4", "unknown-tensor", f"{QWEN}correction.weight")
def unknown_tensor_in_the_block(model: Model) -> None:
    model.tensors[f"{QWEN}correction.weight"] = Tensor("F32", (1,), bytes(4))


@fault("qwen3-moe/nvfp4", "unknown-tensor", f"{UP}.zero_point")
def unknown_tensor_of_a_matrix(model: Model) -> None:
    model.tensors[f"{UP}.zero_point"] = Tensor("F32", (1,), bytes(4))


@fault("qwen3-moe/nvfp4", "missing-router", f"{QWEN}gate.weight")
def missing_router(model: Model) -> None:
    model.remove(f"{QWEN}gate.weight")


@fault("deepseek-v3/nvfp4", "bad-tensor", f"{QWEN}gate")
def missing_correction_bias(model: Model) -> None:
    model.remove(f"{QWEN}gate.e_score_correction_bias")


@fault("deepseek-v3/nvfp4", "missing-shared-expert", f"{QWEN}shared_experts")
def missing_shared_expert(model: Model) -> None:
    model.remove(f"{QWEN}shared_experts.")


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: hidden size")
def config_of_another_hidden_size(model: Model) -> None:
    model.config["hidden_size"] = 256


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: expert intermediate size")
def config_of_another_intermediate_size(model: Model) -> None:
    model.config["moe_intermediate_size"] = 96


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: number of experts")
def config_of_more_experts(model: Model) -> None:
    model.config["num_experts"] = 9


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: quantization")
def config_without_quantization(model: Model) -> None:
    model.quantization = None


@fault("mixtral/original", "config-disagrees", "config.json: quantization")
def config_that_claims_nvfp4(model: Model) -> None:
    model.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: family")
def config_of_an_unknown_family(model: Model) -> None:
    model.config["model_type"] = "unheard_of"


@fault("qwen3-moe/nvfp4", "config-disagrees", "config.json: num_experts_per_tok")
def config_without_top_k(model: Model) -> None:
    del model.config["num_experts_per_tok"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_all_that_is_found(tmp_path: Path, models: Path, name: str) -> None:
    source, plant, expected = FAULTS[name]
    model = Model.read(models / source)
    plant(model)
    _, report = inspect(tmp_path, model.write(tmp_path / "model"))
    assert found(report) == expected, json.dumps(report["findings"], indent=1)
    assert len(report["findings"]) == 1
    assert {layer["layer"] for layer in report["layers"]} | {1} == {0, 1}, "the rest is reported"


def test_many_faults_in_one_layer_are_all_found(tmp_path: Path, models: Path) -> None:
    """Among them some at which the loader would have stopped."""
    names = ["transposed_scales", "missing_router", "missing_expert", "config_of_more_experts"]
    model = Model.read(models / "qwen3-moe/nvfp4")
    for name in names:
        FAULTS[name][1](model)
    other = f"{QWEN}experts.6.down_proj"
    model.set_float(f"{other}.weight_scale_2", np.nan)
    model.set_bytes(f"{QWEN}experts.7.gate_proj.weight_scale", 0x7F, 1)
    _, report = inspect(tmp_path, model.write(tmp_path / "model"))
    expected = set.union(*(FAULTS[name][2] for name in names))
    expected |= {("bad-scale", f"{other}.weight_scale_2"),
                 ("nan-scale", f"{QWEN}experts.7.gate_proj.weight_scale")}  # fmt: skip
    assert found(report) == expected
    assert not report["layers"][1]["loads"] and report["layers"][0]["loads"]


def test_an_uncalibrated_layer_among_calibrated_ones(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "qwen3-moe/nvfp4")
    for name in [name for name in model.tensors if name.startswith(QWEN) and name.endswith("input_scale")]:
        del model.tensors[name]
    _, report = inspect(tmp_path, model.write(tmp_path / "model"))
    assert found(report) == {("missing-input-scale", f"{QWEN}experts.E.{{gate_proj,up_proj,down_proj}}")}


def test_a_model_without_any_input_scale_is_clean(tmp_path: Path, models: Path) -> None:
    """Weights alone are quantized: activations get dynamic scales."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    for name in [name for name in model.tensors if name.endswith("input_scale")]:
        del model.tensors[name]
    result, _ = inspect(tmp_path, model.write(tmp_path / "model"))
    assert result.code == FINE, str(result)


def test_where_a_bad_scale_is(tmp_path: Path, models: Path) -> None:
    """Row and block of the first one; of transposed tensors, in the matrix and not in the file."""
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.set_bytes(f"{UP}.weight_scale", 0x7F, 19, 21)
    _, report = inspect(tmp_path, model.write(tmp_path / "plain"))
    assert report["findings"][0]["found"] == "2 NaN scales of 512, the first at row 2, block 3"
    model = Model.read(models / "gpt-oss/nvfp4")
    model.set_bytes(f"{GPT}_weight_scale", 0x7F, 3 * 8 * 128 + 5 * 128 + 77)
    _, report = inspect(tmp_path, model.write(tmp_path / "fused"))
    assert report["findings"][0]["found"] == "expert 3: 1 NaN scale of 1024, the first at row 77, block 5"


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
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.unlink()
    _, report = inspect(tmp_path, model)
    assert found(report) == {("damaged-file", None)}
    assert "is the download complete?" in report["findings"][0]["found"]
    assert report["layers"]


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


# ---- counts, against numpy ----


def role_of(name: str) -> str:
    linear = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
    shared = "shared " if ".shared_expert" in name else ""
    return shared + next(role for part, role in linear.items() if f".{part}." in name)


def zero_blocks(codes: np.ndarray, axis: int, block_bytes: int) -> int:
    """Blocks of `block_bytes` bytes along `axis` in which no code has a magnitude."""
    moved = np.moveaxis(codes & 0x77, axis, -1)
    return int((moved.reshape(-1, block_bytes) == 0).all(axis=1).sum())


@pytest.mark.parametrize("family", ["deepseek-v4", "qwen3-moe", "qwen2-moe"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_are_those_of_numpy(tmp_path: Path, models: Path, family: str, scheme: str) -> None:
    model = Model.read(models / family / scheme)
    _, report = inspect(tmp_path, models / family / scheme)
    for layer in report["layers"]:
        prefix = f".{layer['layer']}."
        for group in layer["matrices"]:
            weights = [(name, tensor) for name, tensor in model.tensors.items()
                       if f"layers{prefix}" in name and name.endswith(".weight") and "expert" in name
                       and "shared_expert_gate" not in name and role_of(name) == group["role"]]  # fmt: skip
            assert len(weights) == group["matrices"]
            bytes_of = [np.frombuffer(tensor.data, np.uint8) for _, tensor in weights]
            if group["format"] in ("nvfp4", "mxfp4"):
                suffix, block = ("_scale", 8) if group["format"] == "nvfp4" else (".scale", 16)
                names = [name + suffix if suffix == "_scale" else name.removesuffix(".weight") + suffix
                         for name, _ in weights]  # fmt: skip
                scales = np.concatenate([np.frombuffer(model.tensors[name].data, np.uint8) for name in names])
                codes = np.concatenate(bytes_of)
                nibbles = np.bincount(codes & 15, minlength=16) + np.bincount(codes >> 4, minlength=16)
                assert group["scales"]["by_byte"] == np.bincount(scales, minlength=256).tolist()
                assert group["codes"]["by_code"] == nibbles.tolist()
                assert group["codes"]["zero_blocks"] == zero_blocks(codes, 0, block)
                dtype = ml_dtypes.float8_e4m3fn if block == 8 else ml_dtypes.float8_e8m0fnu
                values = scales.view(dtype).astype(np.float64)
                assert group["scales"]["smallest"] == values.min()
                assert group["scales"]["largest"] == values.max()
                assert group["scales"]["median"] == np.sort(values)[(len(values) + 1) // 2 - 1]
            elif group["format"] == "fp8":
                values = np.concatenate(bytes_of).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
                assert group["values"]["zeros"] == int((values == 0).sum())
                assert group["values"]["largest"] == float(np.abs(values).max())
            else:
                values = np.concatenate(bytes_of).view(ml_dtypes.bfloat16).astype(np.float32)
                assert group["values"]["total"] == values.size
                assert group["values"]["zeros"] == int((values == 0).sum())
                assert group["values"]["largest"] == float(np.abs(values).max())


def test_counts_of_fused_tensors_are_those_of_numpy(tmp_path: Path, models: Path) -> None:
    """ModelOpt's are transposed: blocks run along dimension 1."""
    model = Model.read(models / "gpt-oss/nvfp4")
    _, report = inspect(tmp_path, models / "gpt-oss/nvfp4", "--layer", "1")
    for group, linear in zip(report["layers"][0]["matrices"], ("gate_up_proj", "down_proj"), strict=True):
        codes = np.frombuffer(model.tensors[QWEN + "experts." + linear].data, np.uint8)
        shape = model.tensors[QWEN + "experts." + linear].shape
        scales = np.frombuffer(model.tensors[f"{QWEN}experts.{linear}_weight_scale"].data, np.uint8)
        nibbles = np.bincount(codes & 15, minlength=16) + np.bincount(codes >> 4, minlength=16)
        assert group["scales"]["by_byte"] == np.bincount(scales, minlength=256).tolist()
        assert group["codes"]["by_code"] == nibbles.tolist()
        assert group["codes"]["zero_blocks"] == zero_blocks(codes.reshape(shape), 1, 8)


def test_gate_up_ratios_are_those_of_numpy(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "deepseek-v3/nvfp4")
    _, report = inspect(tmp_path, models / "deepseek-v3/nvfp4", "--layer", "1")
    gate, up = (np.array([model.get_float(f"{QWEN}experts.{e}.{half}.weight_scale_2") for e in range(8)])
                for half in ("gate_proj", "up_proj"))  # fmt: skip
    ratios = np.maximum(gate, up) / np.minimum(gate, up)
    summary = report["layers"][0]["gate_up"]
    assert summary["pairs"] == 8 and summary["different"] == int((gate != up).sum())
    assert summary["largest"] == ratios.max() and summary["largest_expert"] == int(ratios.argmax())
    assert summary["median"] == np.sort(ratios)[4]


# ---- what it derives ----


def test_degrees_and_memory(tmp_path: Path, models: Path) -> None:
    _, report = inspect(tmp_path, models / "deepseek-v4/nvfp4", "--layer", "1")
    parallel = report["layers"][0]["parallel"]
    assert parallel["tensor"] == {"clean": [2, 4], "padded": [2, 4], "cuts_block": [8, 16, 32, 64], "uneven": []}
    assert parallel["shared"]["cuts_block"] == [2, 4, 8, 16, 32, 64], "tiles of 128 of its FP8 weights"
    assert parallel["expert"]["clean"] == [2, 4, 8]
    memory = {entry["backend"]: entry for entry in report["layers"][0]["memory"]}
    assert memory["sm90"]["bytes"] is None and "NVFP4" in memory["sm90"]["why_not"], "its shared expert is FP8"
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
    assert_refused(run("inspect", models / "mixtral/nvfp4", "--json", tmp_path / "no" / "where"), "can't create")


@pytest.mark.parametrize("arguments", [(), ("--layer", "1"), ("{}", "--layer", "-1"), ("{}", "--layer", "x"), ("",)])
def test_command_lines_that_make_no_sense(models: Path, arguments: tuple[str, ...]) -> None:
    model = str(models / "mixtral/nvfp4")
    assert_usage(run("inspect", *(argument.format(model) for argument in arguments)))


def test_on_a_terminal_problems_are_red(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "mixtral/nvfp4")
    model.config["hidden_size"] = 256
    result = run_on_terminal("inspect", model.write(tmp_path / "model"))
    assert result.code == FINDING and "\033[31m" in result.stdout


# ---- doctor ----


def test_doctor_of_this_machine() -> None:
    result = run("doctor")
    assert result.code == FINE, str(result)
    for part in ("machine", "cpu sets", "driver", "gpu", "backends", "reference", "chosen", "cpu portable",
                 "this machine is fine"):  # fmt: skip
        assert part in result.stdout, str(result)


def test_doctor_names_what_forces_a_backend() -> None:
    result = run("doctor", env={"FOURFOLD_BACKEND": "reference", "FOURFOLD_ISA": "portable"})
    assert "FOURFOLD_BACKEND=reference" in result.stdout and "reference (forced by" in result.stdout
    assert "FOURFOLD_ISA=portable" in result.stdout
    result = run("doctor", env={"FOURFOLD_BACKEND": "abacus"})
    assert result.code == FINDING and "'abacus'" in result.stdout, str(result)


@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_of_a_layer(models: Path, family: str) -> None:
    result = run("doctor", models / family / "nvfp4", "--layer", "1")
    assert result.code == FINE, str(result)
    assert "layer 1: 8 experts, nvfp4" in result.stdout
    assert "kernel:" in result.stdout


def test_doctor_says_why_not_the_faster_backend(models: Path) -> None:
    result = run("doctor", models / "deepseek-v4/original")
    assert "reference (passed over" in result.stdout and "mxfp4" in result.stdout, str(result)


def test_doctor_of_damaged_layers(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.remove(f"{UP}.weight_scale_2")
    result = run("doctor", model.write(tmp_path / "model"), "--layer", "1")
    assert result.code == FINDING and "weight_scale_2" in result.stdout and "inspect" in result.stdout, str(result)
    model = Model.read(models / "qwen3-moe/nvfp4")
    model.set_float(f"{UP}.input_scale", 0.0)
    result = run("doctor", model.write(tmp_path / "model"), "--layer", "1")
    assert result.code == FINDING and "input_scale" in result.stdout, str(result)


def test_doctor_of_what_is_not_there(tmp_path: Path, models: Path) -> None:
    assert_refused(run("doctor", tmp_path / "nowhere"), "expected a model directory")
    assert_refused(run("doctor", models / "mixtral/nvfp4", "--layer", "9"), "layer 9")
    assert_usage(run("doctor", "--layer", "1"))
    assert run("doctor", "").code != ERROR
