"""Routers of the models people run, against the oracle: ids exactly, weights to the last bit of float32 but one.

Weights are float64 expressions rounded to float32 on both sides; libm's exp and log may differ by an ulp of float64,
which moves a float32 rounding in about one of 2^28 cases, by one ulp: 2^-23 relative is allowed, nothing else."""

import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

import router_oracle as oracle
from tensor_file import DriverRefused, run_driver, write_tensors

TOKENS, HIDDEN, EXPERTS = 37, 24, 32
ULP = 2.0**-23

# name -> options of the driver and of the oracle
ROUTERS = {
    "mixtral": {"score": "softmax", "top_k": 2},
    "qwen3": {"score": "softmax", "top_k": 8},
    "qwen3-not-renormalised": {"score": "softmax", "top_k": 8, "renormalise": False},
    "gpt-oss": {"score": "softmax_of_topk", "top_k": 4},
    "deepseek-v3": {"score": "sigmoid", "top_k": 8, "groups": 8, "top_groups": 4, "scaling_factor": 2.5},
    "deepseek-v4": {"score": "sqrt_softplus", "top_k": 6, "scaling_factor": 1.5},
    "llama-4": {"score": "sigmoid", "top_k": 1, "renormalise": False},
}


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16)


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "x": bf16(random.standard_normal((TOKENS, HIDDEN))),
        "weight": bf16(random.standard_normal((EXPERTS, HIDDEN)) * 0.4),
    }


def check(tensors: dict[str, np.ndarray], given_ids: np.ndarray | None = None, **options) -> dict[str, np.ndarray]:
    """Runs the driver and compares; returns what it gave."""
    found = run_driver("route", tensors, **{k: int(v) if isinstance(v, bool) else v for k, v in options.items()})
    logits = oracle.logits_of(tensors["x"], tensors["weight"], tensors.get("bias"))
    assert np.array_equal(found["logits"], logits)
    ids, weights = oracle.route(
        logits, **options, correction_bias=tensors.get("correction_bias"), given_ids=given_ids
    )
    assert np.array_equal(found["topk_ids"], ids)
    assert np.all(np.abs(found["topk_weights"] - weights) <= ULP * np.abs(weights))
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str) -> None:
    check(random_inputs(1), **ROUTERS[name])


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral"])
def test_bias_of_the_logits(name: str) -> None:
    tensors = random_inputs(2) | {"bias": np.linspace(-3, 3, EXPERTS, dtype=np.float32)}
    with_bias = check(tensors, **ROUTERS[name])
    without = check(random_inputs(2), **ROUTERS[name])
    assert not np.array_equal(with_bias["topk_ids"], without["topk_ids"])


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4"])
def test_correction_bias_changes_the_choice_and_no_weight(name: str) -> None:
    """A bias so large that it decides alone: the weights are still those of the unbiased scores."""
    tensors = random_inputs(3) | {"correction_bias": np.arange(EXPERTS, dtype=np.float32) * 100}
    found = check(tensors, **ROUTERS[name])
    assert np.all(np.sort(found["topk_ids"]) == np.arange(EXPERTS - ROUTERS[name]["top_k"], EXPERTS))
    assert np.allclose(found["topk_weights"].sum(axis=1), ROUTERS[name]["scaling_factor"])
    assert np.all(found["topk_weights"] < ROUTERS[name]["scaling_factor"])


def test_groups_with_negative_scores_are_left_out() -> None:
    """Experts outside the best groups are no candidates, even where every selection score is negative."""
    tensors = random_inputs(4) | {"correction_bias": np.full(EXPERTS, -5, np.float32)}
    found = check(tensors, **ROUTERS["deepseek-v3"])
    assert np.all([len(set(ids // 4)) <= 4 for ids in found["topk_ids"]])


@pytest.mark.parametrize("name", ROUTERS)
def test_ties_go_to_the_lower_index(name: str) -> None:
    """All logits equal, then pairs of equal logits."""
    tensors = random_inputs(5)
    tensors["weight"] = np.zeros_like(tensors["weight"])
    found = check(tensors, **ROUTERS[name])
    assert np.array_equal(found["topk_ids"][0], np.arange(ROUTERS[name]["top_k"]))
    tensors["weight"] = np.repeat(random_inputs(5)["weight"][::2], 2, axis=0)
    check(tensors, **ROUTERS[name])


@pytest.mark.parametrize("scale", [1e-3, 60.0])
@pytest.mark.parametrize("name", ROUTERS)
def test_small_and_large_logits(name: str, scale: float) -> None:
    tensors = random_inputs(6)
    tensors["weight"] = bf16(tensors["weight"].astype(np.float32) * scale)
    assert np.all(np.isfinite(check(tensors, **ROUTERS[name])["topk_weights"]))


def test_hash_routing() -> None:
    """DeepSeek-V4, layers 0-2: ids by token id, weights by the same formula."""
    random = np.random.default_rng(7)
    table = np.stack([random.permutation(EXPERTS)[:6] for _ in range(50)]).astype(np.int64)
    token_ids = random.integers(0, 50, TOKENS)
    tensors = random_inputs(7) | {"experts_of_token": table, "token_ids": token_ids}
    found = check(tensors, given_ids=table[token_ids], **ROUTERS["deepseek-v4"])
    assert np.array_equal(found["topk_ids"], table[token_ids])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.full(TOKENS, 50)}, "token id"),
        ({"token_ids": np.zeros(3, np.int64)}, "token ids"),
        ({"experts_of_token": np.full((50, 6), EXPERTS)}, "expert of token"),
    ],
)
def test_hash_routing_refuses(change: dict[str, np.ndarray], message: str) -> None:
    tensors = random_inputs(8)
    tensors |= {"experts_of_token": np.zeros((50, 6), np.int64), "token_ids": np.zeros(TOKENS, np.int64)} | change
    with pytest.raises(DriverRefused, match=message):
        run_driver("route", tensors, **ROUTERS["deepseek-v4"])


@pytest.mark.parametrize("options", [{"top_k": 33}, {"top_k": 0}, {"top_k": 17, "groups": 8, "top_groups": 4}, {"top_k": 2, "groups": 5}])
def test_config_that_does_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(DriverRefused, match="router"):
        run_driver("route", random_inputs(9), score="sigmoid", **options)


def test_no_tokens() -> None:
    tensors = random_inputs(10)
    tensors["x"] = tensors["x"][:0]
    assert run_driver("route", tensors, **ROUTERS["qwen3"])["topk_ids"].shape == (0, 8)


# ---- the router of a checkpoint, as layertest applies it ----


def command(*arguments: str | Path) -> None:
    subprocess.run([os.environ["FOURFOLD_COMMAND"], *map(str, arguments)], check=True, capture_output=True)


def gate_of(directory: Path) -> dict[str, np.ndarray]:
    """The router's tensors of layer 0, by the last part of their name."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, shard in index.items():
        if ".gate." in name:
            with safetensors.safe_open(directory / shard, framework="numpy") as file:
                found[name.rsplit(".", 1)[1]] = file.get_tensor(name)
    return found


@pytest.mark.parametrize(
    ("original", "options"),
    [("mxfp4", {"score": "sqrt_softplus", "scaling_factor": 1.5}), ("bf16", {"score": "softmax"})],
)
def test_layertest_routes_as_the_checkpoint_does(tmp_path: Path, original: str, options: dict) -> None:
    """x alone gives the figures of x with the oracle's ids and weights."""
    command("synthesize", tmp_path / "p", "--shape", "16,128,64,4", "--original", original)
    gate = gate_of(tmp_path / "p" / "nvfp4")
    x = random_inputs(12)["x"][:, :1] * np.ones((1, 128), np.float32)
    x = bf16(x + np.random.default_rng(13).standard_normal(x.shape))
    logits = oracle.logits_of(x, gate["weight"], None)
    ids, weights = oracle.route(logits, top_k=4, correction_bias=gate.get("bias"), **options)
    write_tensors(tmp_path / "x.safetensors", {"x": x})
    write_tensors(tmp_path / "all.safetensors", {"x": x, "topk_ids": ids, "topk_weights": weights})
    reports = []
    for name in ("x", "all"):
        report = tmp_path / f"{name}.json"
        command("layertest", "--nvfp4", tmp_path / "p" / "nvfp4", "--input", tmp_path / f"{name}.safetensors",
                "--activation-scale", "dynamic-token", "--json", report)  # fmt: skip
        reports.append(json.loads(report.read_text()))
    assert "top-4" in reports[0]["facts"]["input"] and reports[0]["notes"] == reports[1]["notes"]
    for stage, figures in reports[0]["comparisons"]["activations"].items():
        # A weight may differ by one ulp of float32, which moves few roundings of y.
        assert figures["rel_l2"] == pytest.approx(reports[1]["comparisons"]["activations"][stage]["rel_l2"], rel=1e-4)
        assert figures["worst_token"] == reports[1]["comparisons"]["activations"][stage]["worst_token"]


# ---- activation variants ----

ACTIVATIONS = {
    "swiglu": {},
    "deepseek-v4": {"kind": "swiglu", "limit": 1.5},
    "gpt-oss": {"kind": "swiglu", "alpha": 1.702, "beta": 1.0, "limit": 2.0},
    "swiglu_step": {"kind": "swiglu_step", "limit": 1.25},
    "geglu": {"kind": "geglu"},
    "geglu_tanh": {"kind": "geglu_tanh"},
    "relu_squared": {"kind": "relu_squared"},
    "silu": {"kind": "silu"},
    "gelu": {"kind": "gelu"},
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    """Bit for bit but for roundings that libm decides: one bf16 ulp, in at most one of 10,000 elements. Clamps
    bite: half of the values lie beyond them."""
    h = bf16(np.random.default_rng(11).standard_normal((64, 400)) * 3)
    options = {"kind": "swiglu"} | ACTIVATIONS[name]
    found = run_driver("swiglu", {"h": h}, **options)["a"]
    expected = oracle.activate(h=h, **options)
    steps = np.abs(found.view(np.int16).astype(np.int32) - expected.view(np.int16))
    assert steps.max() <= 1 and np.sum(steps > 0) <= steps.size // 10_000 + 1
