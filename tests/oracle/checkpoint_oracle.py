"""MoE layers as they lie in checkpoints, read in numpy: docs/formats.md, sections 3 and 4. Tensors tell the
layout, config.json the rules. The safetensors package reads the files, which shares no line with the C++
reader.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

import moe_oracle as moe
import nvfp4_oracle as oracle
import router_oracle
from moe_oracle import Activation, Expert, Projection, SharedExpert
from nvfp4_oracle import Array

# Codes and block scales stay bytes, for the oracle to decode.
DTYPE_OF_NAME = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
HALVES_BY_NAMING = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass
class Stored:
    """A tensor and its dtype as the file spells it."""

    dtype: str
    array: Array


Tensors = dict[str, Stored]


def read_file(path: Path) -> Tensors:
    return {
        name: Stored(e["dtype"], np.frombuffer(e["data"], DTYPE_OF_NAME[e["dtype"]]).reshape(e["shape"]))
        for name, e in safetensors.deserialize(path.read_bytes())
    }


def read_checkpoint(directory: Path) -> Tensors:
    """All tensors: of the shards that the index names, or of the only file."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read_file(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {shard: read_file(directory / shard) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Tensors whose names begin with `prefix`, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


# ---- one matrix --------------------------------------------------------------------------------------------


def scalar(stored: Stored) -> np.float32:
    return np.float32(stored.array.reshape(()))


def read_projection(tensors: Tensors) -> Projection:
    """The tensors of one projection, by the last part of their names."""
    members: dict = {}
    if "bias" in tensors:
        members["bias"] = tensors["bias"].array
    if "input_scale" in tensors:
        members["input_scale"] = scalar(tensors["input_scale"])
    if "input_global_scale" in tensors:
        members["input_scale"] = np.float32(1) / scalar(tensors["input_global_scale"])
    if "weight_packed" in tensors:
        packed, scales = tensors["weight_packed"].array, tensors["weight_scale"]
        if scales.dtype == "U8":
            return moe.mxfp4(packed, scales.array, **members)
        return moe.nvfp4(
            packed, scales.array, scalar(tensors["weight_global_scale"]), divisor=True, **members
        )
    weight = tensors["weight"]
    if "weight_scale_2" in tensors:
        scales, global_scale = tensors["weight_scale"].array, scalar(tensors["weight_scale_2"])
        return moe.nvfp4(weight.array, scales, global_scale, **members)
    if weight.dtype == "F8_E4M3":
        return moe.fp8(weight.array, tile_scales(tensors, weight.array.shape), **members)
    if weight.dtype == "U8" and "weight_scale" in tensors:
        return moe.mxfp4(weight.array, tensors["weight_scale"].array, **members)
    if "scale" in tensors:
        return moe.mxfp4(weight.array, tensors["scale"].array, **members)
    return moe.dense(weight.array, **members)


def tile_scales(tensors: Tensors, shape: tuple[int, int]) -> Array:
    """Scales of an FP8 matrix as float32 (ceil(N / 128), ceil(K / 128)), however they are stored."""
    if "weight_scale_inv" in tensors:
        return tensors["weight_scale_inv"].array
    if "scale" in tensors:
        return oracle.decode_e8m0(tensors["scale"].array)
    tiles = [-(-extent // moe.FP8_TILE) for extent in shape]
    return np.full(tiles, scalar(tensors["weight_scale"]))


def read_expert(tensors: Tensors) -> Expert:
    """One expert by itself, names below its number."""
    halves = HALVES_BY_NAMING[any(name.startswith("w2.") for name in tensors)]
    parts = [below(tensors, f"{half}.") for half in halves]
    gate, up, down = (read_projection(part) if part else None for part in parts)
    return Expert(gate, up, down)


# ---- fused experts -----------------------------------------------------------------------------------------


def rows_of_halves(intermediate: int, order: str) -> tuple[slice, slice]:
    """Where gate's and up's rows lie among 2I."""
    first, second = slice(0, intermediate), slice(intermediate, None)
    return {
        "gate-first": (first, second),
        "up-first": (second, first),
        "interleaved": (slice(0, None, 2), slice(1, None, 2)),
    }[order]


@dataclass
class Stack:
    """The same matrix of all experts: arrays (E, N, ...) that `make` takes, and what all experts share."""

    make: Callable[..., Projection]
    arrays: dict[str, Array]
    shared: dict[str, np.float32]

    def count(self) -> int:
        return len(next(iter(self.arrays.values())))

    def projection(self, expert: int, rows: slice = slice(None)) -> Projection:
        return self.make(**{name: a[expert][rows] for name, a in self.arrays.items()}, **self.shared)


def read_fused(tensors: Tensors, order: str) -> list[Expert]:
    """All experts of a layer from 3-D tensors, names below `experts.`"""
    is_transposed = stored_transposed(tensors)
    gate_up, down = (read_stack(tensors, name, is_transposed) for name in ("gate_up_proj", "down_proj"))
    intermediate = next(iter(gate_up.arrays.values())).shape[1] // 2
    gate_rows, up_rows = rows_of_halves(intermediate, order)
    return [
        Expert(gate_up.projection(e, gate_rows), gate_up.projection(e, up_rows), down.projection(e))
        for e in range(down.count())
    ]


def read_stack(tensors: Tensors, name: str, is_transposed: bool) -> Stack:
    """gate_up_proj or down_proj, brought to (E, N, K) where it is stored (E, K, N)."""

    def array(suffix: str = "") -> Array:
        stored = tensors[name + suffix].array
        return stored.transpose(0, 2, 1) if is_transposed else stored

    biases = {"bias": tensors[f"{name}_bias"].array} if f"{name}_bias" in tensors else {}
    if f"{name}_blocks" in tensors:
        blocks = tensors[f"{name}_blocks"].array
        packed = blocks.reshape(*blocks.shape[:2], -1)
        return Stack(moe.mxfp4, {"packed": packed, "exponents": array("_scales")} | biases, {})
    if f"{name}_weight_scale_2" in tensors:
        scalars = {"global_scale": scalar(tensors[f"{name}_weight_scale_2"])}
        if f"{name}_input_scale" in tensors:
            scalars["input_scale"] = scalar(tensors[f"{name}_input_scale"])
        return Stack(moe.nvfp4, {"packed": array(), "scales": array("_weight_scale")} | biases, scalars)
    return Stack(moe.dense, {"values": array()} | biases, {})


def stored_transposed(tensors: Tensors) -> bool:
    """(E, H, 2I) beside (E, I, H), or (E, 2I, H) beside (E, H, I), the packed dimension counted in codes: only
    one of the two fits. gpt-oss's blocks are never transposed.
    """
    if "gate_up_proj_blocks" in tensors:
        return False
    gate_up, down = tensors["gate_up_proj"].array.shape, tensors["down_proj"].array.shape
    packed = 2 if "gate_up_proj_weight_scale_2" in tensors else 1
    as_transposed = gate_up[1] * packed == down[2] and gate_up[2] == 2 * down[1] * packed
    as_is = gate_up[2] * packed == down[1] and gate_up[1] == 2 * down[2] * packed
    if as_transposed == as_is:
        raise ValueError(f"gate_up_proj {gate_up} beside down_proj {down}")
    return as_transposed


# ---- rules -------------------------------------------------------------------------------------------------


@dataclass
class Rules:
    """What a family computes. router: router_oracle.route's options."""

    activation: Activation = field(default_factory=Activation)
    router: dict = field(default_factory=dict)
    weight_on_input: bool = False
    gate_up_order: str = "gate-first"


def rules_of(config: dict) -> Rules:
    """Section 4 for a config.json, nested in text_config or not."""
    config = config.get("text_config", config)
    family = config["model_type"]
    top_k = config["num_experts_per_tok"]

    def value(key: str, default: object) -> object:
        found = config.get(key)
        return default if found is None else found

    softmax = {"score": "softmax", "top_k": top_k}
    if family == "mixtral":
        return Rules(router=softmax | {"renormalise": True})
    if family in ("qwen2_moe", "qwen3_moe"):
        return Rules(router=softmax | {"renormalise": value("norm_topk_prob", False)})
    if family == "qwen3_next":
        return Rules(router=softmax | {"renormalise": value("norm_topk_prob", True)})
    if family in ("deepseek_v3", "glm4_moe", "nemotron_h"):
        groups = (8, 4) if family == "deepseek_v3" else (1, 1)
        scale = 2.5 if family == "deepseek_v3" else 1.0
        router = {
            "score": "sigmoid",
            "top_k": top_k,
            "renormalise": value("norm_topk_prob", True),
            "scaling_factor": value("routed_scaling_factor", scale),
            "groups": value("n_group", groups[0]),
            "top_groups": value("topk_group", groups[1]),
        }
        return Rules(Activation("relu_squared" if family == "nemotron_h" else "swiglu"), router)
    if family == "deepseek_v4":
        router = {
            "score": "sqrt_softplus",
            "top_k": top_k,
            "renormalise": value("norm_topk_prob", True),
            "scaling_factor": value("routed_scaling_factor", 1.5),
        }
        return Rules(Activation(limit=value("swiglu_limit", 10.0)), router)
    if family == "gpt_oss":
        activation = Activation(
            alpha=value("swiglu_alpha", 1.702), beta=1.0, limit=value("swiglu_limit", 7.0)
        )
        return Rules(activation, {"score": "softmax_of_topk", "top_k": top_k}, gate_up_order="interleaved")
    if family in ("llama4", "llama4_text"):
        router = {"score": "sigmoid", "top_k": top_k, "renormalise": False}
        return Rules(router=router, weight_on_input=True)
    raise ValueError(f"unknown family {family}")


# ---- a layer -----------------------------------------------------------------------------------------------


@dataclass
class CheckpointLayer:
    """One layer of a checkpoint: its experts and how tokens come to them."""

    experts: list[Expert]
    shared: SharedExpert | None
    rules: Rules
    router_weight: Array | None = None
    router_bias: Array | None = None
    correction_bias: Array | None = None
    experts_of_token: Array | None = None

    def route(self, x: Array, token_ids: Array | None = None) -> tuple[Array, Array]:
        """x (T, H) bf16 -> topk_ids (T, K) int32, topk_weights (T, K) float32, by the checkpoint's router."""
        logits = router_oracle.logits_of(x, self.router_weight, self.router_bias)
        given = None if self.experts_of_token is None else self.experts_of_token[token_ids]
        return router_oracle.route(
            logits, **self.rules.router, correction_bias=self.correction_bias, given_ids=given
        )

    def layer(self, activations: str, policies: tuple[str, str]) -> moe.Layer:
        return moe.Layer(
            self.experts,
            self.shared,
            self.rules.activation,
            self.rules.weight_on_input,
            activations,
            policies,
        )


def read_layer(directory: Path, layer: int = 0) -> CheckpointLayer:
    """Layer `layer` of a model directory."""
    config = json.loads((directory / "config.json").read_text())
    tensors = read_checkpoint(directory)
    block = re.compile(rf"(?:.*\.)?layers\.{layer}\.(?:mlp|ffn|block_sparse_moe|feed_forward|mixer)\.")
    prefixes = {match[0] for match in map(block.match, tensors) if match}
    if len(prefixes) != 1:
        raise ValueError(f"layer {layer}: blocks {prefixes}")
    tensors = below(tensors, prefixes.pop())
    rules = rules_of(config)
    return CheckpointLayer(
        read_experts(below(tensors, "experts."), rules.gate_up_order),
        read_shared(tensors),
        rules,
        **read_router(tensors),
    )


def read_experts(tensors: Tensors, order: str) -> list[Expert]:
    numbers = sorted({int(name.split(".")[0]) for name in tensors if name[0].isdigit()})
    if not numbers:
        return read_fused(tensors, order)
    return [read_expert(below(tensors, f"{number}.")) for number in numbers]


def read_shared(tensors: Tensors) -> SharedExpert | None:
    own = below(tensors, "shared_experts.") or below(tensors, "shared_expert.")
    if not own:
        return None
    gate = tensors.get("shared_expert_gate.weight")
    return SharedExpert(read_expert(own), None if gate is None else gate.array.reshape(-1))


def read_router(tensors: Tensors) -> dict[str, Array]:
    """Members of CheckpointLayer. A bias of `router` is added to logits, one of `gate` to scores."""
    names = {
        "router_weight": ("gate.weight", "router.weight"),
        "router_bias": ("router.bias",),
        "correction_bias": ("gate.e_score_correction_bias", "gate.bias"),
        "experts_of_token": ("gate.tid2eid",),
    }
    found = {}
    for member, candidates in names.items():
        for name in candidates:
            if name in tensors:
                array = tensors[name].array
                wide = array.dtype.kind in "iu" or member == "router_weight"
                found[member] = array if wide else array.astype(np.float32)
    return found
