"""One planted fault of each kind is what `fourfold inspect` lists, by name, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import Tensor
from command import FINE
from models import QWEN, UP, Model, found, inspect

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
    expected |= {
        ("bad-scale", f"{other}.weight_scale_2"),
        ("nan-scale", f"{QWEN}experts.7.gate_proj.weight_scale"),
    }
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
