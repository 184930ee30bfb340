"""The driver's sorting of rows by expert, and the combination of rows into tokens, against the oracle's."""

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from compare import assert_all_same
from tensor_file import run_driver

BOTH_TYPES = pytest.mark.parametrize("dtype", [np.int32, np.int64], ids=["int32", "int64"])


def check_permute(topk_ids: np.ndarray, experts: int) -> oracle.Permutation:
    """Compare the driver's permutation with the oracle's, and return the latter."""
    permutation = oracle.permute(topk_ids, experts)
    expected = {
        "group_offsets": permutation.group_offsets,
        "slot_of_row": permutation.slot_of_row,
        "row_of_slot": permutation.row_of_slot,
        "status": np.array([permutation.out_of_range], np.int32),
    }
    assert_all_same(run_driver("permute", {"topk_ids": topk_ids}, experts=experts), expected)
    return permutation


@BOTH_TYPES
@pytest.mark.parametrize(
    "tokens, choices, experts", [(1, 1, 1), (7, 2, 8), (64, 8, 256), (500, 6, 5), (33, 4, 1000)]
)
def test_random_ids(tokens: int, choices: int, experts: int, dtype: type[np.integer]) -> None:
    ids = np.random.default_rng(tokens).integers(0, experts, (tokens, choices)).astype(dtype)
    assert not check_permute(ids, experts).out_of_range


@BOTH_TYPES
def test_dropped_slots_are_no_error(dtype: type[np.integer]) -> None:
    ids = np.random.default_rng(1).integers(-1, 6, (50, 3)).astype(dtype)
    assert not check_permute(ids, 6).out_of_range


@BOTH_TYPES
@pytest.mark.parametrize("stranger", [6, 7, -2, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_dropped_and_reported(stranger: int, dtype: type[np.integer]) -> None:
    ids = np.random.default_rng(2).integers(-1, 6, (50, 3)).astype(dtype)
    ids[17, 1] = ids[49, 2] = stranger
    assert check_permute(ids, 6).out_of_range


@pytest.mark.parametrize("stranger", [2**32, 2**32 + 1, 2**32 - 1, -(2**32) + 2, 2**63 - 1, -(2**63)])
def test_wide_ids_are_not_truncated(stranger: int) -> None:
    ids = np.random.default_rng(3).integers(0, 6, (20, 2))
    ids[4, 0] = stranger
    assert check_permute(ids, 6).out_of_range


@BOTH_TYPES
def test_all_alike(dtype: type[np.integer]) -> None:
    """Duplicates within a token keep their order; everything may go to one expert, or nowhere."""
    check_permute(np.full((9, 4), 3, dtype), 5)
    check_permute(np.full((9, 4), -1, dtype), 5)


@BOTH_TYPES
def test_no_tokens(dtype: type[np.integer]) -> None:
    check_permute(np.empty((0, 4), dtype), 5)


@pytest.mark.parametrize(
    "tokens, choices, drop", [(40, 6, 0.0), (40, 6, 0.3), (5, 1, 0.0), (8, 3, 1.0), (0, 2, 0.0)]
)
def test_combine(tokens: int, choices: int, drop: float) -> None:
    """Weights of both signs and many sizes: the sum shows its order, and a fused multiply-add would show."""
    rng = np.random.default_rng(4)
    ids = np.where(rng.random((tokens, choices)) < drop, -1, rng.integers(0, 7, (tokens, choices))).astype(
        np.int32
    )
    row_of_slot = oracle.permute(ids, 7).row_of_slot
    z = rng.standard_normal((int(np.sum(row_of_slot >= 0)), 72)).astype(ml_dtypes.bfloat16)
    weights = rng.standard_t(2, (tokens, choices)).astype(np.float32)
    total = oracle.combine(z, row_of_slot, weights)
    inputs = {"z": z, "row_of_slot": row_of_slot, "topk_weights": weights}
    assert_all_same(run_driver("combine", inputs), {"y": oracle.encode_bf16(total), "y32": total})
