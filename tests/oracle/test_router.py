"""Routers of the models people run, against the oracle: ids exactly, weights to the last bit of float32 but one.

Weights are float64 expressions rounded to float32 on both sides; libm's exp and log may differ by an ulp of float64,
which moves a float32 rounding in about one of 2^28 cases, by one ulp: 2^-23 relative is allowed, nothing else."""

import ml_dtypes
import numpy as np
import pytest

import router_oracle as oracle
from tensor_file import DriverRefused, run_driver

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
