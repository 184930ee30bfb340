"""Tensors on a GPU: the operator's bits, streams, CUDA graphs, torch.compile, and what a call costs. Skipped without
torch or a GPU that a backend computes on. `pytest -s` prints the times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fourfold

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

HIDDEN, INNER, EXPERTS, TOP_K = 1024, 512, 8, 2
FORMATS = ("bf16", "nvfp4")


def make_layer(activations: str) -> fourfold.MoeLayer:
    generator = torch.Generator().manual_seed(5)

    def matrices(rows: int, cols: int) -> list[fourfold.QuantizedMatrix]:
        return [fourfold.quantize(torch.randn(rows, cols, generator=generator) / cols**0.5) for _ in range(EXPERTS)]

    weights = fourfold.expert_weights(
        gate=matrices(INNER, HIDDEN), up=matrices(INNER, HIDDEN), down=matrices(HIDDEN, INNER)
    )
    layer = fourfold.MoeLayer(weights, top_k=TOP_K, activations=activations)  # type: ignore[arg-type]
    if layer.cuda_device is None:
        pytest.skip(f"no backend computes on this GPU: {layer.backend_reason}")
    return layer


@pytest.fixture(scope="module", params=FORMATS)
def layer(request: pytest.FixtureRequest) -> fourfold.MoeLayer:
    return make_layer(request.param)


def inputs(tokens: int, seed: int = 1) -> tuple[Any, Any, Any]:
    """x, topk_ids and topk_weights on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return x.cuda(), ids.int().cuda(), weights.cuda()


def of_host_arrays(layer: fourfold.MoeLayer, x: Any, ids: Any, weights: Any) -> Any:
    """The C++ layer's result, of numpy arrays that it copies itself."""
    host = x.cpu().view(torch.uint16).numpy().view("bfloat16")
    y = layer.forward(host, ids.cpu().numpy(), weights.cpu().numpy())
    return torch.from_numpy(y.view(np.uint16)).view(torch.bfloat16).cuda()


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_operator_gives_the_layers_bits(layer: fourfold.MoeLayer, tokens: int) -> None:
    from fourfold.torch import moe_experts, register_layer

    number = register_layer(layer)
    arguments = inputs(tokens)
    y = moe_experts(*arguments, number)
    assert y.is_cuda and torch.equal(y, of_host_arrays(layer, *arguments))
    torch.library.opcheck(moe_experts, (*arguments, number))


def test_other_streams_are_used(layer: fourfold.MoeLayer) -> None:
    """A call waits for what its own stream still computes: x is made there, late."""
    x, ids, weights = inputs(64)
    due = layer.forward(x, ids, weights)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x.clone()
        y = layer.forward(late, ids, weights)
    stream.synchronize()
    assert torch.equal(y, due)


def captured(call: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of `call`, warmed up, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


def test_replayed_graph_follows_its_inputs(layer: fourfold.MoeLayer) -> None:
    from fourfold.torch import FourfoldExperts

    module = FourfoldExperts(layer)
    x, ids, weights = inputs(48)
    graph, y = captured(lambda: module(x, ids, weights))
    for seed in (2, 3):
        for held, new in zip((x, ids, weights), inputs(48, seed), strict=True):
            held.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, of_host_arrays(layer, x, ids, weights)), seed


def test_compiled_whole(layer: fourfold.MoeLayer) -> None:
    from fourfold.torch import FourfoldExperts

    module = FourfoldExperts(layer)
    x, ids, weights = inputs(16)

    def run(x: Any) -> Any:
        return module(x, ids, weights)

    assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))
    reduced = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(reduced(x), run(x))


def test_foreign_arrays_on_the_gpu(layer: fourfold.MoeLayer) -> None:
    cupy = pytest.importorskip("cupy")
    x, ids, weights = inputs(8)
    due = layer.forward(x, ids, weights)
    workspace = cupy.empty(layer.plan(8).workspace_bytes, cupy.uint8)
    out = torch.empty_like(x)
    layer.forward(x, cupy.asarray(ids), cupy.asarray(weights), out=out, workspace=workspace)
    torch.cuda.synchronize()
    assert torch.equal(out, due)


def milliseconds(replay: Callable[[], Any], calls: int = 200) -> float:
    """Of one call, by CUDA events around many."""
    for _ in range(20):
        replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


@pytest.mark.parametrize("tokens", [1, 64])
def test_replay_costs_what_the_layer_costs(layer: fourfold.MoeLayer, tokens: int) -> None:
    """Graphs of the bare C++ call, into memory that is there, and of the operator: the same kernels, the same time."""
    from fourfold.torch import moe_experts, register_layer

    number = register_layer(layer)
    arguments = inputs(tokens)
    plan, out = layer.plan(tokens), torch.empty_like(arguments[0])
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    bare, _ = captured(lambda: layer.forward(*arguments, out=out, plan=plan, workspace=workspace))
    operator, _ = captured(lambda: moe_experts(*arguments, number))
    rounds = [(milliseconds(bare.replay), milliseconds(operator.replay)) for _ in range(5)]
    direct, through = (sorted(times)[2] for times in zip(*rounds, strict=True))
    begin = time.perf_counter()
    for _ in range(200):
        moe_experts(*arguments, number)
    enqueued = (time.perf_counter() - begin) / 200 * 1e3
    torch.cuda.synchronize()
    print(
        f"\n{layer.activations}, {tokens} tokens: replay of the layer {direct * 1e3:.1f} us, of the operator "
        f"{through * 1e3:.1f} us; an eager call takes the host {enqueued * 1e3:.1f} us"
    )
    assert through < 1.05 * direct + 0.002
