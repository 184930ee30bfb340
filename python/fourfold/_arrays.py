"""Arrays of numpy, torch and other frameworks: handing them to the extension, and making results alike.

Arrays travel by DLPack or the buffer protocol. Where a framework can't export an element type (ml_dtypes in
numpy; torch's float8 and float4), a view as unsigned integers of the same size goes in its place. Nothing is
copied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, Union

import ml_dtypes
import numpy as np

from fourfold.errors import InvalidArgumentError


class SupportsDLPack(Protocol):
    """What exports its memory by DLPack: arrays of numpy, torch, jax, cupy and others."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


#: An argument: an array of any framework, or anything with the buffer protocol.
Array = Union[SupportsDLPack, bytes, bytearray, memoryview]

BF16, F32, U8, I32 = "bf16", "f32", "u8", "i32"
_NUMPY_TYPES: dict[str, Any] = {BF16: ml_dtypes.bfloat16, F32: np.float32, U8: np.uint8, I32: np.int32}
_TORCH_TYPES = {BF16: "bfloat16", F32: "float32", U8: "uint8", I32: "int32"}
# Element types of numpy's extensions that hold one element in whole bytes.
_NUMPY_VIEWS = {"bfloat16": np.uint16} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), np.uint8
)


def torch_tensor(array: object) -> Any:
    """`array` where it is a torch tensor, else None. Does not import torch."""
    torch = sys.modules.get("torch")
    return array if torch is not None and isinstance(array, torch.Tensor) else None


def exported(array: Any, name: str) -> Any:
    """What the extension takes in place of `array`: the same memory. Raises InvalidArgumentError for what is no array."""
    if isinstance(array, np.ndarray):
        view = _NUMPY_VIEWS.get(array.dtype.name)
        if view is not None:
            return array.view(view)
        if array.dtype.name.startswith("float4"):
            raise InvalidArgumentError(
                f"{name}: expected two e2m1 codes a byte, found numpy's {array.dtype.name}, which holds one; "
                "pack them into uint8, even index in the low nibble"
            )
        return array
    if (tensor := torch_tensor(array)) is not None:
        torch = sys.modules["torch"]
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.element_size() == 1 and tensor.is_floating_point():
            return tensor.view(torch.uint8)
        return tensor
    if hasattr(array, "__dlpack__") or isinstance(array, (bytes, bytearray, memoryview)):
        return array
    raise InvalidArgumentError(
        f"{name}: expected an array (DLPack or the buffer protocol), found {type(array).__name__}"
    )


def exported_for_writing(array: Any, name: str) -> Any:
    """As exported(), of an array that a call writes. jax's arrays are constants, though they export as if they were not."""
    if type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise InvalidArgumentError(
            f"{name}: expected an array that may be written, found one of jax, which never changes; pass numpy's, "
            "torch's or cupy's"
        )
    return exported(array, name)


def shape_of(array: Any, name: str) -> tuple[int, ...]:
    """Its dimensions."""
    if isinstance(array, (bytes, bytearray)):
        return (len(array),)
    if not hasattr(array, "shape"):
        exported(array, name)
    return tuple(int(extent) for extent in array.shape)


def require_dimensions(array: Any, name: str, meaning: str, count: int) -> tuple[int, ...]:
    """Its shape; raises InvalidArgumentError unless it has `count` dimensions, e.g. "[rows, cols]"."""
    shape = shape_of(array, name)
    if len(shape) != count:
        raise InvalidArgumentError(f"{name}: expected {meaning}, found shape {list(shape)}")
    return shape


def is_on_cuda(array: Any) -> bool:
    if (tensor := torch_tensor(array)) is not None:
        return bool(tensor.is_cuda)
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and int(device()[0]) in (2, 13)


def empty_like(array: Any, shape: Sequence[int], element: str) -> Any:
    """An uninitialised array of the framework and on the device of `array`: of torch for torch, else of numpy."""
    if (tensor := torch_tensor(array)) is not None:
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, _TORCH_TYPES[element]), device=tensor.device)
    if is_on_cuda(array):
        raise InvalidArgumentError(
            "out: expected an array on the device, since results are allocated for numpy and torch alone, "
            f"found None beside {type(array).__module__}.{type(array).__name__}; pass out="
        )
    return np.empty(tuple(shape), dtype=_NUMPY_TYPES[element])


def stream_of(array: Any) -> int:
    """The framework's current stream on the device of `array`, as a number; 0 on the host and where it has none."""
    if (tensor := torch_tensor(array)) is not None:
        if not tensor.is_cuda:
            return 0
        return int(sys.modules["torch"].cuda.current_stream(tensor.device).cuda_stream)
    if type(array).__module__.partition(".")[0] == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return 0


def to_numpy(array: Any, name: str) -> Any:
    """A numpy array of the same values on the host, bf16 as ml_dtypes.bfloat16; copied where it lies on a device."""
    if (tensor := torch_tensor(array)) is not None:
        torch = sys.modules["torch"]
        host = tensor.detach().cpu()
        if host.dtype == torch.bfloat16:
            return host.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return host.numpy()
    exported(array, name)
    return np.asarray(array)
