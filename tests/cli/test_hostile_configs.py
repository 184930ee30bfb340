"""What lies beside the weights: indexes that lie, absurd configs, and inputs that do not fit. Each is refused
as in test_hostile_files.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import (
    BF16,
    EXPERTS,
    HIDDEN,
    NVFP4,
    Tensor,
)
from command import assert_fine, assert_refused, layertest

PREFIX = "model.layers.0.mlp.experts."
UP = PREFIX + "1.up_proj"  # neither first nor last of anything


def write_nvfp4(directory: Path) -> Path:
    return ck.write_model(directory, NVFP4)


# ---- the index ----

Index = dict[str, Any]
SHARD_0, SHARD_1 = ck.shard_name(0, 2), ck.shard_name(1, 2)


def check_index(tmp_path: Path, change: Callable[[Path, Index], None], *parts: str) -> None:
    """Shards whose index, or whose files, were changed."""
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config)
    file = directory / ck.INDEX_NAME
    index = json.loads(file.read_text())
    change(directory, index)
    ck.write_json(file, index)
    assert_refused(layertest(directory), directory, "expected", "found", *parts)


def test_missing_shard(tmp_path: Path) -> None:
    check_index(tmp_path, lambda directory, index: (directory / SHARD_1).unlink(), ck.INDEX_NAME, SHARD_1)


ESCAPES = ["../{}", "{absolute}/{}", "sub/{}", "./{}", "sub/../{}", "..", ".", "", "/", "{}/", "sub/", "//{}"]


@pytest.mark.parametrize("template", ESCAPES)
def test_shard_outside_the_directory(tmp_path: Path, template: str) -> None:
    """Shards lie beside their index; whatever else a path may mean, it is not followed, even where it leads
    to a sound shard.
    """

    def change(directory: Path, index: Index) -> None:
        (directory / "sub").mkdir()
        for place in (directory / "sub", directory.parent):
            (place / SHARD_1).write_bytes((directory / SHARD_1).read_bytes())
        path = template.format(SHARD_1, absolute=directory)
        for name, shard in index["weight_map"].items():
            if shard == SHARD_1:
                index["weight_map"][name] = path

    check_index(tmp_path, change)


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    def change(directory: Path, index: Index) -> None:
        other = {SHARD_0: SHARD_1, SHARD_1: SHARD_0}
        index["weight_map"][f"{UP}.weight"] = other[index["weight_map"][f"{UP}.weight"]]

    check_index(tmp_path, change, ck.INDEX_NAME, f"'{UP}.weight'", SHARD_0, SHARD_1)


def test_tensor_in_no_shard(tmp_path: Path) -> None:
    def change(directory: Path, index: Index) -> None:
        index["weight_map"]["model.norm.weight"] = SHARD_1

    check_index(tmp_path, change, ck.INDEX_NAME, "'model.norm.weight'", SHARD_1)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which of the two would count? Neither: the message names both files."""

    def change(directory: Path, index: Index) -> None:
        tensors = list(NVFP4.tensors.items())
        shard = dict(tensors[1::2]) | dict(tensors[:1])
        (directory / SHARD_1).write_bytes(ck.valid_bytes(shard))

    check_index(tmp_path, change, SHARD_0, SHARD_1, f"'{next(iter(NVFP4.tensors))}'")


@pytest.mark.parametrize("value", ["none", None, [], "x", 7, True, [["a", "b"]]], ids=repr)
def test_weight_map_that_is_no_object(tmp_path: Path, value: Any) -> None:
    def change(directory: Path, index: Index) -> None:
        del index["weight_map"]
        if value != "none":
            index["weight_map"] = value

    check_index(tmp_path, change, ck.INDEX_NAME, "weight_map")


@pytest.mark.parametrize("value", [None, 7, 1.5, True, [], {}, [SHARD_0]], ids=repr)
def test_weight_map_of_no_strings(tmp_path: Path, value: Any) -> None:
    def change(directory: Path, index: Index) -> None:
        index["weight_map"][f"{UP}.weight"] = value

    check_index(tmp_path, change, ck.INDEX_NAME, "weight_map", f"'{UP}.weight'")


def test_weight_map_with_a_duplicate_key(tmp_path: Path) -> None:
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config)
    file = directory / ck.INDEX_NAME
    file.write_text(file.read_text().replace('"weight_map": {', f'"weight_map": {{"{UP}.weight": "x",'))
    assert_refused(layertest(directory), file, f"'{UP}.weight'", "expected", "found")


def test_index_that_names_itself(tmp_path: Path) -> None:
    def change(directory: Path, index: Index) -> None:
        index["weight_map"][f"{UP}.weight"] = ck.INDEX_NAME

    check_index(tmp_path, change, ck.INDEX_NAME)


def test_empty_weight_map(tmp_path: Path) -> None:
    check_index(tmp_path, lambda directory, index: index["weight_map"].clear(), "layer 0")


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = layertest(tmp_path / "model")
    assert_refused(result, tmp_path / "model", ck.INDEX_NAME, ck.SINGLE_NAME, "expected", "found")


# ---- config.json ----


def check_config(tmp_path: Path, changes: ck.Config, *parts: str) -> None:
    """Either checkpoint with another config is refused."""
    nvfp4, original = tmp_path / "nvfp4", tmp_path / "original"
    for damaged in (nvfp4, original):
        write_nvfp4(nvfp4)
        ck.write_model(original, BF16)
        config = NVFP4.config if damaged == nvfp4 else BF16.config
        ck.write_json(damaged / "config.json", config | changes)
        result = layertest(nvfp4, "--original", original)
        assert_refused(result, damaged / "config.json", "expected", "found", *parts)


COUNTS = ["hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_hidden_layers"]
NO_COUNTS = [-1, 1.5, 64.0, 1e99, 1 << 31, 1 << 63, 1 << 64, "64", "", True, [64], {}]


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("key", COUNTS)
def test_count_that_is_none(tmp_path: Path, key: str, value: Any) -> None:
    """Counts in config.json are whole numbers from 0 below 2^31; the message names the key."""
    check_config(tmp_path, {key: value}, key)


@pytest.mark.parametrize("value", [-1, 0, -0.0, "10", "", True, [10], {}, 1e300, 1e-60], ids=repr)
def test_swiglu_limit_that_is_none(tmp_path: Path, value: Any) -> None:
    """The clamp of the activation is a positive number that float32 holds: 1e300 is infinite there, and means
    no clamp; 1e-60 is zero.
    """
    check_config(tmp_path, {"swiglu_limit": value}, "swiglu_limit")


def test_huge_counts_cost_nothing(tmp_path: Path) -> None:
    """Absurd but well-formed counts: tensors are the truth, the config's lies noted, no memory taken."""
    most = (1 << 31) - 1
    config = NVFP4.config | dict.fromkeys(COUNTS, most)
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, config)
    result = layertest(directory)
    assert_fine(result)
    for what in ("hidden size", "intermediate size", "experts"):
        assert f"{what} {most}" in result.stdout, str(result)


@pytest.mark.parametrize("top_k", [0, None])
def test_no_top_k(tmp_path: Path, top_k: int | None) -> None:
    """Without experts per token, and without a routing in --input, nothing can be routed; remedy: --input."""
    directory = ck.write_single(
        tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config | {"num_experts_per_tok": top_k}
    )
    found = "none" if top_k is None else "0"
    assert_refused(layertest(directory), directory, "num_experts_per_tok", f"found {found}", "--input")
    assert_fine(layertest(directory, "--input", ck.write_inputs(tmp_path / "inputs.safetensors")))


def test_unknown_activation(tmp_path: Path) -> None:
    """Experts that do not use SiLU would be computed wrongly: refused, not ignored ("fail closed")."""
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config | {"hidden_act": "relu2"})
    assert_refused(layertest(directory), directory, "hidden_act", "relu2")


# ---- --input ----

X, IDS, WEIGHTS = (ck.inputs()[name].array() for name in ("x", "topk_ids", "topk_weights"))
TOKENS, TOP_K = IDS.shape


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy[3, 1] = value
    return copy


BAD_INPUTS: dict[str, tuple[str, np.ndarray, str]] = {
    "x-u8": ("x", X.astype(np.uint8), f"[{TOKENS}, {HIDDEN}]"),
    "x-f64": ("x", X.astype(np.float64), "F64"),
    "x-i32": ("x", X.astype(np.int32), "I32"),
    "x-wide": ("x", np.zeros((TOKENS, HIDDEN + 1), np.float32), f"[T, {HIDDEN}]"),
    "x-narrow": ("x", np.zeros((TOKENS, 1), np.float32), f"[T, {HIDDEN}]"),
    "x-transposed": ("x", np.zeros((HIDDEN, TOKENS), np.float32), f"[{HIDDEN}, {TOKENS}]"),
    "x-rank-1": ("x", X.reshape(-1), f"[{TOKENS * HIDDEN}]"),
    "x-rank-3": ("x", X[None], f"[1, {TOKENS}, {HIDDEN}]"),
    "x-no-columns": ("x", np.zeros((TOKENS, 0), np.float32), f"[{TOKENS}, 0]"),
    "ids-u8": ("topk_ids", IDS.astype(np.uint8), "I32 or I64"),
    "ids-f32": ("topk_ids", IDS.astype(np.float32), "I32 or I64"),
    "ids-more-tokens": ("topk_ids", np.zeros((TOKENS + 1, TOP_K), np.int32), f"[{TOKENS + 1}, {TOP_K}]"),
    "ids-rank-1": ("topk_ids", IDS.reshape(-1), f"[{TOKENS * TOP_K}]"),
    "ids-rank-3": ("topk_ids", IDS[:, :, None], f"[{TOKENS}, {TOP_K}, 1]"),
    "ids-fewer-tokens": ("topk_ids", IDS[1:], f"[{TOKENS - 1}, {TOP_K}]"),
    "ids-more-choices": ("topk_ids", np.zeros((TOKENS, TOP_K + 1), np.int32), f"[{TOKENS}, {TOP_K + 1}]"),
    "ids-no-choices": ("topk_ids", np.zeros((TOKENS, 0), np.int32), f"[{TOKENS}, 0]"),
    "ids-number-of-experts": ("topk_ids", with_value(IDS, EXPERTS), f"found {EXPERTS}"),
    "ids-minus-two": ("topk_ids", with_value(IDS, -2), "found -2"),
    "ids-least": ("topk_ids", with_value(IDS, -(1 << 31)), "found -2147483648"),
    "ids-2^40": ("topk_ids", with_value(IDS.astype(np.int64), 1 << 40), f"found {1 << 40}"),
    "ids-2^32": ("topk_ids", with_value(IDS.astype(np.int64), 1 << 32), f"found {1 << 32}"),
    "ids-least-64": ("topk_ids", with_value(IDS.astype(np.int64), -(1 << 63)), f"found {-(1 << 63)}"),
    "weights-f64": ("topk_weights", WEIGHTS.astype(np.float64), "F64"),
    "weights-f16": ("topk_weights", WEIGHTS.astype(np.float16), "F16"),
    "weights-rank-1": ("topk_weights", WEIGHTS.reshape(-1), f"[{TOKENS * TOP_K}]"),
    "weights-fewer-tokens": ("topk_weights", WEIGHTS[1:], f"[{TOKENS - 1}, {TOP_K}]"),
    "weights-more-choices": ("topk_weights", np.zeros((TOKENS, 9), np.float32), f"[{TOKENS}, 9]"),
}


@pytest.mark.parametrize(("name", "array", "part"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input(tmp_path: Path, name: str, array: np.ndarray, part: str) -> None:
    """Each of the three tensors with another type, another shape, or ids that name no expert."""
    file = ck.write_inputs(tmp_path / "i.safetensors", ck.inputs() | {name: Tensor.of(array)})
    result = layertest(write_nvfp4(tmp_path / "nvfp4"), "--input", file)
    assert_refused(result, file, "topk_" if name.startswith("topk_") else "'x'", "expected", "found", part)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "topk_weights"])
def test_input_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    """NaN and infinity in the input are the input's fault; a run would blame the checkpoint for them."""
    array = with_value(X if name == "x" else WEIGHTS, value)
    file = ck.write_inputs(tmp_path / "i.safetensors", ck.inputs() | {name: Tensor.of(array)})
    assert_refused(
        layertest(write_nvfp4(tmp_path / "nvfp4"), "--input", file), file, name, "expected", "found"
    )


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("x", "topk_ids"), ("topk_ids", "topk_weights")),
        (("x", "topk_weights"), ("topk_ids", "topk_weights")),
        (("topk_ids", "topk_weights"), ("'x'",)),
        ((), ("'x'",)),
    ],
    ids=str,
)
def test_input_without_tensors(tmp_path: Path, names: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """x is due; topk_ids and topk_weights come together or not at all."""
    tensors = {name: tensor for name, tensor in ck.inputs().items() if name in names}
    file = ck.write_inputs(tmp_path / "i.safetensors", tensors)
    result = layertest(write_nvfp4(tmp_path / "nvfp4"), "--input", file)
    assert_refused(result, file, "expected", "found", *parts)
