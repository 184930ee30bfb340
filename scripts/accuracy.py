#!/usr/bin/env python3
"""What each scale rule of NVFP4 gains: cosines of one expert, printed as docs/accuracy.md has them.

    scripts/accuracy.py [--shape H,I] [--tokens T] [--seed N] [--real DIR --layer L]

Computes one SwiGLU expert in float64, with weights and activations quantized by each rule (amax, four-over-six, mse),
and compares it with the same expert in its original weights and activations: "L1" is the gate/up GEMM, "out" the whole
expert; W4A4 quantizes both sides, W4A16 the weights alone. Activations have one dynamic global scale a token. The
quantizers are those of tests/oracle (numpy, ml_dtypes), which tests hold equal to the library's, bit for bit, by every
rule. Rounding points in between are left out: this is about the formats.

Data: `gaussian` (weights of deviation 0.02, activations of 1), `heavy` (Student's t with 4 degrees, and one input channel
in 64 ten to thirty times as large), and with --real a folder that scripts/real_checkpoint.py made: expert 0 of a layer
and the hidden states that enter it.

Needs numpy and ml_dtypes. Exit status: 0 done, 1 error, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "oracle"))

try:
    import ml_dtypes
    import numpy as np

    import nvfp4_oracle as oracle
except ImportError as missing:
    sys.exit(f"error: expected numpy and ml_dtypes, found: {missing}; try build/venv/bin/python scripts/accuracy.py")

RULES = ("amax", "four-over-six", "mse")
EXPERT = "model.layers.{layer}.mlp.experts.0.{name}_proj.weight"

Expert = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, gate, up, down


def quantized(x: np.ndarray, rule: str, is_weight: bool) -> np.ndarray:
    """The values that are left of float32 (R, K), in float64."""
    global_scale = oracle.nvfp4_global_of_tensor(x) if is_weight else oracle.nvfp4_global_of_rows(x)
    if rule == "amax":
        result = oracle.quantize_nvfp4(x, global_scale, modelopt_floor=is_weight)
    else:
        result = oracle.quantize_nvfp4_searching(x, global_scale, rule, modelopt_floor=is_weight)
    return result.dequantized.astype(np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b)))


def run(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray,
        rule: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of the first GEMM and of the expert. `rule` of the activations; None: as they are."""
    staged = x if rule is None else quantized(x.astype(np.float32), rule, is_weight=False)
    g, u = staged @ gate.T, staged @ up.T
    activation = g / (1 + np.exp(-g)) * u
    if rule is not None:
        activation = quantized(activation.astype(np.float32), rule, is_weight=False)
    return np.concatenate([g, u], axis=1), activation @ down.T


def made_up(hidden: int, intermediate: int, tokens: int, seed: int, heavy: bool) -> Expert:
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        values = random.standard_t(4, shape) / np.sqrt(2) if heavy else random.standard_normal(shape)
        return values.astype(np.float32)

    x = draw(tokens, hidden)
    if heavy:
        channels = random.permutation(hidden)[: hidden // 64]
        x[:, channels] *= random.uniform(10, 30, channels.size).astype(np.float32)
    scale = np.float32(0.02)
    return x, scale * draw(intermediate, hidden), scale * draw(intermediate, hidden), scale * draw(hidden, intermediate)


def read_tensor(file: Path, name: str) -> np.ndarray:
    """A BF16 tensor of a safetensors file, as float32."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
        if name not in header:
            sys.exit(f"error: {file}: expected a tensor {name}, found none; another --layer?")
        begin, end = header[name]["data_offsets"]
        stream.seek(start + begin)
        values = np.frombuffer(stream.read(end - begin), ml_dtypes.bfloat16)
    return values.reshape(header[name]["shape"]).astype(np.float32)


def real(folder: Path, layer: int, tokens: int) -> Expert:
    files = sorted((folder / "original").glob("*.safetensors"))
    inputs = folder / "inputs" / f"layer-{layer:02}.safetensors"
    if len(files) != 1 or not inputs.exists():
        sys.exit(f"error: {folder}: expected original/*.safetensors and inputs/{inputs.name}, as "
                 "scripts/real_checkpoint.py writes them, found other files")
    gate, up, down = (read_tensor(files[0], EXPERT.format(layer=layer, name=name)) for name in ("gate", "up", "down"))
    return read_tensor(inputs, "x")[:tokens], gate, up, down


def print_rows(data: str, expert: Expert) -> None:
    x, *weights = (values.astype(np.float64) for values in expert)
    exact = run(x, *weights, rule=None)
    for rule in RULES:
        stored = [quantized(weight, rule, is_weight=True) for weight in expert[1:]]
        cosines = [cosine(a, b) for activations in (rule, None) for a, b in zip(exact, run(x, *stored, activations))]
        print(f"| {data} | {rule} | " + " | ".join(f"{value:.4f}" for value in cosines) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048,1024", metavar="H,I")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", type=Path, metavar="DIR")
    parser.add_argument("--layer", type=int, default=0)
    options = parser.parse_args()
    try:
        hidden, intermediate = map(int, options.shape.split(","))
    except ValueError:
        parser.error(f"--shape: expected H,I, found {options.shape}")
    if hidden < 64 or hidden % 16 or intermediate < 16 or intermediate % 16 or options.tokens < 1:
        parser.error("expected H and I to be multiples of 16, H at least 64, and at least one token")

    print("| data | rule, weights and activations | W4A4 L1 | W4A4 out | W4A16 L1 | W4A16 out |")
    print("| --- | --- | --- | --- | --- | --- |")
    print_rows("gaussian", made_up(hidden, intermediate, options.tokens, options.seed, heavy=False))
    print_rows("heavy", made_up(hidden, intermediate, options.tokens, options.seed, heavy=True))
    if options.real:
        print_rows(f"real, layer {options.layer}", real(options.real, options.layer, options.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
