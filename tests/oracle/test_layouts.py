"""Layouts of experts that `fourfold synthesize` does not make (docs/formats.md, section 3), read by the
library and by the oracle: the layer that the driver loads and runs equals the oracle's bit for bit.
"""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from checkpoint_oracle import read_layer
from compare import assert_same
from nvfp4_oracle import Array
from tensor_file import run_driver
from test_families import bf16, plain, quantized, write_file
from test_layer import assert_same_activation

EXPERTS, HIDDEN, TOP_K, TOKENS = 3, 160, 2, 13
BLOCK = "model.layers.0.mlp."
HALVES = ("gate_proj", "up_proj", "down_proj")

Stored = dict[str, tuple[str, Array]]


def one_by_one(make: Callable[[str, Array], Stored], values: dict[str, Array]) -> Stored:
    """`make` for every matrix of every expert: values (E, N, K)."""
    tensors: Stored = {}
    for expert in range(EXPERTS):
        for half in HALVES:
            tensors |= make(f"{BLOCK}experts.{expert}.{half}.", values[half][expert])
    return tensors


def fp8_codes(values: Array, scales: Array) -> Array:
    """(N, K) divided by tile scales (ceil(N / 128), ceil(K / 128)) -> e4m3 codes."""
    rows, cols = (np.arange(extent) // 128 for extent in values.shape)
    return oracle.encode_e4m3(values.astype(np.float32) / scales[np.ix_(rows, cols)])


def tiles(values: Array) -> tuple[int, int]:
    return -(-values.shape[0] // 128), -(-values.shape[1] // 128)


def fp8_by_tile(name: str, values: Array) -> Stored:
    """DeepSeek-V3: a float32 scale a tile, different ones."""
    scales = np.random.default_rng(len(name)).uniform(0.5, 2, tiles(values)).astype(np.float32) / 1000
    codes = ("F8_E4M3", fp8_codes(values, scales))
    return {f"{name}weight": codes, f"{name}weight_scale_inv": ("F32", scales)}


def fp8_by_power_of_two(name: str, values: Array) -> Stored:
    """DeepSeek-V4's shared experts: e8m0 a tile."""
    exponents = np.random.default_rng(len(name)).integers(115, 119, tiles(values)).astype(np.uint8)
    codes = ("F8_E4M3", fp8_codes(values, oracle.decode_e8m0(exponents)))
    return {f"{name}weight": codes, f"{name}scale": ("F8_E8M0", exponents)}


def fp8_of_modelopt(shape: tuple[int, ...]) -> Callable[[str, Array], Stored]:
    """One scale for the matrix, [] or [1]."""

    def make(name: str, values: Array) -> Stored:
        scale = np.float32(0.0013)
        codes = fp8_codes(values, np.full(tiles(values), scale))
        return {
            f"{name}weight": ("F8_E4M3", codes),
            f"{name}weight_scale": ("F32", np.full(shape, scale, np.float32)),
            f"{name}input_scale": ("F32", np.full(shape, 0.01, np.float32)),
        }

    return make


def dense(dtype: str, numpy_type: type) -> Callable[[str, Array], Stored]:
    return lambda name, values: {f"{name}weight": (dtype, values.astype(np.float32).astype(numpy_type))}


def fused(values: dict[str, Array]) -> dict[str, Array]:
    """gate_up_proj (E, 2I, H) with gate first, down_proj (E, H, I)."""
    gate_up = np.concatenate([values["gate_proj"], values["up_proj"]], axis=1)
    return {"gate_up_proj": gate_up, "down_proj": values["down_proj"]}


def fused_bf16(values: dict[str, Array], is_transposed: bool = False) -> Stored:
    return {
        f"{BLOCK}experts.{name}": plain(array.transpose(0, 2, 1) if is_transposed else array)
        for name, array in fused(values).items()
    }


def fused_nvfp4(values: dict[str, Array], is_transposed: bool = False) -> Stored:
    tensors: Stored = {}
    for name, array in fused(values).items():
        q = quantized(array.reshape(-1, array.shape[-1]))
        codes, scales = (a.reshape(*array.shape[:2], -1) for a in (q.codes, q.scales))
        if is_transposed:
            codes, scales = codes.transpose(0, 2, 1), scales.transpose(0, 2, 1)
        start = f"{BLOCK}experts.{name}"
        tensors[start] = ("U8", codes)
        tensors[f"{start}_weight_scale"] = ("F8_E4M3", scales)
        tensors[f"{start}_weight_scale_2"] = ("F32", np.float32(q.global_scale).reshape(()))
        tensors[f"{start}_input_scale"] = ("F32", np.float32(0.01).reshape(()))
    return tensors


def nvfp4_of_modelopt(name: str, values: Array) -> Stored:
    q = quantized(values)
    return {
        f"{name}weight": ("U8", q.codes),
        f"{name}weight_scale": ("F8_E4M3", q.scales),
        f"{name}weight_scale_2": ("F32", np.float32(q.global_scale).reshape(())),
        f"{name}input_scale": ("F32", np.float32(0.01).reshape(())),
    }


def nvfp4_of_compressed_tensors(name: str, values: Array) -> Stored:
    """The same under other names; divisors."""
    q = quantized(values)
    return {
        f"{name}weight_packed": ("U8", q.codes),
        f"{name}weight_scale": ("F8_E4M3", q.scales),
        f"{name}weight_global_scale": ("F32", np.float32([1]) / np.float32(q.global_scale)),
        f"{name}input_global_scale": ("F32", np.array([103.7], np.float32)),
    }


def mxfp4(dtypes: tuple[str, str], suffixes: tuple[str, str]) -> Callable[[str, Array], Stored]:
    """Codes and e8m0 scales under the names and types of each writer."""

    def make(name: str, values: Array) -> Stored:
        codes, scales = oracle.quantize_mxfp4(values.astype(np.float32))
        return {
            f"{name}{suffix}": (dtype, array)
            for suffix, dtype, array in zip(suffixes, dtypes, (codes, scales), strict=True)
        }

    return make


def mixed_experts(values: dict[str, Array]) -> Stored:
    """Every expert of another scheme, and the last one's matrices of three."""
    schemes = [nvfp4_of_compressed_tensors, dense("BF16", ml_dtypes.bfloat16), fp8_by_tile]
    tensors: Stored = {}
    for expert in range(EXPERTS):
        for number, half in enumerate(HALVES):
            make = schemes[number if expert == EXPERTS - 1 else expert]
            tensors |= make(f"{BLOCK}experts.{expert}.{half}.", values[half][expert])
    return tensors


LAYOUTS: dict[str, Callable[[dict[str, Array]], Stored]] = {
    "fp8-by-tile": lambda values: one_by_one(fp8_by_tile, values),
    "fp8-by-power-of-two": lambda values: one_by_one(fp8_by_power_of_two, values),
    "fp8-of-modelopt": lambda values: one_by_one(fp8_of_modelopt(()), values),
    "fp8-of-modelopt-rank-1": lambda values: one_by_one(fp8_of_modelopt((1,)), values),
    "f16": lambda values: one_by_one(dense("F16", np.float16), values),
    "f32": lambda values: one_by_one(dense("F32", np.float32), values),
    "nvfp4-of-modelopt": lambda values: one_by_one(nvfp4_of_modelopt, values),
    "nvfp4-of-compressed-tensors": lambda values: one_by_one(nvfp4_of_compressed_tensors, values),
    "mxfp4-of-deepseek": lambda values: one_by_one(mxfp4(("I8", "F8_E8M0"), ("weight", "scale")), values),
    "mxfp4-of-compressed-tensors": lambda values: one_by_one(
        mxfp4(("U8", "U8"), ("weight_packed", "weight_scale")), values
    ),
    "mxfp4-of-modelopt": lambda values: one_by_one(mxfp4(("U8", "U8"), ("weight", "weight_scale")), values),
    "mixed": mixed_experts,
    "fused-bf16": fused_bf16,
    "fused-bf16-transposed": lambda values: fused_bf16(values, is_transposed=True),
    "fused-nvfp4": fused_nvfp4,
    "fused-nvfp4-transposed": lambda values: fused_nvfp4(values, is_transposed=True),
}


@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path: Path, layout: str, activations: str) -> None:
    rng = np.random.default_rng(3)
    inner = 288 if "mxfp4" in layout else 272  # whole blocks of 32, or of 16 alone
    shapes = ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner))
    values = {
        half: bf16(0.1 * rng.standard_normal((EXPERTS, *shape)))
        for half, shape in zip(HALVES, shapes, strict=True)
    }
    router = {f"{BLOCK}gate.weight": plain(bf16(rng.standard_normal((EXPERTS, HIDDEN))))}
    write_file(tmp_path / "model.safetensors", LAYOUTS[layout](values) | router)
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": HIDDEN, "hidden_act": "silu"}))

    x = bf16(rng.standard_normal((TOKENS, HIDDEN)))
    found = run_driver("checkpoint_layer", {"x": x}, checkpoint=tmp_path, activations=activations, out="f32")
    layer = read_layer(tmp_path)
    ids, weights = layer.route(x)
    assert_same("topk_ids", found["topk_ids"], ids)
    assert np.all(np.abs(found["topk_weights"] - weights) <= 2.0**-23 * weights)
    run = layer.layer(activations, ("dynamic-token",) * 2).run(
        x, ids, found["topk_weights"], given={"a": found["a"]}
    )
    for name, expected in {"h": run.h, "z": run.z, "y": run.y32}.items():
        assert_same(name, found[name], expected)
    assert_same_activation(found["a"], run.a)
