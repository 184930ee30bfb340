"""A whole MoE layer in numpy, of any weight format: biases, experts without a gate, routing weights on the
input, a shared expert, a map from the model's expert numbers to a rank's. Written from docs/formats.md,
sections 1 and 4 to 7.

Names in shapes: as in nvfp4_oracle.py; S is the shared expert's intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

import nvfp4_oracle as oracle
import router_oracle
from nvfp4_oracle import Array, Permutation, Staged

FP8_TILE = 128


# ---- weights -----------------------------------------------------------------------------------------------


@dataclass
class Projection:
    """A matrix as a GEMM multiplies by it: values (N, K) float32, and the factor of its epilogue.

    divisor: compressed-tensors' global scale, which dequantization divides by and a GEMM inverts. nvfp4:
    codes and block scales, where the weights are stored so.
    """

    values: Array
    global_scale: np.float32 = np.float32(1)
    divisor: bool = False
    bias: Array | None = None
    input_scale: np.float32 | None = None
    nvfp4: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        # The multiplication walks along K: column-major is four times as fast.
        self.values = np.asfortranarray(self.values)

    def multiplier(self) -> np.float32:
        return np.float32(1) / self.global_scale if self.divisor else self.global_scale

    def dequantized(self) -> "Projection":
        """The global scale applied to the values, rounded once: the reference in the dequantized weights."""
        if self.divisor:
            values = self.values / self.global_scale
        else:
            values = self.values * self.global_scale
        return Projection(values, bias=self.bias)


def nvfp4(packed: Array, scales: Array, global_scale: np.float32, **members: object) -> Projection:
    """e2m1 x e4m3 is exact; the global scale stays beside it."""
    values = oracle.decode_nvfp4(packed, scales)
    return Projection(values, np.float32(global_scale), nvfp4=(packed, scales), **members)


def mxfp4(packed: Array, exponents: Array, **members: object) -> Projection:
    return Projection(oracle.decode_mxfp4(packed, exponents), **members)


def fp8(codes: Array, tile_scales: Array, tile: int = FP8_TILE, **members: object) -> Projection:
    """e4m3 codes (N, K), float32 scales (ceil(N / tile), ceil(K / tile)): code x scale, rounded once."""
    rows, cols = (np.arange(extent) // tile for extent in codes.shape)
    return Projection(oracle.decode_e4m3(codes) * tile_scales[np.ix_(rows, cols)], **members)


def dense(values: Array, **members: object) -> Projection:
    """bf16, f16 or f32."""
    return Projection(values.astype(np.float32), **members)


@dataclass
class Expert:
    """gate (absent where the activation has none) and up (I, H), down (H, I)."""

    gate: Projection | None
    up: Projection
    down: Projection

    def first(self) -> list[Projection]:
        """What the first GEMM multiplies by: gate before up."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    def projections(self) -> list[Projection]:
        return [*self.first(), self.down]

    def is_nvfp4(self) -> bool:
        return all(p.nvfp4 is not None for p in self.projections())

    def x_scale(self) -> np.float32 | None:
        """Of gate's and up's input scales the larger."""
        scales = [p.input_scale for p in self.first()]
        return None if None in scales else max(scales)

    def dequantized(self) -> "Expert":
        gate = None if self.gate is None else self.gate.dequantized()
        return Expert(gate, self.up.dequantized(), self.down.dequantized())


def fold_gate_up(expert: Expert) -> Expert:
    """`--gate-up fold`: one global scale for gate and up. Weights that are not NVFP4 stay, and a lone up."""
    if expert.gate is None or not expert.is_nvfp4():
        return expert
    gate, up = expert.gate, expert.up
    fold = oracle.fold(gate.nvfp4[1], up.nvfp4[1], gate.global_scale, up.global_scale)
    return Expert(
        rescaled(gate, gate.nvfp4[0], fold.gate_scales, fold.global_scale),
        rescaled(up, up.nvfp4[0], fold.up_scales, fold.global_scale),
        expert.down,
    )


def quantize_again(expert: Expert) -> Expert:
    """`--double-quantize`: through bf16, then by ModelOpt's rule, gate and up as one tensor (2I, H)."""
    if not expert.is_nvfp4():
        return expert
    in_bf16 = [oracle.encode_bf16(p.dequantized().values).astype(np.float32) for p in expert.projections()]
    gate_up_global = oracle.nvfp4_global_of_tensor(np.concatenate(in_bf16[:-1]))
    down_global = oracle.nvfp4_global_of_tensor(in_bf16[-1])
    global_scales = [gate_up_global] * len(expert.first()) + [down_global]
    again = []
    for projection, values, global_scale in zip(expert.projections(), in_bf16, global_scales, strict=True):
        q = oracle.quantize_nvfp4(values, global_scale, modelopt_floor=True)
        again.append(rescaled(projection, q.codes, q.scales, global_scale))
    return Expert(*([None] if expert.gate is None else []), *again)


def rescaled(projection: Projection, codes: Array, scales: Array, global_scale: np.float32) -> Projection:
    """Other NVFP4 weights with the projection's bias and input scale."""
    return nvfp4(codes, scales, global_scale, bias=projection.bias, input_scale=projection.input_scale)


@dataclass
class SharedExpert:
    """The expert of every token; gate (H,) float32: its output is multiplied by sigmoid(x . gate)."""

    expert: Expert
    gate: Array | None = None

    def dequantized(self) -> "SharedExpert":
        return replace(self, expert=self.expert.dequantized())


@dataclass(frozen=True)
class Activation:
    """A variant of section 4 by router_oracle's name of it."""

    kind: str = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = np.inf

    def __call__(self, h: Array) -> Array:
        return router_oracle.activate(self.kind, h, self.alpha, self.beta, self.limit)


# ---- routing -----------------------------------------------------------------------------------------------


def to_local(topk_ids: Array, local_experts: Array | None, experts: int) -> tuple[Array, bool]:
    """Ids of the model -> of this rank, -1 for what is elsewhere; and whether one was out of range."""
    ids = topk_ids.astype(np.int64)
    if local_experts is None:
        known = (ids >= 0) & (ids < experts)
        return np.where(known, ids, -1), bool(np.any(~known & (ids != -1)))
    inside = (ids >= 0) & (ids < len(local_experts))
    local = np.where(inside, local_experts[np.clip(ids, 0, len(local_experts) - 1)], -1)
    bad = (~inside & (ids != -1)) | (local < -1) | (local >= experts)
    return np.where(bad, -1, local), bool(np.any(bad))


# ---- the layer ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Stages of a run; rows sorted by expert, but tokens in y and in everything of the shared expert."""

    permutation: Permutation
    rows: Array
    staged_x: Staged
    h: Array
    a: Array
    staged_a: Staged
    z: Array
    y32: Array
    shared: "Run | None" = None
    shared_weight: Array | None = None

    @property
    def y(self) -> Array:
        return oracle.encode_bf16(self.y32)


@dataclass
class Layer:
    """A layer and how it is computed."""

    experts: list[Expert]
    shared: SharedExpert | None = None
    activation: Activation = Activation()
    weight_on_input: bool = False
    activations: str = "bf16"
    policies: tuple[str, str] = ("dynamic-token", "dynamic-token")
    accumulate: type[np.floating] = np.float32
    rule: str = "amax"

    def dequantized(self) -> "Layer":
        """bf16 activations and weights with their global scales applied."""
        shared = None if self.shared is None else self.shared.dequantized()
        experts = [expert.dequantized() for expert in self.experts]
        return replace(self, experts=experts, shared=shared, activations="bf16", rule="amax")

    def converted(self, convert: Callable[[Expert], Expert]) -> "Layer":
        """Every expert converted, the shared one too."""
        shared = self.shared and replace(self.shared, expert=convert(self.shared.expert))
        return replace(self, experts=[convert(expert) for expert in self.experts], shared=shared)

    def run(
        self,
        x: Array,
        topk_ids: Array,
        topk_weights: Array,
        local_experts: Array | None = None,
        given: dict[str, Array] | None = None,
    ) -> Run:
        """x (T, H) bf16 -> all stages. `given`: what other code computed where libms differ, to go on with:
        "a", "shared_a" and "shared_z_weight".
        """
        given = given or {}
        local, _ = to_local(topk_ids, local_experts, len(self.experts))
        permutation = oracle.permute(local, len(self.experts))
        rows = x[permutation.token_of_row]
        if self.weight_on_input:
            weight_of_row = topk_weights.reshape(-1)[permutation.slot_of_row]
            rows = oracle.encode_bf16(weight_of_row[:, None] * rows.astype(np.float32))
            topk_weights = np.ones_like(topk_weights)
        run = self.run_experts(rows, permutation, given.get("a"))
        total = oracle.combine(run.z, permutation.row_of_slot, topk_weights)
        if self.shared is not None:
            run.shared = self.run_shared(x, given.get("shared_a"))
            run.shared_weight = given.get("shared_z_weight", self.weigh_shared(x))
            total = total + run.shared_weight[:, None] * run.shared.z.astype(np.float32)
        run.y32 = total
        return run

    def run_experts(self, rows: Array, permutation: Permutation, given_a: Array | None) -> Run:
        """Rows (M, H) bf16 sorted by expert; y is left empty."""
        offsets = permutation.group_offsets
        x_policy, a_policy = self.policies
        x_scales = [expert.x_scale() for expert in self.experts]
        staged_x = self.stage(rows, x_policy, x_scales, offsets)
        halves = zip(*(expert.first() for expert in self.experts), strict=True)
        h = np.concatenate([self.multiply(staged_x, offsets, half) for half in halves], axis=1)
        a = self.activation(h)
        down = [expert.down for expert in self.experts]
        go_on = a if given_a is None else given_a
        staged_a = self.stage(go_on, a_policy, [p.input_scale for p in down], offsets)
        z = self.multiply(staged_a, offsets, down)
        return Run(permutation, rows, staged_x, h, a, staged_a, z, np.zeros((0, z.shape[1]), np.float32))

    def run_shared(self, x: Array, given_a: Array | None) -> Run:
        """A layer of one expert that every token goes to; staged in bf16 unless its weights are NVFP4."""
        expert = self.shared.expert
        activations = self.activations if expert.is_nvfp4() else "bf16"
        alone = replace(self, experts=[expert], shared=None, activations=activations)
        everything = oracle.permute(np.zeros((len(x), 1), np.int64), 1)
        return alone.run_experts(x, everything, given_a)

    def weigh_shared(self, x: Array) -> Array:
        """(T,) float32: sigmoid(x . gate), or 1."""
        if self.shared.gate is None:
            return np.ones(len(x), np.float32)
        logits = np.zeros(len(x), np.float32)
        for h, factor in enumerate(self.shared.gate.astype(np.float32)):
            logits += x[:, h].astype(np.float32) * factor
        return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)

    def stage(self, rows: Array, policy: str, scales: list[np.float32 | None], offsets: Array) -> Staged:
        if None in scales:
            scales = [np.float32(np.nan)] * len(scales)
        return oracle.stage(rows, self.activations, policy, scales, offsets, self.rule)

    def multiply(self, staged: Staged, offsets: Array, weights: list[Projection]) -> Array:
        """Each expert's rows times its weights: bf16(alpha * acc + bias), (M, N)."""
        parts = []
        for weight, begin, end in zip(weights, offsets[:-1], offsets[1:], strict=True):
            alpha = staged.row_globals[begin:end] * weight.multiplier()
            terms = [a[begin:end] for a in staged.terms]
            product = oracle.gemm(terms, weight.values, alpha, self.accumulate)
            parts.append(product if weight.bias is None else product + weight.bias.astype(np.float32))
        return oracle.encode_bf16(np.concatenate(parts))
