"""The driver's dense and grouped multiplications against sequential accumulation, bit for bit."""

import numpy as np
import pytest

import nvfp4_oracle as oracle
from cases import random_nvfp4, scalar
from compare import assert_all_same
from tensor_file import run_driver

ACCUMULATE: dict[str, type[np.floating]] = {"f32": np.float32, "f64": np.float64}
LAYOUTS = pytest.mark.parametrize("layout", ["row_major", "swizzled"])
ARITHMETIC = pytest.mark.parametrize("accumulate, out", [("f32", "f32"), ("f32", "bf16"), ("f64", "f32")])


def rounded(result: np.ndarray, out: str) -> np.ndarray:
    """float32 results in the type asked for."""
    return oracle.encode_bf16(result) if out == "bf16" else result


@LAYOUTS
@ARITHMETIC
@pytest.mark.parametrize(
    "m, n, k", [(1, 8, 16), (37, 24, 80), (130, 40, 64), (33, 136, 144), (129, 129, 208)]
)
def test_gemm(m: int, n: int, k: int, layout: str, accumulate: str, out: str) -> None:
    rng = np.random.default_rng(m * n * k)
    a_codes, a_scales = random_nvfp4(rng, m, k)
    b_codes, b_scales = random_nvfp4(rng, n, k)
    alpha = np.float32(rng.uniform(1e-5, 1e-3))
    a, b = oracle.decode_nvfp4(a_codes, a_scales), oracle.decode_nvfp4(b_codes, b_scales)
    expected = rounded(oracle.gemm([a], b, alpha, ACCUMULATE[accumulate]), out)
    inputs = {
        "a_codes": a_codes,
        "a_scales": a_scales,
        "b_codes": b_codes,
        "b_scales": b_scales,
        "alpha": scalar(alpha),
    }
    result = run_driver("gemm", inputs, layout=layout, accumulate=accumulate, out=out)
    assert_all_same(result, {"d": expected})


@LAYOUTS
@ARITHMETIC
@pytest.mark.parametrize("sizes", [[5], [0, 33, 0, 17, 1], [128, 0, 130], [0, 0], [3, 40, 0]], ids=str)
@pytest.mark.parametrize("n, k", [(24, 80), (136, 48)])
def test_grouped_gemm(sizes: list[int], n: int, k: int, layout: str, accumulate: str, out: str) -> None:
    experts, m = len(sizes), sum(sizes)
    rng = np.random.default_rng(m * n * k)
    a_codes, a_scales = random_nvfp4(rng, m, k)
    b_codes, b_scales = random_nvfp4(rng, experts, n, k)
    alphas = rng.uniform(1e-5, 1e-3, experts).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    a, b = oracle.decode_nvfp4(a_codes, a_scales), oracle.decode_nvfp4(b_codes, b_scales)
    groups = [
        oracle.gemm([a[offsets[e] : offsets[e + 1]]], b[e], alphas[e], ACCUMULATE[accumulate])
        for e in range(experts)
    ]
    inputs = {
        "a_codes": a_codes,
        "a_scales": a_scales,
        "group_offsets": offsets,
        "b_codes": b_codes,
        "b_scales": b_scales,
        "alphas": alphas,
    }
    result = run_driver("grouped_gemm", inputs, layout=layout, accumulate=accumulate, out=out)
    assert_all_same(result, {"d": rounded(np.concatenate(groups), out)})


@LAYOUTS
def test_nan_scales_reach_their_row_and_column_alone(layout: str) -> None:
    rng = np.random.default_rng(1)
    a_codes, a_scales = random_nvfp4(rng, 20, 80)
    b_codes, b_scales = random_nvfp4(rng, 24, 80)
    a_scales[7, 4] = b_scales[11, 0] = oracle.E4M3_NAN
    a, b = oracle.decode_nvfp4(a_codes, a_scales), oracle.decode_nvfp4(b_codes, b_scales)
    expected = oracle.gemm([a], b, np.float32(1))
    reached = np.zeros((20, 24), bool)
    reached[7], reached[:, 11] = True, True
    assert np.array_equal(np.isnan(expected), reached)
    inputs = {
        "a_codes": a_codes,
        "a_scales": a_scales,
        "b_codes": b_codes,
        "b_scales": b_scales,
        "alpha": scalar(1),
    }
    result = run_driver("gemm", inputs, layout=layout, accumulate="f32", out="f32")
    assert_all_same(result, {"d": expected})
