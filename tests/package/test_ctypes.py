"""The shared library from a language that has no headers: loaded by ctypes, two backends agree on a layer."""

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

H, K, TOKENS = 128, 2, 3


class LayerOptions(ctypes.Structure):
    """The first members of fourfold_layer_options: an older caller's struct is shorter."""

    _fields_ = [("size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("activations", ctypes.c_char_p)]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("tokens", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("topk_ids", ctypes.c_void_p),
        ("topk_ids_i64", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def library(libdir: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(libdir / "libfourfold.so"))
    loaded.fourfold_last_error.restype = ctypes.c_char_p
    loaded.fourfold_version.restype = ctypes.c_char_p
    return loaded


def forward(library: ctypes.CDLL, model: Path, backend: bytes) -> np.ndarray:
    """y [T, H] of layer 1, as float32."""

    def ok(status: int) -> None:
        assert status == 0, library.fourfold_last_error()

    checkpoint, layer, workspace = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    ok(library.fourfold_checkpoint_open(str(model).encode(), None, ctypes.byref(checkpoint)))
    options = LayerOptions(ctypes.sizeof(LayerOptions), backend, b"bf16")
    number = ctypes.c_int64(1)
    ok(library.fourfold_layer_create(checkpoint, number, ctypes.byref(options), ctypes.byref(layer)))
    maximum, nothing = ctypes.c_int64(TOKENS), ctypes.c_size_t(0)
    ok(library.fourfold_workspace_create(layer, maximum, None, nothing, ctypes.byref(workspace)))
    x = (np.arange(TOKENS * H) % 17 / 8 - 1).astype(bfloat16)
    y = np.zeros(TOKENS * H, bfloat16)
    ids = np.array([0, 7, 3, -1, 5, 5], np.int32)
    weights = np.array([0.5, 0.5, 1, 9, 0.25, 0.75], np.float32)
    args = ForwardArgs(ctypes.sizeof(ForwardArgs), TOKENS, x.ctypes.data, 0, ids.ctypes.data, None,
                       weights.ctypes.data, y.ctypes.data)  # fmt: skip
    ok(library.fourfold_forward(layer, workspace, ctypes.byref(args)))
    library.fourfold_workspace_destroy(workspace)
    library.fourfold_layer_destroy(layer)
    library.fourfold_checkpoint_close(checkpoint)
    return y.astype(np.float32).reshape(TOKENS, H)


def test_forward(library: ctypes.CDLL, model: Path) -> None:
    """Two implementations agree within bf16's rounding of three stages (h, the activation, z): 3 x 2^-8 relative."""
    fast, reference = forward(library, model, b"cpu"), forward(library, model, b"reference")
    assert np.abs(reference).max() > 0
    distance = np.linalg.norm(fast - reference) / np.linalg.norm(reference)
    assert distance <= 3 * 2**-8, distance


def test_errors_are_of_their_thread(library: ctypes.CDLL) -> None:
    checkpoint = ctypes.c_void_p()
    seen = {}

    def fail(path: str) -> None:
        assert library.fourfold_checkpoint_open(path.encode(), None, ctypes.byref(checkpoint)) == 3
        barrier.wait()
        seen[path] = library.fourfold_last_error().decode()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=fail, args=(path,)) for path in ("/no/one", "/no/two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(path in text for path, text in seen.items()) and len(seen) == 2, seen
