"""Backends, and the GEMMs that each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fourfold import _native
from fourfold._arrays import BF16, F32, I32, Array, empty_like, exported, exported_for_writing, shape_of, stream_of
from fourfold.errors import InvalidArgumentError
from fourfold.quantization import StagedActivations, WeightMatrix, native_activations, native_weight

OutputType = Literal["bf16", "f32"]


@dataclass(frozen=True)
class Backend:
    """A way to compute on some hardware."""

    name: str
    description: str
    #: Why this machine can't run it; empty when it can.
    why_unavailable: str


def backends() -> list[Backend]:
    """Every backend that was compiled in, best first. The last, "reference", can always run."""
    return [Backend(*fields) for fields in _native.backends()]


def gemm(
    a: StagedActivations | Array,
    b: WeightMatrix,
    *,
    out_dtype: OutputType = "bf16",
    out: Any = None,
    backend: str = "",
) -> Any:
    """d[m, n] = sum over k of a[m, k] b[n, k], times the global scales; sums in float32.

    a [M, K]: staged activations, or an array of bfloat16. b [N, K]: a QuantizedMatrix, an Fp8Matrix, or a dense array.
    -> d [M, N] in bfloat16 or float32; `out` is written where given, which then says the type.
    `backend`: see backends(); "" is the best that computes where `a` lies, or the environment's FOURFOLD_BACKEND.
    Arrays lie where it computes.
    Returns when the result is there. Raises InvalidArgumentError for shapes and places that do not fit each other,
    UnsupportedError for formats that the backend does not multiply.
    """
    return _multiply(a, [native_weight(b, "b")], None, out_dtype, out, backend)


def grouped_gemm(
    a: StagedActivations | Array,
    b: Sequence[WeightMatrix],
    group_offsets: Array | Sequence[int],
    *,
    out_dtype: OutputType = "bf16",
    out: Any = None,
    backend: str = "",
) -> Any:
    """d[m, n] = sum over k of a[m, k] b[e][n, k], where row m lies in group e.

    As gemm, with b of E matrices [N, K] of one shape (`unstack` makes them of stacked tensors) and `group_offsets`
    int32 [E+1], ascending from 0 to M; groups may be empty.
    """
    weights = [native_weight(matrix, f"b[{e}]") for e, matrix in enumerate(b)]
    if not weights:
        raise InvalidArgumentError("b: expected at least one matrix, found none")
    return _multiply(a, weights, group_offsets, out_dtype, out, backend)


def _multiply(a: Any, weights: list[_native.Weight], offsets: Any, out_dtype: str, out: Any, backend: str) -> Any:
    activations, like = native_activations(a, "a")
    if out is None:
        if out_dtype not in (BF16, F32):
            raise InvalidArgumentError(f"out_dtype: expected bf16 or f32, found {out_dtype!r}")
        out = empty_like(like, (activations.rows, weights[0].rows), out_dtype)
    if isinstance(offsets, (list, tuple, range)):
        numbers = offsets
        offsets = empty_like(like, (len(numbers),), I32)
        for index, number in enumerate(numbers):
            offsets[index] = number
    if offsets is not None:
        shape_of(offsets, "group_offsets")
        offsets = exported(offsets, "group_offsets")
    _native.multiply(activations, weights, offsets, exported_for_writing(out, "out"), backend, stream_of(like))
    return out
