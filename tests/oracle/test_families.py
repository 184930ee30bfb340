"""layertest's figures on a layer of every family against the oracle's own reading and running of the same
files: names, layouts, config rules, routers, biases, shared experts, all of it twice and independently.

`fourfold synthesize --family` makes most of the checkpoints; Llama-4 and Nemotron-H are written here, under
the names that their models have.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import moe_oracle
import nvfp4_oracle as oracle
from checkpoint_oracle import read_file, read_layer
from compare import assert_same
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
from tensor_file import NAME_OF_DTYPE, run_driver
from test_layer import assert_same_activation

SHAPE = "8,64,96,2"  # V3's groups are two of four experts
TILED = "8,288,160,2"  # several 128 x 128 tiles each way, the last ones cut short
EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 8, 64, 96, 2, 40


@dataclass(frozen=True)
class Case:
    """Options of synthesize, and the layer to test; or who writes the checkpoints."""

    options: tuple[str, ...]
    layer: int = 0
    shape: str = SHAPE


CASES = {
    "deepseek-v4": Case(("--family", "deepseek-v4", "--layers", "4"), 3),
    "deepseek-v4-hash": Case(("--family", "deepseek-v4", "--layers", "4"), 1),
    "deepseek-v3": Case(("--family", "deepseek-v3")),
    "deepseek-v3-tiled": Case(("--family", "deepseek-v3"), shape=TILED),
    "deepseek-v4-tiled": Case(("--family", "deepseek-v4"), shape=TILED),
    "gpt-oss-tiled": Case(("--family", "gpt-oss"), shape=TILED),
    "qwen3-moe": Case(("--family", "qwen3-moe")),
    "qwen2-moe": Case(("--family", "qwen2-moe")),
    "mixtral": Case(("--family", "mixtral")),
    "gpt-oss": Case(("--family", "gpt-oss")),
    "gpt-oss-bf16": Case(("--family", "gpt-oss", "--original", "bf16")),
    "llama-4": Case(()),
    "nemotron-h": Case(()),
}

# Formats, policies and the step before. "" is layertest's default policy, static: all of these checkpoints
# are calibrated.
VARIANTS = [
    ("nvfp4", "", "exact"),
    ("nvfp4x2", "", "exact"),
    ("bf16", "", "exact"),
    ("fp8", "", "exact"),
    ("nvfp4", "dynamic-token", "exact"),
    ("nvfp4", "max-over-experts,dynamic-tensor", "exact"),
    ("nvfp4x2", "dynamic-tensor,static", "exact"),
    ("nvfp4", "", "fold"),
    ("nvfp4", "", "double-quantize"),
]
STEPS: dict[str, tuple[list[str], Callable[[moe_oracle.Expert], moe_oracle.Expert]]] = {
    "exact": ([], lambda expert: expert),
    "fold": (["--gate-up", "fold"], moe_oracle.fold_gate_up),
    "double-quantize": (["--double-quantize"], moe_oracle.quantize_again),
}


# ---- checkpoints written here ------------------------------------------------------------------------------


def write_file(path: Path, tensors: dict[str, tuple[str, Array]]) -> None:
    """name -> dtype as safetensors spells it, and the array."""
    header, data = {}, bytearray()
    for name, (dtype, array) in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def plain(array: Array) -> tuple[str, Array]:
    return NAME_OF_DTYPE[array.dtype], array


def bf16(values: Array) -> Array:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16)


def quantized(values: Array) -> oracle.Nvfp4:
    """(N, K) as ModelOpt writes it."""
    wide = values.astype(np.float32)
    return oracle.quantize_nvfp4(wide, oracle.nvfp4_global_of_tensor(wide), modelopt_floor=True)


class Writer:
    """A pair of checkpoints, tensor by tensor: bf16 originals and what ModelOpt makes of them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.original: dict[str, tuple[str, Array]] = {}
        self.nvfp4: dict[str, tuple[str, Array]] = {}

    def random(self, *shape: int, spread: float = 0.15) -> Array:
        return bf16(spread * self.rng.standard_normal(shape))

    def both(self, name: str, array: Array) -> None:
        self.original[name] = self.nvfp4[name] = plain(array)

    def linear(self, name: str, rows: int, cols: int, input_scale: float | None) -> None:
        """`<name>.weight`; without an input scale it stays bf16 in both."""
        values = self.random(rows, cols)
        self.original[f"{name}.weight"] = plain(values)
        if input_scale is None:
            self.nvfp4[f"{name}.weight"] = plain(values)
            return
        q = quantized(values)
        self.nvfp4[f"{name}.weight"] = ("U8", q.codes)
        self.nvfp4[f"{name}.weight_scale"] = ("F8_E4M3", q.scales)
        self.nvfp4[f"{name}.weight_scale_2"] = ("F32", np.float32(q.global_scale).reshape(()))
        self.nvfp4[f"{name}.input_scale"] = ("F32", np.float32(input_scale).reshape(()))

    def transposed(self, name: str, experts: int, rows: int, cols: int, input_scale: float) -> None:
        """All experts' (rows, cols) as (E, cols, rows), in NVFP4 packed along the second extent."""
        values = self.random(experts, rows, cols)
        q = quantized(values.reshape(-1, cols))
        codes, scales = (a.reshape(experts, rows, -1).transpose(0, 2, 1) for a in (q.codes, q.scales))
        self.original[name] = plain(values.transpose(0, 2, 1))
        self.nvfp4[name] = ("U8", codes)
        self.nvfp4[f"{name}_weight_scale"] = ("F8_E4M3", scales)
        self.nvfp4[f"{name}_weight_scale_2"] = ("F32", np.float32(q.global_scale).reshape(()))
        self.nvfp4[f"{name}_input_scale"] = ("F32", np.float32(input_scale).reshape(()))

    def save(self, folder: Path, config: dict) -> None:
        for which in ("original", "nvfp4"):
            (folder / which).mkdir(parents=True)
            own = config if which == "original" else config | {"quantization_config": MODELOPT}
            (folder / which / "config.json").write_text(json.dumps(own))
            write_file(folder / which / "model.safetensors", getattr(self, which))
        write_file(folder / "inputs.safetensors", {"x": plain(self.random(TOKENS, HIDDEN, spread=1))})


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
X_SCALE, INNER_SCALE = 5 / 2688, 8 / 2688


def write_llama_4(folder: Path) -> None:
    """Llama-4: transposed fused experts, gate first; a shared expert; a router of sigmoids, top-1, whose
    weight multiplies the input. The config is nested, as in multimodal models.
    """
    writer, prefix = Writer(4), "language_model.model.layers.0.feed_forward."
    writer.both(f"{prefix}router.weight", writer.random(EXPERTS, HIDDEN))
    writer.transposed(f"{prefix}experts.gate_up_proj", EXPERTS, 2 * INNER, HIDDEN, X_SCALE)
    writer.transposed(f"{prefix}experts.down_proj", EXPERTS, HIDDEN, INNER, INNER_SCALE)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    for half, (rows, cols) in shapes.items():
        writer.linear(f"{prefix}shared_expert.{half}", rows, cols, None)
    text = {
        "model_type": "llama4_text",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "hidden_act": "silu",
    }
    writer.save(folder, {"model_type": "llama4", "text_config": text})


def write_nemotron_h(folder: Path) -> None:
    """Nemotron-H: relu(u)^2 without a gate, DeepSeek-V3's router without groups, a larger shared expert."""
    writer, prefix, shared = Writer(5), "backbone.layers.0.mixer.", 2 * INNER
    writer.both(f"{prefix}gate.weight", writer.random(EXPERTS, HIDDEN))
    bias = np.linspace(-0.2, 0.2, EXPERTS, dtype=np.float32)
    writer.both(f"{prefix}gate.e_score_correction_bias", bias)
    for expert in range(EXPERTS):
        writer.linear(f"{prefix}experts.{expert}.up_proj", INNER, HIDDEN, X_SCALE * (1 + expert / 8))
        writer.linear(f"{prefix}experts.{expert}.down_proj", HIDDEN, INNER, INNER_SCALE)
    writer.linear(f"{prefix}shared_experts.up_proj", shared, HIDDEN, X_SCALE)
    writer.linear(f"{prefix}shared_experts.down_proj", HIDDEN, shared, 2 * INNER_SCALE)
    config = {
        "model_type": "nemotron_h",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "moe_shared_expert_intermediate_size": shared,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": TOP_K,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "mlp_hidden_act": "relu2",
    }
    writer.save(folder, config)


WRITERS = {"llama-4": write_llama_4, "nemotron-h": write_nemotron_h}


# ---- one layer under test ----------------------------------------------------------------------------------


class LayerUnderTest:
    """A pair of checkpoints: what layertest reports of it, and what the oracle makes of it."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.folder, self.layer = folder, layer
        self.original, self.nvfp4 = (read_layer(folder / which, layer) for which in ("original", "nvfp4"))
        inputs = {name: stored.array for name, stored in read_file(folder / "inputs.safetensors").items()}
        self.x, self.token_ids = inputs["x"], inputs.get("token_ids")
        self.ids, self.weights = self.nvfp4.route(self.x, self.token_ids)
        self.original_layer = self.original.layer("bf16", ("dynamic-token",) * 2)
        self.original_run = self.run(self.original_layer)

    def run(self, layer: moe_oracle.Layer) -> moe_oracle.Run:
        return layer.run(self.x, self.ids, self.weights)

    def report(self, activations: str, policies: str, options_of_step: list[str]) -> dict:
        path = self.folder / "report.json"
        checkpoints = ["--original", self.folder / "original", "--nvfp4", self.folder / "nvfp4"]
        inputs = ["--layer", self.layer, "--input", self.folder / "inputs.safetensors"]
        scale = ["--activation-scale", policies] if policies else []
        options = ["--backend", "reference", "--json", path, "--activations", activations, *scale]
        options += options_of_step
        run_command([fourfold(), "layertest", *checkpoints, *inputs, *options], (FINE, FINDING))
        return json.loads(path.read_text())


def weight_sums(original: moe_oracle.Layer, dequantized: moe_oracle.Layer) -> Array:
    """(P, 4), one row an expert, the shared one last."""

    def experts(layer: moe_oracle.Layer) -> list[moe_oracle.Expert]:
        return layer.experts + ([layer.shared.expert] if layer.shared else [])

    def sums(*pair: moe_oracle.Expert) -> Array:
        matrices = zip(*(expert.projections() for expert in pair), strict=True)
        return sum(error_sums(a.values, b.values).sum(axis=0) for a, b in matrices)

    return np.array([sums(*pair) for pair in zip(experts(original), experts(dequantized), strict=True)])


def stages(run: moe_oracle.Run) -> dict[str, Array]:
    """Outputs under layertest's names."""
    own = {"l1": run.h, "activation": run.a, "l2": run.z}
    if run.shared is not None:
        own |= {f"shared_{name}": stage for name, stage in stages(run.shared).items() if name != "out"}
    return own | {"out": run.y}


def check_stages(found: dict, reference: moe_oracle.Run, candidate: moe_oracle.Run) -> None:
    """Every stage's figures, and the worst token and expert."""
    permutation = reference.permutation
    expert_of_row = np.repeat(np.arange(EXPERTS), np.diff(permutation.group_offsets))
    pairs = {name: (a, stages(candidate)[name]) for name, a in stages(reference).items()}
    assert set(found) - {"weights"} == set(pairs)
    for name, (expected, actual) in pairs.items():
        by_row = error_sums(expected, actual)
        check_figures(name, found[name], by_row)
        if found[name]["rel_l2"] == 0:
            continue
        by_token = name == "out" or name.startswith("shared_")
        tokens = np.arange(TOKENS) if by_token else permutation.token_of_row
        assert found[name]["worst_token"] in worst(relative_l2(by_row), tokens), name
        if by_token:
            assert found[name]["worst_expert"] is None
        else:
            experts = np.unique(expert_of_row)
            by_expert = np.array([by_row[expert_of_row == e].sum(axis=0) for e in experts])
            assert found[name]["worst_expert"] in worst(relative_l2(by_expert), experts), name


def check_input_scales(found: dict, layer: moe_oracle.Layer, run: moe_oracle.Run) -> None:
    """What static and tensor-wide scales lose against scales by token, the shared expert by itself."""
    parts = [("", layer.experts, run)]
    if layer.shared is not None and layer.shared.expert.is_nvfp4():
        parts.append(("shared_", [layer.shared.expert], run.shared))
    ratios = {}
    for prefix, experts, part in parts:
        x_scales, a_scales = [e.x_scale() for e in experts], [e.down.input_scale for e in experts]
        staged = (("x", part.rows, x_scales), ("intermediate", part.a, a_scales))
        for (name, rows, scales), policy in zip(staged, layer.policies, strict=True):
            if policy != "dynamic-token":
                offsets = part.permutation.group_offsets
                losses = staging_ratios(rows, scales, layer.activations, policy, offsets)
                ratios[prefix + name] = max(losses.values())
    found_ratios = {name: entry["ratio"] for name, entry in found.items()}
    assert found_ratios == pytest.approx(ratios, rel=0, abs=TOLERANCE)


@pytest.fixture(scope="module", params=CASES)
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LayerUnderTest:
    folder, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    if request.param in WRITERS:
        WRITERS[request.param](folder)
    else:
        fixed = ["--shape", case.shape, "--tokens", TOKENS, "--seed", 2]
        run_command([fourfold(), "synthesize", folder, *fixed, *case.options])
    return LayerUnderTest(folder, case.layer)


@pytest.mark.parametrize(("activations", "policies", "step"), VARIANTS, ids=lambda text: text or "default")
def test_figures(layer: LayerUnderTest, activations: str, policies: str, step: str) -> None:
    options, convert = STEPS[step]
    report = layer.report(activations, policies, options)
    x_policy, _, a_policy = (policies or "static").partition(",")
    emulation = layer.nvfp4.layer(activations, (x_policy, a_policy or x_policy)).converted(convert)
    dequantized = emulation.dequantized()
    emulation_run, dequantized_run = layer.run(emulation), layer.run(dequantized)
    checkpoint, activation_figures = (report["comparisons"][name] for name in ("checkpoint", "activations"))
    check_figures("weights", checkpoint["weights"], weight_sums(layer.original_layer, dequantized))
    check_stages(checkpoint, layer.original_run, dequantized_run)
    check_stages(activation_figures, dequantized_run, emulation_run)
    has_scales = activations in ("nvfp4", "nvfp4x2") and policies != "dynamic-token"
    if has_scales:
        check_input_scales(report["input_scales"], emulation, emulation_run)
    else:
        assert "input_scales" not in report


@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
@pytest.mark.parametrize("which", ["original", "nvfp4"])
def test_loaded_layer(layer: LayerUnderTest, which: str, activations: str) -> None:
    """Bit for bit: the layer as the library reads, routes and runs it, of either checkpoint."""
    inputs = {"x": layer.x}
    if layer.token_ids is not None:
        inputs["token_ids"] = layer.token_ids
    options = {"checkpoint": layer.folder / which, "layer": layer.layer, "activations": activations}
    found = run_driver("checkpoint_layer", inputs, out="f32", **options)

    own = layer.original if which == "original" else layer.nvfp4
    ids, weights = own.route(layer.x, layer.token_ids)
    assert_same("topk_ids", found["topk_ids"], ids)
    # As in test_router.py: one ulp of float32 is another libm's.
    assert np.all(np.abs(found["topk_weights"] - weights) <= 2.0**-23 * weights)
    given = {name: found[name] for name in ("a", "shared_a", "shared_z_weight") if name in found}
    run = own.layer(activations, ("dynamic-token",) * 2).run(layer.x, ids, found["topk_weights"], given=given)
    for name, expected in {"h": run.h, "z": run.z, "y": run.y32}.items():
        assert_same(name, found[name], expected)
    assert_same_activation(found["a"], run.a)
    assert (run.shared is not None) == ("shared_h" in found)
    if run.shared is not None:
        assert_same("shared_h", found["shared_h"], run.shared.h)
        assert_same("shared_z", found["shared_z"], run.shared.z)
        assert_same_activation(found["shared_a"], run.shared.a)
