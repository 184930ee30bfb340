"""The figures of `fourfold layertest --json` against the oracle, which reads the same files on its own.

Left out is the comparison of kernels, which has nothing but C++ on both sides.

Four layers: two that `fourfold synthesize` makes (MXFP4 under DeepSeek-V4's names and with its clamp, bf16
under Qwen3-MoE's) and two with trained weights and real hidden states, of scripts/real_checkpoint.py.
FOURFOLD_COMMAND names the command. The safetensors package reads the files, which shares no line with the C++
reader.

Names in shapes: as in nvfp4_oracle.py; P is parts of a comparison, rows or experts.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

import nvfp4_oracle as oracle
from layertest_figures import (
    FINE,
    FINDING,
    TOLERANCE,
    check_figures,
    error_sums,
    fourfold,
    relative_l2,
    run_command,
    staging_ratios,
    worst,
)
from nvfp4_oracle import Array

REAL_CHECKPOINT = Path(__file__).parents[2] / "scripts" / "real_checkpoint.py"
HALVES = ("gate", "up", "down")
STAGES = ("l1", "activation", "l2", "out")

# Tensors of quantized weights stay codes, for the oracle to decode.
DTYPE_OF_NAME = {
    "I8": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


# ---- commands and files ------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Array]:
    """All tensors of one safetensors file."""
    return {
        name: np.frombuffer(entry["data"], DTYPE_OF_NAME[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def read_shards(directory: Path) -> dict[str, Array]:
    """All tensors of a checkpoint, each from the file that the index names."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard: read_tensors(directory / shard) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


# ---- weights -----------------------------------------------------------------------------------------------


@dataclass
class DecodedLinear:
    """A projection as oracle.Layer multiplies by it: values (N, K) without the global scale.

    Column-major, because the oracle's multiplication walks along K: four times as fast.
    """

    values: Array
    global_scale: np.float32 = np.float32(1)
    input_scale: np.float32 = np.float32(1)

    def __post_init__(self) -> None:
        self.values = np.asfortranarray(self.values)

    def operand(self) -> Array:
        return self.values


def map_linears(convert: Callable, experts: list[oracle.Expert]) -> list[oracle.Expert]:
    """The experts with each of their projections converted."""
    return [oracle.Expert(*(convert(getattr(expert, half)) for half in HALVES)) for expert in experts]


def decode(linear: oracle.Linear) -> DecodedLinear:
    """Codes x block scale, the global scale left to the epilogue: the emulation."""
    return DecodedLinear(linear.operand(), linear.global_scale, linear.input_scale)


def dequantize(linear: DecodedLinear) -> DecodedLinear:
    """Codes x block scale x global scale in float32: the reference in the dequantized weights."""
    return DecodedLinear(linear.values * linear.global_scale)


def fold_gate_up(experts: list[oracle.Expert]) -> list[oracle.Expert]:
    """`--gate-up fold`: one global scale for gate and up."""
    folded = []
    for expert in experts:
        gate, up = expert.gate, expert.up
        fold = oracle.fold(gate.scales, up.scales, gate.global_scale, up.global_scale)
        gate = replace(gate, scales=fold.gate_scales, global_scale=fold.global_scale)
        up = replace(up, scales=fold.up_scales, global_scale=fold.global_scale)
        folded.append(oracle.Expert(gate, up, expert.down))
    return folded


def quantize_again(experts: list[oracle.Expert]) -> list[oracle.Expert]:
    """`--double-quantize`: through bf16, then by ModelOpt's rule, gate and up as one tensor (2I, H)."""

    def quantize(values: Array, global_scale: Array, input_scale: np.float32) -> oracle.Linear:
        quantized = oracle.quantize_nvfp4(values, global_scale, modelopt_floor=True)
        return oracle.Linear(quantized.codes, quantized.scales, np.float32(global_scale), input_scale)

    again = []
    for expert in experts:
        linears = [getattr(expert, half) for half in HALVES]
        gate, up, down = (
            oracle.encode_bf16(linear.operand() * linear.global_scale).astype(np.float32)
            for linear in linears
        )
        gate_up_global = oracle.nvfp4_global_of_tensor(np.concatenate([gate, up]))
        global_scales = gate_up_global, gate_up_global, oracle.nvfp4_global_of_tensor(down)
        input_scales = (linear.input_scale for linear in linears)
        again.append(oracle.Expert(*map(quantize, (gate, up, down), global_scales, input_scales)))
    return again


STEPS: dict[str, Callable[[list[oracle.Expert]], list[oracle.Expert]]] = {
    "exact": lambda experts: experts,
    "fold": fold_gate_up,
    "double-quantize": quantize_again,
}


# ---- the layer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Options of layertest that change what it computes."""

    activations: str = "nvfp4"
    activation_scale: str | None = None
    step: str = "exact"

    def arguments(self) -> list[str]:
        scale = ["--activation-scale", self.activation_scale] if self.activation_scale else []
        step = {"exact": [], "fold": ["--gate-up", "fold"], "double-quantize": ["--double-quantize"]}
        return ["--activations", self.activations, *scale, *step[self.step]]

    def policies(self) -> tuple[str, str]:
        """Of x and of the intermediate. All four layers are calibrated, which makes static the default."""
        x, _, intermediate = (self.activation_scale or "static").partition(",")
        return x, intermediate or x

    def __str__(self) -> str:
        return "-".join(filter(None, (self.activations, self.activation_scale, self.step)))


class LayerUnderTest:
    """One layer of a pair of checkpoints: what layertest reports of it, and what the oracle makes of it."""

    def __init__(self, folder: Path, inputs: Path, layer: int = 0) -> None:
        self.folder, self.inputs_path, self.layer = folder, inputs, layer
        self.config = json.loads((folder / "nvfp4" / "config.json").read_text())
        self.is_mxfp4 = self.config["model_type"] == "deepseek_v4"
        self.nvfp4 = self.read_experts("nvfp4", self.read_nvfp4)
        self.original = self.read_experts("original", self.read_mxfp4 if self.is_mxfp4 else self.read_bf16)
        self.inputs = read_tensors(inputs)
        self.permutation = oracle.permute(self.inputs["topk_ids"], len(self.nvfp4))
        self.expert_of_row = np.repeat(np.arange(len(self.nvfp4)), np.diff(self.permutation.group_offsets))
        self.weights = {step: WeightsUnderTest(self, convert) for step, convert in STEPS.items()}

    def read_experts(self, checkpoint: str, read: Callable) -> list[oracle.Expert]:
        """All experts of the layer, `read` applied to the tensors of a projection, by name without prefix."""
        tensors = read_shards(self.folder / checkpoint)
        if self.is_mxfp4:
            experts, prefix, halves = "n_routed_experts", f"layers.{self.layer}.ffn", ("w1", "w3", "w2")
        else:
            experts, prefix = "num_experts", f"model.layers.{self.layer}.mlp"
            halves = ("gate_proj", "up_proj", "down_proj")

        def linear(expert: int, half: str) -> oracle.Linear | DecodedLinear:
            start = f"{prefix}.experts.{expert}.{half}."
            return read({name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)})

        return [oracle.Expert(*(linear(e, half) for half in halves)) for e in range(self.config[experts])]

    @staticmethod
    def read_nvfp4(tensors: dict[str, Array]) -> oracle.Linear:
        global_scale, input_scale = (np.float32(tensors[n].item()) for n in ("weight_scale_2", "input_scale"))
        return oracle.Linear(tensors["weight"], tensors["weight_scale"], global_scale, input_scale)

    @staticmethod
    def read_mxfp4(tensors: dict[str, Array]) -> DecodedLinear:
        return DecodedLinear(oracle.decode_mxfp4(tensors["weight"], tensors["scale"]))

    @staticmethod
    def read_bf16(tensors: dict[str, Array]) -> DecodedLinear:
        return DecodedLinear(tensors["weight"].astype(np.float32))

    def report(self, variant: Variant) -> dict:
        """What layertest writes. The comparisons of interest are between runs of the reference alone."""
        path = self.folder / "report.json"
        checkpoints = ["--original", self.folder / "original", "--nvfp4", self.folder / "nvfp4"]
        inputs = ["--layer", self.layer, "--input", self.inputs_path]
        options = ["--backend", "reference", "--json", path, *variant.arguments()]
        status = run_command([fourfold(), "layertest", *checkpoints, *inputs, *options], (FINE, FINDING))
        report = json.loads(path.read_text())
        assert (status == FINE) == (report["verdict"] == "fine") == (report["findings"] == [])
        return report

    def run(self, experts: list[oracle.Expert], variant: Variant) -> dict[str, Array]:
        """Outputs by stage: l1 (M, 2I), activation (M, I), l2 (M, H), out (T, H), all bf16."""
        limit = self.config.get("swiglu_limit")
        first, second = (
            oracle.Layer(experts, variant.activations, policy, limit) for policy in variant.policies()
        )
        _, h, a = first.up_to_a(self.inputs["x"], self.permutation)
        _, z, y = second.from_a(a, self.permutation, self.inputs["topk_weights"])
        return dict(zip(STAGES, (h, a, z, y), strict=True))

    @functools.cached_property
    def original_run(self) -> dict[str, Array]:
        return self.run(self.original, Variant("bf16"))

    def check_stages(self, found: dict, reference: dict[str, Array], candidate: dict[str, Array]) -> None:
        """l1, activation, l2 and out of two runs; rows are slots sorted by expert, but tokens in out."""
        experts = np.unique(self.expert_of_row)
        for stage in STAGES:
            by_row = error_sums(reference[stage], candidate[stage])
            check_figures(stage, found[stage], by_row)
            worst_token, worst_expert = found[stage]["worst_token"], found[stage]["worst_expert"]
            if stage == "out":
                assert worst_token in worst(relative_l2(by_row), np.arange(len(by_row)))
                assert worst_expert is None
            else:
                by_expert = np.array([by_row[self.expert_of_row == e].sum(axis=0) for e in experts])
                assert worst_token in worst(relative_l2(by_row), self.permutation.token_of_row), stage
                assert worst_expert in worst(relative_l2(by_expert), experts), stage

    def check_input_scales(self, found: dict, activation: Array, variant: Variant) -> None:
        """What the worst expert loses in staging, as a multiple of what it loses with a scale a token: x, and
        the intermediate `activation` (M, I). Only where scales are not by token.
        """
        rows = {"x": self.inputs["x"][self.permutation.token_of_row], "intermediate": activation}
        scales = {
            "x": [expert.gate_up_input_scale() for expert in self.nvfp4],
            "intermediate": [expert.down.input_scale for expert in self.nvfp4],
        }
        policies = dict(zip(rows, variant.policies(), strict=True))
        has_scales = variant.activations in ("nvfp4", "nvfp4x2")
        judged = [what for what in rows if has_scales and policies[what] != "dynamic-token"]
        assert list(found) == judged
        for what in judged:
            ratios = staging_ratios(
                rows[what], scales[what], variant.activations, policies[what], self.permutation.group_offsets
            )
            assert found[what]["ratio"] == pytest.approx(max(ratios.values()), rel=0, abs=TOLERANCE), what
            losses, experts = np.array(list(ratios.values())), np.array(list(ratios))
            assert found[what]["worst_expert"] in worst(losses, experts), what


class WeightsUnderTest:
    """The NVFP4 weights of a layer after a step, and what variants share; each made once, when asked for."""

    def __init__(self, layer: LayerUnderTest, step: Callable) -> None:
        self.layer, self.step = layer, step

    @functools.cached_property
    def experts(self) -> list[oracle.Expert]:
        return self.step(self.layer.nvfp4)

    @functools.cached_property
    def decoded(self) -> list[oracle.Expert]:
        return map_linears(decode, self.experts)

    @functools.cached_property
    def dequantized(self) -> list[oracle.Expert]:
        return map_linears(dequantize, self.decoded)

    @functools.cached_property
    def dequantized_run(self) -> dict[str, Array]:
        return self.layer.run(self.dequantized, Variant("bf16"))

    @functools.cached_property
    def error_sums(self) -> Array:
        """(E, 4) between the original weights and the dequantized ones."""
        return np.array([sum(error_sums(*pair).sum(axis=0) for pair in expert) for expert in self.pairs()])

    @functools.cached_property
    def mxfp4_blocks(self) -> dict[str, int]:
        """Blocks of 32 values, and those of them with a value that is not the original's."""
        changes = [before != after for expert in self.pairs() for before, after in expert]
        changed_blocks = [oracle.blocked(change, oracle.MXFP4_BLOCK).any(axis=-1) for change in changes]
        return {
            "total": sum(blocks.size for blocks in changed_blocks),
            "inexact": sum(int(blocks.sum()) for blocks in changed_blocks),
        }

    def pairs(self) -> Iterator[list[tuple[Array, Array]]]:
        """Of every expert, original and dequantized values (N, K) of gate, up and down."""
        for before, after in zip(self.layer.original, self.dequantized, strict=True):
            yield [(getattr(before, half).values, getattr(after, half).values) for half in HALVES]


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's layers 0 and 15 as experts, with hidden states of English text."""
    folder = tmp_path_factory.mktemp("real")
    run_command([sys.executable, REAL_CHECKPOINT, folder, "--layers", "0,15"])
    return folder


@pytest.fixture(scope="module", params=["mxfp4", "bf16", "real-00", "real-15"])
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LayerUnderTest:
    kind, _, number = request.param.partition("-")
    if kind == "real":
        folder = request.getfixturevalue("real_folder")
        return LayerUnderTest(folder, folder / "inputs" / f"layer-{number}.safetensors", int(number))
    folder = tmp_path_factory.mktemp(kind)
    profile = {"mxfp4": "gaussian", "bf16": "realistic"}[kind]
    options = ["--shape", "12,512,320,4", "--original", kind, "--profile", profile, "--seed", 1]
    run_command([fourfold(), "synthesize", folder, *options])
    return LayerUnderTest(folder, folder / "inputs.safetensors")


VARIANTS = [
    Variant(),
    Variant("nvfp4x2"),
    Variant("fp8"),
    Variant("bf16"),
    Variant(activation_scale="dynamic-token"),
    Variant(activation_scale="max-over-experts"),
    Variant(activation_scale="dynamic-tensor,static"),
    Variant(step="fold"),
    Variant(step="double-quantize"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_figures(layer: LayerUnderTest, variant: Variant) -> None:
    report = layer.report(variant)
    checkpoint, activations = (report["comparisons"][name] for name in ("checkpoint", "activations"))
    weights = layer.weights[variant.step]
    emulation_run = layer.run(weights.decoded, variant)
    losses = relative_l2(weights.error_sums)
    check_figures("weights", checkpoint["weights"], weights.error_sums)
    assert checkpoint["weights"]["worst_token"] is None
    assert checkpoint["weights"]["worst_expert"] in worst(losses, np.arange(len(losses)))
    assert report.get("mxfp4_blocks") == (weights.mxfp4_blocks if layer.is_mxfp4 else None)
    layer.check_stages(checkpoint, layer.original_run, weights.dequantized_run)
    layer.check_stages(activations, weights.dequantized_run, emulation_run)
    layer.check_input_scales(report.get("input_scales", {}), emulation_run["activation"], variant)


# Cosines of the Gaussian profile, lowest and highest: published simulations of numerics.md, at other shapes.
WINDOWS = {
    "nvfp4": {"l1": (0.994, 0.9965), "out": (0.983, 0.992)},
    "nvfp4x2": {"out": (0.9995, 1)},
    "bf16": {"out": (0.99999, 1)},
}


@pytest.mark.parametrize("activations", WINDOWS)
@pytest.mark.parametrize("layer", ["mxfp4"], indirect=True)
def test_windows(layer: LayerUnderTest, activations: str) -> None:
    """An exact cast loses nothing, and activations cost what they are known to cost."""
    report = layer.report(Variant(activations))
    assert report["verdict"] == "fine"
    assert report["comparisons"]["checkpoint"]["weights"]["cosine"] == 1
    assert report["mxfp4_blocks"]["inexact"] == 0
    for stage, (lowest, highest) in WINDOWS[activations].items():
        assert lowest <= report["comparisons"]["activations"][stage]["cosine"] <= highest


# ---- the other commands on trained weights -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["original", "nvfp4"])
def test_inspect_misses_routers_alone(real_folder: Path, tmp_path: Path, scheme: str) -> None:
    """The source has no routers; that is all that there is to say against trained weights."""
    report = tmp_path / "inspection.json"
    run_command([fourfold(), "inspect", real_folder / scheme, "--json", report], expected=(FINDING,))
    findings = json.loads(report.read_text())["findings"]
    assert [(finding["kind"], finding["layer"]) for finding in findings] == [
        ("missing-router", 0),
        ("missing-router", 15),
    ]


def test_calibrate_finds_the_scales_of_the_script(real_folder: Path, tmp_path: Path) -> None:
    """real_checkpoint.py calibrates the bf16 experts in numpy, on the same hidden states."""
    scales, inputs = tmp_path / "scales.safetensors", real_folder / "inputs" / "layer-15.safetensors"
    model = real_folder / "original"
    run_command([fourfold(), "calibrate", model, "--layer", 15, "--output", scales, "--input", inputs])
    found, expected = read_tensors(scales), read_shards(real_folder / "nvfp4")
    assert len(found) == 24
    for name, scale in found.items():
        # The script's intermediate is float32 throughout; fourfold's is rounded to bf16 thrice on its way.
        tolerance = 3 * 2.0**-8 if "down_proj" in name else 0
        np.testing.assert_allclose(scale, expected[name], rtol=tolerance)
