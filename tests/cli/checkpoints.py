"""Tiny checkpoints written by hand: the layouts of real models, byte by byte, valid or damaged.

A model here is a dictionary of tensors, name -> `Tensor`: a dtype as safetensors spells it, a shape, bytes.
Tests take a valid one, break one thing, and write it. The writer knows nothing of the C++ code and nothing of
tests/oracle, and writes whatever header it is given.

Weights are born as codes and scales, so no quantizer is needed: NVFP4 with global scales that are powers of
two, or MXFP4. Either way every value has at most seven significant bits and is exact in bf16, f16 and f32, so
the same weights in another layout have the same values.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

EXPERTS, HIDDEN, INNER, TOP_K = 4, 64, 96, 2
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# amax / 2688. Inputs are N(0, 1), with an amax of 4.5 or so; intermediates of these weights stay below 16.
X_SCALE, INNER_SCALE = 6 / 2688, 16 / 2688

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

NAME_OF_DTYPE = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}
DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}


@dataclass(frozen=True)
class Tensor:
    """What a safetensors file says of a tensor, true or not."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(array: np.ndarray) -> "Tensor":
        return Tensor(NAME_OF_DTYPE[array.dtype], array.shape, array.tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, DTYPE_OF_NAME[self.dtype]).reshape(self.shape)

    def with_shape(self, *shape: int) -> "Tensor":
        """The same bytes under another shape."""
        return replace(self, shape=shape)

    def with_dtype(self, dtype: str) -> "Tensor":
        """The same bytes under another dtype."""
        return replace(self, dtype=dtype)


Tensors = dict[str, Tensor]
Config = dict[str, Any]


# ---- the file format ----


def header_and_data(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """The header as it should be, and the data: tensors one after the other, in the order given."""
    header: dict[str, Any] = {}
    data = bytearray()
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    return header, bytes(data)


def file_bytes(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, also a wrong one; `length` replaces the header's true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def valid_bytes(tensors: Mapping[str, Tensor], misalign: int = 0) -> bytes:
    """A whole file. Data begin `misalign` bytes after a multiple of 8: the format allows any alignment."""
    header, data = header_and_data(tensors)
    text = json.dumps(header).encode()
    text += b" " * ((misalign - len(text)) % 8)
    return file_bytes(text, data)


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header, of tensors alone, and data of a file, to damage it further."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return header, content[begin:]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_single(directory: Path, tensors: Tensors, config: Config | None, misalign: int = 0) -> Path:
    """A model directory with one file; without config.json where `config` is None."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SINGLE_NAME).write_bytes(valid_bytes(tensors, misalign))
    if config is not None:
        write_json(directory / "config.json", config)
    return directory


def shard_name(shard: int, shards: int) -> str:
    return f"model-{shard + 1:05}-of-{shards:05}.safetensors"


def write_shards(
    directory: Path, tensors: Tensors, config: Config | None, shards: int = 2, misalign: int = 0
) -> Path:
    """A model directory with an index and shards, of which each takes every `shards`-th tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard in range(shards):
        file = shard_name(shard, shards)
        part = dict(list(tensors.items())[shard::shards])
        (directory / file).write_bytes(valid_bytes(part, misalign))
        weight_map.update(dict.fromkeys(part, file))
    size = sum(len(tensor.data) for tensor in tensors.values())
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    if config is not None:
        write_json(directory / "config.json", config)
    return directory


# ---- weights ----


@dataclass(frozen=True)
class Linear:
    """A matrix [out, in] as blocks: 4-bit codes, one scale a block of `block`, a global scale (MXFP4: 1)."""

    codes: np.ndarray  # uint8 0-15 [out, in]
    scales: np.ndarray  # float8_e4m3fn or float8_e8m0fnu [out, in / block]
    global_scale: np.float32
    input_scale: np.float32

    @property
    def block(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def packed(self) -> np.ndarray:
        """Two codes a byte, the even index in the low nibble."""
        return self.codes[:, 0::2] | self.codes[:, 1::2] << 4

    def values(self) -> np.ndarray:
        """float32 [out, in]."""
        scales = np.repeat(self.scales.astype(np.float32), self.block, axis=1)
        return E2M1_VALUES[self.codes] * scales * self.global_scale


@dataclass(frozen=True)
class Expert:
    gate: Linear
    up: Linear
    down: Linear

    def linears(self) -> tuple[Linear, Linear, Linear]:
        return self.gate, self.up, self.down


Experts = tuple[Expert, ...]
MakeLinear = Callable[[np.random.Generator, int, int, str], Linear]


def make_experts(seed: int, make: MakeLinear, count: int, hidden: int, inner: int) -> Experts:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return tuple(Expert(*(make(rng, *shape, half) for half, shape in shapes.items())) for _ in range(count))


def scale_of_input(half: str) -> np.float32:
    """Calibrated input scale; gate's and up's differ, as they may in real checkpoints."""
    return np.float32({"gate": X_SCALE, "up": 0.75 * X_SCALE, "down": INNER_SCALE}[half])


def nvfp4_linear(rng: np.random.Generator, rows: int, cols: int, half: str) -> Linear:
    """Uniform codes, block scales from 0.5 to 3.75, a global scale of 2^-5 to 2^-7."""
    codes = rng.integers(0, 16, (rows, cols), np.uint8)
    scales = rng.integers(0x30, 0x48, (rows, cols // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    exponent = rng.integers(-6, -4) - (half == "up")
    return Linear(codes, scales, np.float32(2.0**exponent), scale_of_input(half))


def mxfp4_linear(rng: np.random.Generator, rows: int, cols: int, half: str) -> Linear:
    """Uniform codes, block scales of 2^-8 to 2^-4, for up 2^-10 to 2^-6: the exact cast to NVFP4 exists."""
    codes = rng.integers(0, 16, (rows, cols), np.uint8)
    exponents = rng.integers(-8, -3, (rows, cols // 32)) - (2 if half == "up" else 0)
    scales = (exponents + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return Linear(codes, scales, np.float32(1), scale_of_input(half))


@functools.cache
def nvfp4_experts(seed: int = 1, count: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> Experts:
    return make_experts(seed, nvfp4_linear, count, hidden, inner)


@functools.cache
def mxfp4_experts(seed: int = 2, count: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> Experts:
    return make_experts(seed, mxfp4_linear, count, hidden, inner)


def cast_to_nvfp4(experts: Experts) -> Experts:
    """The exact cast of formats.md, section 1: codes stay, two blocks of 16 share 2^(k - m), global = 2^m."""

    def cast(linear: Linear) -> Linear:
        exponents = linear.scales.view(np.uint8).astype(np.int32) - 127
        shift = int(exponents.max()) - 8
        scales = np.repeat(np.exp2(exponents - shift), 2, axis=1).astype(ml_dtypes.float8_e4m3fn)
        return replace(linear, scales=scales, global_scale=np.float32(2.0**shift))

    return tuple(Expert(*map(cast, expert.linears())) for expert in experts)


def with_odd_globals(experts: Experts) -> Experts:
    """Global scales as ModelOpt computes them: any float32, gate and up up to ten times apart."""
    rng = np.random.default_rng(3)

    def rescale(linear: Linear) -> Linear:
        return replace(linear, global_scale=np.float32(linear.global_scale * rng.uniform(0.1, 1)))

    return tuple(Expert(*map(rescale, expert.linears())) for expert in experts)


# ---- layouts: names, dtypes and shapes of expert tensors ----

QWEN = ("model.layers.{layer}.mlp.experts.{expert}", ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ("model.layers.{layer}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))
MIXTRAL_BY_PROJ = (MIXTRAL[0], QWEN[1])  # as llm-compressor names it
DEEPSEEK_V4 = ("layers.{layer}.ffn.experts.{expert}", ("w1", "w3", "w2"))
Naming = tuple[str, tuple[str, str, str]]


def linears_by_name(experts: Experts, naming: Naming, layer: int) -> Iterable[tuple[str, Linear]]:
    prefix, halves = naming
    for number, expert in enumerate(experts):
        for half, linear in zip(halves, expert.linears(), strict=True):
            yield f"{prefix.format(layer=layer, expert=number)}.{half}", linear


def nvfp4_tensors(experts: Experts, naming: Naming, layer: int = 0, scalar_shape: tuple = ()) -> Tensors:
    """Sections 3a and 3b: weight, weight_scale, weight_scale_2, input_scale."""
    tensors = {}
    for name, linear in linears_by_name(experts, naming, layer):
        tensors[f"{name}.weight"] = Tensor.of(linear.packed())
        tensors[f"{name}.weight_scale"] = Tensor.of(linear.scales)
        tensors[f"{name}.weight_scale_2"] = Tensor("F32", scalar_shape, linear.global_scale.tobytes())
        tensors[f"{name}.input_scale"] = Tensor("F32", scalar_shape, linear.input_scale.tobytes())
    return tensors


def mxfp4_tensors(experts: Experts, naming: Naming, layer: int = 0) -> Tensors:
    """Section 3d, DeepSeek-V4: weight as I8 and scale as F8_E8M0."""
    tensors = {}
    for name, linear in linears_by_name(experts, naming, layer):
        tensors[f"{name}.weight"] = Tensor.of(linear.packed().view(np.int8))
        tensors[f"{name}.scale"] = Tensor.of(linear.scales)
    return tensors


def dense_tensors(experts: Experts, naming: Naming, dtype: str, layer: int = 0) -> Tensors:
    """Section 3f: weight in BF16, F16 or F32."""
    return {
        f"{name}.weight": Tensor.of(exact(linear.values(), dtype))
        for name, linear in linears_by_name(experts, naming, layer)
    }


def fused_tensors(experts: Experts, naming: Naming, dtype: str, layer: int = 0) -> Tensors:
    """Section 3e, transformers v5: gate_up_proj (E, 2I, H), gate rows first, and down_proj (E, H, I)."""
    prefix = naming[0].format(layer=layer, expert="")
    gate_up = [np.concatenate([expert.gate.values(), expert.up.values()]) for expert in experts]
    return {
        f"{prefix}gate_up_proj": Tensor.of(exact(np.stack(gate_up), dtype)),
        f"{prefix}down_proj": Tensor.of(exact(np.stack([e.down.values() for e in experts]), dtype)),
    }


def exact(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` in another type, which must hold all of them."""
    converted = values.astype(DTYPE_OF_NAME[dtype])
    if not np.array_equal(converted.astype(np.float32), values):
        raise ValueError(f"{dtype} does not hold these weights")
    return converted


def compressed_tensors(experts: Experts, naming: Naming, layer: int = 0) -> Tensors:
    """Section 3c: weight_packed, and global scales that are divisors."""
    tensors = {}
    for name, linear in linears_by_name(experts, naming, layer):
        tensors[f"{name}.weight_packed"] = Tensor.of(linear.packed())
        tensors[f"{name}.weight_scale"] = Tensor.of(linear.scales)
        for which, scale in (("weight", linear.global_scale), ("input", linear.input_scale)):
            tensors[f"{name}.{which}_global_scale"] = Tensor.of(np.array([1 / scale], np.float32))
    return tensors


def compressed_mxfp4_tensors(experts: Experts, naming: Naming, layer: int = 0) -> Tensors:
    """Section 3c, MXFP4: weight_packed, and e8m0 scales as U8."""
    tensors = {}
    for name, linear in linears_by_name(experts, naming, layer):
        tensors[f"{name}.weight_packed"] = Tensor.of(linear.packed())
        tensors[f"{name}.weight_scale"] = Tensor.of(linear.scales.view(np.uint8))
    return tensors


# ---- configs ----


def config_for(experts: Experts, naming: Naming, quantization: Config | None = None) -> Config:
    """config.json of the model family that uses these names."""
    inner, hidden = experts[0].gate.codes.shape
    config: Config = {"hidden_size": hidden, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1}
    if naming == QWEN:
        config |= {"model_type": "qwen3_moe", "moe_intermediate_size": inner, "num_experts": len(experts)}
    elif naming[0] == MIXTRAL[0]:
        config |= {"model_type": "mixtral", "intermediate_size": inner, "num_local_experts": len(experts)}
    else:
        config |= {
            "model_type": "deepseek_v4",
            "moe_intermediate_size": inner,
            "n_routed_experts": len(experts),
            "swiglu_limit": 10.0,
        }
    if quantization is not None:
        config["quantization_config"] = quantization
    return config


COMPRESSED_NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
}
COMPRESSED_MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
DEEPSEEK_NVFP4 = {
    "quant_method": "fp8",
    "moe_quant_algo": "NVFP4",
    "quant_algo": "MIXED_PRECISION",
    "group_size": 16,
}
DEEPSEEK_MXFP4 = {"quant_method": "fp8"}


# ---- whole models, by name ----


@dataclass(frozen=True)
class Model:
    """Tensors and config of a checkpoint with one layer, and what layertest should say of it."""

    tensors: Tensors
    config: Config
    scheme: str
    naming: str


def named_experts(naming: Naming) -> str:
    """How layertest prints a naming: prefix.E.{gate,up,down}."""
    return f"{naming[0].format(layer=0, expert='E')}.{{{','.join(naming[1])}}}"


def nvfp4_model(experts: Experts, naming: Naming, scalar_shape: tuple = ()) -> Model:
    quantization = DEEPSEEK_NVFP4 if naming == DEEPSEEK_V4 else MODELOPT
    return Model(
        nvfp4_tensors(experts, naming, scalar_shape=scalar_shape),
        config_for(experts, naming, quantization),
        "nvfp4",
        named_experts(naming),
    )


def compressed_model(experts: Experts, naming: Naming) -> Model:
    return Model(
        compressed_tensors(experts, naming),
        config_for(experts, naming, COMPRESSED_NVFP4),
        "nvfp4 (compressed-tensors)",
        named_experts(naming),
    )


def compressed_mxfp4_model(experts: Experts, naming: Naming) -> Model:
    return Model(
        compressed_mxfp4_tensors(experts, naming),
        config_for(experts, naming, COMPRESSED_MXFP4),
        "mxfp4 (compressed-tensors)",
        named_experts(naming),
    )


def mxfp4_model(experts: Experts) -> Model:
    return Model(
        mxfp4_tensors(experts, DEEPSEEK_V4),
        config_for(experts, DEEPSEEK_V4, DEEPSEEK_MXFP4),
        "mxfp4",
        named_experts(DEEPSEEK_V4),
    )


def dense_model(experts: Experts, naming: Naming, dtype: str) -> Model:
    return Model(
        dense_tensors(experts, naming, dtype),
        config_for(experts, naming),
        dtype.lower(),
        named_experts(naming),
    )


def fused_model(experts: Experts, naming: Naming, dtype: str) -> Model:
    prefix = naming[0].format(layer=0, expert="")
    return Model(
        fused_tensors(experts, naming, dtype),
        config_for(experts, naming),
        f"{dtype.lower()} (fused)",
        f"{prefix}{{gate_up_proj,down_proj}}",
    )


NVFP4 = nvfp4_model(nvfp4_experts(), QWEN)
BF16 = dense_model(nvfp4_experts(), QWEN, "BF16")  # of the same values as NVFP4
FUSED = fused_model(nvfp4_experts(), QWEN, "BF16")
MXFP4 = mxfp4_model(mxfp4_experts())
CAST = nvfp4_model(cast_to_nvfp4(mxfp4_experts()), DEEPSEEK_V4)  # of the same values as MXFP4


def write_model(directory: Path, model: Model, misalign: int = 0) -> Path:
    """The model in one file."""
    return write_single(directory, model.tensors, model.config, misalign)


def changed(tensors: Tensors, name: str, tensor: Tensor | None) -> Tensors:
    """A copy with one tensor replaced, added, or left out (None)."""
    copy = {key: value for key, value in tensors.items() if key != name or tensor is not None}
    if tensor is not None:
        copy[name] = tensor
    return copy


def zeros(dtype: str, *shape: int) -> Tensor:
    return Tensor.of(np.zeros(shape, DTYPE_OF_NAME[dtype]))


def bytes_of(dtype: str, value: int, *shape: int) -> Tensor:
    """A tensor of one-byte elements, all of them `value`."""
    return Tensor(dtype, shape, bytes([value]) * int(np.prod(shape)))


# ---- inputs ----


def inputs(
    tokens: int = 12, hidden: int = HIDDEN, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 5
) -> Tensors:
    """What --input takes: x, topk_ids (each token to different experts) and topk_weights that sum to 1."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.05, 1, (tokens, top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    x = rng.standard_normal((tokens, hidden), np.float32).astype(ml_dtypes.bfloat16)
    return {"x": Tensor.of(x), "topk_ids": Tensor.of(ids), "topk_weights": Tensor.of(weights)}


def write_inputs(path: Path, tensors: Tensors | None = None) -> Path:
    path.write_bytes(valid_bytes(inputs() if tensors is None else tensors))
    return path
