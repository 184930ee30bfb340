#!/usr/bin/env python3
"""Has other people's quantizers make checkpoints, and holds fourfold's reading of them against their own.

    python3 -m venv build/third-party
    build/third-party/bin/pip install torch transformers compressed-tensors nvidia-modelopt datasets pillow requests accelerate
    build/third-party/bin/pip install --no-deps llmcompressor auto-round     # its limits on versions lag behind
    cmake --preset release && cmake --build --preset release
    build/third-party/bin/python scripts/third_party_checkpoints.py [--build build/release] [--keep FOLDER] [CASE ...]

For every case, transformers saves a tiny model with random weights (Qwen3-MoE or Mixtral; hidden 64, experts of
96, 4 of them, one layer), llm-compressor or ModelOpt quantizes it, calibrated on random tokens, and writes its
checkpoint as for anybody. Then:
- fourfold's dequantized experts (through tests/oracle_driver, which reads as layertest does) are compared with
  the tool's own dequantization of the file. The tools round twice in float32, e2m1 x (scale x global), where
  fourfold rounds (e2m1 x scale) x global once. So the tool's order, applied to the numbers in the file by this
  script, must be the tool's result bit for bit, and fourfold's order fourfold's: then both read the same
  numbers. In bf16, in which the tools return it, the second rounding shows where it crosses the middle
  between two bf16 numbers: elements that differ are counted, and may by one unit in the last place alone.
- `fourfold inspect` must find nothing wrong with it.
- `fourfold layertest` runs on those in NVFP4, and on the NVFP4 that `fourfold convert` makes of MXFP4 beside it; it
  must have no note to make: config and tensors agree.
- what `fourfold convert` makes is read by the tools. NVFP4 in the other tool's scheme dequantizes there to the same
  values, but for the last place of the global scale; MXFP4 in the other's scheme, and its exact cast to NVFP4, to the
  same bits. As bf16, transformers loads it, and its experts hold our dequantization bit for bit. What
  convert quantizes itself, from bf16, the tool and fourfold read as the same numbers; as compressed-tensors,
  transformers loads and runs it.
- `fourfold gemmtest` runs in the layer's shape.

--keep FOLDER writes what CI reads (tests/data/third_party): the checkpoints as the tools wrote them, with
SHA-256 of the dequantized matrices beside them. Needs no GPU and no network. Exit status: 0 all agree, 1 some
do not, 2 usage.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
except ImportError as error:
    sys.exit(f"error: expected the package {error.name}, found none; this script's first lines say what to install")

HIDDEN, INNER, EXPERTS, TOP_K, VOCABULARY = 64, 96, 4, 2, 64
HALVES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float32)
PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "llmcompressor", "nvidia-modelopt")
KEPT_FILES = ("config.json", "hf_quant_config.json", "model.safetensors")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    tool: str  # "compressed-tensors" or "modelopt"
    scheme: str  # "nvfp4" or "mxfp4"
    family: str  # "qwen3-moe" or "mixtral"


CASES = {
    f"{tool}-{scheme}-{family}": Case(tool, scheme, family)
    for family in ("qwen3-moe", "mixtral")
    for tool in ("compressed-tensors", "modelopt")
    for scheme in ("nvfp4", "mxfp4")
    if (scheme, family) != ("mxfp4", "mixtral")
}


# ---- making the checkpoints ----


def save_source(family: str, folder: Path) -> None:
    """A random model in bf16, with weights of a size at which scales spread."""
    torch.manual_seed(1)
    common = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "num_experts_per_tok": TOP_K,
    }
    if family == "mixtral":
        config = transformers.MixtralConfig(**common, intermediate_size=INNER, num_local_experts=EXPERTS)
    else:
        config = transformers.Qwen3MoeConfig(
            **common,
            intermediate_size=INNER,
            moe_intermediate_size=INNER,
            num_experts=EXPERTS,
            head_dim=32,
        )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                spread = torch.randn((*parameter.shape[:-1], 1)).exp()
                parameter.copy_(0.05 * torch.randn_like(parameter) * spread)
    model.to(torch.bfloat16).save_pretrained(folder)


def quantize_by_llm_compressor(source: Path, scheme: str, folder: Path) -> None:
    import datasets
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0"
    )
    tokens = torch.randint(0, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(2))
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        recipe=QuantizationModifier(targets="Linear", scheme=scheme.upper(), ignore=["lm_head", "re:.*gate$"]),
        dataset=datasets.Dataset.from_dict(rows),
        processor=tokenizer,
        num_calibration_samples=16,
        max_seq_length=16,
    )
    model.save_pretrained(folder, save_compressed=True)


def quantize_by_modelopt(source: Path, scheme: str, folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)

    def calibrate(calibrated: torch.nn.Module) -> None:
        with torch.no_grad():
            for _ in range(16):
                calibrated(torch.randint(0, VOCABULARY, (2, 16), generator=generator))

    model = mtq.quantize(model, getattr(mtq, f"{scheme.upper()}_DEFAULT_CFG"), calibrate)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)


# ---- dequantizing with the tools' own code ----


def of_linear(tensors: Tensors, expert: int, half: str) -> Tensors:
    """What belongs to one matrix, by the last part of the names."""
    for name in HALVES[half]:
        infix = f".experts.{expert}.{name}."
        found = {key.split(infix)[1]: tensor for key, tensor in tensors.items() if infix in key}
        if found:
            return found
    raise KeyError(f"expert {expert} {half}")


def by_compressed_tensors(linear: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """As its compressors decompress, which do it in bf16: the same calls, in `dtype`."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    is_mx = linear["weight_scale"].dtype == torch.uint8
    packed = linear["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=dtype)
    scale = decompress_mx_scale(linear["weight_scale"]) if is_mx else linear["weight_scale"]
    return dequantize(
        x_q=codes,
        scale=scale.to(dtype),
        args=preset_name_to_scheme("MXFP4" if is_mx else "NVFP4", ["Linear"]).weights,
        global_scale=linear.get("weight_global_scale"),
        dtype=dtype,
    )


def by_modelopt(linear: Tensors, dtype: torch.dtype) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    packed, scale = linear["weight"], linear["weight_scale"]
    shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
    if "weight_scale_2" not in linear:
        return MXFP4QTensor(shape, dtype, packed).dequantize(dtype, scale=scale.view(-1, 1), block_sizes={-1: 32})
    return NVFP4QTensor(shape, dtype, packed).dequantize(
        dtype, scale=scale, double_scale=linear["weight_scale_2"], block_sizes={-1: 16}
    )


def in_order(linear: Tensors, rounds_twice: bool) -> torch.Tensor:
    """float32 from the numbers in the file: (e2m1 x scale) x global, or e2m1 x (scale x global)."""
    packed = linear.get("weight_packed", linear.get("weight"))
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], -1)
    scale = linear["weight_scale"]
    block = codes.shape[1] // scale.shape[1]
    wide = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()

    def with_global(values: torch.Tensor) -> torch.Tensor:
        if "weight_scale_2" in linear:
            return values * linear["weight_scale_2"]
        return values / linear["weight_global_scale"] if "weight_global_scale" in linear else values

    values = E2M1[codes.long()]
    if rounds_twice:
        return values * with_global(wide).repeat_interleave(block, dim=1)
    return with_global(values * wide.repeat_interleave(block, dim=1))


# ---- comparing ----


class Judge:
    """Prints what agrees, and remembers whether all did."""

    def __init__(self) -> None:
        self.is_fine = True

    def say(self, fine: bool, text: str) -> None:
        self.is_fine &= fine
        print(f"  {'ok  ' if fine else 'FAIL'}  {text}", flush=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for the sign of zeros: ModelOpt dequantizes code 8, which is -0, to +0."""
    a, b = a + 0.0, b + 0.0
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def read_by_fourfold(build: Path, model: Path) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"none": torch.zeros(1)}, f"{folder}/in")
        command = [build / "tests/oracle_driver", "checkpoint_weights", f"{folder}/in", f"{folder}/out"]
        subprocess.run([*map(str, command), f"checkpoint={model}"], check=True)
        return load_file(f"{folder}/out")


def compare_weights(judge: Judge, case: Case, model: Path, build: Path) -> dict[str, str]:
    """Returns the SHA-256 of every matrix as the tool dequantizes it to float32."""
    ours, tensors = read_by_fourfold(build, model), load_file(model / "model.safetensors")
    by_tool: Callable = by_compressed_tensors if case.tool == "compressed-tensors" else by_modelopt
    agree = dict.fromkeys(("their order", "our order"), 0)
    hashes, elements, differ, worst = {}, 0, 0, 0
    for expert in range(EXPERTS):
        for half in HALVES:
            linear, value = of_linear(tensors, expert, half), ours[f"{expert}.{half}"]
            wide = by_tool(linear, torch.float32)
            agree["their order"] += same_bits(in_order(linear, True), wide)
            agree["our order"] += same_bits(in_order(linear, False), value)
            hashes[f"{expert}.{half}"] = digest(wide)
            apart = ulps_apart(value.to(torch.bfloat16), by_tool(linear, torch.bfloat16))
            elements, differ = elements + apart.numel(), differ + int((apart > 0).sum())
            worst = max(worst, int(apart.max()))
    matrices = EXPERTS * len(HALVES)
    for what, count in agree.items():
        judge.say(count == matrices, f"dequantized in {what}: {count} of {matrices} matrices bit for bit")
    judge.say(worst <= 1, f"in bf16: {differ} of {elements} elements differ, by at most {worst} bf16 ulp")
    return hashes


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between bf16 numbers of the same sign, how many steps apart they are."""
    return ((a + 0.0).view(torch.int16).int() - (b + 0.0).view(torch.int16).int()).abs()


def digest(values: torch.Tensor) -> str:
    values = (values + 0.0).contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def run_fourfold(build: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(build / "fourfold"), *map(str, arguments)], capture_output=True, text=True)


def run_commands(judge: Judge, case: Case, model: Path, source: Path, build: Path, scratch: Path) -> None:
    result = run_fourfold(build, "inspect", model)
    judge.say(result.returncode == 0, f"inspect: exit code {result.returncode}{result.stderr}")
    nvfp4, original = model, source
    if case.scheme == "mxfp4":
        nvfp4, original = scratch / "cast", model
        if not convert(judge, build, model, nvfp4, "nvfp4"):
            return
    # The calibration saw this model's hidden states, layertest makes up others: scales by token fit both.
    result = run_fourfold(build, "layertest", "--nvfp4", nvfp4, "--activation-scale", "dynamic-token")
    notes = [line for line in result.stdout.splitlines() if line.startswith("note")]
    text = f"layertest: exit code {result.returncode}, {len(notes)} notes {notes}{result.stderr}"
    judge.say(result.returncode == 0 and not notes, text)
    result = run_fourfold(build, "layertest", "--nvfp4", nvfp4, "--original", original)
    text = f"layertest --original: exit code {result.returncode} {result.stdout.splitlines()[-1:]}{result.stderr}"
    judge.say(result.returncode in (0, 3), text)


# ---- what convert writes ----


def convert(judge: Judge, build: Path, source: Path, target: Path, to: str, *options: str) -> bool:
    result = run_fourfold(build, "convert", source, target, "--to", to, *options)
    text = " ".join(("convert --to", to, *options))
    judge.say(result.returncode == 0, f"{text}: exit code {result.returncode}{result.stderr}")
    return result.returncode == 0


def tool_of(scheme: str) -> Callable:
    return by_compressed_tensors if scheme == "compressed-tensors" else by_modelopt


def other_than(scheme: str) -> str:
    return "modelopt" if scheme == "compressed-tensors" else "compressed-tensors"


def largest_difference(case: Case, model: Path, converted: Path, scheme: str) -> float:
    """Relative, between what the tool makes of its own file and what the one of `scheme` makes of ours."""
    tensors, others = load_file(model / "model.safetensors"), load_file(converted / "model.safetensors")
    worst = 0.0
    for expert in range(EXPERTS):
        for half in HALVES:
            a = tool_of(case.tool)(of_linear(tensors, expert, half), torch.float32)
            b = tool_of(scheme)(of_linear(others, expert, half), torch.float32)
            worst = max(worst, ((a - b).abs() / a.abs().clamp(min=1e-30)).max().item())
    return worst


def load_by_transformers(judge: Judge, converted: Path, what: str) -> Tensors | None:
    """In a process of its own, since the tools change how transformers loads; returns its experts' matrices."""
    experts = converted.with_name(f"{converted.name}-experts.safetensors")
    command = [sys.executable, __file__, "--load", converted, experts]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    reason = result.stderr.strip().splitlines()[-1:] if result.returncode != 0 else ""
    judge.say(result.returncode == 0, f"transformers loads and runs {what}{reason}")
    return load_file(experts) if result.returncode == 0 else None


def load_and_save_experts(converted: Path, experts: Path) -> int:
    """What that process does: an error where a tensor is missing or of no use, input scales excepted, which its
    fused experts do not have.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16, output_loading_info=True)
    wrong = [key for found in info.values() for key in found if not str(key).endswith("input_global_scale")]
    if wrong:
        sys.exit(f"error: expected every tensor to be loaded, found {wrong[:4]}")
    if not model(torch.arange(VOCABULARY).reshape(2, -1)).logits.isfinite().all():
        sys.exit("error: expected finite logits, found NaN or infinity")
    save_file({name: value.contiguous() for name, value in experts_of(model).items()}, experts)
    return 0


def experts_of(model: torch.nn.Module) -> Tensors:
    """bf16 matrices of a loaded model whose experts are fused, by expert and half."""
    gate_up, down = (
        next(value for name, value in model.state_dict().items() if name.endswith(f"experts.{half}"))
        for half in ("gate_up_proj", "down_proj")
    )
    inner = down.shape[2]
    found = {}
    for expert in range(EXPERTS):
        found[f"{expert}.gate"], found[f"{expert}.up"] = gate_up[expert, :inner], gate_up[expert, inner:]
        found[f"{expert}.down"] = down[expert]
    return found


def convert_and_load(judge: Judge, case: Case, model: Path, source: Path, build: Path, scratch: Path) -> None:
    """The other direction: what fourfold converts is read by the tools and by transformers."""
    other = other_than(case.tool)
    if convert(judge, build, model, scratch / "other", case.scheme, "--scheme", other):
        # The reciprocal is off by half a place, dividing or multiplying by it rounds twice more on either side.
        allowed = 5 * 2.0**-24 if case.scheme == "nvfp4" else 0.0
        worst = largest_difference(case, model, scratch / "other", other)
        judge.say(worst <= allowed, f"read by {other}: the largest relative difference is {worst:.2e}")
    if case.scheme == "mxfp4":
        worst = largest_difference(case, model, scratch / "cast", case.tool)
        judge.say(worst == 0.0, f"the cast, read by {case.tool}: the largest relative difference is {worst:.2e}")
    # Names that transformers does not know: llm-compressor's for Mixtral.
    if (case.tool, case.family) != ("compressed-tensors", "mixtral"):
        check_bf16(judge, model, build, scratch)
    check_own_nvfp4(judge, source, build, scratch, case.tool)


def check_bf16(judge: Judge, model: Path, build: Path, scratch: Path) -> None:
    if not convert(judge, build, model, scratch / "bf16", "bf16"):
        return
    theirs = load_by_transformers(judge, scratch / "bf16", "the bf16")
    if theirs is None:
        return
    ours = read_by_fourfold(build, model)
    same = sum(torch.equal(ours[name].to(torch.bfloat16), value) for name, value in theirs.items())
    judge.say(same == len(theirs), f"its experts are our dequantization: {same} of {len(theirs)} matrices bit for bit")


def check_own_nvfp4(judge: Judge, source: Path, build: Path, scratch: Path, scheme: str) -> None:
    """bf16 that convert quantized, in the tool's scheme."""
    own = scratch / "own"
    if not convert(judge, build, source, own, "nvfp4", "--scheme", scheme):
        return
    ours, tensors = read_by_fourfold(build, own), load_file(own / "model.safetensors")
    same = 0
    for name, value in ours.items():
        expert, half = name.split(".")
        linear = of_linear(tensors, int(expert), half)
        theirs = in_order(linear, True)
        same += same_bits(theirs, tool_of(scheme)(linear, torch.float32)) and same_bits(in_order(linear, False), value)
    judge.say(same == len(ours), f"read by {scheme} and by us: the same numbers in {same} of {len(ours)} matrices")
    if scheme == "modelopt":
        return
    loaded = load_by_transformers(judge, own, "it through compressed-tensors")
    if loaded is not None:
        compare_loaded(judge, loaded, ours, tensors)


def compare_loaded(judge: Judge, loaded: Tensors, ours: Tensors, tensors: Tensors) -> None:
    """transformers 5.24 with compressed-tensors 0.20 leaves the global scales of fused experts out, of llm-compressor's
    own files too: then what it holds must be e2m1 x scale.
    """
    apart = [int(ulps_apart(ours[name].to(torch.bfloat16), value).max()) for name, value in loaded.items()]
    if max(apart) <= 1:
        judge.say(True, f"its experts are ours, but for at most {max(apart)} bf16 ulp")
        return
    same = 0
    for name, value in loaded.items():
        expert, half = name.split(".")
        linear = of_linear(tensors, int(expert), half)
        scaled = in_order({key: part for key, part in linear.items() if "global" not in key}, False)
        same += torch.equal(scaled.to(torch.bfloat16), value)
    text = "its experts are ours without their global scales, which this transformers leaves out"
    judge.say(same == len(loaded), f"{text}: {same} of {len(loaded)} matrices bit for bit")


def keep(folder: Path, name: str, model: Path, hashes: dict) -> None:
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in KEPT_FILES:
        if (model / file).exists():
            shutil.copyfile(model / file, target / file)
    (target / "dequantized.json").write_text(json.dumps(hashes, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build/release")
    parser.add_argument("--load", type=Path, nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the checkpoints there")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"expected cases of {', '.join(CASES)}, found {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    if arguments.load:
        return load_and_save_experts(*arguments.load)
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES))
    judge = Judge()
    for name in arguments.cases or CASES:
        case = CASES[name]
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            source, model = scratch / "source", scratch / "model"
            save_source(case.family, source)
            quantize = quantize_by_modelopt if case.tool == "modelopt" else quantize_by_llm_compressor
            quantize(source, case.scheme, model)
            hashes = compare_weights(judge, case, model, arguments.build)
            run_commands(judge, case, model, source, arguments.build, scratch)
            convert_and_load(judge, case, model, source, arguments.build, scratch)
            if arguments.keep:
                keep(arguments.keep, name, model, hashes)
    shape = f"{EXPERTS},{4 * TOP_K * EXPERTS},{2 * INNER},{HIDDEN}"
    result = run_fourfold(arguments.build, "gemmtest", "--shape", shape)
    judge.say(result.returncode == 0, f"gemmtest in this shape: exit code {result.returncode}{result.stderr}")
    print("all agree" if judge.is_fine else "some do not agree")
    return 0 if judge.is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
