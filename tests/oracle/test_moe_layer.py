"""The driver's layer in all its variants against moe_oracle, stage by stage and bit for bit: weights of every
format, a shared expert, biases, activations, maps of expert numbers, routing weights on the input.

Every layer runs twice, its workspace, taps and result filled with NaN and with zeros beforehand: what is read
before it is written shows. Where another libm's exp decides (the activation, the shared expert's gate) the
oracle goes on with the driver's own numbers, as in test_layer.py, which also derives the tolerance.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest

import moe_oracle as moe
import nvfp4_oracle as oracle
from cases import LOUD, cancelling_weights, loud_bf16, scalar
from compare import assert_all_same, assert_same
from moe_oracle import Activation, Expert, Layer, Projection, SharedExpert
from tensor_file import DriverRefused, Tensors, run_driver
from test_layer import assert_same_activation

# Nothing square; every format's blocks fit, and 128 x 128 tiles are cut short.
EXPERTS, TOKENS, TOP_K, HIDDEN, INNER, SHARED = 5, 17, 3, 160, 96, 224

FORMATS = ["nvfp4", "mxfp4", "fp8-f32", "fp8-e8m0", "bf16"]
ACTIVATIONS = ["nvfp4", "nvfp4x2", "fp8", "bf16"]
POLICIES = ["static", "max-over-experts", "dynamic-tensor", "dynamic-token"]
NAN, ZERO = 255, 0  # what memory is filled with, byte by byte

# Half of the values of h lie beyond these clamps.
VARIANTS = {
    "swiglu": Activation(),
    "deepseek-v4": Activation(limit=1.5),
    "gpt-oss": Activation(alpha=1.702, beta=1.0, limit=2.0),
    "swiglu-step": Activation("swiglu_step", limit=1.25),
    "geglu": Activation("geglu"),
    "geglu-tanh": Activation("geglu_tanh"),
    "relu2": Activation("relu_squared"),
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
}
NOT_GATED = ("relu_squared", "silu", "gelu")


# ---- weights, for the oracle and for the driver ------------------------------------------------------------


@dataclass
class Stored:
    """A matrix as the oracle multiplies by it, and the driver's tensors of it by their last names."""

    projection: Projection
    tensors: Tensors


def stored(rng: np.random.Generator, form: str, rows: int, cols: int, biased: bool = False) -> Stored:
    """Random weights (rows, cols) whose sums depend on their order, with a calibrated input scale."""
    values = cancelling_weights(rng, rows, cols)
    input_scale = np.float32(LOUD / 2688 * 2.0 ** rng.uniform(-4, 4))
    members: dict = {"input_scale": input_scale}
    tensors = {"input_scale": scalar(input_scale)}
    if biased:
        members["bias"] = (4 * rng.standard_normal(rows)).astype(np.float32)
        tensors["bias"] = members["bias"]
    if form == "nvfp4":
        q = oracle.quantize_nvfp4(values, oracle.nvfp4_global_of_tensor(values), modelopt_floor=True)
        projection = moe.nvfp4(q.codes, q.scales, q.global_scale, **members)
        own = {"codes": q.codes, "scales": q.scales, "global": scalar(q.global_scale)}
    elif form == "mxfp4":
        codes, exponents = oracle.quantize_mxfp4(values)
        projection = moe.mxfp4(codes, exponents, **members)
        own = {"codes": codes, "exponents": exponents}
    elif form == "bf16":
        dense = values.astype(ml_dtypes.bfloat16)
        projection, own = moe.dense(dense, **members), {"values": dense}
    else:
        tiles = -(-rows // 128), -(-cols // 128)
        codes = oracle.encode_e4m3(values * 64)
        if form == "fp8-f32":
            scales = rng.uniform(0.5, 2, tiles).astype(np.float32) / 64
            own = {"fp8": codes, "tile_scales": scales}
        else:
            exponents = rng.integers(-8, -4, tiles) + 127
            scales = np.exp2(exponents.astype(np.float32) - 127)
            own = {"fp8": codes, "tile_exponents": exponents.astype(np.uint8)}
        projection = moe.fp8(codes, scales, **members)
    return Stored(projection, tensors | own)


def make_expert(
    rng: np.random.Generator, name: str, form: str, inner: int, gated: bool, biased: bool
) -> tuple[Expert, Tensors]:
    """One expert, and its tensors under the driver's names."""
    shapes = {"gate": (inner, HIDDEN), "up": (inner, HIDDEN), "down": (HIDDEN, inner)}
    halves = {
        half: stored(rng, form, *shape, biased) for half, shape in shapes.items() if gated or half != "gate"
    }
    tensors = {f"{name}.{half}.{key}": t for half, s in halves.items() for key, t in s.tensors.items()}
    gate = halves["gate"].projection if gated else None
    return Expert(gate, halves["up"].projection, halves["down"].projection), tensors


@dataclass
class Case:
    """A layer for the oracle, with its tensors and options for the driver."""

    layer: Layer
    tensors: Tensors
    options: dict[str, object]


def make_case(
    form: str = "nvfp4",
    shared: str | None = None,
    shared_gate: bool = False,
    activation: Activation = Activation(),
    biased: bool = False,
    weight_on_input: bool = False,
    activations: str = "nvfp4",
    policies: tuple[str, str] = ("dynamic-token", "dynamic-token"),
    seed: int = 1,
) -> Case:
    rng = np.random.default_rng(seed)
    gated = activation.kind not in NOT_GATED
    pairs = [make_expert(rng, str(e), form, INNER, gated, biased) for e in range(EXPERTS)]
    experts = [expert for expert, _ in pairs]
    tensors = {name: t for _, own in pairs for name, t in own.items()}
    shared_expert = None
    if shared is not None:
        expert, own = make_expert(rng, "shared", shared, SHARED, gated, biased)
        tensors |= own
        shared_expert = SharedExpert(expert)
        if shared_gate:
            # x is loud: small weights keep the sigmoid away from 0 and 1.
            shared_expert.gate = (rng.standard_normal(HIDDEN) / LOUD).astype(ml_dtypes.bfloat16)
            tensors["shared_gate"] = shared_expert.gate[None]
    layer = Layer(experts, shared_expert, activation, weight_on_input, activations, policies)
    return Case(layer, tensors, driver_options(layer))


def driver_options(layer: Layer) -> dict[str, object]:
    options: dict[str, object] = {
        "activations": layer.activations,
        "x_policy": layer.policies[0],
        "intermediate_policy": layer.policies[1],
        "weight_on_input": int(layer.weight_on_input),
    }
    for prefix in ("", "shared_"):
        options[f"{prefix}kind"] = layer.activation.kind
        for name in ("alpha", "beta", "limit"):
            value = getattr(layer.activation, name)
            options[f"{prefix}{name}"] = None if np.isinf(value) else value
    return options


def make_x(seed: int, tokens: int = TOKENS) -> np.ndarray:
    return loud_bf16(np.random.default_rng(seed), tokens, HIDDEN)


def make_routing(
    seed: int, tokens: int = TOKENS, dtype: type[np.integer] = np.int32
) -> tuple[np.ndarray, np.ndarray]:
    """ids (T, K) with duplicates and dropped slots, expert 2 left without rows; weights (T, K)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, EXPERTS, (tokens, TOP_K)).astype(dtype)
    ids[ids == 2] = 3
    return ids, rng.standard_normal((tokens, TOP_K), np.float32)


# ---- comparison --------------------------------------------------------------------------------------------


def check(
    case: Case,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    local_experts: np.ndarray | None = None,
    **options: object,
) -> Tensors:
    """Run the driver on poisoned and on zeroed memory, compare every stage with the oracle, return them."""
    inputs = {"x": x, "topk_ids": ids, "topk_weights": weights} | case.tensors
    if local_experts is not None:
        inputs["local_experts"] = local_experts
    result, on_zeros = (
        run_driver("layer", inputs, fill=fill, **(case.options | options)) for fill in (NAN, ZERO)
    )
    assert_all_same(on_zeros, result)

    layer = case.layer
    given = {name: result[name] for name in ("a", "shared_a", "shared_z_weight") if name in result}
    run = layer.run(x, ids, weights, local_experts, given)
    _, out_of_range = moe.to_local(ids, local_experts, len(layer.experts))
    y = run.y32 if options.get("out") == "f32" else run.y
    expected = {
        "status": np.array([out_of_range], np.int32),
        "group_offsets": run.permutation.group_offsets,
        "slot_of_row": run.permutation.slot_of_row,
        "y": y,
    } | stages("", run, given["a"])
    assert_same_activation(result["a"], run.a)
    if run.shared is not None:
        expected |= stages("shared_", run.shared, given["shared_a"])
        assert_same_activation(result["shared_a"], run.shared.a)
        # A libm's ulp of float64 moves few float32 roundings, by one ulp: at most 2^-23 relative.
        own_weight, expected["shared_z_weight"] = layer.weigh_shared(x), given["shared_z_weight"]
        assert np.array_equal(np.isnan(given["shared_z_weight"]), np.isnan(own_weight))
        assert not np.any(np.abs(given["shared_z_weight"] - own_weight) > 2.0**-23 * own_weight)
    assert_all_same(result, expected)
    return result


def stages(prefix: str, run: moe.Run, a: np.ndarray) -> Tensors:
    """What the driver taps, under its names."""
    named = {f"staged_x_{name}": array for name, array in run.staged_x.arrays.items()}
    named |= {f"staged_a_{name}": array for name, array in run.staged_a.arrays.items()}
    named |= {"h": run.h, "a": a, "z": run.z}
    return {prefix + name: array for name, array in named.items()}


# ---- shared experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("shared", FORMATS)
def test_shared_expert(shared: str, activations: str, shared_gate: bool) -> None:
    case = make_case(shared=shared, shared_gate=shared_gate, activations=activations)
    result = check(case, make_x(2), *make_routing(3))
    # NVFP4 alone is staged as the routed experts are; other weights see bf16.
    assert ("shared_staged_x_codes" in result) == (shared == "nvfp4" and activations != "bf16")


@pytest.mark.parametrize("policies", [(a, b) for a in POLICIES for b in POLICIES], ids="-".join)
@pytest.mark.parametrize("activations", ["nvfp4", "nvfp4x2"])
def test_shared_expert_under_every_policy(activations: str, policies: tuple[str, str]) -> None:
    case = make_case(shared="nvfp4", shared_gate=True, activations=activations, policies=policies)
    check(case, make_x(4), *make_routing(5))


@pytest.mark.parametrize("policies", [("static", "dynamic-token"), ("dynamic-tensor", "static")], ids="-".join)
@pytest.mark.parametrize("shared", ["nvfp4", "bf16"])
@pytest.mark.parametrize("rule", ["four-over-six", "mse"])
def test_rule_of_block_scales(rule: str, shared: str, policies: tuple[str, str]) -> None:
    """Of the routed experts, and of the shared one where its activations are NVFP4."""
    case = make_case(shared=shared, policies=policies)
    by_amax = check(case, make_x(10), *make_routing(11))
    case.layer.rule = rule
    result = check(case, make_x(10), *make_routing(11), rule=rule)
    assert not np.array_equal(result["staged_x_scales"], by_amax["staged_x_scales"])


@pytest.mark.parametrize("shared", FORMATS)
def test_shared_expert_alone(shared: str) -> None:
    """No slot has an expert here: what is left is the shared expert's output times its weight."""
    case = make_case(shared=shared, shared_gate=True)
    ids, weights = make_routing(6)
    result = check(case, make_x(7), np.full_like(ids, -1), weights, out="f32")
    assert_same("y", result["y"], result["shared_z_weight"][:, None] * result["shared_z"].astype(np.float32))


def test_shared_gate_of_large_logits() -> None:
    """Sigmoids of 0 and 1, and of NaN: that token's result is NaN, and no other."""
    case = make_case(shared="bf16", shared_gate=True)
    case.tensors["shared_gate"] = np.ones((1, HIDDEN), ml_dtypes.bfloat16)
    case.layer.shared.gate = np.ones(HIDDEN, ml_dtypes.bfloat16)
    x = make_x(8)
    x[3] = -x[3]
    x[5, 7] = np.nan
    result = check(case, x, *make_routing(9))
    assert result["shared_z_weight"][0] == 1 and result["shared_z_weight"][3] == 0
    assert np.array_equal(np.isnan(result["y"].astype(np.float32)).any(axis=1), np.arange(TOKENS) == 5)


@pytest.mark.parametrize("half", ["gate", "up", "down"])
@pytest.mark.parametrize("policy", ["static", "max-over-experts"])
def test_shared_expert_without_an_input_scale_is_refused(policy: str, half: str) -> None:
    case = make_case(shared="nvfp4", policies=(policy, policy))
    del case.tensors[f"shared.{half}.input_scale"]
    ids, weights = make_routing(10)
    inputs = {"x": make_x(10), "topk_ids": ids, "topk_weights": weights} | case.tensors
    with pytest.raises(DriverRefused, match="shared"):
        run_driver("layer", inputs, **case.options)


@pytest.mark.parametrize("shared", ["fp8-f32", "bf16"])
def test_shared_expert_that_is_not_nvfp4_needs_no_input_scale(shared: str) -> None:
    case = make_case(shared=shared, policies=("static", "static"))
    case.tensors = {
        name: t
        for name, t in case.tensors.items()
        if not (name.startswith("shared.") and "input_scale" in name)
    }
    check(case, make_x(11), *make_routing(11))


# ---- weights, activations, biases --------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_weights_of_every_format(form: str, activations: str) -> None:
    check(make_case(form, activations=activations), make_x(12), *make_routing(13))


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "biased"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_variants(variant: str, biased: bool) -> None:
    """Routed and shared expert, with and without a gate; the biases are as large as the rest of h."""
    case = make_case(shared="fp8-e8m0", shared_gate=True, activation=VARIANTS[variant], biased=biased)
    x = make_x(14)
    x[:, 0] = x[:, -1] = 1  # no loud channel: h is of the size of clamps and biases
    result = check(case, x, *make_routing(15))
    gated = VARIANTS[variant].kind not in NOT_GATED
    assert result["h"].shape[1] == (2 * INNER if gated else INNER)


@pytest.mark.parametrize("layout", ["row_major", "swizzled"])
def test_swizzled_weight_scales(layout: str) -> None:
    """Padding of the 128x4 layout is NaN here, and never read."""
    case = make_case(shared="nvfp4", shared_gate=True)
    result = check(case, make_x(16), *make_routing(17), layout=layout)
    assert np.all(np.isfinite(result["y"].astype(np.float32)))


@pytest.mark.parametrize("dequantize", [0, 1])
def test_divisors(dequantize: int) -> None:
    """compressed-tensors' global scales: alpha takes the reciprocal, dequantization divides. (A multiplication
    by the reciprocal in its place differs by one float32 ulp, which rounding to bf16 hides here.)
    """
    case = make_case(shared="nvfp4", activations="bf16")
    for name in [name for name in case.tensors if name.endswith(".global")]:
        case.tensors[name.replace(".global", ".divisor")] = case.tensors.pop(name)
    everyone = [*case.layer.experts, case.layer.shared.expert]
    for projection in (p for expert in everyone for p in expert.projections()):
        projection.divisor = True
    if dequantize:
        case = replace(case, layer=case.layer.dequantized())
    check(case, make_x(18), *make_routing(19), dequantize=dequantize)


@pytest.mark.parametrize("shared", [None, *FORMATS])
def test_dequantized_weights(shared: str | None) -> None:
    """layertest's reference in the dequantized weights: the global scale in the values, not in the epilogue."""
    case = make_case(shared=shared, shared_gate=shared is not None, activations="bf16")
    check(replace(case, layer=case.layer.dequantized()), make_x(20), *make_routing(21), dequantize=1)


# ---- routing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_weight_on_input(activations: str, policy: str) -> None:
    """bf16(weight * x) is staged; the output is summed unweighted, the shared expert sees plain x."""
    case = make_case(shared="nvfp4", weight_on_input=True, activations=activations, policies=(policy, policy))
    check(case, make_x(22), *make_routing(23))


# The model has nine experts, this rank five of them, in another order; 8 is mapped to what does not exist.
MAP = np.array([3, -1, 0, 4, -1, 1, 2, -1, EXPERTS], np.int32)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("last", [7, 8, 9, -1], ids=["known", "mapped-astray", "unknown", "absent"])
def test_local_experts(dtype: type[np.integer], last: int) -> None:
    """Ids of the model are mapped; elsewhere, -1, outside the map and astray all count as absent, the last two
    with a status.
    """
    ids = np.random.default_rng(24).integers(-1, 8, (TOKENS, TOP_K)).astype(dtype)
    ids[4] = [0, 0, 3]  # the same expert twice
    ids[5, 1] = last
    weights = make_routing(25)[1]
    case = make_case(shared="bf16")
    result = check(case, make_x(26), ids, weights, MAP)
    assert result["status"][0] == (last in (8, 9))


@pytest.mark.parametrize("stranger", [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), -2])
def test_wide_ids_are_not_truncated_before_the_map(stranger: int) -> None:
    ids, weights = make_routing(27, dtype=np.int64)
    ids[2, 0] = stranger
    assert check(make_case(), make_x(28), ids, weights, MAP)["status"][0] == 1


def test_map_equals_renumbered_ids() -> None:
    """The same experts by the model's numbers and by the rank's: the same result."""
    numbers = np.array([2, 5, 6, 0, 3], np.int32)  # of the model, by the rank's
    ids, weights = make_routing(29)
    case, x = make_case(shared="nvfp4"), make_x(30)
    plain = check(case, x, ids, weights)
    mapped = check(case, x, np.where(ids < 0, -1, numbers[ids]).astype(np.int32), weights, MAP)
    assert_all_same(mapped, plain)


def test_ranks_add_up() -> None:
    """Two ranks' float32 results, the shared expert on one of them: their sum, rounded, is the layer's to one
    rounding of each float32 addition."""
    case, x = make_case(shared="nvfp4", shared_gate=True), make_x(31)
    ids, weights = make_routing(32)
    whole = check(case, x, ids, weights, out="f32")["y"]
    first, second = np.array([0, 1, -1, -1, -1], np.int32), np.array([-1, -1, 0, 1, 2], np.int32)
    parts = []
    for experts, local, with_shared in ((range(2), first, True), (range(2, 5), second, False)):
        names = {f"{e}.": f"{i}." for i, e in enumerate(experts)} | (
            {"shared": "shared"} if with_shared else {}
        )
        tensors = {
            new + name[len(old) :]: t
            for old, new in names.items()
            for name, t in case.tensors.items()
            if name.startswith(old)
        }
        layer = replace(
            case.layer,
            experts=[case.layer.experts[e] for e in experts],
            shared=case.layer.shared if with_shared else None,
        )
        parts.append(check(Case(layer, tensors, case.options), x, ids, weights, local, out="f32")["y"])
    # Each of the K + 1 additions rounds by 2^-24 of what it has summed so far, which is at most the sum of
    # magnitudes; both orders do. The magnitudes: the same layer with absolute values.
    z = np.abs(parts[0]) + np.abs(parts[1])
    bound = 2 * (TOP_K + 1) * 2.0**-24 * (z + np.abs(whole)) + 2.0**-20 * np.abs(whole).max(
        axis=1, keepdims=True
    )
    assert np.all(np.abs(parts[0] + parts[1] - whole) <= bound)


@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("shared", [None, "nvfp4", "fp8-f32"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_output_types(out: str, shared: str | None, activations: str) -> None:
    check(make_case(shared=shared, activations=activations), make_x(33), *make_routing(34), out=out)


@pytest.mark.parametrize("shared", [None, "nvfp4", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_no_tokens(activations: str, policy: str, shared: str | None) -> None:
    case = make_case(
        shared=shared, shared_gate=shared is not None, activations=activations, policies=(policy, policy)
    )
    assert check(case, make_x(35, tokens=0), *make_routing(36, tokens=0))["y"].shape == (0, HIDDEN)


@pytest.mark.parametrize("shared", [None, "nvfp4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_tokens_on_one_expert(policy: str, shared: str | None) -> None:
    """Every slot, so that each token has it three times over."""
    ids, weights = make_routing(37)
    case = make_case(shared=shared, policies=(policy, policy))
    check(case, make_x(38), np.full_like(ids, 4), weights)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_one_token(dtype: type[np.integer]) -> None:
    case = make_case(shared="mxfp4", shared_gate=True, activations="nvfp4x2")
    check(case, make_x(39, tokens=1), np.array([[1, 1, 0]], dtype), np.float32([[0.5, 0.25, -0.25]]))


def test_zeros_keep_their_meaning() -> None:
    """Tokens of +0 and -0, and routing weights of -0: results are zeros, with the sign that sums give."""
    case = make_case(shared="bf16", shared_gate=True)
    x = make_x(40)
    x[0], x[1] = 0.0, -0.0
    ids, weights = make_routing(41)
    weights[2] = -0.0
    check(case, x, ids, weights, out="f32")
