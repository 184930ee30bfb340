"""Well-formed files that say something wrong of a model: tensors of another type or shape, missing tensors,
experts and layers, other schemes. Each is refused as in test_hostile_files.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import (
    BF16,
    CAST,
    EXPERTS,
    FUSED,
    HIDDEN,
    INNER,
    MXFP4,
    NVFP4,
    QWEN,
    Tensor,
    Tensors,
    changed,
    zeros,
)
from command import assert_finding, assert_fine, assert_refused, layertest

PREFIX = "model.layers.0.mlp.experts."
UP = PREFIX + "1.up_proj"  # neither first nor last of anything
HALVES = ("gate_proj", "up_proj", "down_proj")
ROWS = {"gate_proj": INNER, "up_proj": INNER, "down_proj": HIDDEN}
COLS = {"gate_proj": HIDDEN, "up_proj": HIDDEN, "down_proj": INNER}


def write_nvfp4(directory: Path, tensors: Tensors = NVFP4.tensors) -> Path:
    return ck.write_single(directory, tensors, NVFP4.config)


def write_bf16(directory: Path, tensors: Tensors = BF16.tensors) -> Path:
    return ck.write_single(directory, tensors, BF16.config)


# ---- tensors of an expert ----


def check_tensor(tmp_path: Path, name: str, tensor: Tensor, *parts: str) -> None:
    """With this tensor in the place of a sound one, the command refuses and names it."""
    directory = write_nvfp4(tmp_path / "nvfp4", changed(NVFP4.tensors, name, tensor))
    file = directory / ck.SINGLE_NAME
    assert_refused(layertest(directory), file, f"'{name}'", "expected", "found", *parts)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E8M0", "BOOL"])
def test_weight_of_another_dtype(tmp_path: Path, half: str, dtype: str) -> None:
    """Codes are U8 or I8, or F8_E4M3; other bytes are not taken for codes."""
    name = f"{PREFIX}1.{half}.weight"
    check_tensor(tmp_path, name, NVFP4.tensors[name].with_dtype(dtype), dtype)


@pytest.mark.parametrize("half", HALVES)
def test_fp8_weight_beside_block_scales(tmp_path: Path, half: str) -> None:
    """An FP8 matrix has one scale, in F32: block scales beside it are what is wrong then."""
    name = f"{PREFIX}1.{half}.weight"
    tensors = changed(NVFP4.tensors, name, NVFP4.tensors[name].with_dtype("F8_E4M3"))
    result = layertest(write_nvfp4(tmp_path / "nvfp4", tensors))
    assert_refused(result, tmp_path, f"'{name}_scale'", "expected", "F32", "found", "F8_E4M3")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("dtype", "size"), [("I16", 2), ("U16", 2), ("I32", 4), ("U32", 4), ("F64", 8)])
def test_weight_of_a_wider_dtype(tmp_path: Path, half: str, dtype: str, size: int) -> None:
    name = f"{PREFIX}1.{half}.weight"
    rows, columns = NVFP4.tensors[name].shape
    tensor = replace(NVFP4.tensors[name], dtype=dtype, shape=(rows, columns // size))
    check_tensor(tmp_path, name, tensor, dtype)


@pytest.mark.parametrize("half", HALVES)
def test_weight_of_every_other_rank(tmp_path: Path, half: str) -> None:
    """Rank 0, 1 and 3, no rows, no columns."""
    name = f"{PREFIX}1.{half}.weight"
    tensor = NVFP4.tensors[name]
    rows, columns = tensor.shape
    for wrong in (
        Tensor("U8", (), b"\0"),
        tensor.with_shape(rows * columns),
        tensor.with_shape(1, rows, columns),
        tensor.with_shape(rows, columns, 1),
        Tensor("U8", (0, columns), b""),
        Tensor("U8", (rows, 0), b""),
        Tensor("U8", (0, 0), b""),
    ):
        check_tensor(tmp_path, name, wrong, f"[{', '.join(map(str, wrong.shape))}]")


@pytest.mark.parametrize("half", HALVES)
def test_weight_of_broken_blocks(tmp_path: Path, half: str) -> None:
    """Rows of 4 codes more than whole blocks of 16."""
    name = f"{PREFIX}1.{half}.weight"
    rows, columns = NVFP4.tensors[name].shape
    check_tensor(tmp_path, name, zeros("U8", rows, columns + 2), "16", f"[{rows}, {columns + 2}]")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("change", ["fewer rows", "more columns"])
def test_expert_of_another_shape(tmp_path: Path, half: str, change: str) -> None:
    """Weight and scales agree with each other, but not with the other experts."""
    rows, columns = ROWS[half], COLS[half]
    rows, columns = (rows - 16, columns) if change == "fewer rows" else (rows, columns + 32)
    tensors = changed(NVFP4.tensors, f"{PREFIX}1.{half}.weight", zeros("U8", rows, columns // 2))
    scales = zeros("F8_E4M3", rows, columns // 16)
    directory = write_nvfp4(tmp_path / "nvfp4", changed(tensors, f"{PREFIX}1.{half}.weight_scale", scales))
    which = half.removesuffix("_proj")
    found, expected = f"[{rows}, {columns}]", f"[{ROWS[half]}, {COLS[half]}]"
    assert_refused(layertest(directory), directory, f"{PREFIX}1", which, expected, found)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E5M2", "F8_E8M0"])
def test_block_scales_of_another_dtype(tmp_path: Path, half: str, dtype: str) -> None:
    """The same bytes as another 8-bit type are other scales: never guessed."""
    name = f"{PREFIX}1.{half}.weight_scale"
    rows, columns = NVFP4.tensors[name].shape
    tensor = NVFP4.tensors[name].with_dtype(dtype)
    check_tensor(tmp_path, name, tensor, f"F8_E4M3 [{rows}, {columns}]", f"{dtype} [{rows}, {columns}]")


@pytest.mark.parametrize("half", HALVES)
def test_block_scales_of_wider_dtypes(tmp_path: Path, half: str) -> None:
    name = f"{PREFIX}1.{half}.weight_scale"
    for dtype in ("BF16", "F16", "F32"):
        check_tensor(tmp_path, name, zeros(dtype, *NVFP4.tensors[name].shape), dtype)


@pytest.mark.parametrize("half", HALVES)
def test_transposed_block_scales(tmp_path: Path, half: str) -> None:
    """(K/16, N) for (N, K/16): the mistake that crashes nowhere and costs weeks. The message suspects it."""
    name = f"{PREFIX}1.{half}.weight_scale"
    rows, columns = NVFP4.tensors[name].shape
    transposed = Tensor.of(np.ascontiguousarray(NVFP4.tensors[name].array().T))
    check_tensor(tmp_path, name, transposed, f"[{rows}, {columns}]", f"[{columns}, {rows}]", "transposed")


@pytest.mark.parametrize("half", HALVES)
def test_block_scales_of_32(tmp_path: Path, half: str) -> None:
    """Half as many scales as due is how MXFP4 looks under NVFP4's names. The message suspects it."""
    name = f"{PREFIX}1.{half}.weight_scale"
    rows, columns = NVFP4.tensors[name].shape
    check_tensor(tmp_path, name, zeros("F8_E4M3", rows, columns // 2), "MXFP4", "32")


@pytest.mark.parametrize("half", HALVES)
def test_block_scales_of_every_other_shape(tmp_path: Path, half: str) -> None:
    name = f"{PREFIX}1.{half}.weight_scale"
    tensor = NVFP4.tensors[name]
    rows, columns = tensor.shape
    for wrong in (
        tensor.with_shape(rows * columns),
        tensor.with_shape(rows, columns, 1),
        tensor.with_shape(1, rows, columns),
        tensor.with_shape(rows // 2, columns * 2),
        Tensor("F8_E4M3", (), b"\0"),
        Tensor("F8_E4M3", (0, columns), b""),
        Tensor("F8_E4M3", (rows, 0), b""),
        zeros("F8_E4M3", rows, columns + 1),
        zeros("F8_E4M3", rows - 1, columns),
        zeros("F8_E4M3", 128, columns),  # padded to the swizzled layout's tile
    ):
        found = f"[{', '.join(map(str, wrong.shape))}]"
        check_tensor(tmp_path, name, wrong, f"F8_E4M3 [{rows}, {columns}]", found)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
def test_global_scales_of_another_kind(tmp_path: Path, half: str, suffix: str) -> None:
    """A global scale is one F32: no other type, no vector, not empty."""
    name = f"{PREFIX}1.{half}.{suffix}"
    for wrong in (
        zeros("F64"),
        zeros("BF16"),
        zeros("F16", 1),
        zeros("I32"),
        zeros("U8", 4),
        zeros("F32", 2),
        zeros("F32", 1, 2),
        zeros("F32", ROWS[half]),
        zeros("F32", 0),
        zeros("F32", 1, 0),
    ):
        found = f"{wrong.dtype} [{', '.join(map(str, wrong.shape))}]"
        check_tensor(tmp_path, name, wrong, "F32", found)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "-1e-38"])
@pytest.mark.parametrize("half", HALVES)
def test_weight_scale_2_that_is_no_scale(tmp_path: Path, half: str, value: str) -> None:
    name = f"{PREFIX}1.{half}.weight_scale_2"
    check_tensor(
        tmp_path, name, Tensor.of(np.array(float(value), np.float32)), "finite", value.split("e-")[0]
    )


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_2"])
def test_missing_tensor(tmp_path: Path, half: str, suffix: str) -> None:
    """The message names the tensor that is not there."""
    name = f"{PREFIX}1.{half}.{suffix}"
    directory = write_nvfp4(tmp_path / "nvfp4", changed(NVFP4.tensors, name, None))
    assert_refused(layertest(directory), directory, f"'{name}'", "expected", "found")


@pytest.mark.parametrize("half", HALVES)
def test_missing_linear(tmp_path: Path, half: str) -> None:
    """All tensors of one matrix are gone."""
    tensors = {name: tensor for name, tensor in NVFP4.tensors.items() if f"1.{half}." not in name}
    directory = write_nvfp4(tmp_path / "nvfp4", tensors)
    assert_refused(layertest(directory), directory, f"'{PREFIX}1.{half}.weight'", "expected", "found")


def test_tensor_that_would_change_the_result(tmp_path: Path) -> None:
    """The input scaling of ModelOpt's NVFP4_AWQ: not implemented, so refused, not ignored (docs/design.md, "fail
    closed").
    """
    name = f"{UP}.pre_quant_scale"
    directory = write_nvfp4(tmp_path / "nvfp4", changed(NVFP4.tensors, name, zeros("BF16", HIDDEN)))
    assert_refused(layertest(directory), name)


def test_bias_of_a_wrong_shape(tmp_path: Path) -> None:
    """Biases are read, and checked like every tensor."""
    name = f"{UP}.bias"
    directory = write_nvfp4(tmp_path / "nvfp4", changed(NVFP4.tensors, name, zeros("BF16", INNER + 1)))
    assert_refused(layertest(directory), name, f"[{INNER}]", "found")


def test_every_scale_is_damaged_at_once(tmp_path: Path) -> None:
    """Many faults still make one bearable message (its length is looked at in assert_refused)."""
    tensors = {
        name: tensor.with_dtype("U8") if name.endswith(".weight_scale") else tensor
        for name, tensor in NVFP4.tensors.items()
    }
    directory = write_nvfp4(tmp_path / "nvfp4", tensors)
    assert_refused(layertest(directory), directory, "weight_scale", "U8", "F8_E4M3")


def test_nan_block_scale_is_a_finding(tmp_path: Path) -> None:
    """0x7F among the block scales is a number, if a bad one: the run says so instead of refusing."""
    scales = NVFP4.tensors[f"{UP}.weight_scale"].array().view(np.uint8).copy()
    scales[5, 1] = 0x7F
    damaged = Tensor("F8_E4M3", scales.shape, scales.tobytes())
    directory = write_nvfp4(tmp_path / "nvfp4", changed(NVFP4.tensors, f"{UP}.weight_scale", damaged))
    assert_finding(layertest(directory), "verdict: checkpoint", "NaN")


# ---- experts and layers ----


def renumbered(tensors: Tensors, expert: int, number: str) -> Tensors:
    """One expert under another number."""
    prefix = f"{PREFIX}{expert}."
    return {name.replace(prefix, f"{PREFIX}{number}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("missing", range(EXPERTS - 1))
def test_missing_expert(tmp_path: Path, missing: int) -> None:
    """A hole among the expert numbers: the message says which expert is missing."""
    experts = ck.nvfp4_experts(count=24)
    number = 17 + missing
    prefix = f"{PREFIX}{number}."
    tensors = {
        name: tensor
        for name, tensor in ck.nvfp4_tensors(experts, QWEN).items()
        if not name.startswith(prefix)
    }
    directory = ck.write_single(tmp_path / "nvfp4", tensors, ck.config_for(experts, QWEN, ck.MODELOPT))
    result = layertest(directory)
    assert_refused(result, directory, "layer 0", "expected", "found")
    assert f" {number}" in result.stderr, f"expert {number} is not named\n{result}"


ABSURD_NUMBERS = ["999999999999999999999", "4294967299", "-1", "00", "03", "+3", "", "3e0", " 3", "0x3", "３"]


@pytest.mark.parametrize("number", ABSURD_NUMBERS, ids=repr)
@pytest.mark.parametrize("expert", [1, EXPERTS - 1], ids=["middle", "last"])
def test_absurd_expert_number(tmp_path: Path, expert: int, number: str) -> None:
    """An expert under a number that is none must not just vanish, wherever it stood."""
    directory = write_nvfp4(tmp_path / "nvfp4", renumbered(NVFP4.tensors, expert, number))
    assert_refused(layertest(directory), directory, "expected", "found")


def test_absurdly_large_expert_number(tmp_path: Path) -> None:
    """A number that is one, but far beyond the others: no list of a billion experts is made."""
    directory = write_nvfp4(tmp_path / "nvfp4", renumbered(NVFP4.tensors, 3, "999999999"))
    assert_refused(layertest(directory), directory, "999999999", "expected", "found")


def test_missing_layer(tmp_path: Path) -> None:
    """The message lists the layers that do hold experts."""
    tensors = {
        name.replace("layers.0.", f"layers.{layer}."): tensor
        for layer in (3, 7, 41)
        for name, tensor in NVFP4.tensors.items()
    }
    directory = write_nvfp4(tmp_path / "nvfp4", tensors)
    assert_refused(layertest(directory, "--layer", "5"), directory, "layer 5", "3, 7, 41")
    assert_refused(layertest(directory, "--layer", str((1 << 63) - 1)), directory, "3, 7, 41")
    assert_fine(layertest(directory, "--layer", "7"))


@pytest.mark.parametrize("number", ["99999999999999999999", "-1", ""])
def test_absurd_layer_number(tmp_path: Path, number: str) -> None:
    tensors = {name.replace("layers.0.", f"layers.{number}."): t for name, t in NVFP4.tensors.items()}
    directory = write_nvfp4(tmp_path / "nvfp4", tensors)
    assert_refused(layertest(directory), directory, "layer 0", "expected", "found")


def test_no_tensors(tmp_path: Path) -> None:
    directory = write_nvfp4(tmp_path / "nvfp4", {})
    assert_refused(layertest(directory), directory, "layer 0", "expected", "found")


# ---- other schemes ----


COMPRESSED = ck.compressed_model(ck.nvfp4_experts(), QWEN)
PACKED = f"{UP}.weight_packed"
PACKED_DAMAGE: dict[str, tuple[str, Tensor | None, str]] = {
    "no-scales": (f"{UP}.weight_scale", None, f"{UP}.weight_scale"),
    "no-global": (f"{UP}.weight_global_scale", None, f"{UP}.weight_global_scale"),
    "global-0": (f"{UP}.weight_global_scale", zeros("F32", 1), "divisor above 0"),
    "global-nan": (f"{UP}.weight_global_scale", Tensor.of(np.full(1, np.nan, np.float32)), "divisor above 0"),
    "both-weights": (f"{UP}.weight", BF16.tensors[f"{UP}.weight"], "both"),
    "both-globals": (f"{UP}.weight_scale_2", zeros("F32"), "not read"),
    "both-input-scales": (f"{UP}.input_scale", zeros("F32"), "both"),
    "dense": (PACKED, BF16.tensors[f"{UP}.weight"], "codes"),
    "scales-e8m0": (f"{UP}.weight_scale", zeros("F8_E8M0", INNER, HIDDEN // 16), "F8_E4M3"),
    "scales-transposed": (f"{UP}.weight_scale", zeros("F8_E4M3", HIDDEN // 16, INNER), "transposed"),
    "scales-of-32": (f"{UP}.weight_scale", zeros("F8_E4M3", INNER, HIDDEN // 32), "--scheme mxfp4"),
    "zero-point": (f"{UP}.weight_zero_point", zeros("I8", INNER, HIDDEN // 16), "not read"),
    "rank-3": (PACKED, zeros("U8", 1, INNER, HIDDEN // 2), "matrix"),
}


@pytest.mark.parametrize(("name", "tensor", "part"), PACKED_DAMAGE.values(), ids=PACKED_DAMAGE.keys())
def test_damaged_compressed_tensors(tmp_path: Path, name: str, tensor: Tensor | None, part: str) -> None:
    tensors = changed(COMPRESSED.tensors, name, tensor)
    directory = ck.write_single(tmp_path / "m", tensors, COMPRESSED.config)
    assert_refused(layertest(directory), directory, part, "expected", "found")


def test_scales_that_would_be_left_out(tmp_path: Path) -> None:
    """A global scale beside a matrix that has none of its kind: it was meant for something."""
    tensors = changed(NVFP4.tensors, f"{UP}.weight", BF16.tensors[f"{UP}.weight"])
    for suffix in ("weight_scale", "weight_scale_2"):
        rest = {name: t for name, t in tensors.items() if name != f"{UP}.{suffix}"}
        directory = write_nvfp4(tmp_path / suffix, rest)
        assert_refused(layertest(directory), directory, f"{UP}.weight_scale", "BF16", "not read")


@pytest.mark.parametrize("model", [MXFP4, BF16, FUSED], ids=lambda model: model.scheme)
def test_original_given_as_nvfp4(tmp_path: Path, model: ck.Model) -> None:
    """The two paths are easily swapped; the message tells the remedy."""
    directory = ck.write_single(tmp_path / "m", model.tensors, model.config)
    assert_refused(
        layertest(directory), "--nvfp4", directory, "expected", "found", model.scheme, "--original"
    )


FUSED_GATE_UP, FUSED_DOWN = PREFIX + "gate_up_proj", PREFIX + "down_proj"
FUSED_DAMAGE: dict[str, tuple[str, Tensor | None, str]] = {
    "no-down": (FUSED_DOWN, None, FUSED_DOWN),
    "no-gate-up": (FUSED_GATE_UP, None, "expected"),
    "gate-up-rank-2": (FUSED_GATE_UP, zeros("BF16", EXPERTS * 2 * INNER, HIDDEN), FUSED_GATE_UP),
    "gate-up-rank-4": (FUSED_GATE_UP, zeros("BF16", EXPERTS, 2, INNER, HIDDEN), FUSED_GATE_UP),
    "gate-up-no-experts": (FUSED_GATE_UP, zeros("BF16", 0, 2 * INNER, HIDDEN), FUSED_GATE_UP),
    "gate-up-odd-rows": (FUSED_GATE_UP, zeros("BF16", EXPERTS, 2 * INNER - 1, HIDDEN), f"{2 * INNER - 1}, "),
    "gate-up-fp8": (FUSED_GATE_UP, zeros("F8_E4M3", EXPERTS, 2 * INNER, HIDDEN), FUSED_GATE_UP),
    "gate-up-transposed-nvfp4": (FUSED_GATE_UP, zeros("U8", EXPERTS, HIDDEN // 2, 2 * INNER), FUSED_GATE_UP),
    "down-rank-2": (FUSED_DOWN, zeros("BF16", EXPERTS * HIDDEN, INNER), FUSED_DOWN),
    "down-transposed": (FUSED_DOWN, zeros("BF16", EXPERTS, INNER, HIDDEN), FUSED_DOWN),
    "down-fewer-experts": (FUSED_DOWN, zeros("BF16", EXPERTS - 1, HIDDEN, INNER), FUSED_DOWN),
    "down-of-another-inner": (FUSED_DOWN, zeros("BF16", EXPERTS, HIDDEN, 2 * INNER), FUSED_DOWN),
    "down-u8": (FUSED_DOWN, zeros("U8", EXPERTS, HIDDEN, INNER), FUSED_DOWN),
}


@pytest.mark.parametrize(("name", "tensor", "part"), FUSED_DAMAGE.values(), ids=FUSED_DAMAGE.keys())
def test_damaged_fused_original(tmp_path: Path, name: str, tensor: Tensor | None, part: str) -> None:
    original = ck.write_single(tmp_path / "original", changed(FUSED.tensors, name, tensor), FUSED.config)
    nvfp4 = write_nvfp4(tmp_path / "nvfp4")
    assert_refused(layertest(nvfp4, "--original", original), original, part, "expected", "found")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("dtype", "change"), [("F64", 0), ("F8_E4M3", 0), ("I32", 0), ("BF16", 1), ("BF16", -1)]
)
def test_damaged_bf16_original(tmp_path: Path, half: str, dtype: str, change: int) -> None:
    """Another type, or a row more or less than the other matrices have."""
    name = f"{PREFIX}1.{half}.weight"
    rows, columns = BF16.tensors[name].shape
    size = {"F64": 8, "I32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    tensor = Tensor(dtype, (rows + change, columns), bytes((rows + change) * columns * size))
    original = write_bf16(tmp_path / "original", changed(BF16.tensors, name, tensor))
    result = layertest(write_nvfp4(tmp_path / "nvfp4"), "--original", original)
    assert_refused(result, original, f"{PREFIX}1", "expected", "found", f"[{rows + change}, {columns}]")


OTHER_ORIGINALS = {
    "hidden": ck.dense_model(ck.nvfp4_experts(hidden=HIDDEN * 2), QWEN, "BF16"),
    "inner": ck.dense_model(ck.nvfp4_experts(inner=INNER // 2), QWEN, "BF16"),
    "experts": ck.dense_model(ck.nvfp4_experts(count=EXPERTS + 1), QWEN, "BF16"),
    "inner-fused": ck.fused_model(ck.nvfp4_experts(inner=INNER // 2), QWEN, "BF16"),
}


@pytest.mark.parametrize("model", OTHER_ORIGINALS.values(), ids=OTHER_ORIGINALS.keys())
def test_original_of_another_model(tmp_path: Path, model: ck.Model) -> None:
    """An original of another shape: the message names it, and both shapes."""
    original = ck.write_single(tmp_path / "original", model.tensors, model.config)
    result = layertest(write_nvfp4(tmp_path / "nvfp4"), "--original", original)
    assert_refused(result, original, "expected", "found")


# ---- MXFP4 originals ----

W3 = "layers.0.ffn.experts.1.w3"


def check_mxfp4(tmp_path: Path, name: str, tensor: Tensor | None, *parts: str) -> None:
    """The original with one tensor replaced is refused; the message names file and tensor."""
    nvfp4 = ck.write_single(tmp_path / "nvfp4", CAST.tensors, CAST.config)
    original = ck.write_single(tmp_path / "original", changed(MXFP4.tensors, name, tensor), MXFP4.config)
    file = original / ck.SINGLE_NAME if tensor is not None else original
    assert_refused(layertest(nvfp4, "--original", original), file, f"'{name}'", "expected", "found", *parts)


@pytest.mark.parametrize("half", ["w1", "w2", "w3"])
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_mxfp4_scale_nan(tmp_path: Path, half: str, position: int) -> None:
    """0xFF is e8m0's NaN: no cast is exact, and no weight is right. Of thousands of tensors, which one?"""
    name = f"layers.0.ffn.experts.1.{half}.scale"
    scales = MXFP4.tensors[name].array().view(np.uint8).copy()
    scales.flat[position] = 0xFF
    row = 0 if position == 0 else scales.shape[0] - 1
    damaged = Tensor("F8_E8M0", scales.shape, scales.tobytes())
    check_mxfp4(tmp_path, name, damaged, "0xFF", f"row {row}")


@pytest.mark.parametrize("half", ["w1", "w2", "w3"])
def test_mxfp4_scales_of_another_kind(tmp_path: Path, half: str) -> None:
    """Other types and shapes, among them the transposed one and one block of 16 a scale."""
    name = f"layers.0.ffn.experts.1.{half}.scale"
    tensor = MXFP4.tensors[name]
    rows, columns = tensor.shape
    expected = f"F8_E8M0 [{rows}, {columns}]"
    for wrong, hint in (
        (tensor.with_dtype("U8"), "U8"),
        (tensor.with_dtype("F8_E4M3"), "F8_E4M3"),
        (zeros("F32", rows, columns), "F32"),
        (tensor.with_shape(rows * columns), f"[{rows * columns}]"),
        (tensor.with_shape(rows, columns, 1), f"[{rows}, {columns}, 1]"),
        (tensor.with_shape(columns, rows), "transposed"),
        (zeros("F8_E8M0", rows, columns * 2), "NVFP4"),
        (Tensor("F8_E8M0", (0, columns), b""), f"[0, {columns}]"),
    ):
        check_mxfp4(tmp_path, name, wrong, expected, hint)


def test_mxfp4_without_scales(tmp_path: Path) -> None:
    nvfp4 = ck.write_single(tmp_path / "nvfp4", CAST.tensors, CAST.config)
    tensors = changed(MXFP4.tensors, f"{W3}.scale", None)
    original = ck.write_single(tmp_path / "original", tensors, MXFP4.config)
    assert_refused(layertest(nvfp4, "--original", original), original, f"'{W3}.scale'", "expected", "found")


def test_mxfp4_without_weight(tmp_path: Path) -> None:
    check_mxfp4(tmp_path, f"{W3}.weight", None)


def test_mxfp4_of_broken_blocks(tmp_path: Path) -> None:
    """Rows of one and a half blocks of 32."""
    rows, columns = MXFP4.tensors[f"{W3}.weight"].shape
    check_mxfp4(tmp_path, f"{W3}.weight", zeros("I8", rows, columns - 8), "32")
