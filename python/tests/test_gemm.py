"""gemm and grouped_gemm against float64."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fourfold
from oracle import rel_l2

RANDOM = np.random.default_rng(6)
BACKENDS = [backend.name for backend in fourfold.backends() if not backend.why_unavailable and backend.name != "sm90"]


def bf16(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(ml_dtypes.bfloat16)


def values_of(staged: fourfold.StagedActivations) -> Any:
    rows = [
        fourfold.dequantize(
            fourfold.QuantizedMatrix("nvfp4", staged.codes[i : i + 1], staged.scales[i : i + 1], float(scale))
        )
        for i, scale in enumerate(staged.row_scales)
    ]
    return np.concatenate(rows).astype(np.float64)


def test_the_last_backend_always_runs() -> None:
    assert fourfold.backends()[-1].name == "reference" and "reference" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("staged", [False, True])
def test_gemm(backend: str, staged: bool) -> None:
    a, b = bf16(5, 64), fourfold.quantize(bf16(24, 64))
    activations: Any = fourfold.stage(a) if staged else a
    due = (values_of(activations) if staged else a.astype(np.float64)) @ fourfold.dequantize(b).astype(np.float64).T
    found = fourfold.gemm(activations, b, out_dtype="f32", backend=backend)
    assert found.dtype == np.float32 and rel_l2(found, due) < 1e-5
    assert rel_l2(fourfold.gemm(activations, b, backend=backend).astype(np.float32), due) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_gemm(backend: str) -> None:
    a, offsets = bf16(9, 32), [0, 4, 4, 9]
    b = [fourfold.quantize(bf16(16, 32)) for _ in range(3)]
    found = fourfold.grouped_gemm(a, b, offsets, out_dtype="f32", backend=backend)
    for expert, matrix in enumerate(b):
        rows = slice(offsets[expert], offsets[expert + 1])
        due = a[rows].astype(np.float64) @ fourfold.dequantize(matrix).astype(np.float64).T
        np.testing.assert_allclose(found[rows], due, rtol=1e-5, atol=1e-5)
    same = fourfold.grouped_gemm(a, b, np.array(offsets, np.int32), out_dtype="f32", backend=backend)
    np.testing.assert_array_equal(same, found)


def test_stacked_experts() -> None:
    parts = [fourfold.quantize(bf16(16, 32)) for _ in range(3)]
    stacked = fourfold.unstack(
        np.stack([p.codes for p in parts]), np.stack([p.scales for p in parts]), [p.global_scale for p in parts]
    )
    for one, part in zip(stacked, parts, strict=True):
        np.testing.assert_array_equal(fourfold.dequantize(one), fourfold.dequantize(part))


def test_what_is_refused() -> None:
    b = fourfold.quantize(bf16(16, 32))
    with pytest.raises(fourfold.InvalidArgumentError):
        fourfold.gemm(bf16(2, 48), b)
    with pytest.raises(fourfold.InvalidArgumentError):
        fourfold.grouped_gemm(bf16(2, 32), [b], [0, 3])
    with pytest.raises(fourfold.InvalidArgumentError, match="at least one matrix"):
        fourfold.grouped_gemm(bf16(2, 32), [], [0])
    with pytest.raises(fourfold.InvalidArgumentError, match="out_dtype"):
        fourfold.gemm(bf16(2, 32), b, out_dtype="f16")  # type: ignore[arg-type]
    with pytest.raises(fourfold.Error, match="backend"):
        fourfold.gemm(bf16(2, 32), b, backend="none")
