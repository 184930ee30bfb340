"""The driver's number formats against the oracle's: every code decoded, a dense set of float32 encoded."""

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from compare import assert_all_same, assert_same
from tensor_file import run_driver

ALL_E2M1 = np.arange(16, dtype=np.uint8)
ALL_BYTES = np.arange(256, dtype=np.uint8)
ALL_BF16 = np.arange(65536, dtype=np.uint16)


def of_bits(patterns: np.ndarray) -> np.ndarray:
    """32-bit patterns as float32."""
    return patterns.astype(np.uint32).view(np.float32)


def with_neighbours(values: np.ndarray) -> np.ndarray:
    """Each value, the float32 below and above it, and all of these negated."""
    below = np.nextafter(values, np.float32(-np.inf))
    above = np.nextafter(values, np.float32(np.inf))
    one_sign = np.concatenate([below, values, above])
    return np.concatenate([one_sign, -one_sign])


def codes_and_midpoints(magnitudes: np.ndarray) -> np.ndarray:
    """Ascending magnitudes -> these, their midpoints, one step beyond the last, the neighbours of all."""
    extended = np.append(magnitudes, 2 * magnitudes[-1] - magnitudes[-2])
    midpoints = (extended[:-1] + extended[1:]) / np.float32(2)
    return with_neighbours(np.concatenate([extended, midpoints]))


def bf16_midpoints() -> np.ndarray:
    """Halfway between each bf16 and the next, with both float32 neighbours; NaNs with low payloads among
    them.
    """
    upper = ALL_BF16.astype(np.uint32) << 16
    return of_bits(np.concatenate([upper | 0x7FFF, upper | 0x8000, upper | 0x8001]))


def special_values() -> np.ndarray:
    """Zeros, infinities, ends of the float32 range, subnormals, quiet and signalling NaN of both signs."""
    positive = np.array(
        [0x0, 0x1, 0x2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    )
    return of_bits(np.concatenate([positive, positive | 0x80000000]))


ENCODED = {
    "every bf16": of_bits(ALL_BF16.astype(np.uint32) << 16),
    "around bf16 midpoints": bf16_midpoints(),
    "around e2m1 codes and midpoints": codes_and_midpoints(oracle.decode_e2m1(ALL_E2M1[:8])),
    "around e4m3 codes and midpoints": codes_and_midpoints(oracle.decode_e4m3(ALL_BYTES[:0x7F])),
    "specials": special_values(),
    "random bits": of_bits(np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint32)),
    "random of moderate size": np.random.default_rng(2).normal(0, 4, 200_000).astype(np.float32),
    "nothing": np.empty(0, np.float32),
}


def test_every_code_decodes() -> None:
    expected = {
        "e2m1": oracle.decode_e2m1(ALL_E2M1),
        "e4m3": oracle.decode_e4m3(ALL_BYTES),
        "e8m0": oracle.decode_e8m0(ALL_BYTES),
        "bf16": of_bits(ALL_BF16.astype(np.uint32) << 16),
    }
    assert_all_same(run_driver("decode", {}), expected)


def test_every_product_of_e2m1_and_e4m3_is_exact_in_bf16() -> None:
    decoded = run_driver("decode", {})
    exact = decoded["e2m1"].astype(np.float64)[:, None] * decoded["e4m3"].astype(np.float64)
    assert exact.shape == (16, 256)
    assert_same("product", exact.astype(ml_dtypes.bfloat16).astype(np.float64), exact)


@pytest.mark.parametrize("name", ENCODED)
def test_encode(name: str) -> None:
    values = ENCODED[name]
    encoded = run_driver("encode", {"values": values})
    assert sorted(encoded) == ["bf16", "e2m1", "e4m3"]
    assert_same("e2m1", encoded["e2m1"], oracle.encode_e2m1(values))
    assert_same("e4m3", encoded["e4m3"], oracle.encode_e4m3(values))
    assert_same("bf16", encoded["bf16"].view(np.uint16), oracle.encode_bf16(values).view(np.uint16))


def test_every_code_encodes_to_itself() -> None:
    decoded = run_driver("decode", {})
    assert_same("e2m1", run_driver("encode", {"values": decoded["e2m1"]})["e2m1"], ALL_E2M1)
    finite_or_positive_nan = np.delete(ALL_BYTES, 0xFF)
    encoded = run_driver("encode", {"values": decoded["e4m3"][finite_or_positive_nan]})
    assert_same("e4m3", encoded["e4m3"], finite_or_positive_nan)
