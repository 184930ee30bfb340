"""A small serving engine in numpy: loads an NVFP4 checkpoint, routes and computes an MoE layer, and can be told to
get one thing wrong. What layertest --candidate has to diagnose.

It shares no code with fourfold, and none with tests/oracle: weights are stacked into w13 and w2 as engines stack
them, every bug is a wrong line at the place where engines have it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

import checkpoints as ck

Array = np.ndarray
FP4 = ml_dtypes.float4_e2m1fn
FP8 = ml_dtypes.float8_e4m3fn


def bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@dataclass
class Names:
    """Where a family keeps its tensors."""

    block: str
    gate: str
    up: str
    down: str


QWEN = Names("model.layers.{}.mlp", "gate_proj", "up_proj", "down_proj")  # and DeepSeek-V3
DEEPSEEK_V4 = Names("layers.{}.ffn", "w1", "w3", "w2")


@dataclass
class Engine:
    """One layer of a checkpoint; `bug` names the line that is wrong, "" none. `activations`: as
    --activation-format spells it."""

    model: Path
    layer: int
    names: Names
    top_k: int
    activations: str = "bf16"
    bug: str = ""
    limit: float = np.inf  # of the clamp
    score: str = "softmax"  # or sigmoid, sqrtsoftplus
    router_bias: str = ""  # its tensor
    scaling: float = 1.0
    groups: tuple[int, int] = (1, 1)  # all, and those that are chosen from
    tensors: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in sorted(self.model.glob("*.safetensors")):
            header, data = ck.read_header(file)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                dtype = ck.DTYPE_OF_NAME[entry["dtype"]]
                self.tensors[name] = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
        self.load()

    # ---- loading ----

    def tensor(self, name: str) -> Array:
        layer = self.layer - 1 if self.bug == "layer before" and "experts" in name else self.layer
        return self.tensors[f"{self.names.block.format(layer)}.{name}"]

    def load(self) -> None:
        """w13 [E, 2I, H] and w2 [E, H, I] as float32 without global scales, and those beside them."""
        self.experts = len({name for name in self.tensors if self.is_gate(name)})
        halves = [self.names.gate, self.names.up]
        if self.bug == "up first":
            halves.reverse()
        stacks = [[self.linear(e, half) for half in halves] for e in range(self.experts)]
        packed = np.stack([np.concatenate([linear[0] for linear in pair]) for pair in stacks])
        scales = np.stack([np.concatenate([linear[1] for linear in pair]) for pair in stacks])
        self.w13 = self.decode(packed, scales, "w13")
        self.globals13 = np.array([[linear[2] for linear in pair] for pair in stacks], np.float32)
        down = [self.linear(e, self.names.down) for e in range(self.experts)]
        self.w2 = self.decode(np.stack([d[0] for d in down]), np.stack([d[1] for d in down]), "w2")
        self.globals2 = np.array([d[2] for d in down], np.float32)
        self.x_scales = np.array([max(self.input_scale(e, half) for half in halves) for e in range(self.experts)])
        self.inner_scales = np.array([self.input_scale(e, self.names.down) for e in range(self.experts)])
        if self.bug == "gate's global for up":
            self.globals13[:, 1] = self.globals13[:, 0]
        if self.bug == "w2 without weight_scale_2":
            self.globals2[:] = 1
        if self.bug == "interleaved":
            order = np.arange(self.w13.shape[1]).reshape(-1, 2).T.ravel()
            self.w13 = self.w13[:, order]

    def is_gate(self, name: str) -> bool:
        block = self.names.block.format(self.layer)
        return name.startswith(f"{block}.experts.") and name.endswith(f".{self.names.gate}.weight")

    def linear(self, expert: int, which: str) -> tuple[Array, Array, float]:
        name = f"experts.{expert}.{which}"
        scale = self.tensor(f"{name}.weight_scale_2")
        return self.tensor(f"{name}.weight"), self.tensor(f"{name}.weight_scale"), float(scale.reshape(()))

    def input_scale(self, expert: int, which: str) -> np.float32:
        return np.float32(self.tensor(f"experts.{expert}.{which}.input_scale").reshape(()))

    def decode(self, packed: Array, scales: Array, which: str) -> Array:
        """[E, N, K/2] codes and [E, N, K/16] scales."""
        low, high = packed & 15, packed >> 4
        if self.bug == "high nibble first":
            low, high = high, low
        table = np.arange(16).astype(np.uint8).view(FP4).astype(np.float32)
        if self.bug == "3.5 for 3":
            table[[5, 13]] = 3.5, -3.5
        values = np.stack([table[low], table[high]], -1).reshape(*packed.shape[:2], -1)
        decoded = scales.astype(np.float32)
        if self.bug == f"{which}: e8m0 scales":
            decoded = scales.view(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        if self.bug == f"{which}: transposed scales":
            decoded = np.stack([s.reshape(s.shape[1], s.shape[0]).T for s in decoded])
        if self.bug == f"{which}: scales never swizzled":
            decoded = self.as_if_swizzled(decoded)
        return values * np.repeat(decoded, 16, 2)

    @staticmethod
    def as_if_swizzled(scales: Array) -> Array:
        """The kernel reads 32x4x4 tiles, the loader left rows; what lies behind the array is zero."""
        experts, rows, blocks = scales.shape
        tiles = -(-blocks // 4)
        row, block = np.meshgrid(np.arange(rows), np.arange(blocks), indexing="ij")
        offset = (row // 128 * tiles + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
        flat = np.concatenate([scales.ravel(), np.zeros(1 << 20, np.float32)])
        return np.stack([flat[e * rows * blocks + offset] for e in range(experts)])

    # ---- routing ----

    def route(self, x: Array) -> tuple[Array, Array]:
        logits = x.astype(np.float64) @ self.tensor("gate.weight").astype(np.float64).T
        bias = np.zeros(self.experts)
        if self.score == "softmax":
            scores = np.exp(logits - logits.max(1, keepdims=True))
            scores /= scores.sum(1, keepdims=True)
        else:
            scores = sigmoid(logits) if self.score == "sigmoid" else np.sqrt(np.log1p(np.exp(logits)))
            bias = self.tensor(self.router_bias).astype(np.float64)
        selection = scores + bias
        groups, chosen = self.groups
        if groups > 1:
            by_group = np.sort(selection.reshape(len(x), groups, -1), 2)
            best = np.argsort(-by_group[:, :, -2:].sum(2), 1)[:, :chosen]
            open_groups = np.zeros((len(x), groups), bool)
            np.put_along_axis(open_groups, best, True, 1)
            selection = np.where(np.repeat(open_groups, self.experts // groups, 1), selection, -np.inf)
        ids = np.argsort(-selection, 1, kind="stable")[:, : self.top_k]
        weights = np.take_along_axis(scores + bias if self.bug == "biased weights" else scores, ids, 1)
        if self.bug != "not normalised":
            weights /= weights.sum(1, keepdims=True)
        if self.bug != "no scaling factor":
            weights *= self.scaling
        return ids.astype(np.int32), weights.astype(np.float32)

    # ---- the layer ----

    def quantize(self, rows: Array, scale: float, largest: float) -> tuple[Array, Array]:
        """Values as the GEMM sees them, and what each row's result is multiplied by."""
        one = np.ones((len(rows), 1), np.float32)
        if self.activations == "bf16":
            return rows, one
        amax = np.abs(rows).max(1, keepdims=True)
        if self.activations == "fp8":
            factor = (amax / 448).astype(np.float32)
            return (rows / factor).astype(FP8).astype(np.float32), factor
        static = largest if self.activations == "nvfp4-max-over-experts" else scale
        factor = amax / np.float32(2688) if self.activations == "nvfp4-dynamic-token" else static * one
        blocks = rows.reshape(len(rows), -1, 16)
        wanted = np.abs(blocks).max(2) / np.float32(6) / factor
        scales = np.minimum(wanted, 448).astype(FP8).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(scales[..., None] == 0, 0, blocks / (scales * factor)[..., None])
        codes = np.clip(scaled, -6, 6).astype(FP4).astype(np.float32)
        values = (codes * scales[..., None]).reshape(rows.shape)
        return values, one if self.bug == "alpha without the activation's scale" else factor

    def activate(self, gate: Array, up: Array) -> Array:
        if self.bug != "no clamp":
            gate, up = np.minimum(gate, self.limit), np.clip(up, -self.limit, self.limit)
        if self.bug == "gelu":
            cubic = gate + 0.044715 * gate.astype(np.float64) ** 3
            return (0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic)) * up).astype(np.float32)
        return (gate * sigmoid(gate) * up).astype(np.float32)

    def shared(self, x: Array) -> Array:
        """What the shared expert adds; it is NVFP4 like the others, or FP8 with scales of 128 x 128."""
        prefix = "shared_experts"
        matrices = [f"{prefix}.{which}" for which in (self.names.gate, self.names.up, self.names.down)]
        if f"{self.names.block.format(self.layer)}.{matrices[0]}.weight" not in self.tensors:
            return np.zeros_like(x)
        if f"{self.names.block.format(self.layer)}.{matrices[0]}.scale" in self.tensors:
            weights = [self.blockwise(m) for m in matrices]
            factors, scales = [1.0, 1.0, 1.0], None
        else:
            linears = [[self.tensor(f"{m}.{part}") for part in ("weight", "weight_scale")] for m in matrices]
            weights = [self.decode(codes[None], scale[None], "shared")[0] for codes, scale in linears]
            factors = [float(self.tensor(f"{m}.weight_scale_2").reshape(())) for m in matrices]
            scales = [np.float32(self.tensor(f"{m}.input_scale").reshape(())) for m in matrices]
        values, factor = (x, 1.0) if scales is None else self.quantize(x, max(scales[:2]), max(scales[:2]))
        gate, up = (bf16(values @ w.T * (factor * f)) for w, f in zip(weights[:2], factors[:2], strict=True))
        a = bf16(self.activate(gate, up))
        values, factor = (a, 1.0) if scales is None else self.quantize(a, scales[2], scales[2])
        return bf16(values @ weights[2].T * (factor * factors[2]))

    def blockwise(self, name: str) -> Array:
        weight = self.tensor(f"{name}.weight").astype(np.float32)
        scale = self.tensor(f"{name}.scale").astype(np.float32)
        grown = np.repeat(np.repeat(scale, 128, 0), 128, 1)
        return weight * grown[: weight.shape[0], : weight.shape[1]]

    def expert(self, e: int, x: Array) -> tuple[Array, Array, Array]:
        """h, activation and z of an expert's rows."""
        if self.bug == "expert off by one":
            e = (e + 1) % self.experts
        values, factor = self.quantize(x, self.x_scales[e], self.x_scales.max())
        inner = self.w13.shape[1] // 2
        alpha = np.repeat(self.globals13[e], inner)
        h = bf16(values @ self.w13[e].T * (factor * alpha))
        a = bf16(self.activate(h[:, :inner], h[:, inner:]))
        values, factor = self.quantize(a, self.inner_scales[e], self.inner_scales.max())
        k = inner
        if self.bug == "no all-reduce":
            k = inner // 2
        if self.bug == "K rounded down":
            k = inner // 64 * 64
        return h, a, bf16(values[:, :k] @ self.w2[e, :, :k].T * (factor * self.globals2[e]))

    def run(self, x: Array, ids: Array, weights: Array) -> dict[str, Array]:
        """x [T, H] bf16 values; the stages and the output, as an engine would dump them."""
        tokens, top_k = ids.shape
        inner = self.w2.shape[2]
        h = np.zeros((tokens * top_k, 2 * inner), np.float32)
        a = np.zeros((tokens * top_k, inner), np.float32)
        z = np.zeros((tokens, top_k, x.shape[1]), np.float32)
        for e in range(self.experts):
            rows, slots = np.nonzero(ids == e)
            if len(rows):
                at = rows * top_k + slots
                h[at], a[at], z[rows, slots] = self.expert(e, x[rows])
        if self.bug == "no routing weights":
            weights = np.ones_like(weights)
        if self.bug == "worst first":
            weights = weights[:, ::-1]
        times = {"no shared expert": 0, "shared expert twice": 2}.get(self.bug, 1)
        y = bf16((z * weights[:, :, None]).sum(1, dtype=np.float32) + times * self.shared(x))
        if self.bug == "rows reversed":
            y = y[::-1]
        return {"h": h, "activation": a, "output": y}
