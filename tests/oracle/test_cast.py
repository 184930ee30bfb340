"""The driver's rewriting of stored weights against the oracle's: MXFP4 cast to NVFP4, two global scales
folded.
"""

import numpy as np
import pytest

import nvfp4_oracle as oracle
from cases import scalar
from compare import assert_all_same, assert_same
from tensor_file import DriverRefused, run_driver

ROWS, BLOCKS = 12, 5
NEGATIVE_ZERO_CODE = 0x88


def random_codes(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, BLOCKS * 16), np.uint8)


def check_cast(codes: np.ndarray, scales: np.ndarray) -> oracle.Cast:
    """Compare the driver's cast with the oracle's, and return the latter."""
    cast = oracle.cast_mxfp4(codes, scales)
    expected = {
        "codes": cast.codes,
        "scales": cast.scales,
        "global": scalar(cast.global_scale),
        "recoded": np.array([cast.recoded]),
        "inexact": np.array([cast.inexact]),
    }
    assert_all_same(run_driver("cast", {"codes": codes, "scales": scales}), expected)
    return cast


def assert_exact(cast: oracle.Cast, codes: np.ndarray, scales: np.ndarray) -> None:
    """No code changed and every value is the MXFP4 one (float64: the globals reach into float32's
    subnormals).
    """
    assert_same("codes", cast.codes, codes)
    values = oracle.decode_nvfp4(cast.codes, cast.scales).astype(np.float64) * np.float64(cast.global_scale)
    exponents = np.repeat(scales.astype(np.int64) - oracle.E8M0_BIAS, 32, axis=1)
    assert_same(
        "values", values, np.ldexp(oracle.decode_e2m1(oracle.unpack(codes)).astype(np.float64), exponents)
    )


@pytest.mark.parametrize("top", [0, 5, 17, 100, 127, 140, 254])
def test_cast_is_exact_within_seventeen_octaves(top: int) -> None:
    codes = random_codes(top)
    lowest = max(top - 17, 0)
    scales = np.random.default_rng(top).integers(lowest, top + 1, (ROWS, BLOCKS), np.uint8)
    scales[0, 0], scales[0, 1] = top, lowest
    cast = check_cast(codes, scales)
    assert cast.recoded == cast.inexact == 0
    assert_exact(cast, codes, scales)


@pytest.mark.parametrize("spread", [18, 19, 20, 24, 60, 254])
def test_cast_rounds_blocks_out_of_range(spread: int) -> None:
    codes = random_codes(spread)
    scales = np.random.default_rng(spread).integers(254 - spread, 255, (ROWS, BLOCKS), np.uint8)
    scales[0, 0], scales[0, 1], scales[1, 0] = 254, 254 - spread, 254 - 18
    assert check_cast(codes, scales).recoded > 0


def test_recoded_block_may_be_exact() -> None:
    """One octave too low, but all codes are 0, 1, 2, 3, 4 or 6 in magnitude: halves of these exist."""
    codes = random_codes(1)
    scales = np.full((ROWS, BLOCKS), 127, np.uint8)
    scales[2, 3] = 127 - 18
    halved = np.array([0, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14, 15], np.uint8)
    codes[2, 48:64] = oracle.pack(np.random.default_rng(2).choice(halved, 32))
    cast = check_cast(codes, scales)
    assert (cast.recoded, cast.inexact) == (1, 0)


def test_zero_blocks_do_not_set_the_global() -> None:
    """All-zero blocks (of +0, of -0) at exponents far above and below the others' keep their codes."""
    codes = random_codes(3)
    scales = np.random.default_rng(3).integers(110, 120, (ROWS, BLOCKS), np.uint8)
    for row, exponent in enumerate([254, 200, 121, 119, 100, 50, 0]):
        codes[row, 16:32], codes[row, 32:48] = 0, NEGATIVE_ZERO_CODE
        scales[row, 1:3] = exponent
    cast = check_cast(codes, scales)
    assert cast.recoded == cast.inexact == 0
    assert_same("codes", cast.codes, codes)


@pytest.mark.parametrize("exponent", [0, 100, 118, 127, 135, 136, 254])
def test_cast_of_zeros_alone(exponent: int) -> None:
    codes = np.zeros((2, 32), np.uint8)
    codes[1] = NEGATIVE_ZERO_CODE
    cast = check_cast(codes, np.full((2, 2), exponent, np.uint8))
    assert cast.global_scale == 1


@pytest.mark.parametrize("zero_block", [False, True])
def test_nan_scale_is_refused(zero_block: bool) -> None:
    codes, scales = random_codes(4), np.full((ROWS, BLOCKS), 120, np.uint8)
    scales[5, 2] = oracle.E8M0_NAN
    if zero_block:
        codes[5, 32:48] = 0
    with pytest.raises(DriverRefused):
        run_driver("cast", {"codes": codes, "scales": scales})


@pytest.mark.parametrize(
    "gate_global, up_global",
    [(0.01, 0.01), (0.01, 0.005), (0.01, 0.0099), (0.3, 3.0), (1e-4, 2.0), (1.0, 1e-4), (1 + 2.0**-23, 1.0)],
)
def test_fold(gate_global: float, up_global: float) -> None:
    """All finite scales, at ratios that are a power of two, nearly one, and so small that blocks vanish."""
    every = np.arange(oracle.E4M3_NAN, dtype=np.uint8)
    gate = np.resize(every, (36, 7))
    up = np.random.default_rng(5).choice(every, (36, 7))
    folded = oracle.fold(gate, up, np.float32(gate_global), np.float32(up_global))
    inputs = {
        "gate_scales": gate,
        "up_scales": up,
        "gate_global": scalar(gate_global),
        "up_global": scalar(up_global),
    }
    expected = {
        "gate_scales": folded.gate_scales,
        "up_scales": folded.up_scales,
        "global": scalar(folded.global_scale),
        "changed": np.array([folded.changed]),
    }
    assert_all_same(run_driver("fold", inputs), expected)
