"""Block-scaled and FP8 matrices: quantize, dequantize, stage, and the layouts of scales.

Two 4-bit codes (e2m1) share a byte, the even column in the low nibble. Blocks run along columns, the reduction
axis K of a GEMM: 16 columns and an e4m3 scale for NVFP4, 32 and an e8m0 scale for MXFP4. docs/formats.md is the
specification. All of this computes on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from fourfold import _arrays, _native
from fourfold._arrays import F32, U8, Array, empty_like, exported, exported_for_writing, require_dimensions
from fourfold.errors import InvalidArgumentError

Format = Literal["nvfp4", "mxfp4"]
ScaleRule = Literal["amax", "four-over-six", "mse"]
ScaleLayout = Literal["row-major", "swizzled"]
ActivationFormat = Literal["nvfp4", "nvfp4x2", "fp8", "bf16"]
ScalePolicy = Literal["static", "max-over-experts", "dynamic-tensor", "dynamic-token"]

_BLOCK = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, cols] in NVFP4 or MXFP4. value = e2m1(code) x scale x global_scale."""

    format: Format
    #: [rows, cols/2] bytes; uint8 or torch's float4_e2m1fn_x2.
    codes: Any
    #: [rows, cols/16] e4m3, or [rows, cols/32] e8m0: uint8 or the framework's float8. Swizzled: one dimension.
    scales: Any
    #: NVFP4's factor of the whole matrix.
    global_scale: float = 1.0
    layout: ScaleLayout = "row-major"
    #: compressed-tensors stores the divisor: value = e2m1 x scale / global_scale.
    divides: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the values."""
        rows, half = require_dimensions(self.codes, "codes", "[rows, cols/2]", 2)
        return rows, 2 * half

    def _weight(self) -> _native.Weight:
        codes, scales = exported(self.codes, "codes"), exported(self.scales, "scales")
        return _native.block_scaled_weight(
            self.format, codes, scales, self.layout, self.global_scale, self.divides
        )


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [rows, cols] of e4m3 codes with a scale a tile, as DeepSeek and ModelOpt store it."""

    #: [rows, cols] bytes; uint8 or the framework's float8_e4m3fn.
    codes: Any
    #: [ceil(rows / tile rows), ceil(cols / tile cols)], float32, or bytes of e8m0. It multiplies.
    scales: Any
    tile: tuple[int, int] = (128, 128)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        rows, cols = require_dimensions(self.codes, "codes", "[rows, cols]", 2)
        return rows, cols

    def _weight(self) -> _native.Weight:
        return _native.fp8_weight(exported(self.codes, "codes"), exported(self.scales, "scales"), *self.tile)


#: A weight matrix: quantized, or a dense array [rows, cols] of bfloat16, float16 or float32.
WeightMatrix = Union[QuantizedMatrix, Fp8Matrix, _native.Weight, Array]


def native_weight(matrix: Any, name: str) -> _native.Weight:
    """The extension's view of a WeightMatrix."""
    if isinstance(matrix, _native.Weight):
        return matrix
    if isinstance(matrix, (QuantizedMatrix, Fp8Matrix)):
        return matrix._weight()
    return _native.dense_weight(exported(matrix, name))


def quantize(
    x: Array,
    format: Format = "nvfp4",
    *,
    rule: ScaleRule | None = "amax",
    global_scale: float | None = None,
) -> QuantizedMatrix:
    """Quantizes x [rows, cols] of bfloat16, float16 or float32; cols a multiple of 16 (MXFP4: 32).

    `rule` says how NVFP4's block scales are chosen: "amax" as ModelOpt, "four-over-six" (the largest value of a
    block becomes 6 or 4, whichever leaves the smaller squared error), "mse" (the best e4m3 scale within an octave).
    A scale is at least 2^-9 and 1 for blocks of zeros. None: the rule of activations, amax without a floor.
    `global_scale` is NVFP4's, a finite number above 0; without it, amax / 2688, and 1 for zeros. MXFP4 has one rule,
    and no global scale.

    Codes and scales are uint8, of torch where x is, else of numpy. Raises InvalidArgumentError for another shape,
    element type, layout (the elements of a row lie side by side) or name.
    """
    rows, cols = require_dimensions(x, "x", "[rows, cols]", 2)
    if format == "mxfp4" and (rule not in (None, "amax") or global_scale is not None):
        raise InvalidArgumentError(
            f"mxfp4: expected neither a rule nor a global scale, found rule {rule!r}, global_scale {global_scale}"
        )
    block = _BLOCK.get(format, 1)  # another name is refused below
    codes, scales = empty_like(x, (rows, cols // 2), U8), empty_like(x, (rows, cols // block), U8)
    used = _native.quantize(exported(x, "x"), format, rule or "", global_scale, codes, scales)
    return QuantizedMatrix(format, codes, scales, used)


def dequantize(matrix: WeightMatrix, *, out: Any = None) -> Any:
    """The values of `matrix`, float32 [rows, cols]: (code x scale) x global_scale, rounded once.

    `out` is written where given. Otherwise the result is of torch where the codes are, else of numpy.
    """
    weight = native_weight(matrix, "matrix")
    if out is None:
        like = getattr(matrix, "codes", matrix)
        out = empty_like(like, (weight.rows, weight.cols), F32)
    _native.dequantize(weight, exported_for_writing(out, "out"))
    return out


@dataclass(frozen=True)
class StagedActivations:
    """Activations [rows, cols] as a GEMM reads them. Which members are set follows from `format`."""

    format: ActivationFormat
    #: bf16: [rows, cols].
    values: Any = None
    #: NVFP4: [rows, cols/2]; fp8: [rows, cols] of e4m3.
    codes: Any = None
    #: NVFP4: [rows, cols/16] of e4m3.
    scales: Any = None
    #: nvfp4x2's second term.
    residual_codes: Any = None
    residual_scales: Any = None
    #: float32 [rows], the global scale of every row.
    row_scales: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the values."""
        if self.format == "bf16":
            rows, cols = require_dimensions(self.values, "values", "[rows, cols]", 2)
            return rows, cols
        rows, cols = require_dimensions(self.codes, "codes", "a matrix", 2)
        return rows, cols if self.format == "fp8" else 2 * cols

    def _activations(self) -> _native.Activations:
        parts = ("values", "codes", "scales", "residual_codes", "residual_scales", "row_scales")
        arrays = {name: getattr(self, name) for name in parts}
        given = {name: exported(array, name) for name, array in arrays.items() if array is not None}
        return _native.activations(self.format, *self.shape, **given)


def stage(
    x: Array,
    format: ActivationFormat = "nvfp4",
    *,
    policy: Literal["dynamic-token", "dynamic-tensor"] = "dynamic-token",
    global_scale: float | None = None,
) -> StagedActivations:
    """Turns x [rows, cols] in bfloat16 into what a GEMM reads; docs/formats.md, section 6.

    NVFP4's global scale is `global_scale` where given, else amax / 2688 of every row, or of all rows
    ("dynamic-tensor"). fp8 has a scale a row. "bf16" keeps x as it is. cols is a multiple of 16 for NVFP4.
    """
    rows, cols = require_dimensions(x, "x", "[rows, cols]", 2)
    if format == "bf16":
        return StagedActivations("bf16", values=x)
    shapes = {"codes": (rows, cols if format == "fp8" else cols // 2)}
    if format != "fp8":
        shapes["scales"] = (rows, cols // 16)
    if format == "nvfp4x2":
        shapes |= {"residual_codes": (rows, cols // 2), "residual_scales": (rows, cols // 16)}
    parts = {name: empty_like(x, shape, U8) for name, shape in shapes.items()}
    parts["row_scales"] = empty_like(x, (rows,), F32)
    _native.stage(exported(x, "x"), format, policy, global_scale, **parts)
    return StagedActivations(format, **parts)


def swizzle_scales(scales: Array, *, group_offsets: Sequence[int] | None = None) -> Any:
    """Scales [rows, k_sf] in the 128x4 layout of block-scaled tensor cores: uint8, one dimension, zero-padded.

    Rows are padded to multiples of 128 and columns to multiples of 4. `group_offsets` [G+1], from 0 to rows, pads and
    swizzles every group of rows on its own (the activation side of a grouped GEMM).
    """
    rows, k_sf = require_dimensions(scales, "scales", "[rows, k_sf]", 2)
    offsets = [0, rows] if group_offsets is None else [int(offset) for offset in group_offsets]
    padded = _native.padded_group_rows(offsets)[-1]
    out = empty_like(scales, (_native.swizzled_scale_bytes(padded, k_sf),), U8)
    if group_offsets is None:
        _native.swizzle_scales(exported(scales, "scales"), out)
    else:
        _native.swizzle_scale_groups(exported(scales, "scales"), offsets, out)
    return out


def unswizzle_scales(swizzled: Array, rows: int, k_sf: int) -> Any:
    """The reverse of swizzle_scales for one matrix: -> uint8 [rows, k_sf]. Another size raises InvalidArgumentError."""
    if rows < 0 or k_sf < 0:
        raise InvalidArgumentError(f"rows, k_sf: expected numbers from 0 on, found {rows}, {k_sf}")
    out = empty_like(swizzled, (rows, k_sf), U8)
    _native.unswizzle_scales(exported(swizzled, "swizzled"), rows, k_sf, out)
    return out


def unstack(
    codes: Any, scales: Any, global_scales: Sequence[float] | Any = None, format: Format = "nvfp4"
) -> list[QuantizedMatrix]:
    """Stacked experts, codes [E, N, K/2] and scales [E, N, K/block], as one matrix an expert; nothing is copied.

    `global_scales` [E] multiply; without them they are 1. Scales [E, bytes] are taken as swizzled.
    """
    experts, _, _ = require_dimensions(codes, "codes", "[E, N, K/2]", 3)
    dimensions = len(_arrays.shape_of(scales, "scales"))
    layout: ScaleLayout = "swizzled" if dimensions == 2 else "row-major"
    globals_ = [1.0] * experts if global_scales is None else [float(scale) for scale in global_scales]
    if len(globals_) != experts:
        raise InvalidArgumentError(f"global_scales: expected {experts}, found {len(globals_)}")
    return [QuantizedMatrix(format, codes[e], scales[e], globals_[e], layout) for e in range(experts)]


def native_activations(a: Any, name: str) -> tuple[_native.Activations, Any]:
    """The extension's view of staged activations or a bfloat16 array, and the array whose framework results follow."""
    if isinstance(a, StagedActivations):
        return a._activations(), a.values if a.codes is None else a.codes
    require_dimensions(a, name, "[M, K]", 2)
    return StagedActivations("bf16", values=a)._activations(), a


__all__ = [
    "ActivationFormat",
    "Format",
    "Fp8Matrix",
    "QuantizedMatrix",
    "ScaleLayout",
    "ScalePolicy",
    "ScaleRule",
    "StagedActivations",
    "WeightMatrix",
    "dequantize",
    "quantize",
    "stage",
    "swizzle_scales",
    "unstack",
    "unswizzle_scales",
]
