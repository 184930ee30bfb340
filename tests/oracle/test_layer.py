"""The driver's whole layer against the oracle's, stage by stage: staged x, h, a, staged a, z, y.

Every stage is compared bit for bit but the activation, whose exp comes from another libm. The oracle's stages
after the activation are fed with the driver's own a (teacher forcing), so that one rounding there is not
counted again.
"""

import ml_dtypes
import numpy as np
import pytest

import nvfp4_oracle as oracle
from cases import loud_bf16, random_experts, scalar
from compare import assert_all_same, assert_same
from tensor_file import DriverRefused, Tensors, run_driver

# Two libms' exp in float64 differ by an ulp or so, hence a by at most about 2^-51 relative. That changes the
# bf16 only where a lies that close to a boundary: a bf16 midpoint, or one of the two points half a float32
# ulp beside it (a rounds to float32 first). bf16 steps are at least 2^-8 relative, so the expected share of
# elements is below 3 * 2 * 2^-51 / 2^-8 < 2^-40: about 2^-22 elements of the largest array here. (Moving
# numpy's exp by one ulp either way changes none.) One element by one ulp is tolerated, which is below 1e-4 of
# any array of more than 10^4 elements; the activation in float32 throughout, of which 92 of
# test_swiglu_of_every_gate's elements flip, is not.
TOLERATED_FLIPS = 1

EXPERTS, TOKENS, CHOICES, HIDDEN, INNER = 6, 23, 3, 144, 80
ACCUMULATE: dict[str, type[np.floating]] = {"f32": np.float32, "f64": np.float64}
ACTIVATIONS = ["nvfp4", "nvfp4x2", "fp8", "bf16"]
POLICIES = ["static", "max-over-experts", "dynamic-tensor", "dynamic-token"]

WEIGHTS = random_experts(np.random.default_rng(1), EXPERTS, HIDDEN, INNER)


def assert_same_activation(actual: np.ndarray, expected: np.ndarray) -> None:
    """bf16 arrays that agree but for one ulp in TOLERATED_FLIPS elements; NaN where NaN is due."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    # Sign and magnitude to an integer that counts ulps, +0 one above -0.
    steps = [
        np.where(b >> 15, -1 - (b & 0x7FFF), b & 0x7FFF)
        for b in (actual.view(np.int16), expected.view(np.int16))
    ]
    ulps = np.where(np.isnan(expected), 0, np.abs(steps[0].astype(np.int32) - steps[1]))
    flips, largest = np.sum(ulps > 0), np.max(ulps, initial=0)
    assert largest <= 1 and flips <= TOLERATED_FLIPS, (
        f"a: {flips} of {ulps.size} differ, by up to {largest} bf16 ulps"
    )


def weight_tensors(experts: list[oracle.Expert]) -> Tensors:
    """The experts under the driver's names."""
    tensors = {}
    for e, expert in enumerate(experts):
        for half in ("gate", "up", "down"):
            linear = getattr(expert, half)
            tensors[f"{e}.{half}.codes"] = linear.codes
            tensors[f"{e}.{half}.scales"] = linear.scales
            tensors[f"{e}.{half}.global"] = scalar(linear.global_scale)
            tensors[f"{e}.{half}.input_scale"] = scalar(linear.input_scale)
    return tensors


def random_routing(seed: int, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """ids (T, K) with duplicates and dropped slots, expert 2 left without rows; weights (T, K)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, EXPERTS, (tokens, CHOICES)).astype(np.int32)
    ids[ids == 2] = 3
    return ids, rng.random((tokens, CHOICES), np.float32)


def named(prefix: str, staged: oracle.Staged) -> Tensors:
    """A staging's arrays under the driver's names."""
    return {f"staged_{prefix}_{name}": array for name, array in staged.arrays.items()}


def check_layer(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, accumulate: str = "f32", **options
) -> Tensors:
    """Run the driver's layer, compare all of its stages, and return them."""
    layer = oracle.Layer(WEIGHTS, accumulate=ACCUMULATE[accumulate], **options)
    inputs = {"x": x, "topk_ids": ids, "topk_weights": weights, **weight_tensors(WEIGHTS)}
    result = run_driver("layer", inputs, accumulate=accumulate, **options)

    permutation = oracle.permute(ids, len(WEIGHTS))
    staged_x, h, a = layer.up_to_a(x, permutation)
    stages = {"group_offsets": permutation.group_offsets, "slot_of_row": permutation.slot_of_row}
    stages |= {"status": np.zeros(1, np.int32)}
    stages |= named("x", staged_x) | {"h": h}
    for name, expected in stages.items():
        assert_same(name, result[name], expected)

    assert_same_activation(result["a"], a)
    staged_a, z, y = layer.from_a(result["a"], permutation, weights)
    stages |= {"a": result["a"]} | named("a", staged_a) | {"z": z, "y": y}
    assert_all_same(result, stages)
    return result


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_layer(activations: str, policy: str, limit: float | None) -> None:
    ids, weights = random_routing(1)
    x = loud_bf16(np.random.default_rng(2), TOKENS, HIDDEN)
    check_layer(x, ids, weights, activations=activations, policy=policy, limit=limit)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_layer_accumulated_in_float64(activations: str) -> None:
    ids, weights = random_routing(3)
    x = loud_bf16(np.random.default_rng(4), TOKENS, HIDDEN)
    check_layer(x, ids, weights, activations=activations, policy="dynamic-token", accumulate="f64")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_one_token(activations: str, policy: str) -> None:
    ids, weights = np.array([[4, 4, 0]], np.int32), np.array([[0.5, 0.25, 0.25]], np.float32)
    x = loud_bf16(np.random.default_rng(5), 1, HIDDEN)
    check_layer(x, ids, weights, activations=activations, policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_no_rows(activations: str, policy: str) -> None:
    """Every slot dropped: the result is zeros."""
    weights = np.ones((4, CHOICES), np.float32)
    x = loud_bf16(np.random.default_rng(6), 4, HIDDEN)
    ids = np.full((4, CHOICES), -1, np.int32)
    result = check_layer(x, ids, weights, activations=activations, policy=policy)
    assert_same("y", result["y"], np.zeros((4, HIDDEN), ml_dtypes.bfloat16))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_dropped_tokens_do_not_set_the_global(activations: str) -> None:
    """A token that no expert receives has no part in the tensor's amax; a token of zeros is staged."""
    ids, weights = random_routing(7)
    x = loud_bf16(np.random.default_rng(8), TOKENS, HIDDEN)
    ids[3] = -1
    x[3] = 1e6
    x[5] = 0
    check_layer(x, ids, weights, activations=activations, policy="dynamic-tensor")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_nan_shows_in_its_token(activations: str, policy: str) -> None:
    ids, weights = random_routing(9)
    ids[4] = [0, 1, 5]
    x = loud_bf16(np.random.default_rng(10), TOKENS, HIDDEN)
    x[4, 17] = np.nan
    result = check_layer(x, ids, weights, activations=activations, policy=policy)
    assert np.all(np.isnan(result["y"][4]))


@pytest.mark.parametrize("half", ["gate", "up", "down"])
@pytest.mark.parametrize("unusable", [None, 0.0, np.inf, np.nan])
@pytest.mark.parametrize("policy", ["static", "max-over-experts"])
def test_unusable_input_scale_is_refused(policy: str, unusable: float | None, half: str) -> None:
    """Even for an expert that received no rows (expert 2): the next prompt may reach it."""
    ids, weights = random_routing(11)
    inputs = {
        "x": loud_bf16(np.random.default_rng(12), TOKENS, HIDDEN),
        "topk_ids": ids,
        "topk_weights": weights,
    }
    inputs |= weight_tensors(WEIGHTS)
    if unusable is None:
        del inputs[f"2.{half}.input_scale"]
    else:
        inputs[f"2.{half}.input_scale"] = scalar(unusable)
    with pytest.raises(DriverRefused, match="2"):
        run_driver("layer", inputs, activations="nvfp4", policy=policy, accumulate="f32")


@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_swiglu(limit: float | None) -> None:
    """Gates and ups of all sizes up to bf16's largest, and plain Gaussian ones."""
    rng = np.random.default_rng(13)
    wide = rng.standard_normal((200, 128)) * 2.0 ** rng.integers(-130, 128, (200, 128))
    plain = 4 * rng.standard_normal((200, 128))
    h = np.clip(np.concatenate([wide, plain]), -3e38, 3e38).astype(ml_dtypes.bfloat16)
    result = run_driver("swiglu", {"h": h}, limit=limit)
    assert sorted(result) == ["a"]
    assert_same_activation(result["a"], oracle.swiglu(h, limit))


def test_swiglu_of_every_gate() -> None:
    """Every finite bf16 as gate, with ups that leave it, halve it and turn its sign."""
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    gate = np.repeat(every[np.isfinite(every)][:, None], 4, axis=1)
    up = np.broadcast_to(np.array([1, 0.5, -1.0078125, 3], ml_dtypes.bfloat16), gate.shape)
    h = np.concatenate([gate, up], axis=1)
    assert_same_activation(run_driver("swiglu", {"h": h})["a"], oracle.swiglu(h))


def test_swiglu_of_infinities_without_limit() -> None:
    """IEEE arithmetic carries them: silu(inf) = inf, silu(-inf) = -inf / inf = NaN, NaN stays."""
    values = np.array([np.inf, -np.inf, np.nan, 1, -1, 0], np.float32)
    gate, up = np.meshgrid(values, values)
    h = np.concatenate([gate, up], axis=1).astype(ml_dtypes.bfloat16)
    assert_same_activation(run_driver("swiglu", {"h": h})["a"], oracle.swiglu(h))
