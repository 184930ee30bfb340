"""layertest on sound checkpoints: every layout is read right, alone and with an original of the same values;
what is wrong is named; input scales that calibration left out are handled.

Expected figures come from the checkpoints themselves, which checkpoints.py makes from known values.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from checkpoints import (
    BF16,
    CAST,
    DEEPSEEK_V4,
    EXPERTS,
    FUSED,
    HIDDEN,
    MIXTRAL,
    MXFP4,
    NVFP4,
    QWEN,
    Model,
    Tensor,
    changed,
    zeros,
)
from command import (
    FINDING,
    assert_finding,
    assert_fine,
    assert_refused,
    fact,
    layertest,
    report_of,
)

# ---- layouts ----

NVFP4_MIXTRAL = ck.nvfp4_model(ck.nvfp4_experts(), MIXTRAL)
NVFP4_RANK_1 = ck.nvfp4_model(ck.nvfp4_experts(), QWEN, scalar_shape=(1,))
WIDE = ck.mxfp4_experts(count=3, hidden=160, inner=32)
BF16_OF_CAST = ck.cast_to_nvfp4(ck.mxfp4_experts())

PAIRS: dict[str, tuple[Model, Model]] = {
    "qwen-bf16": (NVFP4, BF16),
    "qwen-f16": (NVFP4, ck.dense_model(ck.nvfp4_experts(), QWEN, "F16")),
    "qwen-f32": (NVFP4, ck.dense_model(ck.nvfp4_experts(), QWEN, "F32")),
    "qwen-rank-1-scalars": (NVFP4_RANK_1, BF16),
    "qwen-fused-bf16": (NVFP4, ck.fused_model(ck.nvfp4_experts(), QWEN, "BF16")),
    "qwen-fused-f16": (NVFP4, ck.fused_model(ck.nvfp4_experts(), QWEN, "F16")),
    "qwen-fused-f32": (NVFP4, ck.fused_model(ck.nvfp4_experts(), QWEN, "F32")),
    "mixtral-bf16": (NVFP4_MIXTRAL, ck.dense_model(ck.nvfp4_experts(), MIXTRAL, "BF16")),
    "mixtral-fused": (NVFP4_MIXTRAL, replace(FUSED, config=NVFP4_MIXTRAL.config | {"quantization_config": None})),
    "deepseek-mxfp4": (CAST, MXFP4),
    "deepseek-bf16": (CAST, ck.dense_model(BF16_OF_CAST, DEEPSEEK_V4, "BF16")),
    "compressed-bf16": (ck.compressed_model(ck.nvfp4_experts(), QWEN), BF16),
    "compressed-mixtral": (
        ck.compressed_model(ck.nvfp4_experts(), MIXTRAL),
        ck.dense_model(ck.nvfp4_experts(), MIXTRAL, "BF16"),
    ),
    "compressed-mixtral-by-proj": (
        ck.compressed_model(ck.nvfp4_experts(), ck.MIXTRAL_BY_PROJ),
        ck.dense_model(ck.nvfp4_experts(), MIXTRAL, "BF16"),
    ),
    "compressed-mxfp4": (
        ck.nvfp4_model(ck.cast_to_nvfp4(ck.mxfp4_experts()), QWEN),
        ck.compressed_mxfp4_model(ck.mxfp4_experts(), QWEN),
    ),
    "deepseek-wide": (ck.nvfp4_model(ck.cast_to_nvfp4(WIDE), DEEPSEEK_V4), ck.mxfp4_model(WIDE)),
}

Write = Callable[[Path, Model], Path]
FORMS: dict[str, Write] = {
    "single": ck.write_model,
    "unaligned": lambda directory, model: ck.write_model(directory, model, misalign=3),
    "shards": lambda directory, model: ck.write_shards(directory, model.tensors, model.config),
    "five-odd-shards": lambda directory, model: ck.write_shards(
        directory, model.tensors, model.config, shards=5, misalign=1
    ),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(("nvfp4", "original"), PAIRS.values(), ids=PAIRS.keys())
def test_layout(tmp_path: Path, nvfp4: Model, original: Model, write: Write) -> None:
    """Both checkpoints hold the same values: every layout is read right, in one file or many, at any
    alignment. Schemes and naming are told, and config and tensors agree.
    """
    result = layertest(write(tmp_path / "nvfp4", nvfp4), "--original", write(tmp_path / "original", original))
    assert_fine(result)
    assert fact(result, "nvfp4") == f"{tmp_path / 'nvfp4'}: {nvfp4.scheme}, {nvfp4.naming}"
    assert fact(result, "original") == f"{tmp_path / 'original'}: {original.scheme}, {original.naming}"
    assert "\nnote " not in result.stdout, str(result)
    weights = re.search(r"^  checkpoint +weights +1 +1\.000000 +0\.000e\+00", result.stdout, re.MULTILINE)
    assert weights, f"the weights are not equal\n{result}"


@pytest.mark.parametrize(("nvfp4", "original"), PAIRS.values(), ids=PAIRS.keys())
def test_layout_without_original(tmp_path: Path, nvfp4: Model, original: Model) -> None:
    """The NVFP4 checkpoint alone: it runs, and says that the checkpoint's loss is not known."""
    del original
    result = layertest(ck.write_model(tmp_path / "nvfp4", nvfp4))
    assert_fine(result)
    assert "no --original" in result.stdout


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    """--nvfp4 may name a .safetensors file; config.json beside it counts."""
    directory = ck.write_model(tmp_path / "nvfp4", NVFP4)
    by_file = layertest(directory / ck.SINGLE_NAME).stdout.replace(f"/{ck.SINGLE_NAME}:", ":")
    assert by_file == layertest(directory).stdout


def test_without_config(tmp_path: Path, input_file: Path) -> None:
    """Tensors tell everything but the rules: without config.json, an activation and a routing must be given."""
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, None)
    for given in ((), ("--input", input_file), ("--router", "softmax,top-k=2")):
        assert_refused(layertest(directory, *given), directory, "--activation", "--router", "expected", "found")
    assert_refused(layertest(directory, "--activation", "swiglu"), directory, "--input", "--router")
    result = layertest(directory, "--input", input_file, "--activation", "swiglu")
    assert_fine(result)
    assert fact(result, "model").startswith("unknown, layer 0: 4 of 4 experts, hidden 64, intermediate 96")
    # The numbers are those of the checkpoint with its config, which says the same.
    directory = ck.write_model(tmp_path / "with-config", NVFP4)
    with_config = layertest(directory, "--input", input_file)
    figures = re.compile(r"^  (?:activations)? +\w+ .*\d$", re.MULTILINE)
    assert figures.findall(result.stdout) == figures.findall(with_config.stdout) != []


def test_lying_config(tmp_path: Path) -> None:
    """What config.json says wrongly is noted, and the tensors are used."""
    lies = {"hidden_size": 128, "moe_intermediate_size": 7, "num_experts": 5, "quantization_config": {}}
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config | lies)
    result = layertest(directory)
    assert_fine(result)
    notes = re.findall(r"^note +(.*)$", result.stdout, re.MULTILINE)
    assert len(notes) == 4, str(result)
    for note, parts in zip(
        notes, [("128", "64"), ("7", "96"), ("5", "4"), ("quantization", "nvfp4")], strict=True
    ):
        assert all(part in note for part in parts), note


def test_config_in_text_config(tmp_path: Path) -> None:
    """Multimodal models nest their language model's config."""
    config = {"text_config": CAST.config, "quantization_config": CAST.config["quantization_config"]}
    result = layertest(ck.write_single(tmp_path / "nvfp4", CAST.tensors, config))
    assert_fine(result)
    assert "clamp(u, -10, 10)" in fact(result, "activation") and "\nnote " not in result.stdout


def test_quantization_in_hf_quant_config(tmp_path: Path) -> None:
    """ModelOpt's older place for it. Without either place, the disagreement is noted."""
    config = {key: value for key, value in NVFP4.config.items() if key != "quantization_config"}
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, config)
    assert "quantization is 'none'" in fact(layertest(directory), "note")
    ck.write_json(
        directory / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    )
    assert "\nnote " not in layertest(directory).stdout


def test_other_tensors_do_not_disturb(tmp_path: Path) -> None:
    """Routers, attention, other layers and metadata stand in every real checkpoint."""
    others = {
        "model.embed_tokens.weight": zeros("BF16", 7, 3),
        "model.layers.0.self_attn.q_proj.weight": zeros("F8_E4M3", 5, 3),
        "model.layers.0.input_layernorm.weight": zeros("F64", 3, 0, 2),
        "model.layers.0.mlp.gate.weight": zeros("F32", EXPERTS, HIDDEN),
        "model.layers.1.mlp.experts.0.gate_proj.weight": zeros("I64", 1),
        "model.layers.1.mlp.shared_expert_gate": zeros("I64", 1),
        "": zeros("U8"),
    }
    directory = ck.write_single(tmp_path / "nvfp4", others | NVFP4.tensors, NVFP4.config)
    file = directory / ck.SINGLE_NAME
    header, data = ck.read_header(file)
    file.write_bytes(ck.file_bytes({"__metadata__": {"format": "pt"}} | header, data))
    result = layertest(directory)
    assert_fine(result)
    # The one that is used is the router: all its logits are 0, and ties go to the lower index.
    assert "model.layers.0.mlp.gate: softmax, top-2" in fact(result, "input")
    assert result.stdout.count("\nnote ") == result.stdout.count("2 of 4 experts get no token") == 1


def test_router_of_a_wrong_shape(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    directory = ck.write_single(
        tmp_path / "nvfp4", {name: zeros("BF16", EXPERTS, HIDDEN + 1)} | NVFP4.tensors, NVFP4.config
    )
    assert_refused(layertest(directory), directory, name, f"[{EXPERTS}, {HIDDEN}]", "found")


@pytest.mark.parametrize("top_k", [0, EXPERTS + 1, None])
def test_router_with_a_top_k_that_does_not_fit(tmp_path: Path, top_k: int | None) -> None:
    """The config's, so its file is named, and the way around it."""
    tensors = {"model.layers.0.mlp.gate.weight": zeros("BF16", EXPERTS, HIDDEN)} | NVFP4.tensors
    config = NVFP4.config | {"num_experts_per_tok": top_k}
    directory = ck.write_single(tmp_path / "nvfp4", tensors, config)
    assert_refused(layertest(directory), directory / "config.json", "top-k", f"1 to {EXPERTS}", "--input")


def test_two_layers(tmp_path: Path) -> None:
    """--layer picks: layer 0 equals its original, layer 2 does not."""
    nvfp4 = NVFP4.tensors | ck.nvfp4_tensors(ck.nvfp4_experts(seed=8), QWEN, layer=2)
    dense = BF16.tensors | ck.dense_tensors(ck.nvfp4_experts(seed=9), QWEN, "BF16", layer=2)
    directory = ck.write_single(tmp_path / "nvfp4", nvfp4, NVFP4.config)
    original = ck.write_single(tmp_path / "original", dense, BF16.config)
    assert_fine(layertest(directory, "--original", original))
    assert_finding(
        layertest(directory, "--original", original, "--layer", "2"), "layers.2.", "verdict: checkpoint"
    )


# ---- findings ----


def test_wrong_global_scale_is_found(tmp_path: Path) -> None:
    """up takes gate's global scale in one expert: that matrix is named, and that expert is the worst."""
    name = "model.layers.0.mlp.experts.2."
    tensors = changed(
        NVFP4.tensors, f"{name}up_proj.weight_scale_2", NVFP4.tensors[f"{name}gate_proj.weight_scale_2"]
    )
    directory = ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)
    original = ck.write_model(tmp_path / "original", BF16)
    assert_finding(
        layertest(directory, "--original", original), "verdict: checkpoint", "experts.2 up", "norm ratio"
    )
    report = report_of(tmp_path, directory, "--original", original, code=FINDING)
    assert report["comparisons"]["checkpoint"]["weights"]["worst_expert"] == 2
    assert len(report["findings"]) == 1 and "experts.2 up" in report["findings"][0]


def test_original_without_gates(tmp_path: Path) -> None:
    """Without its gates an original is another layer, though every matrix that it has is the same."""
    tensors = {name: tensor for name, tensor in BF16.tensors.items() if "gate_proj" not in name}
    original = ck.write_single(tmp_path / "original", tensors, BF16.config)
    directory = ck.write_model(tmp_path / "nvfp4", NVFP4)
    assert_refused(layertest(directory, "--original", original), "--original", "with a gate", "without a gate")


def test_one_wrong_block_is_counted(tmp_path: Path, mxfp4: Path) -> None:
    """One scale of one block doubled: the exact cast has a single inexact block of 32."""
    name = "layers.0.ffn.experts.1.w2.weight_scale"
    scales = CAST.tensors[name].array().astype(np.float32)
    scales[3, 2] /= 2
    tensors = changed(CAST.tensors, name, Tensor.of(scales.astype(ml_dtypes.float8_e4m3fn)))
    directory = ck.write_single(tmp_path / "nvfp4", tensors, CAST.config)
    report = report_of(tmp_path, directory, "--original", mxfp4, code=FINDING)
    total = EXPERTS * 3 * HIDDEN * ck.INNER // 32
    assert report["mxfp4_blocks"] == {"total": total, "inexact": 1}
    assert report["comparisons"]["checkpoint"]["weights"]["worst_expert"] == 1


@pytest.mark.parametrize(
    ("half", "what", "factor"),
    [("gate", "x", 0.01), ("down", "intermediate", 0.001), ("down", "intermediate", 1e9)],
)
def test_wrong_input_scale_is_found(tmp_path: Path, half: str, what: str, factor: float) -> None:
    """One expert's input scale clips its activations, or lets them vanish: the expert is named, and it
    is the activations' finding. Scales by token make up for it.
    """
    tensors = NVFP4.tensors
    for name in {"gate": ("gate_proj", "up_proj"), "down": ("down_proj",)}[half]:
        name = f"model.layers.0.mlp.experts.2.{name}.input_scale"
        tensors = changed(tensors, name, Tensor.of(tensors[name].array() * np.float32(factor)))
    directory = ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)
    report = report_of(tmp_path, directory, code=FINDING)
    assert report["verdict"] == "activations"
    scales = report["input_scales"][what]
    assert scales["worst_expert"] == 2
    assert scales["ratio"] > scales["limit"]
    assert any("input_scale" in finding and "expert 2" in finding for finding in report["findings"])
    assert_fine(layertest(directory, "--activation-scale", "dynamic-token"))


# ---- input scales ----

UNUSABLE = {"missing": None, "0": 0.0, "inf": math.inf, "nan": math.nan, "-1": -1.0, "-0": -0.0}


def with_input_scales(tmp_path: Path, names: list[str], value: float | None) -> Path:
    """NVFP4 in which the input scales of these linears are missing (None) or `value`."""
    tensors = NVFP4.tensors
    for name in names:
        scale = None if value is None else Tensor.of(np.array(value, np.float32))
        tensors = changed(tensors, f"model.layers.0.mlp.experts.{name}.input_scale", scale)
    return ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("half", ["gate", "up", "down"])
def test_unusable_input_scale(tmp_path: Path, half: str, value: float | None) -> None:
    """Calibration never reached experts 1 and 3. Static scales are refused, naming them, their matrices and
    values; dynamic-token needs none; experts that were calibrated run alone.
    """
    directory = with_input_scales(tmp_path, [f"1.{half}_proj", f"3.{half}_proj"], value)
    found = "absent" if value is None else f"{value:g}"
    for arguments in ((), ("--activation-scale", "static"), ("--activation-scale", "max-over-experts")):
        result = layertest(directory, *arguments)
        assert_refused(
            result, "input_scale", f"experts.1 {half} ({found})", f"experts.3 {half} ({found})", "expected"
        )
        assert "experts.0" not in result.stderr and "experts.2" not in result.stderr, str(result)
    assert "dynamic-token" in layertest(directory).stderr, "the remedy"
    assert_fine(layertest(directory, "--activation-scale", "dynamic-token"))
    assert_fine(layertest(directory, "--experts", "0,2"))
    assert_fine(layertest(directory, "--activations", "bf16"))


def test_policies_need_only_their_own_input_scales(tmp_path: Path) -> None:
    """down's input scale is the intermediate's, gate's and up's are x's."""
    directory = with_input_scales(tmp_path, ["2.down_proj"], None)
    assert_fine(layertest(directory, "--activation-scale", "static,dynamic-token"))
    assert_refused(
        layertest(directory, "--activation-scale", "dynamic-token,static"), "experts.2 down (absent)"
    )


def test_no_input_scales_at_all(tmp_path: Path) -> None:
    """Weight-only checkpoints: the default is dynamic-token, and static is refused; long lists are cut."""
    names = [f"{expert}.{half}_proj" for expert in range(EXPERTS) for half in ("gate", "up", "down")]
    directory = with_input_scales(tmp_path, names, None)
    result = layertest(directory)
    assert_fine(result)
    assert "scale of x dynamic-token, of the intermediate dynamic-token (default)" in fact(result, "staging")
    assert_refused(layertest(directory, "--activation-scale", "static"), "and 6 more")


def test_all_input_scales_zero(tmp_path: Path) -> None:
    """Stored, but no calibration ever ran: not the same as absent, so nothing is chosen silently."""
    names = [f"{expert}.{half}_proj" for expert in range(EXPERTS) for half in ("gate", "up", "down")]
    directory = with_input_scales(tmp_path, names, 0.0)
    assert_refused(layertest(directory), "input_scale", "experts.0 gate (0)", "dynamic-token")
    assert_fine(layertest(directory, "--activation-scale", "dynamic-token"))


def test_static_takes_the_larger_of_gate_and_up(tmp_path: Path) -> None:
    """One staging for two matrices: with up's scale raised to gate's, nothing changes."""
    expected = report_of(tmp_path, ck.write_model(tmp_path / "as-is", NVFP4))["comparisons"]
    experts = tuple(
        ck.Expert(expert.gate, replace(expert.up, input_scale=expert.gate.input_scale), expert.down)
        for expert in ck.nvfp4_experts()
    )
    raised = ck.write_model(tmp_path / "raised", ck.nvfp4_model(experts, QWEN))
    assert report_of(tmp_path, raised)["comparisons"] == expected


# ---- what the user or the config says of the scheme ----


def under_modelopt_names(tensors: ck.Tensors) -> ck.Tensors:
    """compressed-tensors' numbers as a tool wrote them that knew ModelOpt's names alone."""
    suffixes = {
        "weight_packed": "weight",
        "weight_global_scale": "weight_scale_2",
        "input_global_scale": "input_scale",
    }
    renamed = {}
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        renamed[f"{prefix}.{suffixes.get(suffix, suffix)}"] = tensor
    return renamed


def test_scheme_overrides_names(tmp_path: Path) -> None:
    """Divisors under ModelOpt's names are off by their square; told what they are, all is well."""
    compressed = ck.compressed_model(ck.nvfp4_experts(), QWEN)
    directory = ck.write_single(tmp_path / "m", under_modelopt_names(compressed.tensors), NVFP4.config)
    original = ck.write_model(tmp_path / "original", BF16)
    assert_finding(layertest(directory, "--original", original))
    result = layertest(directory, "--original", original, "--scheme", "compressed-tensors")
    assert_fine(result)
    assert "nvfp4 (compressed-tensors) (--scheme)" in fact(result, "nvfp4")


def test_scheme_overrides_types(tmp_path: Path) -> None:
    """e4m3 scales in a file of a writer without a name for the type."""
    tensors = {
        name: tensor.with_dtype("U8") if name.endswith(".weight_scale") else tensor
        for name, tensor in NVFP4.tensors.items()
    }
    directory = ck.write_single(tmp_path / "m", tensors, NVFP4.config)
    original = ck.write_model(tmp_path / "original", BF16)
    assert_refused(layertest(directory), directory, "F8_E4M3", "U8")
    assert_fine(layertest(directory, "--original", original, "--scheme", "modelopt"))


def test_scheme_that_does_not_fit(tmp_path: Path) -> None:
    directory = ck.write_model(tmp_path / "m", NVFP4)
    assert_refused(layertest(directory, "--scheme", "mxfp4"), directory, "weight_scale", "blocks of 16")
    bf16 = ck.write_model(tmp_path / "bf16", BF16)
    assert_refused(layertest(bf16, "--scheme", "modelopt"), bf16, "--scheme modelopt", "found bf16")


CLAIMS: dict[str, tuple[dict, list[str]]] = {
    "group-size": (ck.MODELOPT | {"group_size": 32}, ["group size is 32", "16 codes"]),
    "writer": (ck.COMPRESSED_NVFP4, ["compressed-tensors", "ModelOpt's", "multiply"]),
    "format": (ck.COMPRESSED_MXFP4, ["mxfp4-pack-quantized", "nvfp4"]),
    "ignored": (ck.MODELOPT | {"ignore": ["lm_head", "model.layers.0.*"]}, ["'model.layers.0.*'", "nvfp4"]),
    "ignored-parent": (ck.MODELOPT | {"exclude_modules": ["model.layers.0.mlp"]}, ["leaves", "nvfp4"]),
    "fp8": ({"quant_method": "fp8"}, ["'fp8'", "nvfp4"]),
}


@pytest.mark.parametrize(("claim", "parts"), CLAIMS.values(), ids=CLAIMS.keys())
def test_claims_that_tensors_contradict(tmp_path: Path, claim: dict, parts: list[str]) -> None:
    """The tensors are used, and the disagreement is a note."""
    config = NVFP4.config | {"quantization_config": claim}
    note = fact(layertest(ck.write_single(tmp_path / "m", NVFP4.tensors, config)), "note")
    for part in parts:
        assert part in note


@pytest.mark.parametrize(
    "claim",
    [
        ck.MODELOPT | {"group_size": 16, "ignore": ["lm_head", "model.layers.01*", "model.layers.1", "*gate"]},
        ck.MODELOPT | {"config_groups": {"group_0": {"weights": {"group_size": 16}, "targets": ["Linear"]}}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"},
        ck.MODELOPT | {"group_size": -1, "ignore": 3, "config_groups": [1]},
    ],
)
def test_claims_that_tensors_bear_out(tmp_path: Path, claim: dict) -> None:
    config = NVFP4.config | {"quantization_config": claim}
    result = layertest(ck.write_single(tmp_path / "m", NVFP4.tensors, config))
    assert_fine(result)
    assert "note" not in result.stdout, str(result)


# ---- mixed and degenerate layers ----


def mixed_tensors(experts: tuple[int, ...], halves: tuple[str, ...] = ("",)) -> ck.Tensors:
    """NVFP4 but for these experts, or these matrices of theirs, which are bf16."""
    prefixes = tuple(f"model.layers.0.mlp.experts.{expert}.{half}" for expert in experts for half in halves)
    tensors = {name: tensor for name, tensor in NVFP4.tensors.items() if not name.startswith(prefixes)}
    return tensors | {name: t for name, t in BF16.tensors.items() if name.startswith(prefixes)}


def test_mixed_experts_are_named(tmp_path: Path) -> None:
    """Which experts are of the rarer scheme; the config may say so, and then nothing contradicts it."""
    ignore = {"ignore": [f"model.layers.0.mlp.experts.2.{half}_proj" for half in ("gate", "up", "down")]}
    for name, claim, notes in (("told", ck.MODELOPT | ignore, 1), ("untold", ck.MODELOPT, 2)):
        config = NVFP4.config | {"quantization_config": claim}
        directory = ck.write_single(tmp_path / name, mixed_tensors((2,)), config)
        result = layertest(directory, "--activation-scale", "dynamic-token")
        assert_fine(result)
        found = re.findall(r"^note +(.*)$", result.stdout, re.MULTILINE)
        assert len(found) == notes and found[0] == "expert 2: bf16, others: nvfp4", str(result)


@pytest.mark.parametrize("half", ["gate_proj", "up_proj", "down_proj"])
def test_mixed_within_an_expert(tmp_path: Path, half: str) -> None:
    directory = ck.write_single(tmp_path / "m", mixed_tensors((1,), (half,)), NVFP4.config)
    original = ck.write_model(tmp_path / "original", BF16)
    result = layertest(directory, "--original", original, "--activation-scale", "dynamic-token")
    assert_fine(result)
    assert "expert 1: mixed: bf16, nvfp4" in result.stdout, str(result)



def test_mixed_schemes(tmp_path: Path) -> None:
    """An expert that the converter left in bf16 beside NVFP4 ones: told, and run."""
    prefix = "model.layers.0.mlp.experts.2."
    tensors = {name: tensor for name, tensor in NVFP4.tensors.items() if not name.startswith(prefix)}
    tensors |= {name: tensor for name, tensor in BF16.tensors.items() if name.startswith(prefix)}
    directory = ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)
    result = layertest(directory, "--activation-scale", "dynamic-token")
    assert_fine(result)
    assert "mixed: bf16, nvfp4" in fact(result, "nvfp4")


def test_zero_weights(tmp_path: Path) -> None:
    """An expert of zeros, with a global scale of zero, is no NaN anywhere."""
    tensors = dict(NVFP4.tensors)
    for name, tensor in NVFP4.tensors.items():
        if ".experts.1." in name and not name.endswith("input_scale"):
            tensors[name] = Tensor(tensor.dtype, tensor.shape, bytes(len(tensor.data)))
    directory = ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)
    for arguments in ((), ("--gate-up", "fold"), ("--double-quantize",), ("--activations", "nvfp4x2")):
        assert_fine(layertest(directory, *arguments))


@pytest.mark.parametrize("exponent", [0, 1, 100, 254])
def test_mxfp4_at_the_ends_of_its_range(tmp_path: Path, exponent: int) -> None:
    """All scales at 2^-127 to 2^127: the cast is exact wherever float32 holds its global scale and values."""

    def at_exponent(linear: ck.Linear) -> ck.Linear:
        scales = np.full(linear.scales.shape, exponent, np.uint8).view(ml_dtypes.float8_e8m0fnu)
        return replace(linear, scales=scales)

    experts = tuple(ck.Expert(*map(at_exponent, expert.linears())) for expert in ck.mxfp4_experts())
    nvfp4 = ck.write_model(tmp_path / "nvfp4", ck.nvfp4_model(ck.cast_to_nvfp4(experts), DEEPSEEK_V4))
    original = ck.write_model(tmp_path / "original", ck.mxfp4_model(experts))
    result = layertest(nvfp4, "--original", original)
    assert result.code in (0, FINDING) and not result.stderr, str(result)
    if exponent < 254:  # at 2^127 the values themselves overflow float32
        assert re.search(r"^  checkpoint +weights .* 0\.000e\+00 ", result.stdout, re.MULTILINE), str(result)
        assert "not exact: 0 of" in result.stdout, str(result)
