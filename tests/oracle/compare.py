"""Comparison bit for bit, with a failure message that shows where and what."""

import numpy as np

SHOWN = 5


def assert_same(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Same dtype, shape and bits; -0 is not +0. Any NaN equals any NaN: the payload is nowhere specified
    but in the bf16 encoder, whose test compares integers."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    differs = bits(actual) != bits(expected)
    if actual.dtype.kind != "i" and actual.dtype.kind != "u":
        differs &= ~(np.isnan(actual) & np.isnan(expected))
    wrong = np.argwhere(differs)
    examples = [
        f"{tuple(map(int, at))}: {actual[tuple(at)]!r} for {expected[tuple(at)]!r}" for at in wrong[:SHOWN]
    ]
    assert not len(wrong), f"{name}: {len(wrong)} of {actual.size} differ: {'; '.join(examples)}"


def assert_all_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The driver's tensors are the expected ones, no more and no fewer, each the same bit for bit."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert_same(name, actual[name], array)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's elements as unsigned integers of their width."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
