"""Random inputs that several test files share. Every generator is seeded by the test that calls it."""

import ml_dtypes
import numpy as np

import nvfp4_oracle as oracle

LOUD = 4096


def scalar(value: float | np.floating) -> np.ndarray:
    """A float32 tensor of shape (1,), the form in which global scales travel."""
    return np.array([value], np.float32)


def random_nvfp4(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform codes and uniform finite scale codes for values of `shape` (..., K): magnitudes of all sizes
    mixed, so that a float32 sum depends on its order.
    """
    rows, k = shape[:-1], shape[-1]
    codes = rng.integers(0, 256, (*rows, k // 2), np.uint8)
    scales = rng.integers(0, oracle.E4M3_NAN, (*rows, k // oracle.NVFP4_BLOCK), np.uint8)
    return codes, scales


def loud_bf16(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """bfloat16 (rows, columns): normal, but the first and the last channel are equal and LOUD.

    With weights that cancel the two, partial sums are large and the result small: the order in which float32
    accumulates shows even after rounding to bf16.
    """
    x = rng.standard_normal((rows, columns), np.float32)
    x[:, 0] = x[:, -1] = LOUD * rng.uniform(0.5, 1, rows)
    return x.astype(ml_dtypes.bfloat16)


def quantized_linear(weights: np.ndarray, input_scale: float) -> oracle.Linear:
    """(N, K) quantized as `convert` does."""
    quantized = oracle.quantize_nvfp4(weights, oracle.nvfp4_global_of_tensor(weights), modelopt_floor=True)
    return oracle.Linear(
        quantized.codes, quantized.scales, np.float32(quantized.global_scale), np.float32(input_scale)
    )


def cancelling_weights(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """Normal weights (N, K) of a random spread; first and last column are opposite, and the largest of their
    blocks, so that they are quantized to opposite values.
    """
    spread = np.float32(rng.uniform(0.05, 0.3))
    weights = spread * rng.standard_normal((outputs, inputs), np.float32)
    weights[:, 0], weights[:, -1] = 8 * spread, -8 * spread
    return weights


def random_experts(rng: np.random.Generator, experts: int, hidden: int, inner: int) -> list[oracle.Expert]:
    """Experts for loud_bf16, whose intermediate too has an equal and loud first and last channel.

    The calibrated input scales scatter around the fitting ones, from saturating to too large.
    """

    def off_by_up_to_16(scale: float) -> float:
        return scale * 2.0 ** rng.uniform(-4, 4)

    def gate_or_up() -> oracle.Linear:
        weights = cancelling_weights(rng, inner, hidden)
        weights[0] *= 16
        weights[-1] = weights[0]
        return quantized_linear(weights, off_by_up_to_16(LOUD / 2688))

    def down() -> oracle.Linear:
        return quantized_linear(cancelling_weights(rng, hidden, inner), off_by_up_to_16(LOUD / 8 / 2688))

    return [oracle.Expert(gate_or_up(), gate_or_up(), down()) for _ in range(experts)]
