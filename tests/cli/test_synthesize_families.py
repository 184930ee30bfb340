"""`fourfold synthesize --family`: names, dtypes and shapes of a whole MoE layer of every family, and what its
config.json says. The lists follow docs/formats.md, sections 3 and 4.
"""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from command import ERROR, USAGE, assert_fine, assert_usage, layertest, run
from test_synthesize import contents, read_file, read_model

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 4, 64, 96, 2, 24
SHAPE = f"{EXPERTS},{HIDDEN},{INNER},{TOP_K}"
SHARED_INNER = {"deepseek-v4": INNER, "deepseek-v3": INNER, "qwen2-moe": 2 * INNER}
FAMILIES = ("deepseek-v4", "deepseek-v3", "qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss")

Shapes = dict[str, tuple[str, tuple[int, ...]]]

PROJECTIONS = {
    "deepseek-v4": ("w1", "w3", "w2"),
    "mixtral": ("w1", "w3", "w2"),
    "deepseek-v3": ("gate_proj", "up_proj", "down_proj"),
    "qwen3-moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen2-moe": ("gate_proj", "up_proj", "down_proj"),
}
BLOCKS = {"deepseek-v4": "layers.{}.ffn.", "mixtral": "model.layers.{}.block_sparse_moe."}


def synthesize(directory: Path, family: str, *arguments: str) -> Path:
    fixed = ("--shape", SHAPE, "--tokens", str(TOKENS))
    assert_fine(run("synthesize", directory, "--family", family, *fixed, *arguments))
    return directory


# ---- what a family's tensors are ----


def linear(name: str, form: str, rows: int, cols: int) -> Shapes:
    """One matrix by itself."""
    tiles = (-(-rows // 128), -(-cols // 128))
    return {
        "nvfp4": {
            f"{name}.weight": ("U8", (rows, cols // 2)),
            f"{name}.weight_scale": ("F8_E4M3", (rows, cols // 16)),
            f"{name}.weight_scale_2": ("F32", ()),
            f"{name}.input_scale": ("F32", ()),
        },
        "mxfp4": {
            f"{name}.weight": ("I8", (rows, cols // 2)),
            f"{name}.scale": ("F8_E8M0", (rows, cols // 32)),
        },
        "fp8-e8m0": {f"{name}.weight": ("F8_E4M3", (rows, cols)), f"{name}.scale": ("F8_E8M0", tiles)},
        "fp8-f32": {f"{name}.weight": ("F8_E4M3", (rows, cols)), f"{name}.weight_scale_inv": ("F32", tiles)},
        "bf16": {f"{name}.weight": ("BF16", (rows, cols))},
    }[form]


def expert(prefix: str, halves: tuple[str, str, str], form: str, inner: int) -> Shapes:
    gate, up, down = halves
    return (
        linear(f"{prefix}.{gate}", form, inner, HIDDEN)
        | linear(f"{prefix}.{up}", form, inner, HIDDEN)
        | linear(f"{prefix}.{down}", form, HIDDEN, inner)
    )


def fused(prefix: str, form: str) -> Shapes:
    """gpt-oss: MXFP4 blocks by rows; NVFP4 and bf16 transposed."""
    shapes: Shapes = {}
    for name, rows, cols in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        start = f"{prefix}experts.{name}"
        shapes[f"{start}_bias"] = ("BF16", (EXPERTS, rows))
        if form == "mxfp4":
            shapes[f"{start}_blocks"] = ("U8", (EXPERTS, rows, cols // 32, 16))
            shapes[f"{start}_scales"] = ("U8", (EXPERTS, rows, cols // 32))
        elif form == "bf16":
            shapes[start] = ("BF16", (EXPERTS, cols, rows))
        else:
            shapes[start] = ("U8", (EXPERTS, cols // 2, rows))
            shapes[f"{start}_weight_scale"] = ("F8_E4M3", (EXPERTS, cols // 16, rows))
            shapes[f"{start}_weight_scale_2"] = shapes[f"{start}_input_scale"] = ("F32", ())
    return shapes


ORIGINAL_FORM = {"deepseek-v4": "mxfp4", "deepseek-v3": "fp8-f32", "gpt-oss": "mxfp4"}


def expected_tensors(
    family: str, which: str, layer: int, hashed: bool, original: str | None = None
) -> Shapes:
    block = BLOCKS.get(family, "model.layers.{}.mlp.").format(layer)
    form = "nvfp4" if which == "nvfp4" else (original or ORIGINAL_FORM.get(family, "bf16"))
    router = "router" if family == "gpt-oss" else "gate"
    shapes: Shapes = {f"{block}{router}.weight": ("BF16", (EXPERTS, HIDDEN))}
    if family == "gpt-oss":
        return shapes | {f"{block}router.bias": ("BF16", (EXPERTS,))} | fused(block, form)
    if family == "deepseek-v4" and not hashed:
        shapes[f"{block}gate.bias"] = ("F32", (EXPERTS,))
    if family == "deepseek-v3":
        shapes[f"{block}gate.e_score_correction_bias"] = ("F32", (EXPERTS,))
    for number in range(EXPERTS):
        shapes |= expert(f"{block}experts.{number}", PROJECTIONS[family], form, INNER)
    shared_form = "fp8-e8m0" if family == "deepseek-v4" else form
    if family == "qwen2-moe":
        shapes[f"{block}shared_expert_gate.weight"] = ("BF16", (1, HIDDEN))
        shapes |= expert(f"{block}shared_expert", PROJECTIONS[family], shared_form, SHARED_INNER[family])
    elif family in SHARED_INNER:
        shapes |= expert(f"{block}shared_experts", PROJECTIONS[family], shared_form, SHARED_INNER[family])
    return shapes


def found_tensors(directory: Path) -> Shapes:
    return {name: (t.dtype, t.shape) for name, t in read_model(directory).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output of every family, made once."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        synthesize(root / family, family)
    return lambda family: root / family


@pytest.mark.parametrize("which", ["original", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors(made: Callable[[str], Path], family: str, which: str) -> None:
    """No more and no fewer than the formats page has."""
    assert found_tensors(made(family) / which) == expected_tensors(family, which, 0, hashed=False)


def test_gpt_oss_in_bf16(tmp_path: Path) -> None:
    """The original that transformers writes, transposed as the NVFP4 export is."""
    directory = synthesize(tmp_path / "a", "gpt-oss", "--original", "bf16")
    for which in ("original", "nvfp4"):
        assert found_tensors(directory / which) == expected_tensors("gpt-oss", which, 0, False, "bf16")
    config = json.loads((directory / "original" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("which", ["original", "nvfp4"])
def test_hash_routed_layers(tmp_path: Path, which: str) -> None:
    """DeepSeek-V4's layers 0 to 2: a table of experts by token id instead of a bias. Every expert stands in
    it, none twice for a token, and the inputs have token ids.
    """
    directory = synthesize(tmp_path / "a", "deepseek-v4", "--layers", "4")
    found = found_tensors(directory / which)
    vocabulary = found["layers.0.ffn.gate.tid2eid"][1][0]
    expected: Shapes = {}
    for layer in range(4):
        expected |= expected_tensors("deepseek-v4", which, layer, hashed=layer < 3)
        if layer < 3:
            expected[f"layers.{layer}.ffn.gate.tid2eid"] = ("I64", (vocabulary, TOP_K))
    assert found == expected
    for layer in range(3):
        table = read_model(directory / which)[f"layers.{layer}.ffn.gate.tid2eid"].array()
        assert set(np.unique(table)) == set(range(EXPERTS)) and np.all(table[:, 0] != table[:, 1])
    token_ids = read_file(directory / "inputs.safetensors")["token_ids"].array()
    assert token_ids.dtype == np.int64 and token_ids.min() >= 0 and token_ids.max() < vocabulary


# ---- config.json ----

COMMON = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "hidden_act": "silu"}
DEEPSEEK = COMMON | {
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}
QWEN = COMMON | {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "norm_topk_prob": True}
LOCAL = COMMON | {"intermediate_size": INNER, "num_local_experts": EXPERTS}
CONFIGS = {
    "deepseek-v4": DEEPSEEK
    | {
        "model_type": "deepseek_v4",
        "swiglu_limit": 10,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
    },
    "deepseek-v3": DEEPSEEK
    | {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
    "qwen3-moe": QWEN | {"model_type": "qwen3_moe"},
    "qwen2-moe": QWEN | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 2 * INNER},
    "mixtral": LOCAL | {"model_type": "mixtral"},
    "gpt-oss": LOCAL | {"model_type": "gpt_oss", "swiglu_limit": 7},
}
ARCHITECTURES = {
    "deepseek-v4": "DeepseekV4ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "qwen2-moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}
ORIGINAL_QUANTIZATION = {"deepseek-v4": "fp8", "deepseek-v3": "fp8", "gpt-oss": "mxfp4"}


@pytest.mark.parametrize("which", ["original", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_config(made: Callable[[str], Path], family: str, which: str) -> None:
    config = json.loads((made(family) / which / "config.json").read_text())
    assert {key: config.get(key) for key in CONFIGS[family]} == CONFIGS[family]
    assert config["architectures"] == [ARCHITECTURES[family]]
    if family == "deepseek-v3":
        assert EXPERTS % config["n_group"] == 0 and config["topk_group"] < config["n_group"]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantization_in_configs(made: Callable[[str], Path], family: str) -> None:
    """Originals say how they are quantized, if they are; NVFP4 is announced as ModelOpt does, and DeepSeek-V4
    keeps fp8 as its method.
    """
    original, nvfp4 = (
        json.loads((made(family) / w / "config.json").read_text()) for w in ("original", "nvfp4")
    )
    assert original.get("quantization_config", {}).get("quant_method") == ORIGINAL_QUANTIZATION.get(family)
    assert not (made(family) / "original" / "hf_quant_config.json").exists()
    if family == "deepseek-v4":
        expected = {
            "quant_method": "fp8",
            "moe_quant_algo": "NVFP4",
            "quant_algo": "MIXED_PRECISION",
            "group_size": 16,
        }
        assert nvfp4["quantization_config"] == expected
        return
    quantization = json.loads((made(family) / "nvfp4" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "NVFP4" and quantization["group_size"] == 16


# ---- values ----


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_leave_routing_to_the_model(made: Callable[[str], Path], family: str) -> None:
    tensors = read_file(made(family) / "inputs.safetensors")
    assert tensors["x"].dtype == "BF16" and tensors["x"].shape == (TOKENS, HIDDEN)
    assert set(tensors) == {"x"} | ({"token_ids"} if family == "deepseek-v4" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_layertest_calls_it_fine(made: Callable[[str], Path], family: str) -> None:
    """With the input that comes with it; no note but of experts without tokens."""
    directory = made(family)
    pair = ("--original", directory / "original")
    result = layertest(directory / "nvfp4", *pair, "--input", directory / "inputs.safetensors")
    assert_fine(result)
    notes = [line for line in result.stdout.splitlines() if line.startswith("note")]
    assert not [note for note in notes if "get no token" not in note], str(result)
    assert f"family       {family}" in result.stdout


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-v4", "gpt-oss"])
def test_router_biases_matter(made: Callable[[str], Path], family: str) -> None:
    """Biases of different experts differ: ignoring them would show."""
    biases = [
        t
        for name, t in read_model(made(family) / "nvfp4").items()
        if name.endswith(("gate.bias", "router.bias", "correction_bias"))
    ]
    assert len(biases) == 1 and len(set(biases[0].array().astype(np.float32).tolist())) > 1


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_expert_biases_matter(made: Callable[[str], Path], name: str) -> None:
    bias = read_model(made("gpt-oss") / "nvfp4")[f"model.layers.0.mlp.experts.{name}"].array()
    assert bias.dtype == ml_dtypes.bfloat16 and np.all(bias.astype(np.float32).std(axis=1) > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(made: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    assert contents(synthesize(tmp_path / "a", family)) == contents(made(family))
    other = contents(synthesize(tmp_path / "b", family, "--seed", "7"))
    assert other.keys() == contents(made(family)).keys() and other != contents(made(family))


# ---- refusals ----


def test_unknown_family(tmp_path: Path) -> None:
    result = run("synthesize", tmp_path / "a", "--family", "llama", "--shape", SHAPE)
    assert_usage(result, "--family", "mixtral")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "original"),
    [(f, o) for f in FAMILIES for o in ("mxfp4", "bf16", "fp8")],
)
def test_original_of_a_family(tmp_path: Path, family: str, original: str) -> None:
    """A format that the family can be written in is written; another is refused, naming the ones that can."""
    result = run("synthesize", tmp_path / "a", "--family", family, "--shape", SHAPE, "--original", original)
    own = {"mxfp4": "mxfp4", "fp8-f32": "fp8", "bf16": "bf16"}[ORIGINAL_FORM.get(family, "bf16")]
    if result.code in (ERROR, USAGE):
        assert original != own and "--original" in result.stderr, str(result)
        assert not list(tmp_path.iterdir())
        return
    assert_fine(result)
    assert_fine(layertest(tmp_path / "a" / "nvfp4", "--original", tmp_path / "a" / "original"))


@pytest.mark.parametrize(
    ("family", "shape", "what"),
    [
        ("deepseek-v4", "4,48,96,2", "hidden"),
        ("gpt-oss", "4,64,80,2", "intermediate"),
        ("qwen2-moe", "4,40,96,2", "hidden"),
    ],
)
def test_impossible_shape(tmp_path: Path, family: str, shape: str, what: str) -> None:
    result = run("synthesize", tmp_path / "a", "--family", family, "--shape", shape)
    assert result.code in (ERROR, USAGE), str(result)
    for part in ("--shape", what, "expected", "found"):
        assert part in result.stderr, str(result)
    assert not list(tmp_path.iterdir())
