"""Quantizers and layouts of scales against numpy and ml_dtypes, and the arrays that they take."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fourfold
from oracle import dequantize_mxfp4, dequantize_nvfp4, rel_l2, swizzle

RANDOM = np.random.default_rng(5)


def normal(rows: int, cols: int, dtype: Any = np.float32) -> Any:
    return RANDOM.normal(size=(rows, cols)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rule", ["amax", "four-over-six", "mse"])
def test_nvfp4_round_trip(dtype: Any, rule: Any) -> None:
    x = normal(7, 64, dtype)
    q = fourfold.quantize(x, rule=rule)
    assert q.shape == (7, 64) and q.codes.shape == (7, 32) and q.scales.shape == (7, 4)
    due = dequantize_nvfp4(q.codes, q.scales, q.global_scale)
    found = fourfold.dequantize(q)
    np.testing.assert_array_equal(found, due)
    assert 0.05 < rel_l2(found, x.astype(np.float32)) < 0.12


def test_nvfp4_by_hand() -> None:
    """A block whose largest value is 6 has scale 1; values between codes go to the even one."""
    x = np.array([[6, -6, 0.5, 0.25, 0.75, 1.25, 2.5, 5, 0, 1, 1.5, 2, 3, 4, -0.5, -0.25]], np.float32)
    q = fourfold.quantize(x, global_scale=1.0)
    assert q.scales.tolist() == [[0x38]]
    due = [[6, -6, 0.5, 0, 1, 1, 2, 4, 0, 1, 1.5, 2, 3, 4, -0.5, -0.0]]
    np.testing.assert_array_equal(fourfold.dequantize(q), np.array(due, np.float32))


def test_mxfp4() -> None:
    x = normal(5, 96)
    q = fourfold.quantize(x, "mxfp4")
    assert q.scales.shape == (5, 3) and q.global_scale == 1.0
    np.testing.assert_array_equal(fourfold.dequantize(q), dequantize_mxfp4(q.codes, q.scales))
    with pytest.raises(fourfold.InvalidArgumentError, match="neither a rule nor a global scale"):
        fourfold.quantize(x, "mxfp4", rule="mse")


def test_scales_of_other_types_and_divisors() -> None:
    q = fourfold.quantize(normal(4, 32))
    same = fourfold.QuantizedMatrix("nvfp4", q.codes, q.scales.view(ml_dtypes.float8_e4m3fn), q.global_scale)
    np.testing.assert_array_equal(fourfold.dequantize(same), fourfold.dequantize(q))
    divided = fourfold.QuantizedMatrix("nvfp4", q.codes, q.scales, 4.0, divides=True)
    np.testing.assert_array_equal(fourfold.dequantize(divided), dequantize_nvfp4(q.codes, q.scales, 0.25))
    with pytest.raises(fourfold.InvalidArgumentError, match="two e2m1 codes a byte"):
        fourfold.dequantize(fourfold.QuantizedMatrix("nvfp4", np.zeros((4, 32), ml_dtypes.float4_e2m1fn), q.scales))


@pytest.mark.parametrize("shape", [(1, 1), (127, 3), (128, 4), (129, 5), (300, 17)])
def test_swizzled_scales(shape: tuple[int, int]) -> None:
    scales = RANDOM.integers(0, 256, shape).astype(np.uint8)
    swizzled = fourfold.swizzle_scales(scales)
    np.testing.assert_array_equal(swizzled, swizzle(scales))
    np.testing.assert_array_equal(fourfold.unswizzle_scales(swizzled, *shape), scales)


def test_swizzled_groups() -> None:
    scales = RANDOM.integers(0, 256, (200, 6)).astype(np.uint8)
    found = fourfold.swizzle_scales(scales, group_offsets=[0, 3, 3, 200])
    np.testing.assert_array_equal(found, np.concatenate([swizzle(scales[:3]), swizzle(scales[3:])]))


def test_swizzled_weights_are_the_same_weights() -> None:
    q = fourfold.quantize(normal(40, 80))
    swizzled = fourfold.QuantizedMatrix(
        "nvfp4", q.codes, fourfold.swizzle_scales(q.scales), q.global_scale, "swizzled"
    )
    np.testing.assert_array_equal(fourfold.dequantize(swizzled), fourfold.dequantize(q))


def test_fp8_matrix() -> None:
    codes = normal(130, 140).astype(ml_dtypes.float8_e4m3fn)
    scales = np.array([[1.0, 2.0], [0.5, 4.0]], np.float32)
    due = codes.astype(np.float32) * np.repeat(np.repeat(scales, 128, 0), 128, 1)[:130, :140]
    np.testing.assert_array_equal(fourfold.dequantize(fourfold.Fp8Matrix(codes, scales)), due)


@pytest.mark.parametrize("policy", ["dynamic-token", "dynamic-tensor"])
def test_staged_nvfp4(policy: Any) -> None:
    x = normal(6, 48, ml_dtypes.bfloat16)
    staged = fourfold.stage(x, policy=policy)
    amax = np.abs(x.astype(np.float32)).max(axis=1 if policy == "dynamic-token" else None)
    np.testing.assert_allclose(staged.row_scales, np.broadcast_to(amax / 2688, 6), rtol=1e-6)
    due = np.stack([
        dequantize_nvfp4(staged.codes[i : i + 1], staged.scales[i : i + 1], staged.row_scales[i])[0] for i in range(6)
    ])
    assert rel_l2(due, x) < 0.12
    twice = fourfold.stage(x, "nvfp4x2", policy=policy)
    np.testing.assert_array_equal(twice.codes, staged.codes)
    assert twice.residual_codes.shape == (6, 24)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 16), np.float32), r"expected \[rows, cols\]"),
        (np.zeros((2, 15), np.float32), "16"),
        (np.zeros((2, 16), np.int32), "int32"),
        (np.zeros((2, 32), np.float32)[:, ::2], "side by side"),
        ([[1.0] * 16], "expected an array"),
    ],
)
def test_what_is_refused(x: Any, message: str) -> None:
    with pytest.raises(fourfold.InvalidArgumentError, match=message):
        fourfold.quantize(x)


def test_rows_need_not_be_side_by_side() -> None:
    """A stride between rows is a layout like another: nothing is copied."""
    wide = normal(8, 64)
    np.testing.assert_array_equal(fourfold.quantize(wide[::2, :32]).codes, fourfold.quantize(wide[::2, :32].copy()).codes)


def test_errors_are_also_pythons() -> None:
    assert issubclass(fourfold.InvalidArgumentError, ValueError) and issubclass(fourfold.NotFoundError, LookupError)
    with pytest.raises(ValueError, match="rule"):
        fourfold.quantize(np.zeros((1, 16), np.float32), rule="best")  # type: ignore[arg-type]
