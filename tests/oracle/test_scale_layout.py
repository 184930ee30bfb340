"""The driver's 128x4 scale layout against the oracle's reshape and transpose."""

import numpy as np
import pytest

import nvfp4_oracle as oracle
from compare import assert_all_same
from tensor_file import run_driver

ROWS = [1, 5, 31, 32, 33, 127, 128, 129, 200, 256, 300]
COLUMNS = [1, 3, 4, 5, 8, 13]


def random_scales(seed: int, *shape: int) -> np.ndarray:
    """Bytes without zero, so that padding and content cannot be mistaken for each other."""
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_swizzle_and_back(rows: int, columns: int) -> None:
    scales = random_scales(rows * 100 + columns, rows, columns)
    swizzled = oracle.swizzle(scales)
    assert_all_same(run_driver("swizzle", {"scales": scales}), {"swizzled": swizzled})

    poison = oracle.swizzle(np.ones_like(scales)) == 0
    poisoned = np.where(poison, np.uint8(oracle.E4M3_NAN), swizzled)
    result = run_driver("unswizzle", {"swizzled": poisoned}, rows=rows, cols=columns)
    assert_all_same(result, {"scales": scales})


def test_no_rows() -> None:
    assert_all_same(
        run_driver("swizzle", {"scales": np.zeros((0, 5), np.uint8)}), {"swizzled": np.zeros(0, np.uint8)}
    )


@pytest.mark.parametrize("columns", [1, 4, 9])
@pytest.mark.parametrize(
    "sizes",
    [[0], [7], [128, 128], [0, 130, 0, 0, 5, 256, 0], [1, 1, 1], [0, 0, 0], [127, 129, 1], list(range(12))],
    ids=str,
)
def test_groups_are_padded_on_their_own(sizes: list[int], columns: int) -> None:
    scales = random_scales(sum(sizes) + columns, sum(sizes), columns)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    result = run_driver("swizzle_groups", {"scales": scales, "group_offsets": offsets})
    assert_all_same(result, {"swizzled": oracle.swizzle_groups(scales, offsets)})


@pytest.mark.parametrize(
    "shape", [(1, 128, 4), (3, 40, 5), (2, 200, 3), (4, 1, 1), (2, 256, 8), (5, 130, 12)], ids=str
)
def test_experts(shape: tuple[int, int, int]) -> None:
    scales = random_scales(sum(shape), *shape)
    expected = {"swizzled": oracle.swizzle_experts(scales)}
    assert_all_same(run_driver("swizzle_experts", {"scales": scales}), expected)
    transposed = np.ascontiguousarray(scales.transpose(0, 2, 1))
    assert_all_same(run_driver("swizzle_experts_transposed", {"scales": transposed}), expected)
