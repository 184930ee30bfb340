#!/usr/bin/env python3
"""Holds fourfold's reference against the MoE modules of transformers, family by family.

    python3 -m pip install torch transformers safetensors
    cmake --preset release && cmake --build --preset release --target oracle_driver
    python3 scripts/transformers_check.py [--driver DRIVER] [--fused] [CASE ...]

For every case a tiny model with random weights in bf16 and router biases that matter is built by transformers
and saved by its save_pretrained, which writes config.json and the tensor names of the family's published
checkpoints (with --fused, its own names, experts as one tensor). The driver then reads one layer of that
directory as layertest does (load_experts, rules_of, load_router), routes by the checkpoint's router and runs
the reference with bf16 activations. Compared are the chosen experts, the routing weights and the output.

Three runs of transformers' module stand on the other side, on the same input:
- "rounded": in float32, but rounded to bf16 where fourfold rounds (docs/formats.md, section 7). What is left
  are float32 sums in another order, so that this comparison is tight: it judges the formulas.
- "float32": in float32 throughout: shows what fourfold's rounding points cost.
- "bf16": as transformers serves the model. It rounds at more points (products with routing weights, partial
  sums over experts and, in most families, the router's logits, which moves near choices). Reported, not
  judged.

Not part of the test suite: the packages are heavy. Exit status: 0 all agree, 1 some do not, 2 usage.
docs/transformers.md records what it showed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

PIP_INSTALL = "python3 -m pip install torch transformers safetensors"

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    print(f"error: {error}; install what is missing: {PIP_INSTALL}", file=sys.stderr)
    sys.exit(2)

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS, VOCABULARY = 128, 96, 8, 2, 256, 64
DEFAULT_DRIVER = Path(__file__).parents[1] / "build/release/tests/oracle_driver"

# Of the "rounded" run. Float32 sums of H = 128 products in another order differ by some 2^-22 of their size,
# and boundaries of bf16 lie 2^-8 apart: one element in 2^13 rounds to its neighbour. If as many as one in 64
# did, the relative L2 would be 2^-8 x sqrt(1/64). A limit, a bias, a factor or a choice that is wrong costs
# 2^-7 or more.
ROUNDED_TOLERANCE = 2.0**-11
# Of the "float32" run. Every rounding to bf16 is off by at most 2^-9. What h is off by reaches the activation
# at most 3.3-fold (silu(g) u: 2.3 through g where silu is not small, 1 through u; relu(u)^2: 2), then two
# more roundings: 5.3 x 2^-9, if all errors had one sign.
FLOAT32_TOLERANCE = 5.3 * 2.0**-9


@dataclass(frozen=True)
class Case:
    """A model to build: transformers' model_type, members of its config, and the layer to test."""

    model_type: str
    config: dict
    layer: int = 0
    top_k: int = TOP_K
    # Members of config.json that are taken out, so that fourfold has to know the default.
    without: tuple[str, ...] = ()


def latent_attention() -> dict:
    """The smallest attention that DeepSeek-V3's config allows; it is not run."""
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32}
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4}
    return ranks | heads


QWEN = {"moe_intermediate_size": INNER, "intermediate_size": INNER, "num_experts": EXPERTS}
DEEPSEEK = {"moe_intermediate_size": INNER, "intermediate_size": INNER, "n_routed_experts": EXPERTS}
V3 = DEEPSEEK | {"n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
V4 = DEEPSEEK | {"num_hidden_layers": 4, "swiglu_limit": 1.5}
LOCAL = {"intermediate_size": INNER, "num_local_experts": EXPERTS, "head_dim": 32}
NEMOTRON = DEEPSEEK | {"moe_shared_expert_intermediate_size": 2 * INNER, "hybrid_override_pattern": "E"}

# Limits are small, so that they bite; top-k 3 of 8 where nothing else is at stake.
CASES = {
    "mixtral": Case("mixtral", LOCAL),
    "qwen2-moe": Case("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 2 * INNER}, top_k=3),
    "qwen2-moe-normalised": Case(
        "qwen2_moe", QWEN | {"shared_expert_intermediate_size": 2 * INNER, "norm_topk_prob": True}
    ),
    "qwen3-moe": Case("qwen3_moe", QWEN | {"head_dim": 32}, top_k=3),
    "qwen3-moe-normalised": Case("qwen3_moe", QWEN | {"head_dim": 32, "norm_topk_prob": True}, top_k=3),
    "qwen3-moe-default": Case("qwen3_moe", QWEN | {"head_dim": 32}, without=("norm_topk_prob",)),
    "qwen3-next": Case(
        "qwen3_next",
        QWEN
        | {"shared_expert_intermediate_size": 2 * INNER, "layer_types": ["full_attention"], "head_dim": 32},
    ),
    "deepseek-v3": Case("deepseek_v3", V3 | latent_attention(), top_k=3),
    "deepseek-v3-default": Case(
        "deepseek_v3",
        V3 | latent_attention() | {"n_routed_experts": 32, "n_group": 8, "topk_group": 4},
        top_k=8,
        without=("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    ),
    "deepseek-v4": Case("deepseek_v4", V4, layer=3, top_k=3),
    "deepseek-v4-hash": Case("deepseek_v4", V4, layer=1, top_k=3),
    "deepseek-v4-default": Case(
        "deepseek_v4",
        {key: value for key, value in V4.items() if key != "swiglu_limit"},
        layer=3,
        without=("norm_topk_prob", "routed_scaling_factor", "swiglu_limit"),
    ),
    "glm4-moe": Case(
        "glm4_moe",
        V3
        | {
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "head_dim": 32,
        },
    ),
    "gpt-oss": Case("gpt_oss", LOCAL | {"swiglu_limit": 2.0}, top_k=3),
    "gpt-oss-default": Case("gpt_oss", LOCAL, without=("swiglu_limit", "swiglu_alpha")),
    "llama-4": Case(
        "llama4_text", LOCAL | {"intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1}, top_k=1
    ),
    "nemotron-h": Case(
        "nemotron_h", NEMOTRON | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "head_dim": 32}
    ),
    "nemotron-h-default": Case(
        "nemotron_h",
        NEMOTRON | {"head_dim": 32},
        without=("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"),
    ),
}


# ---- the module --------------------------------------------------------------------------------------------


def build_model(case: Case) -> torch.nn.Module:
    common = {
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    common |= {"num_key_value_heads": 2, "num_experts_per_tok": case.top_k}
    config = AutoConfig.for_model(case.model_type, **(common | case.config))
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def moe_of(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The MoE module of a layer, by the name that its family has for it."""
    block = (
        model.base_model.layers[layer] if hasattr(model.base_model, "layers") else model.model.layers[layer]
    )
    return next(
        getattr(block, name) for name in ("mlp", "feed_forward", "mixer", "ffn") if hasattr(block, name)
    )


def router_of(moe: torch.nn.Module) -> torch.nn.Module:
    return moe.gate if hasattr(moe, "gate") else moe.router


@torch.no_grad()
def randomise(moe: torch.nn.Module) -> None:
    """Weights that make h about N(0, 2), routers that decide, biases that change what they decide."""
    for name, parameter in (*moe.named_parameters(), *moe.named_buffers()):
        if name.endswith("tid2eid"):
            experts = moe.gate.weight.shape[0]
            picks = [torch.randperm(experts)[: parameter.shape[1]] for _ in range(parameter.shape[0])]
            parameter.copy_(torch.stack(picks))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * torch.randn_like(parameter, dtype=torch.float32))
        else:
            # Values of bf16 also where the parameter is float32 (routers of DeepSeek-V3).
            parameter.copy_((0.12 * torch.randn_like(parameter, dtype=torch.float32)).bfloat16())


class RoundingPoints(TorchFunctionMode):
    """Rounds a float32 module's intermediate values to bf16 where docs/formats.md, section 7, rounds.
    `experts` is the number of experts.

    What enters a matrix product is rounded (x and weighted x, the activation), and what leaves one (h, z),
    gpt-oss's after its bias. Logits and scores, of routers and of the shared expert's gate, stay float32:
    they are told by their width.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.widths_of_logits = (1, experts)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (functional.linear, torch.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = (rounded(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.shape[-1:].numel() in self.widths_of_logits:
            return result
        adds_bias = func in (torch.Tensor.add, torch.Tensor.__add__) and isinstance(args[1], torch.Tensor)
        leaves = func in (functional.linear, torch.bmm) or (adds_bias and args[1].dim() == 1)
        return rounded(result) if leaves else result


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


class Refused(Exception):
    """fourfold does not read a checkpoint; the message says why."""


@dataclass
class ModuleRun:
    """experts (T, K) ascending, weights (T, K) in the same order, float64, and y (T, H) float64."""

    experts: torch.Tensor
    weights: torch.Tensor
    y: torch.Tensor


@torch.no_grad()
def run_module(moe: torch.nn.Module, x: torch.Tensor, token_ids: torch.Tensor, top_k: int) -> ModuleRun:
    """x (T, H) through the module in x's type; the router's choice is taken from its own call."""
    seen: list = []
    handle = router_of(moe).register_forward_hook(lambda module, args, result: seen.append(result))
    is_hash = getattr(moe, "is_hash", False)
    result = moe(x[None], input_ids=token_ids[None]) if is_hash else moe(x[None])
    handle.remove()
    y = (result[0] if isinstance(result, tuple) else result).reshape(x.shape)
    experts, weights = chosen(seen[0], top_k)
    return ModuleRun(*by_expert(experts, weights), y.double())


def chosen(result: tuple, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router returned -> experts and weights (T, K). Llama-4's gives a score for every expert, 0 for
    those that are not chosen.
    """
    if len(result) == 2:
        weights, experts = result[0].topk(top_k, dim=-1)
        return experts, weights
    return result[2], result[1]


def by_expert(experts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending numbers: top-k without sorting has no order that means anything."""
    order = experts.argsort(dim=-1, stable=True)
    return experts.gather(1, order), weights.gather(1, order).double()


# ---- fourfold ----------------------------------------------------------------------------------------------


def run_fourfold(
    driver: Path, model: Path, layer: int, x: torch.Tensor, token_ids: torch.Tensor
) -> ModuleRun:
    source, result = model / "in.tensors", model / "out.tensors"
    save_file({"x": x, "token_ids": token_ids}, source)
    options = [f"checkpoint={model}", f"layer={layer}", "activations=bf16", "out=f32"]
    command = [driver, "checkpoint_layer", source, result, *options]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise Refused(process.stderr.strip())
    tensors = load_file(result)
    return ModuleRun(*by_expert(tensors["topk_ids"].long(), tensors["topk_weights"]), tensors["y"].double())


# ---- comparison --------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Figures of a case. problems: what disagrees; empty where all is well."""

    other_choices: int = 0
    near_ties: int = 0
    weights: float = 0.0
    rounded: float = 0.0
    float32: float = 0.0
    bf16: float = 0.0
    bf16_choices: int = 0
    problems: list[str] = field(default_factory=list)


def relative_l2(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    return float((candidate - reference).norm() / reference.norm())


def weight_tolerance(moe: torch.nn.Module, x: torch.Tensor) -> float:
    """Relative. A float32 sum of H products is off by less than H x 2^-24 of their magnitudes' sum, on either
    side. A weight moves by at most twice what logits move (softmax and every normalised score), and by a few
    roundings.
    """
    magnitudes = (x.abs().double() @ router_of(moe).weight.double().abs().T).max()
    return float(2 * 2 * HIDDEN * 2.0**-24 * magnitudes + 2.0**-20)


def judge(case: Case, driver: Path, fused: bool) -> Verdict:
    torch.manual_seed(1)
    model = build_model(case)
    moe = moe_of(model, case.layer)
    randomise(moe)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    token_ids = torch.randint(0, VOCABULARY, (TOKENS,))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=not fused)
        forget(Path(folder) / "config.json", case.without)
        try:
            ours = run_fourfold(driver, Path(folder), case.layer, x, token_ids)
        except Refused as refusal:
            return Verdict(problems=[str(refusal)])

    as_served = run_module(moe, x, token_ids, case.top_k)
    moe.float()
    in_float32 = run_module(moe, x.float(), token_ids, case.top_k)
    with RoundingPoints(router_of(moe).weight.shape[0]):
        at_our_points = run_module(moe, x.float(), token_ids, case.top_k)
    tolerance = weight_tolerance(moe, x)
    in_float64 = run_module(moe.double(), x.double(), token_ids, case.top_k)

    verdict = Verdict()
    differs = (ours.experts != in_float32.experts).any(dim=1)
    # Two float32 sums may decide a near tie differently: it is one where float64 does not confirm float32.
    near_tie = differs & (in_float64.experts != in_float32.experts).any(dim=1)
    verdict.other_choices, verdict.near_ties = int(differs.sum()), int(near_tie.sum())
    same = ~differs
    error = (ours.weights[same] - in_float32.weights[same]).abs() / in_float32.weights[same].abs()
    verdict.weights = float(error.max())
    verdict.rounded = relative_l2(at_our_points.y[same], ours.y[same])
    verdict.float32 = relative_l2(in_float32.y[same], ours.y[same])
    served = same & (as_served.experts == ours.experts).all(dim=1)
    verdict.bf16 = relative_l2(as_served.y[served], ours.y[served])
    verdict.bf16_choices = int((as_served.experts != ours.experts).any(dim=1).sum())
    for name, found, limit in (
        ("experts chosen differently, without a near tie", verdict.other_choices - verdict.near_ties, 0),
        ("routing weights", verdict.weights, tolerance),
        ("output, at fourfold's rounding points", verdict.rounded, ROUNDED_TOLERANCE),
        ("output, against float32", verdict.float32, FLOAT32_TOLERANCE),
    ):
        if not found <= limit:
            verdict.problems.append(f"{name}: {found:.3g} exceeds {limit:.3g}")
    return verdict


def forget(config: Path, keys: tuple[str, ...]) -> None:
    """Takes members out of a config.json."""
    content = json.loads(config.read_text())
    missing = [key for key in keys if key not in content]
    if missing:
        raise KeyError(f"{config}: transformers wrote no {', '.join(missing)}")
    config.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", type=Path, default=DEFAULT_DRIVER, help="the oracle_driver of a build")
    parser.add_argument(
        "--fused", action="store_true", help="save experts fused, as transformers holds them in memory"
    )
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.case if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; expected one of {', '.join(CASES)}")
    if not arguments.driver.exists():
        parser.error(
            f"no driver {arguments.driver}; build the target oracle_driver, or name it with --driver"
        )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}; {TOKENS} tokens, hidden {HIDDEN}, intermediate {INNER}")
    print(
        "choices: tokens with other experts; weights: largest relative difference; others: relative L2 of y"
    )
    print(f"{'':22}  {'choices':>8} {'weights':>9} {'rounded':>9} {'float32':>9} {'bf16':>9} {'choices':>8}")
    failed = False
    for name in arguments.case or CASES:
        verdict = judge(CASES[name], arguments.driver, arguments.fused)
        figures = f"{verdict.weights:9.1e} {verdict.rounded:9.1e} {verdict.float32:9.1e} {verdict.bf16:9.1e}"
        print(f"{name:22}  {verdict.other_choices:8} {figures} {verdict.bf16_choices:8}")
        for problem in verdict.problems:
            print(f"  {problem}")
        failed |= bool(verdict.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
