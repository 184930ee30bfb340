"""Safetensors in and out of numpy, and the call of the C++ test driver that answers in them.

The format is small enough to be written here once more: an unsigned 64-bit little-endian length, that many
bytes of JSON (name -> dtype, shape, data_offsets), then the bytes of all tensors without holes. Nothing here
is shared with the C++ reader and writer, so a mistake in one of the two shows.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

DRIVER_VARIABLE = "FOURFOLD_ORACLE_DRIVER"
TIME_LIMIT_S = 60

DTYPE_OF_NAME = {
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}

Tensors = dict[str, np.ndarray]


class DriverRefused(Exception):
    """The driver ended with a nonzero exit status and said why."""


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file; tensors of wide elements come first, so that every tensor is aligned."""
    header, data = {}, bytearray()
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        begin = len(data)
        data += array.tobytes()
        header[name] = {
            "dtype": NAME_OF_DTYPE[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(path: Path) -> Tensors:
    """Read a whole safetensors file, requiring that the tensors cover its bytes without hole or overlap."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors, expected_begin = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != expected_begin:
            raise ValueError(f"{path}: {name} begins at byte {begin} of the data, not at {expected_begin}")
        flat = np.frombuffer(content[start + begin : start + end], DTYPE_OF_NAME[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
        expected_begin = end
    if start + expected_begin != len(content):
        raise ValueError(
            f"{path}: {len(content) - start} bytes of data, the header accounts for {expected_begin}"
        )
    return tensors


def run_driver(op: str, tensors: Tensors, **options: object) -> Tensors:
    """Run one operation of the C++ driver on `tensors`; an option that is None is left out.

    Raises DriverRefused when the driver reports an error, RuntimeError when it is missing or dies of a
    signal.
    """
    driver = os.environ.get(DRIVER_VARIABLE)
    if driver is None:
        raise RuntimeError(f"{DRIVER_VARIABLE} must name the oracle_driver binary")
    with tempfile.TemporaryDirectory(prefix="fourfold-oracle-") as folder:
        source, result = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        write_tensors(source, tensors)
        arguments = [f"{key}={value}" for key, value in options.items() if value is not None]
        command = [driver, op, str(source), str(result), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        if process.returncode < 0 or (process.returncode > 0 and not process.stderr.strip()):
            raise RuntimeError(f"{' '.join(command)}: status {process.returncode}, stderr {process.stderr!r}")
        if process.returncode > 0:
            raise DriverRefused(process.stderr.strip())
        return read_tensors(result)
