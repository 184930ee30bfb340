"""The counts of `fourfold inspect` are those of numpy on the same bytes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from command import FINE
from models import QWEN, SCHEMES, Model, inspect


def role_of(name: str) -> str:
    linear = {
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
        "w1": "gate",
        "w3": "up",
        "w2": "down",
    }
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
            weights = [
                (name, tensor)
                for name, tensor in model.tensors.items()
                if f"layers{prefix}" in name
                and name.endswith(".weight")
                and "expert" in name
                and "shared_expert_gate" not in name
                and role_of(name) == group["role"]
            ]
            assert len(weights) == group["matrices"]
            bytes_of = [np.frombuffer(tensor.data, np.uint8) for _, tensor in weights]
            if group["format"] in ("nvfp4", "mxfp4"):
                suffix, block = ("_scale", 8) if group["format"] == "nvfp4" else (".scale", 16)
                names = [
                    name + suffix if suffix == "_scale" else name.removesuffix(".weight") + suffix
                    for name, _ in weights
                ]
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


def test_fused_mxfp4_without_blocks(tmp_path: Path, models: Path) -> None:
    """Codes as fused NVFP4 has them, with an e8m0 scale for 32 and no global scale; found with and without
    --scheme."""
    model = Model.read(models / "gpt-oss/nvfp4")
    for name in list(model.tensors):
        if name.endswith(("_weight_scale_2", "_input_scale")):
            del model.tensors[name]
        elif name.endswith("_weight_scale"):
            experts, blocks, rows = model.tensors[name].shape
            model.tensors[name] = ck.bytes_of("F8_E8M0", 120, experts, blocks // 2, rows)
    model.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "MXFP4"}
    model.quantization = None
    directory = model.write(tmp_path / "packed")
    for options in ((), ("--scheme", "mxfp4")):
        result, report = inspect(tmp_path, directory, *options)
        assert result.code == FINE, str(result)
        for group in report["layers"][0]["matrices"][:2]:
            assert group["format"] == "mxfp4" and group["scales"]["smallest"] == 2.0**-7


def test_gate_up_ratios_are_those_of_numpy(tmp_path: Path, models: Path) -> None:
    model = Model.read(models / "deepseek-v3/nvfp4")
    _, report = inspect(tmp_path, models / "deepseek-v3/nvfp4", "--layer", "1")
    gate, up = (
        np.array([model.get_float(f"{QWEN}experts.{e}.{half}.weight_scale_2") for e in range(8)])
        for half in ("gate_proj", "up_proj")
    )
    ratios = np.maximum(gate, up) / np.minimum(gate, up)
    summary = report["layers"][0]["gate_up"]
    assert summary["pairs"] == 8 and summary["different"] == int((gate != up).sum())
    assert summary["largest"] == ratios.max() and summary["largest_expert"] == int(ratios.argmax())
    assert summary["median"] == np.sort(ratios)[4]
