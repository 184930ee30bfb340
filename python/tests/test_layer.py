"""Layers of arrays and of checkpoints: against numpy, tap by tap, and what they refuse."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fourfold
from oracle import rel_l2, swiglu_layer

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 64, 48, 8, 2, 7
BACKENDS = [backend.name for backend in fourfold.backends() if not backend.why_unavailable and backend.name != "sm90"]


class Layer:
    """Random weights, and a routing."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)

        def matrices(rows: int, cols: int) -> list[fourfold.QuantizedMatrix]:
            return [
                fourfold.quantize(random.normal(size=(rows, cols)).astype(np.float32) / np.float32(np.sqrt(cols)))
                for _ in range(EXPERTS)
            ]

        self.gate, self.up = matrices(INNER, HIDDEN), matrices(INNER, HIDDEN)
        self.down = matrices(HIDDEN, INNER)
        self.x = random.normal(size=(TOKENS, HIDDEN)).astype(ml_dtypes.bfloat16)
        self.ids = np.stack([random.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
        self.weights = random.random((TOKENS, TOP_K)).astype(np.float32)

    def experts(self) -> fourfold.ExpertWeights:
        return fourfold.expert_weights(gate=self.gate, up=self.up, down=self.down)

    def make(self, **options: Any) -> fourfold.MoeLayer:
        return fourfold.MoeLayer(self.experts(), top_k=TOP_K, **options)

    def due(self) -> Any:
        gate, up, down = ([fourfold.dequantize(m) for m in ms] for ms in (self.gate, self.up, self.down))
        return swiglu_layer(self.x.astype(np.float32), gate, up, down, self.ids, self.weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activations", "most"), [("bf16", 1e-2), ("nvfp4x2", 3e-2), ("fp8", 8e-2), ("nvfp4", 0.25)])
def test_against_numpy(backend: str, activations: str, most: float) -> None:
    made = Layer()
    layer = made.make(activations=activations, backend=backend)
    y = layer.forward(made.x, made.ids, made.weights)
    assert y.dtype == ml_dtypes.bfloat16 and y.shape == (TOKENS, HIDDEN)
    assert rel_l2(y, made.due()) < most
    wide = layer.forward(made.x, made.ids.astype(np.int64), made.weights, out_dtype="f32")
    np.testing.assert_array_equal(wide.astype(ml_dtypes.bfloat16), y)


def test_taps_change_nothing_and_fit_together() -> None:
    made = Layer(1)
    layer = made.make(activations="bf16", backend="reference")
    y, taps = layer.forward(made.x, made.ids, made.weights, taps=True)
    np.testing.assert_array_equal(y, layer.forward(made.x, made.ids, made.weights))
    rows = TOKENS * TOP_K
    assert taps.h.shape == (rows, 2 * INNER) and taps.z.shape == (rows, HIDDEN) and taps.shared is None
    counts = np.bincount(made.ids.reshape(-1), minlength=EXPERTS)
    np.testing.assert_array_equal(np.diff(taps.group_offsets), counts)
    np.testing.assert_array_equal(taps.staged_x.values, made.x[taps.slot_of_row // TOP_K])
    np.testing.assert_array_equal(taps.row_of_slot[taps.slot_of_row], np.arange(rows))
    due = np.zeros((TOKENS, HIDDEN), np.float32)
    for row, slot in enumerate(taps.slot_of_row):
        due[slot // TOP_K] += made.weights.reshape(-1)[slot] * taps.z[row].astype(np.float32)
    assert rel_l2(y, due) < 4e-3


def test_absent_and_wrong_experts() -> None:
    made = Layer(2)
    layer = made.make(activations="bf16")
    ids = made.ids.copy()
    ids[0, :], ids[1, 0] = -1, -1
    y = layer.forward(made.x, ids, made.weights)
    assert not y[0].astype(np.float32).any()
    ids[2, 1] = EXPERTS
    with pytest.raises(fourfold.InvalidArgumentError, match="experts from 0 to 7"):
        layer.forward(made.x, ids, made.weights)
    status = np.zeros(1, np.int32)
    layer.forward(made.x, ids, made.weights, status=status)
    assert status[0] == 1


def test_out_plan_and_no_tokens() -> None:
    made = Layer(3)
    layer = made.make()
    plan = layer.plan(64)
    assert plan.max_tokens == 64 and plan.workspace_bytes > 0 and plan.kernel
    out = np.full((TOKENS, HIDDEN), np.nan, np.float32)
    assert layer.forward(made.x, made.ids, made.weights, out=out, plan=plan) is out
    np.testing.assert_array_equal(out, layer.forward(made.x, made.ids, made.weights, out_dtype="f32"))
    assert layer.forward(made.x[:0], made.ids[:0], made.weights[:0]).shape == (0, HIDDEN)


def test_threads() -> None:
    """The GIL is released, and calls do not share their scratch memory."""
    made = Layer(4)
    layer = made.make()
    due = layer.forward(made.x, made.ids, made.weights)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(layer.forward(made.x, made.ids, made.weights))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for y in found:
        np.testing.assert_array_equal(y, due)


def test_weights_are_views_that_stay_alive() -> None:
    made = Layer(5)
    layer = made.make(backend="reference", activations="bf16")
    due = layer.forward(made.x, made.ids, made.weights)
    layer.update_weights(Layer(6).experts())
    assert rel_l2(layer.forward(made.x, made.ids, made.weights), due.astype(np.float32)) > 0.5
    layer.update_weights(made.experts())
    np.testing.assert_array_equal(layer.forward(made.x, made.ids, made.weights), due)


def test_rule_of_block_scales() -> None:
    made = Layer(8)
    exact = made.make(activations="bf16").forward(made.x, made.ids, made.weights).astype(np.float32)
    errors = {}
    for rule in ("amax", "four-over-six", "mse"):
        layers = [made.make(activation_rule=rule, backend=backend) for backend in ("cpu", "reference")]
        assert all(layer.activation_rule == rule for layer in layers)
        results = [layer.forward(made.x, made.ids, made.weights).astype(np.float32) for layer in layers]
        assert rel_l2(results[0], results[1]) < 1e-2
        errors[rule] = rel_l2(results[0], exact)
    assert errors["mse"] < errors["amax"] and errors["four-over-six"] < errors["amax"]
    with pytest.raises(fourfold.InvalidArgumentError, match="activation_rule for bf16 activations"):
        made.make(activation_rule="mse", activations="bf16")
    with pytest.raises(fourfold.InvalidArgumentError, match="activation_rule: expected amax, .* found 'max'"):
        made.make(activation_rule="max")


def test_what_is_refused() -> None:
    made = Layer()
    layer = made.make()
    with pytest.raises(fourfold.InvalidArgumentError, match="x"):
        layer.forward(made.x[:, :32], made.ids, made.weights)
    with pytest.raises(fourfold.InvalidArgumentError, match=r"expected \[3, 64\]"):
        layer.forward(made.x, made.ids, made.weights[:3])
    with pytest.raises(fourfold.InvalidArgumentError, match="x"):
        layer.forward(made.x.astype(np.float32), made.ids, made.weights)
    with pytest.raises(fourfold.InvalidArgumentError, match="down: expected 8 entries"):
        fourfold.expert_weights(gate=made.gate, up=made.up, down=made.down[:-1])
    with pytest.raises(fourfold.Error, match="swish"):
        made.make(activation="swish")
    with pytest.raises(fourfold.Error, match="sm12"):
        made.make(backend="sm12")
    with pytest.raises(fourfold.InvalidArgumentError):
        made.make(x_scale="static", intermediate_scale="static")  # there are no input scales


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt-oss", "mixtral"])
def test_checkpoints(synthesized: Callable[[str], Path], family: str) -> None:
    folder = synthesized(family)
    checkpoint = fourfold.open_checkpoint(folder / "nvfp4")
    assert checkpoint.family == family and checkpoint.layers == [0]
    x = np.random.default_rng(7).normal(size=(5, HIDDEN)).astype(ml_dtypes.bfloat16)
    router = checkpoint.load_router(0)
    ids, weights = router.route(x)
    assert ids.shape == (5, router.top_k) and (ids < 8).all()
    results = [
        checkpoint.make_layer(0, activations="bf16", backend=backend).forward(x, ids, weights).astype(np.float32)
        for backend in BACKENDS
    ]
    assert rel_l2(results[0], results[-1]) < 1e-2
    # The original is what was quantized; gpt-oss's is MXFP4, whose cast is exact.
    original = fourfold.Checkpoint(folder / "original").make_layer(0, activations="bf16", backend="reference")
    lost = rel_l2(results[-1], original.forward(x, ids, weights).astype(np.float32))
    assert lost == 0.0 if family == "gpt-oss" else 0.01 < lost < 0.3


def test_expert_subset(synthesized: Callable[[str], Path]) -> None:
    checkpoint = fourfold.Checkpoint(synthesized("qwen3-moe") / "nvfp4")
    found = checkpoint.load_experts(0, experts=[1, 5])
    assert found.expert_ids == [1, 5] and found.scheme == "nvfp4"
    layer = checkpoint.make_layer(0, experts=[1, 5], activations="bf16")
    whole = checkpoint.make_layer(0, activations="bf16")
    x = np.ones((1, HIDDEN), ml_dtypes.bfloat16)
    ids, weights = np.array([[0, 1]], np.int32), np.ones((1, 2), np.float32)
    y = whole.forward(x, np.array([[1, 5]], np.int32), weights)
    np.testing.assert_array_equal(layer.forward(x, ids, weights), y)


def test_missing_things(synthesized: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(fourfold.NotFoundError, match="expected a model directory"):
        fourfold.Checkpoint(tmp_path / "none")
    with pytest.raises(fourfold.NotFoundError, match="layer 3"):
        fourfold.Checkpoint(synthesized("mixtral") / "nvfp4").make_layer(3)


def test_layertest(synthesized: Callable[[str], Path]) -> None:
    folder = synthesized("qwen3-moe")
    report = fourfold.layertest(folder / "nvfp4", folder / "original", inputs=folder / "inputs.safetensors")
    assert report.is_fine and report.verdict == "fine" and not report.findings, report
    assert 0.98 < report.checkpoint["weights"].cosine < 1.0 and report.kernel_stages["l1"].rel_l2 < 1e-2
    x = np.random.default_rng(0).normal(size=(4, HIDDEN)).astype(ml_dtypes.bfloat16)
    given = fourfold.layertest(folder / "nvfp4", inputs={"x": x}, activations="bf16")
    assert given.is_fine and given.checkpoint == {}
    with pytest.raises(fourfold.Error, match="expected a model directory"):
        fourfold.layertest(folder / "none")
