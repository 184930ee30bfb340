"""NVFP4, MXFP4 and a SwiGLU layer in numpy, written from docs/formats.md; shares nothing with the extension."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Floats = Any  # arrays of float32
Bytes = Any  # and of uint8


def decode_e2m1(codes: Bytes) -> Floats:
    """[rows, cols/2] -> [rows, cols], the even column in the low nibble."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def dequantize_nvfp4(codes: Bytes, scales: Bytes, global_scale: float) -> Floats:
    values = decode_e2m1(codes) * np.repeat(scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32), 16, axis=1)
    return values * np.float32(global_scale)


def dequantize_mxfp4(codes: Bytes, scales: Bytes) -> Floats:
    return decode_e2m1(codes) * np.repeat(scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=1)


def swizzle(scales: Bytes) -> Bytes:
    """The 128x4 layout, one byte after the other."""
    rows, cols = (-(-extent // multiple) * multiple for extent, multiple in zip(scales.shape, (128, 4), strict=True))
    padded = np.zeros((rows, cols), np.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    # Tiles of 128 x 4; within one, row r = 32 q + p lies at p * 16 + q * 4.
    tiles = padded.reshape(rows // 128, 4, 32, cols // 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles).reshape(-1)


def swiglu_layer(
    x: Floats, gate: list[Floats], up: list[Floats], down: list[Floats], ids: Any, weights: Floats
) -> Floats:
    """y [T, H] in float64, rounded nowhere."""
    y = np.zeros(x.shape, np.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            if expert < 0:
                continue
            row = x[token].astype(np.float64)
            g, u = gate[expert].astype(np.float64) @ row, up[expert].astype(np.float64) @ row
            y[token] += weight * (down[expert].astype(np.float64) @ (g / (1.0 + np.exp(-g)) * u))
    return y.astype(np.float32)


def rel_l2(found: Any, due: Any) -> float:
    found, due = np.asarray(found, np.float64), np.asarray(due, np.float64)
    return float(np.linalg.norm(found - due) / np.linalg.norm(due))
