"""The specification (formats.md and its amendments) once more, in numpy: what the C++ reference is compared
with.

Shares no code with the C++ implementation and takes no shortcut that the text does not take. Every array that
the text computes in float32 is a float32 array here; Python scalars do not widen it (numpy 2 promotion), and
the few constants are spelled np.float32 where that matters. Codes are uint8 arrays, one code a byte until
packed.

Names in shapes: R rows, K the reduction axis, M rows sorted by expert, T tokens, E experts, H hidden size, I
intermediate size.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray
Scale = np.ndarray | np.float32

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
E2M1_MAX = np.float32(6)
E2M1_NAN = 7
E4M3_MAX = np.float32(448)
E4M3_NAN = 0x7F
E4M3_ONE = 0x38
E4M3_SMALLEST = 0x01
E4M3_SMALLEST_EXPONENT = -9
E4M3_LARGEST_EXPONENT = 8
E8M0_NAN = 0xFF
E8M0_BIAS = 127
NVFP4_MAX = np.float32(6 * 448)
SMALLEST_DYNAMIC_SCALE = np.float32(2.0**-100)

# Overflow to inf, 0 * inf and 1 / 0 are part of the specified sequences; the results are what is compared.
np.seterr(all="ignore")


# ---- codecs ------------------------------------------------------------------------------------------------


def decode_e2m1(codes: Array) -> Array:
    """e2m1 codes 0-15, one a byte -> float32 values, same shape."""
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def decode_e4m3(codes: Array) -> Array:
    """e4m3 codes -> float32 values, same shape."""
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def decode_e8m0(codes: Array) -> Array:
    """e8m0 codes -> float32 values, same shape; code 0 is the float32 subnormal 2^-127."""
    return codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def encode_e2m1(values: Array) -> Array:
    """float32 values -> e2m1 codes: nearest, ties to even mantissa, saturating at 6; NaN of either sign is
    +6.
    """
    saturated = np.clip(values, -E2M1_MAX, E2M1_MAX)
    codes = saturated.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(E2M1_NAN), codes)


def encode_e4m3(values: Array) -> Array:
    """float32 values -> e4m3 codes: nearest even, saturating at 448 as ml_dtypes does not; NaN is 0x7F."""
    saturated = np.clip(values, -E4M3_MAX, E4M3_MAX)
    codes = saturated.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(E4M3_NAN), codes)


def encode_bf16(values: Array) -> Array:
    """float32 values -> bfloat16: nearest even, overflow to inf; NaN keeps sign and upper payload, made
    quiet.
    """
    upper_half = (values.view(np.uint32) >> 16).astype(np.uint16)
    quiet = (upper_half | np.uint16(0x40)).view(ml_dtypes.bfloat16)
    return np.where(np.isnan(values), quiet, values.astype(ml_dtypes.bfloat16))


def pack(codes: Array) -> Array:
    """(..., K) codes, one a byte -> (..., K/2) bytes, the even index in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Array) -> Array:
    """(..., K/2) bytes -> (..., K) codes, one a byte."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def blocked(rows: Array, block: int) -> Array:
    """(..., K) -> (..., K/block, block)."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // block, block)


def unblocked(blocks: Array) -> Array:
    """(..., n, block) -> (..., n * block)."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def decode_nvfp4(packed: Array, scales: Array) -> Array:
    """e2m1 x block scale, without the global: (..., K/2), (..., K/16) -> (..., K) float32."""
    return unblocked(blocked(decode_e2m1(unpack(packed)), NVFP4_BLOCK) * decode_e4m3(scales)[..., None])


def decode_mxfp4(packed: Array, scales: Array) -> Array:
    """e2m1 x block scale: (..., K/2), (..., K/32) -> (..., K) float32."""
    return unblocked(blocked(decode_e2m1(unpack(packed)), MXFP4_BLOCK) * decode_e8m0(scales)[..., None])


# ---- quantizers --------------------------------------------------------------------------------------------


def largest_magnitude(values: Array, axis: int | None = None) -> Array:
    """max |value|, 0 for nothing at all; a NaN anywhere is the result."""
    return np.max(np.abs(values), axis=axis, initial=np.float32(0))


def dynamic_global(amax: Array, largest_code: np.float32) -> Array:
    """amax -> decode multiplier: amax / largest representable, 1 where there is nothing but zeros."""
    return np.where(amax == 0, np.float32(1), np.maximum(amax / largest_code, SMALLEST_DYNAMIC_SCALE))


def nvfp4_global_of_tensor(x: Array) -> Array:
    """The dynamic global scale of (R, K) as a whole, shape ()."""
    return dynamic_global(largest_magnitude(x), NVFP4_MAX)


def nvfp4_global_of_rows(x: Array) -> Array:
    """The dynamic global scale of each row of (R, K), shape (R,)."""
    return dynamic_global(largest_magnitude(x, axis=-1), NVFP4_MAX)


@dataclass
class Nvfp4:
    """Quantized rows: codes (R, K/2), scales (R, K/16), global scale () or (R,), and their float32 values (R,
    K).
    """

    codes: Array
    scales: Array
    global_scale: Scale
    dequantized: Array


def quantize_nvfp4(x: Array, global_scale: Scale, modelopt_floor: bool = False) -> Nvfp4:
    """Quantize float32 (R, K) with a given global scale, of shape () for all rows or (R,) by row."""
    row_global = np.broadcast_to(global_scale, x.shape[:1])[:, None]
    blocks = blocked(x, NVFP4_BLOCK)
    amax = largest_magnitude(blocks, axis=-1)
    scales = encode_e4m3(amax / E2M1_MAX / row_global)
    scales = np.where(np.isfinite(amax), scales, np.uint8(E4M3_NAN))
    if modelopt_floor:
        # Scales are not negative, so their codes order as their values do, NaN above all.
        scales = np.maximum(scales, np.uint8(E4M3_SMALLEST))
        scales = np.where(amax == 0, np.uint8(E4M3_ONE), scales)
    decoded_scales = decode_e4m3(scales)
    reciprocal = np.where(decoded_scales == 0, np.float32(0), np.float32(1) / (decoded_scales * row_global))
    codes = pack(unblocked(encode_e2m1(blocks * reciprocal[..., None])))
    return Nvfp4(codes, scales, global_scale, decode_nvfp4(codes, scales) * row_global)


def quantize_nvfp4_searching(x: Array, global_scale: Scale, rule: str, modelopt_floor: bool = True) -> Nvfp4:
    """float32 (R, K), the block scale by rule: "four-over-six" takes amax / 4 for amax / 6 where the squared
    error is smaller, "mse" the best code within 8 of the one of amax / 6. Errors are summed in float64 in
    order; the first candidate keeps a tie, lower codes go first.
    """
    first = quantize_nvfp4(x, global_scale, modelopt_floor)
    row_global = np.broadcast_to(global_scale, x.shape[:1])[:, None]
    blocks = blocked(x, NVFP4_BLOCK)
    amax = largest_magnitude(blocks, axis=-1)
    candidates = [first.scales]
    if rule == "four-over-six":
        fourths = encode_e4m3(amax / np.float32(4) / row_global)
        candidates.append(np.maximum(fourths, np.uint8(E4M3_SMALLEST)))
    else:
        offsets = range(-8, 9)
        candidates += [np.clip(first.scales.astype(int) + o, 1, 0x7E).astype(np.uint8) for o in offsets]
    best_scales, best_codes, best_error = first.scales, blocked(unpack(first.codes), NVFP4_BLOCK), np.inf
    for scales in candidates:
        decoded = decode_e4m3(scales)[..., None]
        reciprocal = np.where(decoded == 0, np.float32(0), np.float32(1) / (decoded * row_global[..., None]))
        codes = encode_e2m1(blocks * reciprocal)
        values = (decode_e2m1(codes) * decoded) * row_global[..., None]
        squares = (blocks.astype(np.float64) - values.astype(np.float64)) ** 2
        error = np.zeros(amax.shape)
        for k in range(NVFP4_BLOCK):
            error = error + squares[..., k]
        is_better = (amax > 0) & (error < best_error)
        best_error = np.where(is_better, error, best_error)
        best_scales = np.where(is_better, scales, best_scales)
        best_codes = np.where(is_better[..., None], codes, best_codes)
    packed = pack(unblocked(best_codes))
    return Nvfp4(packed, best_scales, global_scale, decode_nvfp4(packed, best_scales) * row_global)


def quantize_nvfp4_residual(x: Array, first: Nvfp4) -> Nvfp4:
    """The second term of nvfp4x2: what `first` left of (R, K), with the global scale of the first term."""
    return quantize_nvfp4(x - first.dequantized, first.global_scale)


def quantize_mxfp4(x: Array) -> tuple[Array, Array]:
    """float32 (R, K) -> codes (R, K/2) and e8m0 scales (R, K/32), the exponents by OCP MX v1.0."""
    blocks = blocked(x, MXFP4_BLOCK)
    amax = largest_magnitude(blocks, axis=-1)
    finite = np.isfinite(amax)
    # frexp's mantissa is in [0.5, 1), so its exponent is floor(log2) + 1, for subnormals too.
    exponent = np.frexp(np.where(finite, amax, np.float32(0)))[1] - 1 - 2
    exponent = np.where(amax == 0, -E8M0_BIAS, np.clip(exponent, -E8M0_BIAS, E8M0_BIAS))
    scales = np.where(finite, exponent + E8M0_BIAS, E8M0_NAN).astype(np.uint8)
    # Exact in float32 but for results below 2^-126, all of which become a zero of their sign.
    scaled = np.where(finite[..., None], np.ldexp(blocks, -exponent[..., None]), np.float32(np.nan))
    return pack(unblocked(encode_e2m1(scaled))), scales


def quantize_fp8(x: Array) -> tuple[Array, Array]:
    """bf16 or float32 (R, K) -> e4m3 codes (R, K) and one float32 scale a row (R,)."""
    values = x.astype(np.float32)
    row_scales = dynamic_global(largest_magnitude(values, axis=-1), E4M3_MAX)
    return encode_e4m3(values * (np.float32(1) / row_scales)[:, None]), row_scales


# ---- conversions of stored weights -------------------------------------------------------------------------


@dataclass
class Cast:
    """MXFP4 rewritten as NVFP4: codes (R, K/2), scales (R, K/16), global (), and the counts of 32-blocks."""

    codes: Array
    scales: Array
    global_scale: np.float32
    recoded: int
    inexact: int


def cast_mxfp4(packed: Array, scales: Array) -> Cast:
    """MXFP4 codes (R, K/2) and e8m0 scales (R, K/32) -> NVFP4, exact where the exponents' spread allows."""
    if np.any(scales == E8M0_NAN):
        raise ValueError("an MXFP4 scale is NaN")
    values = blocked(decode_e2m1(unpack(packed)), MXFP4_BLOCK)
    nonzero = np.any(values != 0, axis=-1)
    exponents = scales.astype(np.int32) - E8M0_BIAS
    global_exponent = int(exponents[nonzero].max()) - E4M3_LARGEST_EXPONENT if nonzero.any() else 0
    wanted = exponents - global_exponent
    stored = np.clip(wanted, E4M3_SMALLEST_EXPONENT, E4M3_LARGEST_EXPONENT)
    recoded = nonzero & (wanted < E4M3_SMALLEST_EXPONENT)
    shift = np.where(recoded, wanted - E4M3_SMALLEST_EXPONENT, 0)[..., None]
    exact = np.ldexp(values.astype(np.float64), shift)  # float32 would underflow and call lost values exact
    codes = encode_e2m1(exact)
    inexact = np.any(decode_e2m1(codes) != exact, axis=-1)
    new_scales = encode_e4m3(np.ldexp(np.float32(1), stored))
    return Cast(
        codes=pack(unblocked(codes)),
        scales=np.repeat(new_scales, 2, axis=-1),
        global_scale=np.ldexp(np.float32(1), global_exponent),
        recoded=int(recoded.sum()),
        inexact=int(inexact.sum()),
    )


@dataclass
class Fold:
    """Gate and up brought to one global scale; `changed` counts the blocks whose scale x global changed."""

    gate_scales: Array
    up_scales: Array
    global_scale: np.float32
    changed: int


def fold(gate_scales: Array, up_scales: Array, gate_global: np.float32, up_global: np.float32) -> Fold:
    """Rescale the blocks (I, H/16) of the half with the smaller global scale to the larger one."""
    larger = max(gate_global, up_global)
    gate, gate_changed = rescale_blocks(gate_scales, gate_global, larger)
    up, up_changed = rescale_blocks(up_scales, up_global, larger)
    return Fold(gate, up, larger, gate_changed + up_changed)


def rescale_blocks(scales: Array, own: np.float32, larger: np.float32) -> tuple[Array, int]:
    """Block scales under global `own` -> block scales under `larger`, and how many blocks moved."""
    if own == larger:
        return scales, 0
    rescaled = encode_e4m3(decode_e4m3(scales) * (own / larger))
    before = decode_e4m3(scales).astype(np.float64) * np.float64(own)
    after = decode_e4m3(rescaled).astype(np.float64) * np.float64(larger)
    return rescaled, int(np.sum(before != after))


# ---- the 128x4 layout --------------------------------------------------------------------------------------


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below value."""
    return -(-value // multiple) * multiple


def swizzle(scales: Array) -> Array:
    """(rows, K_sf) row-major -> the flat 128x4 layout, zero in the padding.

    A tile of 128 rows is four quarters of 32. In memory the four quarters of one row-within-quarter lie side
    by side, four columns each, which makes 16 bytes; 32 of these make the tile of 512.
    """
    rows, columns = scales.shape
    padding = ((0, round_up(rows, 128) - rows), (0, round_up(columns, 4) - columns))
    padded = np.pad(scales, padding)
    row_tile, quarter, row, column_tile, column = range(5)
    tiles = padded.reshape(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.transpose(row_tile, column_tile, row, quarter, column).reshape(-1)


def unswizzle(flat: Array, rows: int, columns: int) -> Array:
    """The flat 128x4 layout -> (rows, columns) row-major, padding dropped."""
    row_tiles, column_tiles = round_up(rows, 128) // 128, round_up(columns, 4) // 4
    row_tile, column_tile, row, quarter, column = range(5)
    tiles = flat.reshape(row_tiles, column_tiles, 32, 4, 4)
    padded = tiles.transpose(row_tile, quarter, row, column_tile, column)
    return padded.reshape(row_tiles * 128, column_tiles * 4)[:rows, :columns]


def swizzle_groups(scales: Array, group_offsets: Array) -> Array:
    """(M, K_sf), groups of rows by offsets (G+1,) -> each group swizzled on its own, concatenated."""
    return np.concatenate([swizzle(group) for group in np.split(scales, group_offsets[1:-1])])


def swizzle_experts(scales: Array) -> Array:
    """(E, N, K_sf) -> (E, padded N * padded K_sf), each expert swizzled on its own."""
    return np.stack([swizzle(expert) for expert in scales])


# ---- permutation and combine -------------------------------------------------------------------------------


@dataclass
class Permutation:
    """Rows sorted by expert: first row by expert (E+1,), slot and token by row (M,), row by slot (T*K,)."""

    group_offsets: Array
    slot_of_row: Array
    token_of_row: Array
    row_of_slot: Array
    out_of_range: bool


def permute(topk_ids: Array, experts: int) -> Permutation:
    """topk_ids (T, K) of any integer type -> stable sort by expert; -1 drops a slot, other strangers too."""
    ids = topk_ids.reshape(-1).astype(np.int64)
    kept = (ids >= 0) & (ids < experts)
    rows = int(kept.sum())
    slot_of_row = np.argsort(np.where(kept, ids, experts), kind="stable")[:rows].astype(np.int32)
    row_of_slot = np.full(ids.size, -1)
    row_of_slot[slot_of_row] = np.arange(rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(ids[kept], minlength=experts))])
    return Permutation(
        group_offsets=offsets.astype(np.int32),
        slot_of_row=slot_of_row,
        token_of_row=slot_of_row // np.int32(topk_ids.shape[1]),
        row_of_slot=row_of_slot.astype(np.int32),
        out_of_range=bool(np.any(~kept & (ids != -1))),
    )


def combine(z: Array, row_of_slot: Array, topk_weights: Array) -> Array:
    """z (M, H) bf16, row_of_slot (T*K,), weights (T, K) float32 -> float32 (T, H), summed in order of k."""
    tokens, choices = topk_weights.shape
    rows = row_of_slot.reshape(tokens, choices)
    total = np.zeros((tokens, z.shape[1]), np.float32)
    for k in range(choices):
        kept = rows[:, k] >= 0
        weighted = topk_weights[kept, k, None] * z[rows[kept, k]].astype(np.float32)
        total[kept] += weighted
    return total


# ---- multiplication and activation -------------------------------------------------------------------------


def gemm(a_terms: list[Array], b: Array, alpha: Scale, accumulate: type[np.floating] = np.float32) -> Array:
    """alpha * a @ b.T in float32: a_terms (M, K) each, b (N, K), alpha () or (M,) -> (M, N) float32.

    Sequential over k in the type `accumulate`, the terms of one k after each other. The products are exact.
    """
    total = np.zeros((a_terms[0].shape[0], b.shape[0]), accumulate)
    wide_terms = [a.astype(accumulate) for a in a_terms]
    wide_b = b.astype(accumulate)
    for k in range(b.shape[1]):
        for a in wide_terms:
            total += a[:, k, None] * wide_b[None, :, k]
    return np.reshape(alpha, (-1, 1)) * total.astype(np.float32)


def swiglu(h: Array, limit: float | None = None) -> Array:
    """bf16 (M, 2I), gate columns first -> bf16 (M, I), in float64 from the bf16 input, by way of float32."""
    gate, up = np.split(h.astype(np.float64), 2, axis=1)
    if limit is not None:
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit)
    activated = gate / (1 + np.exp(-gate)) * up
    return encode_bf16(activated.astype(np.float32))


# ---- the layer ---------------------------------------------------------------------------------------------


@dataclass
class Linear:
    """NVFP4 weights of one projection: codes (N, K/2), scales (N, K/16), global scale, calibrated input
    scale.
    """

    codes: Array
    scales: Array
    global_scale: np.float32
    input_scale: np.float32

    def operand(self) -> Array:
        """(N, K) float32 without the global scale."""
        return decode_nvfp4(self.codes, self.scales)


@dataclass
class Expert:
    """gate and up (I, H), down (H, I)."""

    gate: Linear
    up: Linear
    down: Linear

    def gate_up_input_scale(self) -> np.float32:
        """Staging has one scale for both halves: the larger of the two."""
        return max(self.gate.input_scale, self.up.input_scale)


@dataclass
class Staged:
    """Activations as the multiplication reads them.

    terms: operands (M, K) float32, two of them for nvfp4x2; row_globals (M,) float32, what the epilogue
    multiplies back; arrays: what was stored, under the driver's names without their prefix.
    """

    terms: list[Array]
    row_globals: Array
    arrays: dict[str, Array]


def static_globals(expert_scales: list[np.float32], group_offsets: Array, policy: str) -> Array:
    """One calibrated scale an expert -> the scale of every row (M,), by `static` or `max-over-experts`."""
    scales = np.array(expert_scales, np.float32)
    if policy == "max-over-experts":
        scales = np.full_like(scales, scales.max())
    return np.repeat(scales, np.diff(group_offsets))


def stage(
    rows: Array, activations: str, policy: str, expert_scales: list[np.float32], offsets: Array, rule: str = "amax"
) -> Staged:
    """bf16 rows (M, K) sorted by expert -> the activation format that the multiplication reads. `rule`: nvfp4's."""
    values = rows.astype(np.float32)
    if activations == "bf16":
        return Staged([values], np.ones(len(values), np.float32), {})
    if activations == "fp8":
        codes, row_scales = quantize_fp8(rows)
        return Staged([decode_e4m3(codes)], row_scales, {"codes": codes, "row_scales": row_scales})
    if policy == "dynamic-token":
        row_globals = nvfp4_global_of_rows(values)
    elif policy == "dynamic-tensor":
        row_globals = np.full(len(values), nvfp4_global_of_tensor(values))
    else:
        row_globals = static_globals(expert_scales, offsets, policy)
    if rule == "amax":
        first = quantize_nvfp4(values, row_globals)
    else:
        first = quantize_nvfp4_searching(values, row_globals, rule, modelopt_floor=False)
    arrays = {"codes": first.codes, "scales": first.scales, "row_scales": row_globals}
    terms = [decode_nvfp4(first.codes, first.scales)]
    if activations == "nvfp4x2":
        second = quantize_nvfp4_residual(values, first)
        arrays |= {"residual_codes": second.codes, "residual_scales": second.scales}
        terms.append(decode_nvfp4(second.codes, second.scales))
    return Staged(terms, row_globals, arrays)


def grouped_linear(
    staged: Staged, offsets: Array, weights: list[Linear], accumulate: type[np.floating]
) -> Array:
    """Each expert's rows times its weights: staged (M, K), weights (N, K) each -> bf16 (M, N)."""
    parts = []
    for linear, begin, end in zip(weights, offsets[:-1], offsets[1:], strict=True):
        alpha = staged.row_globals[begin:end] * linear.global_scale
        parts.append(gemm([a[begin:end] for a in staged.terms], linear.operand(), alpha, accumulate))
    return encode_bf16(np.concatenate(parts))


@dataclass
class Layer:
    """A mixture-of-experts layer and how it is run; the two halves are separate so that a test may feed its
    own a.
    """

    experts: list[Expert]
    activations: str
    policy: str
    limit: float | None = None
    accumulate: type[np.floating] = np.float32

    def up_to_a(self, x: Array, permutation: Permutation) -> tuple[Staged, Array, Array]:
        """x (T, H) bf16 -> staged x (M, H), h (M, 2I) bf16 with gate columns first, a (M, I) bf16."""
        offsets = permutation.group_offsets
        scales = [expert.gate_up_input_scale() for expert in self.experts]
        staged = stage(x[permutation.token_of_row], self.activations, self.policy, scales, offsets)
        gate = grouped_linear(staged, offsets, [expert.gate for expert in self.experts], self.accumulate)
        up = grouped_linear(staged, offsets, [expert.up for expert in self.experts], self.accumulate)
        h = np.concatenate([gate, up], axis=1)
        return staged, h, swiglu(h, self.limit)

    def from_a(self, a: Array, permutation: Permutation, topk_weights: Array) -> tuple[Staged, Array, Array]:
        """a (M, I) bf16 -> staged a (M, I), z (M, H) bf16, y (T, H) bf16."""
        offsets = permutation.group_offsets
        scales = [expert.down.input_scale for expert in self.experts]
        staged = stage(a, self.activations, self.policy, scales, offsets)
        z = grouped_linear(staged, offsets, [expert.down for expert in self.experts], self.accumulate)
        return staged, z, encode_bf16(combine(z, permutation.row_of_slot, topk_weights))
