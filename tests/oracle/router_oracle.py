"""Routers and activation variants in numpy, from docs/formats.md section 4. Selection is written as a sort of
(score, index) pairs, weights in float64; everything is rounded to float32 where the specification compares."""

import math

import numpy as np

from nvfp4_oracle import Array

SCORES = ("softmax", "softmax_of_topk", "sigmoid", "sqrt_softplus")


def logits_of(x: Array, weight: Array, bias: Array | None) -> Array:
    """x (T, H) and weight (E, H) bf16, bias (E,) -> (T, E): float32 sums over ascending h."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for h in range(x.shape[1]):
        total += x[:, h, None].astype(np.float32) * weight[None, :, h].astype(np.float32)
    return total if bias is None else total + bias


def scores_of(score: str, logits: Array) -> Array:
    """One token's logits (E,) -> scores (E,) float32."""
    wide = logits.astype(np.float64)
    if score == "softmax":
        powers = np.exp(wide - wide.max())
        wide = powers / powers.sum()
    elif score == "sigmoid":
        wide = 1 / (1 + np.exp(-wide))
    elif score == "sqrt_softplus":
        wide = np.sqrt(np.logaddexp(0, wide))
    return wide.astype(np.float32)


def best(scores: Array, candidates: list[int], count: int) -> list[int]:
    """The `count` candidates with the largest scores; of equals the lower index, NaN behind everything else."""

    def rank(i: int) -> tuple[bool, float, int]:
        is_nan = bool(np.isnan(scores[i]))
        return is_nan, 0.0 if is_nan else -float(scores[i]), i

    return sorted(candidates, key=rank)[:count]


def selectable(selection: Array, groups: int, top_groups: int) -> list[int]:
    """Experts in the groups whose two best selection scores have the largest float32 sums."""
    members = np.split(np.arange(len(selection)), groups)
    sums = np.array([np.sum(selection[best(selection, list(m), 2)], dtype=np.float32) for m in members])
    return [int(e) for g in best(sums, list(range(groups)), top_groups) for e in members[g]]


def route(
    logits: Array,
    score: str,
    top_k: int,
    renormalise: bool = True,
    scaling_factor: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    correction_bias: Array | None = None,
    given_ids: Array | None = None,
) -> tuple[Array, Array]:
    """logits (T, E) -> topk_ids (T, K) int32, topk_weights (T, K) float32."""
    all_ids, all_weights = [], []
    for token, row in enumerate(logits):
        scores = scores_of(score, row)
        if given_ids is not None:
            ids = [int(e) for e in given_ids[token]]
        else:
            selection = scores if correction_bias is None else scores + correction_bias
            ids = best(selection, selectable(selection, groups, top_groups), top_k)
        weights = scores[ids].astype(np.float64)
        if score == "softmax_of_topk":
            weights = scores_of("softmax", scores[ids]).astype(np.float64)
        elif renormalise:
            weights = weights / (weights.sum() + 1e-20)
        all_ids.append(ids)
        all_weights.append((weights * np.float32(scaling_factor)).astype(np.float32))
    shape = len(logits), top_k
    return np.array(all_ids, np.int32).reshape(shape), np.array(all_weights, np.float32).reshape(shape)


def activate(kind: str, h: Array, alpha: float = 1.0, beta: float = 0.0, limit: float = math.inf) -> Array:
    """h (M, 2I) gate first, or (M, I) without a gate, bf16 -> (M, I) bf16; float64 between."""
    wide = h.astype(np.float64)
    erfc = np.vectorize(math.erfc)
    if kind in ("relu_squared", "silu", "gelu"):
        u = wide
        value = {
            "relu_squared": lambda: np.maximum(u, 0) ** 2,
            "silu": lambda: u / (1 + np.exp(-u)),
            "gelu": lambda: u / 2 * erfc(-u / math.sqrt(2)),
        }[kind]()
    else:
        g, u = np.split(wide, 2, axis=1)
        clamped_u = np.clip(u, -limit, limit)
        if kind == "swiglu":
            g = np.minimum(g, limit)
            value = g / (1 + np.exp(-np.float64(np.float32(alpha)) * g)) * (clamped_u + np.float64(np.float32(beta)))
        elif kind == "swiglu_step":
            value = np.minimum(g / (1 + np.exp(-g)), limit) * clamped_u
        elif kind == "geglu":
            value = g / 2 * erfc(-g / math.sqrt(2)) * u
        else:
            # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2y)), without its cancellation
            value = g / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    return value.astype(np.float32).astype(h.dtype)
