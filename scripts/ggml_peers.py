#!/usr/bin/env python3
"""Peers for `fourfold bench --backend cpu`: the same expert layers by ggml, llama.cpp's CPU library.

    nvfp4    NVFP4 weights, their global scales as operations of their own: what llama.cpp makes of such a checkpoint
    mxfp4    MXFP4 weights (a scale per 32: 5.6% fewer bytes), repacked for this CPU, as llama.cpp does when it loads a model
    q4_0     Q4_0 weights (a float16 scale per 32: the same bytes as NVFP4), repacked likewise: its fastest of this size

A call is llama.cpp's graph of a mixture-of-experts FFN without router and top-k: mul_mat_id of gate and of up, swiglu,
mul_mat_id of down, times the routing weights, sum. x and y are float32; ggml itself rounds activations to Q8_0 (8 bits).

Weights are random and come from memory, as in `fourfold bench`: routings are uniform and differ from call to call, each
layer hands its experts out in turn, several layers take turns where one is smaller than three times the last-level
cache, and experts of three times its size are hit before one is hit again.

Before it is timed, a case is compared with sums in float64 over the decoded weights, on tokens spread over the call:
relative L2 at most 2e-2 (8 bits of activations cost about 1e-2).

ggml is looked for in the package llama-cpp-python, which pip compiles for the CPU of this machine
(`pip install llama-cpp-python`), or given as --ggml FOLDER, with libggml-base.so and libggml-cpu.so. Needs numpy.

Exit status: 0 done, 1 error, 2 usage, 3 a case computed wrong numbers, 77 no ggml here.

usage: ggml_peers.py [--ggml FOLDER] [--types nvfp4,mxfp4,q4_0] [--shape NAMES] [--experts N] [--tokens LIST]
                     [--threads LIST] [--min-time SECONDS] [--json FILE] [--beside BENCH_JSON]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_shapes import SHAPES, models_of, names_of, numbers_of

ROUTINGS = 8
MOST_LAYERS = 32
CHECKED_TOKENS = 8
MOST_ERROR = 2e-2
SKIPPED = 77
LIBRARIES = ("libggml-base.so", "libggml-cpu.so")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


# ---- weights ----


@dataclass
class BlockFormat:
    """A 4-bit format of ggml. A block is `scale_bytes` of scales, then codes: a group of 2 n values is n bytes, the first
    n values in the low halves."""

    number: int  # of enum ggml_type
    values: int  # a block
    scale_bytes: int
    group: int  # values that share a scale
    repacked: bool  # where the CPU's kernels want another layout
    global_scales: bool
    make_scales: Callable[[np.random.Generator, int], np.ndarray]  # of so many blocks: [blocks, scale_bytes] uint8
    decode_scales: Callable[[np.ndarray], np.ndarray]  # [blocks, scale_bytes] uint8 -> [blocks, values / group] float32
    code_values: np.ndarray  # [16] float32
    deviation: float  # of the values that make_scales and uniform codes give

    @property
    def block_bytes(self) -> int:
        return self.scale_bytes + self.values // 2


def e4m3_values(encoded: np.ndarray) -> np.ndarray:
    """Positive normal e4m3 -> float32."""
    return np.ldexp(1 + (encoded & 7) / np.float32(8), (encoded.astype(np.int32) >> 3) - 7).astype(np.float32)


def random_e4m3(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """24 to 352, as amax / 6 of Gaussian blocks gives beside a global scale for 448."""
    return rng.integers(0x5C, 0x7B, (blocks, 4), np.uint8, endpoint=True)


def random_exponents(rng: np.random.Generator, blocks: int) -> np.ndarray:
    return rng.integers(119, 121, (blocks, 1), np.uint8, endpoint=True)


def random_halves(rng: np.random.Generator, blocks: int) -> np.ndarray:
    return rng.uniform(0.002, 0.006, (blocks, 1)).astype(np.float16).view(np.uint8)


def deviation_of(code_values: np.ndarray, scales: np.ndarray) -> float:
    """Of products of uniform codes and such scales."""
    return math.sqrt(float(np.mean(code_values**2)) * float(np.mean(scales.astype(np.float64) ** 2)))


def block_formats() -> dict[str, BlockFormat]:
    def exponents(scales: np.ndarray) -> np.ndarray:
        return np.ldexp(np.float32(1), scales.astype(np.int32) - 127)

    def halves(scales: np.ndarray) -> np.ndarray:
        return scales.view(np.float16).astype(np.float32)

    offset = np.arange(-8, 8, dtype=np.float32)
    formats = {
        "nvfp4": BlockFormat(40, 64, 4, 16, False, True, random_e4m3, e4m3_values, E2M1, 0),
        "mxfp4": BlockFormat(39, 32, 1, 32, True, False, random_exponents, exponents, E2M1, 0),
        "q4_0": BlockFormat(2, 32, 2, 32, True, False, random_halves, halves, offset, 0),
    }
    for form in formats.values():
        sample = form.decode_scales(form.make_scales(np.random.default_rng(0), 4096))
        form.deviation = deviation_of(form.code_values, sample)
    return formats


FORMATS = block_formats()


def random_matrices(form: BlockFormat, rng: np.random.Generator, experts: int, rows: int, cols: int) -> np.ndarray:
    """[E, N, K / values, block_bytes] uint8."""
    blocks = experts * rows * cols // form.values
    stored = np.empty((blocks, form.block_bytes), np.uint8)
    stored[:, : form.scale_bytes] = form.make_scales(rng, blocks)
    stored[:, form.scale_bytes :] = rng.integers(0, 255, (blocks, form.values // 2), np.uint8, endpoint=True)
    return stored.reshape(experts, rows, cols // form.values, form.block_bytes)


def decode(form: BlockFormat, stored: np.ndarray) -> np.ndarray:
    """A matrix [N, K / values, block_bytes] -> [N, K] float32, without its global scale."""
    rows = stored.shape[0]
    blocks = stored.reshape(-1, form.block_bytes)
    scales = form.decode_scales(np.ascontiguousarray(blocks[:, : form.scale_bytes]))
    codes = blocks[:, form.scale_bytes :].reshape(-1, form.values // form.group, form.group // 2)
    values = form.code_values[np.concatenate((codes & 15, codes >> 4), axis=2)]
    return (values * scales[..., None]).reshape(rows, -1)


# ---- ggml ----


class InitParams(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


F32, I32 = 0, 26  # of enum ggml_type
POINTER, INT, SIZE, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
LOG = ctypes.CFUNCTYPE(None, INT, ctypes.c_char_p, POINTER)
NODES = 256


class Ggml:
    """The functions that are used here, of ggml 0.25's C interface."""

    def __init__(self, folder: Path) -> None:
        self.base, self.cpu = (ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES)
        for library, result, name, *arguments in (
            (self.base, ctypes.c_char_p, "ggml_version"),
            (self.base, ctypes.c_char_p, "ggml_type_name", INT),
            (self.base, None, "ggml_log_set", LOG, POINTER),
            (self.base, POINTER, "ggml_init", InitParams),
            (self.base, None, "ggml_free", POINTER),
            (self.base, POINTER, "ggml_new_tensor", POINTER, INT, INT, ctypes.POINTER(LONG)),
            (self.base, POINTER, "ggml_mul_mat_id", POINTER, POINTER, POINTER, POINTER),
            (self.base, POINTER, "ggml_swiglu_split", POINTER, POINTER, POINTER),
            (self.base, POINTER, "ggml_mul", POINTER, POINTER, POINTER),
            (self.base, POINTER, "ggml_add", POINTER, POINTER, POINTER),
            (self.base, POINTER, "ggml_cont", POINTER, POINTER),
            (self.base, POINTER, "ggml_get_rows", POINTER, POINTER, POINTER),
            (self.base, POINTER, "ggml_repeat_4d", POINTER, POINTER, LONG, LONG, LONG, LONG),
            (self.base, POINTER, "ggml_view_2d", POINTER, POINTER, LONG, LONG, SIZE, SIZE),
            (self.base, POINTER, "ggml_new_graph_custom", POINTER, SIZE, ctypes.c_bool),
            (self.base, None, "ggml_build_forward_expand", POINTER, POINTER),
            (self.base, None, "ggml_set_output", POINTER),
            (self.base, SIZE, "ggml_nbytes", POINTER),
            (self.base, POINTER, "ggml_backend_cpu_buffer_type"),
            (self.base, POINTER, "ggml_backend_alloc_ctx_tensors_from_buft", POINTER, POINTER),
            (self.base, None, "ggml_backend_buffer_free", POINTER),
            (self.base, None, "ggml_backend_tensor_set", POINTER, POINTER, SIZE, SIZE),
            (self.base, None, "ggml_backend_tensor_get", POINTER, POINTER, SIZE, SIZE),
            (self.base, INT, "ggml_backend_graph_compute", POINTER, POINTER),
            (self.base, POINTER, "ggml_gallocr_new", POINTER),
            (self.base, ctypes.c_bool, "ggml_gallocr_alloc_graph", POINTER, POINTER),
            (self.base, None, "ggml_gallocr_free", POINTER),
            (self.base, ctypes.c_char_p, "ggml_backend_buft_name", POINTER),
            (self.base, POINTER, "ggml_backend_reg_dev_get", POINTER, SIZE),
            (self.base, POINTER, "ggml_backend_reg_get_proc_address", POINTER, ctypes.c_char_p),
            (self.cpu, POINTER, "ggml_backend_cpu_init"),
            (self.cpu, None, "ggml_backend_cpu_set_n_threads", POINTER, INT),
            (self.cpu, POINTER, "ggml_backend_cpu_reg"),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.silent = LOG(lambda level, text, data: None)  # it names every tensor that it repacks
        self.log_set(self.silent, None)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()

    def expect_types(self, names: Iterable[str]) -> None:
        for name in names:
            found = (self.type_name(FORMATS[name].number) or b"none").decode()
            if found != name:
                raise RuntimeError(
                    f"ggml {self.version().decode()}: expected {name} as its type {FORMATS[name].number}, found {found}; "
                    "pip install --upgrade llama-cpp-python, or leave it out of --types"
                )

    def buffer_type(self, name: str) -> int:
        """One of those that the CPU has beside the plain one."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        of_device = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)
        names = []
        for found in of_device(self.backend_reg_dev_get(registry, 0)):
            if not found:
                break
            names.append(self.backend_buft_name(found).decode())
            if names[-1] == name:
                return found
        raise RuntimeError(f"ggml: expected a buffer type {name}, found {', '.join(names) or 'none'}")

    def tensor(self, context: int, kind: int, *sizes: int) -> int:
        """Sizes fastest first, as ggml has them."""
        return self.new_tensor(context, kind, len(sizes), (LONG * len(sizes))(*sizes))

    def allocate(self, context: int, kind: int) -> int:
        """A buffer of that type for all tensors of a context."""
        buffer = self.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise MemoryError("ggml: no memory for an expert layer; give fewer --experts")
        return buffer

    def fill(self, tensor: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        if values.nbytes != self.nbytes(tensor):
            raise RuntimeError(f"ggml: expected {self.nbytes(tensor)} bytes for a tensor, found {values.nbytes}")
        self.backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def context(self) -> int:
        """For the descriptions of tensors and of a graph; their data lie elsewhere."""
        return self.init(InitParams(1 << 20, None, True))


def ggml_folder(given: Path | None) -> Path | None:
    """Where ggml's libraries are; None where no folder is given and no package is installed."""
    if given is None:
        spec = importlib.util.find_spec("llama_cpp")  # finds without importing
        if spec is None or not spec.submodule_search_locations:
            return None
        given = Path(next(iter(spec.submodule_search_locations))) / "lib"
    missing = [name for name in LIBRARIES if not (given / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{given}: expected a folder with {' and '.join(LIBRARIES)} of ggml 0.25, found no {missing[0]}; "
            "pip install llama-cpp-python, or give another folder as --ggml FOLDER"
        )
    return given


def layer_bytes(form: BlockFormat, experts: int, hidden: int, intermediate: int) -> int:
    return 3 * experts * hidden * intermediate // form.values * form.block_bytes


class Layer:
    """Weights of an expert layer, in ggml's memory and as bytes to decode."""

    def __init__(self, ggml: Ggml, form: BlockFormat, experts: int, hidden: int, intermediate: int, seed: int) -> None:
        self.ggml, self.form, self.experts, self.hidden = ggml, form, experts, hidden
        self.expert_bytes = layer_bytes(form, 1, hidden, intermediate)
        rng = np.random.default_rng(seed)
        sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self.stored = {name: random_matrices(form, rng, experts, rows, cols) for name, (rows, cols) in sizes.items()}
        # A format without global scales gets its right magnitude from x: what is timed does not depend on it.
        self.globals = {
            name: (rng.uniform(0.5, 1.5, experts) / (form.deviation * math.sqrt(cols))).astype(np.float32)
            if form.global_scales
            else np.ones(experts, np.float32)
            for name, (rows, cols) in sizes.items()
        }
        self.contexts = [ggml.context(), ggml.context()]
        self.weights = {
            name: ggml.tensor(self.contexts[0], form.number, cols, rows, experts)
            for name, (rows, cols) in sizes.items()
        }
        self.scales = {name: ggml.tensor(self.contexts[1], F32, 1, experts, 1) for name in sizes}
        kind = ggml.buffer_type("CPU_REPACK") if form.repacked else ggml.plain
        self.buffers = [ggml.allocate(self.contexts[0], kind), ggml.allocate(self.contexts[1], ggml.plain)]
        for name in sizes:
            ggml.fill(self.weights[name], self.stored[name])
            ggml.fill(self.scales[name], self.globals[name])

    def close(self) -> None:
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.free(context)

    def decoded(self, name: str, expert: int) -> np.ndarray:
        return decode(self.form, self.stored[name][expert]) * self.globals[name][expert]


class Call:
    """The graph of a layer for so many tokens."""

    def __init__(self, layer: Layer, tokens: int, top_k: int) -> None:
        self.layer, self.ggml, self.tokens, self.top_k = layer, layer.ggml, tokens, top_k
        ggml, hidden = self.ggml, layer.hidden
        self.inputs = ggml.context()
        self.x = ggml.tensor(self.inputs, F32, hidden, 1, tokens)
        self.ids = ggml.tensor(self.inputs, I32, top_k, tokens)
        self.routing_weights = ggml.tensor(self.inputs, F32, 1, top_k, tokens)
        self.input_buffer = ggml.allocate(self.inputs, ggml.plain)
        self.nodes = ggml.context()
        self.graph = ggml.new_graph_custom(self.nodes, NODES, False)
        gate, up = self.multiply("gate", self.x), self.multiply("up", self.x)
        activated = ggml.swiglu_split(self.nodes, gate, up)
        slots = ggml.mul(self.nodes, self.multiply("down", activated), self.routing_weights)
        ggml.build_forward_expand(self.graph, slots)
        row = hidden * 4
        parts = [ggml.view_2d(self.nodes, slots, hidden, tokens, top_k * row, k * row) for k in range(top_k)]
        self.y = parts[0] if top_k > 1 else ggml.cont(self.nodes, parts[0])
        for part in parts[1:]:
            self.y = ggml.add(self.nodes, self.y, part)
        ggml.set_output(self.y)
        ggml.build_forward_expand(self.graph, self.y)
        self.allocator = ggml.gallocr_new(ggml.plain)
        if not ggml.gallocr_alloc_graph(self.allocator, self.graph):
            raise MemoryError(f"ggml: no memory for the intermediate results of {tokens} tokens")

    def multiply(self, name: str, rows: int) -> int:
        ggml, layer = self.ggml, self.layer
        product = ggml.mul_mat_id(self.nodes, layer.weights[name], rows, self.ids)
        if not layer.form.global_scales:
            return product
        scales = ggml.repeat_4d(self.nodes, layer.scales[name], 1, layer.experts, self.tokens, 1)
        return ggml.mul(self.nodes, product, ggml.get_rows(self.nodes, scales, self.ids))

    def set_routing(self, ids: np.ndarray, weights: np.ndarray) -> None:
        self.ggml.fill(self.ids, ids.astype(np.int32))
        self.ggml.fill(self.routing_weights, weights.astype(np.float32))

    def run(self) -> None:
        status = self.ggml.backend_graph_compute(self.ggml.backend, self.graph)
        if status != 0:
            raise RuntimeError(f"ggml: the graph of {self.tokens} tokens ended with status {status}")

    def result(self) -> np.ndarray:
        y = np.empty((self.tokens, self.layer.hidden), np.float32)
        self.ggml.backend_tensor_get(self.y, y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        self.ggml.gallocr_free(self.allocator)
        self.ggml.backend_buffer_free(self.input_buffer)
        self.ggml.free(self.nodes)
        self.ggml.free(self.inputs)


# ---- measuring ----


class Dealer:
    """Gives experts out in turn, so that one is hit again only after all others were."""

    def __init__(self, rng: np.random.Generator, experts: int) -> None:
        self.deck, self.next = rng.permutation(experts), 0

    def deal(self, ids: np.ndarray) -> np.ndarray:
        hit = np.unique(ids)
        names = np.zeros_like(self.deck)
        names[hit] = self.deck[(self.next + np.arange(hit.size)) % self.deck.size]
        self.next += hit.size
        return names[ids]


def uniform_routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [T, K] of different experts, weights [T, K] that add up to one."""
    ids = np.argpartition(rng.random((tokens, experts)), top_k - 1, axis=1)[:, :top_k]
    weights = rng.random((tokens, top_k)) + 0.05
    return ids, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def exact(layer: Layer, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A few tokens in float64, expert by expert: x [T, H] -> y [T, H]."""
    y = np.zeros(x.shape, np.float64)
    for expert in np.unique(ids):
        gate, up, down = (layer.decoded(name, expert).astype(np.float64) for name in ("gate", "up", "down"))
        for token, slot in np.argwhere(ids == expert):
            g = gate @ x[token]
            y[token] += weights[token, slot] * (down @ (g / (1 + np.exp(-g)) * (up @ x[token])))
    return y


def samples_of(calls: list[Call], routings: list, min_seconds: float) -> list[float]:
    """Seconds of a call; layers and routings take turns."""
    samples: list[float] = []
    total, turn = 0.0, 0
    while len(samples) < 3 or (total < min_seconds and len(samples) < 2000):
        call = calls[turn % len(calls)]
        call.set_routing(*routings[turn % len(routings)])
        started = time.perf_counter()
        call.run()
        seconds = time.perf_counter() - started
        turn += 1
        if turn > 2:  # two to warm up
            samples.append(seconds)
            total += seconds
    return samples


@dataclass
class Timing:
    threads: list[int]
    min_seconds: float


def measure(layers: list[Layer], tokens: int, top_k: int, timing: Timing) -> tuple[float, dict[int, float]]:
    """Relative L2 of the check, and seconds of a call by number of threads; none where numbers are wrong."""
    ggml, form, experts, hidden = layers[0].ggml, layers[0].form, layers[0].experts, layers[0].hidden
    rng = np.random.default_rng(tokens)
    magnitude = 1.0 if form.global_scales else 1 / (form.deviation * math.sqrt(hidden))
    x = (rng.standard_normal((tokens, hidden), np.float32) * magnitude).astype(np.float32)
    dealers = [Dealer(rng, experts) for _ in layers]
    cold = math.ceil((3 * cache_bytes() / layers[0].expert_bytes + experts) / top_k)
    count = -(-max(ROUTINGS, cold) // len(layers)) * len(layers)  # a routing is always the same layer's
    routings = []
    for turn in range(count):
        ids, weights = uniform_routing(rng, tokens, experts, top_k)
        routings.append((dealers[turn % len(layers)].deal(ids), weights))
    calls = [Call(layer, tokens, top_k) for layer in layers]
    try:
        for call in calls:
            ggml.fill(call.x, x)
        ggml.backend_cpu_set_n_threads(ggml.backend, max(timing.threads))
        ids, weights = routings[0]
        calls[0].set_routing(ids, weights)
        calls[0].run()
        few = np.unique(np.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS)).round().astype(int))
        expected = exact(layers[0], x[few], ids[few], weights[few])
        error = float(np.linalg.norm(calls[0].result()[few] - expected) / np.linalg.norm(expected))
        seconds = {}
        if error <= MOST_ERROR:  # false for NaN, too
            for threads in timing.threads:
                ggml.backend_cpu_set_n_threads(ggml.backend, threads)
                seconds[threads] = statistics.median(samples_of(calls, routings, timing.min_seconds))
        return error, seconds
    finally:
        for call in calls:
            call.close()


def cache_bytes() -> int:
    """Of the last level."""
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes)


def cpu_name() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.split(":", 1)[1].strip()
    return "unknown"


def times_beside(path: Path) -> dict[tuple[str, int, int, int], dict[str, float]]:
    """Seconds of `fourfold bench --json`, by model, experts, tokens and threads, for each activation format."""
    times: dict[tuple[str, int, int, int], dict[str, float]] = {}
    try:
        for case in json.loads(path.read_text())["cases"]:
            if case.get("seconds") and case.get("threads"):
                cell = times.setdefault((case["model"], case["experts"], case["tokens"], case["threads"]), {})
                cell[case["activations"]] = case["seconds"]["median"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--beside: expected what `fourfold bench --json` writes, found {path}: {type(error).__name__}: {error}"
        ) from error
    return times


def line(case: dict, beside: dict[str, float]) -> str:
    text = f"{case['peer']:<6} {case['model']:<18} {case['tokens']:>5} tokens {case['threads']:>3} threads"
    if case["seconds"] is None:
        return text + f"  wrong: relative L2 {case['rel_l2']:.2g}"
    text += f" {case['seconds'] * 1e3:>10.3f} ms  relative L2 {case['rel_l2']:.1e}"
    for name, seconds in beside.items():
        text += f"   fourfold {name} {seconds * 1e3:.3f} ms, {case['seconds'] / seconds:.2f}x"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, help="folder of ggml's libraries; without it, llama-cpp-python's")
    parser.add_argument("--types", default="nvfp4,mxfp4,q4_0", help="formats of the weights, with commas")
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="names or aliases, with commas")
    parser.add_argument("--experts", type=int, help="at most so many of a shape's experts, to bound memory")
    parser.add_argument("--tokens", default="1,8,64,512", help="numbers of tokens, with commas")
    parser.add_argument("--threads", default="1", help="numbers of threads, with commas")
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds of samples a case, at least")
    parser.add_argument("--json", type=Path, help="write the results as JSON")
    parser.add_argument("--beside", type=Path, help="JSON of `fourfold bench` to print beside")
    arguments = parser.parse_args()
    types = names_of(parser, "--types", arguments.types, list(FORMATS))
    models = models_of(parser, arguments.shape)
    tokens = numbers_of(parser, "--tokens", arguments.tokens)
    threads = numbers_of(parser, "--threads", arguments.threads)
    if arguments.experts is not None and arguments.experts < 1:
        parser.error(f"--experts: expected a positive number, found {arguments.experts}")
    if not arguments.min_time >= 0:
        parser.error(f"--min-time: expected seconds, not negative, found {arguments.min_time}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that is there, found {arguments.json}")
    try:
        folder = ggml_folder(arguments.ggml)
        beside = times_beside(arguments.beside) if arguments.beside else {}
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if folder is None:
        print(
            "skipped: no package llama-cpp-python on this machine; install it, or give ggml's folder as --ggml FOLDER"
        )
        return SKIPPED
    try:
        ggml = Ggml(folder)
        ggml.expect_types(types)
    except (OSError, AttributeError, RuntimeError) as error:  # not loadable, of another version
        sys.exit(f"error: {error}")
    report: dict = {"ggml": ggml.version().decode(), "machine": cpu_name(), "cases": []}
    print(f"ggml {report['ggml']}, {report['machine']}", flush=True)
    for model in models:
        all_experts, hidden, intermediate, top_k = SHAPES[model]
        experts = min(all_experts, arguments.experts or all_experts)
        for kind in types:
            form = FORMATS[kind]
            bytes_each = layer_bytes(form, experts, hidden, intermediate)
            count = min(MOST_LAYERS, max(1, math.ceil(3 * cache_bytes() / bytes_each)))
            layers = [Layer(ggml, form, experts, hidden, intermediate, seed) for seed in range(count)]
            for layer in layers[1:]:
                layer.stored.clear()  # the first one alone is compared
            for number in tokens:
                error, seconds = measure(layers, number, min(top_k, experts), Timing(threads, arguments.min_time))
                for of in threads:
                    case = {"peer": kind, "model": model, "experts": experts, "tokens": number, "threads": of}
                    report["cases"].append({**case, "rel_l2": error, "seconds": seconds.get(of)})
                    print(line(report["cases"][-1], beside.get((model, experts, number, of), {})), flush=True)
                if arguments.json:
                    part = arguments.json.with_name(arguments.json.name + ".part")
                    part.write_text(json.dumps(report, indent=2) + "\n")
                    part.replace(arguments.json)
            for layer in layers:
                layer.close()
    return 0 if all(case["seconds"] for case in report["cases"]) else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MemoryError, RuntimeError) as failure:
        sys.exit(f"error: {failure}")
