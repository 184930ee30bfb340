"""Where layertest's rules come from: families by config.json, or --activation, --router, --weight-on-input
and --gate-up-order; and that nothing is guessed and nothing ignored (docs/formats.md, section 4).
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from checkpoints import EXPERTS, HIDDEN, INNER, NVFP4, QWEN, Tensor, Tensors, zeros
from command import (
    Result,
    assert_finding,
    assert_fine,
    assert_refused,
    assert_usage,
    fact,
    layertest,
    report_of,
    run,
)
from test_synthesize import read_model

BLOCK = "model.layers.0.mlp."
ROUTER = {
    f"{BLOCK}gate.weight": Tensor.of(np.random.default_rng(11).standard_normal((EXPERTS, HIDDEN), np.float32))
}
ROUTED = NVFP4.tensors | ROUTER


def write(directory: Path, tensors: Tensors = ROUTED, **config: object) -> Path:
    return ck.write_single(directory, tensors, NVFP4.config | config)


def notes(result: Result) -> list[str]:
    return re.findall(r"^note +(.*)$", result.stdout, re.MULTILINE)


def x_alone(path: Path, **others: np.ndarray) -> Path:
    tensors = {"x": ck.inputs()["x"]} | {name: Tensor.of(array) for name, array in others.items()}
    return ck.write_inputs(path, tensors)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 under Qwen3-MoE's names, with a router."""
    return write(tmp_path_factory.mktemp("routed"))


# ---- --activation ----

ACTIVATIONS = {
    "swiglu": "silu(g) * u",
    "swiglu,limit=10": "silu(min(g, 10)) * clamp(u, -10, 10)",
    "swiglu,alpha=1.702,beta=1,limit=7": "(clamp(u, -7, 7) + 1) * g' * sigmoid(1.702 g'), g' = min(g, 7)",
    "swiglu,limit=7,beta=1,alpha=1.702": "(clamp(u, -7, 7) + 1) * g' * sigmoid(1.702 g'), g' = min(g, 7)",
    "swiglu-step,limit=3": "min(silu(g), 3) * clamp(u, -3, 3)",
    "geglu": "gelu(g) * u",
    "geglu-tanh": "gelu_tanh(g) * u",
}


@pytest.mark.parametrize(("text", "formula"), ACTIVATIONS.items(), ids=ACTIVATIONS)
def test_activation(routed: Path, text: str, formula: str) -> None:
    """It is what the report prints, and that it was given."""
    result = layertest(routed, "--activation", text, "--activation-scale", "dynamic-token")
    assert_fine(result)
    assert fact(result, "activation") == f"{formula} (--activation)"


def test_activation_with_another_factor_than_silus(routed: Path) -> None:
    """The formula that is printed is the one that is computed."""
    result = layertest(routed, "--activation", "swiglu,alpha=1.5", "--activation-scale", "dynamic-token")
    assert_fine(result)
    assert "sigmoid(1.5 g" in fact(result, "activation") and "g' = g *" not in fact(result, "activation")


def test_activation_changes_the_figures(tmp_path: Path, routed: Path) -> None:
    """Every function has its own, with clamps that bite; the family's is the default."""

    def figures(*given: str) -> dict:
        report = report_of(tmp_path, routed, *given, "--activation-scale", "dynamic-token")
        return report["comparisons"]["activations"]

    texts = [
        "swiglu",
        "swiglu,limit=1",
        "swiglu,alpha=1.702,beta=1,limit=1",
        "swiglu-step,limit=1",
        "geglu",
        "geglu-tanh",
    ]
    found = [figures("--activation", text) for text in texts]
    assert found[0] == figures()  # Qwen3-MoE's
    assert len({figure["activation"]["rel_l2"] for figure in found}) == len(texts)


BAD_ACTIVATIONS = {
    "relu": "swiglu-step",
    "SWIGLU": "geglu-tanh",
    "swiglu,": "key=value",
    ",swiglu": "expected",
    "swiglu,limit": "key=value",
    "swiglu,limit=": "limit",
    "swiglu,limit=x": "limit",
    "swiglu,limit=0": "positive",
    "swiglu,limit=-1": "positive",
    "swiglu,limit=nan": "limit",
    "swiglu,limit=inf": "limit",
    "swiglu,alpha=1e400": "alpha",
    "swiglu,limit=7 ": "limit",
    "swiglu;limit=7": "expected",
    "swiglu,gamma=1": "gamma",
    "swiglu-step,alpha=1": "alpha",
    "geglu,limit=3": "limit",
    "silu,alpha=1": "alpha",
    "swiglu,limit=3,limit=4": "once",
}


@pytest.mark.parametrize(("text", "part"), BAD_ACTIVATIONS.items(), ids=BAD_ACTIVATIONS)
def test_activation_that_makes_no_sense(routed: Path, text: str, part: str) -> None:
    assert_usage(layertest(routed, "--activation", text), "activation", part)


@pytest.mark.parametrize("text", ["silu", "gelu", "relu2"])
def test_activation_without_a_gate_for_experts_that_have_one(routed: Path, text: str) -> None:
    assert_refused(layertest(routed, "--activation", text), f"{BLOCK}experts.", "gate", "expected", "found")


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """Nemotron-like experts: the functions without a gate run, those with one are refused."""
    tensors = {name: t for name, t in ROUTED.items() if ".gate_proj." not in name}
    directory = write(tmp_path / "nvfp4", tensors)
    formulas = {"relu2": "relu(u)^2", "silu": "silu(u)", "gelu": "gelu(u)"}
    for text, formula in formulas.items():
        result = layertest(directory, "--activation", text, "--activation-scale", "dynamic-token")
        assert_fine(result)
        assert fact(result, "activation").startswith(formula)
    for given in ((), ("--activation", "swiglu"), ("--activation", "geglu")):
        assert_refused(layertest(directory, *given), f"{BLOCK}experts.", "gate", "expected", "found")


# ---- --router ----

ROUTERS = {
    "softmax": "softmax, top-2, renormalised",
    "softmax,top-k=3": "softmax, top-3, renormalised",
    "softmax,renormalise=no": "softmax, top-2",
    "softmax-of-top-k": "softmax-of-top-k, top-2",
    "sigmoid,scale=2.5": "sigmoid, top-2, renormalised, x 2.5",
    "sqrt-softplus,top-k=1,renormalise=yes,scale=0.5": "sqrt-softplus, top-1, renormalised, x 0.5",
    "sigmoid,groups=2,top-groups=1": "sigmoid, top-2 in the best 1 of 2 groups, renormalised",
}


@pytest.mark.parametrize(("text", "rule"), ROUTERS.items(), ids=ROUTERS)
def test_router(routed: Path, text: str, rule: str) -> None:
    result = layertest(routed, "--router", text)
    assert_fine(result)
    assert fact(result, "input").endswith(f"routing: {BLOCK}gate: {rule}")


BAD_ROUTERS = {
    "tanh": "sqrt-softplus",
    "softmax,": "expected",
    "softmax,top-k": "expected",
    "softmax,top-k=0": "top-k",
    "softmax,top-k=-1": "top-k",
    "softmax,top-k=2.5": "top-k",
    "softmax,top-k=x": "top-k",
    "softmax,top-k=99999999999999999999": "top-k",
    "softmax,scale=0": "scale",
    "softmax,scale=-1": "scale",
    "softmax,scale=nan": "scale",
    "softmax,scale=inf": "scale",
    "softmax,groups=0,top-groups=1": "groups",
    "softmax,renormalise=maybe": "renormalise",
    "softmax,foo=1": "foo",
    "softmax,top-k=2,top-k=3": "once",
}


@pytest.mark.parametrize(("text", "part"), BAD_ROUTERS.items(), ids=BAD_ROUTERS)
def test_router_that_makes_no_sense(routed: Path, text: str, part: str) -> None:
    assert_usage(layertest(routed, "--router", text), "router", part)


@pytest.mark.parametrize(
    "text",
    [
        "softmax,top-k=5",
        "softmax,groups=3,top-groups=1",
        "softmax,groups=2,top-groups=3",
        "softmax,top-k=3,groups=2,top-groups=1",
    ],
)
def test_router_that_does_not_fit_the_experts(routed: Path, text: str) -> None:
    """It was given on the command line, so config.json is not to blame."""
    result = layertest(routed, "--router", text)
    assert_refused(result, "--router", "expected", "found")
    assert "config.json" not in result.stderr


def test_router_without_a_router_in_the_checkpoint(tmp_path: Path) -> None:
    directory = write(tmp_path / "nvfp4", NVFP4.tensors)
    assert_refused(
        layertest(directory, "--router", "softmax"), "--router", f"{BLOCK}gate.weight", "expected", "found"
    )


def test_weight_on_input(tmp_path: Path, routed: Path) -> None:
    """Said in the report, and other numbers from the first stage on."""
    result = layertest(routed, "--weight-on-input")
    assert_fine(result)
    assert "weight on the expert's input" in fact(result, "input")
    plain, weighted = (
        report_of(tmp_path, routed, *given)["comparisons"]["activations"]
        for given in ((), ("--weight-on-input",))
    )
    assert all(plain[stage]["rel_l2"] != weighted[stage]["rel_l2"] for stage in plain)


# ---- --gate-up-order ----

FUSED_ORIGINAL = ck.fused_model(ck.nvfp4_experts(), QWEN, "BF16")


def reordered(order: str) -> Tensors:
    """The fused original with its rows of gate and up in another order."""
    name = f"{BLOCK}experts.gate_up_proj"
    array = FUSED_ORIGINAL.tensors[name].array()
    gate, up = np.split(array, 2, axis=1)
    if order == "interleaved":
        array = np.stack([gate, up], axis=2).reshape(array.shape)
    elif order == "up-first":
        array = np.concatenate([up, gate], axis=1)
    return FUSED_ORIGINAL.tensors | {name: Tensor.of(array)}


@pytest.mark.parametrize("given", ["gate-first", "up-first", "interleaved"])
@pytest.mark.parametrize("order", ["gate-first", "up-first", "interleaved"])
def test_gate_up_order(tmp_path: Path, order: str, given: str) -> None:
    """Rows are taken as they are said to lie: right, and nothing is lost; wrong, and it is a finding."""
    nvfp4 = write(tmp_path / "nvfp4", NVFP4.tensors)
    original = ck.write_single(tmp_path / "original", reordered(order), FUSED_ORIGINAL.config)
    result = layertest(nvfp4, "--original", original, "--gate-up-order", given)
    if order == given:
        assert_fine(result)
        assert (order in fact(result, "original")) == (order != "gate-first")
    else:
        assert_finding(result, "verdict: checkpoint")
    without = layertest(nvfp4, "--original", original)  # the family's: gate first
    assert without.code == (0 if order == "gate-first" else 3), str(without)


@pytest.mark.parametrize("order", ["", "foo", "Interleaved", "gate_first"])
def test_gate_up_order_that_is_none(routed: Path, order: str) -> None:
    assert_usage(layertest(routed, "--gate-up-order", order), "--gate-up-order", "interleaved")


def test_gate_up_order_of_an_unknown_family(tmp_path: Path, input_file: Path) -> None:
    """Numbers don't tell how rows lie: it has to be said."""
    nvfp4 = write(tmp_path / "nvfp4", NVFP4.tensors)
    config = FUSED_ORIGINAL.config | {"model_type": "mystery"}
    original = ck.write_single(tmp_path / "original", FUSED_ORIGINAL.tensors, config)
    given = ("--original", original, "--input", input_file)
    assert_refused(layertest(nvfp4, *given), original, "--gate-up-order", "expected", "found")
    assert_fine(layertest(nvfp4, *given, "--gate-up-order", "gate-first", "--activation", "swiglu"))


# ---- families that are not known ----

UNKNOWN = [{"model_type": "mystery"}, {"model_type": "mystery", "architectures": ["Qwen3MoeForCausalLM"]}]
UNKNOWN += [
    {"model_type": None, "architectures": ["MysteryForCausalLM"]},
    {"model_type": None},
    {"model_type": ""},
]


@pytest.mark.parametrize("config", UNKNOWN, ids=str)
def test_unknown_family(tmp_path: Path, config: dict) -> None:
    """Refused with all that is known and needed; with that, it runs."""
    directory = write(tmp_path / "nvfp4", **config)
    needed = (
        "--activation",
        "--router",
        "--input",
        "qwen3-moe",
        "deepseek-v4",
        "nemotron-h",
        "expected",
        "found",
    )
    assert_refused(layertest(directory), directory / "config.json", *needed)
    assert_refused(layertest(directory, "--router", "softmax"), directory, "--activation")
    assert_refused(layertest(directory, "--activation", "swiglu"), directory, "--router", "--input")
    result = layertest(directory, "--activation", "swiglu", "--router", "softmax,renormalise=no")
    assert_fine(result)
    known = layertest(write(tmp_path / "known", norm_topk_prob=False))
    stages = re.compile(r"^  (?:activations)? +\w+ +[\d.]+ .*$", re.MULTILINE)
    assert stages.findall(result.stdout) == stages.findall(known.stdout) != []


def test_family_by_architecture(tmp_path: Path) -> None:
    """Where there is no model_type."""
    directory = write(tmp_path / "nvfp4", model_type=None, architectures=["Qwen3MoeForCausalLM"])
    assert fact(layertest(directory), "family") == "qwen3-moe"


@pytest.mark.parametrize("norm", [True, False, None])
def test_renormalisation_of_a_family(tmp_path: Path, norm: bool | None) -> None:
    """norm_topk_prob; Qwen3-MoE's default is false."""
    result = layertest(write(tmp_path / "nvfp4", norm_topk_prob=norm))
    assert fact(result, "input").endswith("renormalised" if norm else "top-2")


# ---- input scales that calibration left out ----


def test_unusable_input_scales_are_all_named(tmp_path: Path) -> None:
    """One infinite, one zero, one missing: each by its expert, and the way around it."""
    tensors = dict(ROUTED)
    tensors[f"{BLOCK}experts.0.up_proj.input_scale"] = Tensor.of(np.array(np.inf, np.float32))
    tensors[f"{BLOCK}experts.1.down_proj.input_scale"] = Tensor.of(np.array(0, np.float32))
    del tensors[f"{BLOCK}experts.3.gate_proj.input_scale"]
    directory = write(tmp_path / "nvfp4", tensors)
    named = [f"{BLOCK}experts.{e}" for e in (0, 1, 3)] + ["up (inf)", "down (0)", "gate (absent)"]
    refused = layertest(directory)
    assert_refused(refused, "input_scale", *named, "--activation-scale dynamic-token")
    assert f"{BLOCK}experts.2" not in refused.stderr
    for policy in ("static", "max-over-experts", "dynamic-token,static", "static,dynamic-tensor"):
        assert_refused(layertest(directory, "--activation-scale", policy), "input_scale", "expected", "found")
    result = layertest(directory, "--activation-scale", "dynamic-token")
    assert_fine(result)
    scales = "scale of x dynamic-token, of the intermediate dynamic-token (--activation-scale)"
    assert scales in fact(result, "staging")
    assert_fine(layertest(directory, "--activation-scale", "dynamic-tensor"))


# ---- tensors that nothing reads ----

STRANGERS = [
    "foo",
    "norm.weight",
    "fc1_latent_proj.weight",
    "expert_bias",
    "experts.0.gate_proj.g_idx",
    "experts.0.gate_proj.weight_zero_point",
    "experts.0.gate_proj.pre_quant_scale",
    "experts.0.norm.weight",
    "experts.9x.up_proj.weight",
    "experts.bias",
    "experts.gate_up_proj_bias",
    "shared_experts.norm.weight",
    "shared_expert.down_proj.foo",
    "shared_expert_gate.weight",
    "shared_expert_gate.bias",
    "gate.foo",
    "gate.weight_scale",
    "router.scale",
    "router.weight",
    "router.bias",
    "gate.bias",
    "gate.e_score_correction_bias",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_tensor_that_nothing_reads(tmp_path: Path, name: str) -> None:
    """Under the MoE block every tensor has a meaning, or the layer is refused by its name: Qwen3-MoE's router
    has no biases, and one name.
    """
    shapes = {"router.weight": (EXPERTS, HIDDEN), "shared_expert_gate.weight": (1, HIDDEN)}
    tensors = ROUTED | {BLOCK + name: zeros("F32", *shapes.get(name, (EXPERTS,)))}
    assert_refused(
        layertest(write(tmp_path / "nvfp4", tensors)), BLOCK + name.split(".")[0], "expected", "found"
    )


# ---- hash routing ----


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V4, whose layers 0 to 2 are hash-routed and whose layer 3 is not."""
    folder = tmp_path_factory.mktemp("hashed") / "a"
    shape = f"{EXPERTS},{HIDDEN},{INNER},2"
    assert_fine(run("synthesize", folder, "--family", "deepseek-v4", "--shape", shape, "--layers", "4"))
    return folder / "nvfp4"


def test_hash_routed_layer_needs_token_ids(tmp_path: Path, hashed: Path) -> None:
    alone = x_alone(tmp_path / "x.safetensors")
    assert_refused(layertest(hashed, "--input", alone), alone, "token_ids", "topk_ids", "expected", "found")
    assert_fine(layertest(hashed, "--layer", "3", "--input", alone))
    for dtype in (np.int64, np.int32):
        ids = x_alone(tmp_path / "ids.safetensors", token_ids=np.arange(12, dtype=dtype))
        result = layertest(hashed, "--input", ids)
        assert_fine(result)
        assert "by token id" in fact(result, "input")
    # A routing in the input needs no table, and made-up x has made-up token ids.
    assert_fine(layertest(hashed, "--input", ck.write_inputs(tmp_path / "routed.safetensors")))
    assert_fine(layertest(hashed))


def test_token_ids_choose_the_experts(tmp_path: Path, hashed: Path) -> None:
    """Not the order of tokens, not x: the same x with other ids gives other figures."""
    first, second = (
        report_of(
            tmp_path,
            hashed,
            "--input",
            x_alone(tmp_path / "x.safetensors", token_ids=np.arange(begin, begin + 12)),
        )
        for begin in (0, 100)
    )
    out = [report["comparisons"]["activations"]["out"]["rel_l2"] for report in (first, second)]
    assert out[0] != out[1]


BAD_TOKEN_IDS = {
    "too-few": np.arange(11),
    "too-many": np.arange(13),
    "rank-2": np.arange(12)[None],
    "floats": np.arange(12, dtype=np.float32),
    "negative": np.arange(12) - 1,
    "beyond": np.arange(12) + 100_000,
}


@pytest.mark.parametrize("ids", BAD_TOKEN_IDS.values(), ids=BAD_TOKEN_IDS)
def test_bad_token_ids(tmp_path: Path, hashed: Path, ids: np.ndarray) -> None:
    """The input's, so its file is named."""
    path = x_alone(tmp_path / "x.safetensors", token_ids=ids)
    assert_refused(layertest(hashed, "--input", path), path, "token", "expected", "found")


def test_damaged_hash_table(tmp_path: Path, hashed: Path) -> None:
    """Another shape or dtype, an expert that is not there."""
    tensors = read_model(hashed)
    config = json.loads((hashed / "config.json").read_text())
    name = "layers.0.ffn.gate.tid2eid"
    table = tensors[name].array()
    wrong = table.copy()
    wrong[3, 1] = EXPERTS
    below = table.copy()
    below[0, 0] = -1
    for tensor in map(Tensor.of, (table[:, :1], table[None], table.astype(np.float32), wrong, below)):
        directory = ck.write_single(tmp_path / "m", tensors | {name: tensor}, config)
        assert_refused(layertest(directory), directory, name, "expected", "found")


# ---- routers of families ----


def test_family_whose_router_has_a_correction_bias(tmp_path: Path) -> None:
    """DeepSeek-V3 without it: refused by name, not routed without."""
    config = {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, "n_routed_experts": EXPERTS}
    directory = write(tmp_path / "nvfp4", **config)
    assert_refused(
        layertest(directory), directory, f"{BLOCK}gate.e_score_correction_bias", "expected", "found"
    )
    bias = Tensor.of(np.array([0, 0, 9, 9], np.float32))
    tensors = ROUTED | {f"{BLOCK}gate.e_score_correction_bias": bias}
    result = layertest(write(tmp_path / "biased", tensors, **config))
    assert_fine(result)
    assert "by biased score" in fact(result, "input") and any(
        "2 of 4 experts get no token" in n for n in notes(result)
    )


def test_bf16_router(tmp_path: Path, routed: Path) -> None:
    """Weights of either type; the same values, the same routing."""
    weight = ROUTER[f"{BLOCK}gate.weight"].array().astype(ml_dtypes.bfloat16)
    both = [
        layertest(
            write(tmp_path / name, NVFP4.tensors | {f"{BLOCK}gate.weight": Tensor.of(array)})
        ).stdout.replace(name, "")
        for name, array in (("narrow", weight), ("wide", weight.astype(np.float32)))
    ]
    assert both[0] == both[1]
