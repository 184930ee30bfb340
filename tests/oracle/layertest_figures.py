"""What layertest reports, computed once more: running the command, error sums and their figures, and what
staging with a given scale loses.

Names in shapes: as in nvfp4_oracle.py; P is parts of a comparison, rows or experts.
"""

import os
import subprocess

import numpy as np
import pytest

import nvfp4_oracle as oracle
from nvfp4_oracle import Array

COMMAND_VARIABLE = "FOURFOLD_COMMAND"
TIME_LIMIT_S = 120
FINE, FINDING = 0, 3  # exit statuses of layertest

# Both sides take the same float32 steps in the same order, but for the exp of another libm: measured, figures
# agree to 5e-16. Should an exp turn a bf16 to its neighbour, at most 2^-8 of the element, that moves the
# relative L2 of the quietest comparison (bf16 activations: 6e-5 over 2^18 elements) by 5e-7. This leaves room
# for twenty, and none for sums in another order.
TOLERANCE = 1e-5


def run_command(command: list[object], expected: tuple[int, ...] = (0,)) -> int:
    """Run a command to its end; its exit status, which has to be one of `expected`."""
    words = [str(word) for word in command]
    process = subprocess.run(words, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    if process.returncode not in expected:
        output = process.stdout + process.stderr
        raise RuntimeError(f"{' '.join(words)}: status {process.returncode}\n{output}")
    return process.returncode


def fourfold() -> str:
    """The command under test."""
    if COMMAND_VARIABLE not in os.environ:
        raise RuntimeError(f"{COMMAND_VARIABLE} must name the fourfold command")
    return os.environ[COMMAND_VARIABLE]


def error_sums(reference: Array, candidate: Array) -> Array:
    """(P, n) twice -> (P, 4): |reference|^2, |candidate|^2, their product, |difference|^2, in float64.

    Such rows add up: the sum over parts is the row of the whole.
    """
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    factors = (r, r), (c, c), (r, c), (c - r, c - r)
    return np.stack([np.einsum("pn,pn->p", a, b) for a, b in factors], axis=1)


def relative_l2(sums: Array) -> Array:
    """Error sums (P, 4) -> |difference| / |reference| of each part (P,)."""
    return np.sqrt(sums[:, 3] / sums[:, 0])


def worst(losses: Array, labels: Array) -> set[int]:
    """Labels (P,) of the parts with the largest loss (P,); several where they tie."""
    return set(labels[losses >= losses.max() - TOLERANCE].tolist())


def check_figures(name: str, found: dict, sums: Array) -> None:
    """Cosine, norm ratio and relative L2 of a stage in the report, against sums over its parts (P, 4)."""
    reference, candidate, product, difference = sums.sum(axis=0)
    expected = {
        "cosine": product / np.sqrt(reference * candidate),
        "norm_ratio": np.sqrt(candidate / reference),
        "rel_l2": np.sqrt(difference / reference),
    }
    figures = {figure: found[figure] for figure in expected}
    assert figures == pytest.approx(expected, rel=0, abs=TOLERANCE), name


# ---- scales of staging -------------------------------------------------------------------------------------


def staging_ratios(
    rows: Array, scales: list[np.float32], activations: str, policy: str, offsets: Array
) -> dict[int, float]:
    """What staging rows (M, K) bf16 under a policy loses in each expert that has rows, as a multiple of what a
    scale by token loses: the larger of the medians' ratio and of what saturates.
    """
    staged = oracle.stage(rows, activations, policy, scales, offsets)
    by_token = oracle.stage(rows, activations, "dynamic-token", scales, offsets)
    wide = rows.astype(np.float64)
    terms = len(staged.terms)
    excess = np.maximum(np.abs(wide) - terms * 2688.0 * staged.row_globals[:, None].astype(np.float64), 0)
    clipped = (excess**2).sum(axis=1)
    noise = np.sum((wide - dequantized(by_token).astype(np.float64)) ** 2, axis=1)
    losses, best_losses = (relative_l2(error_sums(rows, dequantized(s))) for s in (staged, by_token))
    ratios = {}
    for expert, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if begin < end:
            part = slice(begin, end)
            medians = upper_median(losses[part]) / upper_median(best_losses[part])
            ratios[expert] = max(medians, np.sqrt(1 + clipped[part].sum() / noise[part].sum()))
    return ratios


def dequantized(staged: oracle.Staged) -> Array:
    """The values that a staging stands for, (M, K) float32."""
    return sum(term * staged.row_globals[:, None] for term in staged.terms)


def upper_median(values: Array) -> float:
    """Of an even number, the upper of the two in the middle."""
    return np.sort(values)[len(values) // 2]
