"""The driver's quantizers (NVFP4 and its residual, MXFP4, e4m3 by row) against the oracle's, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from cases import scalar
from compare import assert_all_same
from tensor_file import run_driver

ROWS, K = 24, 208
E2M1_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)


def gaussian() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((ROWS, K), np.float32)


def heavy_tailed() -> np.ndarray:
    return np.random.default_rng(2).standard_t(2, (ROWS, K)).astype(np.float32)


def constant() -> np.ndarray:
    return (
        np.full((ROWS, K), 0.7, np.float32) * np.where(np.arange(ROWS) % 2, 1, -1).astype(np.float32)[:, None]
    )


def zeros() -> np.ndarray:
    x = np.zeros((ROWS, K), np.float32)
    x[:, ::3] = -0.0
    return x


def zero_blocks_among_others() -> np.ndarray:
    x = gaussian()
    x[:, 32:48] = 0
    x[3:5] = -0.0
    x[7, :16] = np.where(np.arange(16) == 5, 1e-30, 0)
    return x


def not_finite() -> np.ndarray:
    x = gaussian()
    x[0, 3], x[0, 40], x[5, 17], x[9] = np.nan, np.inf, -np.inf, np.nan
    x[11, 64:96] = np.inf
    return x


def infinite_only() -> np.ndarray:
    x = gaussian()
    x[0, 40], x[5, 17] = np.inf, -np.inf
    return x


def tiny() -> np.ndarray:
    """Blocks down to the smallest subnormal, where the dynamic global scale and the reciprocal leave the
    range.
    """
    return gaussian() * np.ldexp(np.float32(1), -np.linspace(100, 149, ROWS).astype(np.int32))[:, None]


def huge() -> np.ndarray:
    return np.clip(gaussian() * np.float32(3e38), np.float32(-3.4e38), np.float32(3.4e38))


def mixed_magnitudes() -> np.ndarray:
    """Every block of another size, within a row and from row to row."""
    exponents = np.random.default_rng(3).integers(-30, 30, (ROWS, K // 16, 1))
    return np.ldexp(gaussian().reshape(ROWS, K // 16, 16), exponents).reshape(ROWS, K)


def mixed_within_blocks() -> np.ndarray:
    return np.ldexp(gaussian(), np.random.default_rng(4).integers(-12, 12, (ROWS, K)))


def code_ties() -> np.ndarray:
    """Blocks with amax 6 x 2^j: under a power-of-two global the scale is 2^j, and r * x is exactly a tie."""
    block = np.concatenate([[6], E2M1_TIES, [-6], -E2M1_TIES]).astype(np.float32)
    return np.ldexp(np.tile(block, (ROWS, K // 16)), np.arange(ROWS)[:, None] % 9 - 4)


def scale_ties() -> np.ndarray:
    """Blocks whose amax / 6 is a midpoint of two e4m3 codes or the float32 beside it, all codes in turn."""
    magnitudes = oracle.decode_e4m3(np.arange(0x7F, dtype=np.uint8))
    amax = (magnitudes[:-1] + magnitudes[1:]) / np.float32(2) * np.float32(6)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))])
    x = np.random.default_rng(5).uniform(-0.9, 0.9, (amax.size, 16)).astype(np.float32) * amax[:, None]
    x[:, 7] = amax
    return x.reshape(-1, 2 * 16)


INPUTS = {
    make.__name__: make()
    for make in (
        gaussian,
        heavy_tailed,
        constant,
        zeros,
        zero_blocks_among_others,
        not_finite,
        infinite_only,
        tiny,
        huge,
        mixed_magnitudes,
        mixed_within_blocks,
        code_ties,
        scale_ties,
    )
}


TERMS = {"none": 2, "modelopt": 1}  # a second term is for activations, ModelOpt's floor for weights


def check_nvfp4(
    x: np.ndarray, policy: str, floor: str, terms: int, static: float | np.floating = 1.0
) -> None:
    """Run the driver under a policy and compare all that it returns."""
    if policy == "static":
        global_scale = scalar(static)
    elif policy == "tensor":
        global_scale = oracle.nvfp4_global_of_tensor(x).reshape(1)
    else:
        global_scale = oracle.nvfp4_global_of_rows(x)
    row_globals = np.broadcast_to(global_scale, len(x))
    first = oracle.quantize_nvfp4(x, row_globals, floor == "modelopt")
    expected = {
        "codes": first.codes,
        "scales": first.scales,
        "global": global_scale,
        "dequantized": first.dequantized,
    }
    if terms == 2:
        second = oracle.quantize_nvfp4_residual(x, first)
        expected |= {"residual_codes": second.codes, "residual_scales": second.scales}
    inputs = {"x": x, "global": global_scale} if policy == "static" else {"x": x}
    assert_all_same(run_driver("quantize", inputs, policy=policy, floor=floor, terms=terms), expected)


@pytest.mark.parametrize("floor", ["none", "modelopt"])
@pytest.mark.parametrize("policy", ["tensor", "token"])
@pytest.mark.parametrize("name", INPUTS)
def test_dynamic_global(name: str, policy: str, floor: str) -> None:
    check_nvfp4(INPUTS[name], policy, floor, terms=TERMS[floor])


@pytest.mark.parametrize("floor", ["none", "modelopt"])
@pytest.mark.parametrize("rule", ["four-over-six", "mse"])
@pytest.mark.parametrize("name", [name for name in INPUTS if name != "huge"])
def test_scale_rules(name: str, rule: str, floor: str) -> None:
    """Weights (ModelOpt's floor) and activations (none), a global scale a row."""
    x = INPUTS[name]
    global_scale = oracle.nvfp4_global_of_rows(x)
    expected = oracle.quantize_nvfp4_searching(x, global_scale, rule, floor == "modelopt")
    result = run_driver("quantize", {"x": x}, policy="token", floor=floor, rule=rule)
    assert_all_same(
        result,
        {
            "codes": expected.codes,
            "scales": expected.scales,
            "global": global_scale,
            "dequantized": expected.dequantized,
        },
    )


@pytest.mark.parametrize("floor", ["none", "modelopt"])
@pytest.mark.parametrize("static", [1 / 2688, 0.37, 1.0, 2.0**-3], ids="{:.3g}".format)
@pytest.mark.parametrize("name", INPUTS)
def test_static_global(name: str, static: float, floor: str) -> None:
    check_nvfp4(INPUTS[name], "static", floor, terms=TERMS[floor], static=np.float32(static))


@pytest.mark.parametrize("policy", ["tensor", "token", "static"])
def test_one_term_is_returned_alone(policy: str) -> None:
    check_nvfp4(gaussian(), policy, "none", terms=1, static=np.float32(0.001))


@pytest.mark.parametrize("floor", ["none", "modelopt"])
def test_static_global_too_small_saturates(floor: str) -> None:
    x, static = gaussian(), np.float32(2.0**-24)
    assert np.all(oracle.quantize_nvfp4(x, static).scales == 0x7E)
    check_nvfp4(x, "static", floor, terms=TERMS[floor], static=static)


@pytest.mark.parametrize("floor", ["none", "modelopt"])
def test_static_global_too_large_gives_zeros(floor: str) -> None:
    x, static = gaussian(), np.float32(2.0**12)
    assert np.all(oracle.quantize_nvfp4(x, static).scales == 0)
    check_nvfp4(x, "static", floor, terms=TERMS[floor], static=static)


def test_code_ties_are_ties() -> None:
    """The input of the tie tests does what its name says: with global 1 each block is its codes' ties
    exactly.
    """
    quantized = oracle.quantize_nvfp4(code_ties(), np.float32(1))
    codes = oracle.unpack(quantized.codes)[:, :16]
    assert np.all(codes == [7, 0, 2, 2, 4, 4, 6, 6, 15, 8, 10, 10, 12, 12, 14, 14])


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (0, 32), (2, 4096)], ids=str)
def test_shapes(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(6).standard_normal(shape, np.float32)
    for policy in ("tensor", "token", "static"):
        check_nvfp4(x, policy, "none", terms=2, static=np.float32(0.01))


@pytest.mark.parametrize("name", INPUTS)
def test_mxfp4(name: str) -> None:
    x = INPUTS[name][:, : INPUTS[name].shape[1] // 32 * 32].copy()
    codes, scales = oracle.quantize_mxfp4(x)
    expected = {"codes": codes, "scales": scales, "dequantized": oracle.decode_mxfp4(codes, scales)}
    assert_all_same(run_driver("quantize_mxfp4", {"x": x}), expected)


@pytest.mark.parametrize("name", INPUTS)
def test_fp8_by_row(name: str) -> None:
    x = INPUTS[name].astype(ml_dtypes.bfloat16)
    codes, row_scales = oracle.quantize_fp8(x)
    assert_all_same(run_driver("quantize_fp8", {"x": x}), {"codes": codes, "row_scales": row_scales})


def test_fp8_of_every_bf16() -> None:
    """Each finite bf16 beside 448 (so that the row's scale is 1 and codes are the plain encoding), and by
    itself.
    """
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    finite = every[np.isfinite(every)]
    beside = np.stack([finite, np.full_like(finite, 448)], axis=1)
    for x in (beside, finite[:, None]):
        codes, row_scales = oracle.quantize_fp8(x)
        assert_all_same(run_driver("quantize_fp8", {"x": x}), {"codes": codes, "row_scales": row_scales})
