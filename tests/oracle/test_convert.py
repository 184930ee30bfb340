"""`fourfold convert` against the oracle: bf16 to NVFP4 by every scale rule, MXFP4 both ways, bit for bit."""

import json
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from checkpoint_oracle import read_checkpoint
from compare import assert_same
from layertest_figures import fourfold
from nvfp4_oracle import Array
from tensor_file import write_tensors

EXPERTS, HIDDEN, INNER = 2, 64, 96
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
PREFIX = "model.layers.0.mlp."
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 1,
}


def write_source(folder: Path, tensors: dict[str, Array]) -> Path:
    folder.mkdir()
    router = np.ones((EXPERTS, HIDDEN), ml_dtypes.bfloat16)
    write_tensors(folder / "model.safetensors", tensors | {f"{PREFIX}gate.weight": router})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def random_weights(seed: int) -> dict[str, Array]:
    """bf16, heavy tails, rows of very different size; with blocks of zeros, and of values that are lost."""
    rng = np.random.default_rng(seed)
    weights = {}
    for expert in range(EXPERTS):
        for name, (rows, cols) in SHAPES.items():
            spread = np.exp(rng.normal(0, 3, (rows, 1)))
            values = rng.standard_t(3, (rows, cols)) * spread * 0.02
            values[1, :16] = 0
            values[2, 16:32] = 1e-9 * rng.standard_normal(16)
            weights[f"{PREFIX}experts.{expert}.{name}"] = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    return weights


def run_convert(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [fourfold(), "convert", source, target, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def convert(source: Path, target: Path, *options: str) -> dict[str, Array]:
    process = run_convert(source, target, *options)
    assert process.returncode == 0, process.stderr
    return {name: stored.array for name, stored in read_checkpoint(target).items()}


def quantize(x: Array, global_scale: np.float32, rule: str) -> oracle.Nvfp4:
    if rule == "amax":
        return oracle.quantize_nvfp4(x, global_scale, modelopt_floor=True)
    return oracle.quantize_nvfp4_searching(x, global_scale, rule)


def as_bytes(array: Array) -> Array:
    return array.view(np.uint8)


@pytest.mark.parametrize("rule", ["amax", "four-over-six", "mse"])
@pytest.mark.parametrize("tied", [False, True])
def test_bf16_to_nvfp4(tmp_path: Path, rule: str, tied: bool) -> None:
    weights = random_weights(7)
    source = write_source(tmp_path / "source", {f"{name}.weight": values for name, values in weights.items()})
    options = ["--tie-gate-up"] if tied else []
    found = convert(source, tmp_path / "nvfp4", "--to", "nvfp4", "--scale", rule, *options)
    for name, stored in weights.items():
        values = stored.astype(np.float32)
        amax = oracle.largest_magnitude(values)
        if tied and not name.endswith("down_proj"):
            expert = name.rpartition(".")[0]
            halves = (weights[f"{expert}.{half}"].astype(np.float32) for half in ("gate_proj", "up_proj"))
            amax = max(map(oracle.largest_magnitude, halves))
        expected = quantize(values, np.float32(oracle.dynamic_global(amax, oracle.NVFP4_MAX)), rule)
        assert_same(name, found[f"{name}.weight"], expected.codes)
        assert_same(name, as_bytes(found[f"{name}.weight_scale"]), expected.scales)
        assert found[f"{name}.weight_scale_2"] == expected.global_scale
        assert f"{name}.input_scale" not in found


def test_searching_rules_are_no_worse() -> None:
    """And not the same: four-over-six beats amax somewhere, mse four-over-six or amax."""
    x = np.random.default_rng(3).standard_normal((64, 256), np.float32)
    scale = np.float32(oracle.nvfp4_global_of_tensor(x))
    errors = [
        oracle.blocked((x - quantize(x, scale, rule).dequantized).astype(np.float64) ** 2, 16).sum(axis=-1)
        for rule in ("amax", "four-over-six", "mse")
    ]
    slack = 1 + 1e-12  # numpy sums in another order here
    assert np.all(errors[1] <= errors[0] * slack) and np.any(errors[1] < 0.9 * errors[0])
    assert np.all(errors[2] <= errors[0] * slack) and errors[2].sum() < 0.95 * errors[0].sum()


def test_bf16_to_mxfp4_and_back(tmp_path: Path) -> None:
    weights = random_weights(8)
    source = write_source(tmp_path / "source", {f"{name}.weight": values for name, values in weights.items()})
    mxfp4 = convert(source, tmp_path / "mxfp4", "--to", "mxfp4")
    bf16 = convert(tmp_path / "mxfp4", tmp_path / "bf16", "--to", "bf16")
    for name, stored in weights.items():
        codes, scales = oracle.quantize_mxfp4(stored.astype(np.float32))
        assert_same(name, mxfp4[f"{name}.weight"], codes)
        assert_same(name, mxfp4[f"{name}.weight_scale"], scales)
        values = oracle.encode_bf16(oracle.decode_mxfp4(codes, scales))
        assert_same(name, bf16[f"{name}.weight"].view(np.uint16), values.view(np.uint16))


def test_nvfp4_to_bf16(tmp_path: Path) -> None:
    """(e2m1 x scale) x global, rounded to float32 and then to bf16."""
    weights = random_weights(9)
    source = write_source(tmp_path / "source", {f"{name}.weight": values for name, values in weights.items()})
    nvfp4 = convert(source, tmp_path / "nvfp4", "--to", "nvfp4")
    bf16 = convert(tmp_path / "nvfp4", tmp_path / "bf16", "--to", "bf16")
    for name in weights:
        decoded = oracle.decode_nvfp4(nvfp4[f"{name}.weight"], as_bytes(nvfp4[f"{name}.weight_scale"]))
        values = oracle.encode_bf16(decoded * nvfp4[f"{name}.weight_scale_2"])
        assert_same(name, bf16[f"{name}.weight"].view(np.uint16), values.view(np.uint16))


def test_mxfp4_to_nvfp4(tmp_path: Path) -> None:
    """The cast, of which one block is out of range: refused by name, and rounded where that is allowed."""
    rng = np.random.default_rng(10)
    tensors = {}
    for expert in range(EXPERTS):
        for name, (rows, cols) in SHAPES.items():
            linear = f"{PREFIX}experts.{expert}.{name}"
            tensors[f"{linear}.weight"] = rng.integers(0, 256, (rows, cols // 2), np.uint8)
            tensors[f"{linear}.weight_scale"] = rng.integers(110, 127, (rows, cols // 32), np.uint8)
    culprit = f"{PREFIX}experts.1.up_proj"
    tensors[f"{culprit}.weight_scale"][5, 1] = 105
    tensors[f"{culprit}.weight_scale"][6, 1] = 126
    source = write_source(tmp_path / "source", tensors)
    refused = run_convert(source, tmp_path / "nvfp4", "--to", "nvfp4")
    assert refused.returncode == 1
    assert f"{culprit}: expected an exact cast" in refused.stderr and "1 of 192 blocks" in refused.stderr
    assert not (tmp_path / "nvfp4").exists()
    found = convert(source, tmp_path / "nvfp4", "--to", "nvfp4", "--allow-inexact")
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        cast = oracle.cast_mxfp4(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
        assert_same(name, found[f"{name}.weight"], cast.codes)
        assert_same(name, as_bytes(found[f"{name}.weight_scale"]), cast.scales)
        assert found[f"{name}.weight_scale_2"] == cast.global_scale
        assert cast.inexact == (name == culprit)
