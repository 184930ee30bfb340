"""layertest's options: which experts, tokens and inputs are run, and how they are computed."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints as ck
from checkpoints import EXPERTS, HIDDEN, QWEN, Tensor, zeros
from command import FINDING, assert_fine, assert_refused, assert_usage, fact, layertest, report_of

BACKENDS = pytest.mark.parametrize("backend", [(), ("--backend", "reference")], ids=["default", "reference"])

# ---- experts, tokens, input ----


@pytest.mark.parametrize(
    ("experts", "numbers"),
    [
        ("0", [0]),
        ("3", [3]),
        ("1-3", [1, 2, 3]),
        ("2,0", [0, 2]),
        ("0-1,1-2,1", [0, 1, 2]),
        ("0-3", [0, 1, 2, 3]),
    ],
)
def test_experts_subset(tmp_path: Path, cast: Path, mxfp4: Path, experts: str, numbers: list[int]) -> None:
    """Some experts of the layer, by number, in any order; reports use the checkpoint's numbers."""
    result = layertest(cast, "--original", mxfp4, "--experts", experts)
    assert_fine(result)
    assert f"{len(numbers)} of {EXPERTS} experts" in fact(result, "model")
    report = report_of(tmp_path, cast, "--original", mxfp4, "--experts", experts)
    for comparison in report["comparisons"].values():
        for figures in comparison.values():
            assert figures["worst_expert"] in [None, *numbers]
    blocks = len(numbers) * 3 * HIDDEN * ck.INNER // 32
    assert report["mxfp4_blocks"] == {"total": blocks, "inexact": 0}


@pytest.mark.parametrize("experts", ["4", "0,4", "3-7", "1048575"])
def test_experts_that_are_not_there(cast: Path, experts: str) -> None:
    assert_refused(layertest(cast, "--experts", experts), cast, "expert", "expected 0 to 3")


def test_experts_subset_equals_masked_input(tmp_path: Path, cast: Path, input_file: Path) -> None:
    """Testing experts 1 and 2 is the same as sending -1 wherever other experts were meant."""
    subset = report_of(tmp_path, cast, "--input", input_file, "--experts", "1,2")
    ids = ck.inputs()["topk_ids"].array()
    others = ~np.isin(ids, [1, 2])
    masked = ck.inputs() | {"topk_ids": Tensor.of(np.where(others, -1, ids).astype(np.int32))}
    whole = report_of(tmp_path, cast, "--input", ck.write_inputs(tmp_path / "masked.safetensors", masked))
    assert subset["comparisons"] == whole["comparisons"]
    note = f"{others.sum()} slots go to experts that are not under test"
    idle = "2 of 4 experts get no token: only their weights are compared"
    assert subset["notes"] == [note]
    assert whole["notes"] == [note, idle]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_input_all_absent(tmp_path: Path, cast: Path, dtype: type) -> None:
    """Not a single token goes to an expert under test: nothing was tested, which is no "fine"."""
    tensors = ck.inputs() | {"topk_ids": Tensor.of(np.full((12, 2), -1, dtype))}
    result = layertest(cast, "--input", ck.write_inputs(tmp_path / "i.safetensors", tensors))
    assert_refused(result, "at least one token")


@pytest.mark.parametrize("change", ["ids-int64", "x-f32", "unaligned"])
def test_input_of_another_form(tmp_path: Path, cast: Path, input_file: Path, change: str) -> None:
    """The same input in other types, or at odd addresses, gives the same figures."""
    tensors = ck.inputs()
    if change == "ids-int64":
        tensors["topk_ids"] = Tensor.of(tensors["topk_ids"].array().astype(np.int64))
    elif change == "x-f32":
        tensors["x"] = Tensor.of(tensors["x"].array().astype(np.float32))
    file = tmp_path / "i.safetensors"
    file.write_bytes(ck.valid_bytes(tensors, misalign=1 if change == "unaligned" else 0))
    expected = report_of(tmp_path, cast, "--input", input_file)["comparisons"]
    assert report_of(tmp_path, cast, "--input", file)["comparisons"] == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_input_x_is_rounded_to_bf16(tmp_path: Path, cast: Path, dtype: type) -> None:
    """x in wider types counts as rounded to bf16."""
    x: np.ndarray = np.random.default_rng(11).standard_normal((12, HIDDEN)).astype(dtype)
    rounded = x.astype(np.float32).astype(ml_dtypes.bfloat16)
    reports = [
        report_of(tmp_path, cast, "--input", ck.write_inputs(tmp_path / f"{i}.safetensors", tensors))
        for i, tensors in enumerate(ck.inputs() | {"x": Tensor.of(array)} for array in (x, rounded))
    ]
    assert reports[0]["comparisons"] == reports[1]["comparisons"]


def test_input_without_routing(tmp_path: Path, cast: Path) -> None:
    """x alone: tokens are routed at random, as config.json's top-k says."""
    tensors = {"x": ck.inputs()["x"]}
    result = layertest(cast, "--input", ck.write_inputs(tmp_path / "i.safetensors", tensors))
    assert_fine(result)
    assert "uniform top-2 of 4 experts" in fact(result, "input")


@pytest.mark.parametrize(("given", "used"), [("1", 1), ("7", 7), ("12", 12), ("13", 12), ("16777216", 12)])
def test_tokens_of_an_input(cast: Path, input_file: Path, given: str, used: int) -> None:
    """At most so many of the file's tokens; more than there are is no error."""
    result = layertest(cast, "--input", input_file, "--tokens", given)
    assert result.code in (0, FINDING) and not result.stderr, str(result)
    assert fact(result, "input").startswith(f"{used} tokens")


@pytest.mark.parametrize(
    ("arguments", "used"), [((), 64), (("--tokens", "1"), 1), (("--tokens", "200"), 200)]
)
def test_tokens_made_up(cast: Path, arguments: tuple[str, ...], used: int) -> None:
    result = layertest(cast, *arguments)
    assert_fine(result)
    assert fact(result, "input").startswith(f"{used} tokens, x: Gaussian")


def test_no_tokens(tmp_path: Path, cast: Path) -> None:
    """T = 0 is ordinary input for a layer, but tests nothing."""
    tensors = {
        "x": zeros("BF16", 0, HIDDEN),
        "topk_ids": zeros("I32", 0, 2),
        "topk_weights": zeros("F32", 0, 2),
    }
    result = layertest(cast, "--input", ck.write_inputs(tmp_path / "i.safetensors", tensors))
    assert_refused(result, "i.safetensors", "'x'", "at least one token")


def test_seed(cast: Path) -> None:
    """The same seed repeats, another one changes the input; the largest one is a seed too."""
    runs = [layertest(cast, "--seed", seed).stdout for seed in ("3", "3", "4")]
    assert runs[0] == runs[1] != runs[2]
    assert_fine(layertest(cast, "--seed", str((1 << 64) - 1)))


# ---- options of the computation ----


def folded_blocks(experts: ck.Experts) -> tuple[int, int, int]:
    """Rescaled, changed and vanished blocks when gate and up share the larger global scale."""
    blocks = changed_blocks = underflowed = 0
    for expert in experts:
        small, large = sorted((expert.gate, expert.up), key=lambda linear: linear.global_scale)
        scales = small.scales.astype(np.float32)
        ratio = small.global_scale / large.global_scale
        after = (scales * ratio).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        before = scales.astype(np.float64) * np.float64(small.global_scale)
        blocks += scales.size
        changed_blocks += int(np.sum(before != after * np.float64(large.global_scale)))
        underflowed += int(np.sum((after == 0) & (scales != 0)))
    return blocks, changed_blocks, underflowed


@pytest.mark.parametrize("model", ["powers", "any"])
def test_gate_up_fold(tmp_path: Path, model: str) -> None:
    """Folding tells how many blocks it changed: none where global scales are powers of two, else most."""
    experts = ck.nvfp4_experts() if model == "powers" else ck.with_odd_globals(ck.nvfp4_experts())
    directory = ck.write_model(tmp_path / "nvfp4", ck.nvfp4_model(experts, QWEN))
    blocks, changed_blocks, underflowed = folded_blocks(experts)
    assert blocks == EXPERTS * ck.INNER * HIDDEN // 16 and (changed_blocks > 0) == (model == "any")
    result = layertest(directory, "--gate-up", "fold")
    assert_fine(result)
    told = fact(result, "gate/up")
    assert f"{changed_blocks} of {blocks} rescaled blocks changed" in told, told
    assert f"{underflowed} became zero" in told, told
    assert "exact" in fact(layertest(directory), "gate/up")


def test_gate_up_fold_of_powers_of_two_loses_nothing(tmp_path: Path, cast: Path, mxfp4: Path) -> None:
    report = report_of(tmp_path, cast, "--original", mxfp4, "--gate-up", "fold", code=0)
    assert report["comparisons"]["checkpoint"]["weights"]["rel_l2"] == 0


def test_gate_up_fold_after_double_quantize(cast: Path) -> None:
    """Both named steps: quantized again, gate and up share a global scale; there is nothing to fold."""
    result = layertest(cast, "--gate-up", "fold", "--double-quantize")
    assert_fine(result)
    assert "0 of 0 rescaled blocks" in fact(result, "gate/up") and "quantized again" in fact(
        result, "weights"
    )


@pytest.mark.parametrize("experts", [(), ("--experts", "1,2")], ids=["all", "two"])
def test_double_quantize(tmp_path: Path, cast: Path, mxfp4: Path, experts: tuple[str, ...]) -> None:
    """What was exact is not after a second quantization through bf16: the loss shows in every matrix."""
    report = report_of(tmp_path, cast, "--original", mxfp4, "--double-quantize", *experts, code=FINDING)
    assert report["verdict"] == "checkpoint"
    assert report["comparisons"]["checkpoint"]["weights"]["rel_l2"] > 1e-3
    assert report["mxfp4_blocks"]["inexact"] > 0
    assert any("gate" in finding for finding in report["findings"])


# The least cosine of l1 to expect on Gaussian data: docs/layertest.md, "Limits".
COSINES = {"nvfp4": 0.99, "nvfp4x2": 0.9995, "fp8": 0.999, "bf16": 0.999999}


@BACKENDS
@pytest.mark.parametrize("activations", COSINES)
def test_activations(tmp_path: Path, cast: Path, activations: str, backend: tuple[str, ...]) -> None:
    result = layertest(cast, "--activations", activations, *backend)
    assert_fine(result)
    assert fact(result, "staging").split(",")[0] == activations
    report = report_of(tmp_path, cast, "--activations", activations, *backend)
    assert COSINES[activations] <= report["comparisons"]["activations"]["l1"]["cosine"] <= 1
    assert ("input_scales" in report) == activations.startswith("nvfp4"), "the other two have no scales"


@pytest.mark.parametrize("accumulate", ["f32", "f64"])
def test_accumulate(cast: Path, accumulate: str) -> None:
    result = layertest(cast, "--accumulate", accumulate, "--backend", "reference")
    assert_fine(result)
    assert {"f32": "float32", "f64": "float64"}[accumulate] in fact(result, "backend")


POLICIES = ["static", "max-over-experts", "dynamic-tensor", "dynamic-token"]


@pytest.mark.parametrize("rule", ["four-over-six", "mse"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_activation_rule(tmp_path: Path, cast: Path, backend: str, rule: str) -> None:
    """It is told, every stage is right, and what is staged errs less than by amax."""
    errors = {}
    for name in ("amax", rule):
        options = ("--backend", backend, "--activation-rule", name)
        result = layertest(cast, *options)
        assert_fine(result)
        assert (f"block scales by {name}" in fact(result, "staging")) == (name != "amax")
        errors[name] = report_of(tmp_path, cast, *options)["comparisons"]["activations"]["l1"]["rel_l2"]
    assert errors[rule] < errors["amax"]


@pytest.mark.parametrize("activations", ["nvfp4x2", "fp8", "bf16"])
def test_activation_rule_of_other_formats_is_refused(cast: Path, activations: str) -> None:
    result = layertest(cast, "--activation-rule", "mse", "--activations", activations)
    assert_usage(result, "--activation-rule", activations)


@pytest.mark.parametrize("activations", ["nvfp4", "nvfp4x2"])
@pytest.mark.parametrize(
    "policies",
    [
        *POLICIES,
        "static,dynamic-token",
        "dynamic-token,static",
        "max-over-experts,dynamic-tensor",
        "static,static",
    ],
)
def test_activation_scale(cast: Path, policies: str, activations: str) -> None:
    """One policy for both stagings, or one each."""
    result = layertest(cast, "--activation-scale", policies, "--activations", activations)
    assert_fine(result)
    x, intermediate = (policies.split(",") * 2)[:2]
    staging = fact(result, "staging")
    assert f"scale of x {x}, of the intermediate {intermediate} (--activation-scale)" in staging, staging
