"""The oracle against values worked by hand and against second derivations; needs no driver.

What the other files compare bit for bit with the oracle is only as good as the oracle: this file is its
ground.
"""

import bisect
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from cases import quantized_linear
from tensor_file import NAME_OF_DTYPE, read_tensors, write_tensors

F32 = np.float32
ALL_BYTES = np.arange(256, dtype=np.uint8)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def u8(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def with_neighbours(values: np.ndarray) -> np.ndarray:
    below, above = np.nextafter(values, F32(-np.inf)), np.nextafter(values, F32(np.inf))
    return np.concatenate([below, values, above])


# ---- codecs ------------------------------------------------------------------------------------------------


def test_e2m1_values_are_the_table_of_the_specification() -> None:
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    decoded = oracle.decode_e2m1(np.arange(16, dtype=np.uint8))
    assert decoded.tolist() == magnitudes + [-m for m in magnitudes]
    assert np.array_equal(np.signbit(decoded), np.arange(16) >= 8)


def test_e4m3_values_by_their_fields() -> None:
    """sign, 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal; mantissa 7 at the top is
    NaN.
    """
    decoded = oracle.decode_e4m3(ALL_BYTES)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        if code & 0x7F == 0x7F:
            assert np.isnan(decoded[code])
        else:
            assert decoded[code] == (-magnitude if code & 0x80 else magnitude)
            assert np.signbit(decoded[code]) == (code >= 0x80)
    assert decoded[0x7E] == 448 and decoded[0x38] == 1 and decoded[0x01] == 2.0**-9


def test_e8m0_values() -> None:
    decoded = oracle.decode_e8m0(ALL_BYTES)
    assert np.isnan(decoded[255])
    assert decoded[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]


def test_e2m1_ties_of_the_specification() -> None:
    ties = f32(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5)
    assert oracle.decode_e2m1(oracle.encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert oracle.encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_e2m1_corners() -> None:
    values = f32(-0.0, -1e-30, 6.01, -7, 3e38, np.inf, -np.inf, np.nan, -np.nan)
    assert oracle.encode_e2m1(values).tolist() == [8, 8, 7, 15, 7, 7, 15, 7, 7]


def test_e4m3_corners() -> None:
    """464 is halfway from 448 to the 480 that does not exist; 2^-10 is halfway from 0 to the smallest, 3 x
    2^-10 from the smallest to the next; 17 from 16 (even mantissa) to 18, 19 from 18 (odd) to 20.
    """
    values = f32(
        448, 464, 465, 1e9, -np.inf, np.nan, -np.nan, -0.0, 2.0**-10, 1.001 * 2.0**-10, 3 * 2.0**-10, 17, 19
    )
    expected = [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F, 0x80, 0x00, 0x01, 0x02, 0x58, 0x5A]
    assert oracle.encode_e4m3(values).tolist() == expected


def test_bf16_corners() -> None:
    """1 + 2^-8 is a tie to even below, 1 + 3 x 2^-8 above; the largest float32 overflows; NaNs are made
    quiet.
    """
    patterns = {
        0x3F808000: 0x3F80,
        0x3F808001: 0x3F81,
        0x3F818000: 0x3F82,
        0x7F7FFFFF: 0x7F80,
        0xFF7F8000: 0xFF80,
        0x7F7F7FFF: 0x7F7F,
        0x00008000: 0x0000,
        0x00018000: 0x0002,
        0x80000001: 0x8000,
        0x7F800001: 0x7FC0,
        0xFFA12345: 0xFFE1,
        0x7FFFFFFF: 0x7FFF,
    }
    encoded = oracle.encode_bf16(np.array(list(patterns), np.uint32).view(np.float32))
    assert encoded.view(np.uint16).tolist() == list(patterns.values())


@pytest.mark.parametrize("format_name", ["e2m1", "e4m3"])
def test_encoders_agree_with_a_search_of_the_nearest_value(format_name: str) -> None:
    """Saturate, find the two neighbours among the representable values, take the nearer in float64, else the
    even code. No ml_dtypes conversion takes part.
    """
    if format_name == "e2m1":
        encode, sign, magnitudes = oracle.encode_e2m1, 8, [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    else:
        subnormals, normals = (
            [m / 512 for m in range(8)],
            [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)],
        )
        encode, sign, magnitudes = oracle.encode_e4m3, 0x80, (subnormals + normals)[:0x7F]

    def nearest(value: float) -> int:
        magnitude = min(abs(value), magnitudes[-1])
        upper = bisect.bisect_left(magnitudes, magnitude)
        lower = max(upper - 1, 0)
        to_lower, to_upper = magnitude - magnitudes[lower], magnitudes[upper] - magnitude
        if to_lower == to_upper:
            code = upper if upper % 2 == 0 else lower
        else:
            code = upper if to_upper < to_lower else lower
        return code | (sign if np.signbit(value) else 0)

    midpoints = f32(*[(a + b) / 2 for a, b in zip(magnitudes, magnitudes[1:], strict=False)])
    random = np.random.default_rng(1).normal(0, magnitudes[-1] / 3, 20_000).astype(np.float32)
    log_uniform = np.exp2(np.random.default_rng(2).uniform(-14, 10, 20_000)).astype(np.float32)
    positive = np.concatenate(
        [with_neighbours(midpoints), with_neighbours(f32(*magnitudes)), random, log_uniform]
    )
    values = np.concatenate([positive, -positive])
    assert encode(values).tolist() == [nearest(float(value)) for value in values]


def test_encoders_agree_with_ml_dtypes_where_its_conversion_is_the_specified_one() -> None:
    values = np.random.default_rng(3).normal(0, 2, 50_000).astype(np.float32)
    as_e2m1 = np.clip(values, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(oracle.encode_e2m1(values), as_e2m1)
    assert np.array_equal(
        oracle.encode_e4m3(values * 40), (values * 40).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    assert np.array_equal(oracle.encode_bf16(values), values.astype(ml_dtypes.bfloat16))


def test_every_product_of_e2m1_and_e4m3_is_exact_in_bf16() -> None:
    products = np.multiply.outer(
        oracle.decode_e2m1(np.arange(16, dtype=np.uint8)).astype(np.float64),
        oracle.decode_e4m3(ALL_BYTES).astype(np.float64),
    )
    assert np.array_equal(products.astype(ml_dtypes.bfloat16).astype(np.float64), products, equal_nan=True)


def test_even_index_is_in_the_low_nibble() -> None:
    assert oracle.pack(u8(1, 2, 15, 0)).tolist() == [0x21, 0x0F]
    assert oracle.unpack(u8(0x21, 0x0F)).tolist() == [1, 2, 15, 0]


# ---- quantizers --------------------------------------------------------------------------------------------


def block(*values: float) -> np.ndarray:
    """One row of one block, the rest of it zeros."""
    return f32(*values, *[0] * (16 - len(values)))[None]


def test_block_by_hand_global_one() -> None:
    """amax 6: t = 1, s = 1, r = 1: every element is its own quotient, the ties go to even."""
    x = block(6, -6, 3, 2.5, 0.25, -0.25, 0.75, 0.76, -5, 5.01)
    quantized = oracle.quantize_nvfp4(x, F32(1))
    assert quantized.scales.tolist() == [[0x38]]
    assert oracle.unpack(quantized.codes)[0, :10].tolist() == [7, 15, 5, 4, 0, 8, 2, 2, 14, 7]
    assert quantized.dequantized[0, :10].tolist() == [6, -6, 3, 2, 0, 0, 1, 1, -4, 6]


def test_block_by_hand_rounded_scale() -> None:
    """amax 7, g = 0.5: t/g = 2.333, e4m3 steps by 0.25 from 2 on, so s = 2.25 = (1 + 1/8) x 2^1: exponent
    field 8, mantissa 1, 0x41. s*g = 1.125, r = 0.8889: 7 -> 6.22 -> 6; 1 -> 0.89 -> 1; 1.4 -> 1.244 -> 1;
    1.41 -> 1.253 -> 1.5; -0.28 -> -0.249 -> -0; -0.29 -> -0.258 -> -0.5.
    """
    x = block(7, 1, 1.4, 1.41, -0.28, -0.29)
    quantized = oracle.quantize_nvfp4(x, F32(0.5))
    assert quantized.scales.tolist() == [[0x41]]
    assert oracle.unpack(quantized.codes)[0, :6].tolist() == [7, 2, 2, 3, 8, 9]
    assert quantized.dequantized[0, :6].tolist() == [6.75, 1.125, 1.125, 1.6875, 0, -0.5625]


def test_residual_by_hand() -> None:
    """As above: 7 - 6.75 = 0.25, 1 - 1.125 = -0.125, 1.5 - 1.6875 = -0.1875. amax 0.25, g = 0.5: t/g =
    0.08333; e4m3 from 2^-4 = 0.0625 steps by 2^-7, 0.08333 is 2.67 steps up: s = 0.0625 + 3/128 = 0.0859375,
    exponent field 3, mantissa 3, 0x1B. s*g = 0.04296875, r = 23.27: 0.25 -> 5.82 -> 6, -0.125 -> -2.91 -> -3,
    -0.1875 -> -4.36 -> -4.
    """
    x = block(7, 1, 1.5)
    residual = oracle.quantize_nvfp4_residual(x, oracle.quantize_nvfp4(x, F32(0.5)))
    assert residual.scales.tolist() == [[0x1B]]
    assert oracle.unpack(residual.codes)[0, :4].tolist() == [7, 13, 14, 0]


def test_static_global_out_of_proportion_by_hand() -> None:
    """amax 6, t = 1. g = 2^-10: t/g = 1024 saturates at 448, s*g = 0.4375: 6 -> 13.7 -> 6 and 1 -> 2.29 -> 2.
    g = 2^12: t/g = 2^-12 rounds to scale 0, codes keep the sign; ModelOpt's floor makes it 2^-9, s*g = 8, 6
    -> 0.75, a tie that goes to 1, and -3 -> -0.375 -> -0.5.
    """
    x = block(6, 1, -3)
    small = oracle.quantize_nvfp4(x, F32(2.0**-10))
    assert small.scales.tolist() == [[0x7E]] and oracle.unpack(small.codes)[0, :3].tolist() == [7, 4, 15]
    large = oracle.quantize_nvfp4(x, F32(2.0**12))
    assert large.scales.tolist() == [[0]] and oracle.unpack(large.codes)[0, :4].tolist() == [0, 0, 8, 0]
    floored = oracle.quantize_nvfp4(x, F32(2.0**12), modelopt_floor=True)
    assert floored.scales.tolist() == [[1]] and oracle.unpack(floored.codes)[0, :4].tolist() == [2, 0, 9, 0]


def test_zero_blocks() -> None:
    x = block(0.0, -0.0)
    plain, floored = oracle.quantize_nvfp4(x, F32(1)), oracle.quantize_nvfp4(x, F32(1), modelopt_floor=True)
    assert plain.scales.tolist() == [[0]] and floored.scales.tolist() == [[0x38]]
    for quantized in (plain, floored):
        assert oracle.unpack(quantized.codes)[0, :3].tolist() == [0, 8, 0]
    assert oracle.nvfp4_global_of_tensor(x) == 1 and oracle.nvfp4_global_of_rows(x).tolist() == [1]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("floor", [False, True])
def test_not_finite_block_shows_and_its_neighbour_does_not(poison: float, floor: bool) -> None:
    x = np.concatenate([block(poison, 1, -1), block(6, 1, -1)], axis=1)
    quantized = oracle.quantize_nvfp4(x, F32(1), floor)
    assert quantized.scales.tolist() == [[0x7F, 0x38]]
    codes = oracle.unpack(quantized.codes)[0]
    assert codes[:16].tolist() == [7] * 16 and codes[16:19].tolist() == [7, 2, 10]
    assert np.array_equal(np.isnan(quantized.dequantized[0]), np.arange(32) < 16)
    assert not np.isfinite(oracle.nvfp4_global_of_rows(x)[0])
    assert np.isnan(oracle.nvfp4_global_of_tensor(x)) == np.isnan(poison)


def test_everything_stays_float32() -> None:
    x = np.random.default_rng(4).standard_normal((4, 32), np.float32)
    quantized = oracle.quantize_nvfp4(x, oracle.nvfp4_global_of_rows(x))
    assert quantized.global_scale.dtype == quantized.dequantized.dtype == np.float32
    assert oracle.nvfp4_global_of_tensor(x).dtype == oracle.quantize_fp8(x)[1].dtype == np.float32
    assert oracle.gemm([x], x, F32(1), np.float64).dtype == np.float32


def test_quantizer_agrees_with_one_written_element_by_element() -> None:
    """The same sequence in scalars, from the text once more: 0.7% of scales would differ in another order."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((40, 64)) * 2.0 ** rng.integers(-20, 20, (40, 1))).astype(np.float32)
    row_globals = oracle.nvfp4_global_of_rows(x)
    quantized = oracle.quantize_nvfp4(x, row_globals)
    codes = oracle.unpack(quantized.codes)
    for row in range(40):
        g = max(abs(value) for value in x[row]) / F32(2688)
        assert row_globals[row] == g
        for first in range(0, 64, 16):
            t = max(abs(value) for value in x[row, first : first + 16]) / F32(6)
            (s,) = oracle.decode_e4m3(oracle.encode_e4m3(np.array([t / g])))
            assert oracle.decode_e4m3(quantized.scales[row])[first // 16] == s
            r = F32(0) if s == 0 else F32(1) / (s * g)
            for k in range(first, first + 16):
                (code,) = oracle.encode_e2m1(np.array([x[row, k] * r]))
                assert codes[row, k] == code
                assert quantized.dequantized[row, k] == oracle.decode_e2m1(np.array([code]))[0] * s * g


@pytest.mark.parametrize(
    "amax, exponent, code", [(5, 0, 6), (7.9, 0, 7), (8, 1, 6), (4, 0, 6), (3.99, -1, 7)]
)
def test_mxfp4_block_by_hand(amax: float, exponent: int, code: int) -> None:
    """e = floor(log2 amax) - 2: 5 is a tie to 4; 7.9 saturates; 8 = 4 x 2; 3.99 x 2 saturates."""
    x = np.zeros((1, 32), np.float32)
    x[0, 9], x[0, 30] = amax, -amax
    codes, scales = oracle.quantize_mxfp4(x)
    assert scales.tolist() == [[exponent + 127]]
    assert oracle.unpack(codes)[0, [9, 30, 0]].tolist() == [code, code + 8, 0]


def test_mxfp4_corners() -> None:
    """Zeros; NaN; inf; the smallest subnormal, 2^-149 x 2^127 = 2^-22; 2^-126: e = -128 is clamped, 2^-126 /
    2^-127 = 2; the largest float32: e = 127 - 2.
    """
    corners = [0, np.nan, np.inf, 2.0**-149, 2.0**-126, 3.4028235e38]
    x = np.zeros((len(corners), 32), np.float32)
    x[:, 4] = corners
    codes, scales = oracle.quantize_mxfp4(x)
    assert scales[:, 0].tolist() == [0, 0xFF, 0xFF, 0, 0, 252]
    assert oracle.unpack(codes)[:, 4].tolist() == [0, 7, 7, 0, 4, 7]
    assert oracle.unpack(codes)[:, 5].tolist() == [0, 7, 7, 0, 0, 0]


def test_fp8_row_by_hand() -> None:
    """amax 224: g = 0.5, r = 2: 1 -> 2 = 0x40, -3.5 -> -7 = 1.75 x 4: exponent field 9, mantissa 6, sign:
    0xCE.
    """
    codes, row_scales = oracle.quantize_fp8(f32(224, 1, -3.5, 0).reshape(1, 4))
    assert row_scales.tolist() == [0.5] and codes.tolist() == [[0x7E, 0x40, 0xCE, 0]]
    codes, row_scales = oracle.quantize_fp8(f32(0, -0.0).reshape(1, 2))
    assert row_scales.tolist() == [1] and codes.tolist() == [[0, 0x80]]


@pytest.mark.parametrize(
    "name, expected",
    [("nvfp4", (0.9954, 0.0005)), ("nvfp4x2", (0.99996, 0.00001)), ("fp8", (0.9996, 0.0001))],
)
def test_published_cosine_of_one_gemm(name: str, expected: tuple[float, float]) -> None:
    """numerics.md's L1 column against the dequantized NVFP4 weights, on Gaussian data."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((32, 2048), np.float32)
    weights = F32(0.02) * rng.standard_normal((256, 2048), np.float32)
    w = oracle.quantize_nvfp4(
        weights, oracle.nvfp4_global_of_tensor(weights), modelopt_floor=True
    ).dequantized
    if name == "fp8":
        codes, row_scales = oracle.quantize_fp8(x)
        staged = oracle.decode_e4m3(codes) * row_scales[:, None]
    else:
        first = oracle.quantize_nvfp4(x, oracle.nvfp4_global_of_rows(x))
        staged = first.dequantized
        if name == "nvfp4x2":
            staged = staged + oracle.quantize_nvfp4_residual(x, first).dequantized
    ours, reference = staged @ w.T, x @ w.T
    cosine = np.sum(ours * reference) / np.linalg.norm(ours) / np.linalg.norm(reference)
    assert abs(cosine - expected[0]) < expected[1]


# ---- conversions of stored weights -------------------------------------------------------------------------


def mxfp4_block(*codes: int) -> np.ndarray:
    """32 codes, the rest zeros, packed."""
    return oracle.pack(u8(*codes, *[0] * (32 - len(codes))))


def test_cast_by_hand() -> None:
    """k = 3, -14, -15, -16 and an all-zero block at k = 100. kmax = 3, m = -5, k-m = 8, -9, -10, -11, 105 ->
    8. Block 2 is one octave too low: 1, 6, -4 -> 0.5, 3, -2, exact. Block 3 two: 6 -> 1.5, 3 -> 0.75 -> 1
    (tie), -1 -> -0.25 -> -0.
    """
    codes = np.concatenate(
        [
            mxfp4_block(7, 1),
            mxfp4_block(1, 9),
            mxfp4_block(2, 7, 14),
            mxfp4_block(7, 5, 10),
            mxfp4_block(0, 8),
        ]
    )[None]
    cast = oracle.cast_mxfp4(codes, u8(130, 113, 112, 111, 227)[None])
    assert cast.global_scale == 2.0**-5
    assert cast.scales.tolist() == [[0x78, 0x78, 1, 1, 1, 1, 1, 1, 0x78, 0x78]]
    recoded = oracle.unpack(cast.codes).reshape(5, 32)
    assert np.array_equal(recoded[[0, 1, 4]], oracle.unpack(codes).reshape(5, 32)[[0, 1, 4]])
    assert recoded[2, :4].tolist() == [1, 5, 12, 0] and recoded[3, :4].tolist() == [3, 2, 8, 0]
    assert (cast.recoded, cast.inexact) == (2, 1)


def test_cast_refuses_nan_and_survives_zeros() -> None:
    zeros = np.zeros((1, 16), np.uint8)
    with pytest.raises(ValueError, match="NaN"):
        oracle.cast_mxfp4(zeros, u8(255)[None])
    cast = oracle.cast_mxfp4(zeros, u8(0)[None])
    assert cast.global_scale == 1 and cast.scales.tolist() == [[1, 1]]


def test_cast_reaches_a_subnormal_global() -> None:
    """kmax = -127: m = -135, below float32's normal range but a float32."""
    assert oracle.cast_mxfp4(mxfp4_block(2)[None], u8(0)[None]).global_scale == 2.0**-135


def test_fold_by_hand() -> None:
    """up = gate / 2: 1 -> 0.5, exact; 2^-9 -> 2^-10, a tie to 0, changed; 3 x 2^-9 -> 1.5 x 2^-9, a tie to 2,
    changed; 0 stays. Gate is not touched.
    """
    gate, up = u8(0x38, 0x01, 0x7E, 0x13)[None], u8(0x38, 0x01, 0x03, 0x00)[None]
    folded = oracle.fold(gate, up, F32(0.5), F32(0.25))
    assert folded.global_scale == 0.5
    assert folded.gate_scales.tolist() == gate.tolist() and folded.up_scales.tolist() == [[0x30, 0, 2, 0]]
    assert folded.changed == 2
    mirrored = oracle.fold(up, gate, F32(0.25), F32(0.5))
    assert mirrored.gate_scales.tolist() == folded.up_scales.tolist() and mirrored.changed == 2
    assert oracle.fold(gate, up, F32(0.5), F32(0.5)).changed == 0


# ---- the 128x4 layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 4), (129, 5), (300, 13), (512, 8), (90, 180)])
def test_swizzle_is_the_offset_formula_of_the_specification(rows: int, columns: int) -> None:
    rng = np.random.default_rng(7)
    scales = rng.integers(1, 256, (rows, columns), np.uint8)
    swizzled = oracle.swizzle(scales)
    padded_columns = -(-columns // 4) * 4
    assert swizzled.shape == (-(-rows // 128) * 128 * padded_columns,)
    for r, c in zip(rng.integers(0, rows, 300), rng.integers(0, columns, 300), strict=True):
        tile = (r // 128) * (padded_columns // 4) + c // 4
        offset = tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
        assert swizzled[offset] == scales[r, c]
    assert np.count_nonzero(swizzled) == scales.size
    assert np.array_equal(oracle.unswizzle(swizzled, rows, columns), scales)


def test_swizzle_by_hand() -> None:
    """Row 33, column 1 of the first tile: 16 bytes for row 1 within the quarter, 4 for quarter 1, 1 for the
    column.
    """
    scales = np.zeros((200, 6), np.uint8)
    scales[33, 1], scales[128, 0], scales[2, 5] = 1, 2, 3
    swizzled = oracle.swizzle(scales)
    assert np.flatnonzero(swizzled).tolist() == [16 + 4 + 1, 512 + 2 * 16 + 1, 2 * 512]
    assert swizzled[[21, 545, 1024]].tolist() == [1, 3, 2]


def test_groups_and_experts_are_padded_each() -> None:
    """Three rows as groups of 1, 0, 2: two tiles, the second begins with row 1."""
    scales = u8(1, 2, 3)[:, None]
    swizzled = oracle.swizzle_groups(scales, np.array([0, 1, 1, 3], np.int32))
    assert swizzled.shape == (1024,) and np.flatnonzero(swizzled).tolist() == [0, 512, 528]
    assert oracle.swizzle_experts(np.ones((2, 3, 5), np.uint8)).shape == (2, 1024)


# ---- permutation, multiplication, activation, layer --------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_permutation_by_hand(dtype: type[np.integer]) -> None:
    """Slots 0-7: experts 2, 0, 2, -1, 0, 0, 5 (there is none), 2. Expert 0 gets slots 1, 4, 5; 2 gets 0, 2,
    7.
    """
    ids = np.array([[2, 0], [2, -1], [0, 0], [5, 2]], dtype)
    permutation = oracle.permute(ids, 3)
    assert permutation.group_offsets.tolist() == [0, 3, 3, 6]
    assert permutation.slot_of_row.tolist() == [1, 4, 5, 0, 2, 7]
    assert permutation.token_of_row.tolist() == [0, 2, 2, 0, 1, 3]
    assert permutation.row_of_slot.tolist() == [3, 0, 4, -1, 1, 2, -1, 5]
    assert permutation.out_of_range and not oracle.permute(ids[:3], 3).out_of_range


def test_permutation_of_nothing() -> None:
    permutation = oracle.permute(np.empty((0, 2), np.int64), 3)
    assert permutation.group_offsets.tolist() == [0, 0, 0, 0]
    assert permutation.slot_of_row.shape == permutation.row_of_slot.shape == (0,)


def test_combine_by_hand() -> None:
    """2^24 + 1 + 1 stays 2^24 in float32, in this order; the second token's first slot is dropped."""
    z = np.array([[1], [1], [1], [3]], ml_dtypes.bfloat16)
    weights = f32(2.0**24, 1, 1, 9, 0.5, 0).reshape(2, 3)
    row_of_slot = np.array([2, 0, 1, -1, 3, -1], np.int32)
    assert oracle.combine(z, row_of_slot, weights).tolist() == [[2.0**24], [1.5]]


def test_gemm_by_hand() -> None:
    """2688 x 2688 = 7225344 has float32 spacing 0.5, so 0.125 twice is lost before 7225344 is subtracted
    again; in float64 0.25 is left. Blocks: scale 448, 1 (0.5 in b), 448.
    """
    a_codes, b_codes = oracle.pack(u8(7, *[0] * 15, 1, 1, *[0] * 14, 15, *[0] * 15)), np.zeros(24, np.uint8)
    b_codes[[0, 8, 16]] = 0x07, 0x11, 0x07
    a = oracle.decode_nvfp4(a_codes[None], u8(0x7E, 0x38, 0x7E)[None])
    b = oracle.decode_nvfp4(b_codes[None], u8(0x7E, 0x30, 0x7E)[None])
    assert a[0, [0, 16, 17, 32]].tolist() == [2688, 0.5, 0.5, -2688] and b[0, 16] == 0.25
    assert oracle.gemm([a], b, F32(4)).tolist() == [[0]]
    assert oracle.gemm([a], b, F32(4), np.float64).tolist() == [[1]]
    assert oracle.gemm([a, a], b, f32(2), np.float64).tolist() == [[1]]


def test_two_terms_alternate_within_k() -> None:
    """2^24 (first term, k = 0), 1 and 1 (second term, k = 0 and k = 1), -2^24 (first term, k = 1).
    Alternating: 2^24, 2^24 (1 is lost), 0, 1. One term after the other: 2^24, 0, 1, 2."""
    first, second, b = f32(2.0**24, -(2.0**24))[None], f32(1, 1)[None], f32(1, 1)[None]
    assert oracle.gemm([first, second], b, F32(1)).tolist() == [[1]]


def test_swiglu_by_hand() -> None:
    """silu(1) = 0.7310586, bf16 steps by 2^-8 there: 187/256 = 0.73047. With limit 2: gate 5 -> 2, silu
    1.7616; up -3 -> -2: -3.5232 -> -3.515625 (steps of 2^-6); gate -5 is not limited: -0.033464 x 1 -> -137 x
    2^-12.
    """
    h = f32(1, 5, -5, 1, -3, 1).reshape(1, 6).astype(ml_dtypes.bfloat16)
    assert oracle.swiglu(h)[0, 0] == 187 / 256
    assert oracle.swiglu(h, 2.0)[0].astype(np.float32).tolist() == [187 / 256, -3.515625, -137 / 4096]
    zeros = oracle.swiglu(f32(0, -1000, 1, 1).reshape(1, 4).astype(ml_dtypes.bfloat16))
    assert zeros[0].astype(np.float32).tolist() == [0, 0]


def random_layer(
    activations: str, policy: str
) -> tuple[oracle.Layer, np.ndarray, oracle.Permutation, np.ndarray]:
    """A layer of 3 experts, 8 tokens, top-2, H = 96, I = 64, with fitting input scales."""
    rng = np.random.default_rng(8)

    def linear(n: int, k: int, input_scale: float) -> oracle.Linear:
        weights = F32(0.1) * rng.standard_normal((n, k), np.float32)
        return quantized_linear(weights, input_scale)

    experts = [
        oracle.Expert(linear(64, 96, 3e-3), linear(64, 96, 1e-3), linear(96, 64, 2e-3)) for _ in range(3)
    ]
    x = rng.standard_normal((8, 96), np.float32).astype(ml_dtypes.bfloat16)
    ids = rng.integers(0, 3, (8, 2)).astype(np.int32)
    weights = rng.random((8, 2), np.float32)
    return oracle.Layer(experts, activations, policy), x, oracle.permute(ids, 3), weights


@pytest.mark.parametrize("policy", ["static", "max-over-experts", "dynamic-tensor", "dynamic-token"])
@pytest.mark.parametrize(
    "activations, tolerance", [("nvfp4", 0.25), ("nvfp4x2", 0.03), ("fp8", 0.1), ("bf16", 0.015)]
)
def test_layer_is_near_a_plain_one(activations: str, policy: str, tolerance: float) -> None:
    """Against float64 token by token on dequantized weights, within the formats' error: no scale, half or
    slot is mistaken for another.
    """
    layer, x, permutation, weights = random_layer(activations, policy)
    a = layer.up_to_a(x, permutation)[2]
    y = layer.from_a(a, permutation, weights)[2].astype(np.float64)

    plain = np.zeros((8, 96))
    expert_of_row = np.repeat(np.arange(3), np.diff(permutation.group_offsets))
    for row, slot in enumerate(permutation.slot_of_row):
        expert, token = layer.experts[expert_of_row[row]], slot // 2
        gate, up, down = (
            w.operand().astype(np.float64) * w.global_scale for w in (expert.gate, expert.up, expert.down)
        )
        g = gate @ x[token].astype(np.float64)
        plain[token] += weights[token, slot % 2] * (
            down @ (g / (1 + np.exp(-g)) * (up @ x[token].astype(np.float64)))
        )
    error = np.linalg.norm(y - plain) / np.linalg.norm(plain)
    assert error < tolerance


def test_row_globals_of_the_policies() -> None:
    offsets, rows = (
        np.array([0, 2, 2, 3]),
        f32(2688, 0, 26.88).reshape(3, 1).repeat(16, 1).astype(ml_dtypes.bfloat16),
    )

    def row_globals(policy: str) -> list[float]:
        return oracle.stage(
            rows, "nvfp4", policy, [F32(0.25), F32(4), F32(0.5)], offsets
        ).row_globals.tolist()

    assert row_globals("static") == [0.25, 0.25, 0.5]
    assert row_globals("max-over-experts") == [4, 4, 4]
    assert row_globals("dynamic-tensor") == [1, 1, 1]
    assert row_globals("dynamic-token") == [1, 1, F32(rows[2, 0]) / F32(2688)]


# ---- the file format ---------------------------------------------------------------------------------------


def test_tensor_file_round_trip(tmp_path: Path) -> None:
    tensors = {
        dtype_name.lower(): np.arange(6).reshape(2, 3).astype(dtype)
        for dtype, dtype_name in NAME_OF_DTYPE.items()
    }
    tensors |= {"empty": np.empty((0, 4), np.float32), "scalar": np.array(7, np.float32)}
    write_tensors(tmp_path / "file", tensors)
    result = read_tensors(tmp_path / "file")
    assert sorted(result) == sorted(tensors)
    for name, array in tensors.items():
        assert result[name].dtype == array.dtype and result[name].shape == array.shape
        assert result[name].tobytes() == array.tobytes()


def test_tensor_file_bytes(tmp_path: Path) -> None:
    """Length (a multiple of 8 for alignment), JSON, data; and no tensors at all is a file too."""
    write_tensors(tmp_path / "one", {"a": np.array([1, 2], np.uint8)})
    text = b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}'
    padded = text + b" " * (-len(text) % 8)
    assert (tmp_path / "one").read_bytes() == len(padded).to_bytes(8, "little") + padded + b"\x01\x02"
    write_tensors(tmp_path / "none", {})
    assert (tmp_path / "none").read_bytes() == b"\x08\0\0\0\0\0\0\0{}      "
    assert read_tensors(tmp_path / "none") == {}
