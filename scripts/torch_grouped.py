#!/usr/bin/env python3
"""A control for `fourfold bench`: the same expert layers in bf16 by PyTorch's grouped GEMM, timed in the same run.

Weights are random bf16 (not NVFP4: 3.6 times the bytes), routings uniform and different from call to call; a call is the
whole layer from x, topk_ids and topk_weights to y, calls of a rotation are captured into one CUDA graph, and a sample is
a replay of it. Results are checked against float32 on sampled tokens before they are timed.

usage: torch_grouped.py [--shape NAMES] [--tokens LIST] [--json FILE] [--beside GRID_JSON]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: expected PyTorch with CUDA: pip install torch")
from bench_shapes import SHAPES, models_of, numbers_of

ROTATION = 8
MIN_SECONDS = 0.05
MOST_ERROR = 2e-2  # bf16 at every step: 5e-3 is usual


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [M, K] in groups that end at `ends` [E], weights [E, K, N] -> [M, N]."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return (public or torch._grouped_mm)(rows, weights, offs=ends)


class Layer:
    """An expert layer in bf16."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        def weight(rows: int, cols: int) -> torch.Tensor:
            stored = torch.empty(experts, rows, cols, device="cuda", dtype=torch.bfloat16)
            for expert in stored:  # one at a time: no float32 copy of the whole
                expert.copy_(torch.randn(rows, cols, device="cuda") / cols**0.5)
            return stored

        self.experts = experts
        self.gate_up = weight(2 * intermediate, hidden)
        self.down = weight(hidden, intermediate)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        top_k = ids.shape[1]
        order = torch.argsort(ids.flatten(), stable=True)
        counts = torch.zeros(self.experts, device="cuda", dtype=torch.int32)
        counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        h = grouped_mm(x[order // top_k], self.gate_up.transpose(1, 2), ends)
        gate, up = h.chunk(2, dim=1)
        z = grouped_mm(torch.nn.functional.silu(gate) * up, self.down.transpose(1, 2), ends)
        slots = torch.empty_like(z)
        slots[order] = z
        return (slots.view(*ids.shape, -1).float() * weights[..., None]).sum(1).bfloat16()

    def exact(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A few tokens in float32, expert by expert."""
        rows = []
        for token in range(x.shape[0]):
            y = 0
            for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                gate, up = (self.gate_up[expert].float() @ x[token].float()).chunk(2)
                y = y + weight * (self.down[expert].float() @ (torch.nn.functional.silu(gate) * up))
            rows.append(y)
        return torch.stack(rows)


def routing(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, device="cuda") + 0.05
    return ids, weights / weights.sum(1, keepdim=True)


def time_rotation(layer: Layer, x: torch.Tensor, routings: list) -> list[float]:
    """Seconds of a call, replay by replay."""
    for ids, weights in routings[:2]:
        layer.forward(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for ids, weights in routings:
            layer.forward(x, ids, weights)
    graph.replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    total = 0.0
    while len(samples) < 3 or (total < MIN_SECONDS and len(samples) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        samples.append(seconds / len(routings))
        total += seconds
    return samples


def measure(layer: Layer, name: str, tokens: int, hidden: int, top_k: int) -> dict:
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    routings = [routing(tokens, layer.experts, top_k) for _ in range(ROTATION)]
    few = slice(0, 4)
    ids, weights = routings[0]
    y, exact = layer.forward(x, ids, weights)[few].float(), layer.exact(x[few], ids[few], weights[few])
    error = ((y - exact).norm() / exact.norm()).item()
    result = {"model": name, "tokens": tokens, "rel_l2": error, "seconds": None}
    if error <= MOST_ERROR:
        result["seconds"] = statistics.median(time_rotation(layer, x, routings))
    return result


def times_beside(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Seconds of `fourfold bench --json`, by model and tokens, for each activation format."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    if path.exists():
        for case in json.loads(path.read_text())["cases"]:
            if case.get("seconds"):
                cell = times.setdefault((case["model"], case["tokens"]), {})
                cell[case["activations"]] = case["seconds"]["median"]
    return times


def line(result: dict, beside: dict[str, float]) -> str:
    text = f"{result['model']:<20} {result['tokens']:>6}"
    seconds = result["seconds"]
    text += f" {seconds * 1e6:>11.1f} us" if seconds else f"  wrong: relative L2 {result['rel_l2']:.2g}"
    for name, other in beside.items():
        text += f"   fourfold {name} {other * 1e6:>10.1f} us" + (f", {seconds / other:.2f}x" if seconds else "")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="A,B,C", help="names or aliases, with commas")
    parser.add_argument("--tokens", default="1,16,256,4096", help="numbers of tokens, with commas")
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    parser.add_argument("--beside", type=Path, help="JSON of `fourfold bench` to print beside")
    arguments = parser.parse_args()
    models, numbers = models_of(parser, arguments.shape), numbers_of(parser, "--tokens", arguments.tokens)
    torch.manual_seed(0)
    beside = times_beside(arguments.beside) if arguments.beside else {}
    print(f"torch {torch.__version__} grouped_mm, bf16 weights, {torch.cuda.get_device_name()}")
    results = []
    for name in models:
        experts, hidden, intermediate, top_k = SHAPES[name]
        layer = Layer(experts, hidden, intermediate)
        for tokens in numbers:
            results.append(measure(layer, name, tokens, hidden, top_k))
            print(line(results[-1], beside.get((name, tokens), {})), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"torch": torch.__version__, "cases": results}, indent=2) + "\n")
        del layer
        torch.cuda.empty_cache()
    return 0 if all(result["seconds"] for result in results) else 3


if __name__ == "__main__":
    sys.exit(main())
