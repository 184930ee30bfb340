"""NVFP4-native mixture-of-experts inference: quantizers, GEMMs and whole MoE layers, on CPUs and GPUs.

Arrays are numpy's, torch's, or any framework's that exports DLPack or the buffer protocol; they are not copied.
`fourfold.torch` has the operator and the module for PyTorch. docs/python.md shows how things go together.
"""

from importlib.metadata import version as _version

from fourfold.backends import Backend, backends, gemm, grouped_gemm
from fourfold.checkpoint import Checkpoint, Router, open_checkpoint
from fourfold.diagnosis import LayertestReport, StageComparison, layertest
from fourfold.errors import (
    BadFileError,
    DeviceError,
    Error,
    InputOutputError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from fourfold.layer import ExpertWeights, MoeLayer, SharedTaps, StageTaps, expert_weights
from fourfold.quantization import (
    Fp8Matrix,
    QuantizedMatrix,
    StagedActivations,
    dequantize,
    quantize,
    stage,
    swizzle_scales,
    unstack,
    unswizzle_scales,
)

__version__ = _version("fourfold")

__all__ = [
    "Backend",
    "BadFileError",
    "Checkpoint",
    "DeviceError",
    "Error",
    "ExpertWeights",
    "Fp8Matrix",
    "InputOutputError",
    "InvalidArgumentError",
    "LayertestReport",
    "MoeLayer",
    "NotFoundError",
    "QuantizedMatrix",
    "Router",
    "SharedTaps",
    "StageComparison",
    "StageTaps",
    "StagedActivations",
    "UnsupportedError",
    "backends",
    "dequantize",
    "expert_weights",
    "gemm",
    "grouped_gemm",
    "layertest",
    "open_checkpoint",
    "quantize",
    "stage",
    "swizzle_scales",
    "unstack",
    "unswizzle_scales",
]
