"""Arrays of jax, on the host and on a GPU: in without a copy, results in numpy. Skipped without jax."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import fourfold
from test_layer import HIDDEN, TOKENS, Layer

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax")


def device(kind: str) -> Any:
    try:
        return jax.devices(kind)[0]
    except RuntimeError:
        pytest.skip(f"jax has no {kind}")


def test_quantizers_and_gemm_take_arrays() -> None:
    made = Layer()
    x = jax.device_put(made.x, device("cpu"))
    q = fourfold.quantize(x)
    np.testing.assert_array_equal(q.codes, fourfold.quantize(made.x).codes)
    np.testing.assert_array_equal(fourfold.gemm(x, q), fourfold.gemm(made.x, q))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_layer_takes_arrays(kind: str) -> None:
    place = device(kind)
    made = Layer()
    layer = made.make(backend="cpu" if kind == "cpu" else "")
    if kind == "cuda" and layer.cuda_device is None:
        pytest.skip(f"no backend computes on this GPU: {layer.backend_reason}")
    due = layer.forward(made.x, made.ids, made.weights)
    x, ids, weights = (jax.device_put(array, place) for array in (made.x, made.ids, made.weights))
    jax.block_until_ready((x, ids, weights))
    if kind == "cpu":
        np.testing.assert_array_equal(layer.forward(x, ids, weights), due)
        return
    with pytest.raises(fourfold.InvalidArgumentError, match="pass out="):
        layer.forward(x, ids, weights)
    cupy = pytest.importorskip("cupy")  # jax's arrays can't be written
    out = cupy.empty((TOKENS, HIDDEN), cupy.uint16)
    torch = pytest.importorskip("torch")
    layer.forward(x, ids, weights, out=torch.from_dlpack(out).view(torch.bfloat16))
    np.testing.assert_array_equal(cupy.asnumpy(out), due.view(np.uint16))


def test_arrays_of_jax_can_not_be_written() -> None:
    made = Layer()
    layer = made.make(backend="cpu")
    out = jax.device_put(np.zeros((TOKENS, HIDDEN), made.x.dtype), device("cpu"))
    with pytest.raises(fourfold.InvalidArgumentError, match="out"):
        layer.forward(made.x, made.ids, made.weights, out=out)
