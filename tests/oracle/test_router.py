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
ROUTERS: dict[str, dict] = {
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


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name: str) -> None:
    tensors = random_inputs(10)
    tensors["x"] = tensors["x"][:0]
    assert check(tensors, **ROUTERS[name])["topk_ids"].shape == (0, ROUTERS[name]["top_k"])


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"scaling_factor": 2.5}], ids=str)
@pytest.mark.parametrize("score", oracle.SCORES)
def test_one_expert(score: str, options: dict) -> None:
    tensors = random_inputs(20)
    tensors["weight"] = tensors["weight"][:1]
    found = check(tensors, score=score, top_k=1, **options)
    assert not np.any(found["topk_ids"])


@pytest.mark.parametrize("name", ROUTERS)
def test_every_expert(name: str) -> None:
    """top-k is all that can be selected."""
    options = ROUTERS[name] | {"top_k": EXPERTS}
    if "groups" in options:
        options["top_k"] = EXPERTS * options["top_groups"] // options["groups"]
    check(random_inputs(21), **options)


@pytest.mark.parametrize("name", ROUTERS)
def test_ties_of_biased_scores(name: str) -> None:
    """Scores that differ and biases that make them equal, or nearly: float32 sums decide, then the index."""
    tensors = random_inputs(22)
    tensors["x"] = np.repeat(tensors["x"][:1], TOKENS, axis=0)
    scores = oracle.scores_of(ROUTERS[name]["score"], oracle.logits_of(tensors["x"], tensors["weight"], None)[0])
    tensors["correction_bias"] = np.float32(1) - scores
    check(tensors, **ROUTERS[name])
    tensors["correction_bias"] = np.float32(1024) - scores  # hides differences below 2^-14
    check(tensors, **ROUTERS[name])


@pytest.mark.parametrize("top_groups", [1, 2, 3, 8])
@pytest.mark.parametrize("groups", [2, 4, 8, 16, 32])
def test_groups(groups: int, top_groups: int) -> None:
    """Of every size, down to one expert a group, with ties between groups."""
    top_groups = min(top_groups, groups)
    options = {"score": "sigmoid", "top_k": min(3, EXPERTS // groups * top_groups)}
    options |= {"groups": groups, "top_groups": top_groups}
    tensors = random_inputs(23) | {"correction_bias": np.linspace(-1, 1, EXPERTS, dtype=np.float32)}
    check(tensors, **options)
    tensors["weight"] = np.concatenate([tensors["weight"][: EXPERTS // 2]] * 2)
    del tensors["correction_bias"]
    check(tensors, **options)


@pytest.mark.parametrize("name", ROUTERS)
def test_zeros_of_either_sign_tie(name: str) -> None:
    """Logits of -0 and +0: equal, so that the index decides."""
    tensors = random_inputs(24)
    tensors["weight"] = np.zeros_like(tensors["weight"])
    tensors["bias"] = np.where(np.arange(EXPERTS) % 2, 0.0, -0.0).astype(np.float32)[::-1].copy()
    found = check(tensors, **ROUTERS[name])
    assert np.array_equal(found["topk_ids"][0], np.arange(ROUTERS[name]["top_k"]))


@pytest.mark.parametrize("name", ROUTERS)
def test_nan_in_a_token(name: str) -> None:
    """All of its logits are NaN: the lowest indices, with weights of NaN. Other tokens don't notice."""
    tensors = random_inputs(25)
    tensors["x"][3, 5] = np.nan
    found = check_with_nan(tensors, **ROUTERS[name])
    assert np.array_equal(np.isnan(found["topk_weights"]).all(axis=1), np.arange(TOKENS) == 3)


@pytest.mark.parametrize("expert", [0, 7, EXPERTS - 1])
@pytest.mark.parametrize("name", ROUTERS)
def test_nan_logit_of_an_expert(name: str, expert: int) -> None:
    """It loses to every number. A softmax over all experts is NaN throughout then."""
    tensors = random_inputs(26) | {"bias": np.zeros(EXPERTS, np.float32)}
    tensors["bias"][expert] = np.nan
    found = check_with_nan(tensors, **ROUTERS[name])
    if ROUTERS[name]["score"] != "softmax":
        assert not np.any(found["topk_ids"] == expert) and np.all(np.isfinite(found["topk_weights"]))


@pytest.mark.parametrize("name", ROUTERS)
def test_infinite_logits(name: str) -> None:
    tensors = random_inputs(27) | {"bias": np.zeros(EXPERTS, np.float32)}
    tensors["bias"][5] = -np.inf
    check_with_nan(tensors, **ROUTERS[name])
    tensors["bias"][5] = np.inf
    check_with_nan(tensors, **ROUTERS[name])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_unusable_experts_do_not_let_others_groups_in(value: float) -> None:
    """Only the best groups take part, even where what is left in them is NaN or -inf."""
    options = {"score": "sigmoid", "top_k": 8, "groups": 4, "top_groups": 1}
    bias = np.zeros(EXPERTS, np.float32)
    bias[8:16] = 5
    bias[9] = value
    found = check_with_nan(random_inputs(28) | {"correction_bias": bias}, **options)
    assert np.all(found["topk_ids"] // 8 == 1)


def check_with_nan(tensors: dict[str, np.ndarray], **options) -> dict[str, np.ndarray]:
    """As `check`, where NaN is due too."""
    found = run_driver("route", tensors, **{k: int(v) if isinstance(v, bool) else v for k, v in options.items()})
    logits = oracle.logits_of(tensors["x"], tensors["weight"], tensors.get("bias"))
    assert np.array_equal(found["logits"], logits, equal_nan=True)
    ids, weights = oracle.route(logits, **options, correction_bias=tensors.get("correction_bias"))
    assert np.array_equal(found["topk_ids"], ids)
    assert np.array_equal(np.isnan(found["topk_weights"]), np.isnan(weights))
    assert not np.any(np.abs(found["topk_weights"] - weights) > ULP * np.abs(weights))
    return found


@pytest.mark.parametrize("renormalise", [True, False])
def test_hash_routing_keeps_the_table(renormalise: bool) -> None:
    """Duplicates and any order, whatever the scores say."""
    table = np.random.default_rng(29).integers(0, EXPERTS, (50, 6))
    table[3] = 4
    token_ids = np.arange(TOKENS, dtype=np.int64) % 50
    tensors = random_inputs(29) | {"experts_of_token": table, "token_ids": token_ids}
    options = ROUTERS["deepseek-v4"] | {"renormalise": renormalise}
    assert np.array_equal(check(tensors, given_ids=table[token_ids], **options)["topk_ids"], table[token_ids])


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
